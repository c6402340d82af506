"""Every call gives on another device what it gives on the CPU.

Also on one without float64, and of a model that lies partly there and partly here.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers

from tests.support.elsewhere import WAITS, elsewhere, spread, without_float64
from tests.support.models import TRANSFORMER_LENS, load, words
from tests.support.pictures import ANSWERS as NAMES
from tests.support.pictures import CAPITALS, FACT, PROMPT, PROMPTS
from tests.support.pictures import INCORRECT as OTHERS
from tests.zoo.build import ANSWERS, INCORRECT, hf_reference, tokens
from tests.zoo.configs import BOOT_FAILS, CLASSES, NATIVE, RUN_FAILS
from tl_dla import (
    ablate,
    accumulated_resid,
    apply_ln_to_stack,
    attribute_answer,
    attribute_attention,
    attribute_completion,
    attribute_dataset,
    attribute_inputs,
    attribute_path,
    check_model,
    compare,
    copy_suppression,
    decompose,
    decompose_resid,
    direct_effect_recomputed,
    direct_logit_attribution,
    erasures,
    load_model,
    load_result,
    logit_attrs,
    logit_lens,
    self_repair,
    stack_head_results,
    summarize,
    token_map,
    top_heads_with_patterns,
    unembedding_pca,
)
from tl_dla.datasets.examples import windows
from tl_dla.demo import FOLDER
from tl_dla.errors import UnsupportedModelError

UNITS = ("component", "layer", "head", "source", "neuron")
EFFECTS = ("component", "head", "neuron")


def attributed(model: Any, unit: str = "head", **options: Any) -> Any:
    return direct_logit_attribution(model, PROMPT, " Mary", " John", unit=unit, **options)


def batch(model: Any, unit: str = "head") -> Any:
    return direct_logit_attribution(model, PROMPTS, NAMES, OTHERS, unit=unit, pos=None)


def cached(model: Any) -> Any:
    return model.run_with_cache(model.to_tokens(PROMPT))[1]


def from_cache(model: Any, cache: Any) -> Any:
    answers = dict(answer_tokens=" Mary", incorrect_tokens=" John")
    return direct_logit_attribution(model, cache=cache, unit="head", **answers)


def stacked(model: Any) -> Any:
    cache = cached(model)
    stack = decompose_resid(cache, pos_slice=-1)
    return [
        logit_attrs(cache, stack, " Mary", incorrect_tokens=" John", pos_slice=-1),
        apply_ln_to_stack(cache, stack, pos_slice=-1),
        accumulated_resid(cache),
        stack_head_results(cache),
        decompose(cache, unit="head").vectors,
    ]


def kept(model: Any, folder: Any) -> Any:
    path = attributed(model).save(folder / "result.safetensors")
    again = load_result(path, model)
    return [again, ablate(again, ["L3H0"]), again.audit(progress=False).to_dataframe()]


def dataset(model: Any, folder: Any) -> Any:
    examples = [
        dict(prompt=p, answer=a, incorrect=i)
        for p, a, i in zip(PROMPTS, NAMES, OTHERS, strict=True)
    ]
    attribute_dataset(model, examples, out=folder / "set", unit="head", progress=False)
    return summarize(folder / "set").to_dataframe()


def changed(model: Any) -> Any:
    other = PROMPT.replace("shops, John", "shops, Mary")
    return compare(
        attributed(model), direct_logit_attribution(model, other, " Mary", " John", unit="head")
    ).to_dataframe()


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    **{f"by {unit}": lambda m, _, unit=unit: attributed(m, unit) for unit in UNITS},
    **{f"a batch by {unit}": lambda m, _, unit=unit: batch(m, unit) for unit in UNITS},
    "candidates": lambda m, _: direct_logit_attribution(m, FACT, candidate_tokens=CAPITALS),
    "the mean": lambda m, _: direct_logit_attribution(m, FACT, " Paris", "mean"),
    "a cache": lambda m, _: from_cache(m, cached(m)),
    "a cache on the CPU": lambda m, _: from_cache(m, cached(m).to("cpu")),
    "stacks": lambda m, _: stacked(m),
    "readout": lambda m, _: attributed(m).readout.of(torch.ones(2, m.cfg.d_model)),
    "promoted": lambda m, _: attributed(m).promoted_tokens("L3H0").effect,
    "probabilities": lambda m, _: attributed(m).log_prob_diff,
    "curves": lambda m, _: attributed(m, "neuron", layers=3).neuron_curves().plot(),
    "sources": lambda m, _: attributed(m, "source").plot_sources(k=5),
    "profile": lambda m, _: direct_logit_attribution(m, FACT, " Paris").plot_profile(),
    "audit": lambda m, _: batch(m).audit(progress=False).to_dataframe(),
    "ablate": lambda m, _: ablate(batch(m), ["L3H0"]),
    "repair": lambda m, _: self_repair(batch(m), "L3H0").to_dataframe(),
    "erasures": lambda m, _: erasures(batch(m)).to_dataframe(),
    "recomputed": lambda m, _: direct_effect_recomputed(batch(m)),
    "suppression": lambda m, _: copy_suppression(batch(m)),
    "patterns": lambda m, _: [head.row for head in top_heads_with_patterns(batch(m))],
    "path": lambda m, _: attribute_path(attributed(m, "source"), "L3H0", " Mary"),
    "inputs": lambda m, _: attribute_inputs(m, PROMPTS, NAMES, OTHERS),
    "flow": lambda m, _: attribute_inputs(m, PROMPT, " Mary", " John").plot_flow(),
    "score": lambda m, _: attribute_attention(m, PROMPT, "L3H0", key=" Mary", versus=2).plot(),
    "answer": lambda m, _: attribute_answer(m, FACT, " Paris and").to_dataframe(),
    "completion": lambda m, _: attribute_completion(m, FACT, max_new_tokens=3).to_dataframe(),
    "lens": lambda m, _: logit_lens(m, PROMPT).plot(),
    "token map": lambda m, _: token_map(m, 3, 0).plot(NAMES, NAMES),
    "pca": lambda m, _: unembedding_pca(m, CAPITALS).plot(),
    "check": lambda m, _: check_model(m, PROMPT).passed,
    "compare": lambda m, _: changed(m),
    "report": lambda m, folder: attributed(m).report(folder / "page.html").name,
    "save": kept,
    "dataset": dataset,
}


def numbers(x: Any) -> Iterator[np.ndarray]:
    """All numbers of an answer, a table or a figure."""
    if isinstance(x, torch.Tensor):
        yield x.detach().cpu().double().numpy().ravel()
    elif isinstance(x, pd.DataFrame):
        yield x.select_dtypes("number").to_numpy(dtype=float).ravel()
    elif isinstance(x, bool | int | float):
        yield np.array([x], dtype=float)
    elif isinstance(x, dict | list | tuple):
        for one in x.values() if isinstance(x, dict) else x:
            yield from numbers(one)
    elif hasattr(x, "to_plotly_json"):
        yield from numbers(json.loads(x.to_json())["data"])
    elif hasattr(x, "attribution"):
        yield from numbers([x.attribution, x.reconstruction.tolerance])
    else:
        assert x is None or isinstance(x, str), type(x)


def answer(name: str, model: Any, folder: Any) -> np.ndarray:
    return np.concatenate([*numbers(CALLS[name](model, folder)), np.zeros(0)])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Callable[[str], Any]]:
    """The demo model in each place, and what each call gives on the CPU."""
    own = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    here = load_model("demo", device="cpu")
    there = load_model("demo", device="cpu").to(elsewhere())
    both = load_model(spread(own.eval(), first=False), tokenizer)
    models = {"here": here, "there": there, "in both": both}
    return models, functools.cache(lambda name: answer(name, here, tmp_path_factory.mktemp("cpu")))


PLACES = {
    "there": ("there", contextlib.nullcontext),
    "there, without float64": ("there", without_float64),
    "here, and tensors are made there": ("here", elsewhere),  # as torch.set_default_device has it
    "in both": ("in both", contextlib.nullcontext),
}


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("name", CALLS)
def test_every_call_gives_what_it_gives_on_the_cpu(name, where, demo, tmp_path):
    models, on_the_cpu = demo
    wanted = on_the_cpu(name)
    place, inside = PLACES[where]
    if name == "completion" and place == "there" and TRANSFORMER_LENS < 4:
        pytest.skip("HookedTransformer.generate takes no subclass of Tensor")
    with inside():
        found = answer(name, models[place], tmp_path)
    largest = np.abs(wanted[np.isfinite(wanted)]).max(initial=0)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("first", [True, False], ids=["first there", "first here"])
@pytest.mark.parametrize("name", ["gemma2", "llama", "mixtral"])
def test_a_model_that_lies_in_both_gives_what_it_gives_in_one(name, first):
    here, both = load(name), load_model(spread(hf_reference(name), first=first), words())
    for unit in UNITS:
        for incorrect in INCORRECT, "mean":
            options = dict(unit=unit, pos=None)
            found, wanted = (
                direct_logit_attribution(model, tokens(), ANSWERS, incorrect, **options)
                for model in (both, here)
            )
            close(found.attribution, wanted.attribution)
    found, wanted = (
        attribute_inputs(model, tokens(), ANSWERS, INCORRECT) for model in (both, here)
    )
    close(found.attribution, wanted.attribution)
    # Gradients are not asked for: autograd knows the devices of its first backward pass alone.
    for unit in EFFECTS if name != "mixtral" else EFFECTS[:2]:
        close(*(x.effects(unit, lines="frozen").attribution for x in (found, wanted)))


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in [*CLASSES, *NATIVE] if n not in {*BOOT_FAILS, *RUN_FAILS}]
)
def test_every_class_is_read_there(name, tmp_path):
    here, there = load.__wrapped__(name), load.__wrapped__(name).to(elsewhere())
    for unit in UNITS:
        try:
            wanted = direct_logit_attribution(here, tokens(), ANSWERS, INCORRECT, unit=unit)
        except UnsupportedModelError:
            continue
        with without_float64():
            found = direct_logit_attribution(there, tokens(), ANSWERS, INCORRECT, unit=unit)
        torch.testing.assert_close(
            found.attribution.cpu(), wanted.attribution, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_the_pass_waits_for_nothing(name, unit):
    """Hooks read no number of the device, which would then stand idle, before the model is done."""
    model = load.__wrapped__(name).to(elsewhere())
    inner = [getattr(block, "original_component", block) for block in model.blocks]
    seen = []
    inner[0].register_forward_pre_hook(lambda *_: WAITS.clear())
    inner[-1].register_forward_hook(lambda *_: seen.append([*WAITS]))
    direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, unit=unit)
    assert WAITS and seen == [[]]


def test_examples_are_read_without_waiting():
    """A wait for each of thousands of prompts would take longer than running them."""
    here, there = load_model("demo"), load_model("demo").to(elsewhere())
    texts = dict(prompt=PROMPT, answer=" Mary", incorrect=[" John", " Tom"])
    ids = dict(prompt=[5, 6, 7], answer=8, incorrect=[9, 10])
    WAITS.clear()
    [found] = windows(there, [texts, ids], batch_size=2)
    assert not WAITS and found == next(windows(here, [texts, ids], batch_size=2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_a_gpu_gives_what_the_cpu_gives(name, unit):
    here, there = (
        direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, unit=unit)
        for model in (load(name), load.__wrapped__(name).to("cuda"))
    )
    assert there.numbers.rows.is_cuda
    torch.testing.assert_close(there.attribution.cpu(), here.attribution, atol=1e-4, rtol=1e-4)


def test_tensors_of_two_devices_do_not_meet():
    there = torch.ones(2, 3).to(elsewhere())
    assert (there + 1).device == elsewhere()
    with pytest.raises(RuntimeError, match="add was given"):
        there + torch.ones(2, 3)
    with without_float64(), pytest.raises(TypeError, match="no float64"):
        there.double()

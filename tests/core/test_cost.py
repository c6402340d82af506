"""What attribution may cost: one pass, in parts where logits would not fit, on any device.

How long it takes is measured by `python -m tests.benchmarks`, not tested.
"""

import weakref

import pytest
import torch
from torch import nn

from tests.support.models import counted, either, load, of_4
from tests.zoo.build import ANSWERS, INCORRECT, bridge_of, build, tokens
from tl_dla import direct_logit_attribution
from tl_dla.core import run
from tl_dla.core.readout import Readout

MODELS = "gpt2", "gemma2"
UNITS = ["component", "layer", "head", "neuron", "source"]


def same(one, other, tolerance=1e-5):
    assert one.labels == other.labels and one.kinds == other.kinds
    torch.testing.assert_close(
        one.attribution, other.attribution, atol=tolerance, rtol=tolerance, equal_nan=True
    )
    torch.testing.assert_close(one.logit, other.logit, atol=tolerance, rtol=0, equal_nan=True)


# ---- more prompts than fit -----------------------------------------------------------------------


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", either("gpt2", "gemma2", "ln"))
def test_prompts_run_in_parts_give_what_they_give_together(name, unit, monkeypatch):
    model, ragged = load(name), torch.ones(5, 9, dtype=torch.long)
    for row, n in enumerate((9, 4, 6, 9, 2)):  # padded on either side
        ragged[row, n:] = 0
    ragged[1] = ragged[1].flip(0)
    for pos, incorrect in [(-1, 7), (None, 7), (None, "mean"), ([0, -1], torch.arange(5) + 20)]:
        options = dict(unit=unit, pos=pos, attention_mask=ragged)
        prompts = tokens(5, 9)
        whole = direct_logit_attribution(model, prompts, 5, incorrect, **options)
        with monkeypatch.context() as patch:
            width = whole.positions.index.shape[1]
            patch.setattr(run, "_LOGITS_AT_ONCE", 2 * width * model.cfg.d_vocab)
            with counted(model) as shapes:
                parts = direct_logit_attribution(model, prompts, 5, incorrect, **options)
        passes = [shape[0] for shape in shapes[::2]]
        assert passes == [2, 2, 1] * (1 + (name == "gemma2" and incorrect == "mean"))
        assert all(shape[:2] == (n, width) for n, shape in zip(passes, shapes[1::2], strict=True))
        same(parts, whole)


def test_answers_of_their_own_follow_their_prompts_into_the_parts(monkeypatch):
    model = load("gpt2")
    whole = direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, pos=None)
    monkeypatch.setattr(run, "_LOGITS_AT_ONCE", 1)
    with counted(model) as shapes:
        same(direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, pos=None), whole)
    assert shapes == [(1, 11, 32), (1, 11, 97)] * 2


def test_rows_over_candidates_are_kept_once():
    options = dict(candidate_tokens=torch.arange(64), unit="neuron", pos=None)
    plain, capped = (direct_logit_attribution(load(x), tokens(), **options) for x in MODELS)
    assert plain.nbytes < 1.2 * plain.values.nbytes
    assert capped.nbytes > 2 * capped.values.nbytes  # before the cap and after it


def test_directions_of_many_positions_are_there_for_one_layer_at_a_time(monkeypatch):
    """Heads have positions × d_model numbers a layer, of which only dot products are kept."""
    alive, most, pulled = weakref.WeakSet(), [], Readout.through_linear

    def counted_pull(self, weight):
        alive.add(found := pulled(self, weight))
        most.append(len(alive))
        return found

    monkeypatch.setattr(Readout, "through_linear", counted_pull)
    result = direct_logit_attribution(load("gpt2"), tokens(), 5, unit="head", pos=None)
    assert result.reconstruction.passed and most == [1, 1, 1]


# ---- weights elsewhere ---------------------------------------------------------------------------


@of_4  # TransformerLens 3 refuses weights on disk
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_weights_that_are_offloaded_are_brought_back(name, unit, tmp_path):
    model = offloaded(name, tmp_path)
    inner = model.original_model
    assert any(parameter.device.type == "meta" for parameter in inner.parameters())
    expected = direct_logit_attribution(load(name), tokens(), ANSWERS, INCORRECT, unit=unit)
    same(direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, unit=unit), expected)


def offloaded(name, folder):
    """A model whose blocks lie on disk until they run, as `device_map` leaves them."""
    import transformers

    path = build(name)[1]
    inner = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    blocks = next(
        f"{prefix}.{part}"
        for prefix, module in inner.named_children()
        for part, child in module.named_children()
        if isinstance(child, nn.ModuleList)
    )
    stack = inner.get_submodule(blocks)
    prefix = blocks.rpartition(".")[0]
    others = [f"{prefix}.{part}" for part, _ in inner.get_submodule(prefix).named_children()]
    device_map = dict.fromkeys([part for part in others if part != blocks] + ["lm_head"], "cpu")
    device_map |= {f"{blocks}.{layer}": "disk" if layer else "cpu" for layer in range(len(stack))}
    inner = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        attn_implementation="eager",
        device_map=device_map,
        offload_folder=str(folder),
    )
    return bridge_of(path, hf_model=inner)

"""`run` and `again`: one question, asked once or once more, whoever else uses the model."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.support.models import either, load
from tests.zoo.build import ANSWERS, INCORRECT, hf_reference, tokens
from tl_dla import (
    ArgumentError,
    ReconstructionError,
    ablate,
    attribute_path,
    check_model,
    compare,
    direct_logit_attribution,
    logit_lens,
)
from tl_dla.core import run
from tl_dla.core.certificate import Reconstruction
from tl_dla.core.run import again
from tl_dla.model.reader import ModelReader

UNITS = ["component", "layer", "head", "neuron", "source"]


# ---- threads -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", either("gpt2", "gemma2", "ln"))
def test_calls_from_eight_threads_give_what_they_give_one_by_one(name):
    model = load(name)
    prompts = [torch.randint(3, 90, (1, 5 + i)) for i in range(8)]

    def call(i):
        return direct_logit_attribution(model, prompts[i % 8], 5 + i % 8, unit=UNITS[i % 5])

    serial = [call(i).attribution for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(call, range(400)))
    for i, result in enumerate(found):
        assert result.reconstruction.passed
        torch.testing.assert_close(result.attribution, serial[i % 40], atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_a_pass_of_the_users_own_in_another_thread_is_left_alone():
    # Of as many prompts: a bridge keeps the batch size of the last pass for its positions.
    model, other = load("gpt2"), tokens(2, 7)
    expected, stop, seen = model(other).detach(), threading.Event(), []

    def forward():
        while not stop.is_set():
            seen.append(model(other).detach())

    thread = threading.Thread(target=forward)
    thread.start()
    whole = direct_logit_attribution(model, tokens(), ANSWERS, unit="head")
    for _ in range(30):
        result = direct_logit_attribution(model, tokens(), ANSWERS, unit="head")
        torch.testing.assert_close(result.attribution, whole.attribution)
    stop.set()
    thread.join()
    assert seen
    for logits in seen:  # a hook that others read may lay activations out, and so round, otherwise
        torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-5)


def test_nothing_never_passes():
    empty = torch.empty(0)
    assert not Reconstruction(empty, empty, empty).passed
    nan = torch.full((2,), torch.nan)
    assert not Reconstruction(nan, nan, nan).passed
    with pytest.raises(ReconstructionError, match=r"shape \(2,\), but .* has \(3,\)"):
        Reconstruction(torch.ones(3), torch.ones(2), torch.ones(3))


# ---- once more ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", either("gemma2", "softcap"))
def test_the_mean_of_capped_logits_is_the_baseline_of_every_run(name):
    """The mean of capped logits has a direction of its own, which re-runs once left out."""
    model = load(name)
    result = direct_logit_attribution(model, tokens(), ANSWERS, "mean", unit="head")
    logits = model(tokens())[:, -1].detach()
    own = logits[[0, 1], ANSWERS] - logits.mean(-1)
    torch.testing.assert_close(result.logit, own, atol=1e-5, rtol=0)
    for unit in ("component", "layer", "source"):
        other = again(result, unit).result(type(result))
        assert other.reconstruction.passed
        torch.testing.assert_close(other.logit, own, atol=1e-5, rtol=0)
    components = direct_logit_attribution(model, tokens(), ANSWERS, "mean")
    rerun = again(result, "component").result(type(result))
    torch.testing.assert_close(rerun.attribution, components.attribution, atol=1e-5, rtol=1e-4)
    without = ablate(result, ["L1H2"], progress=False)["L1H2"]
    assert without.reconstruction.passed
    hook = f"blocks.1.attn.{'hook_z' if name == 'softcap' else 'o.hook_in'}"

    def zero(z, hook):
        flat = z.flatten(2).unflatten(2, (model.cfg.n_heads, -1)).clone()
        flat[:, -1, 2] = 0
        return flat.reshape(z.shape)

    ablated = model.run_with_hooks(tokens(), fwd_hooks=[(hook, zero)])[:, -1].detach()
    own = ablated[[0, 1], ANSWERS] - ablated.mean(-1)
    torch.testing.assert_close(without.logit, own, atol=1e-5, rtol=0)


def test_a_result_of_another_cache_is_not_run_again_in_silence():
    """Left padding that a cache saw, and its input, are of two runs: an audit would mix them."""
    model = load("gpt2")
    _, cache = model.run_with_cache(tokens())
    result = direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, unit="head", cache=cache)
    again(result)
    final = ModelReader(model).stream().points[-1].site.name
    held = cache.cache_dict[final]
    cache.cache_dict[final] = held + torch.linspace(-1, 1, held.shape[-1]).square()
    edited = direct_logit_attribution(
        model, tokens(), ANSWERS, INCORRECT, unit="head", cache=cache, check="off"
    )
    for ask in (
        lambda: edited.audit(2, progress=False),
        lambda: edited.promoted_tokens("L1H2", prompt=0),
        lambda: attribute_path(edited, "L1H2", 3),
        lambda: ablate(edited, ["L1H2"], progress=False),
    ):
        with pytest.raises(ArgumentError, match="does not give its logits again"):
            ask()


@pytest.mark.parametrize("name", either("gpt2", "gemma2", "ln"))
def test_ablated_prompts_run_in_parts_where_their_logits_would_not_fit(name, monkeypatch):
    model, rows = load(name), ["L0H1", ["L1H0", "L2H3"], "1_mlp_out"]
    result = direct_logit_attribution(
        model, tokens(5, 9), torch.arange(5) + 5, "mean", unit="head", pos=[0, -1]
    )
    for ablation in ("zero", "mean", "resample"):
        options = dict(ablation=ablation, progress=False)
        whole = ablate(result, rows, **options)
        with monkeypatch.context() as patch:
            patch.setattr(run, "_LOGITS_AT_ONCE", 2 * 2 * model.cfg.d_vocab)
            parts = ablate(result, rows, **options)
        for label, one in whole.items():
            assert one.labels == parts[label].labels
            torch.testing.assert_close(
                parts[label].attribution, one.attribution, atol=1e-5, rtol=1e-4
            )


def test_a_long_call_shows_how_far_it_is(monkeypatch, capsys):
    model, rows = load("gpt2"), tokens(5, 9)
    direct_logit_attribution(model, rows, 5)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(run, "_LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(run, "SHOWN_AFTER", 600)
    direct_logit_attribution(model, rows, 5)
    assert capsys.readouterr().err == ""  # what is quick says nothing
    monkeypatch.setattr(run, "SHOWN_AFTER", 0)
    direct_logit_attribution(model, rows, 5)
    assert re.search(r"prompts:.*/5 ", capsys.readouterr().err)


# ---- precision ---------------------------------------------------------------------------------


def test_contractions_stay_in_float32_under_autocast():
    model = load("gpt2")
    with torch.autocast("cpu", torch.bfloat16):
        result = direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, unit="head")
        logits = model(tokens())[:, -1].detach().float()
        ablated = ablate(result, ["L1H2"], progress=False)["L1H2"]
    assert result.reconstruction.passed and ablated.reconstruction.passed
    own = logits[[0, 1], ANSWERS] - logits[[0, 1], INCORRECT]
    torch.testing.assert_close(result.logit, own, atol=1e-6, rtol=0)
    # Added up in bfloat16, the rows would miss each other by a hundredth of the largest.
    total = result.attribution.double().sum(0)
    assert float((total - result.reconstruction.reconstructed).abs().max()) < 1e-5


def test_readouts_are_pulled_back_in_float32_under_autocast():
    """By hand, from what the model showed under autocast."""
    model, plain = load("gpt2"), hf_reference("gpt2")
    with torch.autocast("cpu", torch.bfloat16):
        result = direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, unit="head")
        _, cache = model.run_with_cache(tokens())
    u = plain.lm_head.weight[ANSWERS] - plain.lm_head.weight[INCORRECT]
    norm, W_O = plain.transformer.ln_f, plain.transformer.h[1].attn.c_proj.weight[16:24]
    torch.testing.assert_close(result["ln_final.b"], u @ norm.bias, atol=1e-6, rtol=0)
    w = norm.weight * u
    wrote = cache["blocks.1.attn.hook_z"][:, -1, 2].float() @ W_O
    moved = (wrote * (w - w.mean(-1, keepdim=True))).sum(-1)
    scale = cache["ln_final.hook_scale"][:, -1, 0].float()
    torch.testing.assert_close(result["L1H2"], moved / scale, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_paths_and_comparisons_run_under_the_callers_autocast(name):
    model = load(name)

    def ask():
        one = direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, unit="source")
        other = direct_logit_attribution(model, tokens(), INCORRECT, 3, unit="source")
        path = attribute_path(attribute_path(one, "L2H1", 3), "L1H1", 2)
        return one, path, compare(one, other, answers=True)

    _, path, changes = ask()
    with torch.autocast("cpu", torch.bfloat16):
        one, own_path, own_changes = ask()
    assert own_path.reconstruction.passed and own_changes.reconstruction.passed
    assert own_path.labels == path.labels and own_changes.labels == changes.labels
    largest = float(path.attribution.abs().max())
    assert 0 < float((own_path.attribution - path.attribution).abs().max()) < 0.05 * largest
    torch.testing.assert_close(own_changes.values_a[..., 0, 0], one.attribution)
    torch.testing.assert_close(own_changes.change, changes.change, atol=0.05, rtol=0)


@pytest.mark.parametrize("name", ["gemma2", "falcon"])
def test_what_reads_the_model_again_knows_of_autocast(name):
    model = load(name)
    labels = direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT).labels
    with torch.autocast("cpu", torch.bfloat16):
        result = direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT)
        table = result.audit(2, progress=False).to_dataframe()
        lens = logit_lens(model, tokens(), ANSWERS)
        assert check_model(model, tokens()).passed
        own = model(tokens())[:, -1].detach().float()
    assert result.labels == labels  # none of rounding
    assert table.notna().direct_recomputed.all()
    torch.testing.assert_close(lens.values[-1, :, -1, 0], own[[0, 1], ANSWERS], atol=0.03, rtol=0)
    # Added up in bfloat16 they would be its numbers, and equal to their rounding.
    assert not torch.equal(lens.values, lens.values.bfloat16().float())


def test_a_path_of_almost_no_weight_is_certified():
    model = load.__wrapped__("gpt2")
    with torch.no_grad():  # a head that writes 1e-17 of what it wrote
        model.blocks[2].attn.o.original_component.weight[:8] *= 1e-17
    result = direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, unit="source")
    for source in range(0, 11, 3):
        path = attribute_path(result, "L2H0", source)
        assert path.reconstruction.passed
        assert 0 < float(path.logit.abs().max()) < 1e-15


def test_a_writer_that_is_not_known_is_said_beside_the_certificate():
    model = load.__wrapped__("gpt2")
    block = model.original_model.transformer.h[1]
    block.register_forward_hook(lambda module, args, output: _shifted(output))
    result = direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT)
    assert result.reconstruction.passed and "1_rest" in result.labels
    assert float(result["1_rest"].abs().max()) == pytest.approx(
        result.reconstruction.unexplained["1_rest"]
    )
    for text in (repr(result), result._repr_html_(), str(result.reconstruction)):
        assert "1_rest holds up to" in text and "check_model" in text


def _shifted(output):
    first = output[0] if isinstance(output, tuple) else output
    moved = first + 0.3 * torch.linspace(-1, 1, first.shape[-1]).square()
    return (moved, *output[1:]) if isinstance(output, tuple) else moved

"""The certificate passes where rounding is all there is, and fails where anything is wrong.

Each way of being wrong is made here on purpose: a row that is left out, a head, a norm weight, a
hook between the places that are read, a number that is none.
"""

import dataclasses
import math

import pytest
import torch

from tests.support.models import either, load, strong
from tests.zoo.build import ANSWERS, INCORRECT, tokens
from tl_dla import ReconstructionError, direct_logit_attribution
from tl_dla.core.certificate import Reconstruction
from tl_dla.core.decomposition import Decomposition
from tl_dla.core.rounding import Sizes, rounding
from tl_dla.core.rows import RowGroup
from tl_dla.model.attention import AttentionReader
from tl_dla.model.norms import NormReader

# LayerNorm and RMSNorm; norms after sublayers and a soft cap; multipliers; parallel blocks.
MODELS = either("gpt2", "llama", "gemma2", "granite", "gptj", "ln", "rms", "sandwich")
HALF = [torch.bfloat16, torch.float16]
UNITS = ["component", "layer", "head"]


def attribute(model, **options):
    return direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, pos=None, **options)


def own_difference(model):
    logits = model(tokens()).detach()
    logits = logits.double() if logits.dtype == torch.float64 else logits.float()
    return logits[[0, 1], :, ANSWERS] - logits[[0, 1], :, INCORRECT]


# ---- it passes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_every_precision_add_up_to_the_models_own_logit(name, dtype):
    model = load(name, dtype)
    own = own_difference(model)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for unit in UNITS:
        result = attribute(model, unit=unit)
        assert result.attribution.dtype == result.logit.dtype == wide
        certificate = result.reconstruction
        assert certificate.passed and not certificate.failures()
        # `expected` is what another run of the model returns.
        close(certificate.expected, own, 0 if dtype in HALF else 1e-5)
        kept = slice(None)
        if unit == "layer":
            kept = [i for i, label in enumerate(result.labels) if label in LAST]
        close(result.attribution[kept].sum(0), certificate.reconstructed, 1e-5)
        error = (result.attribution[kept].sum(0) - own).abs()
        assert (error <= certificate.tolerance + 1e-5 * (dtype in HALF)).all()
        assert certificate.max_error == pytest.approx(float(error.max()), abs=1e-5)


LAST = ["final_post", "ln_final.b", "b_U"]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_what_rounding_explains_is_not_much_more_than_what_it_does(name, dtype):
    """Six standard deviations of a model of rounding: errors must reach one of them."""
    certificate = attribute(load(name, dtype)).reconstruction
    sizes = certificate.error / certificate.tolerance
    assert 0.02 < sizes.square().mean().sqrt() < 0.5
    assert sizes.max() > 0.1


def test_what_rounding_explains_scales_with_machine_epsilon():
    tolerance = {
        dtype: attribute(load("gpt2", dtype)).reconstruction.tolerance.mean().item()
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    }
    ratio = tolerance[torch.bfloat16] / tolerance[torch.float16]
    assert ratio == pytest.approx(8, rel=0.2)  # 2^-7 over 2^-10
    assert tolerance[torch.float16] / tolerance[torch.float32] > 300
    assert tolerance[torch.float32] / tolerance[torch.float64] == pytest.approx(2**29, rel=0.5)


def test_the_heads_of_each_layer_are_certified_against_its_output():
    result = attribute(load("gpt2"), unit="head")
    components = attribute(load("gpt2"))
    parts = result.reconstruction.parts
    assert list(parts) == [f"the heads of {layer}_attn_out" for layer in range(3)]
    for layer in range(3):
        heads = sum(result[f"L{layer}H{head}"] for head in range(4))
        part = parts[f"the heads of {layer}_attn_out"]
        close(part.reconstructed, heads + result[f"{layer}_attn_bias"], 1e-6)
        close(part.expected, components[f"{layer}_attn_out"], 1e-6)


# ---- it fails ----------------------------------------------------------------------------------


def change_rows(monkeypatch, rows, change):
    """Every row's value becomes `change(label, value)`; without one, it is left out."""

    def one_by_one(groups):
        pairs = [pair for group in groups for pair in zip(group.keys, group.values, strict=True)]
        changed = [(key, change(key.label, value)) for key, value in pairs]
        return [RowGroup.one(key, value) for key, value in changed if value is not None]

    def changed(*args, **options):
        found = rows(*args, **options)
        return dataclasses.replace(
            found, groups=one_by_one(found.groups), constants=one_by_one(found.constants)
        )

    monkeypatch.setattr(Decomposition, "rows", changed)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_row_that_is_left_out_is_missed(name, dtype, monkeypatch):
    model = load(name, dtype)
    whole, rows = attribute(model), Decomposition.rows
    caught = []
    for left_out in whole.labels:

        def without(label, value, left_out=left_out):
            return None if label == left_out else value

        change_rows(monkeypatch, rows, without)
        excess = whole[left_out].abs() - whole.reconstruction.tolerance
        if excess.max() > whole.reconstruction.max_error:
            with pytest.raises(ReconstructionError, match="The rows add up to"):
                attribute(model)
            caught.append(left_out)
    assert len(caught) >= len(whole.labels) - (dtype in HALF)


@pytest.mark.parametrize("name", either("gpt2", "gemma2", "ln"))
def test_a_head_that_is_misread_is_named_with_its_layer(name, monkeypatch):
    attention = AttentionReader.attention

    def misread(self, layer, *args, **kwargs):
        found = attention(self, layer, *args, **kwargs)
        if layer != 1:
            return found
        W_O = found.W_O.clone()
        W_O[2] = 0
        return dataclasses.replace(found, W_O=W_O)

    monkeypatch.setattr(AttentionReader, "attention", misread)
    attribute(load(name))  # components do not need it
    with pytest.raises(ReconstructionError, match="The rows add up to"):
        attribute(load(name), unit="head")
    result = attribute(load(name), unit="head", check="off")
    names = [name for name, _ in result.reconstruction.failures()]
    assert names == ["the rows", "the heads of 1_attn_out"]


@pytest.mark.parametrize("what", ["gamma", "beta", "centred", "scale"])
def test_a_norm_that_is_misread_is_noticed(what, monkeypatch):
    norm = NormReader.norm

    def misread(self, module, name):
        found = norm(self, module, name)
        if name != "ln_final":
            return found
        if what == "centred":
            return dataclasses.replace(found, centred=False)
        if what == "scale":  # of the stream before the last norm
            return dataclasses.replace(found, site=self.hooks.site("blocks.2.ln1.hook_scale"))
        return dataclasses.replace(found, **{what: getattr(found, what) * 1.001})

    monkeypatch.setattr(NormReader, "norm", misread)
    with pytest.raises(ReconstructionError):
        attribute(load("gpt2"))


@pytest.mark.parametrize("name", either("gpt2", "llama", "ln", "rms"))
def test_a_hook_between_the_places_that_are_read_is_noticed(name):
    model = load.__wrapped__(name)
    model.ln_final.register_forward_hook(lambda module, args, output: output * 1.01)
    for unit in UNITS:
        with pytest.raises(ReconstructionError, match="a hook of yours"):
            attribute(model, unit=unit)


def test_a_weight_that_changes_after_z_is_read_is_noticed():
    model = load.__wrapped__("gpt2")
    output = model.blocks[1].attn.o.original_component
    output.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    attribute(model)
    with pytest.raises(ReconstructionError) as error:
        attribute(model, unit="head")
    assert "add up to" in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("unit", UNITS)
def test_numbers_that_are_none_never_pass(value, unit):
    model = load.__wrapped__("gpt2")
    with torch.no_grad():
        model.blocks[1].mlp.out.original_component.bias[3] = value
    with pytest.raises(ReconstructionError):
        attribute(model, unit=unit)
    assert not attribute(model, unit=unit, check="off").reconstruction.passed


@pytest.mark.parametrize("name", either("gpt2", "ln"))
def test_the_message_says_how_much_where_and_why(name, monkeypatch):
    def spoil(label, value):
        elsewhere = (torch.arange(11) != 4)[:, None]
        return value * elsewhere if label == "1_mlp_out" else value

    model = load(name)
    whole = attribute(model)["1_mlp_out"][:, 4]
    change_rows(monkeypatch, Decomposition.rows, spoil)
    with pytest.raises(ValueError) as error:
        attribute(model)
    message = str(error.value)
    assert f"index [{int(whole.abs().argmax())}, 4]" in message
    assert f"a miss of {float(whole.abs().max()):.3g}" in message
    assert "rounding allows" in message and "check_model(model, tokens)" in message
    assert "\n" not in message

    with pytest.warns(UserWarning, match="FAILED: the rows miss the model's own logit by .*hook"):
        warned = attribute(model, check="warn")
    quiet = attribute(model, check="off")
    for result in (warned, quiet):
        assert not result.reconstruction.passed
        assert "FAILED" in repr(result)
        assert result.reconstruction.max_error == pytest.approx(float(whole.abs().max()), rel=1e-3)


def test_nothing_is_said_of_a_certificate_that_passes(recwarn):
    attribute(load("gpt2"), check="warn")
    assert not recwarn.list


# ---- the type itself, by hand ------------------------------------------------------------------


def test_by_hand():
    nan = torch.nan
    certificate = Reconstruction(
        torch.tensor([[1.0, 2.0], [4.0, nan]]),
        torch.tensor([[1.5, 2.0], [3.0, nan]]),
        torch.tensor([[0.6, 0.1], [1.0, nan]]),
    )
    close(certificate.error, torch.tensor([[0.5, 0.0], [1.0, 0.0]]), 0)
    assert certificate.passed and certificate.max_error == 1 and certificate.relative_error == 0.25
    certificate.raise_or_warn("raise", "unused")
    assert "error 1, rounding allows 1" in str(certificate)

    wrong = dataclasses.replace(certificate, tolerance=torch.tensor([[0.4, 0.1], [1.0, nan]]))
    assert not wrong.passed
    # The place is where the excess is largest, not the error.
    with pytest.raises(ReconstructionError, match=r"add up to 1.5, .* is 1 at .* index \[0, 0\]"):
        wrong.raise_or_warn("raise", "Because.")

    parent = dataclasses.replace(certificate, parts={"the heads of 0_attn_out": wrong})
    assert not parent.passed
    with pytest.raises(ReconstructionError, match="^The heads of 0_attn_out add up to"):
        parent.raise_or_warn("raise", "Because.")


@pytest.mark.parametrize("place", ["expected", "reconstructed"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_by_hand_without_a_number(place, value):
    numbers = dict(expected=torch.ones(2), reconstructed=torch.ones(2), tolerance=torch.ones(2))
    numbers[place] = torch.tensor([1.0, value])
    certificate = Reconstruction(**numbers)
    assert not certificate.passed and certificate.max_error == math.inf
    with pytest.raises(ReconstructionError, match=r"index \[1\]"):
        certificate.raise_or_warn("raise", "Because.")


def test_the_derivation_by_hand():
    """One addition, one token: 6 √((ε²/12)(m² + 2f² + l²) + (ε √d f)²) + ε Σ|rows|."""
    one = torch.ones(1, 1, 1)
    eps = 2.0**-7
    eps32 = torch.finfo(torch.float32).eps
    got = rounding(Sizes(3 * one, 2 * one, 5 * one, 7 * one), torch.ones(1, 1), eps, 16)
    expected = 6 * math.sqrt(eps**2 / 12 * (9 + 8 + 25) + (eps32 * 4 * 2) ** 2) + eps32 * 7
    assert float(got) == pytest.approx(expected, rel=1e-6)


def test_chance_stays_within_what_rounding_explains():
    """Streams of sixty writes rounded to bfloat16 as a model does it, read out a thousand times."""
    generator = torch.Generator().manual_seed(0)
    n, d, writes = 1000, 64, 60
    w = torch.randn(n, d, generator=generator)
    stream, exact, squares = torch.zeros(n, d, dtype=torch.bfloat16), torch.zeros(n, d), 0.0
    for _ in range(writes):
        write = torch.randn(n, d, generator=generator).bfloat16()
        stream = stream + write
        exact = exact + write.float()
        squares = squares + (stream.float() * w).square().sum(-1)
    error = ((stream.float() - exact) * w).sum(-1).abs()
    zero = torch.zeros(n, 1, 1)
    sizes = Sizes(squares.sqrt()[:, None, None], zero, zero, zero)
    explained = rounding(sizes, torch.ones(1, 1), torch.finfo(torch.bfloat16).eps, d)[:, 0, 0]
    assert (error <= explained).all()
    assert error.max() > explained.median() / 6


def test_a_strong_model_in_float64_closes_to_rounding():
    model, _ = strong("gptj")
    result = attribute(model, unit="head")
    assert result.reconstruction.max_error < 1e-5
    assert result.reconstruction.relative_error < 1e-6


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)

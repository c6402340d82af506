"""The zoo proves itself: its references add up, its bridges compute what `transformers` does."""

from __future__ import annotations

import re

import pytest
import torch

from tests.support.models import TRANSFORMER_LENS, load, of_3, of_4
from tests.zoo.build import ANSWERS, INCORRECT, boot, build, hf_reference, native_reference, tokens
from tests.zoo.configs import (
    BOOT_FAILS,
    BRIDGE_DIFFERS,
    CONFIGS,
    NATIVE,
    RUN_FAILS,
    WITHOUT_ADAPTER,
)
from tests.zoo.hooked import HOOKED, hooked
from tests.zoo.reference import NO_REFERENCE, hf_logits, zoo_reference

# Attention that is not a sum over heads (a mixture of attention heads), or no attention at all.
WITHOUT_HEADS = ["jetmoe", "falcon_mamba", "mamba", "mamba2", "rwkv", "rwkv_rescale", "zamba2"]
REFERRED = [name for name in CONFIGS | NATIVE if name not in NO_REFERENCE]
if TRANSFORMER_LENS < 4:
    REFERRED.remove("native_soluln")  # an activation that came with 4.0
BOOTS = [name for name in CONFIGS | NATIVE if name not in WITHOUT_ADAPTER | BOOT_FAILS]


@pytest.mark.parametrize("name", REFERRED)
def test_reference_rows_add_up_to_the_logit(name):
    check_reference(name, has_heads=name not in WITHOUT_HEADS)


@of_3
@pytest.mark.parametrize("name", HOOKED)
def test_hooked_reference_rows_add_up_to_the_logit(name):
    check_reference(name, has_heads=True)


def check_reference(name, has_heads):
    """`reference` itself asserts the sums over all rows; here, the heads of each layer."""
    rows = zoo_reference(name)
    assert rows.logit.abs().max() > 0.1
    assert bool(rows.heads) == has_heads
    tolerance = 1e-12 if rows.logit.dtype == torch.float64 else 1e-5
    layers = {re.match(r"L(\d+)H", label)[1] for label in rows.heads if label.startswith("L")}
    for layer in layers:
        parts = [v for k, v in rows.heads.items() if re.match(rf"L{layer}H|{layer}_attn_bias", k)]
        names = [f"{layer}_{row}" for row in ("attn_out", "mixer_out", "temporal_out")]
        [whole] = [rows.components[name] for name in names if name in rows.components]
        torch.testing.assert_close(sum(parts), whole, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", NO_REFERENCE)
def test_reference_fails_where_the_zoo_says_so(name):
    with pytest.raises((AssertionError, RuntimeError, StopIteration)):
        zoo_reference(name)


# What is added to the stream in each layer, and the offset of the norm weights.
TEXTBOOK = {
    "llama": ({"attn_out": "self_attn.o_proj", "mlp_out": "mlp.down_proj"}, 0),
    "gemma2": (
        {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"},
        1,
    ),
}


@pytest.mark.parametrize("name", TEXTBOOK)
def test_reference_is_the_textbook_formula(name):
    """(c * gamma / s) . (W_U[answer] - W_U[incorrect]), times capped / raw where there is a cap."""
    writers, offset = TEXTBOOK[name]
    model = hf_reference(name)
    outputs, inputs = {}, {}

    def keep(module, args, output):
        inputs[module], outputs[module] = args, output

    for module in model.modules():
        module.register_forward_hook(keep)
    with torch.no_grad():
        logits = model(tokens()).logits
    final_norm = model.model.norm
    [residual] = inputs[final_norm]
    scale = (residual.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    cap = logits / outputs[model.lm_head]
    prompts = torch.arange(2)
    for layer, block in enumerate(model.model.layers):
        for row, path in writers.items():
            written = outputs[block.get_submodule(path)]
            to_logits = (
                written * (final_norm.weight + offset) / scale @ model.lm_head.weight.T * cap
            )
            expected = to_logits[prompts, :, ANSWERS] - to_logits[prompts, :, INCORRECT]
            actual = zoo_reference(name).components[f"{layer}_{row}"].float()
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@of_4
@pytest.mark.parametrize("name", BOOTS)
def test_bridge_computes_what_the_plain_model_computes(name):
    bridge = load(name)
    if name in RUN_FAILS:
        with pytest.raises(RuntimeError, match="Original component not set"):
            bridge(tokens())
        return
    plain = native_reference(name) if name in NATIVE else build(name)[0]
    error = (bridge(tokens()) - hf_logits(plain, tokens())).abs().max()
    if name in BRIDGE_DIFFERS:
        assert error > 1
    else:
        assert error < 1e-5


@of_4
@pytest.mark.parametrize("name", [*WITHOUT_ADAPTER, *BOOT_FAILS])
def test_what_does_not_boot_is_recorded(name):
    message = BOOT_FAILS.get(name, "Could not determine supported architecture")
    with pytest.raises((RuntimeError, ValueError, AssertionError), match=message):
        boot(name)


@of_3
@pytest.mark.parametrize("name", HOOKED)
def test_no_parameter_of_a_hooked_model_is_zero(name):
    assert all(parameter.abs().min() > 0 for parameter in hooked(name).parameters())

"""`check_model` finds the place where a model departs from the identities."""

from __future__ import annotations

import pytest
import torch

from tests.support.models import of_3, of_4
from tests.zoo.build import boot, tokens
from tests.zoo.hooked import hooked
from tl_dla import UnsupportedModelError, check_model


@of_4
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "granite", "qwen3_5", "gemma4_scalar"])
def test_models_that_are_understood_pass(name, dtype):
    check = check_model(boot(name, dtype), tokens())
    assert check.passed and check.first_failure is None, check


@of_3
@pytest.mark.parametrize("name", ["ln", "rmspre", "attn_only"])
def test_hooked_models_pass(name):
    assert check_model(hooked(name), tokens()).passed


@of_4
def test_the_first_broken_layer_is_named():
    """A part that writes to the stream unseen, in block 1."""
    model = boot("llama")
    inner = model.blocks[1].original_component
    handle = inner.register_forward_hook(lambda _m, _a, output: _shifted(output))
    check = check_model(model, tokens())
    handle.remove()
    assert not check.passed
    assert check.first_failure.name == "2_pre = stream before it + writes"
    assert check.first_failure.layer == 1
    assert check.first_failure.error == pytest.approx(0.5, abs=1e-5)
    table = check.to_dataframe()
    assert list(table[~table["passed"]]["identity"]) == [check.first_failure.name]
    assert "first failure: 2_pre" in repr(check)


@of_4
def test_heads_that_do_not_add_up_are_found():
    model = boot("llama")
    z = model.hook_dict["blocks.2.attn.o.hook_in"]
    z.add_hook(lambda x, hook: x * 1.5)  # the layer sees it too: consistent
    assert check_model(model, tokens()).passed
    model.reset_hooks()
    out = model.hook_dict["blocks.2.attn.hook_out"]
    out.add_hook(lambda x, hook: x * 1.5)
    check = check_model(model, tokens())
    assert check.first_failure.name == "2_attn_out = heads + output bias"


@of_4
def test_compatibility_mode_that_changes_a_model_is_said():
    """gpt-oss has attention sinks: folding its value biases changes it."""
    raw, folded = boot("gpt_oss"), boot("gpt_oss")
    folded.enable_compatibility_mode(disable_warnings=True)
    check = check_model(folded, tokens(), reference=raw)
    failures = [identity.name for identity in check.identities if not identity.passed]
    assert "pattern 0: attention rows sum to 1" in failures
    assert "log-probabilities = the reference's" in failures

    raw, folded = boot("qwen2"), boot("qwen2")
    folded.enable_compatibility_mode(disable_warnings=True)
    assert check_model(folded, tokens(), reference=raw).passed


@of_4
def test_what_cannot_be_checked_is_said():
    check = check_model(boot("jetmoe"), tokens())
    assert check.passed and "hook_z" in repr(check)
    with pytest.raises(UnsupportedModelError, match="mlm_head"):
        check_model(boot("bert_lm"), tokens())


def _shifted(output):
    first = output[0] if isinstance(output, tuple) else output
    first = first + 0.5
    return (first, *output[1:]) if isinstance(output, tuple) else first

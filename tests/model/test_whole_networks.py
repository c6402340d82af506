"""`attribute_inputs` on every decoder: exact and certified at each layer, or refused by name.

Row by row, some are held to autograd in `tests/test_input_attribution.py`.
"""

from collections import Counter

import pytest
import torch

from tests.model.test_architectures import BOOTS, REFUSED
from tests.support.models import load, of_3, of_4
from tests.zoo.build import ANSWERS, INCORRECT, tokens
from tests.zoo.configs import BRIDGE_DIFFERS, CLASSES
from tests.zoo.hooked import HOOKED
from tests.zoo.reference import zoo_reference
from tl_dla import UnsupportedModelError, attribute_inputs

# What the sentence names.
MIXERS = "bamba falcon_mamba jamba mamba mamba2 nemotron_h zamba2 granitemoehybrid_nope"
NOT_LINEAR = {
    **dict.fromkeys(MIXERS.split(), "mixer_out, which cannot be frozen"),
    **dict.fromkeys(["granitemoehybrid_rope"], "mixer_out, which cannot be frozen"),
    **dict.fromkeys(["qwen3_next", "qwen3_5", "qwen3_5_moe"], "linear_attn_out, which cannot"),
    **dict.fromkeys(["lfm2", "lfm2_moe"], "conv_out, which cannot be frozen"),
    **dict.fromkeys(["rwkv", "rwkv_rescale"], "time_mix_out, which cannot be frozen"),
    **dict.fromkeys(["gemma4_ple", "gemma4_scalar", "gemma4_kvshare"], "per_layer_input_out"),
    "falcon_h1": "mamba_out, which cannot be frozen",
    "olmo_hybrid": "attn_out, which cannot be frozen",
    "recurrent_gemma": "temporal_out, which cannot be frozen",
    "olmo_clip": "clips its values",
    "gemma4_moe": "a mixture of experts and an MLP",
    "jetmoe": "hook_z",
    "llama4_text": "Llama4TextMoe",
}
READ = [name for name in BOOTS if name not in REFUSED | NOT_LINEAR]

pytestmark = pytest.mark.slow


def attribute(name, **options):
    return attribute_inputs(load(name), tokens(), ANSWERS, INCORRECT, **options)


def check(name, rule):
    result = attribute(name, mlp=rule, pos=None)
    reconstruction = result.reconstruction
    assert reconstruction.passed and reconstruction.relative_error < 1e-4
    assert "rest" not in result.kinds
    if name in BRIDGE_DIFFERS:  # nothing but itself to hold it to
        return
    expected = zoo_reference(name).logit.to(result.logit)
    torch.testing.assert_close(result.attribution.sum(0), expected, atol=1e-4, rtol=1e-4)


@of_4
@pytest.mark.parametrize("rule", ["half", "gate"])
@pytest.mark.parametrize("name", READ)
def test_tokens_and_biases_add_up_to_the_logit_of_the_plain_model(name, rule):
    check(name, rule)


@of_3
@pytest.mark.parametrize("rule", ["half", "gate"])
@pytest.mark.parametrize("name", HOOKED)
def test_hooked_models_too(name, rule):
    check(name, rule)


@of_4
@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_is_no_frozen_linear_map_is_refused_by_name(name):
    with pytest.raises(UnsupportedModelError, match=NOT_LINEAR[name]) as error:
        attribute(name)
    assert "work" in str(error.value) and "\n" not in str(error.value)


@of_4
def test_the_survey():
    assert Counter(name in READ for name in CLASSES) == {True: 62, False: 24}

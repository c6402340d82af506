"""Every decoder: exact row by row against an independent reference, or refused in one sentence.

The references differentiate the plain `transformers` module (see `tests/zoo`); nothing here is
compared with the package's own algebra. One line in `tests/zoo/configs.py` adds an architecture.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch

from tests.support.models import load, of_3, of_4
from tests.zoo.build import ANSWERS, INCORRECT, tokens
from tests.zoo.configs import (
    BOOT_FAILS,
    BRIDGE_DIFFERS,
    CLASSES,
    CONFIGS,
    NATIVE,
    WITHOUT_ADAPTER,
)
from tests.zoo.hooked import HOOKED
from tests.zoo.reference import zoo_reference
from tl_dla import UnsupportedModelError, direct_logit_attribution

BOOTS = [name for name in CONFIGS | NATIVE if name not in WITHOUT_ADAPTER | BOOT_FAILS]

# No unit works on these: what the sentence names.
REFUSED = {
    "modernbert_decoder": "prediction_head",
    "bert_lm": "mlm_head",
    "deepseek_v4": "hc_head",
    "hrm_text": "single stack of blocks",
    "opt_proj": "project_out",
    "opt_postln": "ln_final",
    "opt_nofinal": "ln_final",
    "granitemoehybrid": "rotary_emb",
    "granitemoehybrid_attn": "rotary_emb",
}
# No head rows: what the sentence names. The other units work.
WITHOUT_HEADS = {
    "jetmoe": "hook_z",
    **dict.fromkeys(["falcon_mamba", "mamba", "mamba2", "rwkv", "rwkv_rescale"], "no attention"),
    "zamba2": "no attention",
    "recurrent_gemma": "no attention",
    "nemotron_h": "no attention",
}


@cache
def rows_of(name: str, unit: str):
    """Every position of both prompts of the zoo."""
    return direct_logit_attribution(load(name), tokens(), ANSWERS, INCORRECT, unit=unit, pos=None)


@of_4
@pytest.mark.parametrize("name", [n for n in BOOTS if n not in REFUSED])
def test_components_and_layers_are_exact(name):
    check_rows(name, "component")
    check_layers(name)


@of_4
@pytest.mark.parametrize("name", [n for n in BOOTS if n not in REFUSED | WITHOUT_HEADS.keys()])
def test_heads_are_exact(name):
    check_rows(name, "head")


@of_3
@pytest.mark.parametrize("name", HOOKED)
def test_hooked_models_are_exact(name):
    check_rows(name, "component")
    check_rows(name, "head")
    check_layers(name)


@of_4
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("unit", ["component", "layer", "head"])
def test_what_is_not_understood_is_refused_by_name(name, unit):
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]) as error:
        rows_of(name, unit)
    assert "no unit works" in str(error.value)
    assert str(error.value).count("\n") == 0


@of_4
@pytest.mark.parametrize("name", WITHOUT_HEADS)
def test_a_model_without_heads_says_which_units_work(name):
    with pytest.raises(UnsupportedModelError, match=WITHOUT_HEADS[name]) as error:
        rows_of(name, "head")
    assert 'unit="component" and unit="layer" work' in str(error.value)


@of_4
def test_the_survey_of_86_classes():
    """The goal over the 86 classes of the survey, counted."""
    exact = [name for name in CLASSES if name not in REFUSED]
    named = [name for name in exact if "rest" not in rows_of(name, "component").kinds]
    heads = [name for name in exact if name not in WITHOUT_HEADS]
    assert (len(CLASSES), len(exact), len(named)) == (86, 82, 82)
    assert len(heads) >= 70


def check_rows(name, unit):
    """Each row against the reference; together, against the model's logit."""
    result = rows_of(name, unit)
    reconstruction = result.reconstruction
    assert reconstruction.passed
    assert reconstruction.relative_error < 1e-5
    for part in reconstruction.parts.values():
        assert part.relative_error < 1e-4
    reference = zoo_reference(name)
    if name in BRIDGE_DIFFERS:
        return  # the bridge is not the model that the reference differentiates
    expected = dict(reference.heads if unit == "head" else reference.components)
    ours = Counter()
    for label, values in zip(result.labels, result.attribution.double(), strict=True):
        ours["start" if label in ("embed", "pos_embed", "embed_rest") else label] += values
    if "0_mlp_out" in result.labels:  # the package's name where it is the block's only MLP
        expected = {k.replace("_shared_mlp_out", "_mlp_out"): v for k, v in expected.items()}
    # The reference leaves rows of zero biases out.
    for label in ours.keys() | expected.keys():
        zero = torch.zeros_like(result.logit, dtype=torch.float64)
        got, want = ours.get(label, zero), expected.get(label, zero).double()
        assert torch.allclose(got, want, atol=2e-5, rtol=1e-5), (label, (got - want).abs().max())
    torch.testing.assert_close(result.logit.double(), reference.logit.double(), atol=2e-5, rtol=0)


def check_layers(name):
    """The stream read along the way: each sight is the one before and what was written since."""
    layers, components = rows_of(name, "layer"), rows_of(name, "component")
    assert layers.reconstruction.relative_error < 1e-5
    final = components.attribution.sum(0) - sum(
        components[label] for label in ("ln_final.b", "b_U") if label in components.labels
    )
    torch.testing.assert_close(layers["final_post"], final, atol=2e-5, rtol=1e-5)

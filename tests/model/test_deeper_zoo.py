"""Neurons, source tokens and paths on every decoder: certified against their parents, or refused.

The parents themselves are held to references in `test_architectures.py`, and the parts of a few
architectures in `test_neurons.py` and `test_sources.py`.
"""

import pytest

from tests.model.test_architectures import BOOTS, REFUSED, WITHOUT_HEADS
from tests.support.models import load, of_3, of_4
from tests.zoo.build import ANSWERS, INCORRECT, tokens
from tests.zoo.hooked import HOOKED
from tl_dla import UnsupportedModelError, attribute_path, direct_logit_attribution

NO_MLP = "no MLP"
UNSPLIT = "hands its experts the tokens"
WITHOUT_NEURONS = {
    **dict.fromkeys(["mamba", "mamba2", "falcon_mamba", "nemotron_h", "zamba2"], NO_MLP),
    **dict.fromkeys(["rwkv", "rwkv_rescale", "native_attnonly", "attn_only"], NO_MLP),
    **dict.fromkeys(["jetmoe", "llama4_text", "moe"], UNSPLIT),
    "gemma4_moe": "each through a norm of its own",
}
WITHOUT_SOURCES = WITHOUT_HEADS | {
    "olmo_clip": "clips its values",
    "gemma4_kvshare": "takes its values from another layer",
}
# Values pass through a norm of their own, or a latent: no path.
NOT_LINEAR = [
    *("youtu", "deepseek_v2", "deepseek_v3", "glm_moe_dsa", "glm4_moe_lite"),
    *("gemma4_text", "gemma4_ple", "gemma4_scalar", "gemma4_moe"),
]
WITHOUT_PATHS = WITHOUT_SOURCES | dict.fromkeys(NOT_LINEAR, "more on the way")
WITH_ATTENTION = [name for name in BOOTS if WITHOUT_HEADS.get(name) != "no attention"]
ALL = [name for name in BOOTS if name not in REFUSED]

pytestmark = pytest.mark.slow


def check(name, refused, attribute):
    """Certified, every refined row too; or one sentence that says what works."""
    if name in refused:
        with pytest.raises(UnsupportedModelError, match=refused[name]) as error:
            attribute()
        assert "work" in str(error.value) and "\n" not in str(error.value)
        return None
    result = attribute()
    reconstruction = result.reconstruction
    assert reconstruction.passed and reconstruction.relative_error < 1e-5
    for part in reconstruction.parts.values():
        assert part.relative_error < 1e-4
    return result


def check_units(name):
    model = load(name)

    def attribute(unit):
        options = dict(unit=unit, pos=None)
        return lambda: direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, **options)

    neurons = check(name, WITHOUT_NEURONS, attribute("neuron"))
    assert neurons is None or {"neuron", "expert"} & set(neurons.kinds)
    sources = check(name, WITHOUT_SOURCES, attribute("source"))
    assert sources is None or "source" in sources.kinds


def check_path(name):
    model = load(name)
    options = dict(unit="component", pos=[-1, 7])
    result = direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, **options)
    layers = [i for i in range(3) if f"L{i}H1" in heads_of(model)]
    head = f"L{layers[-1] if layers else 1}H1"
    path = check(name, WITHOUT_PATHS, lambda: attribute_path(result, head, [4, 6]))
    if path is not None and len(layers) > 1:
        check(name, {}, lambda: attribute_path(path, f"L{layers[-2]}H0", 2, unit="component"))


def heads_of(model):
    try:
        return direct_logit_attribution(model, tokens(), 5, unit="head").labels
    except UnsupportedModelError:
        return []


@of_4
@pytest.mark.parametrize("name", ALL)
def test_parts_add_up_to_what_they_split(name):
    check_units(name)


@of_4
@pytest.mark.parametrize("name", [name for name in WITH_ATTENTION if name not in REFUSED])
def test_paths_add_up_to_the_source_that_they_split(name):
    check_path(name)


@of_3
@pytest.mark.parametrize("name", HOOKED)
def test_hooked_models_too(name):
    check_units(name)
    check_path(name)

"""What hooks keep in a pass: numbers, never a view that holds an activation in memory."""

import pytest
import torch

from tests.support.models import either, load
from tests.zoo.build import ANSWERS, tokens
from tl_dla import direct_logit_attribution
from tl_dla.core.decomposition import of_query
from tl_dla.core.taps import forward


@pytest.mark.parametrize("unit", ["component", "head", "source", "neuron"])
@pytest.mark.parametrize("name", either("gpt2", "llama", "ln"))
def test_no_activation_is_held_until_the_pass_ends(name, unit):
    """At the last position: a pattern read there is a row of it, not the pattern."""
    result = direct_logit_attribution(load(name), tokens(), ANSWERS, unit=unit)
    kept = forward(result.query, of_query(result.query, unit, result.selection).taps)
    values = [x for x in (*kept.values.values(), kept.raw, kept.logits) if x is not None]
    flat = [x for one in values for x in (one if isinstance(one, tuple) else [one])]
    assert flat and all(isinstance(x, torch.Tensor) for x in flat)
    for x in flat:
        assert x.untyped_storage().nbytes() <= x.numel() * x.element_size()

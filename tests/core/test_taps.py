"""What hooks keep in a pass: numbers, never a view that holds an activation in memory."""

import pytest
import torch

from tests.support.models import either, load
from tests.zoo.build import ANSWERS, tokens
from tl_dla import direct_logit_attribution
from tl_dla.core.decomposition import of_query
from tl_dla.core.taps import Tap, forward
from tl_dla.model.reader import ModelReader


@pytest.mark.parametrize("unit", ["component", "head", "source", "neuron"])
@pytest.mark.parametrize("name", either("gpt2", "llama", "ln"))
def test_no_activation_is_held_until_the_pass_ends(name, unit):
    """At the last position: a pattern read there is a row of it, not the pattern."""
    result = direct_logit_attribution(load(name), tokens(), ANSWERS, unit=unit)
    kept = forward(result.query, of_query(result.query, unit, result.selection).taps)
    values = [x for x in (*kept.values.values(), kept.raw, kept.logits) if x is not None]
    flat = [x for one in values for x in (one if isinstance(one, tuple) else [one])]
    assert flat and all(isinstance(x, torch.Tensor) for x in flat)
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in flat}
    assert sum(held.values()) <= sum(x.numel() * x.element_size() for x in flat)


@pytest.mark.parametrize("name", either("gpt2", "gemma2", "granite", "ln", "post_norm_ln"))
@pytest.mark.parametrize("pos", [-1, None])
def test_small_activations_read_together_are_those_read_one_by_one(name, pos, monkeypatch):
    def asked():
        return direct_logit_attribution(load(name), tokens(), ANSWERS, unit="head", pos=pos)

    together = asked()
    monkeypatch.setattr("tl_dla.core.taps._SMALL", 0)
    alone = asked()
    torch.testing.assert_close(together.attribution, alone.attribution, atol=2e-6, rtol=0)
    sizes = (one.reconstruction.tolerance for one in (together, alone))
    torch.testing.assert_close(*sizes, atol=0, rtol=1e-4)


def test_what_was_shown_is_read_though_the_model_goes_on_to_change_it():
    model = load("llama")
    query = direct_logit_attribution(model, tokens(), ANSWERS).query
    site = ModelReader(model).site("blocks.0.mlp.hook_out")
    tap = Tap(site, lambda x: x.sum(-1), together=True)
    before = forward(query, [tap])[tap]
    handle = model.blocks[0].mlp.register_forward_hook(lambda _module, _args, out: out.zero_())
    try:
        after = forward(query, [tap])[tap]
    finally:
        handle.remove()
    assert bool(before.any()) and torch.equal(before, after)

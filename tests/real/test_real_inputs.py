"""Real weights: tokens pulled back through every layer, against autograd on the frozen module."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.real.test_real_models import IOI
from tests.support.frozen import rows_of
from tl_dla import attribute_inputs, load_model
from tl_dla.loading import gguf

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.mark.parametrize("rule", ["half", "gate"])
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_tokens_are_what_autograd_finds_in_the_frozen_module(name, rule):
    model = load_model(name, device="cpu")
    result = attribute_inputs(model, IOI, " Mary", " John", mlp=rule)
    [folder] = (gguf.cache_folder() / "models").glob(f"{name}-*")
    options = dict(dtype=torch.float64, attn_implementation="eager")
    plain = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    pair = [torch.tensor([int(model.to_single_token(word))]) for word in (" Mary", " John")]
    rows, flow = rows_of(plain, result.prompts.packed, *pair, rule)
    for label, value in rows.items():
        # A model in float32 against a plain module in float64.
        torch.testing.assert_close(result[label].double(), value, atol=2e-3, rtol=1e-3, msg=label)
    torch.testing.assert_close(result.flow[:-1].double(), flow, atol=5e-3, rtol=1e-3)

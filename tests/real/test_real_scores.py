"""Attention scores on real weights: rows against the plain modules, differentiated, in float64.

SmolLM2-135M (rotary positions, grouped heads) and Gemma-3-270M (norms over queries and keys; a
layer with a window, and one that sees everything).
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.real.test_real_models import IOI
from tests.support.models import all_in_float64, of_4
from tests.support.scores import score_reference
from tl_dla import attribute_attention, load_model
from tl_dla.loading import gguf

pytestmark = [pytest.mark.real, pytest.mark.slow, of_4]


@pytest.mark.parametrize(
    "name, layer, head",
    [("smollm2", 4, 3), ("smollm2", 20, 5), ("gemma3", 4, 1), ("gemma3", 5, 2)],
)
def test_rows_are_those_of_the_plain_module(name, layer, head):
    model = load_model(name, device="cpu")
    tokens = model.to_tokens(IOI)
    ours = attribute_attention(model, IOI, f"L{layer}H{head}", key=" Mary", versus=2, unit="head")
    [folder] = (gguf.cache_folder() / "models").glob(f"{name}-*")
    eager = dict(dtype=torch.float64, attn_implementation="eager")
    plain = AutoModelForCausalLM.from_pretrained(folder, **eager).eval()
    if name == "gemma3":
        kinds = plain.config.layer_types[4:6]
        assert kinds == ["sliding_attention", "full_attention"]
    places = [tokens.shape[1] - 1, *ours.places[0, 1:].tolist()]
    with all_in_float64():
        reference = score_reference(plain, tokens, (layer, head), places, "head", pairs=False)
    assert ours.reconstruction.passed
    close = dict(rtol=0, atol=1e-3)  # float32 against float64
    torch.testing.assert_close(ours.score.double(), reference.score, **close)
    for side, rows in (ours.by_query, reference.query), (ours.by_key, reference.key):
        start = [
            row
            for label, row in zip(side.labels, side.attribution, strict=True)
            if "embed" in label
        ]
        torch.testing.assert_close(sum(start).double(), rows["start"], **close)
        for label in {label for label, row in rows.items() if row.any()} - {"start"}:
            torch.testing.assert_close(side[label].double(), rows[label], msg=label, **close)
        assert float(sum(rows.values()) - reference.score) == pytest.approx(0, abs=1e-8)

"""Scores of a `HookedTransformer`, against its own formula differentiated, or refused by name."""

import pytest
import torch

from tests.support.models import all_in_float64, of_3, strong
from tests.support.scores import score_reference
from tests.zoo.build import tokens
from tests.zoo.hooked import hooked
from tl_dla import UnsupportedModelError, attribute_attention

pytestmark = of_3

READ = "ln lnpre rms none final_rms sandwich parallel grouped softcap sinks".split()
REFUSED = {
    "rotary": "positions elsewhere than in the stream",
    "alibi": "positions elsewhere than in the stream",
    "shortformer": "positions elsewhere than in the stream",
    "qk_norm": "changes its queries after W_Q",
    "split_inputs": "an input for each head",
    "attn_in": "an input for each head",
}


@pytest.mark.parametrize("name", READ)
def test_rows_are_those_of_the_model_differentiated(name):
    model, plain = strong(name)
    with all_in_float64():
        ours = attribute_attention(model, tokens(), "L2H1", query=9, key=6, versus=4)
    reference = score_reference(plain, tokens(), (2, 1), [9, 6, 4], "head", pairs=False)
    close = dict(rtol=0, atol=1e-9 * max(1.0, float(reference.score.abs().max())))
    torch.testing.assert_close(ours.score, reference.score, **close)
    assert ours.reconstruction.passed and ours.reconstruction.relative_error < 1e-9
    for side, rows in (ours.by_query, reference.query), (ours.by_key, reference.key):
        mine = dict(zip(side.labels, side.attribution, strict=True))
        start = sum(row for label, row in mine.items() if "embed" in label)
        torch.testing.assert_close(start, rows["start"], **close)
        for label in {label for label, row in rows.items() if row.any()} - {"start"}:
            got = mine.get(label, torch.zeros_like(rows[label]))  # β cancels between two keys
            torch.testing.assert_close(got, rows[label], msg=label, **close)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name(name):
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
        attribute_attention(hooked(name), tokens(), "L2H1", query=9, key=6, versus=4)

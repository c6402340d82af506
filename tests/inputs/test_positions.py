"""Positions: what they are taken for, counted over the real tokens of each prompt."""

import numpy as np
import pytest
import torch

from tests.support.models import load
from tests.zoo.build import tokens
from tl_dla import direct_logit_attribution
from tl_dla.errors import ArgumentError
from tl_dla.inputs.positions import read_positions, slice_class
from tl_dla.inputs.tokens import read_prompts

Slice = slice_class()
TEXTS = ["w5 w7 w9 w31 w30", "w8 w6", "w40 w41 w42 w8"]
LENGTHS = torch.tensor([6, 3, 5])


@pytest.fixture(scope="module")
def model():
    return load("gpt2")


@pytest.mark.parametrize(
    ("pos", "expected"),
    [
        (3, 3),
        (-2, 9),
        (np.int64(4), 4),
        (torch.tensor(5), 5),
        ([0, -1, 4], [0, 10, 4]),
        (np.array([2, -3]), [2, 8]),
        (torch.tensor([1]), [1]),
        ((2, 5), [2, 3, 4]),
        ((1, 9, 3), [1, 4, 7]),
        (slice(-3, None), [8, 9, 10]),
        (Slice((0, 2)), [0, 1]),
        (Slice(-1), 10),
        (Slice([3, 5]), [3, 5]),
        (Slice(None), list(range(11))),
        (None, list(range(11))),
    ],
    ids=str,
)
def test_positions_are_those_of_transformer_lens(model, pos, expected):
    result = direct_logit_attribution(model, tokens(), 5, pos=pos)
    logits = model(tokens())[:, :, 5].detach()
    torch.testing.assert_close(result.logit, logits[:, expected], atol=1e-5, rtol=0)
    torch.testing.assert_close(result.attribution.sum(0), logits[:, expected], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "pos",
    [(), (1, 2, 3, 4), ("a", "b"), slice(0, 3, 0), torch.zeros(0, dtype=torch.long), 1j],
    ids=str,
)
def test_what_is_no_position_is_refused(model, pos):
    with pytest.raises(ArgumentError, match="pos must be an integer, a list of integers, a slice"):
        direct_logit_attribution(model, tokens(), 5, pos=pos)


def test_positions_count_from_the_end_of_each_prompt(model):
    result = direct_logit_attribution(model, TEXTS, 5, pos=[-1, -3, 1])
    assert result.positions.index.tolist() == [[5, 3, 1], [2, 0, 1], [4, 2, 1]]


def test_taking_positions_is_indexing(model):
    prompts = read_prompts(model, TEXTS)
    x = torch.randn(3, 6, 4)
    for pos in (-1, [0, -2], None):
        positions = read_positions(pos, prompts)
        for row, length in enumerate(LENGTHS.tolist()):
            wanted = torch.arange(length)[
                [-1] if pos == -1 else slice(None) if pos is None else pos
            ]
            got = positions.take(x)[row][positions.valid[row]]
            torch.testing.assert_close(got, x[row, wanted])
            there = torch.isin(torch.arange(6), wanted)
            assert torch.equal(positions.mask(6)[row], there)

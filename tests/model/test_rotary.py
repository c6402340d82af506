"""Rotations as matrices: against the angles of the papers, written out by hand."""

import sys
from types import SimpleNamespace

import pytest
import torch
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama

from tl_dla.model.rotary import read_rotary

D_HEAD, WIDTH = 8, 4
POSITIONS = torch.tensor([[0, 3, 7], [5, 1, 2]])
ANGLES = POSITIONS[..., None] * 10000.0 ** (-torch.arange(0, WIDTH, 2) / WIDTH)


def turned(pairs):
    """The first axes of a head turned pair by pair, the others left alone."""
    matrix = torch.eye(D_HEAD).repeat(*POSITIONS.shape, 1, 1)
    for (i, j), angle in zip(pairs, ANGLES.unbind(-1), strict=True):
        matrix[..., i, i] = matrix[..., j, j] = angle.cos()
        matrix[..., i, j], matrix[..., j, i] = -angle.sin(), angle.sin()
    return matrix


def attention(home, **parts):
    """A module of that file, as far as its rotation goes."""

    def forward(self):
        return self

    inner = type("Attention", (), {"__module__": home.__name__, "forward": forward, **parts})
    return SimpleNamespace(original_component=inner())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keeps", ["a table", "nothing"])
def test_neighbouring_axes_turn_by_position_or_by_the_sines_that_are_given(keeps, dtype):
    """As in GPT-J, whose attention kept a table until transformers 5.24."""
    sines = torch.cat([ANGLES.sin(), ANGLES.cos()], -1).to(dtype)
    every = torch.zeros(8, WIDTH, dtype=dtype).index_put((POSITIONS,), sines)
    table = {"embed_positions": every} if keeps == "a table" else {}
    found = read_rotary(attention(modeling_gptj, rotary_dim=WIDTH, **table), "", 0, D_HEAD, D_HEAD)
    given = POSITIONS if keeps == "a table" else tuple(sines.chunk(2, -1))
    assert found.site.argument == ("position_ids" if table else "position_embeddings")
    torch.testing.assert_close(found.matrix(given).float(), turned([(0, 1), (2, 3)]))


def test_halves_turn_where_a_model_pairs_them():
    """As in Llama, whose cosines may cover the first axes alone."""
    given = tuple(torch.cat([x, x], -1) for x in (ANGLES.cos(), ANGLES.sin()))
    found = read_rotary(attention(modeling_llama), "", 0, D_HEAD, D_HEAD)
    torch.testing.assert_close(found.matrix(given), turned([(0, 2), (1, 3)]))


def test_complex_numbers_turn_neighbouring_axes(monkeypatch):
    """As in Llama 4 and DeepSeek-V2."""
    home = SimpleNamespace(__name__="complex", apply_rotary_emb=None)
    monkeypatch.setitem(sys.modules, home.__name__, home)
    found = read_rotary(attention(home), "", 0, D_HEAD, D_HEAD)
    given = torch.polar(torch.ones_like(ANGLES), ANGLES)
    torch.testing.assert_close(found.matrix(given), turned([(0, 1), (2, 3)]))

"""Row keys: what a row is, and keys that are made when asked for."""

import pickle

import pytest
import torch

from tl_dla.core.rows import Keyed, Keys, RowGroup, RowKey, Rows


def test_keys_are_made_when_they_are_first_asked_for():
    made = []

    def make():
        made.append(1)
        return (RowKey("neuron", 3, index=n) for n in (4, 8))

    keys = Keys(2, make, "neuron")
    assert len(keys) == 2
    assert not made
    assert [key.label for key in keys] == ["L3N4", "L3N8"]
    assert keys[1] == RowKey("neuron", 3, index=8)
    assert keys == [RowKey("neuron", 3, index=4), RowKey("neuron", 3, index=8)]
    assert pickle.loads(pickle.dumps(keys)) == list(keys)
    assert len(made) == 1


def test_rows_of_a_kind_are_found_in_their_places():
    one = torch.ones(1, 1, 1)
    keys = Keys(5, lambda: (RowKey("neuron", 3, index=n) for n in range(5)), "neuron")
    neurons = RowGroup(keys, torch.ones(5, 1, 1, 1))
    rest = RowGroup.one(RowKey("rest", 3, "rest"), one)
    bias = RowGroup.one(RowKey("bias", None, "b_U"), one)
    rows = Rows([neurons, rest], [bias], one, one, one, one)
    assert rows.of_kind("rest") == [(RowKey("rest", 3, "rest"), 5)]
    assert [key.label for key in rows.keys][3:] == ["L3N3", "L3N4", "3_rest", "b_U"]
    assert [i for _, i in rows.of_kind("neuron")] == [0, 1, 2, 3, 4]


def test_a_row_is_found_by_its_label_the_first_of_several():
    class Named(Keyed):
        keys = (RowKey("embed", None, "embed"), *[RowKey("head", 1, index=2)] * 2)

    assert [Named().index(label) for label in ("embed", "L1H2")] == [0, 1]
    with pytest.raises(KeyError, match="No row 'L1H3'; the rows are embed, L1H2, L1H2, …, L1H2"):
        Named().index("L1H3")

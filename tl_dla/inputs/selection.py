"""The units, and which rows are split: what a user may ask for, checked against the model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tl_dla.errors import ArgumentError
from tl_dla.model.reader import Kind, ModelReader

Unit = Literal["component", "layer", "head", "neuron", "source"]


def require_unit(unit: str) -> None:
    """Raise `ArgumentError` unless `unit` is one of the units."""
    if unit not in get_args(Unit):
        raise ArgumentError(f"unit must be one of {', '.join(get_args(Unit))}; {unit!r} was given.")


@dataclass(frozen=True)
class Choice:
    """Which rows are split: the layers, the heads (`L9H9`), how many neurons; None for all.

    `neurons` names the neurons (`L3N7`) that have a row of their own, in place of the largest ones;
    `alone` leaves out the others, and the certificate with them.
    """

    layers: tuple[int, ...] | None = None
    heads: tuple[str, ...] | None = None
    top_neurons: int | None = None
    neurons: tuple[str, ...] | None = None
    alone: bool = False

    def has_layer(self, layer: int) -> bool:
        """Whether rows of the layer are split."""
        return self.layers is None or layer in self.layers


def read_choice(
    reader: ModelReader,
    unit: Unit,
    layers: Sequence[int] | None,
    heads: Sequence[str] | None,
    top_neurons: int | None,
) -> Choice:
    """What is split, checked against the model and the unit.

    Raises:
        ArgumentError: for a choice that the unit has no use for, or that the model does not have.
    """
    for name, given, units in (
        ("layers", layers, ("neuron", "source")),
        ("heads", heads, ("source",)),
        ("top_neurons", top_neurons, ("neuron",)),
    ):
        if given is not None and unit not in units:
            wanted = " or ".join(f'unit="{x}"' for x in units)
            raise ArgumentError(f'{name} is for {wanted}; unit="{unit}" was given.')
    n = reader.n_layers
    for layer in layers or ():
        if not -n <= layer < n:
            raise ArgumentError(f"Layer {layer} was asked for; the model has layers 0 to {n - 1}.")
    for head in heads or ():
        place_of_head(reader, head)
    if top_neurons is not None and top_neurons < 1:
        raise ArgumentError(f"top_neurons must be at least 1; {top_neurons} was given.")
    return Choice(
        None if layers is None else tuple(layer % n for layer in layers),
        None if heads is None else tuple(heads),
        top_neurons,
    )


def place_of_head(reader: ModelReader, head: str) -> tuple[int, int]:
    """Layer and head of a label such as `L9H9`.

    Raises:
        ArgumentError: for a label that is no head of the model.
    """
    found = re.fullmatch(r"L(\d+)H(\d+)", head)
    if found is None:
        raise ArgumentError(f"A head is written L9H9 (layer 9, head 9); {head!r} was given.")
    layer, index = int(found[1]), int(found[2])
    attention = reader.attention(layer) if layer < reader.n_layers else None
    n_heads = 0 if attention is None else attention.W_O.shape[0]
    if index >= n_heads:
        raise ArgumentError(
            f"{head} was asked for; the model has {reader.n_layers} layers, and layer {layer} has"
            f" {n_heads} heads (numbered from 0)."
        )
    return layer, index


def rows_to_rank(kinds: Sequence[Kind], kind: Kind | None, k: int, by: str) -> list[int]:
    """The rows that `top` ranks: all, or those of one kind.

    Raises:
        ArgumentError: for an unknown kind or ranking, or k below 1.
    """
    if by not in ("value", "magnitude"):
        raise ArgumentError(f'by must be "value" or "magnitude"; {by!r} was given.')
    if k < 1:
        raise ArgumentError(f"k must be at least 1; {k} was given.")
    rows = [i for i, own in enumerate(kinds) if kind is None or own == kind]
    if not rows:
        present = ", ".join(sorted(set(kinds)))
        raise ArgumentError(f"No row is of kind {kind!r}; the kinds here are {present}.")
    return rows

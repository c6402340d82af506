"""A result made of numbers and labels alone, as TransformerLens's own result class is made.

It ranks, tabulates and draws itself; there is no model to ask again, nor to certify it with.
"""

import re
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.certificate import Reconstruction
from tl_dla.core.numbers import Numbers, Subject
from tl_dla.core.rows import REMAINDER, RowKey
from tl_dla.errors import ArgumentError
from tl_dla.inputs.absent import AbsentModel
from tl_dla.inputs.positions import Positions
from tl_dla.inputs.query import Query
from tl_dla.inputs.selection import Selection, require_unit
from tl_dla.inputs.targets import Targets
from tl_dla.inputs.tokens import Prompts
from tl_dla.model.stream import FINAL, Kind

_WRITTEN = re.compile(r"(\d+)_(.+)")
_INDEXED = re.compile(r"L(\d+)([HNE])(\d+)(?:←(\d+))?")
_KINDS: dict[str, Kind] = {"H": "head", "N": "neuron", "E": "expert"}
_NAMED: dict[str, Kind] = {
    **dict.fromkeys(("embed", "pos_embed"), "embed"),
    **dict.fromkeys(("ln_final.b", "b_U"), "bias"),
    **dict.fromkeys((FINAL, "pre", "mid"), "residual"),
    "rest": "rest",
    "other_neurons": "neurons",
    "other_heads": "attn",
    "shared_expert": "expert",
    **dict.fromkeys(("linear_attn", "mamba", "mixer", "conv"), "ssm"),
}
_NO_MODEL = AbsentModel("it was made of numbers and labels alone", {}, None, {})
_SUM = Subject("numbers given", "rows' own sum", "sum", "logits")


def by_hand(
    attribution: Float[Tensor, " row *batch_and_pos"], labels: list[str], unit: str
) -> dict[str, Any]:
    """The fields of a result of these rows.

    Args:
        attribution: `[row]`, `[row, batch]` or `[row, batch, pos]`, in logits.
        labels: the rows' names.
        unit: what they are.

    Raises:
        ArgumentError: for other shapes, another unit, or not a label for each row.
    """
    require_unit(unit)
    if not 1 <= attribution.ndim <= 3 or len(attribution) != len(labels):
        raise ArgumentError(
            "attribution must be [row], [row, batch] or [row, batch, pos] with a label for each"
            f" row; {list(attribution.shape)} and {len(labels)} labels were given."
        )
    values = attribution.reshape(*attribution.shape, *[1] * (4 - attribution.ndim))
    shape, single = tuple(values.shape[1:3]), attribution.ndim < 3
    index = torch.arange(shape[1]).expand(shape)
    positions = Positions(index, torch.ones_like(index).bool(), single, not single)
    length = torch.full(shape[:1], shape[1])
    prompts = Prompts(torch.zeros_like(index), torch.zeros_like(length), length, known=False)
    targets = Targets(torch.zeros(1, 1, 1, dtype=torch.long), torch.ones(1, 1))
    query = Query(_NO_MODEL, prompts, positions, targets, True, attribution.ndim > 1)
    rows = values[[label == FINAL for label in labels]] if unit == "layer" else values
    total = rows.sum(0)
    nothing = torch.full_like(total, torch.nan)
    keys = [key_of_label(label) for label in labels]
    return dict(
        values=values,
        keys=keys,
        unit=unit,
        reconstruction=Reconstruction(
            query.shaped(total), query.shaped(total), query.shaped(nothing), "the rows' own sum"
        ),
        query=query,
        selection=Selection(remainder=REMAINDER in keys),
        subject=_SUM,
        numbers=Numbers(values, torch.ones_like(total), total[..., 0], total, total, False),
    )


def key_of_label(label: str) -> RowKey:
    """The row that a label names; one of no kind that is known is a `rest`."""
    if label == REMAINDER.label:
        return REMAINDER
    if (found := _INDEXED.fullmatch(label)) is not None:
        source = None if found[4] is None else int(found[4])
        kind = _KINDS[found[2]] if source is None else "source"
        return RowKey(kind, int(found[1]), "", int(found[3]), source)
    found = _WRITTEN.fullmatch(label)
    name = label if found is None else found[2]
    stem = name.removesuffix("_out").removesuffix("_bias")
    known: dict[str, Kind] = {kind: kind for kind in get_args(Kind)} | _NAMED
    kind = "bias" if name.endswith(("_bias", ".b")) else known.get(name, known.get(stem, "rest"))
    return RowKey(kind, None if found is None else int(found[1]), name)

"""The rows of the residual stream: what was written between two sights of it, and what that misses.

Where the writes of a block do not explain how the stream changed, beyond what rounding explains,
the block gets a `_rest` row, so that nothing is missing from the total and nothing is hidden in it.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.readout import Readout
from tl_dla.core.rows import Row, Seen
from tl_dla.errors import UnsupportedModelError
from tl_dla.model.reader import ModelReader, Point, Step, StreamNorm, Write


def stream_rows(
    reader: ModelReader, steps: Sequence[tuple[Step, Readout]], seen: Seen
) -> tuple[list[Row], list[Row], Float[Tensor, "batch pos token"]]:
    """What was written, the sights of the stream, and the size that rounding in it is measured by.

    The size is the root of the sum over additions of (‖x ⊙ w‖/s)².
    """
    values, additions = seen.values, [0]
    wrote: list[tuple[Row, Readout]] = []
    sights: list[tuple[Row, Readout]] = []
    sizes: list[tuple[Row, Readout]] = []
    points: list[Point] = []
    blocks: list[int] = []  # of each write
    borders: list[int] = []  # the sights between blocks
    for step, readout in steps:
        if isinstance(step, Point):
            if step.block:
                borders.append(len(sights))
                points.append(step)
                additions.append(0)
                length = Row(step.label, "residual", step.layer, values[f"|{step.label}|"])
                sizes.append((length, readout))
            row = Row(step.label, "residual", step.layer, values[step.label])
            sights.append((row, readout))
            continue
        additions[-1] += 2 if isinstance(step, StreamNorm) else 1
        if isinstance(step, Write):
            row = Row(step.label, step.kind, step.layer, values[step.label])
        elif isinstance(step, StreamNorm) and step.norm.beta is not None:
            row = Row(step.label, "bias", step.layer, readout.of_bias(step.norm.beta))
        else:
            continue
        wrote.append((row, readout))
        blocks.append(len(points))
    scaled = _scaled([*wrote, *sights, *sizes], seen)
    parts, rest_of = scaled[: len(wrote)], scaled[len(wrote) :]
    shown, sizes_of = rest_of[: len(sights)], rest_of[len(sights) :]

    size = torch.stack([row.value for row in sizes_of]).abs()
    after = torch.stack([shown[i].value for i in borders])
    explained = torch.cat([torch.zeros_like(after[:1]), after[:-1]])
    gross = after.abs()
    if parts:
        written = torch.stack([row.value for row in parts])
        block = torch.tensor(blocks, device=written.device)
        explained = explained.index_add(0, block, written)
        gross = gross.index_add(0, block, written.abs())
    rest = after - explained
    count = after.new_tensor([max(n, 1) for n in additions[:-1]]).sqrt()[:, None, None, None]
    d = steps[-1][1].direction.shape[-1]
    rounding = 6 * reader.eps * 12**-0.5 * size * count
    rounding = rounding + 4 * torch.finfo(after.dtype).eps * (gross + size * d**0.5)
    missed = (~(rest.abs() <= rounding)).flatten(1).any(1).tolist()

    rows: list[Row] = []
    for number, point in enumerate(points):
        mine = [row for row, block in zip(parts, blocks, strict=True) if block == number]
        if missed[number]:
            mine = _with_rest(reader, mine, number, point, after[number], rest[number], seen)
        rows += mine
    return rows, shown, (size * count).square().sum(0).sqrt()


def _scaled(rows: Sequence[tuple[Row, Readout]], seen: Seen) -> list[Row]:
    """Divided by their scales; rows whose readouts share their norms, together."""
    together: dict[tuple[str, ...], list[int]] = {}
    for i, (_, readout) in enumerate(rows):
        together.setdefault(tuple(norm.name for norm in readout.norms), []).append(i)
    scaled = [row for row, _ in rows]
    for indices in together.values():
        values = [scaled[i].value.to(seen.device).expand(seen.shape) for i in indices]
        divided = seen.scaled(torch.stack(values, -1), rows[indices[0]][1])
        for i, value in zip(indices, divided.unbind(-1), strict=True):
            scaled[i] = replace(scaled[i], value=value)
    return scaled


def _with_rest(
    reader: ModelReader,
    rows: list[Row],
    number: int,
    point: Point,
    after: Float[Tensor, "batch pos token"],
    rest: Float[Tensor, "batch pos token"],
    seen: Seen,
) -> list[Row]:
    """The rows up to a sight of the stream, with a `_rest` row for what they miss."""
    if number == 0 and [row.label for row in rows] == ["embed"]:
        if is_rescaled_embedding(seen.values["vector embed"], seen.values[f"vector {point.label}"]):
            return [Row("embed", "embed", None, after)]
    if point.label == "final_post" and not reader.shows_final_stream(point):
        raise UnsupportedModelError(
            f"{reader.architecture} does something to the residual stream between its last block"
            f" and {point.site.name} that is not understood; no unit works on it."
        )
    layer = None if number == 0 else point.layer - 1
    return [*rows, Row("embed_rest" if layer is None else f"{layer}_rest", "rest", layer, rest)]


def is_rescaled_embedding(
    embed: Float[Tensor, "batch pos d_model"], start: Float[Tensor, "batch pos d_model"]
) -> bool:
    """Whether the stream starts as the token embedding times a number at each position.

    An embedding multiplier does this, or a norm without weights: seen in the vectors themselves.
    """
    ratio = (start * embed).sum(-1, keepdim=True) / embed.square().sum(-1, keepdim=True)
    miss = (start - ratio * embed).norm(dim=-1)
    return bool((miss <= 0.02 * start.norm(dim=-1)).all())

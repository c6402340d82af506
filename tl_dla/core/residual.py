"""The rows of the residual stream: what was written between residual points, and what that misses.

Where the writes of a block do not explain how the stream changed, beyond what rounding explains,
the block gets a `_rest` row, so that nothing is missing from the total and nothing is hidden in it.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.readout import Readout
from tl_dla.core.rounding import explained_by_rounding, is_multiple
from tl_dla.core.rows import RowGroup, RowKey, ScaledKept, key_of
from tl_dla.core.taps import Tap
from tl_dla.errors import UnsupportedModelError
from tl_dla.model.hooks import in_float64, upcast
from tl_dla.model.norms import Norm
from tl_dla.model.reader import ModelReader
from tl_dla.model.stream import FINAL, Rescale, ResidPoint, Step, StreamNorm, Write

Steps = list[tuple[Step, Readout]]
_Read = tuple[RowKey, Readout, Tensor]  # a row, and what its tap kept


def pull_back(steps: Sequence[Step], readout: Readout) -> Steps:
    """Each step with the readout of what it writes or shows, the first step first."""
    found: Steps = []
    for step in reversed(steps):
        if isinstance(step, Write):
            found.append((step, readout.times(step.factor)))
            continue
        found.append((step, readout))
        if isinstance(step, Rescale):
            readout = readout.times(step.factor)
        elif isinstance(step, StreamNorm):
            readout = readout.through_norm(step.norm)
    return found[::-1]


@dataclass(frozen=True, eq=False)
class StreamRows:
    """The rows of the stream.

    Attributes:
        rows: what was written, and what is not understood.
        points: the stream at its residual points.
        readout_norm: root of the sum over additions of (‖x ⊙ w‖ / s)².
        final_norm: ‖x ⊙ w‖ / s at the end.
    """

    rows: list[RowGroup]
    points: list[RowGroup]
    readout_norm: Float[Tensor, "batch pos token"]
    final_norm: Float[Tensor, "batch pos token"]


@dataclass(frozen=True, eq=False)
class StreamTaps:
    """What to keep of the stream, step by step."""

    steps: Steps
    value: dict[Step, Tap] = field(default_factory=dict)
    norm: dict[Step, Tap] = field(default_factory=dict)
    vector: dict[Step, Tap] = field(default_factory=dict)

    @staticmethod
    def of(steps: Steps, every_point: bool) -> "StreamTaps":
        """At the borders of blocks, also ‖x ⊙ w‖; with `every_point` within blocks too."""
        if not every_point:
            steps = [one for one in steps if not isinstance(one[0], ResidPoint) or one[0].block]
        taps = StreamTaps(steps)
        started = False
        for step, readout in steps:
            if not isinstance(step, Write | ResidPoint):
                continue
            taps.value[step] = Tap(step.site, readout.contract, together=True)
            if isinstance(step, ResidPoint) and step.block:
                taps.norm[step] = Tap(step.site, readout.norm_of, together=True)
            if not started and (isinstance(step, ResidPoint) or step.name == "embed"):
                started = isinstance(step, ResidPoint)  # to see whether it is the embedding
                taps.vector[step] = Tap(step.site, upcast)
        return taps

    def all(self) -> list[Tap]:
        """Every tap."""
        return [*self.value.values(), *self.norm.values(), *self.vector.values()]

    def rows(self, reader: ModelReader, kept: ScaledKept) -> StreamRows:
        """What was written, block by block; what that misses is a `_rest` row."""
        additions = [0]
        wrote, shown, sizes = list[_Read](), list[_Read](), list[_Read]()
        blocks: list[int] = []  # of each write
        borders: list[ResidPoint] = []
        at: list[int] = []  # the borders, among the points
        for step, readout in self.steps:
            if isinstance(step, ResidPoint):
                if step.block:
                    at.append(len(shown))
                    borders.append(step)
                    additions.append(0)
                    sizes.append((key_of(step), readout, kept[self.norm[step]]))
                shown.append((key_of(step), readout, kept[self.value[step]]))
                continue
            additions[-1] += 2 if isinstance(step, StreamNorm) else 1
            if isinstance(step, Write):
                wrote.append((key_of(step), readout, kept[self.value[step]]))
            elif isinstance(step, StreamNorm) and step.norm.beta is not None:
                wrote.append((key_of(step), readout, readout.of_bias(step.norm.beta)))
            else:
                continue
            blocks.append(len(borders))
        scaled = _scaled([*wrote, *shown, *sizes], kept)
        written, points, size = scaled.split([len(wrote), len(shown), len(sizes)])
        after = points[at]
        explained = torch.cat([torch.zeros_like(after[:1]), after[:-1]])
        block = torch.tensor(blocks, dtype=torch.long, device=after.device)
        explained = explained.index_add(0, block, written)
        abs_sum = after.abs().index_add(0, block, written.abs())
        rest = after - explained
        count = after.new_tensor([max(n, 1) for n in additions[:-1]]).sqrt()[:, None, None, None]
        eps = max(reader.machine_eps, kept.kept.machine_eps)
        fine = explained_by_rounding(
            rest, size * count, abs_sum, eps, self.steps[-1][1].direction.shape[-1]
        )
        missed = (~fine).flatten(1).any(1).tolist()
        rows: list[RowGroup] = []
        of_block: dict[int, list[RowGroup]] = defaultdict(list)
        for number, row in zip(blocks, _groups(wrote, written), strict=True):
            of_block[number].append(row)
        for number, point in enumerate(borders):
            mine = of_block[number]
            if missed[number]:
                mine = self._with_rest(
                    reader, mine, number, point, after[number], rest[number], kept
                )
            rows += mine
        total = in_float64(size * count).square().sum(0).sqrt()
        return StreamRows(rows, _groups(shown, points), total.to(size), size[-1])

    def _with_rest(
        self,
        reader: ModelReader,
        rows: list[RowGroup],
        number: int,
        point: ResidPoint,
        after: Float[Tensor, "batch pos token"],
        rest: Float[Tensor, "batch pos token"],
        kept: ScaledKept,
    ) -> list[RowGroup]:
        """The rows up to a residual point, with a `_rest` row for what they miss."""
        if number == 0 and [key.name for row in rows for key in row.keys] == ["embed"]:
            embed, start = (kept[tap] for tap in self.vector.values())
            if is_multiple(embed, start, reader.machine_eps):
                return [RowGroup.one(RowKey("embed", None, "embed"), after)]
        if point.name == FINAL and not reader.shows_final_stream(point):
            raise UnsupportedModelError(
                f"{reader.architecture} does something to the residual stream between its last"
                f" block and {point.site.name} that is not understood; no unit works on it."
            )
        key = RowKey("rest", None, "embed_rest")
        if number:
            key = RowKey("rest", point.layer - (point.name != "mid"), "rest")
        return [*rows, RowGroup.one(key, rest)]


def _groups(rows: Sequence[_Read], values: Float[Tensor, "row batch pos token"]) -> list[RowGroup]:
    return [RowGroup((key,), value) for (key, *_), value in zip(rows, values.split(1), strict=True)]


def _scaled(rows: Sequence[_Read], kept: ScaledKept) -> Float[Tensor, "row batch pos token"]:
    """Divided by their scales; rows whose readouts share their norms, together."""
    together: dict[tuple[Norm, ...], list[int]] = {}
    for i, (_, readout, _) in enumerate(rows):
        together.setdefault(readout.norms, []).append(i)
    parts = []
    for indices in together.values():
        values = [rows[i][2].to(kept.device).expand(kept.shape) for i in indices]
        divided = kept.scaled(torch.stack(values, -1), rows[indices[0]][1])
        parts.append(divided.movedim(-1, 0))
    if len(parts) == 1:
        return parts[0]
    order = [i for indices in together.values() for i in indices]
    return torch.cat(parts)[torch.tensor(order, device=kept.device).argsort()]

"""A model as one linear map, every non-linearity frozen: `Network.pull`, from the final norm down.

One direction travels for each logit, `[batch, pos, target, d_model]`, at every position at once; at
each block

    direction += through the MLP (direction) + through attention (direction)

What constants write is collected on the way, and at each border of blocks what the stream holds
there, x · direction at each token's place: with the constants above it, each adds up to the logit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.network.calls import Calls, patterns_fit
from tl_dla.core.network.step import Met, Rule, through_norm_before
from tl_dla.core.network.sublayers import AttentionPart, MLPPart, Sublayer, read_sublayer
from tl_dla.core.rounding import is_multiple, vector_tolerance
from tl_dla.core.rows import RowKey
from tl_dla.core.run import Within
from tl_dla.core.taps import Kept, Tap
from tl_dla.inputs.query import Query
from tl_dla.model.hooks import in_float64, upcast
from tl_dla.model.reader import ModelReader
from tl_dla.model.stream import Rescale, ResidPoint, StreamNorm, Write

# What a pull shows on its way: a write, its parts' kind and activation, and the direction there.
Visit = Callable[[Write, str, Tensor, Tensor], None]


@dataclass(frozen=True, eq=False)
class Pulled:
    """What a pull found, for each target: one axis, or position and candidate once all are joined.

    Attributes:
        points: the stream's borders of blocks, the last one first.
        held: what the stream holds at each of them, at each token's place.
        above: what the constants above each of them write.
        felt: how much rounding is felt above each of them (see `Met`).
        biases: what each constant writes, the last one first.
        start: what the start of the stream holds, by the name of what wrote it.
    """

    points: list[ResidPoint]
    held: list[Float[Tensor, "batch *target source"]]
    above: list[Float[Tensor, " batch *target"]]
    felt: list[Float[Tensor, " batch *target"]]
    biases: dict[RowKey, Float[Tensor, " batch *target"]]
    start: dict[str, Float[Tensor, "batch *target source"]]


class Network:
    """A model as steps of its stream, each with what is needed to go back through it.

    Args:
        reader: the model.
        rule: how gated MLPs are frozen.
        query: what is asked of it; where the patterns for it do not fit together, attention runs
            again layer by layer.

    Raises:
        UnsupportedModelError: for a part that cannot be frozen as a linear map, by its name.
    """

    def __init__(self, reader: ModelReader, rule: Rule, query: Query | None = None) -> None:
        self.reader, self.rule, self.query = reader, rule, query
        self.steps = reader.stream().steps
        self.parts: dict[int, Sublayer] = {}
        self.shown: dict[int, Tap] = {}
        for i, step in enumerate(self.steps):
            if isinstance(step, ResidPoint) and step.block:
                self.shown[i] = Tap(step.site, upcast, whole=True)
            if isinstance(step, Write):
                if not self._shows_itself(i):
                    self.shown[i] = Tap(step.site, upcast, whole=True)
                if step.layer is not None:
                    self.parts[i] = read_sublayer(reader, step, step.layer)
        self.reads = self._places()
        self.calls: Calls | None = None
        if query is not None and not patterns_fit(query):
            attention = [x.out.layer for x in self.parts.values() if isinstance(x, AttentionPart)]
            self.calls = Calls(reader, attention)

    @property
    def taps(self) -> list[Tap]:
        """Everything that is kept in the forward pass."""
        found = [*self.shown.values()]
        for part in self.parts.values():
            later = part.mixing if self.calls and isinstance(part, AttentionPart) else []
            found += [tap for tap in part.taps() if tap not in later]
        return found

    @property
    def within(self) -> Within | None:
        """What the model must run inside of, if anything."""
        return None if self.calls is None else self.calls.within

    def _shows_itself(self, i: int) -> bool:
        """Whether what an MLP wrote is the difference of the stream before and after it."""
        after = self.steps[i + 1]
        alone = isinstance(after, ResidPoint) and after.block
        return alone and getattr(self.steps[i], "kind", "") == "mlp"

    def _places(self) -> dict[int, int]:
        """For each sublayer, the step before which it reads the stream."""
        by_layer: dict[int, list[int]] = {}
        for i, step in enumerate(self.steps):
            if isinstance(step, Write) and step.layer is not None:
                by_layer.setdefault(step.layer, []).append(i)
        reads: dict[int, int] = {}
        for layer, writes in by_layer.items():
            mlps = [i for i in writes if not isinstance(self.parts[i], AttentionPart)]
            first = writes if self.reader.parallel(layer) else mlps
            reads |= {i: first[0] if i in mlps else i for i in writes}
        return reads

    # ---- what a forward pass showed ------------------------------------------------------------

    def _streams(self, kept: Kept, n: int) -> list[Float[Tensor, "batch pos d_model"]]:
        """The stream before each step; 0 before its start."""
        found: list[Tensor] = []
        last = kept[self.shown[len(self.steps) - 1]][:, :n]
        x = torch.zeros_like(last)
        for i, step in enumerate(self.steps):
            if i in self.shown and isinstance(step, ResidPoint):
                x = kept[self.shown[i]][:, :n].to(last)
            found.append(x)
            if isinstance(step, Write) and i in self.shown:
                x = x + self._wrote(i, kept, last) * step.factor
            elif isinstance(step, Rescale):
                x = x * step.factor
            elif isinstance(step, StreamNorm):
                x = step.norm.forward(x, step.norm.scale_of(x))
        return found

    def _wrote(self, i: int, kept: Kept, like: Tensor) -> Float[Tensor, "batch pos d_model"]:
        """What a step shows that it writes; positions may be the same for every prompt."""
        wrote = kept[self.shown[i]][:, : like.shape[1]].to(like)
        return wrote if len(wrote) == len(like) else wrote[:1].expand_as(like)

    # ---- all the way ---------------------------------------------------------------------------

    def pull(
        self,
        kept: Kept,
        direction: Float[Tensor, "batch pos target d_model"],
        visit: Visit | None = None,
    ) -> Pulled:
        """Pull directions at the end of the stream back to its start.

        Args:
            kept: what the taps kept.
            direction: all scales included, at the first positions; later ones are not read.
            visit: is shown each write's activation and the direction there.
        """
        xs = self._streams(kept, direction.shape[1])
        met = Met(in_float64(direction.new_zeros(len(direction), direction.shape[2])))
        met.rounded(xs[-1], direction)
        found = Pulled([], [], [], [], met.biases, {})
        late: dict[int, Tensor] = {}  # directions that join further down, where a sublayer reads
        for i in reversed(range(len(self.steps))):
            step = self.steps[i]
            if isinstance(step, ResidPoint) and step.block:
                found.points.append(step)
                found.held.append(_held(xs[i], direction))
                found.above.append(met.above)
                found.felt.append(met.felt)
            elif isinstance(step, Rescale):
                direction = direction * step.factor
            elif isinstance(step, StreamNorm):
                direction = through_norm_before(step.norm, xs[i], direction, step.layer, met)
            elif isinstance(step, Write) and step.layer is not None:
                back = self._through(i, kept, xs, direction, met, visit).to(direction)
                at = self.reads[i]
                late[at] = late[at] + back if at in late else back
            if i in late:
                direction = direction + late.pop(i)
        found.start.update(self._start(kept, xs, direction, visit))
        return found

    def _through(
        self,
        i: int,
        kept: Kept,
        xs: Sequence[Float[Tensor, "batch pos d_model"]],
        direction: Float[Tensor, "batch pos target d_model"],
        met: Met,
        visit: Visit | None,
    ) -> Float[Tensor, "batch pos target d_model"]:
        """From what a sublayer writes to what it reads."""
        step, part, n = self.steps[i], self.parts[i], direction.shape[1]
        assert isinstance(step, Write)
        x, wrote = xs[self.reads[i]], xs[i + 1] - xs[i]
        name = step.name.removesuffix("_out")
        met.rounded(xs[i + 1], direction)
        met.rounded(wrote, direction)
        if visit is not None:
            visit(step, "component", wrote, direction)
        direction = direction * step.factor if step.factor != 1.0 else direction
        x, wrote, direction = (y.to(part.device(kept)) for y in (x, wrote, direction))
        if isinstance(part, AttentionPart):
            if self.calls is not None and self.query is not None:
                again = self.calls.again(part.out.layer, part.mixing, self.query)
                kept = replace(kept, values={**kept.values, **again.values})
            attention = part.frozen(kept, n)
            to_heads = attention.to_heads(direction, met)
            if visit is not None:
                visit(step, "head", attention.z, to_heads)
            return attention.back(to_heads, x, met)
        if isinstance(part, MLPPart):
            mlp = part.frozen(kept, n, self.rule)
            to_neurons = mlp.to_neurons(direction, name, met)
            back, neurons = mlp.back(to_neurons, x, met)
            if visit is not None:
                visit(step, "neuron", neurons.post, to_neurons)
            return back
        experts = part.frozen(kept, n, self.rule)
        return experts.back(direction, x, wrote / step.factor, name, met)

    def _start(
        self,
        kept: Kept,
        xs: Sequence[Float[Tensor, "batch pos d_model"]],
        direction: Float[Tensor, "batch pos target d_model"],
        visit: Visit | None,
    ) -> dict[str, Float[Tensor, "batch target source"]]:
        """What the start of the stream holds, by what wrote it."""
        first = next(i for i, step in enumerate(self.steps) if isinstance(step, ResidPoint))
        x, found = xs[first], {}
        eps = max(self.reader.machine_eps, kept.machine_eps)
        total = torch.zeros_like(x)
        for i, step in enumerate(self.steps[:first]):
            assert isinstance(step, Write)
            wrote = self._wrote(i, kept, x)
            found[step.name], total = _held(wrote, direction), total + wrote
            if visit is not None:
                visit(step, "component", wrote, direction)
        held = _held(x, direction)
        rest = (x - total).norm(dim=-1)
        if bool((rest <= vector_tolerance(eps, x.dtype) * x.norm(dim=-1)).all()):
            return found
        if len(found) == 1 and is_multiple(total, x, eps):
            return {"embed": held}
        return found | {"embed_rest": held - torch.stack(list(found.values())).sum(0)}


def _held(
    x: Float[Tensor, "batch pos d_model"], direction: Float[Tensor, "batch pos target d_model"]
) -> Float[Tensor, "batch target pos"]:
    """What the stream holds of each logit at each place."""
    return (x[:, :, None] * direction).sum(-1).mT

"""The readout pulled back through every layer: `Network.pull`, from the final norm down.

One direction travels, `[batch, pos, target, d_model]`, at every position at once; at each block

    direction += through the MLP (direction) + through attention (direction)

with every non-linearity frozen (`frozen.py`). What constants write is collected on the way, and at
each border of blocks what the stream holds there: x · direction at each token's place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.analyses.frozen import (
    Collected,
    FrozenAttention,
    FrozenExperts,
    FrozenMLP,
    Rule,
    back_through_norm,
)
from tl_dla.core.rounding import is_multiple, vector_tolerance
from tl_dla.core.rows import RowKey
from tl_dla.core.taps import Kept, Tap
from tl_dla.errors import UnsupportedModelError
from tl_dla.model.attention import Attention, Gate
from tl_dla.model.hooks import upcast
from tl_dla.model.mlp import MLP, Experts
from tl_dla.model.mlp_in import ExpertsIn, MLPIn
from tl_dla.model.norms import Norm
from tl_dla.model.reader import ModelReader
from tl_dla.model.stream import Rescale, ResidPoint, StreamNorm, Write
from tl_dla.model.values import Values

# What a pull shows on its way: a write, what its parts are, and the direction there.
Visit = Callable[[Write, str, Tensor, Tensor], None]


@dataclass(frozen=True, eq=False)
class AttentionPart:
    """How an attention layer is read, and the taps that freeze it."""

    part: Attention
    values: Values
    over: Gate | None
    z: Tap
    pattern: Tap
    scale: Tap | None
    gate: Tap | None

    def taps(self) -> list[Tap]:
        """What to keep in the forward pass."""
        return [tap for tap in (self.z, self.pattern, self.scale, self.gate) if tap is not None]


@dataclass(frozen=True, eq=False)
class MLPPart:
    """How an MLP or a mixture of experts is read, and the taps that freeze it."""

    out: MLP | Experts
    way_in: MLPIn | ExpertsIn
    scale: Tap | None
    choice: Tap | None

    def taps(self) -> list[Tap]:
        """What to keep in the forward pass."""
        return [tap for tap in (self.scale, self.choice) if tap is not None]


@dataclass(frozen=True, eq=False)
class Pulled:
    """What a pull found, for each target.

    Attributes:
        points: the stream's borders of blocks, the last one first.
        held: what the stream holds at each of them, at each token's place.
        above: what the constants above each of them write.
        felts: how much rounding is felt above each of them (see `Collected`).
        biases: what each constant writes, the last one first.
        start: what the start of the stream holds, by the name of what wrote it.
    """

    points: list[ResidPoint]
    held: list[Float[Tensor, "batch pos target"]]
    above: list[Float[Tensor, "batch target"]]
    felts: list[Float[Tensor, "batch target"]]
    biases: dict[RowKey, Float[Tensor, "batch target"]]
    start: dict[str, Float[Tensor, "batch pos target"]]

    def add(self, point: ResidPoint, held: Float[Tensor, "b p t"], into: Collected) -> None:
        """What was found down to a point."""
        self.points.append(point)
        self.held.append(held)
        self.above.append(sum(into.biases.values(), torch.zeros_like(held[:, 0])))
        self.felts.append(into.felt)


class Network:
    """A model as steps of its stream, each with what is needed to go back through it.

    Raises:
        UnsupportedModelError: for a part that cannot be frozen as a linear map, by its name.
    """

    def __init__(self, reader: ModelReader, rule: Rule) -> None:
        self.reader, self.rule = reader, rule
        self.steps = reader.stream().steps
        self.parts: dict[int, AttentionPart | MLPPart] = {}
        self.seen: dict[int, Tap] = {}
        for i, step in enumerate(self.steps):
            if isinstance(step, ResidPoint) and step.block:
                self.seen[i] = Tap(step.site, upcast, whole=True)
            if isinstance(step, Write):
                after = self.steps[i + 1]
                if step.kind != "mlp" or not (isinstance(after, ResidPoint) and after.block):
                    self.seen[i] = Tap(step.site, upcast, whole=True)
                if step.layer is not None:
                    self.parts[i] = self._part(step, step.layer)
        self.reads = self._places()

    @property
    def taps(self) -> list[Tap]:
        """Everything that is kept in the forward pass."""
        return [*self.seen.values(), *(tap for part in self.parts.values() for tap in part.taps())]

    def _part(self, step: Write, layer: int) -> AttentionPart | MLPPart:
        if step.name == "attn_out" and (attention := self.reader.attention(layer)) is not None:
            return self._attention(layer, attention)
        name = step.name.removesuffix("_out")
        out = self.reader.mlp(layer, name, step.site) if step.kind == "mlp" else None
        way_in = None if out is None else self.reader.mlp_in(layer, name)
        if out is None or way_in is None:
            raise UnsupportedModelError(
                f"blocks.{layer} of {self.reader.architecture} writes {step.label}, which cannot be"
                ' frozen as a linear map of what it reads; unit="component" works.'
            )
        scale = None if out.post_norm is None else _scale_tap(out.post_norm)
        choice = None
        if isinstance(out, Experts):
            choice = Tap(out.site, lambda _x, chosen, weights: _paired(chosen, weights), whole=True)
        return MLPPart(out, way_in, scale, choice)

    def _attention(self, layer: int, part: Attention) -> AttentionPart:
        values = self.reader.values(layer, part.W_O.shape[1])
        pattern = self.reader.site(f"blocks.{layer}.attn.hook_pattern")
        assert pattern is not None
        gate = self.reader.gate(layer)
        n_heads = part.W_O.shape[0]

        def by_head(z: Tensor) -> Tensor:
            return upcast(z).flatten(2).unflatten(2, (n_heads, -1))

        return AttentionPart(
            part,
            values,
            gate,
            Tap(part.site, by_head, whole=True),
            Tap(pattern, lambda x: x.transpose(1, 2), whole=True, keys=True, heads_first=True),
            None if part.post_norm is None else _scale_tap(part.post_norm),
            None if gate is None or gate.site is None else Tap(gate.site, upcast, whole=True),
        )

    def _places(self) -> dict[int, int]:
        """For each sublayer, the step before which it reads the stream."""
        reads: dict[int, int] = {}
        by_layer: dict[int, list[int]] = {}
        for i in self.parts:
            step = self.steps[i]
            assert isinstance(step, Write) and step.layer is not None
            by_layer.setdefault(step.layer, []).append(i)
        for layer, writes in by_layer.items():
            mlps = [i for i in writes if isinstance(self.parts[i], MLPPart)]
            first = writes if self.reader.parallel(layer) else mlps
            for i in writes:
                reads[i] = first[0] if i in mlps else i
        return reads

    # ---- what a forward pass showed ------------------------------------------------------------

    def _attention_of(self, part: AttentionPart, kept: Kept, n: int) -> FrozenAttention:
        return FrozenAttention(
            part.part,
            part.values,
            kept[part.z][:, :n],
            kept[part.pattern][:, :, :n, :n],
            None if part.scale is None else kept[part.scale][:, :n],
            None if part.gate is None else kept[part.gate][:, :n],
            None if part.over is None else part.over.norm,
        )

    def _mlp_of(self, i: int, kept: Kept, n: int, wrote: Tensor) -> FrozenMLP | FrozenExperts:
        part = self.parts[i]
        assert isinstance(part, MLPPart)
        out, scale = part.out, None if part.scale is None else kept[part.scale][:, :n]
        if isinstance(out, MLP):
            assert isinstance(part.way_in, MLPIn)
            return FrozenMLP(out, part.way_in, scale, self.rule)
        assert isinstance(part.way_in, ExpertsIn) and part.choice is not None
        chosen, weights = kept[part.choice][:, :n].unbind(2)
        about = (out.layer, part.way_in, out.post_norm, out.factor, out.scalings)
        return FrozenExperts(*about, chosen, weights, scale, wrote, self.rule)

    def _streams(self, kept: Kept, n: int) -> list[Float[Tensor, "batch pos d_model"]]:
        """The stream before each step."""
        found: list[Tensor] = []
        x: Any = 0.0
        batch = len(kept[self.seen[self._last]])
        for i, step in enumerate(self.steps):
            if i in self.seen and isinstance(step, ResidPoint):
                x = kept[self.seen[i]][:, :n]
            found.append(x)
            if isinstance(step, Write) and i in self.seen:
                x = x + self._wrote(i, kept, batch, n) * step.factor
            elif isinstance(step, Rescale):
                x = x * step.factor
            elif isinstance(step, StreamNorm):
                x = step.norm.forward(x, step.norm.scale_of(x))
        return found

    def _wrote(self, i: int, kept: Kept, batch: int, n: int) -> Float[Tensor, "batch pos d_model"]:
        """What a step writes; positions may be the same for every prompt."""
        wrote = kept[self.seen[i]][:, :n]
        return wrote if len(wrote) == batch else wrote[:1].expand(batch, -1, -1)

    @property
    def _last(self) -> int:
        return len(self.steps) - 1

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
            direction: all scales included; positions after the last one are not read.
            visit: is shown each write's activation and the direction there.
        """
        n = direction.shape[1]
        xs = self._streams(kept, n)
        into = Collected(direction.new_zeros(len(direction), direction.shape[2]).double())
        into.feel(xs[-1], direction)
        found = Pulled([], [], [], [], into.biases, {})
        late: dict[int, Tensor] = {}
        for i in reversed(range(len(self.steps))):
            step = self.steps[i]
            if isinstance(step, ResidPoint) and step.block:
                found.add(step, (xs[i][:, :, None] * direction).sum(-1), into)
            elif isinstance(step, Rescale):
                direction = direction * step.factor
            elif isinstance(step, StreamNorm):
                place = (step.layer, step.name)
                direction = back_through_norm(step.norm, xs[i], direction, place, into)
            elif isinstance(step, Write) and step.layer is not None:
                back = self._through(i, kept, xs, direction, into, visit)
                at = self.reads[i]
                late[at] = late[at] + back if at in late else back
            if i in late:
                direction = direction + late.pop(i)
        found.start.update(self._start(kept, found.held[-1], xs, direction, visit))
        return found

    def _through(
        self,
        i: int,
        kept: Kept,
        xs: Sequence[Tensor],
        direction: Float[Tensor, "b p t d"],
        into: Collected,
        visit: Visit | None,
    ) -> Float[Tensor, "b p t d"]:
        """From what a sublayer writes to what it reads."""
        step, part, n = self.steps[i], self.parts[i], direction.shape[1]
        assert isinstance(step, Write)
        x, wrote = xs[self.reads[i]], xs[i + 1] - xs[i]
        into.feel(xs[i + 1], direction)
        name = step.name.removesuffix("_out")
        if visit is not None:
            visit(step, "component", wrote, direction)
        if isinstance(part, AttentionPart):
            into.feel(wrote, direction)
            attention = self._attention_of(part, kept, n)
            dz = attention.to_heads(direction * step.factor, into)
            if visit is not None:
                visit(step, "head", attention.z, dz)
            return attention.back(dz, x, into)
        mlp = self._mlp_of(i, kept, n, wrote / step.factor)
        direction = direction * step.factor
        if isinstance(mlp, FrozenExperts):
            return mlp.back(direction, x, name, into)
        into.feel(wrote, direction)
        at = mlp.to_neurons(direction, name, into)
        back, neurons = mlp.back(at, x, into)
        if visit is not None:
            visit(step, "neuron", neurons.post, at)
        return back

    def _start(
        self,
        kept: Kept,
        held: Float[Tensor, "b p t"],
        xs: Sequence[Tensor],
        direction: Float[Tensor, "b p t d"],
        visit: Visit | None,
    ) -> dict[str, Float[Tensor, "b p t"]]:
        """What the start of the stream holds, by what wrote it."""
        n, eps, found = held.shape[1], self.reader.machine_eps, {}
        first = next(i for i, step in enumerate(self.steps) if isinstance(step, ResidPoint))
        x, total = xs[first], torch.zeros_like(xs[first])
        for i, step in enumerate(self.steps[:first]):
            assert isinstance(step, Write)
            wrote = self._wrote(i, kept, len(x), n)
            found[step.name], total = (wrote[:, :, None] * direction).sum(-1), total + wrote
            if visit is not None:
                visit(step, "component", wrote, direction)
        rest = (x - total).norm(dim=-1)
        if bool((rest <= vector_tolerance(eps, x.dtype) * x.norm(dim=-1)).all()):
            return found
        if len(found) == 1 and is_multiple(total, x, eps):
            return {"embed": held}
        return found | {"embed_rest": held - torch.stack(list(found.values())).sum(0)}


def _scale_tap(norm: Norm) -> Tap:
    return Tap(norm.site, lambda x: norm.scale(upcast(x)), whole=True)


def _paired(chosen: Tensor, weights: Tensor) -> Float[Tensor, "batch pos 2 k"]:
    """The router's choice and its weights, as one tensor."""
    return torch.stack([chosen.to(upcast(weights).dtype), upcast(weights)], 2)

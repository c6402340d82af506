"""Sublayers as linear maps: what a direction at their output is at the stream that they read.

Every non-linearity is a line through the origin, at its value in this forward pass:

    norm         γ ⊙ (x − mean) / s + β, with s frozen
    attention    Σ_source pattern · v, with the pattern (and a gate on it) frozen
    MLP          act(pre) = (act(pre) / pre) · pre, the ratio frozen
    gated MLP    act(gate) ⊙ pre: "gate" freezes act(gate), so all of it goes to pre; "half" gives
                 each factor half, the gate's through its ratio act(gate) / gate
    experts      an MLP each, times the router's weight, frozen

Constants that are met on the way (biases, β) are collected as rows, and with them how much rounding
of each activation is felt, ‖activation ⊙ direction‖. "gate" and the frozen norms are those of RelP
(https://arxiv.org/abs/2508.21258), "half" that of AttnLRP (https://arxiv.org/abs/2402.05602); a
network as one frozen linear map is Golden 2025 (https://arxiv.org/abs/2505.24293).
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.rows import RowKey
from tl_dla.errors import UnsupportedModelError
from tl_dla.model.attention import Attention
from tl_dla.model.hooks import upcast
from tl_dla.model.mlp import MLP
from tl_dla.model.mlp_in import Expert, ExpertsIn, MLPIn
from tl_dla.model.norms import Norm
from tl_dla.model.values import ValueMap, Values

Rule = Literal["gate", "half"]

_GATES = (torch.sigmoid, torch.nn.functional.softplus, torch.nn.functional.silu)


@dataclass
class Collected:
    """What is met on the way back.

    Attributes:
        biases: what each constant writes to the logit, `[batch, target]`, the last one first.
        felt: the sum over activations of ‖activation ⊙ direction‖², `[batch, target]`.
    """

    felt: Float[Tensor, "batch target"]
    biases: dict[RowKey, Float[Tensor, "batch target"]] = field(default_factory=dict)

    def constant(
        self, layer: int, name: str, vector: Tensor | None, direction: Float[Tensor, "b p t d"]
    ) -> None:
        """A constant that is added at every position."""
        if vector is not None and bool(vector.any()):
            self.add(layer, name, direction.sum(1) @ vector.to(direction))

    def add(self, layer: int, name: str, value: Float[Tensor, "batch target"]) -> None:
        """What a constant writes."""
        key = RowKey("bias", layer, name)
        self.biases[key] = self.biases[key] + value if key in self.biases else value

    def feel(self, x: Float[Tensor, "b p d"], direction: Float[Tensor, "b p t d"]) -> None:
        """An activation that the model rounded."""
        self.felt = self.felt + felt(x, direction).sum(1)


def felt(x: Float[Tensor, "*n d"], direction: Float[Tensor, "*n t d"]) -> Float[Tensor, "*n t"]:
    """‖x ⊙ direction‖², in float64, where the square of what is small does not underflow."""
    return torch.linalg.vector_norm(x[..., None, :] * direction, dim=-1).double().square()


# ---- norms -------------------------------------------------------------------------------------


def through_norm(
    norm: Norm, scale: Float[Tensor, "*n"], direction: Float[Tensor, "*n t d"]
) -> Float[Tensor, "*n t d"]:
    """Back through a norm with its scale frozen."""
    if norm.gamma is not None:
        direction = direction * norm.gamma.to(direction)
    if norm.centred:
        direction = direction - direction.mean(-1, keepdim=True)
    return direction / scale.to(direction)[..., None, None]


def back_through_norm(
    norm: Norm | None,
    x: Float[Tensor, "b p d"],
    direction: Float[Tensor, "b p t d"],
    place: tuple[int, str],
    into: Collected,
) -> Float[Tensor, "b p t d"]:
    """From what a sublayer is given to the stream x that its norm reads."""
    if norm is None:
        return direction
    scale = norm.scale_of(x)
    y = norm.forward(x, scale)
    # The norm rounds what it is given, what it divides, and what it returns; its scale, at once.
    into.felt = into.felt + 3 * felt(y, direction).sum(1)
    into.felt = into.felt + (y[:, :, None] * direction).sum(-1).double().square().sum(1)
    into.constant(*place, norm.beta, direction)
    return through_norm(norm, scale, direction)


# ---- attention ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FrozenAttention:
    """An attention layer at its value in one forward pass.

    Attributes:
        part: how its heads write.
        values: how their values are made.
        z: the heads' mixed values.
        pattern: how they are mixed.
        scale: of the norm after it, where there is one.
        gate: shows what multiplies the mixed values, where something does.
        gate_norm: the norm over them, where there is one.
    """

    part: Attention
    values: Values
    z: Float[Tensor, "b p head d_head"]
    pattern: Float[Tensor, "b head query key"]
    scale: Float[Tensor, "b p"] | None
    gate: Tensor | None
    gate_norm: Norm | None

    def to_heads(
        self, direction: Float[Tensor, "b p t d"], into: Collected
    ) -> Float[Tensor, "b p t head d_head"]:
        """From what joins the stream to the heads' mixed values."""
        part, layer = self.part, self.part.layer
        direction = direction * part.factor if part.factor != 1.0 else direction
        if part.post_norm is not None:
            assert self.scale is not None
            into.constant(layer, "attn_bias", part.post_norm.beta, direction)
            direction = through_norm(part.post_norm, self.scale, direction)
        into.constant(layer, "attn_bias", part.b_O, direction)
        W_O = part.W_O.to(direction)
        dz = (direction @ W_O.flatten(0, 1).mT).unflatten(-1, W_O.shape[:2])
        into.feel(self.z.flatten(2), dz.flatten(3))
        return dz

    def back(
        self,
        dz: Float[Tensor, "b p t head d_head"],
        x: Float[Tensor, "b p d"],
        into: Collected,
    ) -> Float[Tensor, "b p t d"]:
        """From the heads' mixed values to the stream that attention reads."""
        layer, maps, norm = self.part.layer, self.values.maps, self.values.norm
        y = x if norm is None else norm.forward(x, norm.scale_of(x))
        y = y * self.values.factor
        seen: list[tuple[Tensor, Tensor | None]] = []
        for value in maps:
            v, scale = _forward(value, y)
            seen.append((v, scale))
            y = v
        n_heads, d_head = dz.shape[-2:]
        groups = y.shape[-1] // d_head
        factor = self._gate(y.unflatten(-1, (groups, d_head)))
        if factor is not None:
            dz = dz * factor[:, :, None]
        mixed = rearrange(dz, "b p t h d -> b h p (t d)")
        moved = self.pattern.mT.to(mixed) @ mixed
        moved = rearrange(moved, "b h p (t d) -> b p t h d", d=d_head)
        moved = moved.unflatten(3, (groups, n_heads // groups)).sum(4).flatten(3)
        for value, (v, scale) in zip(reversed(maps), reversed(seen), strict=True):
            into.feel(v, moved)
            if value.norm is not None:
                assert scale is not None
                if value.norm.beta is not None:
                    beta = value.norm.beta.repeat(v.shape[-1] // value.width)
                    into.constant(layer, f"{value.name}.b", beta, moved)
                split = moved.unflatten(-1, (-1, value.width)).transpose(2, 3)
                split = through_norm(value.norm, scale, split)
                moved = split.transpose(2, 3).flatten(3)
            into.constant(layer, value.name, value.b, moved)
            moved = moved @ value.W.to(moved).mT
        moved = moved * self.values.factor if self.values.factor != 1.0 else moved
        return back_through_norm(norm, x, moved, (layer, "ln1.b"), into)

    def _gate(self, v: Float[Tensor, "b p group d_head"]) -> Tensor | None:
        """What multiplies the mixed values before W_O, frozen; None where nothing does."""
        if self.gate is None and self.gate_norm is None:
            return None
        z = self.z
        v = v.repeat_interleave(z.shape[2] // v.shape[2], 2)
        mixed = torch.einsum("bhqk,bkhd->bqhd", self.pattern.to(v), v)
        factors: list[Tensor] = []
        if self.gate_norm is not None:
            norm = self.gate_norm
            gamma = 1.0 if norm.gamma is None else norm.gamma.to(z).unflatten(0, z.shape[2:])
            factors = [gamma / norm.scale_of(mixed.flatten(2))[..., None, None]]
        elif self.gate is not None:
            x = upcast(self.gate)
            x = (
                x[..., None]
                if x.shape[-1] == z.shape[2]
                else x.flatten(2).unflatten(2, z.shape[2:])
            )
            factors = [function(x) for function in _GATES]
        for factor in factors:
            if bool(((mixed * factor - z).abs().amax() <= 0.01 * z.abs().amax()).all()):
                return factor
        raise UnsupportedModelError(
            f"blocks.{self.part.layer}.attn multiplies what its heads mix by something that is not"
            ' understood; unit="head" works.'
        )


def _forward(value: ValueMap, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a map gives, and the scale of its norm for each group."""
    v = y @ value.W.to(y)
    v = v if value.b is None else v + value.b.to(y)
    if value.norm is None:
        return v, None
    grouped = v.unflatten(-1, (-1, value.width))
    scale = value.norm.scale_of(grouped)
    return value.norm.forward(grouped, scale).flatten(2), scale


# ---- MLPs --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Neurons:
    """The neurons of an MLP at their values for some tokens, and how each follows what it reads.

    `pre` and `gate` multiply a direction at the neurons; `constant` is what the neurons are of no
    input (a number added after a clip).
    """

    way_in: MLPIn
    post: Float[Tensor, "*n d_mlp"]
    pre: Float[Tensor, "*n d_mlp"]
    gate: Float[Tensor, "*n d_mlp"] | None
    constant: Float[Tensor, "*n d_mlp"] | None
    scale: Float[Tensor, "*n"] | None

    @staticmethod
    def of(way_in: MLPIn, y: Float[Tensor, "*n d_model"], rule: Rule) -> "Neurons":
        """Those that an MLP makes of what it is given."""
        pre, gate = way_in.pre(y), way_in.gate(y)
        limit, clipped = way_in.limit, pre
        if limit is not None:
            clipped = pre.clamp(-limit, limit)
        if gate is None:
            post = way_in.act(clipped)
            slope, other, constant = _ratio(post, pre), None, None
        else:
            share = 1.0 if rule == "gate" else 0.5
            act = way_in.act(gate if limit is None else gate.clamp(max=limit))
            up = clipped + way_in.offset
            post = act * up
            slope = share * act * (1.0 if limit is None else _ratio(clipped, pre))
            other = 0.5 * _ratio(act, gate) * up if rule == "half" else None
            constant = share * act * way_in.offset if way_in.offset else None
        scale = None
        if way_in.after is not None:
            scale = way_in.after.scale_of(post)
            post = way_in.after.forward(post, scale)
        return Neurons(way_in, post, slope, other, constant, scale)

    def back(
        self, direction: Float[Tensor, "*n t d_mlp"]
    ) -> tuple[Float[Tensor, "*n t d_model"], dict[str, Float[Tensor, "*n t"]]]:
        """From the neurons to what the MLP is given, and what its constants write."""
        way, found = self.way_in, {}
        if way.after is not None:
            assert self.scale is not None
            if way.after.beta is not None:
                found["mlp_norm.b"] = direction @ way.after.beta.to(direction)
            direction = through_norm(way.after, self.scale, direction)
        if self.constant is not None:
            found["b_in"] = (direction @ self.constant[..., None])[..., 0]
        to_pre = direction * self.pre[..., None, :]
        given = to_pre @ way.W_in.to(direction).mT
        if way.b_in is not None:
            found["b_in"] = found.get("b_in", 0.0) + to_pre @ way.b_in.to(direction)
        if self.gate is not None and way.W_gate is not None:
            to_gate = direction * self.gate[..., None, :]
            given = given + to_gate @ way.W_gate.to(direction).mT
            if way.b_gate is not None:
                found["b_gate"] = to_gate @ way.b_gate.to(direction)
        return given, found


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, 0.0, a / b)


@dataclass(frozen=True, eq=False)
class FrozenMLP:
    """An MLP at its value in one forward pass; `scale` is that of the norm after it."""

    part: MLP
    way_in: MLPIn
    scale: Float[Tensor, "b p"] | None
    rule: Rule

    def to_neurons(
        self, direction: Float[Tensor, "b p t d"], name: str, into: Collected
    ) -> Float[Tensor, "b p t d_mlp"]:
        """From what joins the stream to the neurons."""
        layer, part = self.part.layer, self.part
        direction = direction * part.factor if part.factor != 1.0 else direction
        direction = after_mlp(part, direction, self.scale, name, into)
        into.constant(layer, f"{name}_bias", part.bias, direction)
        return direction @ part.W_out.to(direction).mT

    def back(
        self, to_neurons: Float[Tensor, "b p t d_mlp"], x: Float[Tensor, "b p d"], into: Collected
    ) -> tuple[Float[Tensor, "b p t d"], Neurons]:
        """From the neurons to the stream that the MLP reads."""
        norm, layer = self.way_in.norm, self.part.layer
        y = x if norm is None else norm.forward(x, norm.scale_of(x))
        neurons = Neurons.of(self.way_in, y, self.rule)
        # The model rounds pre, the activated gate, their product.
        into.felt = into.felt + 3 * felt(neurons.post, to_neurons).sum(1)
        given, constants = neurons.back(to_neurons)
        for name, value in constants.items():
            into.add(layer, name, value.sum(1))
        return back_through_norm(norm, x, given, (layer, _beta(norm)), into), neurons


def after_mlp(
    part: "MLP | FrozenExperts",
    direction: Float[Tensor, "b p t d"],
    scale: Tensor | None,
    name: str,
    into: Collected,
) -> Float[Tensor, "b p t d"]:
    """Back through the norm after an MLP, where there is one."""
    if part.post_norm is None:
        return direction
    assert scale is not None
    into.constant(part.layer, f"{name}_bias", part.post_norm.beta, direction)
    return through_norm(part.post_norm, scale, direction)


def _beta(norm: Norm | None) -> str:
    return "" if norm is None else f"{norm.name.rpartition('.')[2]}.b"


@dataclass(frozen=True, eq=False)
class FrozenExperts:
    """A mixture of experts at its value in one forward pass.

    `chosen` and `weights` are the router's choice, `[token, k]`.
    """

    layer: int
    way_in: ExpertsIn
    post_norm: Norm | None
    factor: float
    scalings: tuple[float, ...]
    chosen: Tensor
    weights: Tensor
    scale: Float[Tensor, "b p"] | None
    wrote: Float[Tensor, "b p d"]
    rule: Rule

    def back(
        self,
        direction: Float[Tensor, "b p t d"],
        x: Float[Tensor, "b p d"],
        name: str,
        into: Collected,
    ) -> Float[Tensor, "b p t d"]:
        """From what joins the stream to the stream that the experts read."""
        whole = (self.wrote[:, :, None] * direction).sum(-1)
        into.feel(self.wrote, direction)
        direction = direction * self.factor if self.factor != 1.0 else direction
        direction = after_mlp(self, direction, self.scale, name, into)
        if self.post_norm is not None and self.post_norm.beta is not None:
            whole = whole - direction @ self.post_norm.beta.to(direction)
        norm = self.way_in.norm
        y = x if norm is None else norm.forward(x, norm.scale_of(x))
        batch, pos = y.shape[:2]
        flat, to = y.flatten(0, 1), direction.flatten(0, 1)
        weights = self.weights.flatten(0, 1).to(flat)
        chosen = self.chosen.flatten(0, 1)
        routed, every = _Routed(flat, batch), _Routed(flat, batch)
        for index in chosen.unique().tolist():
            token, slot = (chosen == index).nonzero(as_tuple=True)
            weight = weights[token, slot][:, None, None]
            expert = self.way_in.expert(int(index))
            routed.add(expert, f"E{int(index)}", token, to[token] * weight, self.rule)
        if (shared := self.way_in.shared) is not None:
            own = to
            if self.way_in.shared_gate is not None:
                own = to * torch.sigmoid(flat @ self.way_in.shared_gate.to(flat))[:, None, None]
            every.add(shared, "shared", torch.arange(len(flat), device=flat.device), own, self.rule)
        rest = whole.flatten(0, 1) - every.wrote
        s = min(self.scalings, key=lambda s: float((rest - s * routed.wrote).abs().sum()))
        given = (every.given + s * routed.given).unflatten(0, (batch, pos))
        for part, factor in ((every, 1.0), (routed, s)):
            for constant, value in part.constants.items():
                into.add(self.layer, constant, factor * value)
            into.felt = into.felt + factor**2 * part.felt
        return back_through_norm(norm, x, given, (self.layer, _beta(norm)), into)


class _Routed:
    """What some experts write, what they read, and their constants, token by token."""

    def __init__(self, flat: Float[Tensor, "n d_model"], batch: int) -> None:
        self.flat, self.batch = flat, batch
        self.given: Any = 0.0
        self.wrote: Any = 0.0
        self.felt: Any = 0.0
        self.constants: dict[str, Tensor] = {}

    def add(self, expert: Expert, name: str, token: Tensor, to: Tensor, rule: Rule) -> None:
        """One expert on the tokens that chose it; `to` is the direction at its output."""
        n = len(self.flat)
        neurons = Neurons.of(expert.way_in, self.flat[token], rule)
        at = to @ expert.W_out.to(to).mT
        back, constants = neurons.back(at)
        wrote = (at @ neurons.post.to(at)[..., None])[..., 0]
        if expert.b_out is not None:
            constants["b_out"] = to @ expert.b_out.to(to)
            wrote = wrote + constants["b_out"]
        self.given = self.given + back.new_zeros(n, *back.shape[1:]).index_add_(0, token, back)
        self.wrote = self.wrote + wrote.new_zeros(n, wrote.shape[1]).index_add_(0, token, wrote)
        row = token // (n // self.batch)
        for constant, value in constants.items():
            self.constants[f"{name}_{constant}"] = self._by_prompt(value, row)
        self.felt = self.felt + self._by_prompt(3 * felt(neurons.post, at), row)

    def _by_prompt(self, value: Tensor, row: Tensor) -> Tensor:
        return value.new_zeros(self.batch, value.shape[-1]).index_add_(0, row, value)

"""Attention layers, MLPs and experts with what freezes them: how they are read, and the taps."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.network.attention import FrozenAttention
from tl_dla.core.network.mlp import FrozenExperts, FrozenMLP
from tl_dla.core.network.step import Rule
from tl_dla.core.taps import Kept, Tap
from tl_dla.errors import UnsupportedModelError
from tl_dla.model.attention import Attention, Gate
from tl_dla.model.hooks import upcast
from tl_dla.model.mlp import MLP, Experts
from tl_dla.model.mlp_in import ExpertsIn, MLPIn
from tl_dla.model.norms import Norm
from tl_dla.model.reader import ModelReader
from tl_dla.model.stream import Write
from tl_dla.model.values import Values


@dataclass(frozen=True, eq=False)
class AttentionPart:
    """How an attention layer is read, and the taps that freeze it."""

    out: Attention
    values: Values
    gate: Gate | None
    z: Tap
    pattern: Tap
    scale: Tap | None
    shown: Tap | None

    @property
    def mixing(self) -> list[Tap]:
        """The mixed values and the pattern, which a layer that runs again shows too."""
        return [self.z, self.pattern]

    def taps(self) -> list[Tap]:
        """What to keep in the forward pass."""
        return [*self.mixing, *(tap for tap in (self.scale, self.shown) if tap is not None)]

    def device(self, kept: Kept) -> torch.device:
        """Where its weights lie."""
        return self.out.W_O.device

    def frozen(self, kept: Kept, n: int) -> FrozenAttention:
        """The layer at its value for the first n positions."""
        return FrozenAttention(
            self.out,
            self.values,
            kept[self.z][:, :n],
            kept[self.pattern][:, :, :n, :n],
            None if self.scale is None else kept[self.scale][:, :n],
            self.gate,
            None if self.shown is None else kept[self.shown][:, :n],
        )


@dataclass(frozen=True, eq=False)
class MLPPart:
    """How an MLP is read, and the tap that freezes the norm after it."""

    out: MLP
    way_in: MLPIn
    scale: Tap | None

    def taps(self) -> list[Tap]:
        """What to keep in the forward pass."""
        return [] if self.scale is None else [self.scale]

    def device(self, kept: Kept) -> torch.device:
        """Where its weights lie."""
        return self.way_in.W_in.device

    def frozen(self, kept: Kept, n: int, rule: Rule) -> FrozenMLP:
        """The MLP at its value for the first n positions."""
        scale = None if self.scale is None else kept[self.scale][:, :n]
        return FrozenMLP(self.out, self.way_in, scale, rule)


@dataclass(frozen=True, eq=False)
class ExpertsPart:
    """How a mixture of experts is read, and the taps that freeze it; `choice` is the router's."""

    out: Experts
    way_in: ExpertsIn
    scale: Tap | None
    choice: Tap

    def taps(self) -> list[Tap]:
        """What to keep in the forward pass."""
        return [self.choice] if self.scale is None else [self.choice, self.scale]

    def device(self, kept: Kept) -> torch.device:
        """Where its weights lie, as far as its inputs show."""
        return kept[self.choice].device

    def frozen(self, kept: Kept, n: int, rule: Rule) -> FrozenExperts:
        """The mixture at its value for the first n positions."""
        scale = None if self.scale is None else kept[self.scale][:, :n]
        chosen, weights = kept[self.choice][:, :n].unbind(2)
        return FrozenExperts(self.out, self.way_in, chosen.long(), weights, scale, rule)


Sublayer = AttentionPart | MLPPart | ExpertsPart


def read_sublayer(reader: ModelReader, step: Write, layer: int) -> Sublayer:
    """What writes to the stream at a step.

    Raises:
        UnsupportedModelError: for what cannot be frozen as a linear map, by its name.
    """
    name = step.name.removesuffix("_out")
    if name == "attn" and (attention := reader.attention(layer)) is not None:
        return _attention(reader, attention)
    out = reader.mlp(step)
    way_in = None if out is None else reader.mlp_in(layer, name)
    if isinstance(out, MLP) and isinstance(way_in, MLPIn):
        return MLPPart(out, way_in, _scale(out.post_norm))
    if isinstance(out, Experts) and isinstance(way_in, ExpertsIn):
        choice = Tap(out.site, _choice, whole=True)
        return ExpertsPart(out, way_in, _scale(out.post_norm), choice)
    raise UnsupportedModelError(
        f"blocks.{layer} of {reader.architecture} writes {step.label}, which cannot be frozen as a"
        ' linear map of what it reads; unit="component" works.'
    )


def _attention(reader: ModelReader, out: Attention) -> AttentionPart:
    n_heads, layer = out.W_O.shape[0], out.layer
    values = reader.values(layer, out.W_O.shape[1])
    pattern = reader.site(f"blocks.{layer}.attn.hook_pattern")
    assert pattern is not None  # or its values would have been refused
    gate = reader.gate(layer)

    def by_head(z: Tensor) -> Float[Tensor, "batch pos head d_head"]:
        return upcast(z).flatten(2).unflatten(2, (n_heads, -1))

    return AttentionPart(
        out,
        values,
        gate,
        Tap(out.site, by_head, whole=True),
        Tap(pattern, lambda x: x.transpose(1, 2), whole=True, keys=True, heads_first=True),
        _scale(out.post_norm),
        None if gate is None or gate.site is None else Tap(gate.site, upcast, whole=True),
    )


def _scale(norm: Norm | None) -> Tap | None:
    return None if norm is None else Tap(norm.site, norm.scale, whole=True)


def _choice(_x: Tensor, chosen: Tensor, weights: Tensor) -> Float[Tensor, "batch pos 2 k"]:
    """The experts that the router chose, and its weights, as one tensor."""
    return torch.stack([chosen.to(upcast(weights).dtype), upcast(weights)], 2)

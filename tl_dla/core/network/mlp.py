"""MLPs and mixtures of experts as linear maps: activations, gates and routes frozen."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.core.network.step import Met, Rule, felt, through_norm, through_norm_before
from tl_dla.model.hooks import product
from tl_dla.model.mlp import MLP, Experts
from tl_dla.model.mlp_in import Expert, ExpertsIn, MLPIn


@dataclass(frozen=True, eq=False)
class Neurons:
    """The neurons of an MLP at their values for some tokens, and how each follows what it reads.

    Attributes:
        way_in: how the MLP reads.
        post: what W_out is multiplied with.
        to_pre: multiplies a direction at the neurons to one at `pre`.
        to_gate: the same for the gate; None where the gate gets none.
        constant: what the neurons are of no input (a number added after a clip).
        scale: of the norm over the activated neurons.
    """

    way_in: MLPIn
    post: Float[Tensor, "*place d_mlp"]
    to_pre: Float[Tensor, "*place d_mlp"]
    to_gate: Float[Tensor, "*place d_mlp"] | None
    constant: Float[Tensor, "*place d_mlp"] | None
    scale: Float[Tensor, "*place"] | None

    @staticmethod
    def of(way_in: MLPIn, y: Float[Tensor, "*place d_model"], rule: Rule) -> "Neurons":
        """Those that an MLP makes of what it is given."""
        pre, gate, limit = way_in.pre(y), way_in.gate(y), way_in.limit
        clipped = pre if limit is None else pre.clamp(-limit, limit)
        to_gate, constant = None, None
        if gate is None:
            post = way_in.act(clipped)
            to_pre = _ratio(post, pre)
        else:
            share = 1.0 if rule == "gate" else 0.5
            act = way_in.act(gate if limit is None else gate.clamp(max=limit))
            up = clipped + way_in.offset
            post = act * up
            to_pre = share * act
            if limit is not None:
                to_pre = to_pre * _ratio(clipped, pre)
            if rule == "half":
                to_gate = 0.5 * _ratio(act, gate) * up
            if way_in.offset:
                constant = share * act * way_in.offset
        scale = None
        if way_in.after is not None:
            scale = way_in.after.scale_of(post)
            post = way_in.after.forward(post, scale)
        return Neurons(way_in, post, to_pre, to_gate, constant, scale)

    def back(
        self, direction: Float[Tensor, "*place target d_mlp"]
    ) -> tuple[Float[Tensor, "*place target d_model"], dict[str, Float[Tensor, "*place target"]]]:
        """From the neurons to what the MLP is given, and what its constants write."""
        way, constants = self.way_in, {}
        if way.after is not None:
            assert self.scale is not None
            if way.after.beta is not None:
                constants["mlp_norm.b"] = direction @ way.after.beta.to(direction)
            direction = through_norm(way.after, self.scale, direction)
        if self.constant is not None:
            constants["b_in"] = (direction @ self.constant[..., None])[..., 0]
        at_pre = direction * self.to_pre[..., None, :]
        given = product(way.W_in, at_pre)
        if way.b_in is not None:
            constants["b_in"] = constants.get("b_in", 0.0) + at_pre @ way.b_in.to(direction)
        if self.to_gate is not None and way.W_gate is not None:
            at_gate = direction * self.to_gate[..., None, :]
            given = given + product(way.W_gate, at_gate)
            if way.b_gate is not None:
                constants["b_gate"] = at_gate @ way.b_gate.to(direction)
        return given, constants


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, 0.0, a / b)


@dataclass(frozen=True, eq=False)
class FrozenMLP:
    """An MLP at its value in one forward pass; `scale` is that of the norm after it."""

    out: MLP
    way_in: MLPIn
    scale: Float[Tensor, "batch pos"] | None
    rule: Rule

    def to_neurons(
        self, direction: Float[Tensor, "batch pos target d_model"], name: str, met: Met
    ) -> Float[Tensor, "batch pos target d_mlp"]:
        """From what joins the stream to the neurons."""
        direction = _after(self.out, direction, self.scale, name, met)
        met.constant(self.out.layer, f"{name}_bias", self.out.bias, direction)
        return product(self.out.W_out, direction)

    def back(
        self,
        to_neurons: Float[Tensor, "batch pos target d_mlp"],
        x: Float[Tensor, "batch pos d_model"],
        met: Met,
    ) -> tuple[Float[Tensor, "batch pos target d_model"], Neurons]:
        """From the neurons to the stream x that the MLP reads."""
        norm, layer = self.way_in.norm, self.out.layer
        y = x if norm is None else norm.forward(x, norm.scale_of(x))
        neurons = Neurons.of(self.way_in, y, self.rule)
        met.rounded(neurons.post, to_neurons, times=3)  # pre, the activated gate, their product
        given, constants = neurons.back(to_neurons)
        for name, value in constants.items():
            met.add(layer, name, value.sum(1))
        return through_norm_before(norm, x, given, layer, met), neurons


def _after(
    out: MLP | Experts,
    direction: Float[Tensor, "batch pos target d_model"],
    scale: Float[Tensor, "batch pos"] | None,
    name: str,
    met: Met,
) -> Float[Tensor, "batch pos target d_model"]:
    """Back through what an MLP's output is multiplied by, and the norm after it."""
    direction = direction * out.factor if out.factor != 1.0 else direction
    if out.post_norm is None:
        return direction
    assert scale is not None
    met.constant(out.layer, f"{name}_bias", out.post_norm.beta, direction)
    return through_norm(out.post_norm, scale, direction)


@dataclass(frozen=True, eq=False)
class FrozenExperts:
    """A mixture of experts at its value in one forward pass.

    Attributes:
        out: how it writes.
        way_in: how it reads.
        chosen: the experts of each token.
        weights: the router's, of each of them.
        scale: of the norm after it.
        rule: how a gated MLP is frozen.
    """

    out: Experts
    way_in: ExpertsIn
    chosen: Int[Tensor, "batch pos k"]
    weights: Float[Tensor, "batch pos k"]
    scale: Float[Tensor, "batch pos"] | None
    rule: Rule

    def back(
        self,
        direction: Float[Tensor, "batch pos target d_model"],
        x: Float[Tensor, "batch pos d_model"],
        wrote: Float[Tensor, "batch pos d_model"],
        name: str,
        met: Met,
    ) -> Float[Tensor, "batch pos target d_model"]:
        """From what joins the stream, `wrote`, to the stream x that the experts read."""
        whole = (wrote[:, :, None] * direction).sum(-1)
        direction = _after(self.out, direction, self.scale, name, met)
        after = self.out.post_norm
        if after is not None and after.beta is not None:
            whole = whole - direction @ after.beta.to(direction)
        norm, layer = self.way_in.norm, self.out.layer
        y = x if norm is None else norm.forward(x, norm.scale_of(x))
        shape = y.shape[:2]
        flat, to = y.flatten(0, 1), direction.flatten(0, 1)
        weights, chosen = self.weights.flatten(0, 1).to(flat), self.chosen.flatten(0, 1)
        routed, shared = _Passed(flat, shape[0]), _Passed(flat, shape[0])
        for index in chosen.unique().tolist():
            token, slot = (chosen == index).nonzero(as_tuple=True)
            weighted = to[token] * weights[token, slot][:, None, None]
            routed.add(self.way_in.expert(int(index)), f"E{index}", token, weighted, self.rule)
        if self.way_in.shared is not None:
            every = torch.arange(len(flat), device=flat.device)
            shared.add(self.way_in.shared, "shared", every, self._gated(flat, to), self.rule)
        # What the routed experts are multiplied by shows in what was written.
        rest = whole.flatten(0, 1) - shared.wrote
        factor = min(self.out.scalings, key=lambda s: float((rest - s * routed.wrote).abs().sum()))
        for passed, times in ((shared, 1.0), (routed, factor)):
            for constant, value in passed.constants.items():
                met.add(layer, constant, times * value)
            if isinstance(passed.felt, Tensor):  # some expert was chosen
                met.feel(times**2 * passed.felt)
        given = (shared.given + factor * routed.given).unflatten(0, shape)
        return through_norm_before(norm, x, given, layer, met)

    def _gated(
        self, flat: Float[Tensor, "token d_model"], to: Float[Tensor, "token target d_model"]
    ) -> Float[Tensor, "token target d_model"]:
        """Back through the gate on the shared expert."""
        gate = self.way_in.shared_gate
        return to if gate is None else to * torch.sigmoid(flat @ gate.to(flat))[:, None, None]


@dataclass
class _Passed:
    """What some experts wrote, what they read, and their constants, for tokens of `batch` prompts.

    `given`, `wrote` and `felt` are 0 where no expert was chosen.
    """

    flat: Float[Tensor, "token d_model"]
    batch: int
    given: Any = 0.0
    wrote: Any = 0.0
    felt: Any = 0.0
    constants: dict[str, Tensor] = field(default_factory=dict)

    def add(
        self,
        expert: Expert,
        name: str,
        token: Int[Tensor, " chosen"],
        to: Float[Tensor, "chosen target d_model"],
        rule: Rule,
    ) -> None:
        """One expert on the tokens that chose it; `to` is the direction at its output."""
        n = len(self.flat)
        neurons = Neurons.of(expert.way_in, self.flat[token], rule)
        to_neurons = product(expert.W_out, to)
        back, constants = neurons.back(to_neurons)
        wrote = (to_neurons @ neurons.post.to(to)[..., None])[..., 0]
        if expert.b_out is not None:
            constants["b_out"] = to @ expert.b_out.to(to)
            wrote = wrote + constants["b_out"]
        self.given = self.given + back.new_zeros(n, *back.shape[1:]).index_add_(0, token, back)
        self.wrote = self.wrote + wrote.new_zeros(n, wrote.shape[1]).index_add_(0, token, wrote)
        prompt = token // (n // self.batch)
        for constant, value in constants.items():
            self.constants[f"{name}_{constant}"] = self._by_prompt(value, prompt)
        self.felt = self.felt + self._by_prompt(3 * felt(neurons.post, to_neurons), prompt)

    def _by_prompt(
        self, value: Float[Tensor, "chosen target"], prompt: Int[Tensor, " chosen"]
    ) -> Float[Tensor, "batch target"]:
        prompt = prompt.to(value.device)
        return value.new_zeros(self.batch, value.shape[-1]).index_add_(0, prompt, value)

"""How an MLP or a mixture of experts reads: from the stream to its neurons.

    ungated     post = act(pre),                pre = x W_in + b_in
    gated       post = act(gate) ⊙ pre,         gate = x W_gate + b_gate

with x the stream through the MLP's norm. `mlp.py` reads the way out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.model.hooks import Hooks, Site, class_name, compute_dtype, parameter, unwrap
from tl_dla.model.mlp import takes_choice
from tl_dla.model.norms import Norm, NormReader

_WORKS = 'unit="component" and unit="head" work.'
_ACTIVATIONS = ("act", "act_fn", "activation_fn", "activation", "gelu_impl")


@dataclass(frozen=True, eq=False)
class MLPIn:
    """How an MLP makes its neurons from what it reads.

    Attributes:
        norm: what the stream passes through first; None where the MLP reads the stream itself, or
            where the norm is a step of the stream.
        site: shows x, what the weights are multiplied with; None where nothing does.
        parallel: whether the stream is read as it was before the layer's attention wrote.
        act: of all neurons together, `[*, d_mlp]` to `[*, d_mlp]`; nearly always one by one.
        limit: pre is clipped to ± this, and the gate to at most this; None nearly always.
        offset: added to pre after that (gpt-oss: 1).
        after: a norm over the activated neurons (BitNet); None nearly always.
    """

    layer: int
    norm: Norm | None
    site: Site | None
    parallel: bool
    W_in: Float[Tensor, "d_model d_mlp"]
    b_in: Float[Tensor, " d_mlp"] | None
    W_gate: Float[Tensor, "d_model d_mlp"] | None
    b_gate: Float[Tensor, " d_mlp"] | None
    act: Callable[[Tensor], Tensor]
    limit: float | None = None
    offset: float = 0.0
    after: Norm | None = None

    def pre(self, x: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead d_mlp"]:
        """X W_in + b_in."""
        return _affine(x, self.W_in, self.b_in)

    def gate(self, x: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead d_mlp"] | None:
        """X W_gate + b_gate; None for an MLP without a gate."""
        return None if self.W_gate is None else _affine(x, self.W_gate, self.b_gate)

    def post(self, x: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead d_mlp"]:
        """The neurons as `MLP.site` shows them: what W_out is multiplied with."""
        pre, gate = self.pre(x), self.gate(x)
        if self.limit is not None:
            pre = pre.clamp(-self.limit, self.limit)
            gate = None if gate is None else gate.clamp(max=self.limit)
        pre = pre + self.offset
        post = self.act(pre) if gate is None else self.act(gate) * pre
        return post if self.after is None else self.after.forward(post, self.after.scale_of(post))


@dataclass(frozen=True, eq=False)
class Expert:
    """One expert: an MLP's way in, and its way out before the router's weight."""

    way_in: MLPIn
    W_out: Float[Tensor, "d_mlp d_model"]
    b_out: Float[Tensor, " d_model"] | None


@dataclass(frozen=True, eq=False)
class ExpertsIn:
    """How a mixture of experts reads. `Experts` (the way out) shows the choice and the weights.

    `shared` is the expert that every token passes through, times the sigmoid of x · `shared_gate`
    where there is one.
    """

    layer: int
    norm: Norm | None
    parallel: bool
    n_experts: int
    expert: Callable[[int], Expert]
    shared: Expert | None
    shared_gate: Float[Tensor, " d_model"] | None


class MLPInReader:
    """How MLPs read the stream."""

    def __init__(self, hooks: Hooks, norms: NormReader) -> None:
        self.hooks, self.norms, self.model = hooks, norms, hooks.model

    def mlp_in(self, layer: int, name: str = "mlp") -> MLPIn | ExpertsIn | None:
        """How an MLP's neurons or experts are made; None where the block has no such sublayer.

        Args:
            layer: of the block.
            name: of the sublayer: `"mlp"`, `"moe"` or `"shared_mlp"`, as in the stream's labels.

        Raises:
            UnsupportedModelError: for a part that is not understood, by its name.
        """
        block = self.hooks.blocks[layer]
        inside = "shared_mlp" if name == "mlp" and "shared_mlp" in block._modules else name
        module = block._modules.get(inside)
        if hasattr(unwrap(block), "mlp_block") and name == "mlp":
            raise self._refusal(f"blocks.{layer} ({class_name(unwrap(block))}) in {{}} hides them")
        if name not in ("mlp", "moe", "shared_mlp") or module is None:
            return None
        at = f"blocks.{layer}.{inside}"
        if getattr(unwrap(block), "enable_moe_block", False):
            raise self._refusal(f"{at} in {{}} adds a mixture of experts and an MLP, each normed")
        names = dict(module._modules)
        if "in" not in names and "dense_in" not in names and not hasattr(module, "W_in"):
            return self._experts(layer, at, module)
        return self._mlp(layer, at, module)

    def _mlp(self, layer: int, at: str, module: Any) -> MLPIn:
        if not self.hooks.is_bridge:
            return self._hooked(layer, at, module)
        prefix = "dense_" if "dense_in" in module._modules else ""
        parts = {k: module._modules.get(prefix + k) for k in ("in", "gate")}
        inner = unwrap(module)
        W_in, b_in = self._weights(parts["in"], f"{at}.{prefix}in")
        W_gate, b_gate = None, None
        if parts["gate"] is not None:
            W_gate, b_gate = self._weights(parts["gate"], f"{at}.{prefix}gate")
            factor = float(getattr(inner, "gate_multiplier", 1.0))
            W_gate, b_gate = W_gate * factor, None if b_gate is None else b_gate * factor
        after = getattr(inner, "ffn_sub_norm", None)
        if after is not None:
            where = Site(f"{at}.ffn_sub_norm", after, inputs=True)
            after = self.norms.norm_at(after, where.name, where)
        return MLPIn(
            layer,
            self.norms.mlp_norm(layer),
            self.hooks.site(f"{at}.hook_in"),
            self.norms.parallel(layer),
            W_in,
            b_in,
            W_gate,
            b_gate,
            self._activation(at, module, inner),
            after=after,
        )

    def _hooked(self, layer: int, at: str, module: Any) -> MLPIn:
        norm = getattr(module, "ln", None)
        act = module.act_fn if norm is None else lambda pre: norm(module.act_fn(pre))
        gate = parameter(module, "W_gate")
        return MLPIn(
            layer,
            self.norms.mlp_norm(layer),
            None,
            self.norms.parallel(layer),
            module.W_in.detach(),
            parameter(module, "b_in"),
            gate,
            None,
            act,
        )

    def _weights(self, module: Any, at: str) -> tuple[Tensor, Tensor | None]:
        return self.hooks.matrix(module, at, "Going back through an MLP")

    def _activation(self, at: str, module: Any, inner: Any) -> Callable[[Tensor], Tensor]:
        norm = module._modules.get("ln")
        for name in _ACTIVATIONS:
            act = getattr(inner, name, None)
            if callable(act):
                return act if norm is None else _then(act, unwrap(norm))
        if {"w1", "w2", "w3"} <= set(inner._modules):
            return torch.nn.functional.silu  # SwiGLU as LLaMA's authors named its matrices (LFM2)
        raise self._refusal(f"the activation of {at} ({class_name(inner)}) in {{}} is not found")

    def _experts(self, layer: int, at: str, module: Any) -> ExpertsIn:
        inner = unwrap(module)
        experts = unwrap(getattr(inner, "experts", None))
        gate_up = parameter(experts, "gate_up_proj")
        down = parameter(experts, "down_proj")
        if gate_up is None or down is None or gate_up.ndim != 3 or not takes_choice(experts):
            raise self._refusal(
                f"the experts of {at} ({class_name(inner)}) in {{}} are not stacked matrices"
                " (gate_up_proj, down_proj) that are given the tokens, the choice and the weights"
            )
        biases = parameter(experts, "gate_up_proj_bias"), parameter(experts, "down_proj_bias")
        norm, parallel = self.norms.mlp_norm(layer), self.norms.parallel(layer)
        transposed = gate_up.shape[1] == self.model.cfg.d_model != gate_up.shape[2]
        transposed = bool(getattr(experts, "is_transposed", transposed))
        paired = not getattr(experts, "is_concatenated", True)
        limit = getattr(experts, "limit", None)
        alpha = getattr(experts, "alpha", None)
        act = getattr(experts, "act_fn", torch.nn.functional.silu)
        if alpha is not None:
            act = lambda gate: gate * torch.sigmoid(alpha * gate)  # noqa: E731

        def expert(index: int) -> Expert:
            both = gate_up[index] if transposed else gate_up[index].mT
            bias = None if biases[0] is None else biases[0][index]
            [W_gate, W_in] = _halves(both, paired)
            [b_gate, b_in] = (None, None) if bias is None else _halves(bias, paired)
            way_in = MLPIn(
                layer,
                norm,
                None,
                parallel,
                W_in,
                b_in,
                W_gate,
                b_gate,
                act,
                limit,
                0.0 if alpha is None else 1.0,
            )
            W_out = down[index] if transposed else down[index].mT
            return Expert(way_in, W_out, None if biases[1] is None else biases[1][index])

        self._check_gate(at, experts, expert(0).way_in, paired)
        shared = next(
            (
                found
                for name in ("shared_experts", "shared_expert")
                if (found := getattr(inner, name, None)) is not None
            ),
            None,
        )
        weight = parameter(unwrap(getattr(inner, "shared_expert_gate", None)), "weight")
        return ExpertsIn(
            layer,
            norm,
            parallel,
            gate_up.shape[0],
            expert,
            None if shared is None else self._shared(layer, at, unwrap(shared)),
            None if weight is None else weight[0],
        )

    def _check_gate(self, at: str, experts: Any, way_in: MLPIn, paired: bool) -> None:
        """Hold what was read to the module's own gate, on a few numbers within and without."""
        own = getattr(experts, "_apply_gate", None)
        if own is None:
            return
        gate, pre = torch.linspace(-9, 9, 10), torch.linspace(8, -8, 10)
        stacked = torch.stack([gate, pre], -1).flatten() if paired else torch.cat([gate, pre])
        if way_in.limit is not None:
            gate, pre = gate.clamp(max=way_in.limit), pre.clamp(-way_in.limit, way_in.limit)
        if not torch.allclose(own(stacked), way_in.act(gate) * (pre + way_in.offset), atol=1e-5):
            raise self._refusal(f"the gate of {at} ({class_name(experts)}) in {{}} is another one")

    def _shared(self, layer: int, at: str, shared: Any) -> Expert:
        linear = {
            role: next((m for n in names if (m := getattr(shared, n, None)) is not None), None)
            for role, names in (
                ("in", ("up_proj", "w3")),
                ("gate", ("gate_proj", "w1")),
                ("out", ("down_proj", "w2")),
            )
        }
        if None in linear.values():
            raise self._refusal(f"the shared expert of {at} ({class_name(shared)}) in {{}} is new")
        W_in, b_in = self._weights(linear["in"], f"{at}.shared.in")
        W_gate, b_gate = self._weights(linear["gate"], f"{at}.shared.gate")
        W_out, b_out = self._weights(linear["out"], f"{at}.shared.out")
        act = self._activation(at, shared, shared)
        norm, parallel = self.norms.mlp_norm(layer), self.norms.parallel(layer)
        way_in = MLPIn(layer, norm, None, parallel, W_in, b_in, W_gate, b_gate, act)
        return Expert(way_in, W_out, b_out)

    def _refusal(self, why: str) -> Exception:
        return self.hooks.refusal(f"Going back through an MLP needs its weights, but {why}", _WORKS)


def _then(
    first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    return lambda x: second(first(x))


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = compute_dtype(x.dtype)
    y = x.to(dtype) @ weight.to(dtype)
    return y if bias is None else y + bias.to(dtype)


def _halves(both: Tensor, paired: bool) -> tuple[Tensor, Tensor]:
    """Gate and up of a fused projection: one after the other, or column by column."""
    if paired:
        return both[..., ::2], both[..., 1::2]
    gate, up = both.chunk(2, -1)
    return gate, up

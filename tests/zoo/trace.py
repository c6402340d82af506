"""Make the logit a linear function of what each sublayer writes, so that autograd can take it apart.

Torch hooks on the plain modules of a model, inside `with Trace(model) as trace:`

- the output of each sublayer (attention, MLP, Mamba mixer, ...) is replaced by its own value plus a leaf of
  zeros, so that gradients reach the leaf along the residual stream only, never through a later sublayer;
- a norm keeps its value, and its derivative becomes that of the same norm with the scale held fixed. Gain,
  bias and centring are measured by calling the norm on test vectors: nothing is looked up by name.

Which modules are sublayers follows one rule: every child of a layer that has parameters and is no norm.
`WRITER_WITHIN` lists the exceptions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

# The rows that TransformerLens has a name for; any other sublayer is named after its module.
ROW_OF_MODULE = {
    **dict.fromkeys(("self_attn", "self_attention", "attn", "attention"), "attn_out"),
    **dict.fromkeys(("mlp", "ffn", "feed_forward", "fc2", "block_sparse_moe", "experts"), "mlp_out"),
}
ROW_OF_CLASS = {"RwkvSelfAttention": "time_mix_out", "RwkvFeedForward": "channel_mix_out"}

# Modules that add the residual stream themselves: what they write is the output of a part of them.
WRITER_WITHIN = {
    "BloomAttention": "dense",
    "BloomMLP": "dense_4h_to_h",
    "MptMLP": "down_proj",
    "Zamba2MambaDecoderLayer": "mamba",
}

OUTPUT_PROJECTIONS = ("o_proj", "c_proj", "out_proj", "dense", "attention.out_proj", "o")


class Float64(TorchFunctionMode):
    """Many models compute norms and softmaxes in float32 whatever their dtype: here they do not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            func = Tensor.double
        args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


@dataclass
class Write:
    """Something added to the stream: its value, and a leaf of zeros whose gradient is d logit / d value."""

    label: str
    value: Tensor
    leaf: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)  # heads and bias, summing to value


class Trace:
    """What was written in the forward pass that runs inside the `with` block."""

    def __init__(self, model: nn.Module) -> None:
        self.writes: list[Write] = []
        self.unembedded: Tensor  # what the unembedding reads
        self.raw_logits: Tensor  # what it returns, before any multiplier or soft cap
        self.splits_heads = True
        self._model = model
        self._write_of: list[tuple[Tensor, Write]] = []  # the tensors that sublayers and post-norms return
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Trace:
        layers = layers_of(self._model)
        inside = set(layers.modules())
        for module in self._model.modules():
            if _is_norm(module) and module not in inside:
                self._freeze_norm(module, "ln_final.b")
        self._handles.append(layers[0].register_forward_pre_hook(self._start_stream, with_kwargs=True))
        for index, layer in enumerate(layers):
            for name, child in layer.named_children():
                if _is_norm(child):
                    self._freeze_norm(child, f"{index}_{name}.b")
                elif any(True for _ in child.parameters()):
                    self._cut_sublayer(child, index, name)
        self._replace_output(unembedding_of(self._model), self._keep_logits)
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _replace_output(self, module: nn.Module, replace: Callable[[Tensor, Tensor], Tensor]) -> None:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> Any:
            stream = inputs[0] if inputs else None
            if isinstance(output, (tuple, list)):
                return type(output)([replace(stream, output[0]), *output[1:]])
            return replace(stream, output)

        self._handles.append(module.register_forward_hook(hook))

    def _write(self, label: str, value: Tensor, parts: dict[str, Tensor] | None = None) -> Tensor:
        write = Write(label, value.detach().clone(), torch.zeros_like(value, requires_grad=True), parts or {})
        self.writes.append(write)
        return write.value + write.leaf

    def _start_stream(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (self._write("start", args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._write("start", kwargs["hidden_states"])}

    def _keep_logits(self, residual: Tensor, logits: Tensor) -> Tensor:
        self.unembedded, self.raw_logits = residual, logits
        return logits

    def _cut_sublayer(self, sublayer: nn.Module, index: int, name: str) -> None:
        kind = type(sublayer).__name__
        label = f"{index}_{ROW_OF_CLASS.get(kind) or ROW_OF_MODULE.get(name, f'{name}_out')}"
        split_heads = self._head_splitter(sublayer, index) if "Attention" in kind else dict

        def cut(inputs: Tensor, output: Tensor) -> Tensor:
            parts = split_heads()
            if parts:
                torch.testing.assert_close(sum(parts.values()), output, atol=1e-5, rtol=1e-5)
            replaced = self._write(label, output, parts)
            self._write_of.append((replaced, self.writes[-1]))
            return replaced

        writer = sublayer.get_submodule(WRITER_WITHIN[kind]) if kind in WRITER_WITHIN else sublayer
        self._replace_output(writer, cut)

    def _head_splitter(self, attention: nn.Module, index: int) -> Callable[[], dict[str, Tensor]]:
        """What each head and the output bias of one layer write: the output projection, head by head."""
        kept: list[Tensor] = []
        if hasattr(attention, "hook_z"):  # HookedTransformer: the projection is a weight, not a module
            self._handles.append(attention.hook_z.register_forward_hook(lambda m, i, z: kept.append(z)))
            project = lambda z: torch.einsum("bphd,hdm->bpm", z, attention.W_O) + attention.b_O  # noqa: E731
        else:
            projection = _output_projection(attention)
            if projection is None:
                self.splits_heads = False
                return dict
            hook = lambda module, inputs: kept.append(inputs[0])  # noqa: E731
            self._handles.append(projection.register_forward_pre_hook(hook))
            project = projection.forward

        def split() -> dict[str, Tensor]:
            z = kept.pop()
            n_heads = n_heads_of(self._model, index)
            by_head = z if z.ndim == 4 else z.unflatten(-1, (n_heads, -1))
            bias = project(torch.zeros_like(z))
            parts = {f"{index}_attn_bias": bias}
            for head in range(n_heads):
                alone = torch.zeros_like(by_head)
                alone[:, :, head] = by_head[:, :, head]
                parts[f"L{index}H{head}"] = project(alone.reshape(z.shape)) - bias
            return parts

        return split

    def _freeze_norm(self, norm: nn.Module, label: str) -> None:
        """Let the norm return what it returns, with the derivative of the same norm at a fixed scale."""

        def freeze(residual: Tensor, output: Tensor) -> Tensor:
            alternating = torch.tensor([1.0, -1.0]).to(output).repeat(output.shape[-1] // 2).expand_as(output)
            bias = norm.forward(torch.zeros_like(output))
            # At this size eps is lost: a norm returns sign * gain + bias, or bias alone if it centers a constant.
            gain = (norm.forward(1e6 * alternating) - bias) * alternating
            centers = torch.allclose(norm.forward(1e6 * torch.ones_like(output)), bias, atol=1e-4)
            linear = gain * (residual - residual.mean(-1, keepdim=True) if centers else residual)
            inverse_scale = ((output - bias) * linear).sum(-1, True) / linear.square().sum(-1, True)
            frozen = linear * inverse_scale.detach()
            torch.testing.assert_close(frozen + bias, output, atol=1e-5, rtol=1e-5)
            normed = next((write for tensor, write in self._write_of if tensor is residual), None)
            if normed is None:
                stream_bias = self._write(label, bias)
            else:  # after a sublayer the bias is part of what that sublayer writes
                layer = normed.label.split("_")[0]
                stream_bias = self._write(
                    normed.label, bias, {f"{layer}_attn_bias": bias} if normed.parts else {}
                )
            replaced = output.detach() - bias + stream_bias + (frozen - frozen.detach())
            if normed is not None:
                self._write_of.append((replaced, normed))
            return replaced

        self._replace_output(norm, freeze)


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def layers_of(model: nn.Module) -> nn.ModuleList:
    config = getattr(model, "config", None) or model.cfg
    n_layers = config.num_hidden_layers if hasattr(config, "num_hidden_layers") else config.n_layers
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers)


def n_heads_of(model: nn.Module, layer: int) -> int:
    if not hasattr(model, "config"):
        return model.cfg.n_heads
    per_layer = getattr(model.config, "num_attention_heads_per_layer", None)
    return per_layer[layer] if per_layer else model.config.num_attention_heads


def unembedding_of(model: nn.Module) -> nn.Module:
    if hasattr(model, "get_output_embeddings"):
        return model.get_output_embeddings()
    return model.unembed if hasattr(model, "unembed") else model.head


def _output_projection(attention: nn.Module) -> nn.Module | None:
    modules = dict(attention.named_modules())
    return next((modules[name] for name in OUTPUT_PROJECTIONS if name in modules), None)

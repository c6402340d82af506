"""Make the logit linear in what each sublayer writes, so that autograd can take it apart.

Torch hooks on the plain modules of a model, inside `with Trace(model) as trace:`

- the output of each sublayer (attention, MLP, Mamba mixer, ...) is replaced by its own value plus a
  leaf of zeros: gradients reach it along the residual stream only, never through a later sublayer;
- a norm keeps its value, and its derivative becomes that of the same norm at a fixed scale. Gain,
  bias and centring are measured by calling the norm on test vectors, not looked up by name.

Which modules are sublayers follows one rule: every child of a layer that has parameters and is no
norm. `WRITER_WITHIN` lists the exceptions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

# What TransformerLens calls these modules; any other row is named after its own module.
ROW_OF_MODULE = {
    **dict.fromkeys(("self_attn", "self_attention", "attn", "attention"), "attn_out"),
    **dict.fromkeys(("mlp", "ffn", "feed_forward", "fc2", "mlp_block"), "mlp_out"),
    **dict.fromkeys(("block_sparse_moe", "experts"), "mlp_out"),
    **dict.fromkeys(("input_layernorm", "self_attn_layer_norm", "ln_1"), "ln1.b"),
    **dict.fromkeys(("post_attention_layernorm", "final_layer_norm", "ln_2"), "ln2.b"),
    "mamba_decoder": "mamba_out",
    "per_layer_projection": "per_layer_input_out",
    "temporal_block": "temporal_out",
}
ROW_OF_CLASS = {
    **dict.fromkeys(("BambaMixer", "JambaMambaMixer", "Zamba2MambaMixer"), "mixer_out"),
    "GraniteMoeHybridMambaLayer": "mixer_out",
    "GraniteMoeHybridMoE": "moe_out",
    "OlmoHybridGatedDeltaNet": "attn_out",
    "RwkvSelfAttention": "time_mix_out",
    "RwkvFeedForward": "channel_mix_out",
}

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


@contextmanager
def all_in_float64() -> Iterator[None]:
    """Norms, rotations and softmaxes too, which many models take in float32 in any dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Float64():
            yield
    finally:
        torch.set_default_dtype(before)


@dataclass
class Write:
    """Something added to the stream, and a leaf of zeros whose gradient is d logit / d value."""

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
        self._written: list[tuple[Tensor, Write]] = []  # what sublayers and post-norms return
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Trace:
        layers = layers_of(self._model)
        start = layers[0].register_forward_pre_hook(self._start_stream, with_kwargs=True)
        self._handles.append(start)
        inside = set(layers.modules())
        for module in self._model.modules():
            if _is_norm(module) and module not in inside:
                self._replace_output(module, partial(self._freeze_norm, module, "ln_final.b"))
        for index, layer in enumerate(layers):
            for name, child in layer.named_children():
                if _is_norm(child):
                    label = f"{index}_{ROW_OF_MODULE.get(name, f'{name}.b')}"
                    self._replace_output(child, partial(self._freeze_norm, child, label))
                elif any(True for _ in child.parameters()):
                    self._cut_sublayer(child, index, name)
        self._replace_output(unembedding_of(self._model), self._keep_logits)
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _replace_output(self, module: nn.Module, replace: Callable) -> None:
        """`replace(input, output)` decides what the module returns, or what it returns first."""

        def hook(module: nn.Module, inputs: tuple, output: Any) -> Any:
            stream = inputs[0] if inputs else None
            if isinstance(output, tuple | list):
                return type(output)([replace(stream, output[0]), *output[1:]])
            return replace(stream, output)

        self._handles.append(module.register_forward_hook(hook))

    def _write(self, label: str, value: Tensor, parts: dict[str, Tensor] | None = None) -> Tensor:
        leaf = torch.zeros_like(value, requires_grad=True)
        write = Write(label, value.detach().clone(), leaf, parts or {})
        self.writes.append(write)
        return write.value + leaf

    def _start_stream(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (self._write("start", args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._write("start", kwargs["hidden_states"])}

    def _keep_logits(self, unembedded: Tensor, logits: Tensor) -> Tensor:
        self.unembedded, self.raw_logits = unembedded, logits
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
            self._written.append((replaced, self.writes[-1]))
            return replaced

        within = WRITER_WITHIN.get(kind)
        self._replace_output(sublayer.get_submodule(within) if within else sublayer, cut)

    def _head_splitter(self, attention: nn.Module, index: int) -> Callable[[], dict[str, Tensor]]:
        """What each head and the output bias write: the output projection of one head at a time."""
        kept: list[Tensor] = []
        if hasattr(
            attention, "hook_z"
        ):  # HookedTransformer: the projection is no module of its own
            hook = attention.hook_z.register_forward_hook(lambda module, inputs, z: kept.append(z))

            def project(z: Tensor) -> Tensor:
                return torch.einsum("bphd,hdm->bpm", z, attention.W_O) + attention.b_O

        else:
            modules = dict(attention.named_modules())
            found = [modules[name] for name in OUTPUT_PROJECTIONS if name in modules]
            if not found:
                self.splits_heads = False
                return dict
            project = found[0].forward
            hook = found[0].register_forward_pre_hook(lambda module, args: kept.append(args[0]))
        self._handles.append(hook)

        def split() -> dict[str, Tensor]:
            z = kept.pop()
            by_head = z if z.ndim == 4 else z.unflatten(-1, (n_heads_of(self._model, index), -1))
            bias = project(torch.zeros_like(z))
            parts = {f"{index}_attn_bias": bias}
            for head in range(by_head.shape[2]):
                alone = torch.zeros_like(by_head)
                alone[:, :, head] = by_head[:, :, head]
                parts[f"L{index}H{head}"] = project(alone.reshape(z.shape)) - bias
            return parts

        return split

    def _freeze_norm(self, norm: nn.Module, label: str, residual: Tensor, output: Tensor) -> Tensor:
        """The norm's own value, with the derivative of the same norm at a fixed scale."""
        signs = torch.tensor([1.0, -1.0]).to(output).repeat(output.shape[-1] // 2).expand_as(output)
        # On numbers this large eps does not count: only the signs come back, and none of a constant
        # if the norm centers.
        bias = norm.forward(torch.zeros_like(output))
        gain = (norm.forward(1e6 * signs) - bias) * signs
        centers = torch.allclose(norm.forward(1e6 * torch.ones_like(output)), bias, atol=1e-4)
        linear = gain * (residual - residual.mean(-1, keepdim=True) if centers else residual)
        inverse_scale = ((output - bias) * linear).sum(-1, True) / linear.square().sum(-1, True)
        frozen = linear * inverse_scale.detach()
        torch.testing.assert_close(frozen + bias, output, atol=1e-5, rtol=1e-5)

        sublayer = next((write for tensor, write in self._written if tensor is residual), None)
        if sublayer is None:
            frozen_bias = self._write(label, bias)
        else:  # a norm after a sublayer: its bias is part of what that sublayer writes
            index = sublayer.label.split("_")[0]
            parts = {f"{index}_attn_bias": bias} if sublayer.parts else {}
            frozen_bias = self._write(sublayer.label, bias, parts)
        replaced = (output - bias).detach() + (frozen - frozen.detach()) + frozen_bias
        if sublayer is not None:
            self._written.append((replaced, sublayer))
        return replaced


def layers_of(model: nn.Module) -> nn.ModuleList:
    config = getattr(model, "config", None) or model.cfg
    names = ("num_hidden_layers", "n_layers")
    n_layers = next(getattr(config, name) for name in names if hasattr(config, name))
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next(layers for layers in lists if len(layers) == n_layers)


def n_heads_of(model: nn.Module, layer: int) -> int:
    if not hasattr(model, "config"):
        return model.cfg.n_heads
    per_layer = getattr(model.config, "num_attention_heads_per_layer", None)
    return per_layer[layer] if per_layer else model.config.num_attention_heads


def unembedding_of(model: nn.Module) -> nn.Module:
    if hasattr(model, "get_output_embeddings"):
        return model.get_output_embeddings()
    return model.unembed if hasattr(model, "unembed") else model.head


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__

"""From what attention reads to its heads' values: linear maps, each followed by a norm or none.

v = x W_V + b_V                                   most models
v = norm(x W_V + b_V)                             a norm over each value (Gemma 4)
v = norm(x W_down + b_down) W_up + b_up           through a latent (DeepSeek)
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_dla.model.attention import AttentionReader
from tl_dla.model.hooks import Site, parameter, unwrap
from tl_dla.model.norms import Norm


@dataclass(frozen=True, eq=False)
class ValueMap:
    """`x W + b`, then `norm` over each group of `width` coordinates."""

    name: str
    W: Float[Tensor, "d_in d_out"]
    b: Float[Tensor, " d_out"] | None = None
    norm: Norm | None = None
    width: int = 1


@dataclass(frozen=True, eq=False)
class Values:
    """How a layer's values are made of `factor` × what the layer reads of the stream."""

    norm: Norm | None
    factor: float
    maps: tuple[ValueMap, ...]


def values_of(reader: AttentionReader, layer: int, d_head: int) -> Values:
    """How the layer's values are made.

    Raises:
        UnsupportedModelError: for what is no chain of frozen linear maps, by its name.
    """
    hooks = reader.hooks
    block = reader.hooks.blocks[layer]
    at, attn = f"blocks.{layer}.attn", block.attn
    inner = unwrap(attn)
    norm = reader.norms.attention_norm(layer)
    factor = float(getattr(unwrap(block), "attention_in_multiplier", 1.0))
    config = getattr(inner, "config", None)
    why = None
    if getattr(inner, "is_kv_shared_layer", False):
        why = "takes its values from another layer"
    elif getattr(config, "clip_qkv", None) or getattr(attn, "_clip_qkv", None):
        why = "clips its values"
    elif hooks.site(f"{at}.hook_pattern") is None:
        why = "shows no pattern (hook_pattern)"
    if why is None and hasattr(inner, "kv_b_proj"):
        return Values(norm, factor, _latent(reader, at, inner))
    if why is None and hooks.is_bridge and "v" not in attn._modules:
        why = "has no one W_V"
    if why is not None:
        raise hooks.refusal(
            f"Going back through attention needs its values as linear maps of the stream; {at} in"
            f" {{}} {why}",
            'unit="component" and unit="head" work.',
        )
    if not hooks.is_bridge:
        W = hooks.stored(attn, "W_V", "Going back through attention")
        bias = parameter(attn, "b_V")
        flat = W.transpose(0, 1).flatten(1)
        return Values(norm, factor, (ValueMap("b_V", flat, _flat(bias)),))
    W, bias = hooks.matrix(attn._modules["v"], f"{at}.v", "Going back through attention")
    after = _value_norm(reader, at, attn, inner)
    return Values(norm, factor, (ValueMap("b_V", W, bias, after, d_head),))


def _flat(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.flatten()


def _value_norm(reader: AttentionReader, at: str, attn: Any, inner: Any) -> Norm | None:
    module = attn._modules.get("v_norm") or getattr(inner, "v_norm", None)
    if module is None or getattr(module, "original_component", module) is None:
        return None
    return reader.norms.norm_at(module, f"{at}.v_norm", Site(f"{at}.v_norm", module, inputs=True))


def _latent(reader: AttentionReader, at: str, inner: Any) -> tuple[ValueMap, ...]:
    """Down to a latent, its norm, and up to the part of each head that holds values."""
    rank, nope = int(inner.kv_lora_rank), int(inner.qk_nope_head_dim)
    needed = "Going back through attention"
    down, b_down = reader.hooks.matrix(inner.kv_a_proj_with_mqa, f"{at}.kv_a_proj_with_mqa", needed)
    up, b_up = reader.hooks.matrix(inner.kv_b_proj, f"{at}.kv_b_proj", needed)
    width = nope + int(inner.v_head_dim)
    norm = inner.kv_a_layernorm
    after = reader.norms.norm_at(
        norm, f"{at}.kv_a_layernorm", Site(f"{at}.kv_a_layernorm", norm, inputs=True)
    )
    W_up = up.unflatten(1, (-1, width))[..., nope:].flatten(1)
    b_up = None if b_up is None else b_up.unflatten(0, (-1, width))[..., nope:].flatten()
    b_down = None if b_down is None else b_down[:rank]
    first = ValueMap("b_latent", down[:, :rank], b_down, after, rank)
    return first, ValueMap("b_V", W_up, b_up)

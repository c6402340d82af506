"""How an attention layer makes its scores: queries, keys, positions, scale, cap and bias.

    score[query, key] = cap(scale × q[query] · k[key] + bias[key])

masks and sinks aside, which cancel in the difference of two scores of one query that see their
keys. q and k are linear in what the layer reads once norms are frozen (`projections.py`), rotations
are matrices (`rotary.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.errors import UnsupportedModelError
from tl_dla.model.hooks import Hooks, Site, class_name, parameter, unwrap
from tl_dla.model.norms import Norm, NormReader
from tl_dla.model.projections import Beside, HeadNorm, Linear, Projection, Rotate, Step
from tl_dla.model.rotary import Rotary, read_rotary


@dataclass(frozen=True, eq=False)
class QueriesAndKeys:
    """How the scores of a layer come about.

    Attributes:
        norm: what the stream passes through first; None where attention reads the stream itself.
        factor: what that is then multiplied with: x = factor × norm(stream).
        site: shows x, what the projections are applied to.
        query, key: x to `[*, head, d_head]` and `[*, group, d_head]`; heads share a group's keys.
        rotary: the rotations, which the projections are given; None where positions are not
            rotated.
        cap: the soft cap c of a score, c tanh(score / c).
        biases: what is added to the scores, as sites and factors (ALiBi).
        temperature: what a query is multiplied with for its position (Llama 4, Ministral 3).
        sinks: scores of no key, one a head, that take their share of the pattern.
        pattern: shows the softmax of the scores, `[batch, head, query, key]`.
        in_float32: whether the model computes its scores in float32 whatever it is in.
    """

    layer: int
    norm: Norm | None
    site: Site
    factor: float
    query: Projection
    key: Projection
    rotary: Rotary | None
    scale: float
    cap: float | None
    biases: tuple[tuple[Site, float], ...]
    temperature: Callable[[Tensor], Tensor] | None
    sinks: Float[Tensor, " head"] | None
    pattern: Site
    in_float32: bool

    def scores(
        self,
        x: Float[Tensor, "batch pos d_model"],
        given: Any = None,
        biases: Sequence[Tensor] = (),
    ) -> Float[Tensor, "batch head query key"]:
        """The scores of every query and key, before any mask.

        Args:
            x: what `site` shows.
            given: what `rotary.site` shows.
            biases: what each of `biases` shows.
        """
        rotation = None if self.rotary is None else self.rotary.matrix(given)
        q = self.query.freeze(x, rotation).value
        k = self.key.freeze(x, rotation).value
        if self.temperature is not None:
            at = torch.arange(q.shape[1], device=q.device)
            q = q * self.temperature(at).to(q)[:, None, None]
        k = k.repeat_interleave(q.shape[-2] // k.shape[-2], -2)
        score = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale
        score = score + self.bias(biases, k.shape[1])
        return score if self.cap is None else self.cap * torch.tanh(score / self.cap)

    def bias(
        self, shown: Sequence[Tensor], n_keys: int
    ) -> Float[Tensor, "#batch head #query #key"] | float:
        """What is added to the scores after the scale, from what each of `biases` shows."""
        heads, total = _n_heads(self.query), torch.zeros((), device="cpu")
        for (site, factor), values in zip(self.biases, shown, strict=True):
            if site.argument == "attention_mask":  # its masked places are no bias
                values = values.masked_fill(values < -1e30, 0.0)
            else:
                values = values.reshape(-1, heads, 1, values.shape[-1])[..., -n_keys:]
            total = total + values * factor
        return total if total.ndim else 0.0


class QueriesAndKeysReader:
    """How attention layers make their scores."""

    def __init__(self, hooks: Hooks, norms: NormReader) -> None:
        self.hooks, self.norms, self.model = hooks, norms, hooks.model

    def queries_and_keys(self, layer: int) -> QueriesAndKeys:
        """How the layer's scores come about.

        Raises:
            UnsupportedModelError: for a part that is not understood, by its name.
        """
        block = self.hooks.blocks[layer]
        at, attn = f"blocks.{layer}.attn", block._modules.get("attn")
        if attn is None or self.hooks.site(f"blocks.{layer}.hook_attn_out") is None:
            raise self._refusal(f"blocks.{layer} of {{}} has no attention")
        if not self.hooks.is_bridge:
            return self._hooked(layer, at, attn)
        inner = unwrap(attn)
        self._refuse(at, attn, inner)
        d_head = int(getattr(inner, "head_dim", None) or self.model.cfg.d_head)
        if "kv_a_proj_with_mqa" in attn._modules:
            query, key, start, d_head = self._latent(at, inner)
        else:
            query, key, start = *self._plain(at, attn, inner, d_head), 0
        rotary = None
        scale = self._scale(layer, attn, inner, d_head)
        biases = self._biases(attn, scale)
        if not biases:
            read = read_rotary(attn, at, start, d_head - start, d_head)
            if isinstance(read, str):
                raise self._refusal(f"{at} of {{}} {read}")
            rotary = read
        pattern, site = self.hooks.site(f"{at}.hook_pattern"), self.hooks.site(f"{at}.hook_in")
        assert pattern is not None and site is not None
        return QueriesAndKeys(
            layer,
            self.norms.attention_norm(layer),
            site,
            float(getattr(unwrap(block), "attention_in_multiplier", 1.0)),
            query,
            key,
            rotary,
            scale,
            getattr(inner, "attn_logit_softcapping", None) or _native_cap(inner),
            tuple((Site(at, attn, True, name), factor) for name, factor in biases),
            _temperature(inner),
            parameter(inner, "sinks"),
            pattern,
            _in_float32(inner),
        )

    def _hooked(self, layer: int, at: str, attn: Any) -> QueriesAndKeys:
        """Of a HookedTransformer whose positions are in the stream."""
        cfg = self.model.cfg

        def has(*names: str) -> bool:
            return any(bool(getattr(cfg, name, None)) for name in names)

        why = {
            "has positions elsewhere than in the stream": cfg.positional_embedding_type
            != "standard",
            "is given an input for each head": has("use_split_qkv_input", "use_attn_in"),
            "changes its queries after W_Q": has("use_qk_norm", "clip_qkv", "use_logn_attn")
            or getattr(attn, "q_norm", None) is not None,
            "keeps its weights in 4 bits": has("load_in_4bit"),
        }
        for reason, holds in why.items():
            if holds:
                raise self._refusal(f"{at} of {{}}, a HookedTransformer, {reason}")
        pattern = self.hooks.site(f"{at}.hook_pattern")
        assert pattern is not None
        query, key = (
            Projection(
                (Linear(getattr(attn, f"W_{side}").detach(), getattr(attn, f"b_{side}").detach()),)
            )
            for side in "QK"
        )
        return QueriesAndKeys(
            layer,
            self.norms.attention_norm(layer),
            Site(at, attn, True, "query_input"),
            1.0,
            query,
            key,
            None,
            1.0 / float(attn.attn_scale),
            _native_cap(cfg),
            (),
            None,
            parameter(attn, "sinks"),
            pattern,
            False,
        )

    def _refuse(self, at: str, attn: Any, inner: Any) -> None:
        config = getattr(inner, "config", None)
        if getattr(inner, "is_kv_shared_layer", False):
            raise self._refusal(f"{at} of {{}} takes its keys from another layer")
        if getattr(config, "clip_qkv", None) or getattr(attn, "_clip_qkv", None):
            raise self._refusal(f"{at} of {{}} clips its queries and keys")
        if getattr(inner, "rotary", None) is not None:
            raise self._refusal(f"{at} of {{}} rotates inside {class_name(inner)}")
        if self.hooks.site(f"{at}.hook_pattern") is None:
            raise self._refusal(f"{at} of {{}} ({class_name(attn)}) shows no pattern")
        if "kv_a_proj_with_mqa" not in attn._modules and not {"q", "k"} <= set(attn._modules):
            raise self._refusal(f"{at} of {{}} ({class_name(attn)}) has no one W_Q and W_K")

    def _plain(self, at: str, attn: Any, inner: Any, d_head: int) -> tuple[Projection, Projection]:
        query = self._side(at, attn, "q", d_head)
        key = self._side(at, attn, "k", d_head)
        factor = getattr(inner, "key_multiplier", None)
        if factor is not None:  # before the norm and the rotation, and linear: anywhere will do
            first = key[0]
            assert isinstance(first, Linear)
            bias = None if first.b is None else first.b * factor
            key = (Linear(first.W * factor, bias), *key[1:])
        return Projection(query), Projection(key)

    def _side(self, at: str, attn: Any, which: str, d_head: int) -> tuple[Step, ...]:
        """W, the norm over heads and the rotation, in the model's order."""
        inner = unwrap(attn)
        weight, bias = self._weights(attn._modules[which], f"{at}.{which}")
        W = weight.unflatten(1, (-1, d_head)).transpose(0, 1)
        b = None if bias is None else bias.unflatten(0, (-1, d_head))
        if which == "q" and getattr(self.model.cfg, "gated_q_proj", False):
            W, b = W[::2], None if b is None else b[::2]  # each head's query, then its gate
        norm = self._head_norm(f"{at}.{which}_norm", attn, which, W.shape[0], d_head)
        after = bool(getattr(self.model.cfg, "qk_norm_after_rope", False))
        l2 = getattr(inner, "qk_norm", None)  # Llama 4: after the rotation, without weights
        if l2 is not None:
            where = Site(f"{at}.qk_norm", l2, inputs=True)
            norm, after = HeadNorm(Norm(where.name, where, None, None, False, float(l2.eps))), True
        if norm is None:
            return Linear(W, b), Rotate()
        return (Linear(W, b), Rotate(), norm) if after else (Linear(W, b), norm, Rotate())

    def _head_norm(
        self, name: str, attn: Any, which: str, n_heads: int, d_head: int
    ) -> HeadNorm | None:
        module = attn._modules.get(f"{which}_norm")
        if module is None or getattr(module, "original_component", module) is None:
            return None
        inner, site = unwrap(module), Site(name, module, inputs=True)
        if hasattr(inner, "norms"):  # StableLM: a LayerNorm of its own for each head
            gamma = torch.stack([each.weight.detach() for each in inner.norms])
            return HeadNorm(Norm(name, site, gamma, None, True, float(inner.norms[0].eps)))
        norm = self.norms.norm_at(module, name, site)
        joint = norm.gamma is not None and norm.gamma.shape == (n_heads * d_head,) != (d_head,)
        if not joint:
            return HeadNorm(norm)
        assert norm.gamma is not None
        gamma = norm.gamma.unflatten(0, (-1, d_head))
        if norm.centred or norm.beta is not None:
            raise self._refusal(f"{name} of {{}} centres all heads together")
        return HeadNorm(Norm(name, site, gamma, None, False, norm.norm_eps), joint=True)

    def _latent(self, at: str, inner: Any) -> tuple[Projection, Projection, int, int]:
        """Queries and keys through latents (DeepSeek): parts of a head that are not rotated first.

        The parts that are rotated come last: all heads share that of a key.
        """
        nope, rope = int(inner.qk_nope_head_dim), int(inner.qk_rope_head_dim)
        query: tuple[Step, ...]
        if getattr(inner, "q_lora_rank", None) is None:
            query = (self._heads(inner, at, "q_proj", nope + rope),)
        else:
            query = (
                self._heads(inner, at, "q_a_proj", None),
                self._latent_norm(inner, at, "q_a_layernorm"),
                self._heads(inner, at, "q_b_proj", nope + rope),
            )
        down = self._heads(inner, at, "kv_a_proj_with_mqa", None)
        rank = int(inner.kv_lora_rank)
        latent, turned = (
            Linear(down.W[..., part], None if down.b is None else down.b[..., part])
            for part in (slice(rank), slice(rank, None))
        )
        up = self._heads(inner, at, "kv_b_proj", nope + int(inner.v_head_dim))
        keys = Linear(up.W[..., :nope], None if up.b is None else up.b[..., :nope])
        norm = self._latent_norm(inner, at, "kv_a_layernorm")
        key = (Beside(((latent, norm, keys), (turned,))), Rotate())
        return Projection((*query, Rotate())), Projection(key), nope, nope + rope

    def _heads(self, inner: Any, at: str, name: str, d_head: int | None) -> Linear:
        weight, bias = self._weights(getattr(inner, name), f"{at}.{name}")
        width = weight.shape[1] if d_head is None else d_head
        W = weight.unflatten(1, (-1, width)).transpose(0, 1)
        return Linear(W, None if bias is None else bias.unflatten(0, (-1, width)))

    def _latent_norm(self, inner: Any, at: str, name: str) -> HeadNorm:
        module = getattr(inner, name)
        site = Site(f"{at}.{name}", module, inputs=True)
        return HeadNorm(self.norms.norm_at(module, site.name, site))

    def _scale(self, layer: int, attn: Any, inner: Any, d_head: int) -> float:
        """What q · k is multiplied with, as the module that computes the scores says."""
        cfg = self.model.cfg
        if hasattr(attn, "split_qkv_matrix"):  # the bridge computes them: see its classes
            own = getattr(attn, "_softmax_scale", None)
            scale = d_head**-0.5 if own is None else float(own)
            inverse = bool(getattr(cfg, "scale_attn_by_inverse_layer_idx", False))
            return scale / (layer + 1) if inverse else scale
        for name, power in (
            ("scaling", 1),
            ("softmax_scale", 1),
            ("scale_attn", -1),
            ("scale", -1),
        ):
            value = getattr(inner, name, None)
            if isinstance(value, int | float | Tensor):
                return float(value) ** power
        return d_head**-0.5 if hasattr(attn, "hook_cos") else 1.0  # GPT-Neo does not scale

    def _biases(self, attn: Any, scale: float) -> list[tuple[str, float]]:
        """The arguments that the attention is given as biases of its scores, and their factors."""
        if getattr(self.model.cfg, "positional_embedding_type", "standard") != "alibi":
            return []
        if "MPT" in class_name(attn):
            return [("position_bias", 1.0)]
        if "ALiBi" in class_name(attn):  # Falcon: in its mask, and once more before the scale
            return [("alibi", scale), ("attention_mask", 1.0)]
        return [("alibi", 1.0)]

    def _weights(self, module: Any, at: str) -> tuple[Tensor, Tensor | None]:
        return self.hooks.matrix(module, at, "Taking a score apart")

    def _refusal(self, why: str) -> UnsupportedModelError:
        return self.hooks.refusal(
            f"A score is q · k of two tokens, but {why}", 'unit="head" works.'
        )


def _n_heads(query: Projection) -> int:
    last = [step for step in query.steps if isinstance(step, Linear)][-1]
    return last.W.shape[0]


def _native_cap(inner: Any) -> float | None:
    cap = float(getattr(inner, "attn_scores_soft_cap", 0.0))
    return cap if cap > 0 else None


def _in_float32(inner: Any) -> bool:
    """Whether the function that multiplies queries with keys asks for float32 (GPT-J, GPT-Neo)."""
    code = getattr(getattr(type(inner), "_attn", None), "__code__", None)
    return code is not None and "float32" in code.co_names


def _temperature(inner: Any) -> Callable[[Tensor], Tensor] | None:
    """What queries are multiplied with, from positions."""
    if getattr(inner, "attn_temperature_tuning", None) and not getattr(inner, "use_rope", True):
        floor, strength = float(inner.floor_scale), float(inner.attn_scale)
        return lambda at: torch.log1p(torch.floor((at + 1.0) / floor)) * strength + 1.0
    rope = getattr(getattr(inner, "config", None), "rope_parameters", None)
    if not isinstance(rope, dict) or rope.get("llama_4_scaling_beta") is None:
        return None
    beta = float(rope["llama_4_scaling_beta"])
    before = float(rope["original_max_position_embeddings"])
    return lambda at: 1 + beta * torch.log1p(torch.floor(at / before))

"""A supplied cache: read as an `ActivationCache`, and held to the model and the input."""

import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from tl_dla.errors import ArgumentError, IncompleteCacheError, TokenError
from tl_dla.inputs.models import device_of
from tl_dla.inputs.tokens import Input, Prompts, read_prompts, texts_of
from tl_dla.model.hooks import alone_on

# Activations whose second axis is positions.
_BY_POSITION = (
    *("hook_resid_pre", "hook_resid_post", "hook_in", "hook_embed", "hook_out", "hook_z"),
    "hook_scale",
)
# Those that are `[batch, pos, d_model]` or `[batch, pos, 1]` in every model.
_THREE_AXES = ("hook_embed", "hook_resid_pre", "hook_resid_post", "ln_final.hook_scale")
# Where tokens enter the stream; the first that a cache holds is compared.
_STARTS = ("hook_embed", "embed.hook_out", "blocks.0.hook_resid_pre", "blocks.0.hook_in")


def read_cache(model: Any, cache: Any) -> Any:
    """The cache as an `ActivationCache`, also where TransformerLens returned a plain dict.

    Raises:
        ArgumentError: for anything else, saying how a cache is made.
    """
    if hasattr(cache, "cache_dict"):
        return cache
    if not isinstance(cache, Mapping):
        raise ArgumentError(
            "cache must be an ActivationCache, or a dict of activations by hook; a"
            f" {type(cache).__name__} was given: logits, cache = model.run_with_cache(tokens)."
        )
    from transformer_lens import ActivationCache

    axes = [x.ndim for name, x in cache.items() if name.endswith(_THREE_AXES)]
    return ActivationCache(dict(cache), model, has_batch_dim=not axes or axes[0] == 3)


def require_cache(cache: Any) -> None:
    """Raise `ArgumentError` unless it is an `ActivationCache`, which knows its model."""
    if not hasattr(cache, "cache_dict"):
        raise ArgumentError(
            "cache must be an ActivationCache, which knows its model; a"
            f" {type(cache).__name__} was given: logits, cache = model.run_with_cache(tokens)."
        )


def cache_shape(cache: Any) -> tuple[int, int]:
    """Batch and positions of a cache, from the activations whose second axis is positions."""
    for name, x in cache.cache_dict.items():
        if name.endswith(_BY_POSITION):
            shape = x.shape if cache.has_batch_dim else (1, *x.shape)
            return int(shape[0]), int(shape[1])
    raise IncompleteCacheError(
        "The cache holds no activation of the residual stream: run the model with"
        " names_filter=required_hooks(model, unit)."
    )


def cached_tokens(cache: Any) -> Int[Tensor, "batch pos"] | None:
    """The tokens that a full cache of a bridge holds."""
    held, shape = cache.cache_dict.get("embed.hook_in"), cache_shape(cache)
    if held is None or held.is_floating_point() or held.numel() != shape[0] * shape[1]:
        return None
    return held.reshape(shape)


def read_cached_prompts(
    model: Any,
    input: Input | None,
    cache: Any,
    *,
    prepend_bos: bool | None = None,
    attention_mask: Shaped[Tensor, "... pos"] | None = None,
) -> Prompts:
    """The prompts of a cache, laid out as they are there; see `read_prompts`.

    Without an input they are the tokens that the cache holds, or else unknown.

    Raises:
        TokenError: where the input has another shape than the cache.
    """
    shape = cache_shape(cache)
    if input is None:
        input = cached_tokens(cache)
    if input is None:
        tokens = torch.zeros(shape, dtype=torch.long, device=device_of(model))
        length = torch.full(shape[:1], shape[1], device=tokens.device)
        return Prompts(tokens, torch.zeros_like(length), length, known=False)
    if texts_of(input):
        if attention_mask is not None:
            read_prompts(model, input, attention_mask=attention_mask)  # says what is wrong
        options = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
        input = model.to_tokens(input, **options)  # laid out as TransformerLens laid them out
    prompts = read_prompts(model, input, attention_mask=attention_mask)
    require_shape(cache, prompts)
    return prompts


def require_shape(cache: Any, prompts: Prompts) -> None:
    """Raise `TokenError` unless the cache is of as many prompts and tokens."""
    own, shape = tuple(prompts.tokens.shape), cache_shape(cache)
    if own != shape:
        raise TokenError(
            f"The input has {own} tokens [batch, pos], the cache {shape}: they are not of the same"
            " run."
        )


def check_cache(model: Any, cache: Any, prompts: Prompts) -> list[str]:
    """Show that the cache is of this model and these prompts, laid out as the cache is.

    Tokens are compared where the cache holds them, else the activations where they enter the
    stream, for which the model runs as far as its first block. Padding on the left must not have
    been attended to.

    Returns:
        What could not be checked, each in words that follow "not checked:".

    Raises:
        ArgumentError: where the cache is of another model.
        TokenError: where it is of other tokens, or of tokens that saw padding before them.
    """
    unchecked = []
    maker = getattr(cache.model, "_orig_mod", cache.model)
    if maker is None:
        unchecked.append("the cache's model (it names none)")
    elif maker is not model:
        raise ArgumentError(
            "The cache was made by another model than the one given: pass the model that made it,"
            " cache.model, or run this one."
        )
    if not prompts.known:
        return [*unchecked, "the cache's prompts (no input was given)"]
    tokens = cached_tokens(cache)
    start = next((name for name in _STARTS if name in cache.cache_dict), None)
    if tokens is not None:
        differs = prompts.pack(tokens.to(prompts.tokens.device)) != prompts.packed
    elif start is not None:
        differs = _starts_differ(model, cache, start, prompts)
    else:
        unchecked.append("the cache's prompts (it holds neither tokens nor embeddings)")
        differs = torch.zeros_like(prompts.packed, dtype=torch.bool)
    _require_none(differs & prompts.real, prompts)
    return unchecked + _check_padding(cache, prompts)


class _Stop(Exception):
    """Raised in a hook to end a forward pass early."""


def _starts_differ(
    model: Any, cache: Any, name: str, prompts: Prompts
) -> Bool[Tensor, "batch pos"]:
    """Where the stream of the cache does not begin as the model begins it on these prompts."""
    fresh, thread = [], threading.get_ident()

    def keep(activation: Tensor, **_: Any) -> None:
        if threading.get_ident() == thread:
            fresh.append(activation)
            raise _Stop

    with alone_on(model), torch.no_grad(), suppress(_Stop), model.hooks(fwd_hooks=[(name, keep)]):
        model(prompts.packed)
    held = cache.cache_dict[name]
    held = prompts.pack(held if cache.has_batch_dim else held[None]).to(fresh[0].device)
    miss = (held - fresh[0]).abs().amax(-1)
    # Twice the rounding of a sum and a norm; another token's embedding misses by about its size.
    eps = max(torch.finfo(x.dtype).eps for x in (held, fresh[0]))
    allowed = min(64 * eps, 0.1)
    return (miss > allowed * fresh[0].abs().amax(-1)).to(prompts.tokens.device)


def _require_none(differs: Bool[Tensor, "batch pos"], prompts: Prompts) -> None:
    if bool(differs.any()):
        row, place = (int(i) for i in differs.nonzero()[0])
        raise TokenError(
            f"The cache is of another input: they differ at position {place} of prompt {row}, where"
            f" the input has token {int(prompts.packed[row, place])}. Give the input that the cache"
            " was made from, or leave out the cache."
        )


def _check_padding(cache: Any, prompts: Prompts) -> list[str]:
    """That no token attended to padding before it, by the first pattern that the cache holds."""
    if not bool(prompts.start.any()):
        return []
    held = cache.cache_dict
    pattern = next((x for name, x in held.items() if name.endswith("attn.hook_pattern")), None)
    if pattern is None:
        return ["that the padding on the left was masked (the cache holds no attention pattern)"]
    pattern = pattern if cache.has_batch_dim else pattern[None]
    start, width = prompts.start.to(pattern.device), pattern.shape[-1]
    is_padding = torch.arange(width, device=pattern.device) < start[:, None]
    seen = pattern * is_padding[:, None, None, :] * ~is_padding[:, None, :, None]
    if bool((seen > 1e-6).any()):
        raise TokenError(
            "The cache was made without a mask: its prompts attended to the padding on their left."
            " Make it with model.run_with_cache(tokens, attention_mask=mask), or leave it out."
        )
    return []

"""`ActivationCache`'s own methods, exact on any model: the cache first, then its parameters.

    decompose_resid  accumulated_resid  stack_head_results      what wrote to the stream
    apply_ln_to_stack                                           through the norm that reads it
    logit_attrs                                                 to the logits of tokens

Names, parameters, defaults and shapes are those of `transformer_lens.ActivationCache`, and on
folded models of the plain layout the numbers too. Elsewhere they say what the model does, which its
own do not: heads pass through the norm after their layer, the norm's γ is applied, a soft cap is
frozen as its ratio, and what nothing explains is a `_rest` row. No forward pass is needed.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.final_readout import frozen_readout
from tl_dla.core.readout import Readout
from tl_dla.core.taps import exact
from tl_dla.core.vectors import CachePlace, ResidualStack, decompose
from tl_dla.errors import ArgumentError
from tl_dla.inputs.caches import require_cache
from tl_dla.inputs.positions import slice_class
from tl_dla.inputs.targets import Answers, read_targets

Stack = Float[Tensor, "row *batch_and_pos d_model"]
Labelled = Stack | tuple[Stack, list[str]]
_MODES = {"all": None, "mlp": ("embed", "mlp"), "attn": ("embed", "attn")}


def decompose_resid(
    cache: Any,
    layer: int | None = None,
    mlp_input: bool = False,
    mode: Literal["all", "mlp", "attn"] = "all",
    apply_ln: bool = False,
    pos_slice: Any = None,
    incl_embeds: bool = True,
    return_labels: bool = False,
) -> Labelled:
    """What each part of the model wrote to the stream that a layer reads; they add up to it.

    Args:
        cache: an `ActivationCache`.
        layer: the layer; -1, None or the number of layers for the input of the final norm.
        mlp_input: the stream that the layer's MLP reads, not its attention.
        mode: all rows, or those of MLPs or of attention alone.
        apply_ln: through the norm that reads the stream there; see `apply_ln_to_stack`.
        pos_slice: positions, counted from the start of the cache; None for all.
        incl_embeds: with the rows of the embeddings.
        return_labels: return `(vectors, labels)`.

    Raises:
        ArgumentError: for a layer or a mode that there is not.
        IncompleteCacheError: naming the hooks that the cache lacks.
        UnsupportedModelError: where the model does not show the stream there.
    """
    if mode not in _MODES:
        raise ArgumentError(f'mode must be "all", "mlp" or "attn"; {mode!r} was given.')
    stack = decompose(
        cache, layer=layer, mlp_input=mlp_input, apply_ln=apply_ln, pos_slice=pos_slice
    )
    kinds = _MODES[mode]
    rows = [i for i, kind in enumerate(stack.kinds) if kinds is None or kind in kinds]
    rows = [i for i in rows if incl_embeds or stack.kinds[i] != "embed"]
    return _labelled(stack.only(rows), return_labels)


def accumulated_resid(
    cache: Any,
    layer: int | None = None,
    incl_mid: bool = False,
    apply_ln: bool = False,
    pos_slice: Any = None,
    mlp_input: bool = False,
    return_labels: bool = False,
) -> Labelled:
    """The stream before every layer up to this one, and at its input.

    Args:
        cache: an `ActivationCache`.
        layer: the last layer; -1, None or the number of layers for the input of the final norm.
        incl_mid: also between attention and MLP.
        apply_ln: through the norm that reads the stream at the end: the final norm with statistics
            of each row's own (the logit lens), any other with its scale in this run.
        pos_slice: positions, counted from the start of the cache; None for all.
        mlp_input: end at the stream that the layer's MLP reads.
        return_labels: return `(vectors, labels)`.

    Raises:
        ArgumentError: for a layer that there is not.
        IncompleteCacheError: naming the hooks that the cache lacks.
        UnsupportedModelError: where the model does not show the stream there.
    """
    options: dict[str, Any] = dict(layer=layer, mlp_input=mlp_input, pos_slice=pos_slice)
    stack = decompose(cache, "layer", incl_mid=incl_mid, **options)
    vectors = stack.vectors
    if apply_ln:
        options["has_batch_dim"] = cache.has_batch_dim
        vectors = apply_ln_to_stack(cache, vectors, recompute_ln=True, **options)
    return _labelled(ResidualStack(vectors, stack.keys), return_labels)


def stack_head_results(
    cache: Any,
    layer: int | None = -1,
    return_labels: bool = False,
    incl_remainder: bool = False,
    pos_slice: Any = None,
    apply_ln: bool = False,
) -> Labelled:
    """What each head of the layers before this one wrote to the stream that it reads.

    Args:
        cache: an `ActivationCache`.
        layer: the layer; -1, None or the number of layers for all heads.
        return_labels: return `(vectors, labels)`.
        incl_remainder: with everything else as a last row, `remainder`; what nothing explains
            keeps its `_rest` row before it.
        pos_slice: positions, counted from the start of the cache; None for all.
        apply_ln: through the norm that reads the stream there; see `apply_ln_to_stack`.

    Raises:
        ArgumentError: for a layer that there is not.
        IncompleteCacheError: naming the hooks that the cache lacks.
        UnsupportedModelError: where heads cannot be told apart.
    """
    stack = decompose(
        cache, "head", layer=layer, pos_slice=pos_slice, incl_remainder=True, apply_ln=apply_ln
    )
    n = len(stack.keys) if incl_remainder else stack.kinds.count("head")
    return _labelled(stack.only(range(n)), return_labels)


def apply_ln_to_stack(
    cache: Any,
    residual_stack: Float[Tensor, "*row_batch_and_pos d_model"],
    layer: int | None = None,
    mlp_input: bool = False,
    pos_slice: Any = None,
    batch_slice: Any = None,
    has_batch_dim: bool = True,
    recompute_ln: bool = False,
    incl_bias: bool = False,
) -> Float[Tensor, "*row_batch_and_pos_out d_model"]:
    """Vectors of the stream through the norm that reads it: γ ⊙ (x − mean) / s, its scale frozen.

    With `incl_bias` the rows of `decompose_resid` add up to what the norm returned. On folded
    weights γ is 1 and β 0; where a layer reads the stream itself, the stack comes back as it is.

    Args:
        cache: an `ActivationCache`.
        residual_stack: vectors at the positions of `pos_slice`, any rows before them.
        layer: whose input they are; -1, None or the number of layers for the final norm's.
        mlp_input: the input of the layer's MLP, not of its attention.
        pos_slice: the positions that the stack was taken at; None for all.
        batch_slice: the prompts to keep of the stack, or the prompt that a stack without an axis of
            prompts is of.
        has_batch_dim: whether the stack has an axis of prompts.
        recompute_ln: at the final norm, with statistics of each row's own and β: the logit lens.
        incl_bias: with the norm's β as a last row.

    Raises:
        ArgumentError: for a layer that there is not, or a stack that does not fit the cache.
        IncompleteCacheError: naming the hooks that the cache lacks.
    """
    cache, stack, batched = _sliced(cache, residual_stack, batch_slice, has_batch_dim)
    place = CachePlace.of(cache, layer, mlp_input, pos_slice)
    norm = place.norm()
    if norm is None:
        return stack
    with exact():
        if recompute_ln and place.is_final:
            return norm.forward(stack, norm.scale_of(stack))
        scale = _fitting(place.scale(norm), cache, stack, batched, 0)
        rows = norm.through(stack, scale)
        if not incl_bias or norm.beta is None:
            return rows
        if rows.ndim != scale.ndim + 2:
            raise ArgumentError("incl_bias adds a row: give a stack [row, …] of vectors.")
        return torch.cat([rows, norm.beta.to(rows).expand_as(rows[:1])])


def logit_attrs(
    cache: Any,
    residual_stack: Float[Tensor, "row *batch_and_pos d_model"],
    tokens: Answers,
    incorrect_tokens: Answers | None = None,
    pos_slice: Any = None,
    batch_slice: Any = None,
    has_batch_dim: bool = True,
) -> Float[Tensor, " row *batch_and_pos_out"]:
    """What vectors of the final stream write to the logit of tokens, or to a difference of two.

    The rows of `decompose_resid` add up to the model's own logit less what no row of the stream
    writes: β · u and b_U.

    Args:
        cache: an `ActivationCache`.
        residual_stack: vectors of the final stream at the positions of `pos_slice`.
        tokens: a string, an id, one per prompt `[batch]`, per position, or `[batch, pos]`.
        incorrect_tokens: the baseline, in the same forms.
        pos_slice: the positions that the stack was taken at; None for all.
        batch_slice: as in `apply_ln_to_stack`; `tokens` are those of these prompts.
        has_batch_dim: whether the stack has an axis of prompts.

    Raises:
        TokenError: for tokens that cannot be what was meant.
        ArgumentError: for a stack that does not fit the cache.
        IncompleteCacheError: naming the hooks that the cache lacks.

    Example:
        >>> from tl_dla import decompose_resid, load_model, logit_attrs
        >>> model = load_model("demo")
        >>> _, cache = model.run_with_cache("The Eiffel Tower is in the city of")
        >>> rows = decompose_resid(cache, pos_slice=-1)
        >>> logit_attrs(cache, rows, " Paris", " London", pos_slice=-1).shape[1:]
        torch.Size([1])
    """
    cache, stack, batched = _sliced(cache, residual_stack, batch_slice, has_batch_dim)
    place = CachePlace.of(cache, None, False, pos_slice)
    positions, batch = place.query.positions, len(place.query.prompts.length)
    targets = read_targets(cache.model, tokens, incorrect_tokens, None, batch, positions)
    readout = frozen_readout(replace(place.query, targets=targets), cache)
    direction = _fitting(readout.direction, cache, stack, batched, 1)
    scale = readout.scale
    scale = None if scale is None else _fitting(scale, cache, stack, batched, 0)
    return Readout(direction, readout.norms, scale).of(stack)


def _labelled(stack: ResidualStack, return_labels: bool) -> Labelled:
    return (stack.vectors, stack.labels) if return_labels else stack.vectors


def _sliced(
    cache: Any, stack: Float[Tensor, "..."], batch_slice: Any, has_batch_dim: bool
) -> tuple[Any, Float[Tensor, "..."], bool]:
    """The cache and the stack of some prompts, and whether the stack has an axis of them."""
    require_cache(cache)
    Slice = slice_class()
    stack = stack.detach().to(torch.promote_types(stack.dtype, torch.float32))
    batched = has_batch_dim and cache.has_batch_dim
    chosen = Slice(batch_slice) if not isinstance(batch_slice, Slice) else batch_slice
    if chosen.mode == "identity":
        return cache, stack, batched
    if not cache.has_batch_dim:
        raise ArgumentError("batch_slice is for a cache with an axis of prompts; this has none.")
    cache = cache.apply_slice_to_batch_dim(chosen)
    # A stack without an axis of prompts is of the prompt that is chosen.
    return cache, chosen.apply(stack, dim=1) if batched else stack, batched and cache.has_batch_dim


def _fitting(
    x: Float[Tensor, "..."], cache: Any, stack: Float[Tensor, "..."], batched: bool, inner: int
) -> Float[Tensor, "..."]:
    """What was read of the cache, `[*batch_and_pos]` and `inner` axes, as the stack has them."""
    if cache.has_batch_dim and not batched and len(x) == 1:
        x = x[0]
    lead = tuple(x.shape[: x.ndim - inner])
    own = tuple(stack.shape[stack.ndim - 1 - len(lead) : -1])
    if own != lead:
        raise ArgumentError(
            f"residual_stack has shape {list(stack.shape)}, but at these positions the cache is"
            f" {list(lead)} before d_model: take the stack with the same pos_slice, and say"
            " has_batch_dim=False of one without an axis of prompts."
        )
    return x

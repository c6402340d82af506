"""Direct logit attribution: the parts of a model that wrote a logit, exactly.

    logit = sum over rows,      row = c · w / s   for what a component wrote, c

with the final norm's scale s frozen at its value in this forward pass (see `readout.py`), and two
rows that no component writes: `ln_final.b` = β · u and `b_U`. In logits. A row says what a part
wrote *directly*: nothing about what later parts made of it, nor what removing it would do.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_dla.core.assembly import OWN_LOGIT, finish, require
from tl_dla.core.baseline import capped_mean, is_linear
from tl_dla.core.decomposition import Plan
from tl_dla.core.result import DirectLogitAttribution
from tl_dla.core.taps import Probe, Recording, cache_shape, in_parts, recall, run
from tl_dla.errors import ArgumentError, TokenError
from tl_dla.inputs.selection import Choice, Unit, read_choice, require_unit
from tl_dla.inputs.targets import Answers, Targets, read_targets
from tl_dla.inputs.tokens import Positions, Prompts, read_positions, read_prompts
from tl_dla.model.reader import ModelReader, compute_dtype, is_bridge

_CAUSE = (
    "The likeliest causes: a hook of yours changes activations between the places that are read,"
    " or the model does something to the stream that was not understood;"
    " check_model(model, tokens) shows where."
)


def direct_logit_attribution(
    model: Any,
    input: str | Sequence[str] | Int[Tensor, "*batch pos"] | None = None,
    answer_tokens: Answers | None = None,
    incorrect_tokens: Answers | None = None,
    *,
    unit: Unit = "component",
    pos: Any = -1,
    cache: Any = None,
    candidate_tokens: Sequence[str | int] | Int[Tensor, " candidate"] | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[str] | None = None,
    top_neurons: int | None = None,
    include_bias: bool = True,
    check: Literal["raise", "warn", "off"] = "raise",
    attention_mask: Int[Tensor, "batch pos"] | Bool[Tensor, "batch pos"] | None = None,
    prepend_bos: bool | None = None,
) -> DirectLogitAttribution:
    """Split a logit, or a logit difference, into what each part of the model wrote to it.

    The same name and parameters as `transformer_lens.tools.analysis.direct_logit_attribution`
    (TransformerLens 4), for any model: folded or not, LayerNorm or RMSNorm. The definition is that
    of Elhage et al. 2021 (https://transformer-circuits.pub/2021/framework) and Wang et al. 2022
    (https://arxiv.org/abs/2211.00593), with the norm's γ, β and b_U kept.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode.
        input: a prompt, a list of prompts of any lengths, or token ids `[pos]` or `[batch, pos]`.
            May be left out where a `cache` is given.
        answer_tokens: the token whose logit is attributed: a string, an id, one per prompt, or a
            tensor `[batch]` or `[batch, pos]`.
        incorrect_tokens: the baseline, subtracted: the same forms, or several per prompt (the mean
            of their logits), or `"mean"` for the mean logit of the vocabulary.
        unit: `"component"` (embeddings, attention and MLP outputs, as `decompose_resid`),
            `"layer"` (the stream after each sublayer, as `accumulated_resid(incl_mid=True)`),
            `"head"` (heads, as `stack_head_results`, then everything else), `"neuron"` (neurons, as
            `stack_neuron_results`, or experts, then everything else) or `"source"` (what each head
            moved from each token, `L9H9←5`, then everything else).
        pos: positions of each prompt, counted over its real tokens: an integer, a list, a slice, a
            `Slice`, or None for all of them.
        cache: an `ActivationCache` to read in place of running the model. Its final residual
            stream then stands in for the model's logits.
        candidate_tokens: in place of `answer_tokens`: attribute to each of these tokens, on a last
            axis of the result.
        layers: the layers that are split, for `unit="neuron"` and `unit="source"`; all by default.
        heads: the heads that are split by source token, such as `["L9H9"]`, for `unit="source"`;
            every other head keeps its row.
        top_neurons: how many neurons have a row of their own, for `unit="neuron"`: those of the
            largest mean absolute attribution. The others share a row per layer,
            `3_other_neurons`.
        include_bias: whether `ln_final.b` and `b_U` are rows. Without them the rows of a folded
            model are TransformerLens's own.
        check: what a failed certificate does.
        attention_mask: which tokens are real, for padded token ids.
        prepend_bos: as in `model.to_tokens`, for strings.

    Returns:
        A `DirectLogitAttribution`, with `attribution` `[row, *batch_and_pos]` in logits.

    Raises:
        TokenError: for a prompt, answer or position that cannot be what was meant.
        ArgumentError: for other arguments that do not fit; a `ValueError`.
        UnsupportedModelError: where the unit does not work on the model.
        IncompleteCacheError: where the cache lacks hooks, which are named.
        ReconstructionError: where the rows do not add up to the model's own logit.

    Example:
        >>> from tl_dla import direct_logit_attribution, load_model
        >>> model = load_model("demo")
        >>> result = direct_logit_attribution(
        ...     model, "The Eiffel Tower is in the city of", " Paris", " London"
        ... )
        >>> result.attribution.shape == (len(result.labels), 1)
        True
        >>> result.reconstruction.passed
        True
    """
    require_unit(unit)
    if check not in ("raise", "warn", "off"):
        raise ArgumentError(f'check must be "raise", "warn" or "off"; {check!r} was given.')
    reader = ModelReader(model)
    choice = read_choice(reader, unit, layers, heads, top_neurons)
    prompts = _prompts(model, input, cache, prepend_bos, attention_mask)
    positions = read_positions(pos, prompts)
    texts = [input] if isinstance(input, str) else input if isinstance(input, list) else None
    batch = prompts.tokens.shape[0]
    targets = read_targets(
        model, answer_tokens, incorrect_tokens, candidate_tokens, batch, positions, texts
    )
    if cache is None:
        require_eval(model)
    parts = [slice(None)] if cache is not None else in_parts(model, positions)

    def read(probes_of: Callable[[slice], Sequence[Probe]], of: Targets | None) -> Recording:
        if cache is not None:
            start = prompts.start if bool(prompts.start.any()) else None
            return recall(reader, cache, start, positions, probes_of(slice(None)))
        seen = []
        for rows in parts:
            some, at = prompts.part(rows), positions.part(rows)
            seen.append(run(model, some, at, probes_of(rows), of and of.part(rows)))
        return Recording.joined(seen)

    mean = None
    if targets.mean_of_vocab and not is_linear(model):
        mean = capped_mean(reader, lambda probes: read(lambda _: probes, None))

    def plan_of(rows: slice) -> Plan:
        of_mean = None if mean is None else (mean[0][rows], mean[1][rows])
        return make_plan(reader, targets.part(rows), unit, include_bias, choice, of_mean)

    plan = plan_of(slice(None))
    seen = read(lambda rows: (plan if len(parts) == 1 else plan_of(rows)).probes, targets)
    return assemble(
        plan, seen, prompts, positions, targets, check=check, from_cache=cache is not None
    )


def make_plan(
    reader: ModelReader,
    targets: Targets,
    unit: Unit,
    include_bias: bool,
    choice: Choice | None = None,
    mean: tuple[Float[Tensor, "batch pos 1 d"], Float[Tensor, "batch pos 1"]] | None = None,
) -> Plan:
    """The plan for these targets: their columns of W_U and their biases, pulled back.

    `mean` is the vocabulary's mean capped logit (see `baseline.py`), which is then the last target.
    """
    unembed, b_U = unembedding(reader.model, targets)
    if mean is not None:
        lead = mean[0].shape[:2]
        unembed = torch.cat([unembed[:, :, :-1].expand(*lead, -1, -1), mean[0]], 2)
        if b_U is not None:
            b_U = torch.cat([b_U[:, :, :-1].expand(*lead, -1), mean[1]], 2)
    plan = Plan(reader, unembed, b_U, unit, include_bias, choice)
    plan.transformed = mean is not None
    return plan


def unembedding(
    model: Any, targets: Targets
) -> tuple[Float[Tensor, "#batch #pos token d"], Float[Tensor, "#batch #pos token"] | None]:
    """The targets' columns of W_U and entries of b_U, in at least float32; None for no b_U."""
    W_U, b_U = model.W_U.detach(), getattr(model, "b_U", None)
    dtype = compute_dtype(W_U.dtype)
    ids = targets.ids.to(W_U.device)
    columns = W_U.mT[ids].to(dtype)
    if targets.mean_of_vocab:
        mean = W_U.mean(1, dtype=dtype).expand(*ids.shape[:2], 1, -1)
        columns = torch.cat([columns, mean], 2)
    if b_U is None or not bool(b_U.any()):
        return columns, None
    bias = b_U.detach()[ids].to(dtype)
    if targets.mean_of_vocab:
        bias = torch.cat([bias, b_U.mean(dtype=dtype).expand(*ids.shape[:2], 1)], 2)
    return columns, bias


def assemble(
    plan: Plan,
    seen: Recording,
    prompts: Prompts,
    positions: Positions,
    targets: Targets,
    *,
    check: Literal["raise", "warn", "off"],
    from_cache: bool,
) -> DirectLogitAttribution:
    """Rows, output transform, certificate and result, from what the pass has shown."""
    rows = plan.rows(seen, positions, targets.weights)
    ratio = plan.ratio(seen, rows.total)
    logits = rows.total * ratio if seen.logits is None else seen.logits.to(ratio)
    expected = logits
    if not plan.include_bias:
        for bias in (plan.final_beta, plan.b_U):
            expected = expected if bias is None else expected - bias.to(ratio) * ratio
    against = "the cache's final residual stream, read out" if from_cache else OWN_LOGIT
    result = finish(plan, seen, rows, ratio, expected, logits, against, prompts, positions, targets)
    require(result, _CAUSE, check)
    return result


def _prompts(model: Any, input: Any, cache: Any, prepend_bos: Any, mask: Any) -> Prompts:
    if cache is None:
        if input is None:
            raise ArgumentError("Give `input` to run the model on, or a `cache` of such a run.")
        return read_prompts(model, input, prepend_bos=prepend_bos, attention_mask=mask)
    batch, pos = cache_shape(cache)
    if input is None:  # a full cache of a bridge holds its tokens
        held = cache.cache_dict.get("embed.hook_in", torch.empty(0))
        input = held if held.numel() == batch * pos and not held.is_floating_point() else None
    if input is None:
        device = next(iter(model.parameters())).device
        tokens = torch.zeros(batch, pos, dtype=torch.long, device=device)
        length = torch.full((batch,), pos, device=device)
        return Prompts(tokens, torch.zeros_like(length), length)
    if not isinstance(input, Tensor):  # laid out as TransformerLens laid them out
        options = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
        input = model.to_tokens(input, **options)
    prompts = read_prompts(model, input, attention_mask=mask)
    if tuple(prompts.tokens.shape) != (batch, pos):
        raise TokenError(
            f"The input has {tuple(prompts.tokens.shape)} tokens [batch, pos], the cache"
            f" {(batch, pos)}: they are not of the same run."
        )
    return prompts


def require_eval(model: Any) -> None:
    """Raise unless every module is in evaluation mode.

    A `HookedTransformer` has no dropout, and `from_pretrained` leaves it in training mode; only
    attention that scales with the length of the prompt asks for the mode.
    """
    by_length = ("use_logn_attn", "use_dynamic_ntk_rope")
    if not is_bridge(model) and not any(getattr(model.cfg, name, False) for name in by_length):
        return
    if any(module.training for module in model.modules()):
        where = next(name for name, module in model.named_modules() if module.training)
        raise ArgumentError(
            f"The model is in training mode ({where or 'the model'}): dropout would change its"
            " logits. Call model.eval() first."
        )

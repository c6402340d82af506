"""Heads with their attention: where the heads that matter look, and what they move from there.

A head's row in a `unit="head"` result is the readout at its values, weighed by its attention:

    row = Σ over source tokens of  A[query, source] · (v[source] · w) / s,
    w the logit's direction pulled back through the norms and W_O to the head's values v.

Each term is a source token's *contribution*, in logits: the rows of `unit="source"`, which add up
to the head's. The attention says where a head looks, the contribution what that did to the logit: a
token that is read the most may move nothing.

The terms come from a cache of the result's prompts, or from one more run, which must give the rows
again. Kinds of pattern: `pattern_kinds.py`, at the attributed token and over the whole prompt. Why
a head looks there: `score_reasons.py`. Pictures: `tl_dla.figures.attention_view`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.analyses.pattern_kinds import added, column, kind, own_part, pool, scores
from tl_dla.analyses.pattern_result import HeadPattern, HeadPatterns
from tl_dla.analyses.score_reasons import reasons
from tl_dla.core.certificate import Reconstruction
from tl_dla.core.labelled import require_direct, require_heads
from tl_dla.core.result import Attribution
from tl_dla.core.run import CAUSE, again
from tl_dla.core.taps import Tap
from tl_dla.errors import ArgumentError
from tl_dla.inputs.selection import Selection, place_of_head
from tl_dla.inputs.text import pieces
from tl_dla.model.reader import ModelReader


def top_heads_with_patterns(
    result: Attribution, k: int = 3, *, heads: str | Sequence[str] | None = None, cache: Any = None
) -> HeadPatterns:
    """The k most positive and the k most negative heads, with their attention.

    Reads a cache where one is given, and the model does not run; else runs the prompts twice more:
    for the attention of the chosen heads' layers, and for who wrote their queries and keys.

    Args:
        result: of `direct_logit_attribution(…, unit="head")`.
        k: how many of each; fewer where fewer heads are positive, or negative. They are ranked by
            their mean over prompts and positions.
        heads: these heads, such as `["L9H9"]`, in place of the largest.
        cache: an `ActivationCache` of the result's prompts, laid out as they are in the result;
            one with the hooks of `required_hooks(model, "source")` holds what is needed.

    Returns:
        A list of `HeadPattern`: the positive heads, the largest first, then the negative ones, the
        most negative first.

    Raises:
        UnsupportedModelError: for a result without head rows; for a layer that does not show its
            attention pattern or its values, or does something to them that is not understood.
        ArgumentError: for a k that is larger than the number of heads, a head that the result has
            no row of, a result over candidates, and a result that the cache or another run of its
            prompts does not give again.
        IncompleteCacheError: naming the hooks that the cache lacks.
        ReconstructionError: where the source tokens do not add up to a head's row.

    Example:
        >>> from tl_dla import direct_logit_attribution, load_model, top_heads_with_patterns
        >>> prompt = "The Eiffel Tower is in the city of"
        >>> result = direct_logit_attribution(load_model("demo"), prompt, " Paris", unit="head")
        >>> head = top_heads_with_patterns(result, k=1)[0]
        >>> bool((head.contributions.sum(-1) - head.value).abs() < 1e-4)
        True
    """
    require_direct(result)
    require_heads(result)
    if result.targets.candidates is not None:
        raise ArgumentError(
            "A result over candidates ranks the heads differently for each: attribute with one"
            " answer_tokens."
        )
    n_heads = result.kinds.count("head")
    if not 1 <= k <= n_heads:
        raise ArgumentError(f"k must be 1 to the {n_heads} heads of the result; {k} was given.")
    named = [heads] if isinstance(heads, str) else heads
    ranked = dict(result.top(n_heads, kind="head"))
    if named is not None:
        absent = [label for label in named if label not in ranked]
        if absent or not named:
            raise ArgumentError(
                "heads must name head rows of the result, such as"
                f" {result.top(1, kind='head')[0][0]}; {absent or named!r} was given."
            )
        ranked = {label: value for label, value in ranked.items() if label in named}
        k = len(ranked)
    positive = [label for label, value in ranked.items() if value > 0 or named and value == 0]
    negative = [label for label, value in ranked.items() if value < 0]
    return HeadPatterns(_read(result, [*positive[:k], *negative[: -k - 1 : -1]], cache))


def _read(result: Attribution, labels: Sequence[str], cache: Any) -> list[HeadPattern]:
    """Read the cache, or run the prompts again, and take these heads apart."""
    prompts, positions = result.prompts, result.positions
    lengths = prompts.length.tolist()
    tokens, texts = _tokens(result)
    reader = ModelReader(result.model)
    places = {label: place_of_head(reader, label) for label in labels}
    layers = sorted({layer for layer, _ in places.values()})
    whole = {
        layer: Tap(reader.pattern_and_values(layer).pattern, torch.clone, whole=True)
        for layer in layers
    }
    selection = Selection(layers=tuple(layers), heads=tuple(places.values()))
    once = again(result, "source", selection, taps=list(whole.values()), cache=cache)
    moved = once.result(Attribution).certified("raise", CAUSE)
    tokens, queries = tokens.cpu(), positions.mask(tokens.shape[1]).cpu()
    last = positions.last[:, None].cpu()
    last_queries = torch.zeros_like(queries).scatter_(1, last, True)

    patterns = {
        (layer, head): own_part(once.kept[whole[layer]][:, head], prompts.length)
        for layer, head in places.values()
    }
    seen = {place: one.cpu() for place, one in patterns.items()}  # prompt by prompt, in Python
    paid = {place: one.take_along_dim(last[..., None], 1)[:, 0] for place, one in seen.items()}
    why = reasons(result.query, paid, cache)
    found = []
    for label, (layer, head) in places.items():
        part = moved.reconstruction.parts[f"the source tokens of {label}"]
        _require_row(result, label, part, cache)
        pattern = seen[layer, head]
        every, asked, at_last = (
            [
                pool(pattern[b, :n, :n], tokens[b, :n], texts[b], mask[b, :n])
                for b, n in enumerate(lengths)
            ]
            for mask in (torch.ones_like(queries), queries, last_queries)
        )
        sums, at_queries = added(every), added(asked)
        found.append(
            HeadPattern(
                label=label,
                layer=layer,
                head=head,
                value=result[label],
                pattern=patterns[layer, head],
                contributions=_moved(moved, label, part.expected, int(prompts.length.max())),
                tokens=texts,
                scores=scores(sums),
                kind=kind(sums),
                query_scores=scores(at_queries),
                query_kind=kind(at_queries),
                last_kinds=[(kind(one), scores(one)) for one in at_last],
                columns=[column(pattern[b, :n, :n]) for b, n in enumerate(lengths)],
                why=why[layer, head],
                positions=positions,
            )
        )
    return found


def _tokens(result: Attribution) -> tuple[Int[Tensor, "batch pos"], list[list[str]]]:
    """The prompts' tokens, as ids and as text; their positions, where a cache came without them."""
    tokens = result.prompts.packed
    if not result.has_tokens:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        lengths = result.prompts.length.tolist()
        return places.expand_as(tokens), [[str(i) for i in range(n)] for n in lengths]
    return tokens, [pieces(result.model, ids) for ids in result.prompts.rows]


def _require_row(result: Attribution, label: str, part: Reconstruction, cache: Any) -> None:
    """Raise unless the head's row is the result's own."""
    if not bool(((part.expected - result[label]).abs() > 2 * part.tolerance).any()):
        return
    if cache is not None:
        raise ArgumentError(
            f"The cache does not give the result's row {label} again: it is of other prompts, or"
            " the model was changed in between. Attribute from the same cache."
        )
    raise ArgumentError(
        f"Another run of the result's prompts does not give its row {label} again: it was made from"
        " a cache without its input, or the model was changed since. Attribute again with the"
        " input."
    )


def _moved(
    moved: Attribution, label: str, like: Float[Tensor, "*batch_and_pos"], n_keys: int
) -> Float[Tensor, "*batch_and_pos key"]:
    """What the head moved from each token; 0 from those that no attributed position sees."""
    rows = [moved[f"{label}←{key}"] for key in range(n_keys) if f"{label}←{key}" in moved.labels]
    return torch.stack([*rows, *[torch.zeros_like(like)] * (n_keys - len(rows))], -1)

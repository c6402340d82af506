"""`attribute_attention`: why a head looks at one token rather than another, as exact sums.

A score is bilinear in what was read at the query's position and at the key's:

    score[key] = scale × q · k[key] + bias[key],        q = ln1(x[query]) W_Q + b_Q, rotated, …

and the softmax makes the difference of two scores of one query the log of the ratio of their
attention, whatever masks and sinks do to all the others:

    log(pattern[key] / pattern[versus]) = score[key] − score[versus]

With the scales of all norms frozen (ln1's, those of queries and keys), and a soft cap as the ratio
capped / raw, q and k are linear in the stream. So the score is a sum over who wrote the query, the
keys fixed; a sum over who wrote the keys (at `key`, less the same at `versus`), the query fixed;
and a sum over the pairs of both. The rows are those of the stream at these positions (see
`tl_dla.core.vectors`: the identity as readout), read through W_Q and W_K, and the constants on the
way: `3_ln1.b` (the norm's β), `3_b_Q` or `3_b_K` (and the β of a norm over queries or keys), and
`3_score_bias` (ALiBi), which is of a position and no writer's. Units are nats: log-odds of
attention. What decided where a head looks is what attributions through frozen patterns leave out;
see Kamath et al. 2025 (https://transformer-circuits.pub/2025/attention-qk) for the same split.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_dla.analyses.paths import below
from tl_dla.analyses.score_form import ScoreForm, Side, halves_of
from tl_dla.analyses.score_ledgers import AttentionAttribution
from tl_dla.core.certificate import Check, Wanted, require_check
from tl_dla.core.numbers import Numbers, Subject
from tl_dla.core.result import Attribution
from tl_dla.core.rounding import EPS32, score_sizes
from tl_dla.core.rows import Rows
from tl_dla.core.taps import Kept, Tap, exact, forward, recall
from tl_dla.core.vectors import vectors_of
from tl_dla.errors import ArgumentError, TokenError, UnsupportedModelError
from tl_dla.inputs.caches import check_cache
from tl_dla.inputs.models import require_model
from tl_dla.inputs.positions import Positions, read_places
from tl_dla.inputs.query import Query, read_given
from tl_dla.inputs.selection import Selection, Unit, place_of_head
from tl_dla.inputs.targets import ONE_NUMBER
from tl_dla.inputs.text import pieces
from tl_dla.inputs.tokens import Input
from tl_dla.model.hooks import Site, upcast
from tl_dla.model.reader import ModelReader

Place = int | str | Sequence[int]

# What the rows add up to, by the number of keys.
_AGAINST = {1: "the model's own score", 2: "the log of the ratio of the model's own attention"}
_CAUSE = (
    "The likeliest causes: a hook of yours changes activations between the stream and the head's"
    " scores, or the attention makes its scores in a way that was not understood."
)


def attribute_attention(
    model: Any,
    input: Input | None,
    head: str,
    *,
    query: Place = -1,
    key: Place,
    versus: Place | None = None,
    unit: Unit = "head",
    cache: Any = None,
    check: Check = "raise",
    attention_mask: Int[Tensor, "batch pos"] | Bool[Tensor, "batch pos"] | None = None,
    prepend_bos: bool | None = None,
) -> AttentionAttribution:
    """Split a head's preference for one token over another into who wrote its query and its keys.

    Args:
        model: a `TransformerBridge`, or a `HookedTransformer` whose positions are in the stream
            (GPT-2's are; rotary ones and ALiBi are not read there), in evaluation mode.
        input: a prompt, a list of prompts, or token ids, as in `direct_logit_attribution`; None
            for those of a cache.
        head: such as `"L3H0"`.
        query: the token that looks: its position (of the prompt's real tokens), one per prompt, or
            its text where that is once in each prompt.
        key: the token that is looked at, in the same forms.
        versus: the token that is compared with; None for the score of `key` itself.
        unit: how the writers are split: `"head"` or `"component"`.
        cache: an `ActivationCache` to read in place of running the model. Rotary positions and
            ALiBi are at no hook, so models with those need the input.
        check: what a failed certificate does.
        attention_mask: which tokens are real, for padded token ids.
        prepend_bos: as in `model.to_tokens`, for strings.

    Returns:
        An `AttentionAttribution`: `by_query`, `by_key` and `pairs`, each of which adds up to
        `score`, in nats.

    Raises:
        TokenError: for a token that a prompt does not have, or that the query cannot see.
        ArgumentError: for other arguments that do not fit.
        UnsupportedModelError: where scores do not come about in a way that is understood.
        IncompleteCacheError: where the cache lacks what is read, which is named.
        ReconstructionError: where the rows do not add up to the model's own score.

    Example:
        >>> from tl_dla import attribute_attention, load_model
        >>> prompt = "When John and Mary went to the shops, John gave the bag to"
        >>> why = attribute_attention(
        ...     load_model("demo"), prompt, "L3H0", key=" Mary", versus=2
        ... )
        >>> why.sentence()  # doctest: +NORMALIZE_WHITESPACE
        "looks at ' Mary' rather than ' John' because of L2H0 in the query and 0_mlp_out in the
        key"
        >>> why.reconstruction.passed
        True
    """
    require_check(check)
    if unit not in ("component", "head"):
        raise ArgumentError(f'unit must be "component" or "head" here; {unit!r} was given.')
    model = require_model(model)
    reader = ModelReader(model)
    place = place_of_head(reader, head)
    options: dict[str, Any] = dict(prepend_bos=prepend_bos, attention_mask=attention_mask)
    prompts, cache = read_given(model, input, cache, options)
    given = {"query": query, "key": key} | ({} if versus is None else {"versus": versus})
    index = torch.stack([read_places(model, prompts, x, name) for name, x in given.items()], 1)
    _require_seen(index, list(given))
    positions = Positions(index, torch.ones_like(index).bool(), False, False)
    has_batch = cache is None or cache.has_batch_dim
    asked = Query(model, prompts, positions, ONE_NUMBER, has_batch=has_batch)
    with exact():
        score = Score(reader, place, asked, unit)
        if cache is None:
            result = score.result(forward(asked, score.taps, logits=False))
        else:
            unchecked = [f"not checked: {x}" for x in check_cache(model, cache, prompts)]
            result = score.result(recall(reader, cache, asked, score.taps), unchecked)
    result.reconstruction.raise_or_warn(check, _CAUSE)
    return result


def _require_seen(index: Int[Tensor, "batch place"], names: list[str]) -> None:
    """Raise for keys behind the query, and for a key that is compared with itself."""
    for row, (query, *keys) in enumerate(index.tolist()):
        for name, key in zip(names[1:], keys, strict=True):
            if key > query:
                raise TokenError(
                    f"{name} is position {key} of prompt {row}, which position {query} (the query)"
                    " cannot see: give an earlier one, or a later query."
                )
        if len(set(keys)) < len(keys):
            raise ArgumentError(
                f"key and versus are both position {keys[0]} of prompt {row}: give two tokens, or"
                " leave versus out for the score itself."
            )


class Score:
    """What is read to split a head's score, and the rows of what was read.

    The positions read are those of (query, key, versus) of each prompt.
    """

    def __init__(
        self, reader: ModelReader, place: tuple[int, int], query: Query, unit: Unit
    ) -> None:
        self.reader, self.query = reader, query
        self.layer, self.head = place
        layer = self.layer
        self.qk = qk = reader.queries_and_keys(layer)
        steps, self.norm = below(reader, reader.stream().steps, layer)
        self.parts = vectors_of(reader, unit, steps=steps)
        self.x = Tap(qk.site, upcast if qk.site.argument is None else self._taken)
        self.pattern = Tap(qk.pattern, upcast, keys=True, heads_first=True)
        self.taps = [*self.parts.taps, self.x, self.pattern]
        norm = self.norm
        self.scale = None if norm is None else self._tap(norm.site, norm.scale)
        self.rotation = self._tap(None if qk.rotary is None else qk.rotary.site, self._rotation)
        self.biases = [self._tap(site, upcast) for site, _ in qk.biases]
        self.scores = None
        if self._n_keys == 1:
            shown = reader.site(f"blocks.{layer}.attn.hook_attn_scores")
            self.scores = self._tap(shown, upcast, keys=True, heads_first=True)

    @property
    def _n_keys(self) -> int:
        return self.query.positions.index.shape[1] - 1

    def _tap(self, site: Site | None, read: Callable[..., Tensor], **how: bool) -> Tap | None:
        if site is None:
            return None
        self.taps.append(Tap(site, read, **how))
        return self.taps[-1]

    def _taken(self, x: Tensor) -> Tensor:
        return upcast(self.query.positions.take(x))

    def _rotation(self, given: Any) -> Tensor:
        rotary, take = self.qk.rotary, self.query.positions.take
        assert rotary is not None
        if given is None:  # this layer is given no positions: it does not rotate
            shape = self.query.positions.index.shape
            return torch.eye(rotary.d_head).expand(*shape, -1, -1)
        several = isinstance(given, tuple | list)
        found = rotary.matrix(tuple(map(take, given)) if several else take(given))
        assert found is not None
        return found

    def _bias(self, kept: Kept, like: Tensor) -> Float[Tensor, "batch key"]:
        """What is added to the scores of the keys, at the query."""
        index = self.query.positions.index.to(like.device)
        batch, width = self.query.prompts.packed.shape
        bias = self.qk.bias([kept[tap] for tap in self.biases if tap is not None], width)
        if not isinstance(bias, Tensor):
            return like.new_zeros(batch, self._n_keys)
        head = bias[:, self.head if bias.shape[1] > 1 else 0].to(like)
        rows = head.expand(batch, width, width)[
            torch.arange(batch, device=like.device), index[:, 0]
        ]
        return rows.gather(1, index[:, 1:])

    # ---- after the forward pass ----------------------------------------------------------------

    def result(self, kept: Kept, unchecked: Sequence[str] | None = None) -> AttentionAttribution:
        """Ledgers and pairs, each certified.

        Args:
            kept: what the taps kept.
            unchecked: what could not be checked of the cache that it is of; None where the model
                ran.
        """
        index, x = self.query.positions.index, kept[self.x]
        rotation = None if self.rotation is None else kept[self.rotation].to(x)
        bias = self._bias(kept, x)
        form = ScoreForm.of(self.qk, self.head, x, rotation, bias, index[:, 0].to(x.device))
        vectors = self.parts.rows(kept, self.query.positions)
        streams = vectors.map(lambda v: v[..., :1, :]), vectors.map(lambda v: v[..., 1:, :])
        scale = None if self.scale is None else kept[self.scale]
        scales = (None, None) if scale is None else (scale[:, :1], scale[:, 1:])
        query = Side(self.layer, "b_Q", form.to_q, form.b_Q, form.k, self.norm, scales[0])
        key = Side(self.layer, "b_K", form.to_k, form.b_K, form.q, self.norm, scales[1])
        rows = query.rows(streams[0], form), key.rows(streams[1], form)
        wanted = self._wanted(kept, form, tuple(unchecked or ()))
        by_query, by_key = (
            self._ledger(own, wanted, index[:, i : i + 1], unchecked is None)
            for i, own in enumerate(rows)
        )
        halves = halves_of(query, key, streams, form)
        return AttentionAttribution.of(by_query, by_key, halves, self.label, index, self._tokens)

    @property
    def label(self) -> str:
        """The head's."""
        return f"L{self.layer}H{self.head}"

    @cached_property
    def _tokens(self) -> list[tuple[str, ...]]:
        """The query, key and versus of each prompt, as text."""
        prompts, model = self.query.prompts, self.query.model
        index = self.query.positions.index.tolist()
        if not prompts.known:
            return [tuple(map(str, places)) for places in index]
        tokens = [pieces(model, ids) for ids in prompts.rows]
        return [tuple(tokens[b][i] for i in places) for b, places in enumerate(index)]

    def _subject(self) -> Subject:
        keys = [tokens[1:] for tokens in self._tokens]
        seen = " rather than ".join(map(repr, keys[0]))
        seen = seen if len(set(keys)) == 1 else "each prompt's own tokens"
        return Subject(f"{self.label}: {seen}", "model's own score", "score", "nats")

    def _ledger(
        self, rows: Rows, wanted: Wanted, index: Int[Tensor, "batch 1"], ran: bool
    ) -> Attribution:
        at = Positions(index, torch.ones_like(index).bool(), True, False)
        query, value = replace(self.query, positions=at), wanted.value
        ones = torch.ones_like(value)
        numbers = Numbers(rows.values, ones, ones[..., 0], value, value, ran)
        about = (self.parts.unit, Selection(), self.parts.readout.direction.shape[-1])
        ledger = Attribution.of(rows, wanted, numbers, query, about)
        return replace(ledger, subject=self._subject())

    def _wanted(self, kept: Kept, form: ScoreForm, unchecked: tuple[str, ...]) -> Wanted:
        """The model's own log-ratio or score, and what it rounds on the way."""
        index = self.query.positions.index[:, 1:].to(form.q.device)
        pattern = kept[self.pattern][:, 0, self.head].to(form.q)
        paid = pattern.gather(1, index)
        eps = self.reader.map_eps
        if self.qk.in_float32 or bool((pattern.float() == pattern).all()):
            eps = max(eps, EPS32)  # scores or a softmax in float32, whatever the model is in
        if self._n_keys == 2:
            self._require_paid(paid)
            own = paid.log()
            value = own[:, 0] - own[:, 1]
        else:
            value = self._own_scores(kept).to(form.q).gather(1, index)[:, 0]
            paid = torch.ones_like(paid)
        rounded = score_sizes(form.scores, paid, self.reader.dtype)
        shape = (-1, 1, 1)
        return Wanted(
            value.reshape(shape), rounded.reshape(shape), _AGAINST[self._n_keys], eps, unchecked
        )

    def _require_paid(self, paid: Float[Tensor, "batch key"]) -> None:
        """Raise where the pattern is 0, whose logarithm says nothing."""
        if bool((paid > 0).all()):
            return
        row, i = (paid <= 0).nonzero()[0].tolist()
        place = self.query.positions.index[row].tolist()
        raise TokenError(
            f"{self.label} pays no attention to position {place[i + 1]} from position"
            f" {place[0]} of prompt {row}: it is masked, outside of the head's window, or less than"
            " the smallest number. Give another token"
            + (", or leave versus out." if i == 1 else ".")
        )

    def _own_scores(self, kept: Kept) -> Float[Tensor, "batch key"]:
        pattern = kept[self.pattern][:, 0, self.head]
        shown = None if self.scores is None else kept[self.scores][:, 0, self.head]
        if shown is None or torch.equal(shown, pattern):  # some show the pattern twice
            raise UnsupportedModelError(
                f"{self.reader.architecture} shows no scores before their softmax in"
                f" blocks.{self.layer}.attn, so a score alone is held against nothing: give"
                " versus=, another token, and their difference works."
            )
        return shown

"""What kind of attention pattern a head has: scores between 0 and 1, and the rule that names one.

For a pattern A `[query, key]` over the tokens t of one prompt, each kind says where a query's
attention would go:

    previous token    the token before it                     key = query - 1
    induction         what followed an earlier copy of it     t[key - 1] = t[query], key <= query
    duplicate token   an earlier copy of it                   t[key] = t[query], key < query
    first token       the start of the prompt (often a BOS)   key = 0 < query
    punctuation       an earlier mark or line break           0 < key < query
    column            the one token that most queries read    0 < key < query, key the same for all

The score is the share of attention that goes there, averaged over the queries that have such a key
at all: 1 where all of it does, NaN where no query has one (a prompt without a repeated token says
nothing of induction). Times the share of such queries, it is TransformerLens's head detector
(`transformer_lens.head_detector`, error measure "mul"). The first three are the heads of Olsson et
al. 2022 (https://transformer-circuits.pub/2022/in-context-learning-and-induction-heads/index.html),
there measured on repeated random tokens: on an ordinary prompt they say what the head did here.

A column is of the token, other than the first, that at least four later tokens see and that gets
most of their attention (a vertical stripe in the picture); NaN where there is none.

    uniform           everywhere alike                        1 / keys in sight

Its score is the overlap with even attention, sum over keys of min(A, 1 / keys in sight), averaged
over the queries that see more than one key: 1 where they are equal.

Attention is an observation: heads with the same pattern may move different things
(`HeadPattern.contributions` says what), and a pattern is no proof of what a head is for.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_dla.model.hooks import upcast

PatternKind = Literal[
    "previous token",
    "induction",
    "duplicate token",
    "first token",
    "punctuation",
    "column",
    "uniform",
]
KindOrOther = PatternKind | Literal["other"]

# A kind is named where its score is at least halfway from what even attention would score by chance
# on the same prompt to 1. On a long prompt chance is small, and this says that half of the head's
# attention goes there, so that two kinds with different keys cannot both be meant; on a short one,
# where half of it may go there anyway, it asks for more.
HALFWAY = 0.5
# At most a quarter of the attention is laid out otherwise: no other kind then reaches halfway.
UNIFORM = 0.75
_MANY = 4  # queries that make a column


@dataclass(frozen=True)
class Pooled:
    """Sums over the queries that have a key of a kind.

    Attributes:
        attention: what went to such keys.
        chance: what even attention would have given them.
        queries: how many there are.
    """

    attention: float = 0.0
    chance: float = 0.0
    queries: int = 0

    def __add__(self, other: "Pooled") -> "Pooled":
        return Pooled(
            self.attention + other.attention,
            self.chance + other.chance,
            self.queries + other.queries,
        )

    @property
    def score(self) -> float:
        """The share of attention, NaN where no query had such a key."""
        return self.attention / self.queries if self.queries else float("nan")

    @property
    def excess(self) -> float:
        """How far from chance (0) to all of the attention (1)."""
        if not self.queries or self.chance >= self.queries:
            return float("nan")
        return (self.attention - self.chance) / (self.queries - self.chance)


def pool(
    pattern: Float[Tensor, "query key"],
    ids: Int[Tensor, " key"],
    tokens: Sequence[str],
    queries: Bool[Tensor, " query"] | None = None,
) -> dict[PatternKind, Pooled]:
    """What one prompt says of each kind. Add up over prompts, then `scores` and `kind`.

    Args:
        pattern: attention over the prompt's real tokens, each row summing to at most 1.
        ids: the tokens' ids.
        tokens: the same as text, to tell punctuation.
        queries: which of them to judge; all by default. Which token is a column is judged by all.
    """
    pattern = pattern.detach().cpu().double()
    sight = _in_sight(pattern)
    even = sight / sight.sum(-1, keepdim=True)
    every = torch.ones(len(ids), dtype=torch.bool, device="cpu")
    judged = every if queries is None else queries.cpu()
    found: dict[PatternKind, Pooled] = {}
    expected = expected_keys(ids.cpu(), tokens)
    expected["column"] = torch.zeros_like(sight)
    if (key := column(pattern)) is not None:
        expected["column"][key + 1 :, key] = True
    for name, keys in expected.items():
        keys = keys & sight & judged[:, None]
        found[name] = Pooled(
            float(pattern[keys].sum()), float(even[keys].sum()), int(keys.any(-1).sum())
        )
    several = (sight.sum(-1) > 1) & judged
    overlap = torch.minimum(pattern, even).sum(-1)[several]
    found["uniform"] = Pooled(float(overlap.sum()), 0.0, int(several.sum()))
    return found


def column(pattern: Float[Tensor, "query key"]) -> int | None:
    """The token, other than the first, that gets most of the attention of the tokens after it.

    Halfway from what even attention would give it, and four tokens at least; None where there is
    no such token.
    """
    n = len(pattern)
    if n < _MANY + 2:
        return None
    pattern = pattern.detach().cpu().double()
    sight = _in_sight(pattern).double()
    after = torch.arange(n - 1, -1, -1, device="cpu")  # queries after each key
    means, chance = (
        x.tril(-1).sum(0)[1 : n - _MANY] / after[1 : n - _MANY]
        for x in (pattern, sight / sight.sum(-1, keepdim=True))
    )
    excess = (means - chance) / (1 - chance)
    key = int(means.argmax())
    return 1 + key if float(excess[key]) >= HALFWAY else None


def expected_keys(
    ids: Int[Tensor, " key"], tokens: Sequence[str]
) -> dict[PatternKind, Bool[Tensor, "query key"]]:
    """Where each kind's attention would go; see the module."""
    n = len(ids)
    position = torch.arange(n, device=ids.device)
    before = position[None, :] < position[:, None]  # [query, key]: key < query
    duplicate = (ids[None, :] == ids[:, None]) & before
    after_duplicate = torch.zeros_like(duplicate)
    after_duplicate[:, 1:] = duplicate[:, :-1]
    marks = torch.tensor([is_punctuation(token) for token in tokens], device=ids.device)
    marks &= position > 0
    return {
        "previous token": position[None, :] == position[:, None] - 1,
        "induction": after_duplicate,
        "duplicate token": duplicate,
        "first token": before & (position == 0),
        "punctuation": before & marks,
    }


def scores(pooled: Mapping[PatternKind, Pooled]) -> dict[PatternKind, float]:
    """The score of every kind."""
    return {name: sums.score for name, sums in pooled.items()}


def kind(pooled: Mapping[PatternKind, Pooled]) -> KindOrOther:
    """The kind whose score is furthest past its threshold, `"other"` where none is."""
    past: dict[KindOrOther, float] = {}
    for name in get_args(PatternKind):
        threshold = UNIFORM if name == "uniform" else HALFWAY
        margin = (pooled[name].excess - threshold) / (1 - threshold)
        if margin >= 0:  # never so for NaN
            past[name] = margin
    return max(past, key=past.__getitem__, default="other")


def is_punctuation(token: str) -> bool:
    """Whether a token is only punctuation marks, or a line break."""
    text = token.strip()
    if not text:
        return "\n" in token
    return all(unicodedata.category(character).startswith("P") for character in text)


def _in_sight(pattern: Float[Tensor, "query key"]) -> Bool[Tensor, "query key"]:
    """The keys a query could have attended to: all, for a model that looks ahead."""
    everything = torch.ones_like(pattern, dtype=torch.bool)
    causal = everything.tril()
    return everything if bool((pattern[~causal] > 0).any()) else causal


def own_part(
    pattern: Float[Tensor, "batch query key"], length: Tensor
) -> Float[Tensor, "batch query key"]:
    """Zero outside of each prompt's own tokens."""
    own = (
        torch.arange(pattern.shape[-1], device=pattern.device) < length.to(pattern.device)[:, None]
    )
    return upcast(pattern) * own[:, :, None] * own[:, None, :]


def added(prompts: list[dict[PatternKind, Pooled]]) -> dict[PatternKind, Pooled]:
    """Over all prompts."""
    return {name: sum((one[name] for one in prompts), Pooled()) for name in prompts[0]}

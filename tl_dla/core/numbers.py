"""What a result keeps beside its rows: their numbers token by token, and the path they split."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxtyping import Float, Int
from torch import Tensor


def compact(x: Tensor) -> Tensor:
    """A tensor that keeps nothing larger alive, as a view of an activation does."""
    return x if x.untyped_storage().nbytes() <= x.numel() * x.element_size() else x.clone()


@dataclass(frozen=True, eq=False)
class Numbers:
    """What a result was made of, token by token, before the tokens were added up.

    Attributes:
        rows: before the output transform; none where tokens were added up first.
        ratio: the output transform, frozen: transformed / raw.
        scale: of the final norm; 1 for a model without one.
        logits: what the model returned; read out of the cache's final stream where none ran.
        raw: the same before the output transform.
        ran: whether the model ran, so that `logits` are its own.
        readouts: a checksum of each token's direction at the end of the stream; None where rows are
            means, or what is attributed is no logit.
    """

    rows: Float[Tensor, "row batch pos token"]
    ratio: Float[Tensor, "batch pos token"]
    scale: Float[Tensor, "batch pos"]
    logits: Float[Tensor, "batch pos token"]
    raw: Float[Tensor, "batch pos token"]
    ran: bool
    readouts: Int[Tensor, "batch pos token"] | None = None

    def of_rows(self, rows: list[int]) -> "Numbers":
        """The numbers of some of the rows."""
        return replace(self, rows=self.rows[rows]) if len(self.rows) else self

    def map(
        self, tokens: Callable[[Tensor], Tensor], scale: Callable[[Tensor], Tensor]
    ) -> "Numbers":
        """Every tensor through a function: of what has a token axis, and of the scale."""
        rows, ratio, logits, raw = map(tokens, (self.rows, self.ratio, self.logits, self.raw))
        readouts = None if self.readouts is None else tokens(self.readouts)
        return Numbers(rows, ratio, scale(self.scale), logits, raw, self.ran, readouts)


@dataclass(frozen=True, eq=False)
class Hop:
    """A head, and the source token of each prompt that it reads."""

    layer: int
    head: int
    source: Int[Tensor, " batch"]

    @property
    def label(self) -> str:
        """`L9H9←5`, or `L9H9←source` where it differs between prompts."""
        places = self.source.unique().tolist()
        return f"L{self.layer}H{self.head}←{places[0] if len(places) == 1 else 'source'}"


@dataclass(frozen=True)
class Subject:
    """What rows add up to where that is no logit of target tokens, in words.

    Attributes:
        target: `L3H0: ' Mary' rather than ' John'`, where a logit has `' Mary' − ' John'`.
        total: `model's own score`.
        what: `score`, where others say `logit`.
        units: `nats`, where others say `logits`.
    """

    target: str
    total: str
    what: str
    units: str

"""`AttentionAttribution`: a head's preference in two ledgers, of its query and of its keys."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.core.certificate import Reconstruction
from tl_dla.core.result import Attribution

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class ScoreWords:
    """The head, and each prompt's query, key and versus, as positions and as text."""

    head: str
    index: Int[Tensor, "batch place"]
    tokens: list[list[str]]

    def __str__(self) -> str:
        """`L3H0: ' Mary' rather than ' John'`."""
        if len({tuple(row[1:]) for row in self.tokens}) > 1:
            return f"{self.head}: each prompt's own tokens"
        return f"{self.head}: {' rather than '.join(map(repr, self.tokens[0][1:]))}"


@dataclass(frozen=True, eq=False, repr=False)
class ScoreLedger(Attribution):
    """Who wrote one side of a score, the other side fixed: rows that add up to the score, in nats.

    An `Attribution` whose positions are those of the side: the query's, or the key's.
    """

    about: ScoreWords | None = field(default=None)

    @property
    def target(self) -> str:
        """What is attributed, in words."""
        return str(self.about)

    @property
    def total(self) -> str:
        """What the rows add up to, in words."""
        return "model's own score"


@dataclass(frozen=True, eq=False, repr=False)
class AttentionAttribution:
    """Why a head looks at one token rather than another, in nats (log-odds of attention).

    Attributes:
        by_query: who wrote the query, the keys fixed: `result.by_query["L2H0"]`.
        by_key: who wrote the keys (at `key`, less the same at `versus`), the query fixed.
        pairs: what each part of the query makes of each part of the keys; rows and columns are
            those of `by_query` and `by_key`, and add up to them.
        reconstruction: the certificate that all three add up to the model's own score.
        words: the head and its tokens.
    """

    by_query: ScoreLedger
    by_key: ScoreLedger
    pairs: Float[Tensor, "query_row key_row *batch"]
    reconstruction: Reconstruction
    words: ScoreWords

    @property
    def score(self) -> Float[Tensor, "*batch"]:
        """The model's own: log(pattern[key] / pattern[versus]), or the score of `key` alone."""
        return self.reconstruction.expected

    @staticmethod
    def of(
        by_query: ScoreLedger,
        by_key: ScoreLedger,
        pairs: Float[Tensor, "query_row key_row batch"],
        words: ScoreWords,
    ) -> "AttentionAttribution":
        """Two certified ledgers and their pairs, which are certified here."""
        by_query, by_key = (replace(side, about=words) for side in (by_query, by_key))
        table = by_query.query.shaped(pairs[..., None, None])
        query, key = by_query.reconstruction, by_key.reconstruction
        # the streams of both sides are rounded, and every pair when they are added up
        added = torch.finfo(table.dtype).eps * table.abs().sum((0, 1))
        whole = Reconstruction(
            query.expected,
            table.sum((0, 1)),
            torch.hypot(query.tolerance, key.tolerance) + added,
            query.against,
            {"the query rows": query, "the key rows": key},
            query.unexplained | key.unexplained,
            query.unchecked,
            "pairs, query rows and key rows add up to",
        )
        return AttentionAttribution(by_query, by_key, table, whole, words)

    def top(
        self, k: int = 5, *, largest: bool = True, prompt: int | None = None
    ) -> list[tuple[tuple[str, str], float]]:
        """The k highest pairs as `((query row, key row), value)`, best first.

        Args:
            k: how many; fewer where there are not so many pairs.
            largest: whether the highest come first, or the lowest.
            prompt: which prompt of a batch; the mean over all by default.
        """
        table = self._mean(prompt)
        order = table.flatten().argsort(descending=largest, stable=True)[:k].tolist()
        names, n = (self.by_query.labels, self.by_key.labels), table.shape[1]
        return [((names[0][i // n], names[1][i % n]), float(table[i // n, i % n])) for i in order]

    def _mean(self, prompt: int | None) -> Float[Tensor, "query_row key_row"]:
        [chosen, _, _] = self.by_query.places(prompt, None, None)
        table = self.pairs.reshape(*self.pairs.shape[:2], -1)
        return (table.mean(-1) if chosen is None else table[..., chosen]).cpu()

    def sentence(self) -> str:
        """Who wrote the query and the keys, in a line: the largest row of either side."""
        [query, key] = [side.top(1)[0][0] for side in (self.by_query, self.by_key)]
        return (
            f"looks at {' rather than '.join(map(repr, self.words.tokens[0][1:]))}"
            f" because of {query} in the query and {key} in the key"
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """A tidy table: a line per row of either side × prompt.

        Columns: `side` (`"query"` or `"key"`), `label`, `kind`, `layer`, `prompt`, `position` and
        `token` (the side's own), `attribution` (nats), `score` and `share` (attribution / score).
        """
        import pandas as pd

        sides = {"query": self.by_query, "key": self.by_key}
        tables = [side.to_dataframe().assign(side=name) for name, side in sides.items()]
        table = pd.concat(tables, ignore_index=True).rename(columns={"logit": "score"})
        return table[["side", *table.columns.drop("side")]]

    def pairs_to_dataframe(self, prompt: int | None = None) -> "pd.DataFrame":
        """The pairs of one prompt, or their mean: a line per query row, a column per key row."""
        import pandas as pd

        table = self._mean(prompt).numpy()
        return pd.DataFrame(table, index=self.by_query.labels, columns=self.by_key.labels)

    def __repr__(self) -> str:
        """Both ledgers' largest rows, the largest pairs and the certificate."""
        from tl_dla.core.view import view_of
        from tl_dla.figures.table import table, text

        lines = [f'AttentionAttribution: {self.words}, unit="{self.by_query.unit}"']
        for name, side in (("query", self.by_query), ("key", self.by_key)):
            lines += [f" who wrote the {name}", text(table(view_of(side), 5))]
        pairs = ", ".join(f"{q} × {k} {value:+.4f}" for (q, k), value in self.top(3))
        return "\n".join([*lines, f" largest pairs: {pairs}", f"  {self._mark}"])

    @property
    def _mark(self) -> str:
        return f"{'✓' if self.reconstruction.passed else '✗'} {self.reconstruction}"

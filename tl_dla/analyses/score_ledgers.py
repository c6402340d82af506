"""`AttentionAttribution`: a head's preference in two ledgers, of its query and of its keys."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.core.certificate import Reconstruction
from tl_dla.core.result import Attribution
from tl_dla.core.view import view_of

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_SHOWN = 6


@dataclass(frozen=True, eq=False, repr=False)
class AttentionAttribution:
    """Why a head looks at one token rather than another, in nats (log-odds of attention).

    Attributes:
        by_query: who wrote the query, the keys fixed: `result.by_query["L2H0"]`.
        by_key: who wrote the keys (at `key`, less the same at `versus`), the query fixed.
        halves: what each row of either side is in the head, whose products are the pairs.
        reconstruction: the certificate that all three add up to the model's own score.
        head: such as `L3H0`.
        places: each prompt's query, key and, where there is one, versus.
        tokens: the same as text; positions where the tokens are not known.
    """

    by_query: Attribution
    by_key: Attribution
    halves: tuple[Float[Tensor, "query_row batch d"], Float[Tensor, "key_row batch d"]]
    reconstruction: Reconstruction
    head: str
    places: Int[Tensor, "batch place"]
    tokens: list[tuple[str, ...]]

    @property
    def score(self) -> Float[Tensor, "*batch"]:
        """The model's own: log(pattern[key] / pattern[versus]), or the score of `key` alone."""
        return self.reconstruction.expected

    @staticmethod
    def of(
        by_query: Attribution,
        by_key: Attribution,
        halves: tuple[Float[Tensor, "query_row batch d"], Float[Tensor, "key_row batch d"]],
        head: str,
        places: Int[Tensor, "batch place"],
        tokens: list[tuple[str, ...]],
    ) -> "AttentionAttribution":
        """Two certified ledgers and their pairs, which are certified here."""
        total, most = (
            by_query.query.shaped((q * k).sum(-1)[:, None, None])
            for q, k in (
                [half.sum(0) for half in halves],
                [half.abs().sum(0) for half in halves],
            )
        )
        query, key = by_query.reconstruction, by_key.reconstruction
        # the streams of both sides are rounded, and every pair when they are added up
        added = torch.finfo(total.dtype).eps * most
        whole = Reconstruction(
            query.expected,
            total,
            torch.hypot(query.tolerance, key.tolerance) + added,
            query.against,
            {"the query rows": query, "the key rows": key},
            query.unexplained | key.unexplained,
            query.unchecked,
            "pairs, query rows and key rows add up to",
        )
        return AttentionAttribution(by_query, by_key, halves, whole, head, places, tokens)

    @property
    def pairs(self) -> Float[Tensor, "query_row key_row *batch"]:
        """What each part of the query makes of each part of the keys, multiplied when asked for.

        Rows and columns are those of `by_query` and `by_key`, and add up to them.
        """
        table = torch.einsum("ibd,jbd->ijb", *self.halves)
        return self.by_query.query.shaped(table[..., None, None])

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
        """The pairs of one prompt, or their mean."""
        [chosen, _, _] = self.by_query.places(prompt, None, None)
        query, key = self.halves
        if chosen is None:
            return (torch.einsum("ibd,jbd->ij", query, key) / query.shape[1]).cpu()
        return (query[:, chosen] @ key[:, chosen].mT).cpu()

    def sentence(self, prompt: int = 0) -> str:
        """Who wrote the query and the keys of a prompt, in a line: the largest row of either side.

        Where the head prefers `versus`, that is what is explained.
        """
        [chosen, _, _] = self.by_query.places(prompt, None, None)
        looks = self.score.reshape(-1)[chosen or 0] >= 0
        query, key = (
            side.top(1, largest=bool(looks), prompt=prompt)[0][0]
            for side in (self.by_query, self.by_key)
        )
        tokens = [repr(token) for token in self.tokens[chosen or 0][1:]]
        seen = " rather than ".join(tokens if looks else tokens[::-1])
        return f"looks at {seen} because of {query} in the query and {key} in the key"

    # ---- tables, text, pictures ----------------------------------------------------------------

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

    def plot(
        self,
        *,
        prompt: int | None = None,
        k: int = 10,
        title: str | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> "go.Figure":
        """Both ledgers and, below, the pairs as a heatmap: a plotly figure, returned, never shown.

        Args:
            prompt: only this prompt of a batch; means by default.
            k: how many rows of either side have a name; the smaller ones are added up.
            title: in place of the figure's own; `""` for no heading.
            width: in pixels; as wide as the page by default.
            height: in pixels; as high as what is drawn by default.

        Raises:
            ArgumentError: for a prompt that the result does not have, or k < 1.
        """
        from tl_dla.figures.charts import Look, heading_of
        from tl_dla.figures.scores import scores

        query, key = view_of(self.by_query, prompt), view_of(self.by_key, prompt)
        words = replace(query.words, certificate=self.reconstruction.marked)
        heading = heading_of("Who wrote the score of", replace(query, words=words))
        pairs = self._mean(prompt).cpu().double().numpy()
        return scores(query, key, pairs, heading, k, Look(title, width, height))

    def _repr_html_(self) -> str:
        """What a notebook shows: both ledgers as bars beside each other, pairs, certificate."""
        from html import escape

        from tl_dla.figures.table import html, table

        sides = "".join(
            f"<div><div>who wrote the {name}</div>{html(table(view_of(side), _SHOWN))}</div>"
            for name, side in (("query", self.by_query), ("key", self.by_key))
        )
        return (
            '<div style="font-family:system-ui,sans-serif;font-size:13px;line-height:1.5">'
            f"<div><b>{escape(self.by_query.target)}</b> by {escape(self.by_query.unit)}"
            '<span style="opacity:.7"> · nats</span></div>'
            f'<div style="display:flex;flex-wrap:wrap;gap:0 24px">{sides}</div>'
            f'<div style="opacity:.7">{escape(self._pairs_in_words())}</div>'
            f"<div>{escape(self.reconstruction.marked, quote=False)}</div></div>"
        )

    def __repr__(self) -> str:
        """Both ledgers' largest rows, the largest pairs and the certificate."""
        from tl_dla.figures.table import table, text

        lines = [f'AttentionAttribution: {self.by_query.target}, unit="{self.by_query.unit}"']
        for name, side in (("query", self.by_query), ("key", self.by_key)):
            lines += [f" who wrote the {name}", text(table(view_of(side), _SHOWN))]
        return "\n".join([*lines, f" {self._pairs_in_words()}", f"  {self.reconstruction.marked}"])

    def _pairs_in_words(self) -> str:
        pairs = ", ".join(f"{q} × {k} {value:+.4f}" for (q, k), value in self.top(3))
        return f"largest pairs: {pairs}"

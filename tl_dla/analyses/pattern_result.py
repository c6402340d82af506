"""What `top_heads_with_patterns` gives: heads with their attention, as tables and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.analyses.pattern_kinds import KindOrOther, PatternKind
from tl_dla.core.choice import within
from tl_dla.errors import ArgumentError
from tl_dla.figures.attention_view import AttentionStyle, AttentionView
from tl_dla.figures.view import require_some
from tl_dla.inputs.positions import Positions

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class HeadPattern:
    """One head of a result with its attention on every prompt.

    Attributes:
        label: `L9H6`.
        layer: 9.
        head: 6.
        value: the head's row in the result, `[*batch_and_pos]`, in logits.
        pattern: its attention, 0 outside of a prompt's own tokens.
        contributions: what it moved from each source token to the attributed position, in logits;
            they add up to `value`. NaN where a prompt has no such position.
        tokens: each prompt's tokens as text, `[batch][key]`.
        scores: how much the pattern is of each kind, 0 to 1, over all tokens of all prompts
            (`pattern_kinds.py`).
        kind: the kind that it is, or `"other"`.
        query_scores: the same of the attributed tokens alone: what the row is made by.
        query_kind: the kind that it is there.
        last_kinds: of each prompt, the kind at its last attributed token, and the scores there.
        columns: of each prompt, the position that most tokens after it read; None where none is
            (see `column`).
        why: of each prompt, why the head looks where it does, in a line (`score_reasons.py`).
    """

    label: str
    layer: int
    head: int
    value: Float[Tensor, "*batch_and_pos"]
    pattern: Float[Tensor, "batch query key"]
    contributions: Float[Tensor, "*batch_and_pos key"]
    tokens: list[list[str]]
    scores: dict[PatternKind, float]
    kind: KindOrOther
    query_scores: dict[PatternKind, float]
    query_kind: KindOrOther
    last_kinds: list[tuple[KindOrOther, dict[PatternKind, float]]]
    columns: list[int | None]
    why: list[str]
    positions: Positions = field(repr=False)

    @property
    def row(self) -> Float[Tensor, "*batch_and_pos key"]:
        """The attention paid from the attributed positions, NaN where a prompt has none."""
        rows = self.positions.take(self.pattern)
        valid = self.positions.valid.to(rows.device)[..., None]
        return self.positions.squeeze(torch.where(valid, rows, torch.nan))

    def reads(
        self, k: int = 5, *, prompt: int = 0, position: int = -1
    ) -> list[tuple[str, int, float, float]]:
        """The tokens read most, as `(token, its position, attention, contribution)`.

        Args:
            k: how many; fewer in a shorter prompt.
            prompt: of which prompt.
            position: from which of the attributed positions, an index into them.

        Raises:
            ArgumentError: for a k below 1, and a prompt or position that there is not.
        """
        require_some(k)
        within("prompt", prompt, len(self.tokens))
        places = self.positions.valid[prompt].nonzero()[:, 0]
        within("position", position, len(places))
        whole = self.positions.unsqueeze
        rows, moved = whole(self.row)[prompt], whole(self.contributions)[prompt]
        at = places[position]
        n = len(self.tokens[prompt])
        order = rows[at, :n].argsort(descending=True, stable=True)[:k].tolist()
        return [(self.tokens[prompt][i], i, float(rows[at, i]), float(moved[at, i])) for i in order]

    def to_dataframe(self) -> "pd.DataFrame":
        """A tidy table: a line per prompt × attributed position × source token.

        Columns: `label`, `kind`, `query_kind`, `prompt`, `position` (attributed), `source`
        (position), `token` (the source's), `attention`, `contribution`, and `value`, the head's
        row.
        """
        import pandas as pd

        row, moved, value = map(
            self.positions.unsqueeze, (self.row, self.contributions, self.value)
        )
        frames = []
        for b, p in self.positions.valid.nonzero().tolist():
            n = len(self.tokens[b])
            frames.append(
                pd.DataFrame(
                    {
                        "label": self.label,
                        "kind": self.kind,
                        "query_kind": self.query_kind,
                        "prompt": b,
                        "position": int(self.positions.index[b, p]),
                        "source": range(n),
                        "token": self.tokens[b],
                        "attention": row[b, p, :n].detach().cpu().numpy(),
                        "contribution": moved[b, p, :n].detach().cpu().numpy(),
                        "value": float(value[b, p]),
                    }
                )
            )
        return pd.concat(frames, ignore_index=True)

    def show(self, view: AttentionStyle = "patterns", *, prompt: int = 0) -> AttentionView:
        """The pattern on one prompt, drawn by circuitsvis; displays itself in a notebook.

        Args:
            view: `"patterns"` for tokens to hover over, `"heads"` for a square with axes.
            prompt: which prompt.
        """
        return HeadPatterns([self]).show(view, prompt=prompt)

    def _repr_html_(self) -> str:
        return HeadPatterns([self])._repr_html_()

    def __repr__(self) -> str:
        """The value, the kind and what is read most."""
        value = float(self.value.nanmean())
        read = ", ".join(
            f"{token!r} ({attention:.0%}, {moved:+.3f})"
            for token, _, attention, moved in self.reads(3)
        )
        here, over = self.described()
        line = f"{self.label} {value:+.4f}, {here} (over all tokens {over}); reads {read}"
        return "; ".join([line, *filter(None, self.why[:1])])

    def described(self, prompt: int | None = None) -> tuple[str, str]:
        """The kind at the attributed tokens, and over all tokens, each with its score.

        Args:
            prompt: the first at the last attributed token of this prompt alone.
        """
        within("prompt", prompt, len(self.tokens))
        every = range(len(self.tokens))

        def words(
            name: KindOrOther, score: dict[PatternKind, float], prompts: Sequence[int]
        ) -> str:
            named = [(self.tokens[b], self.columns[b]) for b in prompts]
            names = {None if key is None else tokens[key] for tokens, key in named}
            shared = names.pop() if name == "column" and len(names) == 1 else None
            which = "" if shared is None else f" {shared!r}"
            return name if name == "other" else f"{name}{which} {score[name]:.2f}"

        over = words(self.kind, self.scores, every)
        if prompt is not None:
            return words(*self.last_kinds[prompt], [prompt]), over
        return words(self.query_kind, self.query_scores, every), over


class HeadPatterns(list[HeadPattern]):
    """A list of heads that shows itself: a table, and one picture of all the patterns."""

    def to_dataframe(self) -> "pd.DataFrame":
        """The tables of all heads; see `HeadPattern.to_dataframe`."""
        import pandas as pd

        return pd.concat([head.to_dataframe() for head in self], ignore_index=True)

    @property
    def signs(self) -> list[tuple[str, "HeadPatterns"]]:
        """The heads that raise the logit and those that lower it, each under its heading."""
        positive = [head for head in self if float(head.value.nanmean()) >= 0]
        negative = [head for head in self if head not in positive]
        return [
            (f"Top {len(heads)} {sign}", HeadPatterns(heads))
            for sign, heads in (("positive", positive), ("negative", negative))
            if heads
        ]

    def show(self, view: AttentionStyle = "patterns", *, prompt: int = 0) -> AttentionView:
        """All patterns on one prompt, under "Top k positive" and "Top k negative".

        See `HeadPattern.show`; `save(path)` and `open()` of what comes back put it into a page.
        """
        if not self:
            raise ArgumentError("There is no head to show.")
        within("prompt", prompt, len(self[0].tokens))
        tokens = self[0].tokens[prompt]
        n = len(tokens)
        heads = [head for _, some in self.signs for head in some]
        attention = torch.stack([head.pattern[prompt, :n, :n].cpu() for head in heads])
        groups = [(heading, len(some)) for heading, some in self.signs] if len(self) > 1 else []
        labels, height = [head.label for head in heads], 440 * max(1, len(groups)) + 80
        return AttentionView(tokens, attention, labels, view, groups, height)

    def summary(self, prompt: int = 0) -> "pd.DataFrame":
        """A line per head: its value (mean over prompts and positions), kinds, what it reads."""
        import pandas as pd

        lines = []
        for head in self:
            read = [
                f"{token!r} {attention:.0%} → {moved:+.3f}"
                for token, _, attention, moved in head.reads(3, prompt=prompt)
            ]
            value = f"{float(head.value.nanmean()):+.3f}"
            kinds = head.described(prompt)
            lines.append((head.label, value, *kinds, ", ".join(read), head.why[prompt]))
        reads = f"reads most (attention → contribution, in logits), prompt {prompt}"
        columns = [
            "head",
            "logits",
            "kind at the attributed token",
            "over all tokens",
            reads,
            "why",
        ]
        return pd.DataFrame(lines, columns=columns)

    def _repr_html_(self) -> str:
        if not self:
            return "<p>no head</p>"
        return self.summary().to_html(index=False, border=0) + self.show()._repr_html_()

"""The tables that a terminal shows, and a file of text holds."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from rich.bar import Bar
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from torch import Tensor

from tl_dla.analyses.logit_lens import LogitLens
from tl_dla.core.certificate import Reconstruction
from tl_dla.core.result import Attribution

if TYPE_CHECKING:
    from tl_dla.analyses.check_model import ModelCheck
    from tl_dla.datasets.summary import DatasetAttribution
    from tl_dla.effects.audit import Audit

REST = "what no known part of the model wrote, and more than rounding; `tl-dla check` shows more"
_SHOWN = 12
_BAR_WIDTH = 32  # where there is no terminal to fill
_MEANING = "(rounding allows: the largest error that rounding can make of rows that add up exactly)"
_LOGITS = ["logits"]


@dataclass(frozen=True, eq=False)
class Ledger:
    """Rows to show with what they add up to.

    Attributes:
        names: a name for each row.
        values: one column, or one for each candidate.
        total: what the rows add up to.
        logit: the model's own.
        columns: what the columns are.
        cumulative: whether the rows are readings of the stream, of which the last is the total.
        own: what `logit` is, in words.
    """

    names: list[str]
    values: Float[Tensor, "row column"]
    total: list[float]
    logit: list[float]
    columns: list[str]
    cumulative: bool = False
    own: str = "model's own logit"

    @classmethod
    def of(
        cls, result: Attribution, names: list[str] | None = None, columns: list[str] = _LOGITS
    ) -> "Ledger":
        """The rows of a result for one prompt at one position, under their labels by default."""
        return cls(
            names or result.labels,
            result.attribution[:, 0].reshape(len(result.labels), -1),
            result.reconstruction.reconstructed[0].reshape(-1).tolist(),
            result.logit[0].reshape(-1).tolist(),
            columns,
            cumulative=result.unit == "layer",
        )

    def shown(self, top: int | None) -> list[int]:
        """The rows of largest mean magnitude first; readings of the stream all and in order."""
        k = top or (len(self.names) if self.cumulative else _SHOWN)
        order = self.values.abs().mean(1).argsort(descending=True, stable=True)[:k].tolist()
        return sorted(order) if self.cumulative else order

    def table(self, top: int | None) -> Table:
        """The rows that matter, the sum of the others, the total and the logit.

        One column has bars.
        """
        order = self.shown(top)
        table = _table("row", *self.columns, "")
        rows = self.values[order].tolist()
        bars: list[RenderableType] = [""] * len(rows)
        if len(self.columns) == 1:
            bars = [*_bars([row[0] for row in rows])]
        for i, row, bar in zip(order, rows, bars, strict=True):
            table.add_row(Text(self.names[i]), *map(signed, row), bar)
        hidden = [i for i in range(len(self.names)) if i not in order]
        if hidden and not self.cumulative:
            others = self.values[hidden].sum(0).tolist()
            table.add_row(f"{len(hidden)} others", *map(signed, others), style="dim")
        total = "last reading + biases" if self.cumulative else "all rows"
        table.add_row(total, *map(signed, self.total), style="bold")
        table.add_row(self.own, *map(signed, self.logit), style="bold")
        return table


def attribution_table(
    heading: list[str], ledger: Ledger, top: int | None, notes: list[RenderableType]
) -> RenderableType:
    """What was asked, the rows, and what there is to know about them."""
    note = "the rows are readings of the stream: the last reading and the biases are the logit"
    return Group(
        *_heading(heading), ledger.table(top), Text(), *[Text(note)] * ledger.cumulative, *notes
    )


def certified(certificate: Reconstruction, warning: str, caution: str = "") -> Text:
    """The certificate, what its words mean, and what rows do not say."""
    lines = [f"{_mark(certificate.passed)} {certificate}", f"! {warning}" * bool(warning)]
    return Text("\n".join(filter(None, [*lines, _MEANING, caution])))


def observed(measured: str) -> str:
    """What a direct effect is not, and what measures that."""
    observation = "A direct effect is an observation, not what removing the part would do"
    return f"{observation}: {measured} measures that."


def audited(audit: "Audit | None") -> list[RenderableType]:
    """What intervention says of the largest rows, and a sentence for each flag."""
    if audit is None:
        return []
    columns = ["direct", "direct_recomputed", "total", "indirect"]
    heading = "logits: direct, with the final norm recomputed, total (without the row), indirect"
    table = _table("audit", "direct", "recomputed", "total", "indirect", "")
    frame = audit.to_dataframe()
    for name, *values in zip(frame["row"], *(frame[column] for column in columns), strict=True):
        table.add_row(Text(name), *map(signed, values), "")
    flags = [Text(f"- {sentence}") for sentence in audit.sentences]
    return [Text(f"\n{heading}\n"), table, Text(), *flags]


def lens_table(heading: list[str], lens: LogitLens, asked: list[str]) -> RenderableType:
    """A line a point: its most likely tokens, and the tokens that were asked for."""
    table = _table("point", "entropy", *map(repr, asked), "most likely")
    for i, label in enumerate(lens.labels):
        top = zip(lens.top_probabilities[i, 0, 0].tolist(), lens.top_tokens[i][0][0], strict=True)
        cells = [label, f"{float(lens.entropy[i, 0, 0]):.2f}"]
        if lens.probabilities is not None and lens.ranks is not None:
            followed = zip(
                lens.probabilities[i, 0, 0].tolist(), lens.ranks[i, 0, 0].tolist(), strict=True
            )
            cells += [f"{probability:.1%} #{rank}" for probability, rank in followed]
        likely = "  ".join(f"{token!r} {probability:.1%}" for probability, token in top)
        # A line a point: this column is the one that a narrow terminal cuts.
        table.add_row(*cells, Text(likely, no_wrap=True, overflow="ellipsis"))
    return Group(*_heading(heading), table)


def check_table(check: "ModelCheck", verbose: bool) -> RenderableType:
    """The verdict; the identities that fail, or all of them, in the order of the forward pass."""
    shown = [one for one in check.identities if verbose or not one.passed]
    table = _table("largest miss", "relative", "tolerance", "", "identity")
    for one in shown:
        numbers = (f"{x:.1e}" for x in (one.error, one.relative_error, one.tolerance))
        table.add_row(*numbers, _mark(one.passed), Text(one.name))
    first = check.first_failure
    verdict = f"all {len(check.identities)} identities hold"
    if first is not None:
        verdict = f"first failure: {first.name}"
    lines = [f"{_mark(check.passed)} {check.architecture}: {verdict}"]
    lines += [f"not checked: {check.refusal}"] * bool(check.refusal)
    above: list[RenderableType] = [table, Text()] if shown else []
    return Group(*above, Text("\n".join(lines)))


def dataset_table(summary: "DatasetAttribution", top: int) -> RenderableType:
    """The rows of the largest means with their intervals, and the model's own logit by group."""
    rows = summary.top(top, by="magnitude")
    columns = ("mean", f"{summary.confidence:.0%} interval", "same sign")
    table = _table("row", *columns, "")
    for row, bar in zip(rows, _bars([row.mean for row in rows]), strict=True):
        table.add_row(Text(row.label), *_statistics(row), bar)
    logits = _table(f"model's own {summary.quantity}", *columns, "prompts")
    frame = summary.to_dataframe()
    for line in frame[frame["kind"] == "logit"].itertuples():
        logits.add_row(Text(f"{line.group}"), *_statistics(line), f"{line.n:,}")
    notes = [f"Σ|row| is {summary.gross_to_net:.1f} times |Σ row|"]
    if summary.skipped:
        index, reason = summary.skipped[0]
        notes.append(f"{len(summary.skipped):,} examples left out; example {index}: {reason}")
    if not summary.complete:
        notes.append("the run has not finished: the same `tl-dla dataset` command continues it")
    heading = [
        f"{summary.n:,} prompts, {summary.model}",
        f'the {len(rows)} largest of {len(summary)} rows, unit="{summary.unit}", logits',
    ]
    return Group(*_heading(heading), table, Text(), logits, Text("\n" + "\n".join(notes)))


def _statistics(line: Any) -> tuple[str, str, str]:
    interval = f"[{signed(line.low)}, {signed(line.high)}]"
    return signed(line.mean), interval, f"{line.sign_agreement:.0%}"


# ---- the parts of tables -----------------------------------------------------------------------


def _heading(lines: list[str]) -> list[Text]:
    return [Text(lines[0], style="bold"), *map(Text, lines[1:]), Text()]


def _table(*columns: str) -> Table:
    """Columns of numbers, then one to the left that fills the line."""
    table = Table(box=None, pad_edge=False)
    for column in columns[:-1]:
        table.add_column(Text(column), justify="right", no_wrap=True)
    table.add_column(Text(columns[-1]))
    return table


@dataclass(frozen=True)
class _SignedBar:
    """A bar from a common 0 to the right or to the left, as wide as the terminal leaves room.

    The 0 stands between two characters, so that a tiny value has a tiny bar.
    """

    value: float
    low: float
    high: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Bar]:
        width, span = options.max_width, self.high - self.low or 1.0
        zero = round(width * -self.low / span)
        zero = min(max(zero, int(self.low < 0)), width - int(self.high > 0))  # room on both sides
        sides = [(zero, -self.low), (width - zero, self.high)]
        scale = min([room / reach for room, reach in sides if reach], default=0.0)
        begin, end = sorted((zero, zero + self.value * scale))
        yield Bar(width, begin, end, width=width, color="blue" if self.value > 0 else "red")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(4, options.max_width if console.is_terminal else _BAR_WIDTH)


def _bars(values: Sequence[float]) -> list[_SignedBar]:
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(0.0, *finite, 0.0), max(0.0, *finite, 0.0)
    return [_SignedBar(value if math.isfinite(value) else 0.0, low, high) for value in values]


def signed(value: float) -> str:
    """A number with its sign; a dash for none."""
    return "–" if math.isnan(value) else f"{value:+.4f}"


def _mark(passed: bool) -> str:
    """A tick or a cross."""
    return "✓" if passed else "✗"

"""`DatasetAttribution`: what the prompts of a dataset have in common, row by row."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.ranking import order, rows_to_rank
from tl_dla.datasets.shards import RowNames, Shard
from tl_dla.datasets.statistics import RowStatistics, Sums
from tl_dla.errors import ArgumentError
from tl_dla.model.stream import Kind

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Quantity = Literal["logit", "logit difference"]
_SHOWN = 12
# Columns that are added up beside the rows: the model's logit, and Σ|row| and |Σ row| over rows.
_EXTRA = ("model's logit", "gross", "net")
# Below so many prompts every interval comes with what it assumes (see `RowStatistics`).
_FEW = 30


class RowSummary(NamedTuple):
    """One row over all prompts, in logits; the fields are those of `RowStatistics`."""

    label: str
    mean: float
    low: float
    high: float
    std: float
    sem: float
    skewness: float
    sign_agreement: float
    cancellation: float


@dataclass(frozen=True, eq=False, repr=False)
class DatasetAttribution:
    """What each part of the model wrote to a logit, over the prompts of a dataset.

    Attributes:
        labels: the rows' names, as in `DirectLogitAttribution`. A `3_rest` row that only some
            batches have is 0 (less than rounding explains) in the others.
        kinds: what each row is.
        layers: each row's layer, None for rows of no layer.
        unit: the unit attributed.
        quantity: what the rows add up to: `"logit"`, or `"logit difference"` where the examples
            have incorrect answers.
        model: the model's name.
        confidence: of the intervals.
        rows: the statistics of each row over prompts: `rows.mean`, `rows.std`, `rows.sem`,
            `rows.low`, `rows.high`, `rows.skewness`, `rows.sign_agreement`, `rows.cancellation`,
            each `[row]`.
        logit: the same of the model's own logit (difference), `[1]`.
        gross_to_net: how much the rows of a prompt cancel each other: the mean over prompts of
            Σ|row|, over the mean of |Σ row|. (`rows.cancellation` is of one row over prompts.)
        groups: the same for each group.
        skipped: index and reason of every example left out.
        complete: False for the summary of a run that has not finished.
    """

    labels: list[str]
    kinds: list[Kind]
    layers: list[int | None]
    unit: str
    quantity: Quantity
    model: str
    confidence: float
    rows: RowStatistics
    logit: RowStatistics
    gross_to_net: float
    groups: dict[str, "DatasetAttribution"] = field(default_factory=dict)
    skipped: list[tuple[int, str]] = field(default_factory=list)
    complete: bool = True

    @property
    def n(self) -> int:
        """How many prompts were attributed."""
        return self.rows.n

    @property
    def mean(self) -> Float[Tensor, " row"]:
        """The mean of each row over prompts, in logits."""
        return self.rows.mean

    @property
    def caution(self) -> str | None:
        """What the intervals assume, where there are few prompts; None where there are enough."""
        few = min([self.n, *(part.n for part in self.groups.values())])
        if few >= _FEW:
            return None
        return (
            f"with few prompts ({few}) intervals hold if the effect is spread over them: where rare"
            f" prompts carry it, they cover the mean less often than {self.confidence:.0%}"
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, label: str) -> RowSummary:
        """One row, by its label."""
        if label not in self.labels:
            raise KeyError(
                f'No row {label!r} in a unit="{self.unit}" result; the rows are'
                f" {', '.join(self.labels[:4])}, …, {self.labels[-1]}."
            )
        return self._summary(self.labels.index(label))

    def _summary(self, row: int) -> RowSummary:
        numbers = (float(getattr(self.rows, name)[row]) for name in RowSummary._fields[1:])
        return RowSummary(self.labels[row], *numbers)

    def top(
        self,
        k: int = 5,
        *,
        kind: Kind | None = None,
        by: Literal["value", "magnitude"] = "value",
        largest: bool = True,
    ) -> list[RowSummary]:
        """The k rows of the highest mean, each with its interval, best first.

        Args:
            k: how many; fewer where there are not so many rows.
            kind: only rows of this kind, such as `"head"`.
            by: `"magnitude"` ranks by the absolute value of the mean.
            largest: False for the lowest rows instead.

        Raises:
            ArgumentError: for an unknown kind or ranking.
        """
        rows = rows_to_rank(self.kinds, kind, k, by)
        found = order(self.rows.mean[rows], k, by, largest=largest)
        return [self._summary(rows[i]) for i in found]

    def to_dataframe(self) -> "pd.DataFrame":
        """A tidy table: one line per group × row, and one of the model's own logit (difference).

        Columns: `group` ("all" for all prompts), `label`, `kind`, `layer`, `n`, and those of
        `RowStatistics` in logits. The last line of a group has the kind `logit`, and `quantity` for
        its label.
        """
        import pandas as pd

        tables = []
        # A group may itself be called "all"; the first lines are always those of every prompt.
        for group, part in [("all", self), *self.groups.items()]:
            columns: dict[str, Any] = {
                "group": group,
                "label": [*part.labels, self.quantity],
                "kind": [*part.kinds, "logit"],
                "layer": pd.array([*part.layers, None], dtype="Int64"),
                "n": part.n,
            }
            for name in RowSummary._fields[1:]:
                both = torch.cat([getattr(part.rows, name), getattr(part.logit, name)])
                columns[name] = both.numpy()
            tables.append(pd.DataFrame(columns))
        return pd.concat(tables, ignore_index=True)

    def plot(
        self,
        k: int = 20,
        *,
        kind: Kind | None = None,
        by_group: bool = False,
        title: str | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> "go.Figure":
        """The k rows of the largest means by magnitude with their intervals, a plotly figure.

        Args:
            k: how many rows.
            kind: only rows of this kind.
            by_group: each group of prompts beside the others, in place of all prompts.
            title: in place of the figure's own.
            width: in pixels.
            height: in pixels.

        Raises:
            ArgumentError: for `by_group` where the dataset has no groups.
        """
        from tl_dla.figures import charts, effects

        if by_group and not self.groups:
            raise ArgumentError("The dataset's examples have no groups to draw.")
        labels = [row.label for row in self.top(k, kind=kind, by="magnitude")]
        look = charts.Look(title, width, height)
        heading = charts.Heading(
            f"{self.n:,} prompts: the {len(labels)} largest rows",
            f"{self.quantity}, mean over prompts, {self.confidence:.0%} interval; {self.model}",
        )
        if not by_group:
            return charts.intervals(labels, *self._intervals(labels), heading=heading, look=look)
        groups = {
            f"{name} ({part.n:,})": part._intervals(labels) for name, part in self.groups.items()
        }
        return effects.by_group(labels, groups, heading, look)

    def _intervals(self, labels: Sequence[str]) -> tuple[Any, Any, Any]:
        """Means of rows, and the lower and upper ends of their intervals."""
        at, rows = [self.labels.index(label) for label in labels], self.rows
        return rows.mean[at].numpy(), rows.low[at].numpy(), rows.high[at].numpy()

    def __repr__(self) -> str:
        """The rows that matter with their intervals, and the model's own logit."""
        logit = self.logit
        sign = "positive" if float(logit.mean) > 0 else "negative"
        lines = [
            f'DatasetAttribution: {self.n:,} prompts, unit="{self.unit}", {len(self)} rows,'
            f" {self.model}",
            f"  the model's own {self.quantity}: {_interval(logit, 0)}, {sign} in"
            f" {float(logit.sign_agreement):.0%} of prompts",
            f"  rows cancel: Σ|row| is {self.gross_to_net:.1f} times |Σ row|",
        ]
        top = self.top(_SHOWN, by="magnitude")
        lines.append(
            f"  the {len(top)} largest of {len(self)} rows (mean,"
            f" {self.confidence:.0%} interval, share of prompts with its sign):"
        )
        width = max(len(row.label) for row in top)
        for row in top:
            at = self.labels.index(row.label)
            lines.append(
                f"  {row.label:>{width}}  {_interval(self.rows, at)}  {row.sign_agreement:5.0%}"
            )
        for name, part in self.groups.items():
            lines.append(
                f"  group {name}: {part.n:,} prompts, {self.quantity} {_interval(part.logit, 0)}"
            )
        if self.caution:
            lines.append(f"  {self.caution}")
        if self.skipped:
            index, reason = self.skipped[0]
            lines.append(f"  {len(self.skipped):,} examples left out; example {index}: {reason}")
        if not self.complete:
            lines.append("  the run has not finished: the same call continues it")
        return "\n".join(lines)


def _interval(rows: RowStatistics, i: int) -> str:
    return f"{float(rows.mean[i]):+8.4f} [{float(rows.low[i]):+.4f}, {float(rows.high[i]):+.4f}]"


# ---- from shards -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tally:
    """Sums per group, and what was left out; tallies merge in any order to the same numbers."""

    names: RowNames | None = None
    quantity: Quantity = "logit"
    sums: dict[str | None, Sums] = field(default_factory=dict)
    skipped: list[tuple[int, str]] = field(default_factory=list)

    @property
    def n(self) -> int:
        """How many examples were attributed."""
        return sum(sums.n for sums in self.sums.values())

    @staticmethod
    def of(shard: Shard) -> "Tally":
        """The sums over one shard."""
        skipped = [(line.index, line.error) for line in shard.lines if line.error is not None]
        sums = {}
        lines = [line for line in shard.lines if line.error is None]
        if not lines or shard.names is None:
            return Tally(skipped=skipped)
        quantity: Quantity = "logit difference" if lines[0].incorrect else "logit"
        extra = list(lines[0].rest or {})
        labels = [*shard.names.labels, *extra]
        named = zip(shard.names.kinds, shard.names.labels, strict=True)
        adding = [kind != "residual" or label == "final_post" for kind, label in named]
        adds = torch.tensor([*adding, *[True] * len(extra)], device="cpu")
        for group in dict.fromkeys(line.group for line in lines):
            own = [line for line in lines if line.group == group]
            rows = torch.stack([line.values for line in own if line.values is not None]).double()
            rest = [[float(value) for value in (line.rest or {}).values()] for line in own]
            values = torch.cat([rows, rows.new_tensor(rest)], 1)
            logit = rows.new_tensor([line.logit for line in own])
            gross = (values * adds).abs().sum(1).float()
            net = (values * adds).sum(1).abs().float()
            values = torch.cat([values, torch.stack([logit, gross, net], 1)], 1)
            sums[group] = Sums.of([*labels, *_EXTRA], values)
        return Tally(shard.names, quantity, sums, skipped)

    @staticmethod
    def merge(parts: Sequence["Tally"]) -> "Tally":
        """All that the parts have seen.

        Raises:
            ArgumentError: where they have different rows.
        """
        names = list(dict.fromkeys(part.names for part in parts if part.names is not None))
        if len(names) > 1:
            first, second = (set(one.labels) for one in names[:2])
            raise ArgumentError(
                "Every prompt of a dataset must have the same rows to be averaged; only"
                f" some have {', '.join(sorted(first ^ second)[:3])}: choose another unit."
            )
        groups = dict.fromkeys(group for part in parts for group in part.sums)
        sums = {
            group: Sums.merge([part.sums[group] for part in parts if group in part.sums])
            for group in groups
        }
        skipped = [one for part in parts for one in part.skipped]
        attributed = [part.quantity for part in parts if part.names is not None]
        quantity: Quantity = attributed[0] if attributed else "logit"
        return Tally(names[0] if names else None, quantity, sums, skipped)

    def result(
        self, manifest: dict[str, Any], confidence: float, complete: bool = True
    ) -> DatasetAttribution:
        """The statistics of all examples and of each group.

        Raises:
            ArgumentError: where no example was attributed.
        """
        skipped = sorted(self.skipped)
        if self.names is None:
            reason = f"; example {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
            raise ArgumentError(
                f"No example could be attributed, of {len(skipped):,} given{reason}"
                + ("" if skipped else ".")
            )
        whole = Sums.merge(list(self.sums.values()))
        unexplained: Kind = "rest"
        known = {*self.names.labels, *_EXTRA}
        rest = sorted((label for label in whole.labels if label not in known), key=_layer_of_rest)
        labels = [*self.names.labels, *rest]
        layers = [*self.names.layers, *(_layer_of_rest(label) for label in rest)]
        layers = [None if layer == -1 else layer for layer in layers]
        kinds = [*self.names.kinds, *[unexplained] * len(rest)]

        def part(sums: Sums, **more: Any) -> DatasetAttribution:
            _, gross, net = sums.select(_EXTRA).high[0].tolist()
            return DatasetAttribution(
                labels=labels,
                kinds=kinds,
                layers=layers,
                unit=manifest["unit"],
                quantity=self.quantity,
                model=manifest["model"]["name"],
                confidence=confidence,
                rows=RowStatistics.of(sums.select(labels), confidence),
                logit=RowStatistics.of(sums.select(_EXTRA[:1]), confidence),
                gross_to_net=gross / net if net else float("inf"),
                complete=complete,
                **more,
            )

        named = sorted(group for group in self.sums if group is not None)
        groups = {group: part(self.sums[group]) for group in named}
        return part(whole, groups=groups, skipped=skipped)


def _layer_of_rest(label: str) -> int:
    """The layer of `3_rest`; -1 for `embed_rest`, at the start of the stream."""
    layer = re.match(r"\d+", label)
    return int(layer[0]) if layer else -1

"""`audit`: what the largest rows do not tell, measured beside them.

    direct             the row: its direct effect, the final norm's scale held fixed
    direct_recomputed  the same, the final norm free to rescale          (`recomputed.py`)
    total              logit − logit of a run in which it is ablated     (`interventions.py`)
    indirect           total − direct: what goes through later parts

and for each row what later parts give back (`repair.py`), how much of its write is left at the end
(`erasure.py`), and for a negative head how much of it suppresses a copy of the answer
(`suppression.py`). In logits. Positive means that the row raises the logit, everywhere.

Where these numbers disagree enough to change what a reader would conclude, a flag says so, with
what it means and which experiment settles it. Flags judge means over prompts and positions.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.labelled import require_direct
from tl_dla.core.result import Attribution, require_input
from tl_dla.core.run import CAUSE, direct_unit
from tl_dla.core.vectors import ResidualStack, stack_of, vectors_of
from tl_dla.effects.erasure import Erasures, erasures
from tl_dla.effects.flags import FLAGS, Flag, RowEffects, flags_of, where
from tl_dla.effects.interventions import ABLATABLE, Group, How, name_groups, run_ablated
from tl_dla.effects.recomputed import FinalLogits, written
from tl_dla.effects.repair import SelfRepair, repair_of
from tl_dla.effects.substitutes import Ablation, At
from tl_dla.effects.suppression import copy_suppression
from tl_dla.errors import ArgumentError, UnsupportedModelError
from tl_dla.model.reader import ModelReader

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class Audit:
    """The largest rows of an attribution beside what intervention says of them, in logits.

    Attributes:
        result: the attribution audited.
        rows: the rows, or groups of rows, largest first.
        direct: their direct effects, `[row, *batch_and_pos]`. With `ablation="mean"` and
            `"resample"`, of the difference between what is there and what is put there.
        direct_recomputed: the same with the final norm rescaling.
        total: the logit, less that of the ablated run.
        repairs: for each row where direct − total goes.
        erasures: what later rows remove of each row, those of groups one by one.
        copied: for each negative head what its row owes to source tokens that are the answer; NaN
            for other rows, and where the model's heads cannot be split by source token.
        ablation, at: what was written instead of the rows, and where.
    """

    result: Attribution
    rows: list[str]
    direct: Float[Tensor, " row *batch_and_pos"]
    direct_recomputed: Float[Tensor, " row *batch_and_pos"]
    total: Float[Tensor, " row *batch_and_pos"]
    repairs: dict[str, SelfRepair]
    erasures: Erasures
    copied: Float[Tensor, " row *batch_and_pos"]
    ablation: Ablation
    at: At

    @property
    def indirect(self) -> Float[Tensor, " row *batch_and_pos"]:
        """What goes through later parts: total − direct."""
        return self.total - self.direct

    @property
    def left(self) -> Float[Tensor, " row *batch_and_pos"]:
        """How much of each row's write is left at the end; NaN for groups of rows."""
        left = dict(zip(self.erasures.writers, self.erasures.left, strict=True))
        nothing = torch.full_like(self.result.logit, torch.nan)
        return torch.stack([left.get(row, nothing) for row in self.rows])

    @cached_property
    def flags(self) -> list[Flag]:
        """What a reader of the rows should know, the largest row first."""
        measured = (self.direct, self.direct_recomputed, self.total, self.left)
        means = [self._mean(x).tolist() for x in measured]
        columns = zip(self.rows, *means, self.copy_share.tolist(), strict=True)
        effects = [
            RowEffects(
                name, self.at, direct, new, total, left, copied, self.repairs[name], self.erasures
            )
            for name, direct, new, total, left, copied in columns
        ]
        return [flag for row in effects for flag in flags_of(row)]

    @property
    def sentences(self) -> list[str]:
        """The flags, in words."""
        return [flag.sentence for flag in self.flags]

    def to_dataframe(self, *, by_prompt: bool = False) -> "pd.DataFrame":
        """One line per row, as means over prompts and positions, with the flags.

        Columns: `row`, `direct`, `direct_recomputed`, `total`, `indirect`; what is given back when
        the row is ablated: `repair_attention`, `repair_mlps`, `repair_norm`; `left` (of the write,
        at the end); `copy_share` (of a negative head's row, from source tokens that are the
        answer); and a column of booleans for each of the flags.

        Args:
            by_prompt: one line per row, prompt and position instead, without flags.
        """
        import pandas as pd

        parts = {
            "direct": self.direct,
            "direct_recomputed": self.direct_recomputed,
            "total": self.total,
            "indirect": self.indirect,
            "repair_attention": self._repairs("attention"),
            "repair_mlps": self._repairs("mlps"),
            "repair_norm": self._repairs("norm"),
            "left": self.left,
        }
        if not by_prompt:
            means = {name: self._mean(x).tolist() for name, x in parts.items()}
            means["copy_share"] = self.copy_share.tolist()
            raised = {(flag.row, flag.name) for flag in self.flags}
            flags = {name: [(row, name) in raised for row in self.rows] for name in FLAGS}
            return pd.DataFrame({"row": self.rows, **means, **flags})
        parts["copy_share"] = self.copied / self._of_result()
        positions = self.result.positions
        places = positions.valid.nonzero()
        index = positions.index[tuple(places.T)].tolist()
        lines = []
        for i, row in enumerate(self.rows):
            values = {
                name: positions.unsqueeze(x, 2)[i][tuple(places.T)].tolist()
                for name, x in parts.items()
            }
            where = {"prompt": places[:, 0].tolist(), "position": index}
            lines.append(pd.DataFrame({"row": row, **where, **values}))
        return pd.concat(lines, ignore_index=True)

    def plot(
        self, *, title: str | None = None, width: int | None = None, height: int | None = None
    ) -> "go.Figure":
        """Direct effects as bars, total ones as diamonds, and the flags by name; a plotly figure.

        Means over prompts and positions, in logits; hover says the flags as sentences.
        """
        from tl_dla.figures import effects
        from tl_dla.figures.charts import Heading, Look
        from tl_dla.figures.text import safe

        flags = [[flag for flag in self.flags if flag.row == row] for row in self.rows]
        shown = effects.Effects(
            self.rows,
            self._mean(self.direct).cpu().double().numpy(),
            self._mean(self.total).cpu().double().numpy(),
            [[flag.name for flag in own] for own in flags],
            [[flag.sentence for flag in own] for own in flags],
        )
        heading = Heading(
            f"Direct and total effects on {safe(self.result.target)}",
            f"{self.ablation}-ablated at {where(self.at)}, mean over prompts and positions",
        )
        return effects.direct_and_total(shown, heading, Look(title, width, height))

    def _of_result(self) -> Float[Tensor, " row *batch_and_pos"]:
        """The rows themselves, groups added up."""
        groups = [row.split("+") for row in self.rows]
        result = self.result
        return torch.stack([torch.stack([result[x] for x in group]).sum(0) for group in groups])

    @property
    def copy_share(self) -> Float[Tensor, " row"]:
        """`copied` over the row, of means: where a row is near 0 it has no share to speak of."""
        return self._mean(self.copied) / self._mean(self._of_result())

    def _mean(self, x: Float[Tensor, " row *batch_and_pos"]) -> Float[Tensor, " row"]:
        """Over prompts and positions, those that exist."""
        return x.reshape(len(self.rows), -1).nanmean(1)

    def _repairs(self, part: str) -> Float[Tensor, " row *batch_and_pos"]:
        return torch.stack([getattr(self.repairs[row], part) for row in self.rows])

    def __repr__(self) -> str:
        """The table, and a sentence for each flag."""
        columns = ["row", "direct", "direct_recomputed", "total", "indirect", "left"]
        table = self.to_dataframe()[columns].rename(columns={"direct_recomputed": "recomputed"})
        lines = [
            f"Audit of {self.result.target}: the {len(self.rows)} rows,"
            f" {self.ablation}-ablated at {where(self.at)} (logits, means)",
            table.to_string(index=False, float_format="{:+.3f}".format),
        ]
        return "\n".join([*lines, *[f"- {sentence}" for sentence in self.sentences]])


def audit(
    result: Attribution,
    k: int = 10,
    *,
    rows: Sequence[Group] | None = None,
    ablation: Ablation = "zero",
    at: At = "position",
    reference: Any = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Audit:
    """Put what direct effects do not tell beside the k largest rows.

    Args:
        result: an attribution with `unit="component"` or `"head"`, of one logit or difference.
        k: how many rows, by the absolute value of their mean, of those that can be ablated.
        rows: these rows instead; a list of labels among them is ablated together.
        ablation: what is written instead: as in `ablate`.
        at: the attributed positions only, or `"all"` tokens: as in `ablate`.
        reference: as in `ablate`.
        batch_size: prompts in one forward pass: as in `ablate`.
        progress: show a progress bar.

    Returns:
        An `Audit`: a table, and a sentence for each flag.

    Raises:
        ArgumentError: for other units, for candidates, for rows that cannot be ablated.
        UnsupportedModelError: where the model's output transform cannot be applied again.

    Example:
        >>> from tl_dla import direct_logit_attribution, load_model
        >>> result = direct_logit_attribution(
        ...     load_model("demo"), "The Eiffel Tower is in the city of", " Paris", unit="head"
        ... )
        >>> table = audit(result, k=3, progress=False).to_dataframe()
        >>> list(table.columns[:5])
        ['row', 'direct', 'direct_recomputed', 'total', 'indirect']
    """
    require_direct(result)
    if result.targets.candidates is not None:
        raise ArgumentError(
            "A result over candidates has several logits: audit the attribution of one of them."
        )
    require_input(result)
    stack = written(result)
    groups = name_groups(_largest(result, k) if rows is None else rows)
    final = FinalLogits(result, stack)
    vectors = vectors_of(ModelReader(result.model), direct_unit(result), result.selection)
    # Nothing is left of a row that is zero-ablated; of others it is what stands in its place.
    taps = [] if ablation == "zero" else vectors.taps
    runs = run_ablated(result, groups, How(ablation, at, reference, batch_size, progress), taps)
    repairs, recomputed = {}, []
    for name, labels in groups.items():
        ablated = runs[name].result(Attribution).certified("raise", CAUSE)
        repairs[name] = repair_of(result, name, labels, ablated)
        removed = _added(stack, labels)
        if taps:
            there = stack_of(vectors, runs[name].kept, result.positions)
            removed = removed - _added(there, labels)
        recomputed.append(final.effect_of(removed))
    single = list(dict.fromkeys(label for labels in groups.values() for label in labels))
    return Audit(
        result=result,
        rows=list(groups),
        direct=torch.stack([repairs[name].direct for name in groups]),
        direct_recomputed=torch.stack(recomputed),
        total=torch.stack([repairs[name].total for name in groups]),
        repairs=repairs,
        erasures=erasures(result, single, stack=stack),
        copied=_copied(result, list(groups), single),
        ablation=ablation,
        at=at,
    )


def _copied(result: Attribution, names: Sequence[str], single: Sequence[str]) -> Tensor:
    """NaN throughout for a model whose heads cannot be split: the rest of the audit stands."""
    copied: dict[str, Tensor] = {}
    with suppress(UnsupportedModelError):
        copied = dict(zip(single, copy_suppression(result, single), strict=True))
    nothing = torch.full_like(result.logit, torch.nan)
    return torch.stack([copied.get(name, nothing) for name in names])


def _largest(result: Attribution, k: int) -> list[str]:
    if k < 1:
        raise ArgumentError(f"k must be at least 1; {k} was given.")
    kinds = dict(zip(result.labels, result.kinds, strict=True))
    ranked = result.top(len(result), by="magnitude")
    return [label for label, _ in ranked if kinds[label] in ABLATABLE][:k]


def _added(stack: ResidualStack, labels: Sequence[str]) -> Float[Tensor, "*batch_and_pos d_model"]:
    """What rows wrote together."""
    return torch.stack([stack[label] for label in labels]).sum(0)

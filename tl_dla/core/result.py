"""`DirectLogitAttribution`: rows, labels, the model's own logit and the certificate."""

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float
from torch import Tensor

from tl_dla.core.certificate import Reconstruction
from tl_dla.core.readout import Readout
from tl_dla.core.taps import Recording
from tl_dla.errors import ArgumentError, UnsupportedModelError
from tl_dla.inputs.selection import rows_to_rank
from tl_dla.inputs.targets import Targets
from tl_dla.inputs.tokens import Positions, Prompts, token_strings
from tl_dla.model.reader import Kind

if TYPE_CHECKING:
    from os import PathLike
    from pathlib import Path

    import pandas as pd
    import plotly.graph_objects as go

    from tl_dla.analyses.promotion import PromotedTokens
    from tl_dla.core.decomposition import Plan
    from tl_dla.effects.audit import Audit

_SHOWN = 12


@dataclass(frozen=True, eq=False, repr=False)
class DirectLogitAttribution:
    """What each part of the model wrote to a logit, in logits.

    Attributes:
        attribution: `[row, *batch_and_pos]`, with a last axis `candidate` for `candidate_tokens`.
            NaN where a prompt has no such position.
        labels: the rows' names, as TransformerLens writes them (`embed`, `3_attn_out`, `L3H7`).
        kinds: what each row is: `embed`, `attn`, `mlp`, `ssm`, `head`, `neuron`, `expert`,
            `source`, `bias`, `residual`, `rest`.
        layers: each row's layer, None for rows of no layer.
        unit: the unit asked for.
        logit: the model's own logit, or logit difference, `[*batch_and_pos]`.
        reconstruction: the certificate that the rows add up to it.
        path: the source rows whose value the rows split, in a result of `attribute_path`; `logit`
            is then what the last of them moved.
    """

    attribution: Float[Tensor, " row *batch_and_pos"]
    labels: list[str]
    kinds: list[Kind]
    layers: list[int | None]
    unit: str
    logit: Float[Tensor, "*batch_and_pos"]
    reconstruction: Reconstruction
    plan: "Plan" = field(repr=False)
    seen: Recording = field(repr=False)
    ratio: Float[Tensor, "batch pos token"] = field(repr=False)
    prompts: Prompts = field(repr=False)
    positions: Positions = field(repr=False)
    targets: Targets = field(repr=False)
    path: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.labels) == len(self.kinds) == len(self.layers) == len(self.attribution):
            raise ArgumentError("labels, kinds and layers must be aligned with the rows.")

    @property
    def model(self) -> Any:
        """The model attributed."""
        return self.plan.reader.model

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, label: str) -> Float[Tensor, "*batch_and_pos"]:
        """One row, by its label."""
        if label not in self.labels:
            raise KeyError(
                f'No row {label!r} in a unit="{self.unit}" result; the rows are'
                f" {', '.join(self.labels[:4])}, …, {self.labels[-1]}."
            )
        return self.attribution[self.labels.index(label)]

    @property
    def heads(self) -> Float[Tensor, "layer head *batch_and_pos"]:
        """The head rows by layer and head; 0 where a layer has fewer heads or none.

        Raises:
            ArgumentError: where the result has no head rows.
        """
        places = [re.fullmatch(r"L(\d+)H(\d+)", label) for label in self.labels]
        found = [(i, int(m[1]), int(m[2])) for i, m in enumerate(places) if m]
        if not found:
            raise ArgumentError(
                f'A unit="{self.unit}" result has no head rows: attribute with unit="head".'
            )
        n_heads = max(head for _, _, head in found) + 1
        shape = (self.plan.reader.n_layers, n_heads, *self.attribution.shape[1:])
        heads = self.attribution.new_zeros(shape)
        rows, layers, indices = map(list, zip(*found, strict=True))
        heads[layers, indices] = self.attribution[rows]
        return heads

    @property
    def readout(self) -> Readout:
        """The readout of the final residual stream.

        `readout.of(stack)` of what rows wrote is the attribution (see `decompose`); the bias rows
        are not in the stream.

        Raises:
            ArgumentError: for a result over several candidates, which has a readout for each, and
                for a path, whose rows are not in the final stream.
        """
        if self.path:
            raise ArgumentError("A path's rows are read out through its head, not from the stream.")
        if self.targets.candidates is not None:
            raise ArgumentError("A result over candidates has no single readout.")
        base = self.plan.logit
        weights = (self.ratio * self.targets.weights[0].to(self.ratio))[..., None]
        direction = (base.direction.to(weights) * weights).sum(-2)
        scales = {name: x for name, x in self.seen.values.items() if x.ndim == 2}
        scale = base.frozen(scales).scale
        squeeze = self.positions.squeeze
        return Readout(squeeze(direction), base.norms, None if scale is None else squeeze(scale))

    # ---- ranking -------------------------------------------------------------------------------

    def top(
        self,
        k: int = 5,
        *,
        kind: Kind | None = None,
        by: Literal["value", "magnitude"] = "value",
        largest: bool = True,
        prompt: int | None = None,
        mean: bool = False,
    ) -> list[tuple[str, float]]:
        """The k highest rows as `(label, value)`, best first.

        Args:
            k: how many; fewer where there are not so many rows.
            kind: only rows of this kind, such as `"head"`.
            by: `"magnitude"` ranks by absolute value; the signed value is returned.
            largest: False for the lowest rows instead.
            prompt: which prompt of a batch.
            mean: average over prompts and positions. Nothing is averaged unless asked. By
                magnitude, rows are then ranked by their mean absolute value.

        Raises:
            ArgumentError: where there are several values a row and neither `prompt` nor `mean`
                says which is meant; for an unknown kind or ranking.
        """
        rows = rows_to_rank(self.kinds, kind, k, by)
        values = self.attribution[rows].detach().cpu()
        if prompt is not None:
            n_prompts = values.shape[1]
            if not -n_prompts <= prompt < n_prompts:
                raise ArgumentError(
                    f"prompt must be one of the result's {n_prompts}; {prompt} was given."
                )
            values = values[:, prompt]
        values = values.reshape(len(rows), -1)
        if values.shape[1] > 1 and not mean:
            raise ArgumentError(
                f"Each row has {values.shape[1]} values (prompts, positions, candidates): pass"
                " mean=True for their average, or prompt= to pick a prompt."
            )
        key = values.abs().nanmean(1) if by == "magnitude" else values.nanmean(1)
        order = key.argsort(descending=largest, stable=True)[:k].tolist()
        averages = values.nanmean(1).tolist()
        return [(self.labels[rows[i]], averages[i]) for i in order]

    # ---- tables, text, pictures ----------------------------------------------------------------

    def to_dataframe(self) -> "pd.DataFrame":
        """A tidy table: one line per row × prompt × position (× candidate).

        Columns: `label`, `kind`, `layer`, `prompt`, `position` (of the prompt's real tokens),
        `token` (the token at that position; empty where only a cache was given), `candidate` where
        there are several, `attribution`, `logit` (the model's own) and `share` (attribution /
        logit). Rows of source tokens also say which: `source` (its position) and `source_token`.
        """
        import pandas as pd

        values = self._with_position_axis(self.attribution)
        logit = self._with_position_axis(self.logit[None])[0]
        names = self.targets.candidates or ("",)
        packed = self.prompts.packed
        known = self.seen.logits is not None or bool(self.prompts.tokens.any())
        lines = []
        for b, p in self.positions.valid.nonzero().tolist():
            position = int(self.positions.index[b, p])
            token = token_strings(self.model, packed[b, position][None])[0] if known else ""
            for c, name in enumerate(names):
                frame = pd.DataFrame(
                    {
                        "label": self.labels,
                        "kind": self.kinds,
                        "layer": pd.array(self.layers, dtype="Int64"),
                        "prompt": b,
                        "position": position,
                        "token": token,
                        "attribution": values[:, b, p, c].detach().cpu().numpy(),
                        "logit": float(logit[b, p, c]),
                    }
                )
                if self.targets.candidates:
                    frame.insert(6, "candidate", name)
                if "source" in self.kinds:
                    frame["source"] = pd.array(self.sources, dtype="Int64")
                    texts = token_strings(self.model, packed[b])
                    frame["source_token"] = [None if s is None else texts[s] for s in self.sources]
                lines.append(frame)
        table = pd.concat(lines, ignore_index=True)
        table["share"] = table["attribution"] / table["logit"]
        return table

    @property
    def sources(self) -> list[int | None]:
        """The position of each row's source token (`L9H9←5`), None for rows of no token."""
        places = [label.partition("←")[2] for label in self.labels]
        return [int(place) if place.isdigit() else None for place in places]

    def _with_position_axis(self, x: Tensor) -> Float[Tensor, "row batch pos candidate"]:
        x = x if self.targets.candidates is not None else x[..., None]
        return x.unsqueeze(2) if self.positions.single else x

    @property
    def target(self) -> str:
        """What is attributed, in words: `' Paris' − ' London'`."""
        ids = self.targets.ids
        if self.targets.candidates is not None:
            return f"{len(self.targets.candidates)} candidate tokens"
        if ids.shape[:2] != (1, 1):
            return "each prompt's own answer"
        names = [repr(name) for name in token_strings(self.model, ids.flatten())]
        if self.targets.mean_of_vocab:
            names.append("mean of the vocabulary")
        if len(names) == 1:
            return names[0]
        others = names[1] if len(names) == 2 else f"mean({', '.join(names[1:])})"
        return f"{names[0]} − {others}"

    # ---- candidates and tokens -----------------------------------------------------------------

    @property
    def common(self) -> Float[Tensor, "row ..."]:
        """The part of each row that all candidates share: its mean over them.

        Raises:
            ArgumentError: for a result without candidates.
        """
        if self.targets.candidates is None:
            raise ArgumentError("Only a result over candidate_tokens has a part that they share.")
        return self.attribution.mean(-1)

    @property
    def contrast(self) -> Float[Tensor, "row ... candidate"]:
        """What each row says of each candidate and not of all: the row less `common`."""
        return self.attribution - self.common[..., None]

    def promoted_tokens(
        self, label: str, k: int = 10, *, prompt: int | None = None, position: int | None = None
    ) -> "PromotedTokens":
        """The tokens whose logits a row raises and lowers most, whatever was attributed.

        Args:
            label: the row.
            k: how many tokens of each.
            prompt: which prompt of a batch.
            position: which of the attributed positions, an index into them.

        Raises:
            ArgumentError: for a row that no single part of the model writes, or where `prompt` or
                `position` is needed.
        """
        from tl_dla.analyses.promotion import promoted_tokens

        return promoted_tokens(self, label, k, prompt=prompt, position=position)

    def plot(self, **options: Any) -> "go.Figure":
        """The figure for this unit, a plotly figure; see `tl_dla.figures.plots`."""
        from tl_dla.figures import plots

        return plots.plot(self, **options)

    def audit(self, k: int = 10, **options: Any) -> "Audit":
        """The k largest rows beside what intervention says of them; see `tl_dla.effects.audit`."""
        from tl_dla.effects.audit import audit

        return audit(self, k, **options)

    def report(self, path: "str | PathLike[str]", **options: Any) -> "Path":
        """Write one self-contained HTML page; see `tl_dla.report.page.write_report`."""
        from tl_dla.report.page import write_report

        return write_report(self, path, **options)

    def _repr_html_(self) -> str:
        """What a notebook shows: the rows that matter as bars, and the certificate."""
        from tl_dla.figures.table import notebook_html

        return notebook_html(self)

    def __repr__(self) -> str:
        """The rows that matter, the total, the model's own logit and the certificate."""
        shape = list(self.attribution.shape)
        through = "".join(f", through {source}" for source in self.path)
        title = f"DirectLogitAttribution: {self.target}{through}"
        lines = [f'{title}, unit="{self.unit}", rows {shape}']
        several = self.attribution[0].numel() > 1
        shown = min(_SHOWN, len(self.labels))
        rows = self.top(shown, by="magnitude", mean=True)
        what = "mean over prompts and positions" if several else "logits"
        if self.targets.candidates is not None:
            what = "mean over prompts, positions and candidates"
        lines.append(f"  the {shown} largest of {len(self.labels)} rows ({what}):")
        width = max(len(label) for label, _ in rows)
        lines += [f"  {label:>{width}}  {value:+9.4f}" for label, value in rows]
        total = float(self.reconstruction.reconstructed.nanmean())
        own = float(self.logit.nanmean())
        of = self.path[-1] if self.path else "the model's own"
        lines.append(f"  {'all rows':>{width}}  {total:+9.4f}   {of}: {own:+.4f}")
        lines.append(f"  {self.reconstruction}")
        return "\n".join(lines)


def require_heads(result: DirectLogitAttribution) -> None:
    """Raise unless the result has head rows."""
    if "head" not in result.kinds:
        raise UnsupportedModelError(
            f'A unit="{result.unit}" result has no head rows: attribute with unit="head".'
        )


def require_input(result: DirectLogitAttribution) -> None:
    """Raise unless the model can be run again on the result's prompts."""
    if result.seen.logits is None and not bool(result.prompts.tokens.any()):
        raise ArgumentError(
            "The result was made from a cache without its input, and the model must run again:"
            " pass the prompts as `input` beside the cache."
        )

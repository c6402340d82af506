"""What a subcommand answers, in three forms: a table to read, a record (JSON), a frame (CSV)."""

import argparse
import io
import json
import math
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tl_dla.analyses.logit_lens import LogitLens
from tl_dla.core.certificate import Reconstruction
from tl_dla.core.result import DirectLogitAttribution
from tl_dla.errors import ArgumentError
from tl_dla.inputs.tokens import token_strings

if TYPE_CHECKING:
    import pandas as pd

    from tl_dla.analyses.check_model import ModelCheck
    from tl_dla.datasets.summary import DatasetAttribution

_SHOWN = 12
_FILE_WIDTH = 100
_BAR_WIDTH = 32
_VERSIONS = ("tl-dla", "transformer-lens", "transformers", "torch")


@dataclass(frozen=True)
class Output:
    """One answer in its three forms; only the form asked for is made."""

    table: Callable[[], RenderableType]
    record: Callable[[], Mapping[str, Any]]
    frame: Callable[[], "pd.DataFrame"]
    code: int = 0

    def write(self, args: argparse.Namespace) -> int:
        """Write to `--out`, or to stdout; returns the command's exit code."""
        if args.out is not None:
            with Path(args.out).open("w", encoding="utf-8", newline="") as file:
                self._write(args, Console(file=file, width=_FILE_WIDTH))
            return self.code
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal may lack the bars' characters
        self._write(args, Console())
        sys.stdout.flush()
        return self.code

    def _write(self, args: argparse.Namespace, console: Console) -> None:
        form = "json" if args.json else "csv" if args.csv else Path(args.out or "").suffix[1:]
        if form == "json":
            record = {"command": args.command, **self.record(), "versions": versions()}
            console.file.write(json.dumps(_finite(record), indent=1, allow_nan=False) + "\n")
        elif form == "csv":
            console.file.write(self.frame().to_csv(index=False))
        else:
            console.print(self.table())


def require_writable(out: str | None) -> None:
    """Raise, before anything is computed, where `--out` cannot be a file."""
    if out is None:
        return
    path = Path(out)
    if path.is_dir():
        raise ArgumentError(f"--out must name a file; {out!r} is a folder.")
    if not path.parent.is_dir():
        raise ArgumentError(f"--out {out!r} cannot be written: there is no folder {path.parent}.")


def versions() -> dict[str, str]:
    """The releases that a number comes from."""
    named = {name: metadata.version(name) for name in _VERSIONS}
    return {**named, "python": platform.python_version()}


# ---- attribute ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """The model's own most likely token."""

    id: int
    token: str
    probability: float


def attribution_output(
    result: DirectLogitAttribution, prediction: Prediction | None, args: argparse.Namespace
) -> Output:
    """A result for one prompt at one position."""
    return Output(
        lambda: attribution_table(result, prediction, args.top),
        lambda: {
            "model": args.model,
            "prompt": args.prompt,
            "prediction": vars(prediction) if prediction else None,
            **attribution_record(result),
        },
        result.to_dataframe,
    )


def attribution_table(
    result: DirectLogitAttribution, prediction: Prediction | None, top: int | None
) -> RenderableType:
    """The rows that matter with bars, the total, the model's own logit and the certificate.

    Rows come by magnitude; the points of the stream (`unit="layer"`) all and in their order.
    """
    cumulative = result.unit == "layer"
    values = dict(zip(result.labels, result.attribution[:, 0].tolist(), strict=True))
    shown = top or (len(values) if cumulative else _SHOWN)
    labels = [label for label, _ in result.top(shown, by="magnitude")]
    if cumulative:
        labels = [label for label in result.labels if label in labels]
    rest = [value for label, value in values.items() if label not in labels]

    table = _table("row", "logits", "")
    for label, bar in zip(labels, _bars([values[label] for label in labels]), strict=True):
        table.add_row(Text(_row_name(result, label)), _signed(values[label]), bar)
    if rest and not cumulative:
        table.add_row(f"{len(rest)} others", _signed(sum(rest)), style="dim")
    total = "final_post + biases" if cumulative else "all rows"
    table.add_row(total, _signed(float(result.reconstruction.reconstructed)), style="bold")
    table.add_row("model's own logit", _signed(float(result.logit)), style="bold")

    note = ""
    if prediction is not None:
        note = f"   (the model's own prediction, probability {prediction.probability:.1%})"
    return Group(
        Text(f"{result.target}{note}", style="bold"),
        Text(f'at {_place(result)}, unit="{result.unit}"\n'),
        table,
        Text(f"\n{_mark(result.reconstruction.passed)} {result.reconstruction}"),
    )


def attribution_record(result: DirectLogitAttribution) -> dict[str, Any]:
    """Everything of a result for one prompt at one position."""
    answer, *incorrect = _tokens(result.model, result.targets.ids[0, 0])
    baseline: Any = "mean" if result.targets.mean_of_vocab else incorrect
    position, token = _position(result)
    return {
        "position": position,
        "token": token,
        "answer": answer,
        "incorrect": baseline,
        "unit": result.unit,
        "labels": result.labels,
        "kinds": result.kinds,
        "layers": result.layers,
        "attribution": result.attribution[:, 0].tolist(),
        "logit": float(result.logit),
        "reconstruction": {
            **_certificate(result.reconstruction),
            "parts": {
                name: _certificate(part) for name, part in result.reconstruction.parts.items()
            },
        },
    }


def _certificate(part: Reconstruction) -> dict[str, Any]:
    return {
        "against": part.against,
        "expected": float(part.expected),
        "reconstructed": float(part.reconstructed),
        "error": float(part.error),
        "tolerance": float(part.tolerance),
        "passed": part.passed,
    }


# ---- lens --------------------------------------------------------------------------------------


def lens_output(lens: LogitLens, args: argparse.Namespace) -> Output:
    """A lens on one prompt at one position."""
    return Output(
        lambda: lens_table(lens),
        lambda: {
            "model": args.model,
            "prompt": args.prompt,
            "readings": lens.to_dataframe().to_dict("records"),
        },
        lens.to_dataframe,
    )


def lens_table(lens: LogitLens) -> RenderableType:
    """A line a point: its most likely tokens, and the tokens that were asked for."""
    asked = [] if lens.targets is None else _tokens(lens.model, lens.targets.ids[0, 0])
    table = _table("point", "entropy", *(repr(token["token"]) for token in asked), "most likely")
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
    return Group(
        Text(f"The model's prediction at {_place(lens)}, if it stopped there", style="bold"),
        Text("entropy in nats; probabilities; #0 is the most likely token\n"),
        table,
    )


# ---- check, dataset, summarize ----------------------------------------------------------------


def check_output(check: "ModelCheck", args: argparse.Namespace) -> Output:
    """The identities of a model; exit code 1 where one does not hold."""
    return Output(
        lambda: check_table(check),
        lambda: {
            "model": args.model,
            "prompt": args.prompt,
            "architecture": check.architecture,
            "passed": check.passed,
            "refusal": check.refusal,
            "identities": check.to_dataframe().astype({"layer": object}).to_dict("records"),
        },
        check.to_dataframe,
        code=0 if check.passed else 1,
    )


def check_table(check: "ModelCheck") -> RenderableType:
    """A line an identity, in the order of the forward pass."""
    table = _table("largest miss", "relative", "tolerance", "", "identity")
    for one in check.identities:
        numbers = (f"{x:.1e}" for x in (one.error, one.relative_error, one.tolerance))
        table.add_row(*numbers, _mark(one.passed), Text(one.name))
    first = check.first_failure
    verdict = "every identity holds" if first is None else f"first failure: {first.name}"
    notes = [f"not checked: {check.refusal}"] * bool(check.refusal)
    notes.append(f"{_mark(check.passed)} {verdict}")
    return Group(
        Text(f"{check.architecture}\n", style="bold"), table, Text("\n" + "\n".join(notes))
    )


def dataset_output(summary: "DatasetAttribution", args: argparse.Namespace) -> Output:
    """The statistics of a dataset."""
    return Output(
        lambda: dataset_table(summary, args.top),
        lambda: {
            "model": summary.model,
            "unit": summary.unit,
            "n": summary.n,
            "complete": summary.complete,
            "confidence": summary.confidence,
            "gross_to_net": summary.gross_to_net,
            "skipped": [{"index": i, "reason": reason} for i, reason in summary.skipped],
            "statistics": summary.to_dataframe().astype({"layer": object}).to_dict("records"),
        },
        summary.to_dataframe,
    )


def dataset_table(summary: "DatasetAttribution", top: int) -> RenderableType:
    """The rows of the largest means with their intervals, and the model's own logit by group."""
    rows = summary.top(top, by="magnitude")
    columns = ("mean", f"{summary.confidence:.0%} interval", "same sign")
    table = _table("row", *columns, "")
    for row, bar in zip(rows, _bars([row.mean for row in rows]), strict=True):
        table.add_row(Text(row.label), *_statistics(row), bar)
    logits = _table("model's own logit", *columns, "prompts")
    frame = summary.to_dataframe()
    for line in frame[frame["label"] == "logit"].itertuples():
        logits.add_row(Text(f"{line.group}"), *_statistics(line), f"{line.n:,}")
    notes = [f"Σ|row| is {summary.gross_to_net:.1f} times |Σ row|"]
    if summary.skipped:
        index, reason = summary.skipped[0]
        notes.append(f"{len(summary.skipped):,} examples left out; example {index}: {reason}")
    if not summary.complete:
        notes.append("the run has not finished: the same `tl-dla dataset` command continues it")
    return Group(
        Text(f"{summary.n:,} prompts, {summary.model}", style="bold"),
        Text(f'the {len(rows)} largest of {len(summary)} rows, unit="{summary.unit}", logits\n'),
        *(table, Text(), logits, Text("\n" + "\n".join(notes))),
    )


def _statistics(line: Any) -> tuple[str, str, str]:
    interval = f"[{_signed(line.low)}, {_signed(line.high)}]"
    return _signed(line.mean), interval, f"{line.sign_agreement:.0%}"


# ---- the parts of tables -----------------------------------------------------------------------


def _table(*columns: str) -> Table:
    """Columns of numbers, then one to the left."""
    table = Table(box=None, pad_edge=False)
    for column in columns[:-1]:
        table.add_column(Text(column), justify="right", no_wrap=True)
    table.add_column(Text(columns[-1]))
    return table


def _bars(values: Sequence[float]) -> list[Bar]:
    """A bar for each value, from a common 0 to the right or to the left."""
    low, high = min(0.0, *values), max(0.0, *values)
    return [
        Bar(
            (high - low) or 1.0,
            min(value, 0.0) - low,
            max(value, 0.0) - low,
            width=_BAR_WIDTH,
            color="blue" if value > 0 else "red",
        )
        for value in values
    ]


def _place(result: DirectLogitAttribution | LogitLens) -> str:
    position, token = _position(result)
    return f"position {position}, {token!r}"


def _row_name(result: DirectLogitAttribution, label: str) -> str:
    """The label; for what a head moved from a source token (`L9H9←5`) with that token."""
    _, arrow, source = label.partition("←")
    if not arrow:
        return label
    return f"{label} {token_strings(result.model, result.prompts.packed[0, [int(source)]])[0]!r}"


def _position(result: DirectLogitAttribution | LogitLens) -> tuple[int, str]:
    index = result.positions.index[0, :1]
    return int(index), token_strings(result.model, result.prompts.packed[0, index])[0]


def _tokens(model: Any, ids: Any) -> list[dict[str, Any]]:
    names = token_strings(model, ids)
    return [{"id": int(i), "token": name} for i, name in zip(ids, names, strict=True)]


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for both."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.4f}"


def _mark(passed: bool) -> str:
    return "✓" if passed else "✗"

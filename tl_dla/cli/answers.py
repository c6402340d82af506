"""The answer of each subcommand: its table, its record (JSON) and its frame (CSV, Parquet)."""

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

import tl_dla.cli.tables as tables
from tl_dla.analyses.logit_lens import LogitLens
from tl_dla.attribution import DirectLogitAttribution
from tl_dla.cli.output import Output
from tl_dla.core.certificate import Reconstruction
from tl_dla.core.result import Attribution
from tl_dla.inputs.tokens import token_strings

if TYPE_CHECKING:
    import pandas as pd

    from tl_dla.analyses.answer import AnswerAttribution
    from tl_dla.analyses.check_model import ModelCheck
    from tl_dla.analyses.comparison import Comparison
    from tl_dla.datasets.summary import DatasetAttribution
    from tl_dla.effects.audit import Audit


@dataclass(frozen=True)
class Prediction:
    """What the model itself says of a token: its probability, and its rank from 0 on."""

    id: int
    token: str
    probability: float
    rank: int

    def __str__(self) -> str:
        return f"{self.token!r} {100 * self.probability:.3g}% #{self.rank}"


def attribution_output(
    result: DirectLogitAttribution,
    tokens: list[Prediction],
    audit: "Audit | None",
    args: argparse.Namespace,
) -> Output:
    """A result for one prompt at one position, for one answer or for several candidates."""
    n = len(args.candidates or [None])
    answers, others = [vars(token) for token in tokens[:n]], [vars(token) for token in tokens[n:]]
    position, token = place(result)
    own = args.answer is None and args.candidates is None
    heading = [
        f"{'logit difference' if args.incorrect else 'logit'} {_target(result, tokens, n)}",
        f'at position {position}, {token!r}, of {args.prompt!r}, unit="{result.unit}"',
        _probabilities(tokens) + " (the model's own prediction)" * own,
    ]
    columns = [repr(token.token) for token in tokens[:n]] if n > 1 else ["logits"]
    ledger = tables.Ledger.of(result, _names(result), columns)
    warning = rest_warning(result.labels, result.kinds, ledger.values)
    caution = tables.observed("--audit" if audit is None else "the audit")
    certified = tables.certified(result.reconstruction, warning, caution)
    return Output(
        lambda: tables.attribution_table(
            heading, ledger, args.top, [certified, *tables.audited(audit)]
        ),
        lambda: {
            "model": args.model,
            "prompt": args.prompt,
            "prediction": answers[0] if own else None,
            "position": position,
            "token": token,
            **({"candidates": answers} if args.candidates else {"answer": answers[0]}),
            "incorrect": "mean" if result.targets.mean_of_vocab else others,
            **rows_of(result),
            "attribution": result.attribution[:, 0].tolist(),
            "logit": result.logit[0].tolist(),
            "reconstruction": certificates(result.reconstruction),
            **({} if audit is None else _audit_record(audit)),
        },
        lambda: _with_audit(result.to_dataframe(), audit),
        warning=warning,
    )


def completion_output(
    answer: "AnswerAttribution", tokens: list[list[Prediction]], args: argparse.Namespace
) -> Output:
    """The attribution of one prompt's answer of several tokens, and of its baseline if any."""
    steps, target = answer.steps, answer.target(0)
    total = answer.reconstruction.reconstructed.nansum(-1)
    sides = [answer.steps, *[answer.baseline_steps] * bool(answer.baselines)]
    heading = [
        f"{'difference of summed logits' if args.incorrect else 'sum of logits'} {target}",
        f'after {args.prompt!r}, unit="{steps.unit}"',
        *map(_probabilities, tokens),
    ]
    ledger = tables.Ledger(
        names=answer.labels,
        values=answer.attribution,
        total=[float(total[0] - total[1:].sum())],
        logit=answer.logit.tolist(),
        columns=["logits"],
        cumulative=steps.unit == "layer",
    )
    warning = rest_warning(answer.labels, answer.kinds, answer.attribution)
    caution = tables.observed("--audit of one token")
    certified = tables.certified(answer.reconstruction, warning, caution)
    return Output(
        lambda: tables.attribution_table(heading, ledger, args.top, [certified]),
        lambda: {
            "model": args.model,
            "prompt": args.prompt,
            "answer": [vars(token) for token in tokens[0]],
            "incorrect": answer.against or [vars(token) for row in tokens[1:] for token in row],
            **rows_of(steps),
            "attribution": answer.attribution[:, 0].tolist(),
            "logit": float(answer.logit[0]),
            "steps": [
                {
                    "tokens": [token.token for token in some],
                    "attribution": side.attribution[:, 0, : len(some)].tolist(),
                    "logit": side.logit[0, : len(some)].tolist(),
                }
                for side, some in zip(sides, tokens, strict=True)
                if side is not None
            ],
            "reconstruction": certificates(answer.reconstruction),
        },
        answer.to_dataframe,
        warning=warning,
        page=answer.report,
    )


def rest_warning(labels: list[str], kinds: Any, values: Tensor) -> str:
    """How much no known part wrote, and where: a line, empty where there is no such row."""
    rest = [
        f"{label} {tables.signed(max(row, key=abs))}"
        for label, kind, row in zip(labels, kinds, values.tolist(), strict=True)
        if kind == "rest"
    ]
    return f"{', '.join(rest)}: {tables.REST}" if rest else ""


def place(result: Attribution | LogitLens) -> tuple[int, str]:
    """The position attributed, and its token."""
    index = result.positions.index[0, :1]
    return int(index), token_strings(result.model, result.prompts.packed[0, index])[0]


def _target(result: DirectLogitAttribution, tokens: list[Prediction], n: int) -> str:
    """The first n tokens are candidates, and the others what each is compared with."""
    if n == 1:
        return result.target
    names = [repr(one.token) for one in tokens]
    mean = ["mean of the vocabulary"] * result.targets.mean_of_vocab
    baseline = ", ".join(names[n:] + mean)
    several = f"mean({baseline})" if len(names) > n + 1 else baseline
    return ", ".join(names[:n]) + f", each − {several}" * bool(baseline)


def _probabilities(tokens: list[Prediction]) -> str:
    return f"probability {', '.join(map(str, tokens))}"


def _names(result: DirectLogitAttribution) -> list[str]:
    """The labels; for what a head moved from a source token (`L9H9←5`) with that token."""
    if "source" not in result.kinds:
        return result.labels
    tokens = result.to_dataframe()["source_token"][: len(result.labels)]
    return [
        f"{label} {token!r}" if isinstance(token, str) else label
        for label, token in zip(result.labels, tokens, strict=True)
    ]


def rows_of(result: "Attribution | Comparison") -> dict[str, Any]:
    """What the rows are."""
    names = ("unit", "labels", "kinds", "layers")
    return {name: getattr(result, name) for name in names}


def certificates(whole: Reconstruction) -> dict[str, Any]:
    """A certificate and those of its parts."""
    parts = {name: _certificate(part) for name, part in whole.parts.items()}
    return {**_certificate(whole), "parts": parts}


def _certificate(part: Reconstruction) -> dict[str, Any]:
    numbers = ("expected", "reconstructed", "error", "tolerance")
    return {
        "against": part.against,
        **{name: _plain(getattr(part, name)) for name in numbers},
        "passed": part.passed,
    }


def _plain(x: Tensor) -> Any:
    return float(x) if x.numel() == 1 else x.tolist()


def _audit_record(audit: "Audit") -> dict[str, Any]:
    return {"audit": audit.to_dataframe().to_dict("records"), "flags": audit.sentences}


def _with_audit(frame: "pd.DataFrame", audit: "Audit | None") -> "pd.DataFrame":
    """The rows, and for those that were audited what it found."""
    if audit is None:
        return frame
    found = audit.to_dataframe().select_dtypes("number").drop(columns="direct")
    return frame.merge(found.assign(label=audit.rows), on="label", how="left")


# ---- lens, check, dataset, summarize -----------------------------------------------------------


def lens_output(lens: LogitLens, args: argparse.Namespace) -> Output:
    """A lens on one prompt at one position."""
    position, token = place(lens)
    heading = [
        "the model's prediction, if it stopped there",
        f"at position {position}, {token!r}, of {args.prompt!r}",
        "entropy in nats; probabilities; #0 is the most likely token",
    ]
    asked = [] if lens.targets is None else token_strings(lens.model, lens.targets.ids[0, 0])
    return Output(
        lambda: tables.lens_table(heading, lens, asked),
        lambda: {
            "model": args.model,
            "prompt": args.prompt,
            "readings": lens.to_dataframe().to_dict("records"),
        },
        lens.to_dataframe,
    )


def check_output(check: "ModelCheck", args: argparse.Namespace) -> Output:
    """The identities of a model; exit code 1 where one does not hold."""
    return Output(
        lambda: tables.check_table(check, args.verbose),
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


def dataset_output(summary: "DatasetAttribution", args: argparse.Namespace) -> Output:
    """The statistics of a dataset."""
    return Output(
        lambda: tables.dataset_table(summary, args.top),
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

"""From rows to a result: the output transform, the target tokens added up, the certificate."""

import warnings
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.certificate import Reconstruction, rounding
from tl_dla.core.decomposition import Plan
from tl_dla.core.result import DirectLogitAttribution
from tl_dla.core.rows import Rows
from tl_dla.core.taps import Recording
from tl_dla.inputs.targets import Targets
from tl_dla.inputs.tokens import Positions, Prompts

OWN_LOGIT = "the model's own logit"


def finish(
    plan: Plan,
    seen: Recording,
    rows: Rows,
    ratio: Float[Tensor, "batch pos token"],
    expected: Float[Tensor, "batch pos token"],
    rounded: Float[Tensor, "batch pos token"],
    against: str,
    prompts: Prompts,
    positions: Positions,
    targets: Targets,
    path: tuple[str, ...] = (),
) -> DirectLogitAttribution:
    """The result of rows: added up over the target tokens, and certified.

    Args:
        plan: what was read.
        seen: what it showed.
        rows: the rows, before the output transform.
        ratio: the output transform, frozen.
        expected: what the rows must add up to, after the transform.
        rounded: the value that is rounded last in the model's dtype.
        against: what `expected` is, in words.
        prompts: the prompts.
        positions: the positions attributed.
        targets: the target tokens and how they are added up.
        path: the source rows that the rows split, the last one last.
    """
    weights = targets.weights.to(ratio)
    eps = max(plan.reader.eps, seen.eps)

    def added(tokens: Float[Tensor, "*row batch pos token"]) -> Float[Tensor, "..."]:
        return shaped(tokens @ weights.mT, targets, positions)

    def explained(
        size: Float[Tensor, "*part batch pos token"],
        final: Float[Tensor, "*part batch pos token"],
        values: Float[Tensor, "*part batch pos token"],
        gross: Float[Tensor, "*part batch pos token"],
    ) -> Float[Tensor, "..."]:
        scale, d = ratio.abs(), plan.logit.direction.shape[-1]
        gross = (gross * scale).sum(-1)
        tolerance = rounding(size * scale, final * scale, values, gross, weights, eps, d)
        # What overflows is explained by nothing.
        return shaped(tolerance.nan_to_num(0.0, posinf=0.0), targets, positions)

    stacked, labels, kinds = rows.values(), rows.labels, rows.kinds
    attribution = added(stacked * ratio)
    # Of the sights of the stream, the last one and the biases add up to the logit.
    end = plan.end
    ends = [label == end or kind == "bias" for label, kind in zip(labels, kinds, strict=True)]
    kept = torch.tensor([i for i, end in enumerate(ends) if end or plan.unit != "layer"])
    kept = kept.to(stacked.device)
    parts = {}
    if rows.refined:
        fields = ("value", "parts", "gross", "magnitude")
        value, total, gross, size = (
            torch.stack([getattr(part, name) for part in rows.refined]) for name in fields
        )
        tolerance = explained(2 * size, size, torch.zeros_like(size), gross)
        certified = zip(added(value * ratio), added(total * ratio), tolerance, strict=True)
        for part, (want, got, miss) in zip(rows.refined, certified, strict=True):
            name = f"{part.parts_are} of {part.label}"
            parts[name] = Reconstruction(want, got, miss, f"row {part.label}")
    reconstruction = Reconstruction(
        added(expected),
        attribution[kept].sum(0),
        explained(rows.magnitude, rows.final, rounded, stacked[kept].abs().sum(0)),
        against,
        parts,
    )
    return DirectLogitAttribution(
        attribution=attribution,
        labels=labels,
        kinds=kinds,
        layers=rows.layers,
        unit=plan.unit,
        logit=reconstruction.expected,
        reconstruction=reconstruction,
        plan=plan,
        seen=seen,
        ratio=ratio,
        prompts=prompts,
        positions=positions,
        targets=targets,
        path=path,
    )


def require(
    result: DirectLogitAttribution, cause: str, check: Literal["raise", "warn", "off"]
) -> None:
    """Raise, warn or say nothing where the certificate of a result failed."""
    if check == "raise":
        result.reconstruction.require(cause)
    elif check == "warn" and not result.reconstruction.passed:
        warnings.warn(f"{result.reconstruction}. {cause}", stacklevel=4)


def shaped(
    x: Float[Tensor, "*row batch pos candidate"], targets: Targets, positions: Positions
) -> Float[Tensor, "..."]:
    """As a result shows it: NaN where a prompt has no such position, only the axes asked for."""
    x = torch.where(positions.valid.to(x.device)[..., None], x, torch.nan)
    x = x.squeeze(-2) if positions.single else x
    return x if targets.candidates is not None else x.squeeze(-1)

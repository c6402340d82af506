"""The certificate: do the rows add up to what the model returned?

Tolerances are those of `rounding.py`. A certificate covers what it compares: the rows with the
model's own logit, and the parts of each row that was split with that row. A sum cannot see two
labels that were swapped, or two errors that cancel.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.rounding import Sizes, rounding
from tl_dla.core.rows import Rows
from tl_dla.errors import ArgumentError, ReconstructionError
from tl_dla.inputs.query import Query
from tl_dla.model.hooks import in_float64

Check = Literal["raise", "warn", "off"]


def require_check(check: str) -> None:
    """Raise `ArgumentError` unless it is one of the three."""
    if check not in get_args(Check):
        raise ArgumentError(f'check must be "raise", "warn" or "off"; {check!r} was given.')


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Rows added up, against the value that they split, at every position attributed, in logits.

    Attributes:
        expected: the model's own logit (or the row that is split), `[*batch_and_pos]`.
        reconstructed: what the rows add up to, `[*batch_and_pos]`.
        tolerance: what rounding can explain (see the module), `[*batch_and_pos]`; NaN where a
            prompt has no such position.
        against: what `expected` is, in words.
        parts: the certificates of rows that others split (a layer's heads against its `attn_out`).
        unexplained: the largest absolute value of each `_rest` row: what no known part wrote.
        unchecked: what could not be checked of a given cache, in words.
        claim: what is certified, in words.
        splits: what else is, of the rows that others split, in words.
    """

    expected: Float[Tensor, "..."]
    reconstructed: Float[Tensor, "..."]
    tolerance: Float[Tensor, "..."]
    against: str = "the model's own logit"
    parts: dict[str, "Reconstruction"] = field(default_factory=dict)
    unexplained: dict[str, float] = field(default_factory=dict)
    unchecked: tuple[str, ...] = ()
    claim: str = "rows add up to"
    splits: tuple[str, ...] = ()
    stacked: "Reconstruction | None" = field(default=None, repr=False)  # the parts, in one

    def __post_init__(self) -> None:
        if not self.expected.shape == self.reconstructed.shape == self.tolerance.shape:
            raise ReconstructionError(
                f"The rows add up to shape {tuple(self.reconstructed.shape)}, but {self.against}"
                f" has {tuple(self.expected.shape)}: nothing was certified."
            )

    def map(
        self, f: Callable[[Tensor], Tensor], rests: Mapping[str, Float[Tensor, "..."]]
    ) -> "Reconstruction":
        """The certificate of a part of the result, or of its mean.

        Args:
            f: gives it, of tensors with an axis before those of the result.
            rests: the `_rest` rows of that part.
        """

        def mapped(one: Reconstruction) -> Reconstruction:
            sums = (one.expected, one.reconstructed, one.tolerance)
            expected, reconstructed, tolerance = (f(x[None])[0] for x in sums)
            return replace(one, expected=expected, reconstructed=reconstructed, tolerance=tolerance)

        parts, own = {name: mapped(part) for name, part in self.parts.items()}, mapped(self)
        left = unexplained(rests, own.tolerance)
        return replace(own, parts=parts, unexplained=left, stacked=None)

    @property
    def error(self) -> Float[Tensor, "..."]:
        """|reconstructed - expected|, infinite where either is no number.

        0 where a prompt has no such position.
        """
        error = (self.reconstructed - self.expected).abs().nan_to_num(torch.inf, posinf=torch.inf)
        return torch.where(self.tolerance.isnan(), 0.0, error)

    @property
    def max_error(self) -> float:
        """The largest error."""
        return float(self.error.max()) if self.error.numel() else 0.0

    @property
    def relative_error(self) -> float:
        """The largest error over the largest absolute expected value."""
        largest = float(self.expected.abs().nan_to_num(0.0).max())
        return self.max_error / largest if largest else self.max_error

    @property
    def marked(self) -> str:
        """In words, after a mark that says whether it passed."""
        return f"{'✓' if self.passed else '✗'} {self}"

    @property
    def passed(self) -> bool:
        """Whether every error, here and in the parts, is one that rounding can explain.

        Nothing at all is no proof: an empty result never passes.
        """
        within = bool((self.error <= self.tolerance.nan_to_num(0.0)).all())
        within = within and bool((~self.tolerance.isnan()).any())
        parts = self.parts.values() if self.stacked is None else [self.stacked]
        return within and all(part.passed for part in parts)

    def __str__(self) -> str:
        if self.tolerance.numel() and bool(self.tolerance.isnan().all()):
            return "not certified: there is no logit of a model to hold the rows to"
        worst = self.failures()
        if worst:
            name, part = worst[0]
            return (
                f"FAILED: {name} miss {part.against} by {part.max_error:.3g}"
                f" (rounding allows {part._tolerance_at_worst():.1g})"
            )
        error = self._overall_error()
        close = (
            f"error {error:.1g}, rounding allows {self._tolerance_at_worst():.1g}"
            if error
            else "to the last digit"
        )
        claims = ", ".join([f"{self.claim} {self.against}", *self.splits])
        return "; ".join([f"{claims}: {close}", *self.remarks])

    @property
    def remarks(self) -> list[str]:
        """What stands beside "passed": rows that nothing explains, and what was not checked."""
        rests = [
            f"{label} holds up to {value:.3g} that no known part wrote (check_model shows where)"
            for label, value in self.unexplained.items()
        ]
        return [*rests, *self.unchecked]

    def failures(self) -> list[tuple[str, "Reconstruction"]]:
        """The certificates that fail, the whole first."""
        if self.passed:
            return []
        whole = Reconstruction(self.expected, self.reconstructed, self.tolerance, self.against)
        claimed = self.claim.removesuffix(" add up to")
        name = f"the {claimed}" if " " not in claimed else re.sub(" (is|are)$", "", claimed)
        named = [(name, whole), *self.parts.items()]
        return [(name, part) for name, part in named if not part.passed]

    def _overall_error(self) -> float:
        return max([self.max_error, *(part.max_error for part in self.parts.values())])

    def _tolerance_at_worst(self) -> float:
        excess = (self.error - self.tolerance).flatten().nan_to_num(-torch.inf)
        return float(self.tolerance.flatten()[excess.argmax()]) if excess.numel() else 0.0

    def raise_or_warn(self, check: Check, cause: str) -> None:
        """Raise, warn or say nothing where the certificate failed.

        Raises:
            ReconstructionError: with the size of the miss, where it is and its likeliest cause.
        """
        failures = self.failures()
        if check == "off" or not failures:
            return
        if check == "warn":
            warnings.warn(f"{self}. {cause}", stacklevel=5)
            return
        name, part = failures[0]
        if not part.error.numel():
            raise ReconstructionError(f"There is no value to certify. {cause}")
        excess = (part.error - part.tolerance).nan_to_num(-torch.inf)
        where = torch.unravel_index(excess.argmax(), part.error.shape) if part.error.ndim else ()
        place = [int(i) for i in where]
        at = f" at [batch, pos] index {place}" if place else ""
        got, want = part.reconstructed[tuple(place)], part.expected[tuple(place)]
        if bool(want.isnan()):
            raise ReconstructionError(
                f"{part.against[0].upper()}{part.against[1:]} is NaN{at}: the model's own forward"
                " pass broke down there (overflow in half precision, or a weight that is NaN)."
            )
        raise ReconstructionError(
            f"{name[0].upper()}{name[1:]} add up to {float(got):.6g}, but {part.against} is"
            f" {float(want):.6g}{at}: a miss of {part.max_error:.3g}, where rounding allows"
            f" {part._tolerance_at_worst():.1g}. {cause}"
        )


_SPLITS = {
    "the heads": "each layer's heads to its attn_out",
    "the neurons": "each layer's neurons to its mlp_out",
    "the experts": "each layer's experts to its mlp_out",
    "the source tokens": "each head's source tokens to its row",
    "the latents": "each dictionary's latents, b_dec and error to what they explain",
}


@dataclass(frozen=True, eq=False)
class Wanted:
    """What rows must add up to.

    Attributes:
        value: after the output transform.
        rounded: what the model rounds last in its own dtype.
        against: what the value is, in words.
        machine_eps: of the narrowest dtype on the way.
        unchecked: what could not be checked of a given cache, in words.
    """

    value: Float[Tensor, "batch pos token"]
    rounded: Float[Tensor, "batch pos token"]
    against: str
    machine_eps: float
    unchecked: tuple[str, ...] = ()


def certify(
    rows: Rows, kept: slice | list[int], wanted: Wanted, query: Query, d: int
) -> Reconstruction:
    """The rows `kept` against what is wanted, and every split against its row.

    Args:
        rows: before the output transform.
        kept: which of them add up.
        wanted: what they add up to.
        query: how the target tokens are added up.
        d: the length of the dot products.
    """
    targets, scale = query.targets, rows.ratio.abs()

    def added(tokens: Float[Tensor, "*row batch pos token"]) -> Float[Tensor, "..."]:
        return query.shaped(targets.added(tokens * rows.ratio))

    def tolerance(sizes: Sizes) -> Float[Tensor, "..."]:
        allowed = rounding(sizes, targets.weights, wanted.machine_eps, d).to(rows.ratio)
        # What overflows is explained by nothing.
        return query.shaped(allowed.nan_to_num(0.0, posinf=0.0))

    readout_norm = rows.readout_norm
    parts: dict[str, Reconstruction] = {}
    stacked = None
    if rows.checks:
        value, total, abs_sum, size = (
            torch.stack([getattr(check, name) for check in rows.checks])
            for name in ("value", "parts", "abs_sum", "readout_norm")
        )
        sizes = Sizes(2 * size * scale, size * scale, torch.zeros_like(size), abs_sum * scale)
        stacked = Reconstruction(added(value), added(total), tolerance(sizes))
        certified = zip(stacked.expected, stacked.reconstructed, stacked.tolerance, strict=True)
        for check, (want, got, miss) in zip(rows.checks, certified, strict=True):
            name = f"{check.parts_are} of {check.key.label}"
            parts[name] = Reconstruction(want, got, miss, f"row {check.key.label}")
        # The model rounded each of these rows when it added their parts.
        squares = in_float64(torch.cat([readout_norm[None], size])).square()
        readout_norm = squares.sum(0).sqrt().to(scale)
    values = rows.values[kept]
    sizes = Sizes(
        readout_norm * scale,
        rows.final_norm * scale,
        wanted.rounded,
        values.abs().sum(0) * scale,
    )
    allowed = tolerance(sizes)
    rests = {key.label: added(rows.values[i]) for key, i in rows.of_kind("rest")}
    return Reconstruction(
        query.shaped(targets.added(wanted.value)),
        added(values.sum(0)),
        allowed,
        wanted.against,
        parts,
        unexplained(rests, allowed),
        wanted.unchecked,
        splits=tuple(dict.fromkeys(_SPLITS[check.parts_are] for check in rows.checks)),
        stacked=stacked,
    )


def unexplained(
    rests: Mapping[str, Float[Tensor, "..."]], allowed: Float[Tensor, "..."]
) -> dict[str, float]:
    """The `_rest` rows that are more than rounding, at their largest."""
    sizes = {label: rest.abs() for label, rest in rests.items()}
    return {
        label: float(size.nan_to_num(0.0).max())
        for label, size in sizes.items()
        if bool((size > allowed).any())
    }

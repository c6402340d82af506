"""The certificate: do the rows add up to what the model returned?

What rounding can explain is derived, not chosen. With ε the machine epsilon of a dtype, rounding a
number x to it makes an error that is uniform in ±ε|x|/2, of standard deviation ε|x|/√12.

* The model's own forward pass, in its dtype. Adding a write to the stream rounds every coordinate,
  and the readout w carries the errors to the logit: standard deviation (ε/√12)·‖x ⊙ w‖/s for each
  addition (`magnitude` below is the root of the sum of the squares over all of them), the same
  again twice in the final norm, and ε|logit|/√12 where the logit itself is rounded.
* The contractions, here and in the model, in at least float32: ε₃₂·√d·‖x ⊙ w‖/s for a dot product
  of d terms, and ε₃₂ times the sum of the rows' absolute values for adding them up.

Six standard deviations are allowed: chance alone exceeds them once in 500 million. A component
that is left out is caught as soon as its row is larger than that.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.errors import ReconstructionError

SIGMAS = 6.0
_UNIFORM = 12.0**-0.5


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Rows added up, against the value that they refine, at every position attributed, in logits.

    Attributes:
        expected: the model's own logit (or the refined row), `[*batch_and_pos]`.
        reconstructed: what the rows add up to, `[*batch_and_pos]`.
        tolerance: what rounding can explain (see the module), `[*batch_and_pos]`; NaN where a
            prompt has no such position.
        against: what `expected` is, in words.
        parts: the certificates of refined rows (the heads of a layer against its `attn_out`).
    """

    expected: Float[Tensor, "..."]
    reconstructed: Float[Tensor, "..."]
    tolerance: Float[Tensor, "..."]
    against: str = "the model's own logit"
    parts: dict[str, "Reconstruction"] = field(default_factory=dict)

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
    def passed(self) -> bool:
        """Whether every error, here and in the parts, is one that rounding can explain."""
        within = bool((self.error <= self.tolerance.nan_to_num(0.0)).all())
        return within and all(part.passed for part in self.parts.values())

    def __str__(self) -> str:
        worst = self.failures()
        if worst:
            name, part = worst[0]
            return (
                f"FAILED: {name} miss {part.against} by {part.max_error:.3g}"
                f" (rounding explains {part._tolerance_at_worst():.1g})"
            )
        parts = f", and {len(self.parts)} refined rows," if self.parts else ""
        error = self._overall_error()
        if not error:
            return f"rows add up to {self.against}{parts} to the last digit"
        return (
            f"rows add up to {self.against}{parts} within {error:.1g}"
            f" (rounding explains {self._tolerance_at_worst():.1g})"
        )

    def failures(self) -> list[tuple[str, "Reconstruction"]]:
        """The certificates that fail, the whole first."""
        whole = Reconstruction(self.expected, self.reconstructed, self.tolerance, self.against)
        named = [("the rows", whole), *self.parts.items()]
        return [(name, part) for name, part in named if not part.passed]

    def _overall_error(self) -> float:
        return max([self.max_error, *(part.max_error for part in self.parts.values())])

    def _tolerance_at_worst(self) -> float:
        excess = (self.error - self.tolerance).flatten().nan_to_num(-torch.inf)
        return float(self.tolerance.flatten()[excess.argmax()]) if excess.numel() else 0.0

    def require(self, cause: str) -> None:
        """Raise `ReconstructionError` unless the certificate passed.

        It says the size of the miss, where it is and its likeliest cause.
        """
        failures = self.failures()
        if not failures:
            return
        name, part = failures[0]
        excess = (part.error - part.tolerance).nan_to_num(-torch.inf)
        where = torch.unravel_index(excess.argmax(), part.error.shape) if part.error.ndim else ()
        place = [int(i) for i in where]
        at = f" at [batch, pos] index {place}" if place else ""
        got, want = part.reconstructed[tuple(place)], part.expected[tuple(place)]
        raise ReconstructionError(
            f"{name[0].upper()}{name[1:]} add up to {float(got):.6g}, but {part.against} is"
            f" {float(want):.6g}{at}: a miss of {part.max_error:.3g}, where rounding explains"
            f" {part._tolerance_at_worst():.1g}. {cause}"
        )


def rounding(
    magnitude: Float[Tensor, "*part batch pos token"],
    final: Float[Tensor, "*part batch pos token"],
    logits: Float[Tensor, "*part batch pos token"],
    rows: Float[Tensor, "*part batch pos"],
    weights: Float[Tensor, "candidate token"],
    eps: float,
    d: int,
) -> Float[Tensor, "*part batch pos candidate"]:
    """What rounding can explain, by the derivation in this module's docstring.

    Args:
        magnitude: root of the sum over additions of (‖x ⊙ w‖/s)², per target token.
        final: ‖x ⊙ w‖/s at the place that is read.
        logits: the target tokens' values.
        rows: the sum of the rows' absolute values.
        weights: how the tokens are added up.
        eps: machine epsilon of the narrowest dtype in the model's forward pass.
        d: the length of the dot products.
    """
    eps_compute = min(eps, torch.finfo(torch.float32).eps)
    forward = eps * _UNIFORM * (magnitude.square() + 2 * final.square() + logits.square()).sqrt()
    dots = eps_compute * d**0.5 * final
    variance = (forward.square() + dots.square()) @ weights.to(forward).square().mT
    return SIGMAS * variance.sqrt() + eps_compute * rows[..., None]

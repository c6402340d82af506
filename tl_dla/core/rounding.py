"""What rounding can explain: every tolerance of the package, derived once.

With ε the machine epsilon of a dtype, rounding a
number x to it makes an error that is uniform in ±ε|x|/2, of standard deviation ε|x|/√12.

* The model's own forward pass, in its dtype. Adding a write to the stream rounds every coordinate,
  and the readout w carries the errors to the logit: standard deviation (ε/√12)·‖x ⊙ w‖/s for each
  addition (`readout_norm` below is the root of the sum of the squares over all of them), the same
  again twice in the final norm, and ε|logit|/√12 where the logit itself is rounded. A row that
  others split was itself rounded when the model added its parts: once more for each.
* The contractions, here and in the model, in at least float32: ε₃₂·√d·‖x ⊙ w‖/s for a dot product
  of d terms, and ε₃₂ times the sum of the rows' absolute values for adding them up.

An attention score (`score_sizes`) is rounded as a logit is, and so is every step from the stream to
its query and key (`Frozen.felt`). The log of an attention weight p carries the relative error of p
itself, ε or what is left of it below the smallest normal number, and the absolute error of what was
exponentiated, which is at most |log p|.

Six standard deviations are allowed: chance alone exceeds them once in 500 million. A component
that is left out is caught as soon as its row is larger than that.

Where whole vectors are compared (`check_model`, an embedding that is rescaled), 4 ε of the vector's
length are allowed, and 32 ε₃₂ for contractions; where logits are computed again by the model's own
final norm and unembedding (the lens), √ε of the largest one: rounding makes 1e-6 and 1e-2 of it in
float32 and bfloat16, a norm, multiplier or soft cap that is left out 0.1 and more.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_dla.model.hooks import in_float64

SIGMAS = 6.0
EPS32 = torch.finfo(torch.float32).eps
_UNIFORM = 12.0**-0.5
_ROUNDINGS, _CONTRACTIONS = 4.0, 32.0


@dataclass(frozen=True, eq=False)
class Sizes:
    """What rounding is measured by, before the output transform.

    Attributes:
        readout_norm: root of the sum over additions of (‖x ⊙ w‖/s)², per target token.
        final_norm: ‖x ⊙ w‖/s at the place that is read.
        logits: the target tokens' values.
        abs_sum: the sum of the rows' absolute values.
    """

    readout_norm: Float[Tensor, "*part batch pos token"]
    final_norm: Float[Tensor, "*part batch pos token"]
    logits: Float[Tensor, "*part batch pos token"]
    abs_sum: Float[Tensor, "*part batch pos token"]


def rounding(
    sizes: Sizes, weights: Float[Tensor, "candidate token"] | None, machine_eps: float, d: int
) -> Float[Tensor, "*part batch pos candidate"]:
    """What rounding can explain, by the derivation in this module's docstring.

    Args:
        sizes: what it is measured by.
        weights: how the tokens are added up; None where they are not.
        machine_eps: that of the narrowest dtype in the model's forward pass.
        d: the length of the dot products.
    """
    # In float64, where the square of a tiny path does not underflow.
    added, final, logits, abs_sum = map(in_float64, vars(sizes).values())
    eps = min(machine_eps, EPS32)
    forward = (
        machine_eps * _UNIFORM * (added.square() + 2 * final.square() + logits.square()).sqrt()
    )
    dots = eps * d**0.5 * final
    variance = forward.square() + dots.square()
    if weights is not None:
        variance = variance @ weights.to(variance).square().mT
        abs_sum = abs_sum @ weights.to(abs_sum).abs().mT
    return SIGMAS * variance.sqrt() + eps * abs_sum


def narrower_rounding(eps: float, d: int) -> float:
    """Both of those of a dtype that the machine epsilon of the model does not cover.

    In units of ε‖x ⊙ w‖/s: one rounding, and a dot product of d terms in at least float32.
    """
    return float((eps**2 + (min(eps, EPS32) / _UNIFORM) ** 2 * d) ** 0.5)


def score_sizes(
    scores: Float[Tensor, "batch key"], paid: Float[Tensor, "batch key"], dtype: torch.dtype
) -> Float[Tensor, " batch"]:
    """What rounding is measured by in the log of a ratio of attention, or in a score.

    Args:
        scores: of each key; rounded after the product, the scale, the bias and the cap.
        paid: the attention to each key; 1 where a score is read before its softmax.
        dtype: that the attention is rounded to.
    """
    exact = in_float64(paid)
    relative = (torch.finfo(dtype).tiny / exact).clamp(min=1.0) * (exact != 1)
    parts = [2 * in_float64(scores), exact.log(), relative]
    return torch.cat(parts, 1).norm(dim=1).to(scores)


def explained_by_rounding(
    rest: Float[Tensor, "block batch pos token"],
    size: Float[Tensor, "block batch pos token"],
    abs_sum: Float[Tensor, "block batch pos token"],
    machine_eps: float,
    d: int,
) -> Bool[Tensor, "block batch pos token"]:
    """Whether what the writes of a block miss is no more than rounding leaves."""
    allowed = SIGMAS * machine_eps * _UNIFORM * size
    return rest.abs() <= allowed + 4 * torch.finfo(rest.dtype).eps * (abs_sum + size * d**0.5)


def is_multiple(
    embed: Float[Tensor, "batch pos d_model"],
    start: Float[Tensor, "batch pos d_model"],
    machine_eps: float,
) -> bool:
    """Whether the stream starts as the token embedding times a number at each position.

    An embedding multiplier does this, or a norm without weights: seen in the vectors themselves.
    """
    ratio = (start * embed).sum(-1, keepdim=True) / embed.square().sum(-1, keepdim=True)
    miss = (start - ratio * embed).norm(dim=-1)
    return bool((miss <= vector_tolerance(machine_eps) * start.norm(dim=-1)).all())


def vector_tolerance(machine_eps: float, dtype: torch.dtype = torch.float32) -> float:
    """How far two vectors may be apart that should be equal, over the length of one."""
    contraction = max(torch.finfo(dtype).eps, machine_eps if dtype == torch.float64 else 0.0)
    return _ROUNDINGS * machine_eps + _CONTRACTIONS * contraction


def recomputed_tolerance(machine_eps: float) -> float:
    """How far logits computed again from the final stream may be off, over ‖x ⊙ w‖/s + |logit|."""
    return 64 * machine_eps


def rerun_tolerance(machine_eps: float) -> float:
    """How far a logit may be off in another run of its prompt, over ‖x ⊙ w‖/s of all additions."""
    return SIGMAS * max(machine_eps, 4 * EPS32 * (machine_eps > 1e-12))


def logits_tolerance(machine_eps: float) -> float:
    """How far logits read by the model's own modules may be off, over the largest of them."""
    return machine_eps**0.5

"""`direct_effect_recomputed`: a row's direct effect when the final norm may rescale.

A row of direct logit attribution is read at the final norm's scale of the whole stream. Take what
the row wrote, c, out of the final residual stream x, and the norm rescales what is left:

    direct, frozen      logit(x) − logit of x − c, the scale kept
    direct, recomputed  logit(x) − logit of x − c, the scale that of x − c

Both leave everything before the final norm as it was. The second needs no forward pass: with ⟨,⟩
the dot product over d_model (of the centred vectors for LayerNorm),

    s(x − c)² = (⟨x, x⟩ − 2⟨x, c⟩ + ⟨c, c⟩) / d_model + ε

and the raw logit of x − c is that of x less that of c, both over the new scale. Biases, a logit
multiplier and a soft cap are applied to the recomputed logits themselves. In logits; rows no
longer add up, which is the price of not holding the scale fixed. The exact direct effect of
Baroni et al. 2025 (https://arxiv.org/abs/2507.02559), who measure how far the frozen one is
from it.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.decomposition import B_U, LN_FINAL_B, of_query
from tl_dla.core.labelled import require_direct
from tl_dla.core.result import Attribution
from tl_dla.core.rounding import recomputed_tolerance
from tl_dla.core.rows import RowKey
from tl_dla.core.run import again
from tl_dla.core.vectors import ResidualStack, stack_of, vectors_of
from tl_dla.effects.interventions import added_up
from tl_dla.errors import ArgumentError, UnsupportedModelError
from tl_dla.inputs.selection import Selection
from tl_dla.model.hooks import in_float64, where_float64
from tl_dla.model.reader import ModelReader
from tl_dla.model.unembedding import is_linear, output_transform


def direct_effect_recomputed(
    result: Attribution, stack: ResidualStack | None = None
) -> Float[Tensor, " row *batch_and_pos"]:
    """The change of the logit when each row is taken out of the stream and the final norm rescales.

    Beside `result.attribution`, which holds the norm's scale fixed.

    Args:
        result: an attribution with `unit="component"` or `"head"`.
        stack: what the rows wrote, where it is at hand (`decompose` of the same run, at the same
            positions); nothing is run then. Without it the model runs once.

    Returns:
        `[row, *batch_and_pos]` in logits, in the order of `result.labels`: positive where the row
        raises the logit. NaN for a `_rest` row that is rounding as a vector.

    Raises:
        ArgumentError: for another unit, or a stack whose rows are not those of the result.
        UnsupportedModelError: where the model's output transform cannot be applied again.

    Example:
        >>> from tl_dla import direct_logit_attribution, load_model
        >>> result = direct_logit_attribution(
        ...     load_model("demo"), "The Eiffel Tower is in the city of", " Paris", unit="head"
        ... )
        >>> gap = direct_effect_recomputed(result) - result.attribution
        >>> gap.shape == result.attribution.shape
        True
    """
    require_direct(result)
    stack = written(result) if stack is None else stack
    rows = {label: i for i, label in enumerate(stack.labels)}
    final = FinalLogits(result, stack)
    values = []
    for label, kind in zip(result.labels, result.kinds, strict=True):
        if label in rows:
            values.append(final.effect_of(stack.vectors[rows[label]]))
        elif label in ("ln_final.b", "b_U"):
            values.append(final.effect_of_bias(label))
        elif kind == "rest":
            values.append(torch.full_like(result.logit, torch.nan))
        else:
            raise ArgumentError(
                f"The stack lacks row {label!r} of the result: decompose the same run with"
                f' unit="{result.unit}".'
            )
    return torch.stack(values)


def written(result: Attribution) -> ResidualStack:
    """What each row of the result wrote at the attributed positions, by one forward pass."""
    if result.unit not in ("component", "head"):
        raise ArgumentError(
            f'What rows wrote is known for unit="component" and unit="head", not for'
            f' "{result.unit}": attribute with one of them. (Neurons can be ablated all the same:'
            " see ablate and self_repair.)"
        )
    parts = vectors_of(ModelReader(result.model), result.unit, result.selection)
    once = again(result, taps=parts.taps)
    return stack_of(parts, once.kept, result.positions)


class FinalLogits:
    """The target tokens' logits of a final residual stream, before and after taking a row out.

    Dot products are in float64: a row may be nearly all of the stream, and what is left small.
    """

    def __init__(self, result: Attribution, stack: ResidualStack) -> None:
        self.result, self.reader = result, ModelReader(result.model)
        self._require_linear_mean()
        self.parts = of_query(result.query, "component", Selection())
        self.norm = self.reader.stream().norm
        x = where_float64(stack.vectors).sum(0, dtype=torch.float64)
        x = self.result.positions.unsqueeze(x)
        readout = self.parts.readout
        self.readout = replace(readout, direction=in_float64(readout.direction).to(x))
        self.x, self.x_w = self._kept(x), self.readout.contract(x)
        self.constant = sum((self._bias(key) for key in (LN_FINAL_B, B_U)), 0.0)
        self.raw = self.x_w / self._scale(None)[..., None] + self.constant
        self._require_transform()

    def effect_of(
        self, vector: Float[Tensor, "*batch_and_pos d_model"]
    ) -> Float[Tensor, "*batch_and_pos"]:
        """The logit, less that of the stream without this vector, the norm rescaling."""
        c = self.result.positions.unsqueeze(in_float64(vector))
        left = (self.x_w - self.readout.contract(c)) / self._scale(self._kept(c))[..., None]
        return self._change(left + self.constant)

    def effect_of_bias(self, label: str) -> Float[Tensor, "*batch_and_pos"]:
        """The same for `ln_final.b` and `b_U`, which are not in the stream."""
        [key] = [key for key in (LN_FINAL_B, B_U) if key.label == label]
        return self._change(self.raw - self._bias(key))

    def _change(self, raw: Float[Tensor, "batch pos token"]) -> Float[Tensor, "*batch_and_pos"]:
        model = self.result.model
        change = output_transform(model, self.raw) - output_transform(model, raw)
        return added_up(self.result, change).to(self.result.attribution)

    def _scale(
        self, without: Float[Tensor, "batch pos d_model"] | None
    ) -> Float[Tensor, "batch pos"]:
        """The norm's scale of the stream, or of the stream without a vector."""
        if self.norm is None:
            return torch.ones_like(self.x[..., 0])
        square = self.x.square().sum(-1)
        if without is not None:
            square = square - 2 * (self.x * without).sum(-1) + without.square().sum(-1)
        return (square.clamp(min=0.0) / self.x.shape[-1] + self.norm.norm_eps).sqrt()

    def _kept(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The part of a vector that the norm sees."""
        x = in_float64(x)
        centred = self.norm is not None and self.norm.centred
        return x - x.mean(-1, keepdim=True) if centred else x

    def _bias(self, key: RowKey) -> Float[Tensor, "batch pos token"]:
        bias = dict(self.parts.constants).get(key)
        if bias is None:
            return torch.zeros_like(self.x_w)
        return in_float64(bias).to(self.x_w).expand_as(self.x_w)

    def _require_linear_mean(self) -> None:
        if self.result.targets.mean_of_vocab and not is_linear(self.result.model):
            raise UnsupportedModelError(
                "This model caps its logits, and the mean of capped logits cannot be recomputed"
                ' from the target tokens: give incorrect_tokens in place of "mean".'
            )

    def _require_transform(self) -> None:
        """The logits as they are known here must be those that the model returned."""
        numbers = self.result.numbers
        if not numbers.ran:
            return
        logits = output_transform(self.result.model, self.raw)
        # What rounding in the model's dtype can do to a dot product of this size, many times over.
        size = (self.x[..., None, :] * self.readout.direction).norm(dim=-1)
        returned = numbers.logits.to(logits)
        size = size / self._scale(None)[..., None] + returned.abs()
        size = size.amax(-1, keepdim=True)  # the mean of a centred vocabulary is itself rounding
        allowed = recomputed_tolerance(self.reader.machine_eps) * size
        miss = (logits - returned).abs()
        if bool((miss > allowed)[self.result.positions.valid.to(miss.device)].any()):
            raise UnsupportedModelError(
                "The logits recomputed from the final residual stream miss those that"
                f" {self.reader.architecture} returned by {float(miss.max()):.3g}: its weights were"
                " edited since, or it does something to its logits that is not understood, so a"
                " rescaled logit cannot be had."
            )

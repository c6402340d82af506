"""`self_repair`: what the rest of the model gives back when a row is ablated.

Ablate a row and the logit changes by less, or more, than the row: later heads and MLPs read the
changed stream, and the final norm rescales what is left. With every row read at the clean run's
final scale s, and s' the ablated run's,

    logit' − logit  =  − direct                              the row itself
                       + Σ over the other rows  r'·s'/s − r    what they write instead, read at s
                       + Σ over all rows  r' − r'·s'/s         the final norm's rescaling
                       + softcap                             how the cap's ratio moves

which is exact, since the rows of both runs add up to their logits. Self-repair is everything but
the first line: repair = (logit' − logit) + direct = direct − total = −indirect. Positive repair of
a positive row means that its loss is made good; a share above 1 overcorrects. In logits.

Defined as in Rushing and Nanda 2024 (https://arxiv.org/abs/2402.15390), who call the norm's part
LayerNorm self-repair; see also McGrath et al. 2023 (https://arxiv.org/abs/2307.15771).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.decomposition import B_U, LN_FINAL_B
from tl_dla.core.numbers import Numbers
from tl_dla.core.ranking import ranked
from tl_dla.core.result import Attribution
from tl_dla.core.rows import RowKey
from tl_dla.effects.interventions import Group, ablate, added_up, name_groups
from tl_dla.effects.substitutes import Ablation, At
from tl_dla.inputs.models import on_device
from tl_dla.model.stream import Kind

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_ATTENTION = ("head", "attn", "ssm", "source")
_MLPS = ("mlp", "neuron", "neurons", "expert")
_PARTS = ["direct", "total", "repair", "attention", "mlps", "other", "norm", "softcap"]
_THROUGH = {
    "attention": "through attention",
    "mlps": "through MLPs",
    "other": "through other rows",
    "norm": "through the final norm",
    "softcap": "through the soft cap",
}


@dataclass(frozen=True, eq=False, repr=False)
class SelfRepair:
    """Where the difference between a row and the effect of ablating it comes from, in logits.

    Attributes:
        name: the row, or rows, ablated.
        direct: the row's direct effect, `[*batch_and_pos]`.
        total: logit − logit of the ablated run, `[*batch_and_pos]`.
        change: what each other row writes more in the ablated run, read at the clean run's final
            scale, `[row, *batch_and_pos]`.
        labels, kinds: of the rows of `change`.
        norm: what the final norm's new scale adds, `[*batch_and_pos]`.
        softcap: what the soft cap's new ratio adds, `[*batch_and_pos]`.
    """

    name: str
    direct: Float[Tensor, "*batch_and_pos"]
    total: Float[Tensor, "*batch_and_pos"]
    change: Float[Tensor, " row *batch_and_pos"]
    labels: list[str]
    kinds: list[Kind]
    norm: Float[Tensor, "*batch_and_pos"]
    softcap: Float[Tensor, "*batch_and_pos"]

    @property
    def repair(self) -> Float[Tensor, "*batch_and_pos"]:
        """Everything that is given back: direct − total."""
        return self.direct - self.total

    @property
    def attention(self) -> Float[Tensor, "*batch_and_pos"]:
        """What other heads (or attention layers, or mixers) give back."""
        return self._of(_ATTENTION)

    @property
    def mlps(self) -> Float[Tensor, "*batch_and_pos"]:
        """What MLPs give back."""
        return self._of(_MLPS)

    @property
    def other(self) -> Float[Tensor, "*batch_and_pos"]:
        """What biases behind a rescaled post-norm and unexplained rows give back."""
        return self.change.sum(0) - self.attention - self.mlps

    @property
    def share(self) -> Float[Tensor, "*batch_and_pos"]:
        """Over direct: 0 for none, 1 for all of it, above 1 for more than all."""
        return self.repair / self.direct

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The k rows that change most, as `(label, mean change)`, largest first."""
        return ranked(self.change, self.labels, k, "magnitude", largest=True)

    def to_dataframe(self) -> "pd.DataFrame":
        """One line per part, as means over prompts and positions.

        Columns: `part`, `logits` and `share` (of the direct effect). The parts from `attention` to
        `softcap` add up to `repair`.
        """
        import pandas as pd

        logits = [float(getattr(self, part).nanmean()) for part in _PARTS]
        share = [value / logits[0] for value in logits]
        return pd.DataFrame({"part": _PARTS, "logits": logits, "share": share})

    def plot(
        self, *, title: str | None = None, width: int | None = None, height: int | None = None
    ) -> "go.Figure":
        """Steps from the direct effect, through every later part, to the total effect.

        Means over prompts and positions, in logits. A step is what its part gives back with the
        sign turned: repair of a positive row goes to the left. Parts of nothing are left out.
        """
        from tl_dla.figures import effects
        from tl_dla.figures.charts import Heading, Look
        from tl_dla.figures.text import safe

        means = {name: float(getattr(self, name).nanmean()) for name in _PARTS}
        parts = {"direct effect": means["direct"]}
        least = 1e-5 * max(map(abs, means.values()))
        parts |= {
            words: -means[part] for part, words in _THROUGH.items() if abs(means[part]) > least
        }
        heading = Heading(
            f"From the direct effect of {safe(self.name)} to its total one",
            "what later parts make of its ablation; mean over prompts and positions",
        )
        return effects.repair(parts, means["total"], heading, Look(title, width, height))

    def _of(self, kinds: tuple[str, ...]) -> Tensor:
        rows = [i for i, kind in enumerate(self.kinds) if kind in kinds]
        return self.change[rows].sum(0)

    def __repr__(self) -> str:
        """The parts, as means over prompts and positions."""
        lines = [f"SelfRepair of {self.name} (logits, mean over prompts and positions)"]
        for part, logits, share in self.to_dataframe().itertuples(index=False):
            lines.append(f"  {part:>9}  {logits:+9.4f}  {share:+8.1%} of direct")
        changes = ", ".join(f"{label} {value:+.3f}" for label, value in self.top(4))
        return "\n".join([*lines, f"  most changed: {changes}"])


def self_repair(
    result: Attribution,
    rows: Group,
    *,
    ablation: Ablation = "zero",
    at: At = "position",
    reference: Any = None,
) -> SelfRepair:
    """What the rest of the model gives back when a row (or several, together) is ablated.

    Args:
        result: the attribution; with `unit="head"`, repair is told head by head.
        rows: a label, or a list of labels ablated together.
        ablation: as in `ablate`.
        at: as in `ablate`.
        reference: as in `ablate`.

    Returns:
        A `SelfRepair`, whose parts add up to the measured difference.

    Raises:
        ArgumentError, ReconstructionError: as in `ablate`.

    Example:
        >>> from tl_dla import direct_logit_attribution, load_model
        >>> result = direct_logit_attribution(
        ...     load_model("demo"), "The Eiffel Tower is in the city of", " Paris", unit="head"
        ... )
        >>> repair = self_repair(result, "L0H1")
        >>> given_back = repair.attention + repair.mlps + repair.other + repair.norm
        >>> bool((given_back - repair.repair).abs().max() < 1e-3)
        True
    """
    ((name, labels),) = name_groups([rows]).items()
    runs = ablate(result, [rows], ablation=ablation, at=at, reference=reference, progress=False)
    return repair_of(result, name, labels, runs[name])


def repair_of(
    result: Attribution,
    name: str,
    ablated_rows: Sequence[str],
    ablated: Attribution,
) -> SelfRepair:
    """The parts, from the clean run and the ablated one."""
    clean, other = (on_device(x.numbers, result.numbers.ratio.device) for x in (result, ablated))
    before = _stream_rows(result.keys, clean)
    after = _stream_rows(ablated.keys, other)
    # The ablated run's rows, read at the clean run's final scale.
    rescale = (other.scale / clean.scale)[..., None]
    zero = torch.zeros_like(clean.ratio)
    keys = list(dict.fromkeys([*before, *after]))
    change = {
        key.label: added_up(
            result, (after.get(key, zero) * rescale - before.get(key, zero)) * clean.ratio
        )
        for key in keys
    }
    norm = sum(after.values(), zero) * (1 - rescale)
    others = [key for key in keys if key.label not in ablated_rows]
    return SelfRepair(
        name=name,
        direct=-sum((change[label] for label in ablated_rows), torch.zeros_like(result.logit)),
        total=added_up(result, clean.logits - other.logits),
        change=torch.stack([change[key.label] for key in others]),
        labels=[key.label for key in others],
        kinds=[key.kind for key in others],
        norm=added_up(result, norm * clean.ratio),
        softcap=added_up(result, other.logits - other.raw * clean.ratio),
    )


def _stream_rows(
    keys: Sequence[RowKey], numbers: Numbers
) -> dict[RowKey, Float[Tensor, "batch pos token"]]:
    """The rows in the final residual stream, before the output transform."""
    named = zip(keys, numbers.rows, strict=True)
    return {key: value for key, value in named if key not in (LN_FINAL_B, B_U)}

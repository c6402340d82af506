"""The neurons of one layer: how active each is, and what it writes to every candidate.

    row = activation × (W_out[n] · readout)

so that a neuron's curve over candidates is fixed by its weights, and its activation says how much
of it is written here ("logit prisms", https://neuralblog.github.io/logit-prisms). As a rule most
are next to inactive, and few tell the candidates apart.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.labelled import require_direct
from tl_dla.core.result import Attribution
from tl_dla.core.run import again
from tl_dla.core.taps import Tap
from tl_dla.errors import ArgumentError
from tl_dla.inputs.selection import Selection
from tl_dla.model.hooks import upcast
from tl_dla.model.reader import ModelReader

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

By = Literal["activation", "contribution", "contrast"]


@dataclass(frozen=True, eq=False)
class NeuronCurves:
    """The neurons of a layer.

    Attributes:
        layer: the layer.
        labels: the neurons, `L3N0`, `L3N1`, ….
        activations: of each, as W_out reads it; one sample for every prompt and position.
        contributions: each neuron's row, in logits.
        candidates: the candidate tokens, or what is attributed, in words.
    """

    layer: int
    labels: list[str]
    activations: Float[Tensor, "neuron sample"]
    contributions: Float[Tensor, "neuron sample candidate"]
    candidates: list[str]

    def _ranked(self, by: By) -> Float[Tensor, " neuron"]:
        """What neurons are ranked by: absolute, and its mean over samples (and candidates)."""
        if by not in get_args(By):
            raise ArgumentError(
                f'by must be "activation", "contribution" or "contrast"; {by!r} was given.'
            )
        if by == "activation":
            return self.activations.abs().mean(1)
        values = self.contributions
        if by == "contrast":
            values = values - values.mean(-1, keepdim=True)
        return values.abs().mean((1, 2))

    def top(self, k: int = 8, *, by: By = "activation") -> list[tuple[str, float]]:
        """The k neurons that are most active, or write most, as `(label, activation)`.

        Args:
            k: how many.
            by: absolute activation, absolute contribution, or what a neuron says of one candidate
                and not of all; means over the samples.

        Raises:
            ArgumentError: for k < 1, or another ranking.
        """
        order = self._order(k, by)
        return [(self.labels[i], float(self.activations[i].mean())) for i in order]

    def _order(self, k: int, by: By) -> list[int]:
        if k < 1:
            raise ArgumentError(f"k must be at least 1; {k} was given.")
        return self._ranked(by).argsort(descending=True, stable=True)[:k].tolist()

    def share(self, k: int, *, by: By = "activation") -> float:
        """How much of what all neurons sum to, in absolute value, the k largest hold."""
        sizes = self._ranked(by).sort(descending=True).values
        return float(sizes[:k].sum() / sizes.sum())

    def to_dataframe(self) -> "pd.DataFrame":
        """A line per neuron: `label`, `activation`, and its contribution to each candidate."""
        import pandas as pd

        table = pd.DataFrame(
            {"label": self.labels, "activation": self.activations.mean(1).tolist()}
        )
        for c, name in enumerate(self.candidates):
            table[name] = self.contributions[..., c].mean(1).tolist()
        return table

    def plot(
        self,
        k: int = 8,
        *,
        by: By = "activation",
        title: str | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> "go.Figure":
        """How active all neurons are, and the curves over candidates of the k largest.

        Args:
            k: how many curves.
            by: as in `top`.
            title: in place of the figure's own; `""` for no heading.
            width: in pixels; as wide as the page by default.
            height: in pixels.
        """
        from tl_dla.figures.charts import Look
        from tl_dla.figures.neuron_curves import CurvesView, curves

        order = self._order(k, by)
        view = CurvesView(
            self.layer,
            [self.labels[i] for i in order],
            order,
            self.activations.mean(1).cpu().double().numpy(),
            self.contributions[order].mean(1).cpu().double().numpy(),
            self.candidates,
            self.share(k),
        )
        return curves(view, Look(title, width, height))


def neuron_curves(
    result: Attribution, layer: int | None = None, *, cache: Any = None
) -> NeuronCurves:
    """The neurons of one layer of a `unit="neuron"` result, with their activations.

    Reads a cache where one is given; else the result's prompts are run once more.

    Args:
        result: of `direct_logit_attribution(…, unit="neuron")`, over candidates as a rule.
        layer: which layer; may be left out where the result splits one.
        cache: an `ActivationCache` of the result's prompts.

    Raises:
        ArgumentError: for a layer whose neurons do not all have a row, and a result that another
            run of its prompts does not give again.
        IncompleteCacheError: naming the hooks that the cache lacks.
    """
    require_direct(result)
    layers = {key.layer for key in result.keys if key.kind == "neuron"}
    layer = next(iter(layers)) if layer is None and len(layers) == 1 else layer
    rows = [i for i, key in enumerate(result.keys) if key.kind == "neuron" and key.layer == layer]
    part = ModelReader(result.model).neurons(layer) if rows and layer is not None else None
    if part is None or len(rows) != len(part.W_out):
        raise ArgumentError(
            "neuron_curves reads a layer whose neurons all have a row: attribute with"
            f' unit="neuron", layers={3 if layer is None else layer} and no top_neurons, and name'
            f" the layer; those of {sorted(x for x in layers if x is not None)} have rows here."
        )
    tap = Tap(part.site, upcast)
    once = again(result, "component", Selection(), taps=[tap], cache=cache)
    valid = result.positions.valid
    activations, values = once.kept[tap], result.values[rows]
    values = rearrange(values, "neuron batch pos candidate -> batch pos neuron candidate")
    written = values[valid.to(values.device)]
    return NeuronCurves(
        int(part.layer),
        [result.labels[i] for i in rows],
        rearrange(activations[valid.to(activations.device)], "sample neuron -> neuron sample"),
        rearrange(written, "sample neuron candidate -> neuron sample candidate"),
        list(result.targets.candidates or [result.target]),
    )

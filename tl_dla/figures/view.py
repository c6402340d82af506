"""What a figure or a page shows of a result: its numbers by row, sample and candidate; words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from tl_dla.errors import ArgumentError
from tl_dla.figures import charts
from tl_dla.figures.charts import safe, shorten
from tl_dla.inputs.tokens import token_strings

if TYPE_CHECKING:
    from tl_dla.core.result import DirectLogitAttribution


@dataclass(frozen=True, eq=False)
class View:
    """The values that a figure shows, a sample for each prompt and position that exists."""

    values: Float[np.ndarray, "row sample candidate"]
    logit: Float[np.ndarray, "sample candidate"]
    samples: list[str]
    prompt_of: list[int]
    tokens: list[str]
    candidates: list[str]

    @property
    def share(self) -> Float[np.ndarray, "row sample candidate"]:
        """Of the model's own logit; NaN where that is 0."""
        return self.values / np.where(self.logit == 0, np.nan, self.logit)

    def only(self) -> tuple[Float[np.ndarray, "row sample"], Float[np.ndarray, " sample"]]:
        """Values and logits of the one candidate."""
        return self.values[..., 0], self.logit[..., 0]


def read(
    result: "DirectLogitAttribution", prompt: int | None = None, candidate: str | int | None = None
) -> View:
    """The result's values by row, sample and candidate."""
    values = result._with_position_axis(result.attribution).detach().cpu().double().numpy()
    logit = result._with_position_axis(result.logit[None])[0].detach().cpu().double().numpy()
    n_prompts = len(result.prompts.tokens)
    if prompt is not None and not -n_prompts <= prompt < n_prompts:
        raise ArgumentError(f"prompt must be one of the result's {n_prompts}; {prompt} was given.")
    names = list(result.targets.candidates or [""])
    if candidate is not None:
        chosen = _candidate(names, candidate)
        values, logit, names = values[..., [chosen]], logit[..., [chosen]], [names[chosen]]
    wanted = None if prompt is None else prompt % n_prompts
    places = [
        (b, p)
        for b, p in result.positions.valid.nonzero().tolist()
        if wanted is None or b == wanted
    ]
    packed, index = result.prompts.packed, result.positions.index
    at = tuple(np.array(places).T)
    if has_tokens(result):
        texts = [f": {shorten(prompt_text(result, b))}" for b in range(n_prompts)]
        tokens = token_strings(result.model, packed[at[0], index[at]])
        named = [f" {token!r}" for token in tokens]
    else:
        texts, named = [""] * n_prompts, [""] * len(places)
        tokens = [str(int(i)) for i in index[at]]
    samples = [
        f"prompt {b}, position {int(index[b, p])}{token}{texts[b]}"
        for (b, p), token in zip(places, named, strict=True)
    ]
    return View(values[:, at[0], at[1]], logit[at], samples, [b for b, _ in places], tokens, names)


def _candidate(names: list[str], candidate: str | int) -> int:
    if isinstance(candidate, int) and -len(names) <= candidate < len(names):
        return candidate
    if candidate in names:
        return names.index(str(candidate))
    raise ArgumentError(
        f"candidate must be one of {', '.join(map(repr, names))}, or its index; {candidate!r} was"
        " given."
    )


def has_tokens(result: "DirectLogitAttribution") -> bool:
    """Whether the prompts' tokens are known; a cache may have come without them."""
    return result.seen.logits is not None or bool(result.prompts.tokens.any())


def prompt_text(result: "DirectLogitAttribution", prompt: int) -> str:
    """A prompt as text, or its token ids where the model has no tokenizer."""
    ids = result.prompts.packed[prompt, : int(result.prompts.length[prompt])]
    tokenizer = getattr(result.model, "tokenizer", None)
    return " ".join(map(str, ids.tolist())) if tokenizer is None else tokenizer.decode(ids.tolist())


def logit_name(result: "DirectLogitAttribution") -> str:
    """What the rows add up to, in a few words."""
    if result.path:
        return f"row {result.path[-1]}"
    return "model's own logit" if result.plan.include_bias else "logit without biases"


def headings(result: "DirectLogitAttribution", what: str, view: View) -> tuple[str, str]:
    """Title and subtitle: what is attributed, where, and whether it adds up."""
    named = view.candidates != [""]
    names = list(map(repr, view.candidates)) if named else result.target.split(", ")
    if len(names) > 5:  # more would leave the figure on the right
        names = [*names[:3], "…", names[-1]]
    where = safe(view.samples[0]) if len(view.samples) == 1 else _count(view)
    target = shorten(", ".join(names)) + through(result)
    return f"{what} {safe(target)}", f"{where}<br>{certificate(result)}"


def through(result: "DirectLogitAttribution") -> str:
    """The rows that a path's rows are parts of, in words; nothing for any other result."""
    return "".join(f", through {source}" for source in result.path)


def _count(view: View) -> str:
    n_prompts = len(set(view.prompt_of))
    if n_prompts == len(view.samples):
        return f"mean over {n_prompts} prompts, and each of them"
    if n_prompts == 1:
        return f"{len(view.samples)} positions of {safe(view.samples[0].split(',')[0])}"
    return f"mean over {len(view.samples)} positions of {n_prompts} prompts, and each of them"


def certificate(result: "DirectLogitAttribution") -> str:
    """The certificate as one line."""
    mark = "✓" if result.reconstruction.passed else "✗"
    return f"{mark} {safe(str(result.reconstruction))}"


def fold(
    labels: Sequence[str], values: Float[np.ndarray, "row sample"], k: int
) -> tuple[list[str], Float[np.ndarray, "shown sample"]]:
    """The k rows of largest mean magnitude, in their order, and the sum of all others as a row."""
    if k < 1:
        raise ArgumentError(f"k must be at least 1; {k} was given.")
    if len(labels) <= k + 1:
        return list(labels), values
    largest = np.argsort(-np.abs(values).mean(1), kind="stable")[:k]
    kept = np.sort(largest)
    rest = np.setdiff1d(np.arange(len(labels)), kept)
    names = [*(labels[i] for i in kept), f"{len(rest)} smaller rows"]
    return names, np.vstack([values[kept], values[rest].sum(0)])


def bars(
    labels: Sequence[str],
    values: Float[np.ndarray, "row sample"],
    view: View,
    share: Float[np.ndarray, "row sample"],
    *,
    places: Sequence[int] | None = None,
    **axes: str,
) -> list[Any]:
    """A bar from 0 for each row's value, or its mean with a dot for every value."""
    mean, count = values.mean(1), values.shape[1]
    if count == 1:
        words = [charts.percent(part) for part in share[:, 0]]
        hover = [
            f"{m:+.4f} logits ({w})<br>{safe(view.samples[0])}"
            for m, w in zip(mean, words, strict=True)
        ]
    else:
        hover = [
            f"mean {m:+.4f} logits<br>{v.min():+.4f} to {v.max():+.4f} over {count}"
            for m, v in zip(mean, values, strict=True)
        ]
    hover = [f"<b>{safe(label)}</b><br>{h}" for label, h in zip(labels, hover, strict=True)]
    traces: list[Any] = [
        go.Bar(
            x=mean,
            y=list(places or range(len(labels))),
            orientation="h",
            marker_color=charts.signs(mean),
            width=0.66,
            hovertext=[
                f"<b>{safe(label)}</b><br>{h}" for label, h in zip(labels, hover, strict=True)
            ],
            hoverinfo="text",
            showlegend=False,
            **axes,
        )
    ]
    if count > 1:
        traces.extend(charts.dots(labels, values, view.samples, places=places, share=share, **axes))
    return traces

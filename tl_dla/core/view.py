"""The view of a result: its numbers and words as figures, tables and pages show them."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.core.certificate import Reconstruction
from tl_dla.core.choice import read_choice
from tl_dla.figures.view import Sample, View, Words
from tl_dla.inputs.absent import AbsentModel
from tl_dla.inputs.query import Query
from tl_dla.inputs.text import pieces, text_of
from tl_dla.model.reader import ModelReader
from tl_dla.model.stream import Kind


@runtime_checkable
class Shown(Protocol):
    """What can be shown: rows, what they are, what they add up to, and the question."""

    @property
    def values(self) -> Float[Tensor, "row batch pos candidate"]: ...  # noqa: D102
    @property
    def labels(self) -> list[str]: ...  # noqa: D102
    @property
    def kinds(self) -> list[Kind]: ...  # noqa: D102
    @property
    def layers(self) -> list[int | None]: ...  # noqa: D102
    @property
    def sources(self) -> list[int | None]: ...  # noqa: D102
    @property
    def unit(self) -> str: ...  # noqa: D102
    @property
    def logit(self) -> Float[Tensor, "..."]: ...  # noqa: D102
    @property
    def reconstruction(self) -> Reconstruction: ...  # noqa: D102
    @property
    def query(self) -> Query: ...  # noqa: D102
    @property
    def path(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def target(self) -> str: ...  # noqa: D102
    @property
    def total(self) -> str: ...  # noqa: D102
    @property
    def what(self) -> str: ...  # noqa: D102
    @property
    def units(self) -> str: ...  # noqa: D102
    @property
    def mean_over(self) -> str: ...  # noqa: D102


def view_of(result: Shown, prompt: int | None = None, candidate: str | int | None = None) -> View:
    """The result's values by row, sample and candidate, with the words for them.

    Args:
        result: what to show.
        prompt: only this prompt of a batch.
        candidate: only this one of several candidate tokens, by its text or its index.

    Raises:
        ArgumentError: for a prompt or candidate that the result does not have.
    """
    chosen = read_choice(result.query, prompt, None, candidate)
    candidates = list(result.query.targets.candidates or [""])
    if chosen.candidate is not None:
        candidates = [candidates[chosen.candidate]]
    places = [
        (b, p)
        for b, p in result.query.positions.valid.nonzero().tolist()
        if chosen.prompt in (None, b)
    ]
    return View(
        values=chosen.samples(result.values),
        logit=chosen.samples(result.query.with_axes(result.logit[None]))[0],
        labels=_labels(result, {b for b, _ in places}),
        kinds=list(result.kinds),
        layers=list(result.layers),
        unit=result.unit,
        samples=_samples(result, places),
        candidates=candidates,
        words=_words(result),
        writers=_writers(result.query.model) if result.unit == "layer" else {},
        sources=_sources(result, {b for b, _ in places}),
    )


def _labels(result: Shown, prompts: set[int]) -> list[str]:
    """The rows' names; for rows of tokens with their text, where one prompt is shown."""
    if result.unit != "input" or len(prompts) != 1 or not result.query.has_tokens:
        return list(result.labels)
    tokens = prompt_tokens(result, *prompts)
    own = [None if s is None or s >= len(tokens) else tokens[s] for s in result.sources]
    named = zip(result.labels, own, strict=True)
    return [label if token is None else f"{label} {token!r}" for label, token in named]


def _sources(result: Shown, prompts: set[int]) -> list[str]:
    """The tokens that source rows are of; a position alone where the prompts differ."""
    n = 1 + max((-1 if source is None else source for source in result.sources), default=-1)
    if result.unit != "source" or not result.query.has_tokens:
        return [str(i) for i in range(n)]
    tokens = [prompt_tokens(result, b) for b in sorted(prompts)]
    named = [{own[i] for own in tokens if i < len(own)} for i in range(n)]
    return [names.pop() if len(names) == 1 else str(i) for i, names in enumerate(named)]


def _samples(result: Shown, places: list[tuple[int, int]]) -> list[Sample]:
    """A sample for each prompt and attributed position."""
    index = result.query.positions.index
    if result.mean_over:
        return [Sample(0, 0, mean_over=result.mean_over)]
    if not result.query.has_tokens:
        return [Sample(b, int(index[b, p])) for b, p in places]
    prompts = {b for b, _ in places}
    tokens = {b: prompt_tokens(result, b) for b in prompts}
    texts = {b: prompt_text(result, b) for b in prompts}
    return [Sample(b, i, tokens[b][i], texts[b]) for b, p in places for i in [int(index[b, p])]]


def prompt_text(result: Shown, prompt: int) -> str:
    """A prompt as text."""
    return text_of(result.query.model, _ids(result, prompt))


def _ids(result: Shown, prompt: int) -> Int[Tensor, " pos"]:
    return result.query.prompts.rows[prompt]


def prompt_tokens(result: Shown, prompt: int) -> list[str]:
    """A prompt's tokens as text; see `pieces`."""
    return pieces(result.query.model, _ids(result, prompt))


def _words(result: Shown) -> Words:
    """What is attributed, and whether it adds up."""
    through = "".join(f", through {source}" for source in result.path)
    return Words(
        target=result.target + through,
        logit=result.total,
        certificate=result.reconstruction.marked,
        what=result.what,
        units=result.units,
    )


def _writers(model: Any) -> Mapping[str, str]:
    """What wrote to the stream since the point before, for each point of it."""
    if isinstance(model, AbsentModel):
        return model.writers
    return {} if model is None else ModelReader(model).stream().writers

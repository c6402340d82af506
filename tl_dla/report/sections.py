"""The sections of a page: figures in every choice of prompt, position and candidate, and heads."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup

from tl_dla.analyses.head_patterns import top_heads_with_patterns
from tl_dla.analyses.inputs_ledger import InputLedger
from tl_dla.analyses.logit_lens import logit_lens
from tl_dla.core.result import Attribution
from tl_dla.core.run import again
from tl_dla.core.view import view_of
from tl_dla.effects.audit import Audit
from tl_dla.errors import UnsupportedModelError
from tl_dla.figures import plots, table
from tl_dla.figures.attention_view import AttentionStyle
from tl_dla.figures.charts import Look
from tl_dla.figures.lens import lens_grid
from tl_dla.figures.view import View, where
from tl_dla.inputs.selection import Unit
from tl_dla.report import fragments
from tl_dla.report.evidence import Place

_MOST_POSITIONS = 48  # of the lens
_MOST_CELLS = 1500  # of the lens, whose text takes the browser a tenth of a millisecond each
_MOST_LENSES = 192  # columns of all prompts' lenses together; each is read over the vocabulary
_MOST_VIEWS = 24  # of a figure
_MOST_ROWS = 200  # of a table of numbers
ByUnit = Callable[[Unit], Attribution]
_UNTITLED = Look(title="")  # a figure's title is the page's business


@dataclass(frozen=True)
class Shown:
    """What a page shows of a result; see `tl_dla.report.page.write_report`."""

    prompt: int = 0
    k: int | None = None
    attention: AttentionStyle = "patterns"
    audit: Audit | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Drawn:
    """A figure of the page, as it is drawn first.

    Attributes:
        name: of its element.
        width: in pixels, at the least.
        height: in pixels.
        label: what it shows, in words.
        note: which prompts it is of, and whether its rows add up.
    """

    name: str
    width: int
    height: int
    label: str
    note: list[str]


@dataclass(frozen=True)
class Section:
    """A section of the page; of `refusal` and the rest, only what there is.

    Attributes:
        title: its heading.
        text: what one sees.
        figure: drawn by plotly.
        numbers: the table behind the figure, with what it holds.
        heads: cards of heads, for each prompt.
        refusal: why the model has no such section.
    """

    title: str
    text: str
    figure: Drawn | None = None
    numbers: tuple[str, Markup] | None = None
    heads: list[fragments.Heads] = field(default_factory=list)
    refusal: str = ""

    @property
    def draws(self) -> bool:
        """Whether circuitsvis is needed."""
        return any(group.attention is not None for group in self.heads)

    @property
    def id(self) -> str:
        """The address of the section in the page."""
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class Choice:
    """What a reader may choose: a prompt, one of its positions, a candidate; None for all."""

    prompt: int | None = None
    position: int | None = None
    candidate: int | None = None

    @property
    def key(self) -> str:
        """The choice as the page's script writes it."""
        chosen = self.prompt, self.position, self.candidate
        return "|".join("" if x is None else f"{x}" for x in chosen)

    def view(self, result: Attribution) -> View:
        """The chosen part of a result."""
        view = view_of(result, self.prompt, self.candidate)
        return view if self.position is None else view.at(self.position)


def choices(result: Attribution, places: Sequence[Place]) -> list[Choice]:
    """The choices that the figures are drawn for: all, then candidates, prompts and positions."""
    index, n = result.positions.index, len(result.prompts.tokens)
    several = int(result.positions.valid.sum(1).max()) > 1
    names = range(len(result.targets.candidates or ()))
    prompts = list(dict.fromkeys(place.prompt for place in places)) if n > 1 else []
    at: list[tuple[int | None, int | None]] = [(None, None), *((b, None) for b in prompts)]
    if several:
        own = [(x.prompt, int(index[x.prompt, x.column])) for x in places]
        at += own if n > 1 else [(None, position) for _, position in own]
    found = [Choice(*one) for one in at]
    found += [Choice(*one, c) for one in at for c in (names if len(names) > 1 else ())]
    return found[:_MOST_VIEWS]


class Figures:
    """The figures of a page, each in an element of its own, drawn for every choice."""

    def __init__(self) -> None:
        self.drawn: dict[str, dict[str, Any]] = {}

    def add(self, figures: dict[str, tuple[go.Figure, list[str], str]]) -> Drawn:
        """The element for a figure: by choice the figure, its note, and what it shows in words."""
        name = f"figure-{len(self.drawn)}"
        self.drawn[name] = {}
        for key, (figure, note, label) in figures.items():
            right = figure.layout.margin.r  # more than a border holds words
            figure.update_layout(
                width=None, margin_l=4, margin_r=4 if right <= 20 else right, template=None
            )
            own = json.loads(figure.to_json())
            self.drawn[name][key] = own | {"note": note, "label": label}
        first, note, label = next(iter(figures.values()))
        wanted = (first.layout.meta or {}).get("least", 330)
        return Drawn(name, wanted, first.layout.height, label, note)

    def audit(self, audit: Audit) -> Drawn:
        """The element for an audit, which is of all prompts."""
        label = f"direct and total effects of {len(audit.rows)} rows"
        return self.add({Choice().key: (audit.plot(title=""), [], label)})


# Each unit's section: what it is called, and what one sees.
_UNITS: dict[Unit, tuple[str, str]] = {
    "component": (
        "Components",
        "What each attention and MLP output wrote, in the order of the residual stream, and what"
        " that adds up to.",
    ),
    "head": (
        "Heads",
        "Blue heads push the answer up, red ones down. Beside each layer stands what else was"
        " written there.",
    ),
    "layer": (
        "Layer by layer",
        "The residual stream read with the final norm’s own scale: each step is what was written"
        " there, and the last reading and the biases are the logit.",
    ),
}


_TOKENS = (
    "Tokens and biases",
    "What each token of the prompt, and each bias, wrote to the logit through everything: norm"
    " scales, attention patterns and activations are frozen at their values in this pass. What a"
    " token did by steering attention is in no row.",
)
_FLOW = (
    "Where the answer is held",
    "How much of the logit the stream holds at each token’s place before each layer. With what the"
    " biases after it add, each line adds up to the logit.",
)


def sections(
    result: Attribution,
    by_unit: ByUnit,
    places: Sequence[Place],
    shown: Shown,
    figures: Figures,
    done: Callable[[], object],
) -> list[Section]:
    """The sections with figures, or in place of one the sentence why the model has none.

    Args:
        result: what is reported.
        by_unit: the same by other units.
        places: what the page holds, the shown prompt's first.
        shown: how many heads of each sign are shown with their attention, and how.
        figures: where the figures go.
        done: told of each section when it is made.
    """
    prompts = list(dict.fromkeys(place.prompt for place in places))
    chosen = choices(result, places)

    def section(title: str, text: str, body: Callable[[], dict[str, Any]]) -> Section:
        try:
            return Section(title, text, **body())
        except UnsupportedModelError as error:
            return Section(title, text, refusal=str(error))
        finally:
            done()

    def of(unit: Unit) -> dict[str, Any]:
        return _drawn(by_unit(unit), chosen, figures)

    def top_heads() -> dict[str, Any]:
        own = by_unit("head")
        wanted = min(3, own.kinds.count("head")) if shown.k is None else shown.k
        patterns = top_heads_with_patterns(own, wanted)
        return {"heads": fragments.heads(own, patterns, prompts, shown.attention)}

    def lens() -> dict[str, Any]:
        return {"figure": _lens(result, prompts, figures)}

    found = []
    if isinstance(result, InputLedger):
        found.append(section(*_TOKENS, partial(_drawn, result, chosen, figures)))
        found.append(section(*_FLOW, partial(_flow, result, places, figures)))
    elif result.unit not in _UNITS:
        of_own = partial(_drawn, result, chosen, figures)
        found.append(section(f"By {result.unit}", "The rows of this result.", of_own))
    for unit, (title, text) in _UNITS.items():
        if unit == result.unit or not result.alone:
            found.append(section(title, text, partial(of, unit)))
    if result.alone:
        return found
    which = (
        f" Prompt {prompts[0]}, until another is chosen." if len(result.prompts.tokens) > 1 else ""
    )
    if result.targets.candidates is None:
        text = (
            "The heads farthest above and below 0: where they look, and what they move from there."
            " Tokens are coloured by their contribution; a head’s contributions add up to its"
            f" value.{which}"
        )
        found.append(section("Heads and what they read", text, top_heads))
    text = (
        "The model’s prediction at each point of the stream, after each token. The norm’s"
        f" statistics are computed afresh at each point: these are not contributions.{which}"
    )
    found.append(section("Logit lens", text, lens))
    return found


def _drawn(result: Attribution, chosen: Sequence[Choice], figures: Figures) -> dict[str, Any]:
    """The figure for every choice, what each is of, its certificate, and the numbers."""
    view, n_rows = view_of(result), len(result)
    which = "all rows" if n_rows <= _MOST_ROWS else f"the {_MOST_ROWS} largest of {n_rows} rows"
    shown = table.table(view, None if n_rows <= _MOST_ROWS else _MOST_ROWS)
    drawn = {}
    for choice in chosen:
        own = choice.view(result)
        several = len(own.samples) > 1 or len(chosen) > 1
        note = [*[where(own)] * several, own.words.certificate]
        drawn[choice.key] = (plots.plot(own, look=_UNTITLED), note, f"by {own.unit}, {where(own)}")
    numbers = f"{which} in numbers", Markup(table.html(shown))
    return {"figure": figures.add(drawn), "numbers": numbers}


def _flow(result: InputLedger, places: Sequence[Place], figures: Figures) -> dict[str, Any]:
    """Where the logit of each place that the page holds is, layer by layer."""
    drawn: dict[str, tuple[go.Figure, list[str], str]] = {}
    n_prompts, n_positions = result.positions.index.shape
    names = result.targets.candidates or ("",)
    for c, place in [(c, place) for c in range(len(names)) for place in places][:_MOST_VIEWS]:
        figure = result.plot_flow(prompt=place.prompt, position=place.column, candidate=c, title="")
        at = int(result.positions.index[place.prompt, place.column])
        about = f"prompt {place.prompt}, position {at}" + f", {names[c]!r}" * (len(names) > 1)
        prompt = place.prompt if n_prompts > 1 else None
        candidate = c if len(names) > 1 else None
        position = at if n_positions > 1 else None
        # What stands for a choice that has no picture of its own is the first that it allows.
        for choice in (
            Choice(prompt, position, candidate),
            Choice(prompt, None, candidate),
            Choice(None, None, candidate),
            Choice(),
        ):
            drawn.setdefault(choice.key, (figure, [about], f"flow, {about}"))
    return {"figure": figures.add(drawn)}


def _lens(result: Attribution, prompts: Sequence[int], figures: Figures) -> Drawn:
    """The grid of each prompt, with the answer and its foil followed.

    Of a long prompt the positions up to the last one attributed.
    """
    several = len(result.prompts.tokens) > 1
    points = 2 * result.model.cfg.n_layers + 1
    most = max(12, min(_MOST_POSITIONS, _MOST_CELLS // points))
    columns = min(most, int(result.prompts.length.max()))
    drawn = {}
    for prompt in prompts[: max(1, _MOST_LENSES // columns)]:
        length = int(result.prompts.length[prompt])
        at = result.positions.index[prompt][result.positions.valid[prompt]]
        end = min(length, max(int(at.max()) + 1, most))
        start = max(0, end - most)
        tokens = result.prompts.packed[prompt : prompt + 1, :length]
        ids = result.targets.ids[prompt % len(result.targets.ids), -1]
        lens = logit_lens(result.model, tokens, candidate_tokens=ids, pos=slice(start, end))
        key = Choice(prompt if several else None).key
        label = f"logit lens, prompt {prompt}"
        about = [label] * several
        if end - start < length:
            about.append(f"positions {start} to {end - 1} of {length}")
        drawn[key] = (lens_grid(lens.view(), look=_UNTITLED), about, label)
    return figures.add(drawn)


def of_unit(result: Attribution, unit: Unit) -> Attribution:
    """The same prompts, positions and targets, attributed to another unit."""
    return result if result.unit == unit else again(result, unit).result(Attribution)

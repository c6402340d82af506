"""One self-contained HTML page of a result: figures, heads with their attention, the certificate.

The page loads nothing: plotly and circuitsvis are packed into it once, and its content policy
forbids any connection. `page.html` is a jinja2 template that escapes everything it is given, so
what a user wrote (prompts, tokens, the command) is text. The figures of other units than the
result's own come from runs of the same model on the same tokens.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.resources import files
from os import PathLike
from pathlib import Path

from markupsafe import Markup
from tqdm.auto import tqdm

from tl_dla.core.files import write_page
from tl_dla.core.result import Attribution
from tl_dla.core.run import SHOWN_AFTER
from tl_dla.core.view import view_of
from tl_dla.effects.audit import Audit
from tl_dla.errors import ArgumentError, UnsupportedModelError
from tl_dla.figures import embedded, theme
from tl_dla.figures.attention_view import DRAW, AttentionStyle
from tl_dla.inputs.absent import in_a_line
from tl_dla.report import fragments
from tl_dla.report.evidence import evidence, held_places
from tl_dla.report.sections import ByUnit, Figures, Shown, of_unit, sections


@dataclass(frozen=True, eq=False)
class Explorer:
    """The page of a result in a notebook: an isolated frame that needs no network.

    Attributes:
        page: the page as HTML.
        height: of the frame, in pixels.
    """

    page: str = field(repr=False)
    height: int = 760

    def _repr_html_(self) -> str:
        return embedded.frame(self.page, "direct logit attribution", self.height)


def write_report(
    result: Attribution,
    path: str | PathLike[str],
    *,
    prompt: int = 0,
    k: int | None = None,
    attention: AttentionStyle = "patterns",
    audit: Audit | None = None,
    command: str | None = None,
) -> Path:
    """Write the page and return its path.

    Args:
        result: what to report.
        path: of the HTML file; one that is there is replaced.
        prompt: the prompt of a batch whose lens and attention are shown first.
        k: how many of the most positive, and of the most negative, heads to show with their
            attention; 3, or all of fewer, by default.
        attention: how circuitsvis shows it: `"patterns"` or `"heads"`.
        audit: what intervention says of the result's rows (`result.audit()`), to be shown beside.
        command: what made the page, as it is to be shown; the call of this method by default.

    Raises:
        ArgumentError: for a path that cannot be written, a prompt that the result does not have, or
            more heads than there are.
    """
    choice, command = Shown(prompt, k, attention, audit), command or f'result.report("{path}")'
    return write_page(path, lambda: page_of(result, choice, command))


# ---- the page ----------------------------------------------------------------------------------


def page_of(result: Attribution, shown: Shown, command: str) -> str:
    """The page as HTML.

    Raises:
        ArgumentError: for a prompt that the result does not have, or more heads than there are.
    """
    n_prompts = len(result.prompts.tokens)
    if not -n_prompts <= shown.prompt < n_prompts:
        raise ArgumentError(
            f"prompt must be one of the result's {n_prompts}; {shown.prompt} was given."
        )
    prompt = shown.prompt % n_prompts
    by_unit = cache(partial(of_unit, result))  # the model runs once a unit
    places, figures = held_places(result, prompt), Figures()
    with tqdm(desc="report", unit=" sections", delay=SHOWN_AFTER, leave=False) as bar:
        drawn = sections(result, by_unit, places, shown, figures, bar.update)
    audit = None if shown.audit is None else fragments.audited(shown.audit)
    pictured = None if shown.audit is None else figures.audit(shown.audit)
    data = evidence(result, _other_parts(result, by_unit), prompt, shown.audit)
    themes = {
        "positive": theme.POSITIVE,
        "negative": theme.NEGATIVE,
        "light": theme.of_page("light"),
        "dark": theme.of_page("dark"),
    }
    for group in (group for section in drawn for group in section.heads):
        own = data["why"].setdefault(group.prompt, {})
        own |= {card.label: card.why for card in group.cards if card.why}
    return embedded.template("tl_dla.report", "page.html").render(
        title=f"What wrote the logit of {view_of(result).words.target}",
        model=in_a_line(result.model),
        prompts=fragments.prompts(result),
        logit=fragments.logit(result),
        passed=result.reconstruction.passed,
        certificate=result.reconstruction,
        sections=drawn,
        audit=audit,
        pictured=pictured,
        alone=result.alone,
        certificates=fragments.certificates(result),
        command=command,
        versions=fragments.versions(),
        evidence=Markup(embedded.packed("evidence", embedded.as_json(data))),
        figures=Markup(embedded.packed("figures", embedded.as_json(figures.drawn))),
        themes=Markup(embedded.as_json(themes)),
        plotly=Markup(embedded.plotly()),
        circuitsvis=Markup(embedded.circuitsvis()) if any(s.draws for s in drawn) else "",
        scripts=Markup(embedded.UNPACK + DRAW),
        asking=Markup(_asking()),
    )


def _other_parts(result: Attribution, by_unit: ByUnit) -> list[Attribution]:
    """The rows of other units that can be asked as well."""
    if result.alone:
        return []
    found = []
    for unit in ("component", "head"):
        if unit != result.unit:
            with suppress(UnsupportedModelError):  # the section of the unit says why
                found.append(by_unit(unit))
    return found


@cache
def _asking() -> str:
    """The script that answers the reader's choices."""
    return (files("tl_dla.report") / "page.js").read_text(encoding="utf-8")

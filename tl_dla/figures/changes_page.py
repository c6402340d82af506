"""A comparison as a page of its own: the figure, every row in numbers, the certificate."""

import json

from markupsafe import Markup

from tl_dla.figures import changes, theme
from tl_dla.figures.charts import Look
from tl_dla.figures.embedded import UNPACK, as_json, plotly, template
from tl_dla.figures.text import number

_MOST_ROWS = 200  # in the table; the smaller changes are added up
_NARROW = 600  # pixels: a figure that a telephone shows as well


def page(shown: changes.Changes, k: int = 30) -> str:
    """The page; its figure has a line for each of the k rows that changed most.

    Raises:
        ArgumentError: for k < 1.
    """
    figure = changes.plot(shown, k, Look(title="", width=_NARROW))
    figure.update_layout(width=None, margin_l=4, template=None, showlegend=False)
    figure.update_traces(texttemplate=None, selector={"type": "heatmap"})  # for every width
    view, n_rows = shown.view, len(shown.view.labels)
    light, dark = theme.of_page("light"), theme.of_page("dark")
    return template("tl_dla.figures", "changes_page.html").render(
        title=f"What changed in the logit of {view.words.target}",
        sides=[side for side in shown.sides if len(side) > 1],
        unit=view.unit,
        over="".join(f", {words}" for words in changes.over(view)),
        certificate=view.words.certificate,
        columns=changes.COLUMNS,
        lines=changes.lines(shown, None if n_rows <= _MOST_ROWS else _MOST_ROWS),
        number=number,
        least=330,
        height=figure.layout.height,
        font=Markup(theme.FONT),
        positive=theme.POSITIVE,
        negative=theme.NEGATIVE,
        neutral=theme.NEUTRAL,
        figure=Markup(as_json(json.loads(figure.to_json()))),
        light=light,
        dark=dark,
        themes=Markup(as_json({"light": light, "dark": dark})),
        plotly=Markup(plotly()),
        unpack=Markup(UNPACK),
    )

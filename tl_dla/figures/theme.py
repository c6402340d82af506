"""The look of every figure and page: colours for light and dark pages, and plotly's template.

Blue is positive, red is negative, and both stay apart for the colour-blind (ColorBrewer's RdBu).
"""

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import plotly.graph_objects as go

POSITIVE, NEGATIVE, NEUTRAL = "#3a7abf", "#cb5a3c", "#868c96"
DOT = "#5f6672"
PALE = 0.4  # the opacity of a bar that adds up what has no name
# Okabe and Ito's colours, which stay apart in every kind of colour blindness, without the yellow.
PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", NEUTRAL]
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK = {"light": "#23272e", "dark": "#dfe3ea"}
GRID = {"light": "#e7e9ed", "dark": "#2e333b"}
EDGE = {"light": "#c98a2b", "dark": "#d9a441"}  # of what is chosen
PAPER = {"light": "#ffffff", "dark": "#16181d"}
SCALES: dict[str, dict[str, list[str]]] = {
    "diverging": {
        "light": ["#8f2a17", "#cb5a3c", "#ecab93", "#f6f5f3", "#9fc3e4", "#3a7abf", "#153f78"],
        "dark": ["#ffb29c", "#e0694a", "#7d3626", "#24272d", "#284e78", "#4a92dd", "#b3dbff"],
    },
    "sequential": {
        "light": ["#f7f6f4", "#dbe8f3", "#b9d5ec", "#93bfe4", "#6aa6d9"],
        "dark": ["#22252b", "#243546", "#254664", "#245883", "#226aa3"],
    },
}
Theme = Literal["light", "dark"]


def stroke(i: int) -> tuple[str, str]:
    """The colour and the dash of the i-th of several lines."""
    cycle, place = divmod(i, len(PALETTE))
    return PALETTE[place], ("solid", "dash", "dot")[cycle % 3]


def template(theme: Theme = "light") -> "go.layout.Template":
    """The look of every figure: thin grid lines, no boxes, one font."""
    import plotly.graph_objects as go

    axis = dict(
        gridcolor=GRID[theme],
        linecolor=GRID[theme],
        zerolinecolor=INK[theme],
        zerolinewidth=1,
        ticks="",
        automargin=True,
        title=dict(standoff=10, font=dict(size=12)),
        tickfont=dict(size=11),
    )
    layout = go.Layout(
        font=dict(family=FONT, size=12, color=INK[theme]),
        paper_bgcolor=PAPER[theme],
        plot_bgcolor="rgba(0,0,0,0)",
        title=dict(x=0, xref="container", xanchor="left", pad=dict(l=20), font=dict(size=16)),
        xaxis=axis,
        yaxis=axis,
        hoverlabel=dict(
            bgcolor=PAPER[theme], bordercolor=NEUTRAL, font=dict(color=INK[theme]), align="left"
        ),
        legend=dict(orientation="h", y=1.0, yanchor="bottom", x=1, xanchor="right"),
        modebar=dict(
            bgcolor="rgba(0,0,0,0)",
            color=NEUTRAL,
            activecolor=INK[theme],
            # The last one would send the figure to a web site.
            remove="select2d lasso2d zoomIn2d zoomOut2d autoScale2d sendChartToCloud".split(),
        ),
    )
    return go.layout.Template(layout=layout)


def of_page(theme: Theme) -> dict[str, Any]:
    """What the styles and the script of a page need: colours, plotly's template, its scales."""
    scales = {kind: both[theme] for kind, both in SCALES.items()}
    return {
        "ink": INK[theme],
        "line": GRID[theme],
        "paper": PAPER[theme],
        "edge": EDGE[theme],
        "template": template(theme).to_plotly_json(),
        "scales": {
            kind: [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]
            for kind, colours in scales.items()
        },
    }

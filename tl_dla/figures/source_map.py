"""The heatmap of `source` rows: what each head moved from each token, for each candidate."""

import re
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go

from tl_dla.errors import ArgumentError
from tl_dla.figures import charts
from tl_dla.figures.charts import PLAIN, Grid, Look
from tl_dla.figures.text import brief, visible
from tl_dla.figures.view import View, largest, share_of


def source_map(view: View, k: int = 40, look: Look = PLAIN) -> go.Figure:
    """Head (and candidate) × source token; the k lines that moved most, in the order of the model.

    Several prompts, or positions, are their mean; a token that none of them sees is left empty.

    Raises:
        ArgumentError: for a view without rows of source tokens, or k < 1.
    """
    found = {
        row: (match[1], int(match[2]))
        for row, label in enumerate(view.labels)
        if (match := re.fullmatch(r"(L\d+H\d+)←(\d+)", label))
    }
    if not found:
        raise ArgumentError(
            f'A unit="{view.unit}" result has no rows of source tokens: attribute with'
            ' unit="source".'
        )
    heads = list(dict.fromkeys(head for head, _ in found.values()))
    n, names = 1 + max(source for _, source in found.values()), view.candidates
    grid = np.full((len(heads), len(names), n), np.nan)
    means = view.values.mean(1)
    for row, (head, source) in found.items():
        grid[heads.index(head), :, source] = means[row]
    flat = grid.reshape(-1, n)
    lines = [(head, c) for head in heads for c in range(len(names))]
    kept = np.sort(largest(np.abs(np.nan_to_num(flat)), k))
    logit = view.logit.mean(0)[[lines[i][1] for i in kept]][:, None]
    tokens = view.sources or [str(i) for i in range(n)]
    values = flat[kept]
    drawn = Grid(
        values=values,
        rows=[
            f"{lines[i][0]} {names[lines[i][1]]!r}" if len(names) > 1 else lines[i][0] for i in kept
        ],
        columns=[visible(token) for token in tokens],
        where=[f"from {i} {token!r}" for i, token in enumerate(tokens)],
        cells=[[brief(x, 2) for x in line] for line in values],
        detail=share_of(logit, values),
        hover="<b>%{y}</b> %{x}<br>%{z:+.4f} logits (%{customdata:.1%} of the logit)",
    )
    heading = charts.heading_of("What heads moved, token by token, to the logit of", view)
    if more := len(lines) - len(kept):
        about = f"{heading.subtitle}<br>{more} lines that moved less are left out"
        heading = replace(heading, subtitle=about)
    return charts.table(drawn, heading, look, cell_width=44)

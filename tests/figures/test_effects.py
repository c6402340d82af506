"""Pictures of audits, repair and erasures: what they draw is what a model with hooks does."""

import numpy as np
import pytest
import torch

from tests.support.pages import PROMPTS, bridge
from tl_dla import direct_logit_attribution, erasures, self_repair
from tl_dla.figures import charts, effects
from tl_dla.figures.charts import Heading, Look
from tl_dla.figures.text import number

ROWS = ["L2H4", "L0H0", "1_mlp_out"]


@pytest.fixture(scope="module")
def result():
    return direct_logit_attribution(bridge(), PROMPTS[0], "mat", "cat", unit="head")


@torch.no_grad()
def total_effect(row: str) -> float:
    """The logit difference, less that of a pass in which the row writes nothing at the end."""
    model = bridge()
    tokens, words = model.to_tokens(PROMPTS[0]), [model.to_single_token(x) for x in ("mat", "cat")]

    def silence(x, hook):
        x = x.clone()
        if row.startswith("L"):
            x[:, -1, int(row[3])] = 0.0
        else:
            x[:, -1] = 0.0
        return x

    layer = row[1] if row.startswith("L") else row[0]
    name = f"blocks.{layer}." + ("attn.hook_z" if row.startswith("L") else "hook_mlp_out")
    before = model(tokens)[0, -1, words]
    after = model.run_with_hooks(tokens, fwd_hooks=[(name, silence)])[0, -1, words]
    return float((before[0] - before[1]) - (after[0] - after[1]))


def test_an_audit_is_bars_of_direct_and_diamonds_of_total_effects(result):
    found = result.audit(rows=ROWS, progress=False)
    direct, total = found.plot().data
    np.testing.assert_allclose(direct.x, [float(result[row][0]) for row in ROWS], atol=1e-5)
    np.testing.assert_allclose(total.x, [total_effect(row) for row in ROWS], atol=1e-5)
    assert list(found.plot().layout.yaxis.ticktext) == ROWS
    named = {int(one.y): set(one.text.split(", ")) for one in found.plot().layout.annotations}
    assert named == {
        ROWS.index(row): {f.name.replace("_", " ") for f in found.flags if f.row == row}
        for row in {flag.row for flag in found.flags}
    }
    assert named and "zero-ablated" in found.plot().layout.title.text
    for flag in found.flags:
        hover = direct.hovertext[ROWS.index(flag.row)].replace("<br>", " ")
        assert flag.sentence.split(":")[0][:60] in hover


def test_names_of_flags_stay_inside_a_narrow_figure():
    shown = effects.Effects(
        ["L0H0", "L0H1"],
        np.array([5.0, -1.0]),
        np.array([6.0, 0.5]),
        [["mediated", "copy_suppression"], []],
        [["One."], []],
    )
    fig = effects.direct_and_total(shown, Heading("an audit"), Look(width=400))
    low, high = fig.layout.xaxis.range
    words = fig.layout.annotations[0].text
    assert words == "mediated, copy suppression"
    assert (high - 6.0) / (high - low) * (400 - 130) > 6 * len(words)


def test_repair_is_steps_from_the_direct_effect_to_the_total_one(result):
    for row in ROWS:
        steps, _ = self_repair(result, row).plot().data
        assert steps.x[0] == pytest.approx(float(result[row][0]), abs=1e-5)
        assert steps.x[-1] == pytest.approx(total_effect(row), abs=1e-5)
        assert sum(steps.x[:-1]) == pytest.approx(steps.x[-1], abs=1e-5)
        begin = [0.0, *np.cumsum(steps.x)[:-2], 0.0]  # where the step before ends; the total at 0
        assert list(steps.base) == pytest.approx(begin, abs=1e-5)
        assert steps.text[-1] == number(total_effect(row))
    labels = self_repair(result, "1_mlp_out").plot().layout.yaxis.ticktext
    assert labels[0] == "direct effect" and labels[-1] == "total effect"
    assert "through attention" in labels and "through the soft cap" not in labels


def test_erasures_are_writers_by_the_rows_after_them(result):
    found = erasures(result, ["L0H1", "0_mlp_out"])
    fig = found.plot(4)
    assert list(fig.data[0].y) == ["L0H1", "0_mlp_out"]
    columns = [name.removeprefix("after it, ") for name in fig.data[0].x]
    table = found.to_dataframe().set_index(["writer", "eraser"])["logits"]
    assert len(columns) == 4 and columns == [x for x in found.labels if x in columns]
    drawn = {
        (w, e): fig.data[0].z[i][j]
        for i, w in enumerate(found.writers)
        for j, e in enumerate(columns)
    }
    for pair, value in table.items():
        if pair in drawn:
            assert drawn[pair] == pytest.approx(value, abs=1e-6)
    assert min(abs(table.loc[[p for p in table.index if p in drawn]])) > 0


def test_groups_stand_beside_each_other_in_their_own_colours():
    one = np.array([1.0, -2.0])
    groups = {"ABBA": (one, one - 0.5, one + 0.25), "BABA": (2 * one, 2 * one - 1, 2 * one + 1)}
    fig = effects.by_group(["L0H0", "L0H1"], groups, Heading("two groups"))
    assert [trace.name for trace in fig.data] == list(groups)
    for trace, (mean, low, high) in zip(fig.data, groups.values(), strict=True):
        np.testing.assert_allclose(trace.x, mean)
        np.testing.assert_allclose(trace.error_x.array, high - mean)
        np.testing.assert_allclose(trace.error_x.arrayminus, mean - low)
    assert fig.data[0].marker.color != fig.data[1].marker.color
    assert (fig.data[0].y < fig.data[1].y).all()
    assert charts.ledger_axis(["L0H0", "L0H1"])["ticktext"] == list(fig.layout.yaxis.ticktext)

"""Figures say what the result says: values, order, ends and names, and never only a mean."""

import re

import numpy as np
import pytest

from tests.support.pages import NASTY, PROMPTS, bridge, own_logits
from tl_dla import attribute_path, direct_logit_attribution
from tl_dla.analyses.logit_lens import logit_lens
from tl_dla.core.view import view_of
from tl_dla.errors import ArgumentError
from tl_dla.figures import charts, plots, theme
from tl_dla.figures.charts import Heading
from tl_dla.figures.text import number
from tl_dla.figures.view import fold

ANSWERS, INCORRECT = ["mat", "on", "sat"], ["cat", "dog", "the"]
UNITS = ("component", "head", "layer")


def attribute(prompts=PROMPTS[0], answer="mat", incorrect="cat", **options):
    return direct_logit_attribution(bridge(), prompts, answer, incorrect, **options)


def batch(unit="component", **options):
    return attribute(PROMPTS, ANSWERS, INCORRECT, unit=unit, **options)


def own_difference(i: int) -> float:
    right, wrong = own_logits(PROMPTS[i], ANSWERS[i], INCORRECT[i])
    return right - wrong


def values_of(result) -> np.ndarray:
    """`[row, prompt]`, by way of the table."""
    table = result.to_dataframe()
    wide = table.pivot(index="label", columns=["prompt", "position"], values="attribution")
    return wide.loc[result.labels].to_numpy(dtype=np.float64)


# ---- the ledger --------------------------------------------------------------------------------


def test_the_waterfall_has_every_row_and_ends_at_the_models_own_logit():
    result = attribute()
    figure = result.plot()
    bars = figure.data[0]
    right, wrong = own_logits(PROMPTS[0], "mat", "cat")
    assert list(figure.layout.yaxis.ticktext) == [*result.labels, "model's own logit"]
    np.testing.assert_array_equal(bars.x[:-1], values_of(result)[:, 0])
    np.testing.assert_allclose(bars.x[-1], right - wrong, rtol=1e-5)
    np.testing.assert_allclose(np.sum(bars.x[:-1]), right - wrong, rtol=1e-5)
    # Each step begins where the one before it ends, and the total at 0.
    begin = [0.0, *np.cumsum(bars.x)[:-2], 0.0]
    assert list(bars.base) == pytest.approx(begin, abs=1e-5)
    assert str(result.reconstruction) in figure.layout.title.text
    assert "'mat' − 'cat'" in figure.layout.title.text
    assert figure.layout.xaxis.title.text == "logits"


@pytest.mark.parametrize(
    ("pos", "answer", "incorrect"), [(1, "dog", "a"), (4, "cat", "dog"), (-1, "mat", "cat")]
)
def test_the_number_left_of_a_falling_row_stays_clear_of_the_names(pos, answer, incorrect):
    figure = attribute(answer=answer, incorrect=incorrect, pos=pos).plot()
    steps = np.asarray(figure.data[0].x)[:-1]
    ends = np.cumsum(steps)
    left, right = figure.layout.xaxis.range
    assert (steps < 0).any()
    assert (ends[steps < 0] - left).min() > 0.1 * (right - left)  # seven characters
    assert left < min(0, ends.min()) and right > ends.max()


def test_hover_gives_label_value_share_and_prompt():
    result = attribute()
    row = result.labels.index("1_mlp_out")
    hover = result.plot().data[0].hovertext[row]
    value = values_of(result)[row, 0]
    right, wrong = own_logits(PROMPTS[0], "mat", "cat")
    assert "1_mlp_out" in hover and f"{value:+.4f} logits" in hover
    assert f"{value / (right - wrong):.1%} of the logit" in hover
    assert f"[BOS] {PROMPTS[0]}" in hover and "position 8 'cat'" in hover


def test_a_path_is_never_called_the_models_own_logit(tmp_path):
    path = attribute_path(attribute(unit="head"), "L2H1", 3, unit="component")
    figure, page = path.plot(), path.report(tmp_path / "page.html").read_text(encoding="utf-8")
    assert figure.layout.yaxis.ticktext[-1] == "row L2H1←3"
    assert "'mat' − 'cat', through L2H1←3<" in figure.layout.title.text
    assert "Row L2H1←3 of the logit difference: <b>" in page
    assert "&#39;cat&#39;, through L2H1←3</h1>" in page
    assert ", through L2H1←3</b>" in path._repr_html_()
    assert "row L2H1←3" in path._repr_html_()
    seen = figure.to_json() + re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search("model[’']s own", seen + path._repr_html_())


def test_small_rows_are_added_up_and_the_sum_stays():
    result = attribute(unit="head")
    figure = plots.ledger(view_of(result), k=6)
    bars, values = figure.data[0], values_of(result)[:, 0]
    named = list(figure.layout.yaxis.ticktext)
    largest = set(np.argsort(-np.abs(values))[:6])
    assert set(named[:6]) == {label for i, label in enumerate(result.labels) if i in largest}
    assert named[6:] == [f"{len(result) - 6} smaller rows", "model's own logit"]
    rest = sum(v for i, v in enumerate(values) if i not in largest)
    np.testing.assert_allclose(bars.x[6], rest, rtol=1e-6)
    np.testing.assert_allclose(sum(bars.x[:-1]), bars.x[-1], rtol=1e-4)
    assert list(bars.marker.opacity) == [1.0] * 6 + [theme.PALE, 1.0]  # no louder than the named


@pytest.mark.parametrize("unit", ["neuron", "source"])
def test_what_splits_a_sublayer_stands_at_its_place_in_the_stream(unit):
    result = attribute(unit=unit)
    named = list(result.plot(k=len(result)).layout.yaxis.ticktext)[:-1]
    assert sorted(named) == sorted(result.labels)
    # Each neuron and source row stands where the component that it is a part of does.
    part = {"H": "attn_out", "N": "mlp_out"}
    own = [re.sub(r"^L(\d+)([HN]).*", lambda m: f"{m[1]}_{part[m[2]]}", x) for x in named]
    own = [label.replace("_bias", "_out") for label in own]
    assert list(dict.fromkeys(own)) == attribute().labels


def test_one_row_too_many_is_not_folded_into_itself():
    values = np.array([[3.0], [1.0], [2.0]])
    assert fold(["a", "b", "c"], values, values, 2)[0] == ["a", "b", "c"]
    values = np.array([[3.0], [1.0], [-2.0], [0.5]])
    names, folded = fold(["a", "b", "c", "d"], values, values, 2)
    assert names == ["a", "c", "2 smaller rows"]
    np.testing.assert_array_equal(folded[:, 0], [3.0, -2.0, 1.5])


def test_a_batch_shows_the_mean_and_every_prompt():
    result = batch()
    figure = result.plot()
    bars, *dots = figure.data
    values = values_of(result)
    own = [own_difference(i) for i in range(3)]
    np.testing.assert_allclose(bars.x[:-1], values.mean(1), rtol=1e-12)
    np.testing.assert_allclose(bars.x[-1], np.mean(own), rtol=1e-5)
    shown = np.stack([dot.x for dot in dots], 1)
    np.testing.assert_array_equal(shown[:-1], values)
    np.testing.assert_allclose(shown[-1], own, rtol=1e-5)
    for i, dot in enumerate(dots):
        assert np.all(np.abs(dot.y - np.arange(len(shown))) < 0.5)
        assert list(dot.text) == [*result.labels, "model's own logit"]
        assert PROMPTS[i] in dot.hovertemplate and f"prompt {i}" in dot.hovertemplate
        np.testing.assert_allclose(dot.customdata, shown[:, i] / own[i], rtol=1e-5)


def test_one_prompt_of_a_batch_is_the_same_as_alone():
    alone = attribute(PROMPTS[1], "on", "dog").plot().data[0].x
    np.testing.assert_allclose(batch().plot(prompt=1).data[0].x, alone, atol=2e-6)


def test_without_biases_the_end_is_named_so():
    result = attribute(include_bias=False)
    assert list(result.plot().layout.yaxis.ticktext)[-1] == "logit without biases"


# ---- heads -------------------------------------------------------------------------------------


def test_heads_stand_at_their_layer_and_index_and_the_others_beside():
    result = attribute(unit="head")
    figure = result.plot()
    grid, values = np.asarray(figure.data[0].z), values_of(result)[:, 0]
    assert grid.shape == (3, 5)
    for layer in range(3):
        for head in range(5):
            row = result.labels.index(f"L{layer}H{head}")
            assert grid[layer, head] == values[row]
    scale = figure.layout.coloraxis
    assert scale.cmin == -scale.cmax == -np.abs(grid).max()
    beside, below = {}, {}
    for trace in figure.data[1:]:
        for text, x, y in zip(trace.hovertext, trace.x, trace.y, strict=True):
            (below if trace.xaxis == "x8" else beside)[text.split("<br>")[0]] = (x, y)
    others = [i for i, kind in enumerate(result.kinds) if kind != "head"]
    assert len(beside) + len(below) == len(others) + 1
    for row in others:
        layer = result.layers[row]
        x, y = (below if layer is None else beside)[f"<b>{result.labels[row]}</b>"]
        assert x == values[row] and (layer is None or y == layer)
    right, wrong = own_logits(PROMPTS[0], "mat", "cat")
    assert below["<b>model's own logit</b>"][0] == pytest.approx(right - wrong, rel=1e-5)
    outside = ["embed", "pos_embed", "ln_final.b", "model's own logit"]
    assert list(figure.layout.yaxis8.ticktext) == outside
    headings = {note.text for note in figure.layout.annotations}
    assert {"<b>head</b>", "<b>attn_bias</b>", "<b>mlp_out</b>"} <= headings
    assert "<b>embeddings, biases, and the total</b>" in headings


def test_a_number_is_written_in_each_cell_that_has_room_for_it():
    result = attribute(unit="head")
    written = np.array(result.plot(width=900).data[0].text)
    assert written[2, 3] == number(float(result["L2H3"][0]))[:6]
    assert result.plot(width=300).data[0].text is None


def test_a_model_of_two_heads_can_be_drawn_and_reported(tmp_path):
    for unit in UNITS:
        for prompts in (PROMPTS[0], PROMPTS):
            small = bridge(n_layers=2, n_heads=2)
            result = direct_logit_attribution(small, prompts, "mat", "cat", unit=unit)
            assert result.plot().data and result.plot(width=400).layout.width == 400
    assert result.report(tmp_path / "page.html").stat().st_size > 100_000
    top = direct_logit_attribution(small, PROMPTS, "mat", unit="head").plot().layout.yaxis9
    assert len(top.ticktext) == 4


def test_a_title_and_a_size_can_be_given():
    for unit in UNITS:
        layout = attribute(unit=unit).plot(title="<i>mine", width=400, height=700).layout
        assert (layout.width, layout.height) == (400, 700)
        assert layout.title.text.startswith("&lt;i&gt;mine<br>")
        assert attribute(unit=unit).plot(title="").layout.title.text == ""
    layout = logit_lens(bridge(), "a dog").plot(title="mine", width=400, height=300).layout
    assert (layout.width, layout.height) == (400, 300) and layout.title.text.startswith("mine<br>")


def test_a_batch_of_heads_shows_every_prompt_of_the_top_ones():
    result = batch("head")
    values = values_of(result)
    figure = plots.heads(view_of(result), k=4)
    grid = np.asarray(figure.data[0].z)
    assert grid[2, 3] == pytest.approx(values[result.labels.index("L2H3")].mean(), rel=1e-12)
    bars, *dots = figure.data[-4:]
    heads = [i for i, kind in enumerate(result.kinds) if kind == "head"]
    top = sorted(heads, key=lambda i: -abs(values[i].mean()))[:4]
    assert list(figure.layout.yaxis9.ticktext) == [result.labels[i] for i in top]
    np.testing.assert_allclose(bars.x, values[top].mean(1), rtol=1e-12)
    np.testing.assert_array_equal(np.stack([dot.x for dot in dots], 1), values[top])
    row = result.labels.index("L2H3")
    low, high = values[row].min(), values[row].max()
    assert figure.data[0].customdata[2][3] == f"{low:+.4f} to {high:+.4f}"


def test_a_missing_head_is_an_empty_cell():
    result = attribute(unit="head")
    keep = [i for i, label in enumerate(result.labels) if label != "L1H4"]
    import dataclasses

    keys = [result.keys[i] for i in keep]
    fewer = dataclasses.replace(result, values=result.values[keep], keys=keys)
    grid = np.asarray(fewer.plot().data[0].z)
    assert np.isnan(grid[1, 4]) and np.isfinite(np.delete(grid.ravel(), 9)).all()


# ---- layers ------------------------------------------------------------------------------------


def test_the_trajectory_passes_every_reading_and_ends_at_the_logit():
    result = attribute(unit="layer")
    figure = result.plot()
    points = next(trace for trace in figure.data if trace.name == "readings")
    values = values_of(result)[:, 0]
    readings = [v for v, kind in zip(values, result.kinds, strict=True) if kind == "residual"]
    bias = values[result.labels.index("ln_final.b")]
    right, wrong = own_logits(PROMPTS[0], "mat", "cat")
    np.testing.assert_allclose(points.y, [*readings, readings[-1] + bias], rtol=1e-12)
    np.testing.assert_allclose(points.y[-1], right - wrong, rtol=1e-5)
    steps = {trace.name: trace for trace in figure.data if trace.mode == "lines"}
    assert set(steps) == {"attention", "MLP", "bias"}
    components = attribute()
    table = components.to_dataframe().set_index("label")["attribution"]
    for name, writer in (("attention", "attn_out"), ("MLP", "mlp_out")):
        y = np.array(steps[name].y, dtype=float).reshape(-1, 3)
        written = [table[f"{layer}_{writer}"] for layer in range(3)]
        np.testing.assert_allclose(y[:, 1] - y[:, 0], written, atol=2e-6)


def test_a_batch_of_trajectories_draws_each_prompt():
    result = batch("layer")
    figure = result.plot()
    ends = [line.y[-1] for line in figure.data[:3]]
    np.testing.assert_allclose(ends, [own_difference(i) for i in range(3)], rtol=1e-5)
    assert PROMPTS[2] in figure.data[2].hovertemplate


# ---- candidates, positions, datasets -----------------------------------------------------------


def over_candidates(prompts=PROMPTS[0], **options):
    return direct_logit_attribution(
        bridge(), prompts, candidate_tokens=["mat", "cat", "on"], **options
    )


def test_candidates_are_columns_that_name_their_logit():
    result = over_candidates()
    figure = result.plot()
    np.testing.assert_allclose(figure.data[0].z, result.attribution[:, 0], rtol=1e-7)
    names = list(figure.layout.xaxis.ticktext)
    for name, word, logit in zip(
        names, ("mat", "cat", "on"), own_logits(PROMPTS[0], "mat", "cat", "on"), strict=True
    ):
        assert name == f"'{word}'<br>{number(logit)}"
    one = result.plot(candidate="cat")
    np.testing.assert_allclose(one.data[0].x[:-1], result.attribution[:, 0, 1], rtol=1e-7)
    np.testing.assert_array_equal(one.data[0].x, result.plot(candidate=1).data[0].x)


def test_a_title_names_the_first_and_the_last_of_many_tokens():
    words = ["mat", "cat", "on", "dog", "the", "sat"]
    ranked = direct_logit_attribution(bridge(), PROMPTS[0], candidate_tokens=words)
    assert "of 'mat', 'cat', 'on', …, 'sat'<" in ranked.plot().layout.title.text
    mean = attribute(incorrect=[words[1:] + ["a"]])
    assert "of 'mat' − mean('cat', 'on', 'dog', …, 'a')<" in mean.plot().layout.title.text
    few = direct_logit_attribution(bridge(), PROMPTS[0], candidate_tokens=words[:5])
    assert "of 'mat', 'cat', 'on', 'dog', 'the'<" in few.plot().layout.title.text


def test_candidates_of_a_batch_have_a_column_for_each_prompt():
    result = over_candidates(PROMPTS)
    z = np.asarray(result.plot().data[0].z)
    values = result.attribution.double().numpy()
    assert z.shape == (len(result), 12)
    np.testing.assert_allclose(z[:, 4], values[:, :, 1].mean(1), rtol=1e-12)
    np.testing.assert_array_equal(z[:, 5:8], values[:, :, 1])


def test_candidates_at_several_positions_name_prompt_and_token():
    for prompts, names in ((PROMPTS[:1], ["[BOS]", "cat"]), (PROMPTS[:2], ["0: [BOS]", "0: cat"])):
        figure = over_candidates(prompts, pos=[0, -1]).plot()
        columns = [name.partition("<br>")[0] for name in figure.layout.xaxis.ticktext]
        assert columns[:3] == ["'mat' mean", *names]


def test_candidates_by_layer_are_lines():
    result = over_candidates(unit="layer")
    figure = result.plot()
    own = own_logits(PROMPTS[0], "mat", "cat", "on")
    assert [trace.name for trace in figure.data] == ["'mat'", "'cat'", "'on'"]
    np.testing.assert_allclose([trace.y[-1] for trace in figure.data], own, rtol=1e-5)
    assert figure.layout.hovermode == "x unified"  # one hover for all lines
    assert "'cat'" in figure.data[1].hovertemplate
    assert list(figure.data[0].x) == result.labels


def test_positions_of_one_prompt_are_columns_of_tokens():
    result = attribute(pos=None)
    figure = result.plot()
    np.testing.assert_array_equal(figure.data[0].z, result.attribution[:, 0].double())
    assert [name.split("<br>")[0] for name in figure.layout.xaxis.ticktext] == [
        "[BOS]", *PROMPTS[0].split()
    ]  # fmt: skip


def test_positions_of_a_batch_are_all_dots():
    result = batch(pos=None)
    _, *dots = result.plot().data
    assert len(dots) == 9 + 6 + 3
    assert all(len(dot.x) == len(result) + 1 and np.isfinite(dot.x).all() for dot in dots)


def test_dataset_intervals_show_means_and_ends():
    mean, low, high = np.array([1.0, -2.0]), np.array([0.5, -2.5]), np.array([2.0, -1.0])
    bars = charts.intervals(["L0H0", "<b>"], mean, low, high, heading=Heading("")).data[0]
    np.testing.assert_array_equal(bars.x, mean)
    np.testing.assert_array_equal(mean - bars.error_x.arrayminus, low)
    np.testing.assert_array_equal(mean + bars.error_x.array, high)
    assert "&lt;b&gt;" in bars.hovertext[1] and "-2.5000 to -1.0000" in bars.hovertext[1]
    with pytest.raises(ArgumentError, match="one entry per label: 1 labels and 2 mean"):
        charts.intervals(["a"], mean, low, high, heading=Heading(""))


def test_positions_of_a_trajectory_are_named_and_never_averaged():
    result = attribute(unit="layer", pos=None)
    figure, words = result.plot(), ["[BOS]", *PROMPTS[0].split()]
    assert len(figure.data) == len(words)
    np.testing.assert_allclose([line.y[-1] for line in figure.data], result.logit[0], rtol=1e-5)
    named = [note.text.split(" ")[0] for note in figure.layout.annotations]
    assert sorted(named) == sorted(words)
    assert all(f"position {i}" in line.name for i, line in enumerate(figure.data))


def test_one_column_cannot_take_all_the_colours():
    result = attribute(pos=None)
    largest = sorted(np.abs(result.attribution[:, 0].numpy()).max(0))
    assert result.plot().layout.coloraxis.cmax == pytest.approx(largest[-2])


# ---- what cannot be drawn ----------------------------------------------------------------------


def test_user_text_is_never_markup():
    for unit in UNITS:
        drawn = attribute(NASTY, "<script>alert(1)</script>", unit=unit).plot().to_json()
        assert "<script" not in drawn and "\\u003cscript" not in drawn and "&lt;script" in drawn
    lens = logit_lens(bridge(), NASTY).plot().to_json()
    assert "<script" not in lens and "\\u003cscript" not in lens


@pytest.mark.parametrize(
    ("draw", "sentence"),
    [
        (lambda: attribute().plot(k=0), "k must be at least 1; 0 was given"),
        (lambda: batch().plot(prompt=3), "prompt must be one of the result's 3; 3 was given"),
        (lambda: plots.heads(view_of(attribute())), 'attribute with unit="head"'),
        (lambda: plots.heads(view_of(batch("head")), k=0), "k must be at least 1; 0 was given"),
        (lambda: attribute().plot(width=0), "width must be a number of pixels; 0 was given"),
        (lambda: plots.trajectory(view_of(attribute())), 'attribute with unit="layer"'),
        (lambda: plots.ledger(view_of(attribute(unit="layer"))), "no parts of a sum"),
        (lambda: plots.candidates(view_of(attribute())), "attribute with candidate_tokens"),
        (lambda: over_candidates().plot(candidate="dog"), "one of 'mat', 'cat', 'on'"),
        (lambda: logit_lens(bridge(), "a dog").plot(colour="rank"), "pass answer_tokens"),
        (
            lambda: logit_lens(bridge(), "a dog", "cat").plot(colour="logit", token=1),
            "index of one of the 1 asked for; 1 was given",
        ),
        (lambda: logit_lens(bridge(), "a dog").plot(prompt=1), "one of the lens's 1; 1 was given"),
    ],
)
def test_bad_input_gets_a_sentence(draw, sentence):
    with pytest.raises(ArgumentError, match=sentence):
        draw()

"""The report and the notebook display: their numbers, their words, and what they never hold."""

import base64
import dataclasses
import gzip
import re
from importlib.metadata import version
from pathlib import Path

import markupsafe
import numpy as np
import pytest
import torch

from tests.support.pages import NASTY, PROMPTS, bridge, own_logits
from tl_dla import direct_logit_attribution
from tl_dla.analyses.head_patterns import top_heads_with_patterns
from tl_dla.errors import ArgumentError
from tl_dla.figures import embedded
from tl_dla.figures.attention_view import AttentionView
from tl_dla.figures.text import number
from tl_dla.report.sections import of_unit

LIMIT = 8_000_000  # bytes


def attribute(prompts=PROMPTS[0], answer="mat", incorrect="cat", **options):
    return direct_logit_attribution(bridge(), prompts, answer, incorrect, **options)


def written(result, folder, **options) -> str:
    path = result.report(folder / "page.html", **options)
    assert path.stat().st_size < LIMIT
    return path.read_text(encoding="utf-8")


def body_of(page: str) -> str:
    """The page without its scripts, which are megabytes."""
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def unpacked(page: str, name: str) -> str:
    """The one script of that name, as the browser unpacks it."""
    (data,) = re.findall(rf'<script type="text/plain" id="{name}">(.*?)</script>', page)
    return gzip.decompress(base64.b64decode(data)).decode()


def html_of(text: str) -> str:
    """Text as the page writes it."""
    return str(markupsafe.escape(text))


def numbers_in(table: str) -> list[list[str]]:
    """The cells of a table that are numbers, row by row."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", table, flags=re.DOTALL)
    return [found for row in rows if (found := re.findall(r">([+−][\d.]+)</td>", row))]


# ---- the page ----------------------------------------------------------------------------------


def test_the_page_holds_each_script_once_and_loads_nothing(tmp_path):
    page = written(attribute(), tmp_path)
    assert len(page) < 3_000_000
    scripts = [unpacked(page, name) for name in ("plotly", "circuitsvis")]
    assert "plotly.js v" in scripts[0][:100] and "var CircuitsVis=" in scripts[1]
    assert not any("sourceMappingURL" in script for script in scripts)
    assert "default-src 'none'" in page
    body = body_of(page)
    assert not re.search(r"""(src|href)\s*=""", body)
    assert "{{" not in body


def test_the_header_says_what_where_how_much_and_whether_it_adds_up(tmp_path):
    result = attribute()
    body = body_of(written(result, tmp_path))
    right, wrong = own_logits(PROMPTS[0], "mat", "cat")
    assert html_of("What wrote the logit of 'mat' − 'cat'") in body
    assert f"logit difference: <b>{number(right - wrong)}</b>" in body
    assert "GPT2LMHeadModel · 3 layers · 5 heads · d_model 20 · float32" in body
    marked = re.findall(r'<span class="token read" title="position (\d+)".*?>(.*?)</span>', body)
    assert marked == [("8", "cat")]
    assert '<p class="certificate passed">✓ rows add up to' in body
    assert str(tmp_path.parent) not in body.replace(str(tmp_path), "")


def test_the_models_folder_is_not_told(tmp_path):
    model_name = str(bridge().cfg.model_name)
    assert "/" in model_name.strip("/")  # it was loaded from a folder
    folder = model_name.rpartition("/")[0]
    assert folder not in written(attribute(), tmp_path)


def test_the_numbers_are_the_results(tmp_path):
    result = attribute()
    body = body_of(written(result, tmp_path))
    details = re.findall(r"<details>.*?</details>", body, flags=re.DOTALL)
    assert [text.split("in numbers")[0].rpartition(">")[2] for text in details] == ["all rows "] * 3
    right, wrong = own_logits(PROMPTS[0], "mat", "cat")
    expected = [[number(float(x))] for x in result.attribution[:, 0]]
    assert numbers_in(details[0]) == [*expected, *[[number(right - wrong)]] * 2]
    heads = direct_logit_attribution(bridge(), PROMPTS[0], "mat", "cat", unit="head")
    assert numbers_in(details[1])[:-2] == [[number(float(x))] for x in heads.attribution[:, 0]]


def test_top_heads_come_with_what_they_read(tmp_path):
    body = body_of(written(attribute(), tmp_path, k=2))
    own = top_heads_with_patterns(attribute(unit="head"), k=2)
    named = re.findall(r'<h3 id=".*?">(L\dH\d) <span class="value">(.*?)</span>', body)
    assert named == [(head.label, number(float(head.value[0]))) for head in own]
    assert body.count('<table class="plain"><thead><tr><th scope="col">reads') == len(own)
    token, at, attention, moved = own[0].reads(1)[0]
    assert f"<code>{html_of(repr(token))}</code></td>" in body
    assert f'<td class="n">{at}</td><td class="n">{attention:.1%}</td>' in body
    assert f'<td class="n">{number(moved)}</td>' in body


def test_the_certificate_lists_every_refined_row(tmp_path):
    result = attribute(unit="head")
    body = body_of(written(result, tmp_path))
    table = body[body.index(">Certificate</h2>") :]
    right, wrong = own_logits(PROMPTS[0], "mat", "cat")
    assert table.count('<tr><th scope="row">✓') == 1 + 3
    assert f'<td class="n">{right - wrong:.5f}' in table
    assert "the heads of 2_attn_out" in table


def test_a_failed_certificate_is_seen_everywhere(tmp_path):
    result = attribute()
    wrong = dataclasses.replace(result.reconstruction, expected=result.logit + 1.0)
    failed = dataclasses.replace(result, reconstruction=wrong)
    body = body_of(written(failed, tmp_path))
    assert '<p class="certificate failed">✗ FAILED: the rows miss' in body
    assert '<tr><th scope="row">✗ rows against' in body
    assert "✗ FAILED" in failed._repr_html_()
    assert "✗ FAILED" in failed.plot().layout.title.text


def test_versions_and_command_are_named(tmp_path):
    command = "tl-dla report 'a <b>' --out page.html"
    body = body_of(written(attribute(), tmp_path, command=command))
    assert f"<pre>{html_of(command)}</pre>" in body
    assert f'<th scope="row">torch</th><td>{version("torch")}</td>' in body
    assert ">transformer-lens</th>" in body and ">Python</th>" in body
    assert "result.report(" in body_of(written(attribute(), tmp_path))


def test_what_a_user_wrote_is_text(tmp_path):
    page = written(attribute(NASTY, "<script>alert(1)</script>", "{{plotly}}"), tmp_path)
    assert "alert(1)</script>" not in page
    body = body_of(page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in body
    assert re.search(r'title="position 8"[^>]*>&lt;/script&gt;&lt;b&gt;</span>', body)
    assert "{{plotly}}</span>" in body and unpacked(page, "plotly")
    assert "<b></span>" not in body and "<!--" not in body.split("</head>")[1]


def test_a_batch_shows_every_prompt_and_the_range(tmp_path):
    answers, incorrect = ["mat", "on", "sat"], ["cat", "dog", "the"]
    body = body_of(written(attribute(PROMPTS, answers, incorrect), tmp_path, prompt=1))
    triples = zip(PROMPTS, answers, incorrect, strict=True)
    own = [np.subtract(*own_logits(*triple)) for triple in triples]
    assert f"mean <b>{number(np.mean(own))}</b>" in body
    assert f"from {number(min(own))} to {number(max(own))}" in body
    assert body.count('<p class="prompt" title="prompt') == 3
    assert re.findall(r'token read" title="position (\d)"', body) == ["8", "5", "2"]
    assert "Prompt 1, until another is chosen." in body


def test_a_card_is_of_the_prompt_shown_with_the_mean_beside_it(tmp_path):
    result = attribute(PROMPTS, ["mat", "on", "sat"], None, unit="head")
    body = body_of(written(result, tmp_path, prompt=1, k=2))
    named = re.findall(r'<h3 id=".*?">(L\dH\d) <span class="value">(.*?)</span> <.*?>(.*?);', body)
    of_prompts = [re.findall(r'data-cards="(\d)"( hidden)?', body)]
    assert of_prompts == [[("1", ""), ("0", " hidden"), ("2", " hidden")]]
    alone = [attribute(PROMPTS[b], ["mat", "on", "sat"][b], None, unit="head") for b in (1, 0, 2)]
    assert named == [
        (label, number(float(own[label])), f"mean {number(float(result[label].mean()))} over 3")
        for own in alone
        for label in (head.label for head in top_heads_with_patterns(result, k=2))
    ]


def test_a_direct_effect_is_said_to_be_an_observation(tmp_path):
    assert "not what removing the part would do" in body_of(written(attribute(), tmp_path))


def test_readings_are_not_said_to_add_up(tmp_path):
    result = attribute(unit="layer")
    certificate = "the last reading and the biases are the model's own logit"
    for text in (repr(result), result.plot().layout.title.text, result._repr_html_()):
        assert certificate in text and "rows add up" not in text
    body = body_of(written(result, tmp_path))
    assert html_of(f"✓ {certificate}") in body and "final_post and the biases against" in body
    *points, bias = result.attribution[:, 0].tolist()
    shown = numbers_in(result._repr_html_())
    assert shown[:-2] == [[number(x)] for x in [*points, bias]]  # in the order of depth
    assert shown[-2] == [number(points[-1] + bias)] == shown[-1]


def test_candidates_and_positions_can_be_reported(tmp_path):
    over = direct_logit_attribution(bridge(), PROMPTS[0], candidate_tokens=["mat", "cat"])
    assert "3 candidate" not in body_of(written(over, tmp_path))
    assert "2 candidate tokens" in body_of(written(over, tmp_path))
    everywhere = body_of(written(attribute(pos=None), tmp_path))
    assert len(re.findall(r'token read" title="position', everywhere)) == 9


def test_a_result_of_a_cache_is_reported_without_running_anything(tmp_path):
    tokens = bridge().to_tokens(PROMPTS[0])
    _, cache = bridge().run_with_cache(tokens)
    answer = bridge().to_single_token("mat")
    result = direct_logit_attribution(bridge(), answer_tokens=answer, cache=cache)
    body = body_of(written(result, tmp_path))
    assert "nothing else was run" in body and ">Heads</h2>" not in body
    assert ">Components</h2>" in body and "[UNK]" not in body


def test_other_units_are_of_the_same_prompts(tmp_path):
    result = attribute(PROMPTS, ["mat", "on", "sat"], None, pos=[0, -1])
    same = direct_logit_attribution(
        bridge(), PROMPTS, ["mat", "on", "sat"], pos=[0, -1], unit="head"
    )
    torch.testing.assert_close(of_unit(result, "head").attribution, same.attribution)
    assert of_unit(result, "component") is result


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"k": 16}, "k must be 1 to the 15 heads of the result; 16 was given"),
        ({"k": 0}, "k must be 1 to the 15 heads of the result; 0 was given"),
        ({"prompt": 1}, "prompt must be one of the result's 1; 1 was given"),
    ],
)
def test_bad_options_get_a_sentence(tmp_path, options, sentence):
    with pytest.raises(ArgumentError, match=sentence):
        attribute().report(tmp_path / "page.html", **options)
    assert not (tmp_path / "page.html").exists()


def test_a_path_that_cannot_be_written_gets_a_sentence(tmp_path):
    with pytest.raises(ArgumentError, match=r"cannot be written to .*: there is no folder"):
        attribute().report(tmp_path / "nowhere" / "page.html")
    with pytest.raises(ArgumentError, match="it is a folder; name a file"):
        attribute().report(tmp_path)
    with pytest.raises(ArgumentError, match=r"cannot be written to .*too long"):
        attribute().report(tmp_path / ("x" * 300))


def test_a_page_that_cannot_be_finished_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("before", encoding="utf-8")
    write = Path.write_text

    def full(self, text, **options):
        write(self, text[:100], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ArgumentError, match="cannot be written to .*: No space left on device"):
        attribute().report(path)
    assert path.read_text(encoding="utf-8") == "before"
    assert [one.name for one in tmp_path.iterdir()] == ["page.html"]


# ---- the notebook ------------------------------------------------------------------------------


def test_a_notebook_shows_the_largest_rows_and_the_certificate():
    result = attribute()
    html = result._repr_html_()
    largest = result.top(12, by="magnitude")
    right, wrong = own_logits(PROMPTS[0], "mat", "cat")
    assert numbers_in(html) == [[number(v)] for _, v in largest] + [[number(right - wrong)]] * 2
    assert [f">{label}</th>" in html for label, _ in largest] == [True] * len(largest)
    assert html.count('class="bar"') == len(largest)
    assert str(result.reconstruction) in html
    assert "<script" not in html and "<style" not in html


def test_a_notebook_adds_up_the_rows_it_leaves_out():
    result = attribute(unit="head")
    html = result._repr_html_()
    values = np.array([float(x) for x in result.attribution[:, 0]])
    rest = values[np.argsort(-np.abs(values), kind="stable")[12:]].sum()
    assert f"{len(values) - 12} smaller rows" in html
    assert numbers_in(html)[12] == [number(rest)]
    assert "smaller rows" not in attribute(unit="layer")._repr_html_()


def test_bars_are_as_long_as_their_values():
    result = attribute()
    html = result._repr_html_()
    widths = [float(w) for w in re.findall(r'class="bar" x="[\d.]+" y="3" width="([\d.]+)"', html)]
    values = np.array([abs(value) for _, value in result.top(12, by="magnitude")])
    np.testing.assert_allclose(widths, 71 * values / values.max(), atol=0.01)


def test_a_notebook_shows_every_prompt_and_every_candidate():
    three = attribute(PROMPTS, ["mat", "on", "sat"])._repr_html_()
    assert three.count("<circle") == 3 * three.count('class="bar"')
    many = attribute([PROMPTS[0]] * 30, "mat", "cat")._repr_html_()
    assert "<circle" not in many and many.count("<title>from") == many.count('class="bar"')
    over = direct_logit_attribution(bridge(), PROMPTS[0], candidate_tokens=["mat", "cat"])
    html = over._repr_html_()
    assert numbers_in(html)[-1] == [number(x) for x in own_logits(PROMPTS[0], "mat", "cat")]
    assert "&lt;script&gt;" in attribute(NASTY, "<script>alert(1)</script>")._repr_html_()


# ---- attention ---------------------------------------------------------------------------------


def test_attention_is_a_frame_of_fixed_height_with_its_own_script():
    view = AttentionView(["a", "</script>"], torch.eye(2)[None], ["L0H0"], "heads", height=321)
    html = view._repr_html_()
    assert html.startswith("<iframe srcdoc=") and 'height="321"' in html
    page = view.page()
    assert '"element":"AttentionHeads"' in page and '"attentionHeadNames":["L0H0"]' in page
    assert "unpkg" not in page and "var CircuitsVis=" in unpacked(page, "circuitsvis")
    assert page.count("</script>") == 3 and len(html) < 600_000
    with pytest.raises(ArgumentError, match=r"\[1, 2, 2\] for 1 labels and 2 tokens"):
        AttentionView(["a", "b"], torch.zeros(1, 2, 3), ["L0H0"])


def test_text_cannot_leave_a_script():
    assert unpacked(embedded.packed("x", "a\n//# sourceMappingURL=x.map\nb"), "x") == "a\nb"
    assert embedded.as_json("</script><!--") == '"\\u003c/script>\\u003c!--"'

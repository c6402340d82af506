"""The page of an attribution to inputs: its flow for every choice, beside the other units."""

import json

import numpy as np
import pytest

from tests.report.test_page import body_of, unpacked, written
from tests.support.pages import NASTY, PROMPTS, bridge
from tl_dla import attribute_inputs


def test_the_page_draws_tokens_and_flow_and_the_other_units(tmp_path):
    result = attribute_inputs(bridge(), PROMPTS, "mat", "cat", pos=[2, -1])
    page = written(result, tmp_path)
    body = body_of(page)
    titles = ("Tokens and biases", "Where the answer is held", "Components", "Heads", "Logit lens")
    places = [body.index(f"{title}</h2>") for title in titles]
    assert places == sorted(places)
    figures = json.loads(unpacked(page, "figures"))
    [flow] = [x for x in figures.values() if any("flow" in f["label"] for f in x.values())]
    for key, b, p in (("||", 0, 1), ("1||", 1, 1), ("1|2|", 1, 0)):
        drawn = flow[key]["data"][0]["z"]
        z = np.asarray(decoded(drawn))
        n = int(result.positions.index[b, p]) + 1
        np.testing.assert_allclose(z[:, :n], result.flow[:, b, p, :n].numpy(), atol=1e-6)
        np.testing.assert_allclose(z.sum(1), float(result.logit[b, p]), atol=1e-5)


def decoded(values):
    """Numbers as plotly packs them."""
    if isinstance(values, list):
        return values
    import base64

    flat = np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"])
    return flat.reshape([int(n) for n in values["shape"].split(",")])


def test_candidates_have_a_flow_each(tmp_path):
    result = attribute_inputs(bridge(), PROMPTS[0], candidate_tokens=["mat", "cat"])
    figures = json.loads(unpacked(written(result, tmp_path), "figures"))
    [flow] = [x for x in figures.values() if any("flow" in f["label"] for f in x.values())]
    assert list(flow) == ["||0", "||", "||1"]
    second = np.asarray(decoded(flow["||1"]["data"][0]["z"]))
    np.testing.assert_allclose(second.sum(1), float(result.logit[0, 1]), atol=1e-5)


def test_what_a_user_wrote_is_text(tmp_path):
    body = body_of(written(attribute_inputs(bridge(), NASTY, "mat"), tmp_path))
    assert "<img" not in body and "onerror=window.hacked=1>" not in body


def test_the_frame_of_a_notebook_holds_the_page():
    explorer = attribute_inputs(bridge(), PROMPTS[0], "mat").explore()
    assert "Where the answer is held" in explorer.page
    assert "<iframe" in explorer._repr_html_()


def test_a_cache_s_result_is_drawn_without_another_run(tmp_path):
    model = bridge()
    _, cache = model.run_with_cache(PROMPTS[0])
    result = attribute_inputs(model, PROMPTS[0], "mat", cache=cache)
    body = body_of(written(result, tmp_path))
    assert "Where the answer is held" in body and "Components" not in body
    with pytest.raises(ValueError, match="prompt must be one of"):
        written(result, tmp_path, prompt=3)

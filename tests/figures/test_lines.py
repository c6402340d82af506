"""Lines over places: what the lens reads, and rows along the stream; heads by source token."""

import numpy as np
import pytest
import torch

from tests.support.models import load
from tests.support.pages import PROMPTS, bridge
from tests.zoo.build import ANSWERS, INCORRECT, tokens
from tl_dla import direct_logit_attribution
from tl_dla.analyses.logit_lens import logit_lens
from tl_dla.errors import ArgumentError


def read_by_hand(model, prompts):
    """The stream of each prompt at its end, through the model's own norm and unembedding."""
    points = [f"blocks.{i}.hook_in" for i in range(3)] + ["ln_final.hook_in"]
    found = []
    with torch.no_grad():
        for prompt in prompts:
            _, cache = model.run_with_cache(model.to_tokens(prompt))
            found.append([model.unembed(model.ln_final(cache[x]))[0, -1] for x in points])
    return torch.stack([torch.stack(x) for x in found], 1)  # [point, prompt, d_vocab]


def test_the_lens_is_drawn_as_its_mean_over_prompts_and_a_line_for_each():
    model, answers, others = bridge(), ["mat", "on"], ["cat", "dog"]
    lens = logit_lens(model, PROMPTS[:2], answers, others, pos=-1, incl_mid=False)
    logits = read_by_hand(model, PROMPTS[:2])
    ids = [[model.to_single_token(x) for x in words] for words in (answers, others)]
    own, foil = (logits[:, [0, 1], i] for i in ids)
    chances = logits.softmax(-1)
    expected = {
        "difference": [own - foil],
        "logit": [own, foil],
        "probability": [chances[:, [0, 1], i] for i in ids],
        "rank": [(logits > x[..., None]).sum(-1) + 1.0 for x in (own, foil)],
    }
    for read, series in expected.items():
        figure = lens.plot_trajectory(read)
        each, means = figure.data[::2], figure.data[1::2]
        assert len(means) == len(series) and figure.layout.hovermode == "x unified"
        for thin, mean, values in zip(each, means, series, strict=True):
            assert list(mean.x) == lens.labels == ["0_pre", "1_pre", "2_pre", "final_post"]
            np.testing.assert_allclose(mean.y, values.mean(1), atol=1e-5)
            drawn = [y for y in thin.y if y is not None]
            np.testing.assert_allclose(drawn, values.T.flatten(), atol=1e-5)
            assert list(thin.x)[4] is None  # prompts are not joined
    assert "rank of answer, incorrect" in figure.layout.title.text
    assert figure.layout.yaxis.type == "log" and figure.layout.yaxis.autorange == "reversed"
    assert "answer − incorrect" in lens.plot_trajectory().layout.title.text


def test_a_prompt_alone_is_one_line_for_each_token_asked_for():
    lens = logit_lens(bridge(), PROMPTS[0], candidate_tokens=["mat", "<!--"], pos=-1)
    figure = lens.plot_trajectory("probability", title="x", width=400)
    assert [trace.name for trace in figure.data] == ["'mat'", "'&lt;!--'"]
    assert "probability" in figure.layout.yaxis.title.text and figure.layout.width == 400
    with pytest.raises(ArgumentError, match="not given an answer"):
        lens.plot_trajectory()
    with pytest.raises(ArgumentError, match="not given a token to read"):
        logit_lens(bridge(), PROMPTS[0], pos=-1).plot_trajectory("rank")


@pytest.mark.usefixtures("unchecked")
def test_something_else_to_read_is_refused():
    lens = logit_lens(bridge(), PROMPTS[0], candidate_tokens=["mat"], pos=-1)
    with pytest.raises(ArgumentError, match="read must be 'difference', .* 'size' was given"):
        lens.plot_trajectory("size")


def test_a_profile_is_the_rows_of_each_candidate_along_the_stream():
    result = direct_logit_attribution(load("gpt2"), tokens()[:1], candidate_tokens=[5, 7, 9])
    figure = result.plot_profile()
    assert [list(trace.x) for trace in figure.data] == [result.labels] * 3
    for trace, rows in zip(figure.data, result.attribution[:, 0].T, strict=True):
        np.testing.assert_allclose(trace.y, rows, atol=1e-7)
    assert figure.layout.hovermode == "x unified"
    zoom = result.plot_profile(layers=[-1, 1], contrast=True)
    labels = ["1_attn_out", "1_mlp_out", "2_attn_out", "2_mlp_out"]
    rows = torch.stack([result[label][0] for label in labels])
    for trace, contrast in zip(zoom.data, (rows - rows.mean(-1, keepdim=True)).T, strict=True):
        assert list(trace.x) == labels
        np.testing.assert_allclose(trace.y, contrast, atol=1e-6)
    one = result.plot_profile(candidate=1).data
    np.testing.assert_allclose(one[0].y, result.attribution[:, 0, 1], atol=1e-7)
    with pytest.raises(ArgumentError, match="layers must be of 0 to 2; 7 was given"):
        result.plot_profile(layers=7)
    several = direct_logit_attribution(load("gpt2"), tokens(), ANSWERS, INCORRECT)
    thin, mean = several.plot_profile().data
    np.testing.assert_allclose(mean.y, several.attribution.mean(1), atol=1e-7)
    assert len(thin.y) == 2 * (len(several) + 1)
    with pytest.raises(ArgumentError, match="contrast=True is for several candidates"):
        several.plot_profile(contrast=True)


def test_sources_are_heads_by_token_for_each_candidate():
    options = dict(unit="source", heads=["L1H2", "L2H0"])
    result = direct_logit_attribution(load("llama"), tokens(), candidate_tokens=[5, 7], **options)
    figure = result.plot_sources(prompt=1)
    z = np.array(figure.data[0].z)
    for line, (head, c) in enumerate([("L1H2", 0), ("L1H2", 1), ("L2H0", 0), ("L2H0", 1)]):
        for source in range(11):
            assert z[line, source] == pytest.approx(float(result[f"{head}←{source}"][1, c]))
        assert figure.data[0].y[line].startswith(head)
    assert [x.split()[1] for x in figure.data[0].x] == [str(i) for i in range(11)]
    names = load("llama").tokenizer.convert_ids_to_tokens(tokens()[1].tolist())
    assert all(repr(name) in x for name, x in zip(names, figure.data[0].x, strict=True))
    one = np.array(result.plot_sources(candidate=1, k=1).data[0].z)
    means = torch.stack([result[f"L1H2←{i}"][:, 1].mean() for i in range(11)])
    others = torch.stack([result[f"L2H0←{i}"][:, 1].mean() for i in range(11)])
    larger = means if means.abs().sum() > others.abs().sum() else others
    np.testing.assert_allclose(one[0], larger, atol=1e-6)
    # Prompts that differ in a token name its place alone.
    assert [x.split("'")[1] for x in result.plot_sources().data[0].x][3] == "3"
    components = direct_logit_attribution(load("llama"), tokens(), 5)
    with pytest.raises(ArgumentError, match='no rows of source tokens: attribute with unit="sour'):
        components.plot_sources()

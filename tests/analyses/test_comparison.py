"""What changed between two runs: against plain modules, the split computed by hand."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.support.models import load
from tests.support.plain import N_HEADS, NAMES, Plain, head_slice, replacing
from tests.zoo.build import ANSWERS, INCORRECT, bridge_of, build, tokens
from tl_dla import (
    ArgumentError,
    ablate,
    attribute_inputs,
    attribute_path,
    compare,
    direct_logit_attribution,
    load_result,
)
from tl_dla.analyses import comparison
from tl_dla.core import run

LONG, SHORT = tokens(), tokens(2, 18)[:, 11:]


# ---- the reference -----------------------------------------------------------------------------


def collected(model: Plain, ids: torch.Tensor, hooks: list = ()) -> tuple[dict, torch.Tensor]:
    """What each part wrote to the final stream at the last token, and the readout there."""
    seen: dict[object, torch.Tensor] = {}
    layers = range(len(model.layers))

    def keep(name, input=False):
        def hook(_module, args, output):
            seen[name] = (args[0] if input else output)[:, -1].detach()

        return hook

    places = [(model.norm, keep("final", input=True)), (_unembed(model), keep("raw"))]
    for layer in layers:
        o = model.output_map(layer)
        places += [(o, keep((layer, "z"), input=True)), (o, keep((layer, "o")))]
        places += [(model.writer(layer, part), keep((layer, part))) for part in ("attn", "mlp")]
    reading = [(module, False, hook) for module, hook in places]
    logits = model.logits(ids, [*hooks, *reading])[:, -1]
    wrote = {}
    with torch.no_grad():
        for layer in layers:
            for part in ("attn", "mlp"):
                wrote[f"{layer}_{part}_out"] = seen[layer, part] * model.multiplier
            for head in range(N_HEADS):
                wrote[f"L{layer}H{head}"] = _head(model, layer, head, seen) * model.multiplier
        return wrote, _readout(model, seen, logits)


def _unembed(model: Plain) -> torch.nn.Module:
    return model.model.lm_head


def _head(model: Plain, layer: int, head: int, seen: dict) -> torch.Tensor:
    o, z, out = model.output_map(layer), seen[layer, "z"], seen[layer, "o"]
    alone, columns = torch.zeros_like(z), head_slice(z, head)
    alone[:, columns] = z[:, columns]
    c = o(alone) - o(torch.zeros_like(z))
    if model.name == "gemma2":  # the norm that follows, its scale that of the whole output
        norm = model.writer(layer, "attn")
        c = c * (1 + norm.weight) / (out.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return c


def _readout(model: Plain, seen: dict, logits: torch.Tensor) -> torch.Tensor:
    """Scale, γ, unembedding and output transform in one vector, `[batch, d_model]`."""
    x, norm, rows = seen["final"], model.norm, torch.arange(len(logits))
    total = 0
    for ids, sign in ((ANSWERS, 1.0), (INCORRECT, -1.0)):
        ratio = logits[rows, ids] / seen["raw"][rows, ids]
        total = total + sign * ratio[:, None] * _unembed(model).weight[ids]
    centred = "LayerNorm" in type(norm).__name__ or model.name == "cohere"
    gamma = 1 + norm.weight if model.name == "gemma2" else norm.weight
    w, x = total * gamma, x - x.mean(-1, keepdim=True) if centred else x
    w = w - w.mean(-1, keepdim=True) if centred else w
    eps = next(getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name))
    return w / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def by_hand(a: tuple[dict, torch.Tensor], b: tuple[dict, torch.Tensor]) -> dict[str, dict]:
    """a, b, wrote and read of every part."""
    (wrote_a, rho_a), (wrote_b, rho_b) = a, b
    found = {}
    for label, c_a in wrote_a.items():
        c_b = wrote_b[label]
        found[label] = {
            "a": (c_a * rho_a).sum(-1),
            "b": (c_b * rho_b).sum(-1),
            "wrote": ((c_b - c_a) * (rho_a + rho_b) / 2).sum(-1),
            "read": ((c_a + c_b) / 2 * (rho_b - rho_a)).sum(-1),
        }
    return found


def assert_split(found: comparison.Comparison, expected: dict[str, dict]) -> None:
    labels = [label for label in found.labels if label in expected]
    assert len(labels) >= 6
    for name in ("a", "b", "wrote", "read"):
        want = torch.stack([expected[label][name] for label in labels])
        got = torch.stack([getattr(found, name)[found.labels.index(label)] for label in labels])
        torch.testing.assert_close(got, want, atol=3e-5, rtol=1e-4)
        assert want.abs().max() > 1e-3
    torch.testing.assert_close(found.wrote + found.read, found.change, atol=1e-5, rtol=1e-5)
    assert found.reconstruction.passed


def attribute(model, ids, unit="head", **options):
    return direct_logit_attribution(model, ids, ANSWERS, INCORRECT, unit=unit, **options)


def tuned(name: str) -> tuple[object, Plain]:
    """Another model of the architecture: one matrix of layer 1 and the final norm were trained."""
    model = Plain(name)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in (model.output_map(1).weight, model.norm.weight):
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return bridge_of(build(name)[1], hf_model=copy.deepcopy(model.model)), model


# ---- the split ---------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["component", "head"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", NAMES[-1]])
def test_two_prompts_of_different_lengths_are_split_as_by_hand(name, unit):
    model, plain = load(name), Plain(name)
    found = compare(attribute(model, LONG, unit), attribute(model, SHORT, unit))
    assert_split(found, by_hand(collected(plain, LONG), collected(plain, SHORT)))
    own = plain.difference(SHORT)[:, -1] - plain.difference(LONG)[:, -1]
    torch.testing.assert_close(found.logit, own, atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(found.change.sum(0), own, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_two_models_are_split_as_by_hand(name):
    model, plain = load(name), Plain(name)
    other, other_plain = tuned(name)
    found = compare(attribute(model, LONG), attribute(other, SHORT))
    assert_split(found, by_hand(collected(plain, LONG), collected(other_plain, SHORT)))
    assert len(found.reconstruction.parts) == 2


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_an_ablated_run_is_split_as_by_hand(name):
    plain, clean = Plain(name), attribute(load(name), LONG)
    everywhere = torch.ones_like(LONG, dtype=torch.bool)
    hook = replacing(plain.output_map(1), torch.zeros_like, everywhere, 2)
    ablated = ablate(clean, ["L1H2"], at="all", progress=False)["L1H2"]
    found = compare(clean, ablated)
    assert_split(found, by_hand(collected(plain, LONG), collected(plain, LONG, [hook])))
    torch.testing.assert_close(found["L1H2"], -clean["L1H2"])


def test_a_trained_matrix_leaves_what_was_written_before_it_alone():
    other, _ = tuned("llama")
    found = compare(attribute(load("llama"), LONG), attribute(other, LONG))
    size = found.a.abs().max()
    before = [i for i, layer in enumerate(found.layers) if layer == 0]
    assert found.wrote[before].abs().max() < 1e-5 * size < found.read[before].abs().max()
    assert all(found.wrote[found.labels.index(f"L1H{head}")].abs().min() > 1e-3 for head in (1, 2))


def test_biases_of_the_readout_are_read_and_never_written():
    found = compare(attribute(load("gpt2"), LONG), attribute(tuned("gpt2")[0], LONG))
    biases = [found.labels.index("ln_final.b")]
    assert not found.wrote[biases].any()
    torch.testing.assert_close(found.read[biases], found.change[biases])


# ---- the two ways to a cross term --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        *(("gemma2", unit) for unit in ("component", "head", "layer", "source", "neuron")),
        *(("opt_350m", unit) for unit in ("component", "head")),  # norms on the stream itself
    ],
)
def test_scales_give_what_runs_give(name, unit, monkeypatch):
    """Also with prompts run in parts, each prompt with its own answer."""
    model, pos = load(name), [2, -1]
    a, b = attribute(model, LONG, unit, pos=pos), attribute(model, SHORT, unit, pos=pos)
    found = compare(a, b)
    monkeypatch.setattr(comparison, "read_alike", lambda *_: False)
    monkeypatch.setattr(run, "_LOGITS_AT_ONCE", 2 * model.cfg.d_vocab)
    ran = compare(a, b)
    assert ran.labels == found.labels and not found.reconstruction.parts
    for name in ("wrote", "read", "change"):
        torch.testing.assert_close(getattr(ran, name), getattr(found, name), atol=2e-5, rtol=1e-4)
    assert len(ran.reconstruction.parts) == 2 and ran.reconstruction.passed


def test_ends_that_differ_by_more_than_scales_are_never_taken_for_the_same():
    """A model that was trained in place, and the mean of capped logits."""
    model = load.__wrapped__("llama")
    a = attribute(model, LONG)
    with torch.no_grad():
        model.original_model.lm_head.weight[0, 0] += 1e-3  # of no answer: the logits are the same
    assert compare(a, attribute(model, LONG)).change.abs().max() < 1e-5
    with torch.no_grad():
        model.original_model.lm_head.weight[ANSWERS[0], 3] += 0.5
    with pytest.raises(ArgumentError, match="the model was changed since"):
        compare(a, attribute(model, LONG))
    capped = load("gemma2")
    a, b = (direct_logit_attribution(capped, x, ANSWERS, "mean") for x in (LONG, SHORT))
    assert len(compare(a, b).reconstruction.parts) == 2


# ---- what it promises --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("unit", ["component", "layer"])
def test_a_run_against_itself_is_nothing_and_turned_round_its_negative(unit, dtype):
    model = load("llama", dtype)
    a, b = attribute(model, LONG, unit), attribute(model, SHORT, unit)
    for term in ("change", "wrote", "read"):
        assert not getattr(compare(a, a), term).any()
        there, back = (getattr(compare(*pair), term) for pair in ((a, b), (b, a)))
        assert torch.equal(there, -back) and there.abs().max() > 0
    other = load("llama", torch.float64)
    if dtype == torch.float32:  # the same weights, kept in two ways
        double = compare(a, attribute(other, LONG, unit))
        assert double.change.abs().max() < 1e-4 and len(double.reconstruction.parts) == 2


def test_rows_of_one_side_stand_against_nothing():
    model = load("gpt2")
    a, b = attribute(model, SHORT, "source"), attribute(model, LONG, "source")
    found = compare(a, b)
    assert set(found.labels) == set(a.labels) | set(b.labels)
    assert [label for label in found.labels if label in a.labels] == a.labels
    at = found.labels.index("L1H2←9")
    assert "L1H2←9" not in a.labels and not found.a[at].any()
    torch.testing.assert_close(found.b[at], b["L1H2←9"])
    torch.testing.assert_close(found.change.sum(0), b.logit - a.logit, atol=3e-5, rtol=1e-4)


def test_what_was_kept_or_chosen_is_compared_without_the_model(tmp_path):
    model = load("gemma2")
    a, b = attribute(model, LONG), attribute(model, SHORT)
    found, kept = compare(a, b), [load_result(x.save(tmp_path / "x")) for x in (a, b)]
    loaded, one = compare(*kept), compare(a.select(prompt=1), b.select(prompt=1))
    for term in ("change", "wrote", "read"):
        assert torch.equal(getattr(loaded, term), getattr(found, term))
        torch.testing.assert_close(getattr(one, term)[:, 0], getattr(found, term)[:, 1])
    assert "✓" in repr(loaded) and loaded.plot().data and loaded.target == found.target


def test_rows_of_another_kind_are_refused():
    model = load("gpt2")
    inputs = attribute_inputs(model, LONG, ANSWERS, progress=False)
    with pytest.raises(ArgumentError, match="this InputAttribution has rows of another kind"):
        compare(inputs, inputs)
    mean = attribute(model, LONG).mean()
    with pytest.raises(ArgumentError, match="or their means"):
        compare(mean, mean)
    source = attribute(model, LONG, "source")
    path = attribute_path(source, "L2H1", 4)
    with pytest.raises(ArgumentError, match="rows of a path are of another place"):
        compare(path, path)


def test_other_answers_are_compared_where_that_is_meant():
    model = load("gpt2")
    a, b = (direct_logit_attribution(model, LONG, answer) for answer in (5, 9))
    with pytest.raises(ArgumentError, match="a is of 'w5', b of 'w9'.*answers=True"):
        compare(a, b)
    found = compare(a, b, answers=True)
    difference = direct_logit_attribution(model, LONG, 9, 5)
    torch.testing.assert_close(found.read, difference.attribution, atol=1e-5, rtol=1e-4)
    assert found.wrote.abs().max() < 1e-5


def test_candidates_are_compared_one_by_one():
    model = load("gpt2")
    both = [direct_logit_attribution(model, x, candidate_tokens=[5, 9]) for x in (LONG, SHORT)]
    found = compare(*both)
    alone = compare(*(direct_logit_attribution(model, x, 9) for x in (LONG, SHORT)))
    torch.testing.assert_close(found.wrote[..., 1], alone.wrote, atol=1e-6, rtol=1e-5)
    assert set(found.to_dataframe().candidate) == {"w5", "w9"}


def test_top_ranks_a_position_and_a_candidate():
    model = load("gpt2")
    options = {"candidate_tokens": [5, 9], "pos": [-3, -1]}
    found = compare(*(direct_logit_attribution(model, x, **options) for x in (LONG, SHORT)))
    for chosen, values in (
        ({"position": 1, "candidate": "w9"}, found.read[:, :, 1, 1].mean(1)),
        ({"prompt": 1, "position": 0}, found.read[:, 1, 0].mean(-1)),
        ({"candidate": 0}, found.read[..., 0].mean((1, 2))),
    ):
        ranked = found.top(len(found), of="read", **chosen)
        expected = sorted(values.tolist(), reverse=True)
        assert [value for _, value in ranked] == pytest.approx(expected, abs=1e-6)
        by_label = dict(zip(found.labels, values.tolist(), strict=True))
        assert dict(ranked) == pytest.approx(by_label, abs=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        ({"unit": "head"}, {"unit": "layer"}, 'a has unit="head", b unit="layer"'),
        ({"ids": LONG}, {"ids": LONG[:1]}, r"a has \[2\] of them, b \[1\]"),
        ({"pos": None}, {"pos": None, "ids": SHORT}, r"a has \[2, 11\] of them, b \[2, 7\]"),
        ({"name": "gpt2"}, {"name": "llama"}, "a's is GPT2LMHeadModel, b's LlamaForCausalLM"),
        ({"layers": 1}, {"layers": 2}, "split different rows"),
        ({"include_bias": False}, {}, "split different rows"),
        (
            {"unit": "neuron", "top_neurons": 3},
            {"unit": "neuron", "top_neurons": 3, "ids": SHORT},
            "largest neurons of the two results are not the same",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(a, b, why):
    def made(given):
        given = {"name": "gpt2", "ids": LONG, "unit": "head", **given}
        name, ids = given.pop("name"), given.pop("ids")
        answers = (ANSWERS, INCORRECT) if len(ids) == 2 else (5, 7)
        return direct_logit_attribution(load(name), ids, *answers, **given)

    with pytest.raises(ArgumentError, match=why):
        compare(made(a), made(b))


# ---- what it shows -----------------------------------------------------------------------------


def test_the_table_the_ranking_and_the_text_are_the_numbers():
    model = load("gpt2")
    found = compare(attribute(model, LONG), attribute(model, SHORT))
    table = found.to_dataframe()
    assert len(table) == 2 * len(found)
    one = table[table.prompt == 1].reset_index()
    for name in ("a", "b", "change", "wrote", "read"):
        assert torch.equal(torch.tensor(one[name]), getattr(found, name)[:, 1])
    assert set(one.position_a) == {10} and set(one.position_b) == {6}
    mean = found.change.mean(1)
    label, value = found.top(1, by="magnitude")[0]
    assert (
        value
        == pytest.approx(float(mean[mean.abs().argmax()]))
        == float(mean[found.labels.index(label)])
    )
    assert found.top(1, prompt=1, of="wrote")[0][1] == pytest.approx(float(found.wrote[:, 1].max()))
    assert found.top(1, largest=False)[0][1] == pytest.approx(float(mean.min()))
    with pytest.raises(ArgumentError, match="position must be one of the result's 1"):
        found.top(position=1)
    text = repr(found)
    assert f"{mean[mean.abs().argmax()]:+.4f}" in text and "✓ changes add up to" in text
    assert "model's own logit" in found._repr_html_()


def test_the_figure_draws_both_runs_of_each_row_and_the_heads():
    model = load("gpt2")
    found = compare(attribute(model, LONG), attribute(model, SHORT))
    figure = found.plot(k=len(found))
    heat = next(trace for trace in figure.data if trace.type == "heatmap")
    assert heat.z[1][2] == pytest.approx(float(found["L1H2"].mean()))
    [start] = [trace for trace in figure.data if trace.name == "a"]
    ends = [trace for trace in figure.data if (trace.name or "").startswith("b,")]
    drawn = {int(y): x for trace in ends for x, y in zip(trace.x, trace.y, strict=True)}
    names = list(figure.layout.yaxis.ticktext)[:-1]
    assert sorted(names) == sorted(found.labels)
    for place, name in enumerate(names):
        i = found.labels.index(name)
        assert start.x[place] == pytest.approx(float(found.a[i].mean()), abs=1e-6)
        assert drawn[place] == pytest.approx(float(found.b[i].mean()), abs=1e-6)
    first = [names.index(name) for name in ("embed", "L0H3", "0_mlp_out", "L1H0", "ln_final.b")]
    assert first == sorted(first)  # as they are written
    few = found.plot(k=3)
    assert f"{len(found) - 3} smaller rows" in few.layout.yaxis.ticktext

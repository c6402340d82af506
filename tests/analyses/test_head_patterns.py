"""Heads with their attention: contributions against plain formulas and an intervention; pages."""

from __future__ import annotations

import time

import pytest
import torch

from tests.support.browser import CHROMIUM, Browser
from tests.support.models import of_3, of_4
from tests.zoo.build import ANSWERS, INCORRECT, boot, hf_reference, tokens
from tests.zoo.hooked import hooked
from tl_dla import (
    UnsupportedModelError,
    direct_logit_attribution,
    required_hooks,
    top_heads_with_patterns,
)
from tl_dla.errors import ArgumentError
from tl_dla.figures.attention_view import AttentionView

EXACT = """gpt2 llama gemma2 gemma3 gemma4_text olmo2 granite gptj bloom gpt_oss deepseek_v3 falcon
openai_gpt qwen2 nemotron native_softcap qwen3_next bitnet laguna afmoe bamba""".split()


def attribute(model, input=None, answers=ANSWERS, incorrect=INCORRECT, **options):
    input = tokens() if input is None else input
    return direct_logit_attribution(model, input, answers, incorrect, unit="head", **options)


@pytest.fixture(scope="module")
def llama():
    return boot("llama")


@pytest.fixture(scope="module")
def result(llama):
    return attribute(llama)


@of_4
@pytest.mark.parametrize("name", EXACT)
def test_source_tokens_add_up_to_the_heads_row(name):
    result = attribute(boot(name), pos=[2, -1])
    heads = top_heads_with_patterns(result, 4)
    assert len(heads) >= 3
    for head in heads:
        assert torch.equal(head.value, result[head.label])
        torch.testing.assert_close(head.contributions.sum(-1), head.value, rtol=0, atol=5e-7)


@of_3
@pytest.mark.parametrize("name", "ln rms sandwich post_norm grouped parallel softcap sinks".split())
def test_source_tokens_add_up_in_a_hooked_transformer(name):
    for head in top_heads_with_patterns(attribute(hooked(name), pos=None), 4):
        torch.testing.assert_close(head.contributions.sum(-1), head.value, rtol=0, atol=5e-7)


@of_4
@pytest.mark.parametrize("name, d_head, groups", [("gpt2", 8, 4), ("llama", 8, 2)])
def test_contributions_written_out_with_the_cache_of_transformer_lens(name, d_head, groups):
    """pattern × value × W_O as vectors, the norm by `apply_ln_to_stack` and γ, then W_U."""
    model = boot(name)
    plain = hf_reference(name)
    gamma = plain.transformer.ln_f.weight if name == "gpt2" else plain.model.norm.weight
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens())
        u = (model.W_U[:, ANSWERS] - model.W_U[:, INCORRECT]).mT  # [batch, d_model]
        for head in top_heads_with_patterns(attribute(model, pos=None), 3):
            pattern = cache["pattern", head.layer][:, head.head]
            v = cache["v", head.layer][:, :, head.head * groups // 4]
            output = plain_output(plain, name, head.layer)[head.head * d_head :][:d_head]
            vectors = torch.einsum("bqk,bkd->kbqd", pattern, v @ output)
            stack = cache.apply_ln_to_stack(vectors.contiguous(), layer=-1) * gamma
            expected = torch.einsum("kbqd,bd->bqk", stack, u)
            torch.testing.assert_close(head.contributions, expected, rtol=0, atol=1e-6)
            torch.testing.assert_close(head.pattern, pattern, rtol=0, atol=1e-7)
            assert torch.equal(head.row, head.pattern)


def plain_output(plain, name, layer):
    """The plain module's output weight as [head and d_head, d_model]."""
    if name == "gpt2":
        return plain.transformer.h[layer].attn.c_proj.weight
    return plain.model.layers[layer].self_attn.o_proj.weight.mT


@of_4
def test_a_contribution_is_what_the_row_loses_when_the_value_is_taken_away():
    """Through the norm after attention and the soft cap of Gemma 2, in the last layer, with the
    value of one token set to 0 in the forward pass itself."""
    model, layer, source = boot("gemma2", torch.float64), 2, 4
    heads = top_heads_with_patterns(attribute(model), 12)
    before = written(model, layer)

    def silence(v, hook):
        v[:, source] = 0
        return v

    with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_v", silence)]):
        after = written(model, layer)
    lost = (before - after)[..., -1]  # both heads of a group lose their part
    moved = [head for head in heads if head.layer == layer]
    assert len(moved) == 4
    total = sum(head.contributions[:, source] for head in moved)
    torch.testing.assert_close(lost, total.to(lost), rtol=0, atol=1e-8)
    assert lost.abs().min() > 1e-4


def written(model, layer):
    """What W_O's output writes to the logit difference, with every norm and the cap as they are in
    the untouched forward pass."""
    plain = hf_reference("gemma2").double()
    block, cap = plain.model.layers[layer], plain.config.final_logit_softcapping
    seen = {}
    with (
        torch.no_grad(),
        model.hooks(
            fwd_hooks=[
                (f"blocks.{layer}.attn.o.hook_out", lambda x, hook: seen.update(o=x.clone()))
            ]
        ),
    ):
        model(tokens())
    frozen = {}
    norms = {"post": block.post_attention_layernorm, "final": plain.model.norm}
    handles = [
        norm.register_forward_hook(
            lambda _m, args, _o, name=name, eps=norm.eps: frozen.update(
                {name: (args[0].square().mean(-1, keepdim=True) + eps).sqrt()}
            )
        )
        for name, norm in norms.items()
    ]
    with torch.no_grad():
        logits = plain(tokens()).logits
    for handle in handles:
        handle.remove()
    raw = cap * torch.atanh(logits / cap)
    ids = torch.stack([ANSWERS, INCORRECT], -1)[:, None].expand(-1, 11, -1)
    ratio = (logits / raw).gather(-1, ids)
    x = seen["o"] / frozen["post"] * (1 + block.post_attention_layernorm.weight)
    x = x / frozen["final"] * (1 + plain.model.norm.weight)
    read = plain.lm_head(x).gather(-1, ids) * ratio
    return (read[..., 0] - read[..., 1]).detach()


@of_4
def test_prompts_of_different_lengths_give_what_each_gives_alone(llama):
    prompts, answers = ["w3 w4 w5 w6 w7", "w8 w9"], ["w5", "w8"]
    together = top_heads_with_patterns(attribute(llama, prompts, answers, "w7"), 12)
    for row in range(2):
        alone = top_heads_with_patterns(attribute(llama, prompts[row], answers[row], "w7"), 12)
        alone = {head.label: head for head in alone}
        n = len(together[0].tokens[row])
        assert n == [6, 3][row]
        for head in together:
            other = alone[head.label]
            close = dict(rtol=0, atol=1e-6)
            torch.testing.assert_close(head.pattern[row, :n, :n], other.pattern[0], **close)
            torch.testing.assert_close(head.contributions[row, :n], other.contributions[0], **close)
            assert not head.pattern[row, n:].any() and not head.pattern[row, :, n:].any()
            assert not head.contributions[row, n:].any()
            assert head.tokens[row] == other.tokens[0]
            name, scored = head.last_kinds[row]
            assert name == other.query_kind
            assert scored == pytest.approx(other.query_scores, nan_ok=True)
            assert head.described(row)[0] == other.described()[0]  # and the column's own token
            torch.testing.assert_close(head.row[row, :n], head.pattern[row, n - 1, :n], **close)


@of_4
def test_ranked_as_the_result_ranks_them(result):
    heads = top_heads_with_patterns(result, 2)
    best, worst = (
        result.top(2, kind="head"),
        result.top(2, kind="head", largest=False),
    )
    assert [head.label for head in heads] == [label for label, _ in best + worst]
    assert [f"L{head.layer}H{head.head}" for head in heads] == [head.label for head in heads]
    everything = top_heads_with_patterns(result, 12)
    assert len(everything) == len({head.label for head in everything}) == 12
    values = [float(head.value.mean()) for head in everything]
    positive = sum(value > 0 for value in values)
    assert values[:positive] == sorted(values[:positive], reverse=True)
    assert values[positive:] == sorted(values[positive:])


@of_4
def test_what_is_read_most_and_the_table(llama):
    result = attribute(llama, ["w3 w4 w5 w6 w7", "w8 w9"], ["w5", "w8"], "w7", pos=[0, -1])
    head = top_heads_with_patterns(result, 1)[0]
    for prompt, n in enumerate([6, 3]):
        reads = head.reads(2, prompt=prompt)
        row = head.pattern[prompt, n - 1, :n]
        assert [i for _, i, _, _ in reads] == row.topk(2).indices.tolist()
        for token, i, attention, moved in reads:
            assert token == head.tokens[prompt][i] and attention == pytest.approx(row[i].item())
            assert moved == pytest.approx(head.contributions[prompt, 1, i].item())
        assert head.reads(9, prompt=prompt, position=0)[0][2] == pytest.approx(1.0)
        assert len(head.reads(9, prompt=prompt)) == n
    table = head.to_dataframe()
    assert len(table) == 2 * 6 + 2 * 3
    sums = table.groupby(["prompt", "position"])[["attention", "contribution"]].sum()
    values = table.groupby(["prompt", "position"])["value"].first()
    assert sums["attention"].to_numpy() == pytest.approx([1.0] * 4, abs=1e-5)
    assert sums["contribution"].to_numpy() == pytest.approx(values.to_numpy(), abs=1e-6)
    assert values.to_numpy() == pytest.approx(head.value.flatten().numpy(), abs=1e-6)


@of_4
def test_kinds_are_those_of_the_patterns(llama):
    from tl_dla.analyses.pattern_kinds import Pooled, kind, pool, scores

    result = attribute(llama, ["w3 w4 w5 w3 w4", "w8 w9"], ["w5", "w8"], "w7")
    for head in top_heads_with_patterns(result, 3):
        pooled = []
        for row, ids in enumerate(result.prompts.packed):
            n = len(head.tokens[row])
            pooled.append(pool(head.pattern[row, :n, :n], ids[:n], head.tokens[row]))
        sums = {name: sum((p[name] for p in pooled), Pooled()) for name in pooled[0]}
        assert head.scores == pytest.approx(scores(sums), nan_ok=True) and head.kind == kind(sums)
        assert head.scores["induction"] == head.scores["induction"]  # tokens are repeated


@of_4
def test_two_more_forward_passes_and_the_first_reads_the_chosen_layers_only(
    llama, result, monkeypatch
):
    from tl_dla.core import run

    calls, read = [], set()
    original = run.forward

    def watched(query, taps):
        read.update(tap.site.name for tap in taps if "hook_pattern" in tap.site.name)
        return original(query, taps)

    monkeypatch.setattr(run, "forward", watched)
    handle = llama.original_model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    heads = top_heads_with_patterns(result, 1)
    handle.remove()
    layers = {head.layer for head in heads}
    assert calls == [1, 1] and layers < {0, 1, 2}  # the second for who wrote queries and keys
    assert read == {f"blocks.{layer}.attn.hook_pattern" for layer in layers}


@of_4
def test_bad_input_gets_one_sentence(llama, result):
    with pytest.raises(ArgumentError, match="k must be 1 to the 12 heads of the result; 13"):
        top_heads_with_patterns(result, 13)
    with pytest.raises(ArgumentError, match="0 was given"):
        top_heads_with_patterns(result, 0)
    components = direct_logit_attribution(llama, tokens(), ANSWERS)
    with pytest.raises(ArgumentError, match='no head rows: attribute with unit="head"'):
        top_heads_with_patterns(components)
    several = direct_logit_attribution(llama, tokens(), candidate_tokens=[5, 9], unit="head")
    with pytest.raises(ArgumentError, match="over candidates"):
        top_heads_with_patterns(several)
    heads = top_heads_with_patterns(result, 1)
    ways = [lambda n: heads.show(prompt=n), lambda n: heads[0].reads(prompt=n)]
    for ask in [*ways, heads.summary, heads[0].described]:
        with pytest.raises(ArgumentError, match="prompt must be one of the result's 2; 2 was"):
            ask(2)
    with pytest.raises(ArgumentError, match="position must be one of the result's 1; 1 was given"):
        heads[0].reads(position=1)
    with pytest.raises(ArgumentError, match="k must be at least 1; -2 was given"):
        heads[0].reads(-2)


@of_4
@pytest.mark.parametrize(
    "name, part", [("olmo_clip", "clips"), ("gemma4_kvshare", "another layer")]
)
def test_refuses_heads_that_it_cannot_take_apart(name, part):
    result = attribute(boot(name))
    with pytest.raises(UnsupportedModelError, match=rf"(?s)blocks\.\d\.attn.*{part}|{part}"):
        top_heads_with_patterns(result, 12)


@of_4
def test_a_result_that_another_run_does_not_give_again():
    model = boot("llama")
    _, cache = model.run_with_cache(tokens(), names_filter=required_hooks(model, "head"))
    without_input = direct_logit_attribution(
        model, None, ANSWERS, INCORRECT, unit="head", cache=cache
    )
    with pytest.raises(ArgumentError, match="made from a cache without its input"):
        top_heads_with_patterns(without_input, 1)
    result = attribute(model)
    model.add_hook("blocks.0.hook_resid_pre", lambda x, hook: 2 * x)
    with pytest.raises(ArgumentError, match="the model was changed since"):
        top_heads_with_patterns(result, 1)


@of_4
def test_shown_as_text(result, tmp_path, monkeypatch):
    heads = top_heads_with_patterns(result, 2)
    head = heads[0]
    assert repr(head).startswith(f"{head.label} {float(head.value.mean()):+.4f}, {head.query_kind}")
    summary = heads.summary()
    assert summary["head"].tolist() == [head.label for head in heads]
    page = heads._repr_html_()
    assert page.count("id=&quot;circuitsvis&quot;") == 1 and head.label in page
    view = heads.show()
    assert view.groups == [("Top 2 positive", 2), ("Top 2 negative", 2)]
    for text in (page, view.page()):
        assert text.index("Top 2 positive") < text.index("Top 2 negative")
    assert view.save(tmp_path / "heads.html").read_text("utf-8") == view.page()
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert opened == [] and view.open().as_uri() == opened[0]
    assert head.show().groups == []


EVIL = ["<img/src=x/onerror=window.hacked=1>", "<script>window.hacked=2</script>", " <b>b</b>",
        "</script>", "\n", "&amp;"]  # fmt: skip


@of_4
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("style, canvases", [("patterns", 1 + 3), ("heads", 3 + 1)])
def test_opened_with_no_network_it_draws_every_head_and_shows_tokens_as_text(
    tmp_path, style, canvases
):
    n = len(EVIL)
    pattern = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    view = AttentionView(EVIL, pattern.expand(3, n, n), ["L0H1", "L1H0", "L2H3"], style)
    path = tmp_path / "page.html"
    path.write_text(view.page(), encoding="utf-8")
    with Browser() as browser:
        page = browser.open(path)
        page.wait(f"document.querySelectorAll('canvas').length === {canvases}")
        time.sleep(2)  # the grid settles once its styles are there
        sizes = page.evaluate("[...document.querySelectorAll('canvas')].map(c => c.clientWidth)")
        assert page.evaluate("window.hacked || 0") == 0 and page.requests == []
        assert [e for e in page.errors if "GL" not in e] == []
        text = page.evaluate("document.body.innerText")
        assert all(label in text for label in view.labels)
        if style == "patterns":
            shown = page.evaluate(
                "[...document.querySelectorAll('.tokens button')].map(x => x.innerText)"
            )
            assert [x.replace("\xa0", " ") for x in shown] == [t.replace("\n", "↵") for t in EVIL]
        # It stays as large as it was drawn (CircuitsVis issue 61).
        page.evaluate("dispatchEvent(new Event('resize'))")
        time.sleep(1)
        again = page.evaluate("[...document.querySelectorAll('canvas')].map(c => c.clientWidth)")
        assert again == sizes and min(sizes) > 30


@pytest.mark.real
def test_smollm2_heads_read_the_tower():
    from tl_dla.loading import load_model

    model = load_model("smollm2")
    result = direct_logit_attribution(
        model, "The Eiffel Tower is in the city of", " Paris", " London", unit="head"
    )
    heads = top_heads_with_patterns(result, 3)
    for head in heads:
        error = (head.contributions.sum(-1) - head.value).abs().item()
        assert error < 1e-4
    assert any(" Tower" in [token for token, *_ in head.reads(2)] for head in heads)

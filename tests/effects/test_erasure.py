"""Writers and erasers that are known, projections by hand, and heads that suppress copies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support.models import of_4
from tests.support.plain import attributed, plain, wrote
from tests.zoo.build import ANSWERS, INCORRECT, boot, perturb, tokens
from tl_dla import ArgumentError, copy_suppression, direct_logit_attribution, erasures
from tl_dla.effects.audit import audit
from tl_dla.effects.recomputed import written


def with_an_eraser():
    """Head 0.1 writes a direction that head 1.2 reads and takes out again; nothing else writes
    there. At position 0 a head sees its own token only, so there the eraser removes all of it."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformer_lens.model_bridge.sources.native import NativeModel

    config = dict(d_model=32, d_head=8, n_heads=4, n_layers=2, n_ctx=64, d_vocab=97, d_mlp=None)
    config |= dict(attn_only=True, normalization_type=None, seed=0, act_fn="gelu")
    torch.manual_seed(0)
    inner = NativeModel(TransformerBridgeConfig.from_dict(config)).eval()
    perturb(inner)
    bridge = build_bridge_from_module(
        inner,
        architecture="TransformerLensNative",
        tl_config=inner.cfg,
        dtype=torch.float32,
        device="cpu",
    )
    with torch.no_grad():
        for parameter in inner.parameters():
            if parameter.ndim == 1:
                parameter.zero_()
        basis = torch.eye(32)
        written, rest = basis[:8], basis[8:]
        keep_out = torch.eye(32) - written.mT @ written
        for module in inner.modules():
            if isinstance(module, nn.Embedding) and module.weight.shape[1] == 32:
                module.weight.copy_(module.weight @ keep_out)
        for layer in range(2):
            attn = bridge.blocks[layer].attn
            q, v, o = (attn._modules[n].original_component.weight for n in ("q", "v", "o"))
            q.zero_()  # attention is uniform
            v.copy_(v @ keep_out)  # as nn.Linear: [head · d_head, d_model]
            o.copy_(keep_out @ o)  # [d_model, head · d_head]
        v0, o0 = (bridge.blocks[0].attn._modules[n].original_component.weight for n in ("v", "o"))
        v1, o1 = (bridge.blocks[1].attn._modules[n].original_component.weight for n in ("v", "o"))
        v0[8:16], o0[:, 8:16] = rest[:8], written.mT
        v1[16:24], o1[:, 16:24] = written, -written.mT
    return bridge


@of_4
def test_a_known_writer_and_its_eraser_are_found() -> None:
    model, ids = with_an_eraser(), tokens(5)
    answers, incorrect = torch.full((5,), 5), torch.full((5,), 9)
    result = direct_logit_attribution(model, ids, answers, incorrect, unit="head", pos=0)
    found = erasures(result, ["L0H1"])
    pairs = found.to_dataframe()
    assert list(pairs["eraser"]) == ["L1H2"]
    assert pairs["projection_ratio"][0] == pytest.approx(-1.0, abs=1e-5)
    assert pairs["correlation"][0] == pytest.approx(-1.0, abs=1e-5)
    assert pairs["net"][0] == pytest.approx(0.0, abs=1e-6)
    wrote = written(result)["L0H1"]
    assert pairs["norm"][0] == pytest.approx(-float(wrote.norm(dim=-1).mean()), rel=1e-5)
    torch.testing.assert_close(found.left[0], torch.zeros(5), atol=1e-6, rtol=0)
    assert result["L0H1"].abs().min() > 1e-3

    audited = result.audit(rows=["L0H1", "L1H2"], progress=False)
    table = audited.to_dataframe().set_index("row")
    assert table.loc["L0H1", "erased"] and table.loc["L0H1", "repaired"]
    assert table.loc["L0H1", "total"] == pytest.approx(0.0, abs=1e-5)
    assert not table.loc["L1H2", ["erased", "repaired"]].any()
    assert any(
        "L0H1 is erased" in sentence and "L1H2" in sentence for sentence in audited.sentences
    )
    # Later in the prompt the eraser takes out the mean of what was written at every token.
    every = direct_logit_attribution(model, ids, answers, incorrect, unit="head", pos=None)
    wrote = written(every)["L0H1"]
    expected = -(wrote.mean(1) * wrote[:, -1]).sum(-1) / wrote[:, -1].square().sum(-1)
    ratio = erasures(every, ["L0H1"]).ratio[0, every.labels.index("L1H2"), :, -1]
    torch.testing.assert_close(ratio, expected, atol=1e-5, rtol=1e-4)


def test_projections_by_hand() -> None:
    result = attributed("gpt2")
    found = erasures(result)
    model, ids = plain("gpt2"), tokens()
    head, mlp = (wrote(model, label, ids)[:, -1] for label in ("L1H2", "2_mlp_out"))
    head, mlp = (x - x.mean(-1, keepdim=True) for x in (head, mlp))
    ratio = (head * mlp).sum(-1) / head.square().sum(-1)
    i, j = found.writers.index("L1H2"), found.labels.index("2_mlp_out")
    torch.testing.assert_close(found.ratio[i, j], ratio, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.logits[i, j], ratio * result["L1H2"], atol=1e-5, rtol=1e-4)
    # A head is no eraser of its own layer's, nor of what comes after it; the MLP behind it is.
    assert not found.later[i, found.labels.index("L1H3")]
    assert not found.later[found.writers.index("2_mlp_out"), found.labels.index("L1H2")]
    assert found.later[i, found.labels.index("1_mlp_out")]
    assert not found.later[i, found.labels.index("0_mlp_out")]


def test_in_a_parallel_block_the_mlp_does_not_read_the_attention() -> None:
    found = erasures(attributed("cohere", "component"))
    assert not found.later[found.writers.index("1_attn_out"), found.labels.index("1_mlp_out")]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_what_copies_of_the_answer_write_is_pattern_times_value(name: str) -> None:
    """Their sources by hand, from the plain module's attention and its value projection."""
    model, ids = plain(name), tokens().clone()
    ids[0, 4], ids[1, 2], ids[1, 7] = ANSWERS[0], ANSWERS[1], ANSWERS[1]
    result = direct_logit_attribution(boot(name), ids, ANSWERS, INCORRECT, unit="head")
    copied = copy_suppression(result)
    negative = [
        (row, int(row[1]), int(row[3]))
        for row, kind in zip(result.labels, result.kinds, strict=True)
        if kind == "head" and result[row].mean() < 0
    ]
    assert len(negative) > 2
    with torch.no_grad():
        patterns = model.model(ids, output_attentions=True).attentions
    copies = (ids == ANSWERS[:, None]).float()
    for row, layer, head in negative:
        o = model.output_map(layer)
        z = model.seen(ids, o, input=True)
        if name == "gpt2":
            value = model.seen(ids, model.layers[layer].attn.c_attn)[..., 64:]
            value = value[..., head * 8 : head * 8 + 8]
        else:  # two key-value heads, each for two heads
            value = model.seen(ids, model.layers[layer].self_attn.v_proj)
            value = value[..., head // 2 * 8 : head // 2 * 8 + 8]
        mixed = torch.einsum("bk,bk,bkd->bd", patterns[layer][:, head, -1], copies, value)
        own = z[:, -1, head * 8 : head * 8 + 8]
        weight = o.weight if name == "gpt2" else o.weight.mT
        parts = [x @ weight[head * 8 : head * 8 + 8] for x in (mixed, own)]
        # The row is linear in what the head writes: a common direction of readout.
        if name == "gemma2":
            parts = [x * (1 + model.writer(layer, "attn").weight) for x in parts]
        norm = model.norm
        gamma = 1 + norm.weight if name == "gemma2" else norm.weight
        W_U = model.model.lm_head.weight
        columns = torch.stack([W_U[ANSWERS], W_U[INCORRECT]], 1) * gamma
        if name == "gpt2":
            columns = columns - columns.mean(-1, keepdim=True)
        read = torch.stack([torch.einsum("bd,btd->bt", x, columns) for x in parts])
        value, whole = (read * result.numbers.ratio[:, 0] * torch.tensor([1.0, -1.0])).sum(-1)
        share = copied[result.labels.index(row)] / result[row]
        torch.testing.assert_close(share, value / whole, atol=1e-4, rtol=1e-3)
    positive = [i for i, row in enumerate(result.labels) if result[row].mean() >= 0]
    assert copied[positive].isnan().all()
    found = audit(result, rows=[row for row, _, _ in negative], progress=False)
    means = torch.stack([copied[result.labels.index(row)].mean() for row in found.rows])
    own = torch.stack([result[row].mean() for row in found.rows])
    torch.testing.assert_close(found.copy_share, means / own)


def test_without_a_copy_of_the_answer_there_is_nothing_to_suppress() -> None:
    result = direct_logit_attribution(boot("llama"), tokens(), 1, 2, unit="head", pos=[4, -1])
    assert not (tokens() == 1).any()
    copied = copy_suppression(result)
    assert set(copied[~copied.isnan()].tolist()) == {0.0}


@pytest.mark.parametrize("of_rows", [copy_suppression, erasures])
def test_rows_that_there_are_not_are_refused(of_rows) -> None:
    result = direct_logit_attribution(boot("llama"), tokens(), 1, 2, unit="head")
    with pytest.raises(KeyError, match="No row 'L9H9'; the rows are L0H0"):
        of_rows(result, ["L0H0", "L9H9"])
    for rows in ([], "L0H0"):
        with pytest.raises(ArgumentError, match="Give a list of the labels of rows; got"):
            of_rows(result, rows)


def test_answers_of_their_own_position_have_copies_of_their_own() -> None:
    model, ids = boot("llama"), tokens()
    answers = ids[:, [2, 5]]
    both = direct_logit_attribution(model, ids, answers, INCORRECT, unit="head", pos=[4, -1])
    copied = copy_suppression(both)
    for i, pos in enumerate([4, -1]):
        one = direct_logit_attribution(model, ids, answers[:, i], INCORRECT, unit="head", pos=pos)
        alone = copy_suppression(one)
        rows = ~alone.isnan() & ~copied[:, :, i].isnan()
        assert rows.sum() > 4 and alone[rows].abs().max() > 1e-3
        torch.testing.assert_close(copied[:, :, i][rows], alone[rows], atol=1e-5, rtol=1e-4)

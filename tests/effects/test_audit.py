"""The audit puts its parts side by side, and refuses what it cannot answer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.models import load, of_3
from tests.support.plain import HEAD, attributed
from tests.zoo.build import ANSWERS, INCORRECT, boot, native_reference, tokens
from tests.zoo.hooked import hooked
from tl_dla import (
    UnsupportedModelError,
    ablate,
    direct_effect_recomputed,
    direct_logit_attribution,
    erasures,
    load_model,
    required_hooks,
)
from tl_dla.datasets.ioi import classic_prompts
from tl_dla.effects.audit import audit
from tl_dla.effects.flags import FLAGS
from tl_dla.errors import ArgumentError


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_an_audit_is_the_parts_side_by_side(name: str) -> None:
    result = attributed(name, pos=(3, -1))
    found = audit(result, k=4, progress=False)
    rows = [label for label, _ in result.top(30, by="magnitude")]
    kinds = dict(zip(result.labels, result.kinds, strict=True))
    assert found.rows == [row for row in rows if kinds[row] not in ("bias", "rest")][:4]
    recomputed = direct_effect_recomputed(result)
    runs = ablate(result, found.rows, progress=False)
    for i, row in enumerate(found.rows):
        torch.testing.assert_close(found.direct[i], result[row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.total[i], result.logit - runs[row].logit)
        torch.testing.assert_close(found.direct_recomputed[i], recomputed[result.labels.index(row)])
    torch.testing.assert_close(found.total, found.direct + found.indirect)
    table = found.to_dataframe()
    assert list(table.columns[:5]) == ["row", "direct", "direct_recomputed", "total", "indirect"]
    assert list(table.columns[-len(FLAGS) :]) == list(FLAGS)
    for i in range(4):
        assert table["total"][i] == pytest.approx(float(found.total[i].mean()), abs=1e-6)
    by_prompt = found.to_dataframe(by_prompt=True)
    assert len(by_prompt) == 4 * 2 * 2
    line = by_prompt[(by_prompt["prompt"] == 1) & (by_prompt["position"] == 3)].iloc[2]
    assert line["total"] == pytest.approx(float(found.total[2, 1, 0]), abs=1e-6)
    assert found.rows[0] in repr(found) and "the attributed position" in repr(found)


def test_flags_say_what_the_table_says() -> None:
    for name in ["gpt2", "cohere"]:
        found = audit(attributed(name), k=20, progress=False)
        table = found.to_dataframe().set_index("row")
        for row, line in table.iterrows():
            direct, total = line["direct"], line["total"]
            assert line["sign_flip"] == (direct * total < 0 and abs(total) > 0.1 * abs(direct))
            halved = abs(total) < 0.5 * abs(direct)
            assert line["repaired"] == (halved and not line["sign_flip"])
            gap = abs(line["direct_recomputed"] - direct)
            assert line["norm_gap"] == (gap > 0.25 * abs(direct))
            assert line["erased"] == (line["left"] < 0.5)
            mine = [flag for flag in found.flags if flag.row == row]
            assert sorted(flag.name for flag in mine) == sorted(f for f in FLAGS if line[f])
            assert all("Next: " in flag.sentence and row in flag.sentence for flag in mine)


def test_rows_of_groups_alone_are_audited_together() -> None:
    result = attributed("gpt2")
    group = ["L1H2", "0_mlp_out"]
    found = audit(result, rows=[group], progress=False)
    [run] = ablate(result, [group], progress=False).values()
    torch.testing.assert_close(found.total[0], result.logit - run.logit)
    torch.testing.assert_close(found.direct[0], result["L1H2"] + result["0_mlp_out"])
    assert found.erasures.writers == group
    torch.testing.assert_close(found.erasures.left, erasures(result, group).left)
    line = found.to_dataframe().iloc[0]
    assert line["row"] == "L1H2+0_mlp_out" and line[["left", "copy_share"]].isnull().all()
    assert not line[["erased", "copy_suppression"]].any() and "L1H2+0_mlp_out" in repr(found)


def test_ragged_prompts_give_what_each_gives_alone() -> None:
    model = boot("gpt2")
    long, short = tokens(1, 11), tokens(1, 7)
    both = torch.zeros(2, 11, dtype=torch.long)
    both[0], both[1, 4:] = long[0], short[0]
    mask = torch.ones_like(both)
    mask[1, :4] = 0
    together = direct_logit_attribution(
        model, both, ANSWERS, INCORRECT, unit="head", attention_mask=mask
    )
    rows = ["L0H1", "2_mlp_out", "embed"]
    batch = audit(together, rows=rows, progress=False)
    for i, ids in enumerate((long, short)):
        alone = direct_logit_attribution(
            model, ids, ANSWERS[i : i + 1], INCORRECT[i : i + 1], unit="head"
        )
        single = audit(alone, rows=rows, progress=False)
        for part in ("direct", "direct_recomputed", "total", "left"):
            torch.testing.assert_close(
                getattr(batch, part)[:, i : i + 1], getattr(single, part), atol=2e-5, rtol=1e-4
            )


def test_positions_that_a_prompt_lacks_are_nan_and_do_not_spoil_the_means() -> None:
    model = boot("gpt2")
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    result = direct_logit_attribution(
        model, ids, ANSWERS, INCORRECT, unit="component", pos=None, attention_mask=mask
    )
    found = audit(result, k=3, progress=False)
    assert found.total[:, 1, 4:].isnan().all() and not found.total[:, 0].isnan().any()
    numbers = ["direct", "direct_recomputed", "total", "indirect", "repair_norm", "left"]
    assert not found.to_dataframe()[numbers].isnull().any(axis=None)
    assert len(found.to_dataframe(by_prompt=True)) == 3 * (6 + 4)


@of_3
@pytest.mark.parametrize("name", ["ln", "rms", "sandwich", "softcap", "parallel", "moe"])
def test_hooked_transformers_are_audited_alike(name: str) -> None:
    model, ids = hooked(name), tokens()
    result = direct_logit_attribution(model, ids, ANSWERS, INCORRECT, unit="head")
    found = audit(result, rows=["L1H2", "1_mlp_out"], progress=False)

    def zero(z, hook):
        z[:, -1, HEAD] = 0.0
        return z

    rows = torch.arange(len(ids))
    with torch.no_grad():
        logits = model.run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_z", zero)])[:, -1]
    expected = result.logit - (logits[rows, ANSWERS] - logits[rows, INCORRECT])
    torch.testing.assert_close(found.total[0], expected, atol=2e-5, rtol=1e-4)

    _, cache = model.run_with_cache(ids)
    c = cache["blocks.1.hook_mlp_out"]

    def take(x, hook):
        return x - c

    with torch.no_grad():
        logits = model.run_with_hooks(ids, fwd_hooks=[("blocks.2.hook_resid_post", take)])[:, -1]
    expected = result.logit - (logits[rows, ANSWERS] - logits[rows, INCORRECT])
    torch.testing.assert_close(found.direct_recomputed[1], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["native_ln", "native_none", "native_attnonly"])
def test_native_models_folded_or_without_norms(name: str) -> None:
    model, ids = native_reference(name), tokens()
    result = attributed(name)
    found = audit(result, k=3, progress=False)
    parts = found._repairs("attention") + found._repairs("mlps") + found._repairs("norm")
    torch.testing.assert_close(parts, -found.indirect, atol=1e-5, rtol=1e-4)
    if name == "native_none":  # no norm, nothing to rescale
        torch.testing.assert_close(found.direct_recomputed, found.direct, atol=1e-5, rtol=1e-5)
    assert model(ids) is not None


@pytest.mark.real
@pytest.mark.slow
def test_smollm2s_ioi_prompts() -> None:
    """Ablating one of the largest heads, against the plain model; and what the audit finds."""
    prompts = classic_prompts(model := load_model("smollm2"))
    texts, answers, incorrect = zip(
        *((p["prompt"], p["answer"], p["incorrect"]) for p in prompts), strict=True
    )
    result = direct_logit_attribution(
        model, list(texts), list(answers), list(incorrect), unit="head"
    )
    found = audit(result, rows=["L23H0", "L24H4", "L29H0"], progress=False)
    plain_model = model.original_model
    prompt = result.prompts.packed[:1, : int(result.prompts.length[0])]
    ids = result.targets.ids[0, 0]

    def difference() -> Tensor:
        with torch.no_grad():
            logits = plain_model(prompt).logits[0, -1]
        return logits[ids[0]] - logits[ids[1]]

    def zero(_module, args):
        z = args[0].clone()
        z[:, -1, :64] = 0.0
        return (z,)

    clean = difference()
    handle = plain_model.model.layers[23].self_attn.o_proj.register_forward_pre_hook(zero)
    without = difference()
    handle.remove()
    torch.testing.assert_close(found.total[0, 0], clean - without, atol=1e-3, rtol=1e-3)
    # The name mover's write is taken out by a negative head that reads the answer itself.
    table = found.to_dataframe().set_index("row")
    assert table.loc["L23H0", "erased"] and table.loc["L23H0", "repaired"]
    assert "L24H4 -" in next(f.sentence for f in found.flags if f.name == "erased")
    assert table.loc["L24H4", "copy_suppression"] and not table.loc["L29H0", "copy_suppression"]


@pytest.mark.usefixtures("unchecked")
def test_refusals_say_what_to_do() -> None:
    result = attributed("gpt2")
    for call, fragment in [
        (lambda: ablate(result, ["ln_final.b"]), "not written at one place"),
        (lambda: ablate(result, "L0H1"), "Give a list of rows"),
        (lambda: audit(result, rows=[["L0H1", "L0H1"]]), "Each row of a group is ablated once"),
        (lambda: erasures(result).plot(0), "k must be at least 1; 0 was given"),
        (lambda: ablate(result, ["L0H1"], reference=tokens()), "reads no reference"),
        (lambda: ablate(result, ["L0H1"], batch_size=0), "at least 1"),
        (lambda: audit(result, k=0), "at least 1"),
        (lambda: audit(attributed("gpt2", "layer")), 'unit="component"'),
        (lambda: erasures(result, ["1_attn_bias"]), "writes nothing of its own"),
        (
            lambda: ablate(result, ["L0H1"], ablation="resample", reference=tokens(3)),
            "one for each",
        ),
        (
            lambda: ablate(result, ["L0H1"], ablation="resample", at="all", reference=tokens(2, 5)),
            "same length",
        ),
    ]:
        with pytest.raises(ArgumentError, match=fragment.replace("(", r"\(")):
            call()
    for option in ({"at": "last"}, {"ablation": "noise"}):
        with pytest.raises(ArgumentError, match="must be"):
            ablate(result, ["L0H1"], **option)
    one = direct_logit_attribution(result.model, tokens(1), 5, 7, unit="head")
    for ablation, fragment in {"mean": "own activation", "resample": "another prompt"}.items():
        with pytest.raises(ArgumentError, match=fragment):
            ablate(one, ["L0H1"], ablation=ablation, progress=False)
    several = direct_logit_attribution(result.model, tokens(), candidate_tokens=[5, 7])
    with pytest.raises(ArgumentError, match="over candidates"):
        several.audit()
    with pytest.raises(KeyError, match="L9H9"):
        ablate(result, ["L9H9"])


def test_a_cache_without_its_input_cannot_be_run_again() -> None:
    model = boot("gpt2")
    _, cache = model.run_with_cache(tokens(), names_filter=required_hooks(model, "head"))
    result = direct_logit_attribution(model, None, ANSWERS, INCORRECT, unit="head", cache=cache)
    with pytest.raises(ArgumentError, match="attribute with the prompts as `input`"):
        result.audit()
    given = direct_logit_attribution(
        model, tokens(), ANSWERS, INCORRECT, unit="head", cache=cache
    ).audit(rows=["L0H1"], progress=False)
    fresh = attributed("gpt2").audit(rows=["L0H1"], progress=False)
    torch.testing.assert_close(given.total, fresh.total, atol=2e-5, rtol=1e-4)


def test_the_mean_of_capped_logits_cannot_be_rescaled() -> None:
    result = direct_logit_attribution(boot("gemma2"), tokens(), ANSWERS, "mean", unit="component")
    with pytest.raises(UnsupportedModelError, match="caps its logits"):
        result.audit(progress=False)
    llama = direct_logit_attribution(boot("llama"), tokens(), ANSWERS, "mean", unit="component")
    assert llama.audit(k=2, progress=False).total.shape == (2, 2)


def test_the_mean_of_a_centred_vocabulary_is_a_baseline_of_audits():
    model = load("gpt2", folded=True)
    result = direct_logit_attribution(model, tokens(), ANSWERS, "mean")
    against_zero = direct_logit_attribution(model, tokens(), ANSWERS)
    found, expected = (audit(one, 3, progress=False) for one in (result, against_zero))
    assert found.rows == expected.rows  # the mean of the vocabulary is zero
    for name in ("direct", "direct_recomputed", "total"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=0)

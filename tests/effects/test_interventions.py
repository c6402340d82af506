"""Effects of taking a row away, each against a real intervention on a plain module."""

from __future__ import annotations

import pytest
import torch

from tests.support.plain import (
    HEAD,
    LAYER,
    NAMES,
    at_last,
    attributed,
    head_slice,
    plain,
    replacing,
    wrote,
)
from tests.zoo.build import ANSWERS, INCORRECT, boot, tokens
from tl_dla import (
    ablate,
    decompose,
    direct_effect_recomputed,
    direct_logit_attribution,
    self_repair,
)
from tl_dla.effects.audit import audit


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("label", ["L1H2", "2_mlp_out"])
def test_the_recomputed_effect_is_a_forward_pass_without_the_write(name: str, label: str) -> None:
    model, ids = plain(name), tokens()
    c = wrote(model, label, ids)
    without = model.difference(ids, [(model.norm, True, lambda m, args: (args[0] - c,))])
    expected = (model.difference(ids) - without)[:, [3, -1]]
    result = attributed(name, pos=(3, -1))
    effects = direct_effect_recomputed(result)
    torch.testing.assert_close(effects[result.labels.index(label)], expected, atol=2e-5, rtol=1e-4)
    assert (effects - result.attribution)[result.labels.index(label)].abs().max() > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_a_stack_from_a_cache_gives_the_same_without_a_run(name: str) -> None:
    result = attributed(name)
    _, cache = result.model.run_with_cache(tokens())
    effects = direct_effect_recomputed(result, decompose(cache, "head"))
    torch.testing.assert_close(effects, direct_effect_recomputed(result), atol=1e-5, rtol=1e-5)


def test_bias_rows_leave_the_norm_alone() -> None:
    result = attributed("gpt2")
    effect = direct_effect_recomputed(result)[result.labels.index("ln_final.b")]
    torch.testing.assert_close(effect, result["ln_final.b"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", ["position", "all"])
def test_zero_ablation_is_what_the_plain_model_does_without_the_part(name: str, at: str) -> None:
    model, ids = plain(name), tokens()
    where = at_last(ids) if at == "position" else torch.ones_like(ids, dtype=torch.bool)
    hooks = {
        "L1H2": replacing(model.output_map(LAYER), torch.zeros_like, where, HEAD),
        "0_mlp_out": replacing(model.writer(0, "mlp"), torch.zeros_like, where, None),
    }
    result = attributed(name)
    runs = ablate(result, [*hooks, list(hooks)], at=at, progress=False)
    assert list(runs) == ["L1H2", "0_mlp_out", "L1H2+0_mlp_out"]
    for label, used in zip(
        runs, [[hooks["L1H2"]], [hooks["0_mlp_out"]], [*hooks.values()]], strict=True
    ):
        expected = model.difference(ids, used)[:, -1]
        torch.testing.assert_close(runs[label].logit, expected, atol=2e-5, rtol=1e-4)
        assert (runs[label].logit - result.logit).abs().min() > 1e-4


@pytest.mark.parametrize("ablation", ["mean", "resample"])
@pytest.mark.parametrize("at", ["position", "all"])
@pytest.mark.parametrize("own", [True, False])
def test_means_and_samples_are_those_of_the_reference(ablation: str, at: str, own: bool) -> None:
    model, ids = plain("llama"), tokens()
    others = ids if own else tokens(2, 22)[:, 11:]
    z = model.seen(others, model.output_map(LAYER), input=True)
    where = at_last(ids) if at == "position" else torch.ones_like(ids, dtype=torch.bool)
    if ablation == "mean":
        value = z[where].mean(0).expand_as(z)
    else:
        value = z.roll(1, 0) if own else z
    hook = replacing(model.output_map(LAYER), lambda _: value, where, HEAD)
    result = attributed("llama")
    reference = None if own else others
    runs = ablate(result, ["L1H2"], ablation=ablation, at=at, reference=reference, progress=False)
    expected = model.difference(ids, [hook])[:, -1]
    torch.testing.assert_close(runs["L1H2"].logit, expected, atol=2e-5, rtol=1e-4)
    assert (expected - result.logit).abs().min() > 1e-4

    # Direct effects are those of the same change: z taken out, the substitute put in.
    found = audit(
        result, rows=["L1H2"], ablation=ablation, at=at, reference=reference, progress=False
    )
    o, z_own = model.output_map(LAYER), model.seen(ids, model.output_map(LAYER), input=True)
    change = torch.zeros_like(z_own)
    columns = head_slice(z_own)
    change[..., columns] = torch.where(where[..., None], z_own - value, 0.0)[..., columns]
    with torch.no_grad():
        c = o(change) - o(torch.zeros_like(change))
    without = model.difference(ids, [(model.norm, True, lambda m, args: (args[0] - c,))])
    expected = (model.difference(ids) - without)[:, -1]
    torch.testing.assert_close(found.direct_recomputed[0], expected, atol=2e-5, rtol=1e-4)


def test_rows_ablated_together_in_one_batch_or_one_by_one_are_the_same() -> None:
    result = attributed("gpt2", pos=(2, -1))
    rows = ["L0H1", "L2H3", "1_mlp_out", "embed"]
    shared = ablate(result, rows, batch_size=32, progress=False)
    alone = ablate(result, rows, batch_size=1, progress=False)
    for row in rows:
        torch.testing.assert_close(
            shared[row].attribution, alone[row].attribution, atol=2e-5, rtol=0
        )


def test_embeddings_are_ablated_where_the_stream_starts() -> None:
    model, ids = plain("gpt2"), tokens()
    hook = (model.model.transformer.wte, False, lambda m, args, out: torch.zeros_like(out))
    runs = ablate(attributed("gpt2"), ["embed"], at="all", progress=False)
    expected = model.difference(ids, [hook])[:, -1]
    torch.testing.assert_close(runs["embed"].logit, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
@pytest.mark.parametrize("top", [None, 40])
def test_groups_of_neurons_are_ablated(name: str, top: int | None) -> None:
    model, ids = plain(name), tokens()
    result = direct_logit_attribution(
        boot(name), ids, ANSWERS, INCORRECT, unit="neuron", top_neurons=top
    )
    group = [row for row in result.labels if row.startswith("L1N")][:2]
    assert len(group) == 2
    block = model.layers[LAYER].mlp
    z = block.c_proj if name == "gpt2" else block.down_proj

    def zero(_module, args):
        x = args[0].clone()
        x[:, -1, [int(row.removeprefix("L1N")) for row in group]] = 0.0
        return (x,)

    expected = model.difference(ids, [(z, True, zero)])[:, -1]
    runs = ablate(result, [group], progress=False)
    torch.testing.assert_close(runs["+".join(group)].logit, expected, atol=2e-5, rtol=1e-4)
    repair = self_repair(result, group)
    parts = repair.attention + repair.mlps + repair.other + repair.norm + repair.softcap
    torch.testing.assert_close(parts, repair.direct - repair.total, atol=1e-5, rtol=1e-5)
    own = result[group[0]] + result[group[1]]
    torch.testing.assert_close(repair.direct, own, atol=1e-5, rtol=1e-5)
    assert set(repair.labels) | set(group) >= set(runs["+".join(group)].labels) - {"ln_final.b"}

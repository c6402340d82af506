"""Self-repair: exact identities, a plain module with its norm held, and TransformerLens's paths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.models import of_4
from tests.support.plain import NAMES, at_last, attributed, plain, replacing
from tests.zoo.build import ANSWERS, INCORRECT, boot, tokens
from tl_dla import direct_logit_attribution, self_repair


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("unit", ["component", "head"])
@pytest.mark.parametrize("ablation", ["zero", "resample"])
def test_repair_adds_up_to_the_measured_difference(name: str, unit: str, ablation: str) -> None:
    result = attributed(name, unit, pos=(3, -1))
    label = "L0H1" if unit == "head" else "0_attn_out"
    repair = self_repair(result, label, ablation=ablation)
    parts = repair.attention + repair.mlps + repair.other + repair.norm + repair.softcap
    torch.testing.assert_close(parts, repair.direct - repair.total, atol=1e-5, rtol=1e-5)
    table = repair.to_dataframe().set_index("part")["logits"]
    names = ["attention", "mlps", "other", "norm", "softcap"]
    assert table[names].sum() == pytest.approx(table["repair"], abs=1e-5)
    if ablation == "zero":
        torch.testing.assert_close(repair.direct, result[label], atol=1e-6, rtol=1e-5)
    if name != "gemma2":
        assert repair.softcap.abs().max() < 1e-5
    else:
        assert repair.softcap.abs().max() > 1e-4


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_norms_part_is_what_holding_its_scale_takes_away(name: str) -> None:
    model, ids = plain(name), tokens()
    x = model.seen(ids, model.norm, input=True)
    centred = x - x.mean(-1, keepdim=True) if name == "gpt2" else x
    eps = model.norm.eps if name == "gpt2" else model.norm.variance_epsilon
    scale = (centred.square().mean(-1, keepdim=True) + eps).sqrt()

    def hold(norm, args, _output):
        kept = args[0] - args[0].mean(-1, keepdim=True) if name == "gpt2" else args[0]
        return kept / scale * norm.weight + getattr(norm, "bias", torch.zeros(()))

    ablated = replacing(model.output_map(0), torch.zeros_like, at_last(ids), 1)
    free = model.difference(ids, [ablated])[:, -1]
    held = model.difference(ids, [ablated, (model.norm, False, hold)])[:, -1]
    repair = self_repair(attributed(name), "L0H1")
    torch.testing.assert_close(repair.norm, free - held, atol=2e-5, rtol=1e-4)
    assert repair.norm.abs().max() > 1e-4


def test_what_a_later_part_gives_back_is_its_own_change() -> None:
    model, ids = plain("llama"), tokens()
    ablated = replacing(model.output_map(0), torch.zeros_like, at_last(ids), 1)
    kept = {}
    for run, hooks in {"clean": [], "ablated": [ablated]}.items():
        last = model.layers[-1].mlp

        def keep(_module, _args, output, run=run):
            kept[run] = output[:, -1]

        model.difference(ids, [*hooks, (last, False, keep)])
    x = model.seen(ids, model.norm, input=True)[:, -1]
    scale = (x.square().mean(-1, keepdim=True) + model.norm.variance_epsilon).sqrt()
    W_U = model.model.lm_head.weight
    read = (W_U[ANSWERS] - W_U[INCORRECT]) * model.norm.weight / scale
    expected = ((kept["ablated"] - kept["clean"]) * read).sum(-1)
    repair = self_repair(attributed("llama"), "L0H1")
    change = repair.change[repair.labels.index("2_mlp_out")]
    torch.testing.assert_close(change, expected, atol=1e-5, rtol=1e-4)


def attention_only():
    """GPT-2 with uniform attention and MLPs that write nothing: what a head does to the logit goes
    there directly or through the values of a later head."""
    bridge = boot("gpt2")
    with torch.no_grad():
        for block in bridge.original_model.transformer.h:
            for parameter in block.mlp.c_proj.parameters():
                parameter.zero_()
            block.attn.c_attn.weight[:, :64] = 0.0  # queries and keys
            block.attn.c_attn.bias[:64] = 0.0
    return bridge


@of_4
def test_direct_and_indirect_effects_are_transformer_lens_paths() -> None:
    from transformer_lens.patching import get_act_patch_direct_path

    model, ids = attention_only(), tokens()
    result = direct_logit_attribution(model, ids, ANSWERS, INCORRECT, unit="head")
    last = self_repair(result, "L1H1", at="all")  # one layer comes after: no path of three heads
    _, cache = model.run_with_cache(ids)
    lacking = {name: x.clone() for name, x in cache.items()}
    lacking["blocks.1.attn.hook_z"][:, :, 1] = 0.0
    rows = torch.arange(len(ids))

    def metric(logits: Tensor) -> Tensor:
        return (logits[rows, -1, ANSWERS] - logits[rows, -1, INCORRECT]).sum()

    # TransformerLens reads logits, so the final norm must not rescale: the plain module's is held.
    norm = model.original_model.transformer.ln_f
    x = cache["blocks.2.hook_resid_post"]
    scale = (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()

    def hold(norm, args, _output):
        centred = args[0] - args[0].mean(-1, keepdim=True)
        return centred / scale * norm.weight + norm.bias

    def zero(z, hook):
        z[:, :, 1] = 0.0
        return z

    handle = norm.register_forward_hook(hold)
    with torch.no_grad():
        clean = metric(model(ids))
        without = metric(model.run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_z", zero)]))
        # Its patched run is the clean one with one path that lacks the head.
        paths = get_act_patch_direct_path(model, ids, lacking, cache, metric, 1, 1, "v", False)
    handle.remove()
    through = paths[2] - clean
    given_back = torch.stack([last.change[last.labels.index(f"L2H{h}")] for h in range(4)])
    torch.testing.assert_close(given_back.sum(1), through, atol=5e-5, rtol=1e-4)
    assert through.abs().max() > 1e-2
    # What no path through another head carries is the direct effect.
    direct = clean - without + through.sum()
    torch.testing.assert_close(direct, result["L1H1"].sum(), atol=5e-5, rtol=1e-4)

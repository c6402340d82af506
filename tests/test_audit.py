"""What a direct effect does not tell: each number against a real intervention on a plain module.

The references here hook the `transformers` module itself: they take a write out of the final
norm's input, zero or replace a head's slice of the output projection's input, hold the final
norm's scale. Nothing is compared with the package's own algebra.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

from tests.zoo.build import (
    ANSWERS,
    INCORRECT,
    boot,
    hf_reference,
    native_reference,
    perturb,
    tokens,
)
from tests.zoo.hooked import hooked
from tl_dla import UnsupportedModelError, decompose, direct_logit_attribution
from tl_dla.audit import FLAGS, audit
from tl_dla.erasure import erasures
from tl_dla.errors import ArgumentError
from tl_dla.interventions import ablate
from tl_dla.recomputed import direct_effect_recomputed, written
from tl_dla.repair import self_repair
from tl_dla.suppression import copy_suppression

TRANSFORMER_LENS = int(version("transformer-lens").split(".")[0])
of_4 = pytest.mark.skipif(TRANSFORMER_LENS < 4, reason="the tool came with TransformerLens 4")
of_3 = pytest.mark.skipif(TRANSFORMER_LENS > 3, reason="HookedTransformer was removed in 4.0")

LAYER, HEAD, N_HEADS = 1, 2, 4
# LayerNorm with biases; RMSNorm with grouped heads; norms behind sublayers, a soft cap; multipliers
# on the stream and the logits; attention and MLP side by side with a logit scale.
# TransformerLens 3's bridge of the last does not return transformers' logits.
NAMES = ["gpt2", "llama", "gemma2", "granite", pytest.param("cohere", marks=of_4)]


@dataclass
class Plain:
    """A plain `transformers` model, and where its sublayers are."""

    name: str

    def __post_init__(self) -> None:
        self.model = hf_reference(self.name)
        base = self.model.transformer if self.name == "gpt2" else self.model.model
        self.layers = base.h if self.name == "gpt2" else base.layers
        self.norm = base.ln_f if self.name == "gpt2" else base.norm

    def output_map(self, layer: int) -> nn.Module:
        block = self.layers[layer]
        return block.attn.c_proj if self.name == "gpt2" else block.self_attn.o_proj

    def writer(self, layer: int, part: str) -> nn.Module:
        """The module whose output joins the stream, times `multiplier`."""
        block = self.layers[layer]
        if self.name == "gemma2":
            after = {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
            return getattr(block, after[part])
        return block.mlp if part == "mlp" else self.output_map(layer)

    @property
    def multiplier(self) -> float:
        return 0.3 if self.name == "granite" else 1.0

    def difference(self, ids: Tensor, hooks: list = ()) -> Tensor:
        """Logit of the answer less that of the incorrect token, `[batch, pos]`."""
        with ExitStack() as stack, torch.no_grad():
            for module, pre, hook in hooks:
                register = module.register_forward_pre_hook if pre else module.register_forward_hook
                stack.callback(register(hook).remove)
            logits = self.model(ids).logits
        rows = torch.arange(len(ids))
        return logits[rows, :, ANSWERS] - logits[rows, :, INCORRECT]

    def seen(self, ids: Tensor, module: nn.Module, *, input: bool = False) -> Tensor:
        """A module's output, or input."""
        kept: list[Tensor] = []

        def keep(_module, args, output):
            kept.append(args[0] if input else output)

        self.difference(ids, [(module, False, keep)])
        return kept[0]


@cache
def plain(name: str) -> Plain:
    return Plain(name)


@cache
def attributed(name: str, unit: str = "head", pos: object = -1):
    pos = list(pos) if isinstance(pos, tuple) else pos
    return direct_logit_attribution(boot(name), tokens(), ANSWERS, INCORRECT, unit=unit, pos=pos)


def head_slice(x: Tensor, head: int = HEAD) -> slice:
    width = x.shape[-1] // N_HEADS
    return slice(head * width, (head + 1) * width)


def replacing(module: nn.Module, value, where: Tensor, head: int | None):
    """A hook that overwrites a head's slice of the module's input, or its whole output."""

    def before(_module, args):
        x = args[0].clone()
        columns = head_slice(x, head)
        x[..., columns] = torch.where(where[..., None], value(x)[..., columns], x[..., columns])
        return (x, *args[1:])

    def after(_module, _args, output):
        return torch.where(where[..., None], value(output), output)

    return (module, head is not None, after if head is None else before)


def at_last(ids: Tensor) -> Tensor:
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[:, -1] = True
    return where


def wrote(model: Plain, label: str, ids: Tensor) -> Tensor:
    """What a row adds to the final stream, from plain modules."""
    if not label.startswith("L"):
        layer, part, _ = label.split("_")
        return model.seen(ids, model.writer(int(layer), part)) * model.multiplier
    o = model.output_map(LAYER)
    z, out = model.seen(ids, o, input=True), model.seen(ids, o)
    alone = torch.zeros_like(z)
    alone[..., head_slice(z)] = z[..., head_slice(z)]
    with torch.no_grad():
        c = o(alone) - o(torch.zeros_like(z))
    if model.name == "gemma2":  # the norm that follows, its scale that of the whole output
        norm = model.writer(LAYER, "attn")
        c = c * (1 + norm.weight) / (out.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return c * model.multiplier


# ---- the norm recomputed -----------------------------------------------------------------------


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


# ---- total effects -----------------------------------------------------------------------------


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


# ---- self-repair -------------------------------------------------------------------------------


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


# ---- TransformerLens's own intervention on the direct path --------------------------------------


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


# ---- erasure -------------------------------------------------------------------------------------


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


# ---- copy suppression ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_what_copies_of_the_answer_write_is_pattern_times_value(name: str) -> None:
    """Their sources by hand, from the plain module's attention and its value projection."""
    model, ids = plain(name), tokens().clone()
    ids[0, 4], ids[1, 2], ids[1, 7] = ANSWERS[0], ANSWERS[1], ANSWERS[1]
    result = direct_logit_attribution(boot(name), ids, ANSWERS, INCORRECT, unit="head")
    shares = copy_suppression(result)
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
        value, whole = (read * result.ratio[:, 0] * torch.tensor([1.0, -1.0])).sum(-1)
        share = shares[result.labels.index(row)]
        torch.testing.assert_close(share, value / whole, atol=1e-4, rtol=1e-3)
    positive = [i for i, row in enumerate(result.labels) if result[row].mean() >= 0]
    assert shares[positive].isnan().all()


def test_without_a_copy_of_the_answer_there_is_nothing_to_suppress() -> None:
    result = direct_logit_attribution(boot("llama"), tokens(), 1, 2, unit="head", pos=[4, -1])
    assert not (tokens() == 1).any()
    shares = copy_suppression(result)
    assert set(shares[~shares.isnan()].tolist()) == {0.0}


def test_answers_of_their_own_position_have_copies_of_their_own() -> None:
    model, ids = boot("llama"), tokens()
    answers = ids[:, [2, 5]]
    both = direct_logit_attribution(model, ids, answers, INCORRECT, unit="head", pos=[4, -1])
    shares = copy_suppression(both)
    for i, pos in enumerate([4, -1]):
        one = direct_logit_attribution(model, ids, answers[:, i], INCORRECT, unit="head", pos=pos)
        alone = copy_suppression(one)
        rows = ~alone.isnan() & ~shares[:, :, i].isnan()
        assert rows.sum() > 4
        torch.testing.assert_close(shares[:, :, i][rows], alone[rows], atol=1e-4, rtol=1e-3)


# ---- the audit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_an_audit_is_the_parts_side_by_side(name: str) -> None:
    result = attributed(name, pos=(3, -1))
    found = audit(result, k=4, progress=False)
    rows = [label for label, _ in result.top(30, by="magnitude", mean=True)]
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


# ---- refusals ------------------------------------------------------------------------------------


@contextmanager
def unchecked_types():
    """As users run the package: a wrong literal reaches the function's own check."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_refusals_say_what_to_do() -> None:
    result = attributed("gpt2")
    for call, fragment in [
        (lambda: ablate(result, ["ln_final.b"]), "not written at one place"),
        (lambda: ablate(result, "L0H1"), "Give a list of rows"),
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
    with unchecked_types():
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
    _, cache = model.run_with_cache(tokens())
    result = direct_logit_attribution(model, None, ANSWERS, INCORRECT, unit="head", cache=cache)
    with pytest.raises(ArgumentError, match="pass the prompts as `input`"):
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

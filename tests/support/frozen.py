"""What each token and each bias writes to a logit through a frozen plain module, by autograd.

Norm scales, softmaxes and sigmoids (patterns, routers, gates) are detached, activations are the
ratio of their value to their input, and a gated MLP's halves are taken by halving what goes back
into its input maps. Then the module is one linear map of its embeddings and its bias vectors:

    rows, flow = rows_of(plain, tokens(), ANSWERS, INCORRECT, rule="half")

`flow` is what each layer's input holds at each place, `[layer, batch, source]`. Labels are the
package's; token rows (`embed←5`) hold every embedding at that place. Nothing here uses the
package's algebra or TransformerLens.
"""

from __future__ import annotations

import re
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.support.models import all_in_float64
from tests.zoo.reference import _difference
from tests.zoo.trace import layers_of, unembedding_of

ACTIVATIONS = ("act", "act_fn", "activation_fn", "gelu_impl")
GATE_MAPS = ("gate_proj", "up_proj", "gate_up_proj")
# What a bias is called, by the end of its parameter's name.
LABELS = {
    r"(c_attn|query_key_value|v_proj|qkv_proj)\.bias": "b_V",
    r"(attn\.c_proj|attn\.(o_proj|out_proj|dense)|attention\.dense|attn\.out_proj)\.bias": (
        "attn_bias"
    ),
    r"(mlp\.c_fc|dense_h_to_4h|fc1|fc_in|mlp\.up_proj)\.bias": "b_in",
    r"gate_proj\.bias": "b_gate",
    r"(mlp\.c_proj|dense_4h_to_h|fc2|fc_out|down_proj)\.bias": "mlp_bias",
    r"(ln_1|\.input_layernorm|self_attn_layer_norm)\.bias": "ln1.b",
    r"(ln_2|post_attention_layernorm|\d\.final_layer_norm)\.bias": "ln2.b",
}
ENDS = {
    r"(ln_f|final_layer_?norm|model\.norm|decoder\.final_layer_norm)\.bias": "ln_final.b",
    r"(lm_head|embed_out)\.bias": "b_U",
}
SILENT = r"([qk]_proj|[qk]_norm|router|gate)\.bias|sinks|e_score_correction_bias"


class Frozen(TorchFunctionMode):
    """Softmaxes, sigmoids and softplus are constants."""

    CONSTANT = (
        *(torch.softmax, nn.functional.softmax, Tensor.softmax),
        *(torch.sigmoid, Tensor.sigmoid, nn.functional.softplus),
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out.detach() if func in self.CONSTANT else out


def rows_of(
    model: nn.Module, ids: Tensor, answer: Tensor, incorrect: Tensor, rule: str, pos: int = -1
) -> tuple[dict[str, Tensor], Tensor]:
    """Each row `[batch]`, whose sum is the logit difference at a position, and the flow."""
    expected = _logits(model, ids, answer, incorrect, pos)
    biases = {n: p for n, p in model.named_parameters() if n.endswith(("bias", "sinks"))}
    model.requires_grad_(False)
    rows: dict[str, Tensor] = {}
    flow: list[Tensor] = []
    for prompt in range(len(ids)):  # a bias is shared by the prompts, its row is not
        with torch.enable_grad(), ExitStack() as stack:
            for parameter in biases.values():
                parameter.requires_grad_(True)
            starts: list[Tensor] = []
            streams = _streams(model, stack)
            extra = _freeze(model, stack, starts, rule)
            value = _logits(model, ids[prompt : prompt + 1], answer[prompt], incorrect[prompt], pos)
            value.sum().backward()
        starts = [start for start in starts if start.grad is not None]
        for place in range(ids.shape[1]):
            held = sum((start.grad[0, place] * start[0, place]).sum() for start in starts)
            _put(rows, f"embed←{place}", prompt, held, len(ids))
        for name, parameter in biases.items():
            grad, parameter.grad = parameter.grad, None
            if grad is not None:
                for label, own in _labelled(name, grad * parameter, rule):
                    _put(rows, label, prompt, own, len(ids))
        flow.append(torch.stack([(x.grad[0] * x[0]).sum(-1).detach() for x in streams]))
        for label, own in extra():
            _put(rows, label, prompt, own, len(ids))
    rows = {label: row.detach() for label, row in rows.items() if row.any()}
    torch.testing.assert_close(sum(rows.values()), expected, atol=1e-9, rtol=1e-9)
    return rows, torch.stack(flow, 1)


def effects_of(
    model: nn.Module,
    ids: Tensor,
    answer: Tensor,
    incorrect: Tensor,
    rule: str | None,
    given: dict[str, nn.Module],
) -> dict[str, Tensor]:
    """What each module is given, times the logit's derivative by it, `[batch, pos, d]`.

    In the frozen module, or with `rule` None in the model as it is.
    """
    seen: dict[str, Tensor] = {}

    def keep(label: str, x: Tensor) -> None:
        x.retain_grad()
        seen[label] = x

    model.requires_grad_(False)
    with torch.enable_grad(), ExitStack() as stack:
        for label, module in given.items():
            hook = module.register_forward_pre_hook(lambda _m, a, label=label: keep(label, a[0]))
            stack.callback(hook.remove)
        if rule is None:
            hook = model.get_input_embeddings().register_forward_hook(
                lambda _m, _a, out: out.detach().requires_grad_(True)
            )
            stack.callback(hook.remove)
        else:
            _freeze(model, stack, [], rule)
        # The output transform is frozen in the one, and not in the other.
        _logits(model, ids, answer, incorrect, -1, frozen=rule is not None).sum().backward()
    return {label: (x * x.grad).detach() for label, x in seen.items()}


def _put(rows: dict[str, Tensor], label: str, prompt: int, value: Tensor, n: int) -> None:
    rows.setdefault(label, torch.zeros(n, dtype=torch.float64))[prompt] += value.detach()


def _logits(model, ids, answer, incorrect, pos, frozen=True) -> Tensor:
    """The difference of two logits, the output transform at its value."""
    raw: list[Tensor] = []
    handle = unembedding_of(model).register_forward_hook(lambda _m, _a, out: raw.append(out))
    try:
        with all_in_float64():
            logits = model(ids).logits
    finally:
        handle.remove()
    ratio = torch.where(raw[0] == 0, 1.0, logits / raw[0]).detach()
    shown = raw[0] * ratio if frozen else logits
    return _difference(shown, answer.reshape(-1), incorrect.reshape(-1))[:, pos]


def _streams(model: nn.Module, stack: ExitStack) -> list[Tensor]:
    """What each layer is given, once the model has run."""
    found: list[Tensor] = []

    def keep(_layer, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        x.retain_grad()
        found.append(x)

    for layer in layers_of(model):
        stack.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
    return found


def _freeze(model: nn.Module, stack: ExitStack, starts: list[Tensor], rule: str):
    """Hooks that make the module linear; what they find beyond parameters is returned later."""
    stack.enter_context(Frozen())
    ones: list[tuple[int, Tensor]] = []

    def hook(module, replace, before=False):
        register = module.register_forward_pre_hook if before else module.register_forward_hook
        stack.callback(register(replace).remove)

    def start(_module, _args, out):
        leaf = out.detach().clone().requires_grad_(True)
        starts.append(leaf)
        return leaf

    for name, module in model.named_modules():
        last, kind = name.rpartition(".")[2], type(module).__name__
        if isinstance(module, nn.Embedding) or last == "word_embeddings_layernorm":
            hook(module, start)  # BLOOM's stream starts behind that norm
        elif "Norm" in kind:
            hook(module, _frozen_norm)
        elif last in ACTIVATIONS and isinstance(module, nn.Module):
            hook(module, _detached if rule == "gate" and _is_gated(model, name) else _ratio)
        elif rule == "half" and last in GATE_MAPS and _is_gated(model, name):
            hook(module, _halved)
        elif rule == "half" and hasattr(module, "down_proj") and not hasattr(module, "alpha"):
            if isinstance(module.down_proj, nn.Parameter):  # stacked experts have no input maps
                hook(module, lambda _m, args: (_half(args[0]), *args[1:]), before=True)
    for i, layer in enumerate(layers_of(model)):
        experts = getattr(layer.mlp, "experts", None) if hasattr(layer, "mlp") else None
        if hasattr(experts, "alpha"):
            experts._apply_gate = _gpt_oss(experts, i, rule, ones)
            stack.callback(delattr, experts, "_apply_gate")

    def extra():
        # The number that is added to the up-projection, of whichever expert: told apart by order.
        return [(f"{i}_offset", (one.grad * one).sum()) for i, one in ones if one.grad is not None]

    return extra


def _is_gated(model: nn.Module, name: str) -> bool:
    parent = model.get_submodule(name.rpartition(".")[0])
    return hasattr(parent, "gate_proj") or hasattr(parent, "gate_up_proj")


def _half(x: Tensor) -> Tensor:
    return x.detach() + 0.5 * (x - x.detach())


def _halved(_module, _args, out):
    return _half(out)


def _detached(_module, _args, out):
    return out.detach()


def _ratio(_module, args, out):
    return _line(args[0], out)


def _line(x: Tensor, y: Tensor) -> Tensor:
    """The line through the origin that takes x to y."""
    return x * torch.where(x == 0, 0.0, y / x).detach()


def _frozen_norm(norm, args, out):
    """γ ⊙ (x − mean) / s + β with s a constant, from the module's own numbers."""
    x, bias = args[0], getattr(norm, "bias", None)
    centred = "RMS" not in type(norm).__name__
    x = x - x.mean(-1, keepdim=True) if centred else x
    eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", 0.0)
    scale = (x.square().mean(-1, keepdim=True) + eps).sqrt().detach()
    gain = 1.0 if getattr(norm, "weight", None) is None else norm.weight.detach()
    gain = gain + 1.0 if "Gemma" in type(norm).__name__ else gain
    y = gain * x / scale
    y = y if bias is None else y + bias
    torch.testing.assert_close(y, out, atol=1e-10, rtol=1e-10)
    return y


def _gpt_oss(experts, layer: int, rule: str, ones: list):
    """clamped gate · sigmoid(α gate) · (clamped up + 1), the 1 a leaf of its own."""

    def apply(gate_up: Tensor) -> Tensor:
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        clipped = gate.clamp(max=experts.limit)
        act = _line(gate, clipped * torch.sigmoid(clipped * experts.alpha))
        up = _line(up, up.clamp(-experts.limit, experts.limit))
        one = torch.ones_like(up).requires_grad_(True)
        ones.append((layer, one))
        if rule == "gate":
            return (up + one) * act.detach()
        return 0.5 * ((up + one) * act.detach() + (up + one).detach() * act)

    return apply


def _labelled(name: str, value: Tensor, rule: str) -> list[tuple[str, Tensor]]:
    """The package's labels of what a bias parameter writes."""
    if re.search(SILENT, name):
        assert not value.any(), f"{name} writes, though patterns and routes are frozen"
        return []
    for pattern, label in ENDS.items():
        if re.search(rf"^[^\d]*{pattern}$", name):
            return [(label, value.sum())]
    layer = re.search(r"\.(\d+)\.", name)[1]
    for pattern, label in LABELS.items():
        if re.search(pattern, name):
            return [(f"{layer}_{label}", value.sum())]
    if name.endswith("down_proj_bias"):
        return [(f"{layer}_E{i}_b_out", own.sum()) for i, own in enumerate(value)]
    if name.endswith("gate_up_proj_bias"):
        halves = (("b_gate", value[..., ::2]), ("b_in", value[..., 1::2]))
        return [
            (f"{layer}_E{i}_{label}", own.sum())
            for label, half in halves
            for i, own in enumerate(half)
        ]
    raise AssertionError(f"{name} has no label")

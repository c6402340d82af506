"""Attention scores of plain modules taken apart by differentiation: what score ledgers are held to.

The log of the ratio of two attention weights of a plain `transformers` module, as it returns them
(masks, sinks, rotary positions, caps and all), is differentiated by what was written to the stream
at the query's position, and at the keys'. Norms keep their value and are linear (see
`tests/zoo/trace.py`), those inside the attention too, and `torch.tanh` keeps the ratio of its value
to its argument. What remains is bilinear, so the first derivative times what was written is a row,
and the second a pair. Nothing is read from weights, and nothing from TransformerLens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.zoo.reference import _precision
from tests.zoo.trace import Trace, Write, layers_of


@dataclass(frozen=True)
class ScoreReference:
    """Rows by label, each `[batch]`; pairs by two labels. Constants of the attention are no rows.

    All rows of the embeddings together are `start`.
    """

    score: Tensor
    query: dict[str, Tensor]
    key: dict[str, Tensor]
    pairs: dict[tuple[str, str], Tensor]


class _FrozenTanh(TorchFunctionMode):
    """tanh(x) as x times a number."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.tanh:
            return func(*args, **(kwargs or {}))
        [x] = args
        return x * torch.where(x == 0, 1.0, torch.tanh(x) / x).detach()


def score_reference(
    model: nn.Module,
    tokens: Tensor,
    head: tuple[int, int],
    places: list[int],
    unit: str,
    *,
    pairs: bool = True,
) -> ScoreReference:
    """The score of a (layer, head) at places: query, key and versus, all different."""
    layer, index = head
    query, *keys = places
    model.requires_grad_(False)
    with torch.enable_grad(), _precision(model), _FrozenTanh(), Trace(model) as trace:
        for module in layers_of(model)[layer].modules():
            inside = "Norm" in type(module).__name__ and not list(module.children())
            if inside and module not in layers_of(model)[layer].children():
                trace._replace_output(module, partial(_frozen, trace, module))
        pattern = _pattern(model, tokens, layer)[:, index, query]
        score = pattern[:, keys[0]].log() - pattern[:, keys[1]].log()
        writes = [write for write in trace.writes if not write.label.startswith("qk")]
        gradients = torch.autograd.grad(
            score.sum(), [w.leaf for w in writes], create_graph=True, allow_unused=True
        )
    read = [(w, g) for w, g in zip(writes, gradients, strict=True) if g is not None]
    rows: dict[str, dict[str, Tensor]] = {"q": {}, "k": {}}
    both: dict[tuple[str, str], Tensor] = {}
    for write, gradient in read:
        gradient = gradient.reshape(*tokens.shape, -1)
        for label, value in _parts(write, unit, tokens, layer).items():
            _add(rows["q"], label, (gradient * value)[:, query].sum(-1))
            others = torch.arange(tokens.shape[1]) != query
            _add(rows["k"], label, (gradient * value)[:, others].sum((1, 2)))
            if not pairs:
                continue
            second = torch.autograd.grad(
                (gradient * value)[:, query].sum(),
                [w.leaf for w, _ in read],
                retain_graph=True,
                allow_unused=True,
            )
            for (other, _), back in zip(read, second, strict=True):
                if back is None:
                    continue
                back = back.reshape(*tokens.shape, -1)
                for name, part in _parts(other, unit, tokens, layer).items():
                    _add(both, (label, name), (back * part)[:, others].sum((1, 2)))
    query_rows, key_rows = (
        {label: row.detach() for label, row in rows[side].items()} for side in "qk"
    )
    both = {label: pair.detach() for label, pair in both.items()}
    return ScoreReference(score.detach(), query_rows, key_rows, both)


def _pattern(model: nn.Module, tokens: Tensor, layer: int) -> Tensor:
    """As the model returns it; a HookedTransformer, as it leaves its softmax."""
    if not hasattr(model, "config"):
        kept: list[Tensor] = []
        hook = model.blocks[layer].attn.hook_pattern.register_forward_hook(
            lambda _module, _args, pattern: kept.append(pattern)
        )
        model(tokens)
        hook.remove()
        return kept[0]
    patterns = [x for x in model(tokens, output_attentions=True).attentions if x is not None]
    return patterns[_attention_layers(model).index(layer)]


def _attention_layers(model: nn.Module) -> list[int]:
    """The layers that have a pattern; hybrids have others too."""
    kinds = [[type(m).__name__ for m in layer.children()] for layer in layers_of(model)]
    return [i for i, names in enumerate(kinds) if any("Attention" in name for name in names)]


def _frozen(trace: Trace, norm: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    return trace._freeze_norm(norm, "qk.b", x, output)


def _parts(write: Write, unit: str, tokens: Tensor, layer: int) -> dict[str, Tensor]:
    """What was written, by label; the norm before the attention as `3_ln1.b` under any name."""
    own = write.label.startswith(f"{layer}_")
    whole = {f"{layer}_ln1.b" if own else write.label: write.value}
    parts = write.parts if unit == "head" and write.parts else whole
    return {label: value.detach().reshape(*tokens.shape, -1) for label, value in parts.items()}


def _add(rows: dict, label: object, value: Tensor) -> None:
    rows[label] = rows[label] + value if label in rows else value

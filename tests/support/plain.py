"""Plain `transformers` models with real interventions: what effects and repairs are held to.

They hook the module itself: take a write out of the final norm's input, zero or replace a head's
slice of the output projection's input. Nothing here uses the package's own algebra.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from tests.support.models import of_4
from tests.zoo.build import ANSWERS, INCORRECT, boot, hf_reference, tokens
from tl_dla import direct_logit_attribution

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

    def logits(self, ids: Tensor, hooks: list = ()) -> Tensor:
        """With `(module, whether before it, hook)` in place."""
        with ExitStack() as stack, torch.no_grad():
            for module, pre, hook in hooks:
                register = module.register_forward_pre_hook if pre else module.register_forward_hook
                stack.callback(register(hook).remove)
            return self.model(ids).logits

    def difference(self, ids: Tensor, hooks: list = ()) -> Tensor:
        """Logit of the answer less that of the incorrect token, `[batch, pos]`."""
        logits, rows = self.logits(ids, hooks), torch.arange(len(ids))
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

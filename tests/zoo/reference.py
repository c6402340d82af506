"""What each part of a model writes to a logit, computed a second way: by differentiation.

With the scale of every norm on the way held fixed, the logit is linear in what the sublayers write:

    logit = sum_c <g_c, c>  +  terms of norm and unembedding biases,      g_c = d logit / d c

Here g_c comes from autograd on the plain torch module (`transformers`, or TransformerLens's own
models): see `trace.py`. It never comes from weights that this file would have to find, nor from
TransformerLens's hooks. A multiplier or soft cap after the unembedding is held at its value, final
logit / raw logit.

`reference` asserts that the rows sum to the logit of the untouched model. Rows are named as in the
package, with one exception: `start` is the stream as block 0 receives it, all embedding rows
together. `3_attn_out`, `3_mlp_out`, `L3H7`, `3_attn_bias`, `ln_final.b`, `b_U`; other sublayers by
their module (`3_mamba_out`), and `3_ln1.b` where a norm with a bias sits on the stream itself.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.zoo.build import ANSWERS, INCORRECT, hf_reference, native_reference, tokens
from tests.zoo.configs import NATIVE
from tests.zoo.hooked import HOOKED, hooked
from tests.zoo.trace import Trace, all_in_float64, unembedding_of

# Their forward pass asks for float32.
FLOAT32_ONLY = ["gpt2_upcast", "gpt2_scaleattn", "moe"]

# No linear readout, or no single stream: there is nothing exact to compare with.
NO_REFERENCE = {
    "bert_lm": "non-linear prediction head",
    "modernbert_decoder": "non-linear prediction head",
    "deepseek_v4": "hyper-connections: several residual streams",
    "hrm_text": "each layer runs several times",
}


@dataclass(frozen=True)
class Reference:
    """Rows `[batch, pos]` by label. `components` sum to `logit`; so do `heads`, if any."""

    components: dict[str, Tensor]
    heads: dict[str, Tensor]
    logit: Tensor


def hf_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """The model's own logits `[batch, pos, d_vocab]`."""
    with torch.no_grad(), _precision(model):
        return _logits(model(tokens))


def reference(
    model: nn.Module, tokens: Tensor, answer: Tensor, incorrect: Tensor | None = None
) -> Reference:
    """Every row at every position. `answer` and `incorrect`: a token id per prompt, `[batch]`."""
    expected = _difference(hf_logits(model, tokens), answer, incorrect)
    trace, transform = differentiated(model, tokens, answer, incorrect)
    b_U = unembedding_of(model)(torch.zeros_like(trace.unembedded))
    bias_row = _difference((b_U * transform).detach(), answer, incorrect)
    components: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    for write in trace.writes:
        if write.leaf.grad is None:  # read by later sublayers only
            continue
        for rows, parts in (components, {}), (heads, write.parts):
            for label, value in (parts or {write.label: write.value}).items():
                row = (write.leaf.grad * value).sum(-1).reshape(tokens.shape)
                rows[label] = rows.get(label, 0) + row
    components = _without_zeros(components | {"b_U": bias_row})
    heads = _without_zeros(heads | {"b_U": bias_row})
    if not (trace.splits_heads and any(write.parts for write in trace.writes)):
        heads = {}
    _assert_complete(components, expected)
    if heads:
        _assert_complete(heads, expected)
    return Reference(components, heads, expected)


def differentiated(
    model: nn.Module, tokens: Tensor, answer: Tensor, incorrect: Tensor | None
) -> tuple[Trace, Tensor]:
    """A pass whose leaves hold the logit's (difference's) derivative; its transform, held fixed."""
    model.requires_grad_(False)
    with torch.enable_grad(), _precision(model), Trace(model) as trace:
        logits = _logits(model(tokens))
        raw = trace.raw_logits
        transform = torch.where(raw == 0, 1.0, logits / raw).detach()
        _difference(raw * transform, answer, incorrect).sum().backward()
    return trace, transform


@functools.cache
def zoo_reference(name: str) -> Reference:
    """The reference of one model on the prompts and answers of the zoo, in float64 if it can."""
    dtype = torch.float32 if name in FLOAT32_ONLY else torch.float64
    if name in HOOKED:
        model = hooked(name, dtype)
    elif name in NATIVE:
        model = native_reference(name).to(dtype)
    else:
        model = hf_reference(name, dtype)
    return reference(model, tokens(), ANSWERS, INCORRECT)


def _difference(logits: Tensor, answer: Tensor, incorrect: Tensor | None) -> Tensor:
    prompts = torch.arange(len(answer))
    if incorrect is None:
        return logits[prompts, :, answer]
    return logits[prompts, :, answer] - logits[prompts, :, incorrect]


def _without_zeros(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """The biases that a model does not have leave no row."""
    return {label: row for label, row in rows.items() if row.any()}


def _assert_complete(rows: dict[str, Tensor], expected: Tensor) -> None:
    tolerance = 1e-9 if expected.dtype == torch.float64 else 1e-4
    size = torch.stack(list(rows.values())).abs().sum(0).max()
    error = (sum(rows.values()) - expected).abs().max()
    assert error <= tolerance * size, f"rows miss the logit by {error:.1e}: {list(rows)}"


def _logits(output: Tensor | tuple) -> Tensor:
    return getattr(output, "logits", output)


def _precision(model: nn.Module):
    """Everything in float64 if the model is."""
    double = next(model.parameters()).dtype == torch.float64
    return all_in_float64() if double else nullcontext()

"""The exercises, solved: one way among several, in the words of TransformerLens."""

from typing import Any

import einops
import torch
from jaxtyping import Float, Int
from torch import Tensor


def logit_diff_directions(
    model: Any, correct: Int[Tensor, " batch"], incorrect: Int[Tensor, " batch"]
) -> Float[Tensor, "batch d_model"]:
    directions = model.W_U[:, correct] - model.W_U[:, incorrect]
    return einops.rearrange(directions, "d_model batch -> batch d_model") * model.ln_final.w


def residual_stack_to_logit_diff(
    stack: Float[Tensor, "*row batch d_model"],
    cache: Any,
    directions: Float[Tensor, "batch d_model"],
    pos: int = -1,
) -> Float[Tensor, "*row"]:
    centred = stack - stack.mean(-1, keepdim=True)
    normalised = centred / cache["ln_final.hook_scale"][:, pos]
    per_prompt = einops.einsum(
        normalised, directions, "... batch d_model, batch d_model -> ... batch"
    )
    return per_prompt.mean(-1)


def logit_lens(
    model: Any, cache: Any, correct: Int[Tensor, " batch"], incorrect: Int[Tensor, " batch"]
) -> Float[Tensor, " point"]:
    stack = cache.accumulated_resid(layer=-1, incl_mid=True, pos_slice=-1)
    logits = model.ln_final(stack) @ model.W_U + model.b_U
    prompt = torch.arange(len(correct))
    return (logits[:, prompt, correct] - logits[:, prompt, incorrect]).mean(-1)


def per_layer_logit_diff(
    cache: Any, directions: Float[Tensor, "batch d_model"]
) -> Float[Tensor, " component"]:
    stack = cache.decompose_resid(layer=-1, pos_slice=-1)
    return residual_stack_to_logit_diff(stack, cache, directions)


def per_head_logit_diff(
    model: Any, cache: Any, directions: Float[Tensor, "batch d_model"]
) -> Float[Tensor, "layer head"]:
    stack = cache.stack_head_results(layer=-1, pos_slice=-1)
    stack = einops.rearrange(
        stack, "(layer head) batch d_model -> layer head batch d_model", layer=model.cfg.n_layers
    )
    return residual_stack_to_logit_diff(stack, cache, directions)


def top_heads(
    per_head: Float[Tensor, "layer head"], k: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    flat = einops.rearrange(per_head, "layer head -> (layer head)")
    n_heads = per_head.shape[1]
    positive, negative = (
        [divmod(int(index), n_heads) for index in flat.topk(k, largest=largest).indices]
        for largest in (True, False)
    )
    return positive, negative


def layer_norm_split(
    stack: Float[Tensor, "row batch d_model"], model: Any, cache: Any, pos: int = -1
) -> Float[Tensor, "row_and_beta batch d_model"]:
    centred = stack - stack.mean(-1, keepdim=True)
    rows = centred / cache["ln_final.hook_scale"][:, pos] * model.ln_final.w
    return torch.cat([rows, model.ln_final.b.expand_as(rows[:1])])


def all_rows(
    model: Any, cache: Any, correct: Int[Tensor, " batch"], incorrect: Int[Tensor, " batch"]
) -> Float[Tensor, " row"]:
    stack = cache.decompose_resid(layer=-1, pos_slice=-1)
    split = layer_norm_split(stack, model, cache)
    unembed = (model.W_U[:, correct] - model.W_U[:, incorrect]).T
    rows = einops.einsum(split, unembed, "row batch d_model, batch d_model -> row batch")
    bias = model.b_U[correct] - model.b_U[incorrect]
    return torch.cat([rows, bias[None]]).mean(-1)


def adds_up(rows: Float[Tensor, " row"], expected: float) -> bool:
    # What float32 can round away grows with what was added, not with what is left of it.
    tolerance = 1e-5 * float(rows.abs().sum())
    return abs(float(rows.sum()) - expected) <= tolerance


# ---- beyond the norm ---------------------------------------------------------------------------


def choose_tokens(model: Any, prompt: str) -> tuple[int, int]:
    names = [word.strip(",.") for word in prompt.split()[1:] if word[0].isupper()]
    answer, foil = sorted(set(names), key=names.count)
    return model.to_single_token(f" {answer}"), model.to_single_token(f" {foil}")


def source_contributions(
    model: Any, cache: Any, layer: int, head: int, directions: Float[Tensor, "batch d_model"]
) -> Float[Tensor, "batch pos"]:
    values = cache["v", layer][:, :, head]
    written = values @ model.blocks[layer].attn.W_O[head]
    centred = written - written.mean(-1, keepdim=True)
    normalised = centred / cache["ln_final.hook_scale"][:, -1:]
    each = einops.einsum(normalised, directions, "batch pos d_model, batch d_model -> batch pos")
    return cache["pattern", layer][:, head, -1] * each


def suppressing_head(model: Any, cache: Any, tokens: Int[Tensor, " batch"]) -> tuple[int, int]:
    directions = model.W_U[:, tokens].T * model.ln_final.w
    per_head = per_head_logit_diff(model, cache, directions)
    return divmod(int(per_head.argmin()), model.cfg.n_heads)


def logit_diff_lost(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    correct: Int[Tensor, " batch"],
    incorrect: Int[Tensor, " batch"],
    layer: int,
    head: int,
) -> float:
    def silence(z, hook):
        z[:, -1, head] = 0
        return z

    def logit_diff(logits):
        prompt = torch.arange(len(tokens))
        return (logits[prompt, -1, correct] - logits[prompt, -1, incorrect]).mean()

    hooks = [(f"blocks.{layer}.attn.hook_z", silence)]
    without = model.run_with_hooks(tokens, fwd_hooks=hooks)
    return float(logit_diff(model(tokens)) - logit_diff(without))


def read_flow(flow: Float[Tensor, "point token"]) -> tuple[int, int]:
    arrived = flow[:, -1] > flow.sum(1) / 2
    return int(flow[0].argmax()), int(arrived.int().argmax()) - 1

"""The classic mistakes of the norm's exercises, as a learner would write them, and what is said.

They are written with TransformerLens, and not with the numbers that the checks compare with.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tutorials" / "exercises"))

import solutions  # noqa: E402

# ---- building blocks of wrong answers ----------------------------------------------------------


def read(
    stack,
    cache,
    directions,
    pos=-1,
    *,
    centre=True,
    scaled=True,
    scale_pos=None,
    over="mean",
    power=1,
):
    """`residual_stack_to_logit_diff`, with what can go wrong as arguments."""
    x = stack - stack.mean(-1, keepdim=True) if centre else stack
    if callable(scaled):
        x = x / scaled(stack, cache["resid_post", -1][:, pos])
    elif scaled:
        x = x / cache["ln_final.hook_scale"][:, pos if scale_pos is None else scale_pos] ** power
    return reduced((x * directions).sum(-1), over)


def reduced(each, over):
    return {"mean": each.mean(-1), "sum": each.sum(-1), "none": each}[over]


def recomputed(stack, cache, directions, pos=-1):
    x = stack - stack.mean(-1, keepdim=True)
    return ((x / x.std(-1, correction=0, keepdim=True)) * directions).sum(-1).mean(-1)


def difference(model, correct, incorrect):
    return (model.W_U[:, correct] - model.W_U[:, incorrect]).T


def directions_with(change):
    def logit_diff_directions(model, correct, incorrect):
        return change(difference(model, correct, incorrect), model, correct, incorrect)

    return logit_diff_directions


def reading(**wrong):
    return lambda stack, cache, directions, pos=-1: read(stack, cache, directions, pos, **wrong)


def lens_with(*, mid=True, pos=-1, gamma=1, beta=1, b_U=1, norm=True, frozen=False, end=None):
    def logit_lens(model, cache, correct, incorrect):
        x = cache.accumulated_resid(layer=-1, incl_mid=mid, pos_slice=pos)[:end]
        if norm:
            x = x - x.mean(-1, keepdim=True)
            scale = (x.square().mean(-1, keepdim=True) + model.cfg.eps).sqrt()
            x = x / (scale[-1:] if frozen else scale)
            x = x * (model.ln_final.w if gamma else 1) + beta * model.ln_final.b
        each = (x * difference(model, correct, incorrect)).sum(-1)
        return (each + b_U * (model.b_U[correct] - model.b_U[incorrect])).mean(-1)

    return logit_lens


def layers_with(pos=-1, scale_pos=-1, **wrong):
    def per_layer_logit_diff(cache, directions):
        stack = cache.decompose_resid(layer=-1, pos_slice=pos)
        return read(stack, cache, directions, scale_pos, **wrong)

    return per_layer_logit_diff


def heads_with(change=lambda flat, n_layers: flat.unflatten(0, (n_layers, -1)), pos=-1, **wrong):
    def per_head_logit_diff(model, cache, directions):
        stack = cache.stack_head_results(layer=-1, pos_slice=pos)
        return change(read(stack, cache, directions, **wrong), model.cfg.n_layers)

    return per_head_logit_diff


def head_with_bias(model, cache, directions):
    stack = cache.stack_head_results(layer=-1, pos_slice=-1).unflatten(0, (4, 4)).clone()
    for layer, block in enumerate(model.blocks):
        stack[layer] += block.attn.b_O
    return read(stack, cache, directions)


def norm_with(
    *, gamma=True, scaled=True, centre="first", scale_pos=None, beta="row", recompute=False
):
    def layer_norm_split(stack, model, cache, pos=-1):
        x = stack - stack.mean(-1, keepdim=True) if centre == "first" else stack
        scale = cache["ln_final.hook_scale"][:, pos if scale_pos is None else scale_pos]
        if recompute:
            scale = (x.var(-1, correction=0, keepdim=True) + model.cfg.eps).sqrt()
        x = x / scale if scaled else x
        x = x * model.ln_final.w ** int(gamma)
        x = x - x.mean(-1, keepdim=True) if centre == "late" else x
        b = model.ln_final.b.expand_as(x[:1])
        return {
            "row": lambda: torch.cat([x, b]),
            "none": lambda: x,
            "first": lambda: torch.cat([b, x]),
            "every": lambda: x + b,
            "scaled": lambda: torch.cat([x, b / scale]),
            "gamma": lambda: torch.cat([x, b * model.ln_final.w]),
        }[beta]()

    return layer_norm_split


def ledger_with(
    *, beta=True, b_U=True, over="mean", centre=True, scaled=True, gamma=True, pos=-1, sign=1
):
    def all_rows(model, cache, correct, incorrect):
        u = sign * difference(model, correct, incorrect)
        stack = cache.decompose_resid(layer=-1, pos_slice=pos)
        w = u * model.ln_final.w ** int(gamma)
        rows = [*read(stack, cache, w, pos, centre=centre, scaled=scaled, over="none")]
        if beta:
            scale = cache["ln_final.hook_scale"][:, -1, 0] if beta == "scaled" else 1
            rows.append(u @ model.ln_final.b / scale)
        if b_U:
            rows.append(sign * b_U * (model.b_U[correct] - model.b_U[incorrect]))
        return reduced(torch.stack(rows), over)

    return all_rows


def miss(rows, expected):
    return float(rows.sum()) - expected


def tolerance(rows):
    return 1e-5 * float(rows.abs().sum())


def length(stack, whole):
    return whole.norm(dim=-1, keepdim=True)


def unbiased(stack, whole):
    return whole.std(-1, keepdim=True)


def own_length(stack, whole):
    return stack.norm(dim=-1, keepdim=True)


def gamma_of(cache):
    return cache.model.ln_final.w


def late(stack, cache, directions, pos=-1):
    return read(stack, cache, directions, pos, scale_pos=0)


# ---- exercise, mistake, what the check says ------------------------------------------------------

SUMS = r"your rows sum to -?[\d.]+, the logit difference is [\d.]+: "
MISTAKES = {
    "logit_diff_directions": {
        "swapped": (directions_with(lambda u, m, c, i: -u * m.ln_final.w), "swapped them"),
        "no gamma": (directions_with(lambda u, m, c, i: u), "forgot γ"),
        "gamma twice": (directions_with(lambda u, m, c, i: u * m.ln_final.w**2), "γ is in twice"),
        "over gamma": (directions_with(lambda u, m, c, i: u / m.ln_final.w), "divided by it"),
        "correct alone": (
            directions_with(lambda u, m, c, i: m.W_U[:, c].T * m.ln_final.w),
            "correct answer's direction alone",
        ),
        "unit length": (
            directions_with(
                lambda u, m, c, i: torch.nn.functional.normalize(u * m.ln_final.w, dim=-1)
            ),
            "length 1",
        ),
        "transposed": (directions_with(lambda u, m, c, i: (u * m.ln_final.w).T), "prompts last"),
        "not a tensor": (directions_with(lambda u, m, c, i: u.tolist()), "you returned a list"),
        "NaN": (directions_with(lambda u, m, c, i: u * float("nan")), "NaN"),
        "unknown": (directions_with(lambda u, m, c, i: u + 1), "not in a way known"),
        "wrong shape": (directions_with(lambda u, m, c, i: u[:, :-1]), r"shape \[3, 127\]"),
    },
    "residual_stack_to_logit_diff": {
        "no scale": (reading(scaled=False), "forgot the final norm's scale"),
        "not centred": (reading(centre=False), "did you centre"),
        "summed": (reading(over="sum"), "summed over the prompts"),
        "per prompt": (reading(over="none"), "a number for each prompt"),
        "averaged rows": (lambda *a: read(*a).mean(), "averaged over the rows too"),
        "sign": (lambda *a: -read(*a), "every sign is wrong"),
        "recomputed": (recomputed, "recomputed from that row alone"),
        "scale of position 0": (late, "scale is that of position 0; .* of position -1"),
        "ignores pos": (reading(scale_pos=-1), "that of position 14; .* of position 3"),
        "length": (reading(scaled=length), "the stream's length"),
        "unbiased": (reading(scaled=unbiased), "unbiased standard deviation"),
        "own length": (reading(scaled=own_length), "by its own length"),
        "squared": (reading(power=2), "by the scale twice"),
        "gamma twice": (lambda s, c, d, p=-1: read(s, c, d * gamma_of(c), p), "γ is in twice"),
        "over twice": (lambda *a: read(*a) / 3, "the same multiple of what is right"),
        "sign, not centred": (
            lambda *a: -read(*a, centre=False),
            ("every sign is wrong", "did you centre"),
        ),
        "no scale, summed": (
            reading(scaled=False, over="sum"),
            ("summed over the prompts", "forgot the final norm's scale"),
        ),
        "unbiased, not centred": (
            reading(scaled=unbiased, centre=False),
            ("did you centre", "unbiased standard deviation"),
        ),
    },
    "logit_lens": {
        "frozen": (lens_with(frozen=True), "scale is frozen"),
        "no end": (lens_with(end=-1), "final_post is missing"),
        "no mid": (lens_with(mid=False), "incl_mid=True"),
        "position 0": (lens_with(pos=0), "reads position 0"),
        "no b_U": (lens_with(b_U=0), "forgot b_U"),
        "no beta": (lens_with(beta=0), "forgot β, "),
        "no biases": (lens_with(beta=0, b_U=0), "forgot both β and b_U"),
        "no gamma": (lens_with(gamma=0), "forgot γ"),
        "no norm": (lens_with(norm=False), "forgot the final norm"),
        "swapped": (lambda m, c, a, b: solutions.logit_lens(m, c, b, a), "swapped"),
        "summed": (lambda *a: 3 * solutions.logit_lens(*a), "summed over the prompts"),
        "b_U subtracted": (lens_with(b_U=-1), "you subtracted b_U"),
        "no mid, frozen": (
            lens_with(mid=False, frozen=True),
            ("scale is frozen", "incl_mid=True"),
        ),
        "no gamma, position 0": (
            lens_with(gamma=0, pos=0),
            ("reads position 0", "forgot γ"),
        ),
        "components": (
            lambda m, c, a, b: (
                (m.ln_final(c.decompose_resid(layer=-1, pos_slice=-1)) * difference(m, a, b)).sum(
                    -1
                )
                + m.b_U[a]
                - m.b_U[b]
            ).mean(-1),
            "components one by one",
        ),
    },
    "per_layer_logit_diff": {
        "accumulated": (
            lambda c, d: read(c.accumulated_resid(layer=-1, incl_mid=True, pos_slice=-1), c, d),
            "accumulated so far",
        ),
        "position 0": (layers_with(pos=0, scale_pos=0), "reads position 0"),
        "vectors of position 0": (layers_with(pos=0), "vectors of position 0"),
        "scale of position 0": (layers_with(scale_pos=0), "scale is that of position 0"),
        "no embeddings": (lambda c, d: layers_with()(c, d)[2:], "pos_embed are missing"),
        "recomputed": (
            lambda c, d: recomputed(c.decompose_resid(layer=-1, pos_slice=-1), c, d),
            "recomputed from that row alone",
        ),
        "no scale": (layers_with(scaled=False), "forgot the final norm's scale"),
        "not centred": (layers_with(centre=False), "did you centre"),
        "summed": (layers_with(over="sum"), "summed over the prompts"),
        "per prompt": (layers_with(over="none"), "a number for each prompt"),
        "sign": (lambda c, d: -layers_with()(c, d), "every sign is wrong"),
    },
    "per_head_logit_diff": {
        "head layer": (heads_with(lambda flat, n: flat.unflatten(0, (-1, n)).T), "wrong places"),
        "flat": (heads_with(lambda flat, n: flat), "in one row"),
        "position 0": (heads_with(pos=0, scale_pos=0), "reads position 0"),
        "vectors of position 0": (heads_with(pos=0), "vectors of position 0"),
        "bias": (head_with_bias, "output bias b_O"),
        "no scale": (heads_with(scaled=False), "forgot the final norm's scale"),
        "summed": (heads_with(over="sum"), "summed over the prompts"),
        "scale of position 0": (heads_with(scale_pos=0), "scale is that of position 0"),
        "per prompt": (heads_with(over="none"), "a number for each prompt"),
        "length": (heads_with(scaled=length), "the stream's length"),
        "flat, sign": (
            lambda m, c, d: -heads_with(lambda flat, n: flat)(m, c, d),
            ("in one row", "every sign is wrong"),
        ),
        "wrong places, no scale": (
            heads_with(lambda flat, n: flat.unflatten(0, (-1, n)).T, scaled=False),
            ("wrong places", "forgot the final norm's scale"),
        ),
    },
    "layer_norm_split": {
        "gamma twice": (norm_with(gamma=2), "γ is in twice"),
        "beta first": (norm_with(beta="first"), "β is the first row"),
        "no gamma, no beta": (
            norm_with(gamma=False, beta="none"),
            ("forgot β", "forgot γ"),
        ),
        "no beta": (norm_with(beta="none"), "forgot β"),
        "beta in every row": (norm_with(beta="every"), "β is in every row"),
        "beta scaled": (norm_with(beta="scaled"), "β is not divided"),
        "beta times gamma": (norm_with(beta="gamma"), "γ multiplies yours"),
        "no gamma": (norm_with(gamma=False), "forgot γ"),
        "no scale": (norm_with(scaled=False), "forgot the final norm's scale"),
        "not centred": (norm_with(centre="never"), "did not centre"),
        "centred late": (norm_with(centre="late"), "centred after multiplying by γ"),
        "recomputed": (norm_with(recompute=True), "recomputed from that row alone"),
        "scale of position 0": (
            norm_with(scale_pos=0),
            "scale is that of position 0; .* of position -1",
        ),
    },
    "all_rows": {
        "no biases": (ledger_with(beta=False, b_U=False), SUMS + r"did you forget β and b_U\?"),
        "no b_U": (ledger_with(b_U=False), SUMS + r"did you forget b_U\?"),
        "no beta": (ledger_with(beta=False), SUMS + r"did you forget β\?"),
        "swapped": (ledger_with(sign=-1), SUMS + "did you swap"),
        "summed": (ledger_with(over="sum"), SUMS + "did you sum over the prompts"),
        "per prompt": (ledger_with(over="none"), "a number for each prompt"),
        "beta scaled": (ledger_with(beta="scaled"), SUMS + "β is not divided"),
        "b_U first": (
            lambda *a: solutions.all_rows(*a)[[*range(10), 11, 10]],
            SUMS + "β and b_U are in the wrong order",
        ),
        "not centred": (ledger_with(centre=False), SUMS + "did you centre"),
        "no scale": (ledger_with(scaled=False), SUMS + "you forgot the final norm's scale"),
        "no gamma": (ledger_with(gamma=False), SUMS + r"did you forget γ\?"),
        "position 0": (ledger_with(pos=0), SUMS + "did you read position 0"),
        "b_U's sign": (ledger_with(b_U=-1), SUMS + "b_U has the wrong sign"),
        "gamma twice": (ledger_with(gamma=2), SUMS + r"is γ in twice\?"),
        "unbiased": (ledger_with(scaled=unbiased), SUMS + "you divided by the unbiased"),
        "length": (ledger_with(scaled=length), SUMS + "you divided by the stream's length"),
        "no gamma, b_U's sign": (
            ledger_with(gamma=False, b_U=-1),
            ("b_U has the wrong sign", "did you forget γ"),
        ),
        "no beta, not centred": (
            ledger_with(beta=False, centre=False),
            ("did you forget β", "did you centre"),
        ),
    },
    "adds_up": {
        "exact": (lambda r, e: miss(r, e) == 0, "it rejects rows that miss by"),
        "always": (lambda r, e: True, "cannot fail"),
        "loose": (lambda r, e: abs(miss(r, e)) <= 0.1 * float(r.abs().sum()), "cannot fail"),
        "rather loose": (lambda r, e: abs(miss(r, e)) <= 0.05, "tolerance is too loose"),
        "one direction": (lambda r, e: miss(r, e) <= tolerance(r), "one direction"),
        "NaN": (lambda r, e: not abs(miss(r, e)) > tolerance(r), "accepts NaN"),
        "of the sum": (lambda r, e: abs(miss(r, e)) <= 1e-5 * abs(e), "grow with the sum"),
        "fixed": (lambda r, e: abs(miss(r, e)) <= 1e-3, "grow with the sum"),
        "no answer": (lambda r, e: None, "True or False"),
    },
}

"""The classic mistakes of the exercises that choose and read, as a learner would write them."""

import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tutorials" / "exercises"))

import solutions  # noqa: E402

# ---- the answer and the foil -------------------------------------------------------------------


def names_in(prompt):
    return [word.strip(",.") for word in prompt.split()[1:] if word[0].isupper()]


def pair(model, prompt, *, space=" ", order="repeated", swap=False, bos=False):
    names = names_in(prompt)
    answer, foil = {
        "repeated": sorted(set(names), key=names.count),
        "first": names[:2],
        "second": names[1::-1],
    }[order]
    tokens = [model.to_tokens(space + name, prepend_bos=bos)[0, 0] for name in (answer, foil)]
    return tuple(int(token) for token in (reversed(tokens) if swap else tokens))


# ---- what a head reads -------------------------------------------------------------------------


def sources(
    model,
    cache,
    layer,
    head,
    directions,
    *,
    weights=lambda pattern, head: pattern[:, head, -1],
    values="v",
    out=None,
    centre=True,
    scale=lambda cache: cache["ln_final.hook_scale"][:, -1:],
):
    x = (
        cache[values, layer][:, :, head]
        @ model.blocks[layer].attn.W_O[head if out is None else out]
    )
    x = x - x.mean(-1, keepdim=True) if centre else x
    each = ((x / scale(cache)) * directions[:, None]).sum(-1)
    return each * weights(cache["pattern", layer], head)


# ---- which head holds a token down -------------------------------------------------------------


def rows_for(model, cache, *tokens):
    u = model.W_U[:, tokens[0]] - (model.W_U[:, tokens[1]] if tokens[1:] else 0)
    return solutions.per_head_logit_diff(model, cache, u.T * model.ln_final.w)


def head_at(index):
    return divmod(int(index), 4)


def by_difference(largest):
    """What helps or hurts the answers, whatever tokens are asked about."""

    def suppressing_head(model, cache, tokens):
        prompts = ((" Mary", " John"), (" Paul", " Tom"), (" Emma", " Kate"))
        correct, incorrect = (
            torch.tensor([model.to_single_token(p[i]) for p in prompts]) for i in (0, 1)
        )
        rows = rows_for(model, cache, correct, incorrect)
        return head_at(rows.argmax() if largest else rows.argmin())

    return suppressing_head


# ---- what the model does without a head --------------------------------------------------------


def lost(
    model, tokens, correct, incorrect, layer, head,
    *, at=-1, which=None, over="mean", sign=1, foil=1, before=True, give=True, leave=False,
):  # fmt: skip
    def silence(z, hook):
        z = z.clone()
        z[:, at, head if which is None else which] = 0
        return z if give else None

    def difference(logits):
        b = torch.arange(len(tokens))
        return getattr(logits[b, -1, correct] - foil * logits[b, -1, incorrect], over)()

    full = difference(model(tokens))
    hook = (f"blocks.{layer}.attn.hook_z", silence)
    if leave:
        model.add_hook(*hook)
        without = difference(model(tokens))
    else:
        without = difference(model.run_with_hooks(tokens, fwd_hooks=[hook]))
    return sign * float(full - without if before else without)


def row(model, tokens, correct, incorrect, layer, head):
    _, cache = model.run_with_cache(tokens)
    return float(rows_for(model, cache, correct, incorrect)[layer, head])


# ---- the heads that write most -----------------------------------------------------------------


def ranked(per_head, k, *, key=lambda v: v, flat=False):
    order = sorted(range(per_head.numel()), key=lambda i: -float(key(per_head.flatten()[i])))
    return order[:k] if flat else [divmod(i, per_head.shape[1]) for i in order[:k]]


def both(per_head, k):
    return ranked(per_head, k), ranked(per_head, k, key=lambda v: -v)


# ---- exercise, mistake, what the check says ------------------------------------------------------

SPACE = "a leading space is missing"
MISTAKES = {
    "choose_tokens": {
        "no space": (partial(pair, space=""), SPACE),
        "swapped": (partial(pair, swap=True), "the answer and the foil are swapped"),
        "no space, swapped": (
            partial(pair, space="", swap=True),
            (SPACE, "the answer and the foil are swapped"),
        ),
        "first name": (partial(pair, order="first"), "take the first name for the answer"),
        "second name": (partial(pair, order="second"), "take the second name for the answer"),
        "first name, no space": (
            partial(pair, order="first", space=""),
            (SPACE, "take the first name for the answer"),
        ),
        "BOS": (partial(pair, bos=True), "the token that begins every prompt"),
        "strings": (lambda m, p: (" Mary", " John"), "these are strings"),
        "one": (lambda m, p: pair(m, p)[:1], "two numbers are wanted, the token ids"),
        "always Mary": (lambda m, p: (351, 297), r"right for 0 of 4 .*' Mary'"),
    },
    "source_contributions": {
        "no pattern": (partial(sources, weights=lambda p, h: 1), "all of the head's attention"),
        "turned round": (partial(sources, weights=lambda p, h: p[:, h, :, -1]), "turned round"),
        "all heads": (partial(sources, weights=lambda p, h: p[:, :, -1].mean(1)), "averaged: use"),
        "z": (partial(sources, values="z"), "hook_z is mixed"),
        "summed": (lambda *a: sources(*a).sum(-1), "tokens are added up"),
        "averaged": (lambda *a: sources(*a).mean(0), "averaged over the prompts"),
        "scale of each": (
            partial(sources, scale=lambda c: c["ln_final.hook_scale"]),
            "that of each source token",
        ),
        "head 0": (partial(sources, out=1), "W_O is that of another head"),
        "not centred": (partial(sources, centre=False), "did you centre"),
        "no scale": (partial(sources, scale=lambda c: 1), "forgot the final norm's scale"),
        "sign": (lambda *a: -sources(*a), "every sign is wrong"),
        "no pattern, summed": (
            lambda *a: sources(*a, weights=lambda p, h: 1).sum(-1),
            ("all of the head's attention", "tokens are added up"),
        ),
    },
    "top_heads": {
        "flat indices": (
            lambda p, k: (
                ranked(p, k, flat=True),
                ranked(p, k, key=lambda v: -v, flat=True),
            ),
            "these are flat indices",
        ),
        "positive only": (lambda p, k: ranked(p, k), "two lists are wanted"),
        "next positive": (
            lambda p, k: (ranked(p, k), ranked(p, 2 * k)[k:]),
            "next positive heads",
        ),
        "head layer": (
            lambda p, k: tuple([head[::-1] for head in heads] for heads in both(p, k)),
            r"these are \(head, layer\)",
        ),
        "swapped": (lambda p, k: both(p, k)[::-1], "positive and negative are swapped"),
        "magnitude": (
            lambda p, k: (ranked(p, k, key=abs), both(p, k)[1]),
            "first list is by magnitude",
        ),
        "negative by magnitude": (
            lambda p, k: (both(p, k)[0], ranked(p, k, key=abs)),
            "second list is by magnitude",
        ),
        "weakest first": (
            lambda p, k: tuple(heads[::-1] for heads in both(p, k)),
            "strongest come first",
        ),
        "too few": (lambda p, k: tuple(heads[:1] for heads in both(p, k)), "of each sign"),
        "divided by the layers": (
            lambda p, k: tuple(
                [divmod(layer * p.shape[1] + head, p.shape[0]) for layer, head in heads]
                for heads in both(p, k)
            ),
            "divided the flat indices by the number of layers",
        ),
        "swapped twice": (
            lambda p, k: tuple([head[::-1] for head in heads] for heads in both(p, k)[::-1]),
            (r"these are \(head, layer\)", "positive and negative are swapped"),
        ),
        "one number": (lambda p, k: ([1] * k, [2] * k), "wanted as two numbers"),
        "names": (lambda p, k: (["L0H1"] * k, ["L1H0"] * k), "these are text"),
    },
    "suppressing_head": {
        "no gamma": (
            lambda m, c, t: head_at(solutions.per_head_logit_diff(m, c, m.W_U[:, t].T).argmin()),
            "you forgot γ, or to centre",
        ),
        "highest": (
            lambda m, c, t: head_at(rows_for(m, c, t).argmax()),
            "raises the tokens' logit most",
        ),
        "lowest difference": (by_difference(False), "lowest row of the logit difference"),
        "flat": (lambda m, c, t: rows_for(m, c, t).argmin(), "a flat index"),
        "head layer": (
            lambda m, c, t: head_at(rows_for(m, c, t).argmin())[::-1],
            r"this is \(head, layer\)",
        ),
        "another": (lambda m, c, t: (2, 1), r"L2H1 writes .* another head lowers it more"),
    },
    "read_flow": {
        "one too high": (
            lambda f: (int(f[0].argmax()), int((f[:, -1] > f.sum(1) / 2).int().argmax())),
            "one too high",
        ),
        "layer token": (lambda f: solutions.read_flow(f)[::-1], r"these are \(layer, token\)"),
        "magnitude": (
            lambda f: (int(f[0].abs().argmax()), solutions.read_flow(f)[1]),
            "largest against the answer",
        ),
        "at the end": (
            lambda f: (int(f[-1].argmax()), solutions.read_flow(f)[1]),
            "all of it is at the last token",
        ),
        "last layer": (lambda f: (int(f[0].argmax()), len(f) - 2), "does not have to be"),
        "largest": (
            lambda f: (int(f[0].argmax()), f.argmax(1).tolist().index(f.shape[1] - 1) - 1),
            "less than half",
        ),
        "half of the end": (
            lambda f: (
                int(f[0].argmax()),
                (f[:, -1] > f[-1, -1] / 2).tolist().index(True) - 1,
            ),
            "less than half",
        ),
        "one": (lambda f: 3, "two numbers are wanted"),
        "another": (lambda f: (0, 0), "one of them is off"),
    },
    "logit_diff_lost": {
        "sign": (partial(lost, sign=-1), "the sign"),
        "what is left": (partial(lost, before=False), "the difference that is left"),
        "row": (row, "its direct effect"),
        "everywhere": (partial(lost, at=slice(None)), "silent at every position"),
        "position 0": (partial(lost, at=0), "silences position 0"),
        "whole layer": (partial(lost, which=slice(None)), "the whole layer is silent"),
        "summed": (partial(lost, over="sum"), "the sum over the prompts"),
        "gives nothing": (partial(lost, give=False), "nothing changed"),
        "left on": (partial(lost, leave=True), "your hook is still on the model"),
        "of the answer": (partial(lost, foil=0), "the answer's logit alone"),
        "everywhere, sign": (
            partial(lost, at=slice(None), sign=-1),
            ("the sign", "silent at every position"),
        ),
        "another": (lambda *a: 1.25, "not in a way known"),
        "no number": (lambda *a: None, "one number is wanted"),
    },
}

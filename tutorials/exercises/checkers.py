"""Checks of the exercises that say in words what is wrong.

    check(logit_diff_directions)      # prints what it found, in one sentence

A check computes the right answer in float64, from the activations in the cache and the definition
of LayerNorm, and never with anything of the learner's. It also computes what each classic mistake
would give: an answer that is wrong in a known way is told which way. `CHECKS[name](function,
lesson)` raises `Mistake` with the sentence.
"""

from collections.abc import Callable
from functools import cache as once
from typing import Any

import torch
from choices import check_adds_up, check_top_heads
from comparing import Mistake, compare, same
from lesson import Lesson, load_lesson
from reference import (
    accumulated,
    answers_at,
    components,
    gamma_directions,
    heads,
    ledger,
    project,
    scale_at,
    split,
    unembed_directions,
)
from torch import Tensor


def check(function: Callable[..., Any]) -> bool:
    """Print what the check of the exercise `function` finds; True where it is solved."""
    name = function.__name__
    try:
        CHECKS[name](function, _lesson())
    except NotImplementedError:
        print(f"{name}: not done yet.")
    except Mistake as mistake:
        print(f"{name}: {mistake}")
    else:
        print(f"{name}: correct.")
        return True
    return False


_lesson = once(load_lesson)


def check_logit_diff_directions(function: Callable[..., Any], lesson: Lesson) -> None:
    """γ ⊙ (W_U[:, correct] − W_U[:, incorrect])."""
    expected, unembed = gamma_directions(lesson), unembed_directions(lesson)
    gamma = lesson.model.ln_final.w.detach().double()
    correct = gamma * answers_at(lesson, lesson.correct)
    given = function(lesson.model, lesson.correct, lesson.incorrect)
    if isinstance(given, Tensor) and given.shape == expected.shape:
        if same(given.detach().double(), expected - expected.mean(-1, keepdim=True)):
            return  # centring the direction or what it is projected on is the same
    mistakes = [
        ("this is incorrect less correct: you swapped them, so every sign is wrong.", -expected),
        ("you forgot γ: this model is not folded, so model.ln_final.w still multiplies.", unembed),
        ("γ is in twice: multiply by model.ln_final.w once.", gamma * expected),
        ("γ multiplies, and you divided by it.", unembed / gamma),
        ("this is the correct answer's direction alone: subtract the incorrect one's.", correct),
        (
            "these directions have length 1: do not normalise them, or the dot product is not in"
            " logits.",
            expected / expected.norm(dim=-1, keepdim=True),
        ),
        ("the axes are [d_model, batch]: W_U[:, tokens] has the prompts last.", expected.T),
    ]
    compare(given, expected, "batch d_model", mistakes)


def _reading_mistakes(
    lesson: Lesson, stack: Tensor, directions: Tensor, pos: int = -1
) -> list[tuple[str, Tensor]]:
    """What goes wrong between a stack `[*row, batch, d_model]` and its mean logit differences."""
    right = project(lesson, stack, directions, pos)
    batch = right.shape[-1]
    own = ((stack - stack.mean(-1, keepdim=True)).square().mean(-1) + lesson.model.cfg.eps).sqrt()
    mistakes = [
        (
            "you summed over the prompts: your rows sum to {given} where {expected} is right;"
            f" divide by their number, {batch}.",
            right.sum(-1),
        ),
        (
            "there is a number for each prompt, [*row, batch]: average over the batch as well.",
            right,
        ),
        (
            "you averaged over the rows too: every row keeps a number of its own, and only the"
            " batch is averaged.",
            right.mean(),
        ),
        (
            "every sign is wrong: did you swap correct and incorrect, or subtract the wrong way"
            " round?",
            -right.mean(-1),
        ),
        (
            "your rows sum to {given} where {expected} is right: you forgot the final norm's"
            ' scale, cache["ln_final.hook_scale"].',
            project(lesson, stack, directions, scale=torch.ones(batch)).mean(-1),
        ),
        (
            "each row was divided by a scale recomputed from that row alone. Freeze the scale: one"
            ' number per prompt, cache["ln_final.hook_scale"], from the whole stream.',
            project(lesson, stack, directions, scale=own).mean(-1),
        ),
        (
            "your rows sum to {given} where {expected} is right: did you centre (subtract the mean"
            " over d_model) before scaling?",
            project(lesson, stack, directions, pos, centre=False).mean(-1),
        ),
    ]
    for other in range(lesson.tokens.shape[1]):
        if other != pos % lesson.tokens.shape[1]:
            mistakes.append(
                (
                    f"the scale is that of position {other}; these are vectors of position {pos},"
                    " and each position has a scale of its own.",
                    project(lesson, stack, directions, other).mean(-1),
                )
            )
    return mistakes


def check_residual_stack_to_logit_diff(function: Callable[..., Any], lesson: Lesson) -> None:
    """Frozen norm, dot product, mean over the prompts; any leading axes, any position."""
    directions = gamma_directions(lesson)
    for pos in (-1, 3):
        rows = components(lesson, pos)
        for stack, axes in ((rows, "row"), (rows[:6].unflatten(0, (2, 3)), "two axes of rows")):
            given = function(stack.float(), lesson.cache, directions.float(), pos)
            compare(
                given,
                project(lesson, stack, directions, pos).mean(-1),
                axes,
                _reading_mistakes(lesson, stack, directions, pos),
            )


def check_logit_lens(function: Callable[..., Any], lesson: Lesson) -> None:
    """The model's own norm and unembedding at every point of the stream, statistics fresh."""
    model, eps, points = lesson.model, lesson.model.cfg.eps, accumulated(lesson)
    gamma, beta = model.ln_final.w.detach().double(), model.ln_final.b.detach().double()
    unembed = unembed_directions(lesson)
    b_U = model.b_U.detach().double()
    bias = b_U[lesson.correct] - b_U[lesson.incorrect]

    def lens(points: Tensor, gamma: Tensor = gamma, beta: Tensor = beta) -> Tensor:
        norm = torch.nn.functional.layer_norm(points, gamma.shape, gamma, beta, eps)
        return (norm * unembed).sum(-1) + bias

    right = lens(points)
    frozen = project(lesson, points, gamma * unembed) + unembed @ beta + bias
    mistakes = [
        (
            "the scale is frozen at the last layer's value. The lens asks what the model would say"
            " if it stopped here, so the norm is recomputed at every point.",
            frozen.mean(-1),
        ),
        ("final_post is missing: the last point is the model's own answer.", right[:-1].mean(-1)),
        ("the points between attention and MLP are missing: incl_mid=True.", right[::2].mean(-1)),
        (
            "this reads position 0; the answer is predicted at the last position, -1.",
            lens(accumulated(lesson, 0)).mean(-1),
        ),
        ("you forgot b_U.", (right - bias).mean(-1)),
        (
            "you forgot β, the final norm's bias model.ln_final.b.",
            lens(points, beta=0 * beta).mean(-1),
        ),
        ("you forgot both β and b_U.", (lens(points, beta=0 * beta) - bias).mean(-1)),
        ("you forgot γ, model.ln_final.w.", lens(points, gamma=0 * gamma + 1).mean(-1)),
        ("you forgot the final norm.", ((points * unembed).sum(-1) + bias).mean(-1)),
        ("you swapped correct and incorrect: every sign is wrong.", -right.mean(-1)),
        ("you summed over the prompts: divide by their number.", right.sum(-1)),
        ("there is a number for each prompt: average over the batch.", right),
        (
            "these are the components one by one; the lens reads the stream accumulated up to"
            " each point.",
            lens(components(lesson)).mean(-1),
        ),
    ]
    given = function(model, lesson.cache, lesson.correct, lesson.incorrect)
    compare(given, right.mean(-1), "point", mistakes)


def check_per_layer_logit_diff(function: Callable[..., Any], lesson: Lesson) -> None:
    """One number for embed, pos_embed and every sublayer."""
    directions, stack = gamma_directions(lesson), components(lesson)
    right = project(lesson, stack, directions).mean(-1)
    first = components(lesson, 0)
    mistakes = [
        (
            "these are the residual streams accumulated so far; decompose_resid has what each"
            " sublayer adds.",
            project(lesson, accumulated(lesson), directions).mean(-1),
        ),
        (
            "this reads position 0; the answer is predicted at the last position, -1.",
            project(lesson, first, directions, 0).mean(-1),
        ),
        (
            "these are the vectors of position 0, read with the scale of the last one: pos_slice=-1"
            " in decompose_resid as well.",
            project(lesson, first, directions).mean(-1),
        ),
        ("embed and pos_embed are missing: they write to the stream too.", right[2:]),
        *_reading_mistakes(lesson, stack, directions),
    ]
    compare(function(lesson.cache, directions.float()), right, "component", mistakes)


def check_per_head_logit_diff(function: Callable[..., Any], lesson: Lesson) -> None:
    """One number for every head, `[layer, head]`."""
    directions, stack = gamma_directions(lesson), heads(lesson)
    right = project(lesson, stack, directions).mean(-1)
    first, n_heads = heads(lesson, 0), right.shape[1]
    b_O = torch.stack([block.attn.b_O.detach().double() for block in lesson.model.blocks])
    mistakes = [
        (
            "the heads are in the wrong places: the stack runs through all heads of layer 0 first,"
            ' so it is "(layer head)", and not "(head layer)".',
            right.flatten().unflatten(0, (n_heads, -1)).T,
        ),
        ("the axes are [head, layer]: layers come first.", right.T),
        ("the heads are in one row: rearrange them to [layer, head].", right.flatten()),
        (
            "this reads position 0; the answer is predicted at the last position, -1.",
            project(lesson, first, directions, 0).mean(-1),
        ),
        (
            "these are the vectors of position 0, read with the scale of the last one: pos_slice=-1"
            " in stack_head_results as well.",
            project(lesson, first, directions).mean(-1),
        ),
        (
            "every head also has its layer's output bias b_O, which belongs to no head.",
            project(lesson, stack + b_O[:, None, None], directions).mean(-1),
        ),
        *_reading_mistakes(lesson, stack, directions),
    ]
    given = function(lesson.model, lesson.cache, directions.float())
    compare(given, right, "layer head", mistakes)


def check_layer_norm_split(function: Callable[..., Any], lesson: Lesson) -> None:
    """Rows of the final norm's output, and β as the last one."""
    for pos in (-1, 3):
        stack = components(lesson, pos)
        right = split(lesson, stack, scale_at(lesson, pos))
        gamma, beta = (
            p.detach().double() for p in (lesson.model.ln_final.w, lesson.model.ln_final.b)
        )
        rows, last = right[:-1], right[-1:]
        scaled = stack / scale_at(lesson, pos)[:, None] * gamma
        own = (stack - stack.mean(-1, keepdim=True)).square().mean(-1) + lesson.model.cfg.eps
        late = scaled - scaled.mean(-1, keepdim=True)
        mistakes = [
            (
                "you forgot β: without it the rows sum to {given}, and the norm's output to"
                " {expected} (all entries added).",
                rows,
            ),
            ("β is in every row: it is one row of its own, the last.", rows + beta),
            (
                "β is not divided by the scale: the norm adds it afterwards.",
                torch.cat([rows, last / scale_at(lesson, pos)[:, None]]),
            ),
            ("the last row is β alone, and γ multiplies yours.", torch.cat([rows, last * gamma])),
            ("you forgot γ, model.ln_final.w.", torch.cat([rows / gamma, last])),
            (
                "you forgot the norm's scale.",
                torch.cat([rows * scale_at(lesson, pos)[:, None], last]),
            ),
            (
                "you did not centre: subtract each row's mean over d_model.",
                torch.cat([scaled, last]),
            ),
            (
                "you centred after multiplying by γ: LayerNorm centres first.",
                torch.cat([late, last]),
            ),
            (
                "the norm is recomputed for each row, and such rows do not add up: freeze the scale"
                " of the whole stream.",
                torch.cat([(rows * (scale_at(lesson, pos) / own.sqrt())[..., None]), last]),
            ),
        ]
        for other in range(lesson.tokens.shape[1]):
            if other != pos % lesson.tokens.shape[1]:
                sentence = f"the scale is that of position {other}; this is position {pos}."
                mistakes.append((sentence, split(lesson, stack, scale_at(lesson, other))))
        given = function(stack.float(), lesson.model, lesson.cache, pos)
        compare(given, right, "row + 1, batch, d_model", mistakes)


def check_all_rows(function: Callable[..., Any], lesson: Lesson) -> None:
    """All components, β · u and b_U: they sum to the logit difference that the model returned."""
    right = ledger(lesson)
    rows, beta, b_U = right[:-2], right[-2:-1], right[-1:]
    sums = "your rows sum to {given}, the logit difference is {expected}: "
    unembed = unembed_directions(lesson)
    scaled_beta = unembed @ lesson.model.ln_final.b.detach().double() / scale_at(lesson, -1)
    uncentred = project(lesson, components(lesson), gamma_directions(lesson), centre=False)
    unscaled = project(lesson, components(lesson), gamma_directions(lesson), scale=torch.ones(1))
    without_gamma = project(lesson, components(lesson), unembed)
    other = components(lesson, 0)
    mistakes = [
        (sums + "did you forget β and b_U?", rows.mean(-1)),
        (sums + "did you forget b_U?", torch.cat([rows, beta]).mean(-1)),
        (sums + "did you forget β?", torch.cat([rows, b_U]).mean(-1)),
        (sums + "did you swap correct and incorrect?", -right.mean(-1)),
        (sums + "did you sum over the prompts instead of averaging?", right.sum(-1)),
        ("there is a number for each prompt: average over the batch.", right),
        (
            sums + "β is not divided by the scale.",
            torch.cat([rows, scaled_beta[None], b_U]).mean(-1),
        ),
        (sums + "did you centre before scaling?", torch.cat([uncentred, beta, b_U]).mean(-1)),
        (
            sums + "did you forget the final norm's scale?",
            torch.cat([unscaled, beta, b_U]).mean(-1),
        ),
        (sums + "did you forget γ?", torch.cat([without_gamma, beta, b_U]).mean(-1)),
        (
            sums + "did you read position 0 instead of -1?",
            torch.cat([project(lesson, other, gamma_directions(lesson), 0), beta, b_U]).mean(-1),
        ),
    ]
    given = function(lesson.model, lesson.cache, lesson.correct, lesson.incorrect)
    compare(given, right.mean(-1), "component + 2", mistakes)


CHECKS: dict[str, Callable[[Callable[..., Any], Lesson], None]] = {
    "logit_diff_directions": check_logit_diff_directions,
    "residual_stack_to_logit_diff": check_residual_stack_to_logit_diff,
    "logit_lens": check_logit_lens,
    "per_layer_logit_diff": check_per_layer_logit_diff,
    "per_head_logit_diff": check_per_head_logit_diff,
    "top_heads": check_top_heads,
    "layer_norm_split": check_layer_norm_split,
    "all_rows": check_all_rows,
    "adds_up": check_adds_up,
}

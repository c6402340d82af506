"""Checks of the exercises that read vectors along a direction: stacks, layers, heads."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tl_dla.exercises.comparing import Slip, compare, same
from tl_dla.exercises.lesson import Lesson
from tl_dla.exercises.reference import (
    accumulated,
    answers_at,
    components,
    gamma_beta,
    gamma_directions,
    heads,
    unembed_directions,
)
from tl_dla.exercises.slips import WRONG_PLACE, Function, read, reading_slips


def check_logit_diff_directions(function: Function, lesson: Lesson) -> None:
    """γ ⊙ (W_U[:, correct] − W_U[:, incorrect])."""
    slips = [
        Slip("this is incorrect less correct: you swapped them, so every sign is wrong.", sign=-1),
        Slip(
            "you forgot γ: this model is not folded, so model.ln_final.w still multiplies.", power=0
        ),
        Slip("γ is in twice: multiply by model.ln_final.w once.", power=2),
        Slip("γ multiplies, and you divided by it.", power=-1),
        Slip(
            "this is the correct answer's direction alone: subtract the incorrect one's.",
            foil=False,
        ),
        Slip(
            "these directions have length 1: do not normalise them, or the dot product is not in"
            " logits.",
            unit=True,
        ),
        Slip("the axes are [d_model, batch]: W_U[:, tokens] has the prompts last.", turned=True),
    ]
    given = function(lesson.model, lesson.correct, lesson.incorrect)
    if isinstance(given, Tensor):
        right = _directions(lesson)
        if same(given.detach().double(), right - right.mean(-1, keepdim=True)):
            return  # centring the direction or what it is projected on is the same
    compare(given, partial(_directions, lesson), slips, "batch d_model")


def _directions(lesson: Lesson, /, **wrong: Any) -> Tensor:
    u = unembed_directions(lesson)
    if not wrong.get("foil", True):
        u = answers_at(lesson, lesson.correct)
    w = wrong.get("sign", 1) * gamma_beta(lesson)[0] ** wrong.get("power", 1) * u
    w = w / w.norm(dim=-1, keepdim=True) if wrong.get("unit") else w
    return w.T if wrong.get("turned") else w


def check_residual_stack_to_logit_diff(function: Function, lesson: Lesson) -> None:
    """Frozen norm, dot product, mean over the prompts; any leading axes, any position."""
    directions = gamma_directions(lesson)
    for pos in (-1, 3):
        rows = components(lesson, pos)
        for stack, axes in ((rows, "row"), (rows[:6].unflatten(0, (2, 3)), "two axes of rows")):
            given = function(stack.float(), lesson.cache, directions.float(), pos)
            formula = partial(read, lesson, stack, directions, pos)
            compare(given, formula, reading_slips(lesson, pos), axes, total="what is right")


def check_per_layer_logit_diff(function: Function, lesson: Lesson) -> None:
    """One number for embed, pos_embed and every sublayer."""
    slips = [
        Slip(
            "these are the residual streams accumulated so far; decompose_resid has what each"
            " sublayer adds.",
            so_far=True,
        ),
        Slip(WRONG_PLACE, at=0, scale=0),
        Slip(
            "these are the vectors of position 0, read with the scale of the last one: pos_slice=-1"
            " in decompose_resid as well.",
            at=0,
        ),
        Slip("embed and pos_embed are missing: they write to the stream too.", start=2),
        *reading_slips(lesson),
    ]
    given = function(lesson.cache, gamma_directions(lesson).float())
    compare(given, partial(_layers, lesson), slips, "component", total="what is right")


def _layers(lesson: Lesson, /, **wrong: Any) -> Tensor:
    stack = (accumulated if wrong.get("so_far") else components)(lesson, wrong.get("at", -1))
    return read(lesson, stack[wrong.get("start", 0) :], gamma_directions(lesson), -1, **wrong)


def check_per_head_logit_diff(function: Function, lesson: Lesson) -> None:
    """One number for every head, `[layer, head]`."""
    slips = [
        Slip(
            "the heads are in the wrong places: the stack runs through all heads of layer 0 first,"
            ' so it is "(layer head)", and not "(head layer)".',
            order="wrong places",
        ),
        Slip("the heads are in one row: rearrange them to [layer, head].", order="flat"),
        Slip(WRONG_PLACE, at=0, scale=0),
        Slip(
            "these are the vectors of position 0, read with the scale of the last one: pos_slice=-1"
            " in stack_head_results as well.",
            at=0,
        ),
        Slip(
            "every head also has its layer's output bias b_O, which belongs to no head.", bias=True
        ),
        *reading_slips(lesson),
    ]
    given = function(lesson.model, lesson.cache, gamma_directions(lesson).float())
    compare(given, partial(_heads, lesson), slips, "layer head", total="what is right")


def _heads(lesson: Lesson, /, **wrong: Any) -> Tensor:
    blocks, n_layers = lesson.model.blocks, lesson.model.cfg.n_layers
    stack = heads(lesson, wrong.get("at", -1))
    if wrong.get("bias"):
        stack = stack + torch.stack([b.attn.b_O.detach().double() for b in blocks])[:, None, None]
    if order := wrong.get("order"):
        stack = stack.flatten(0, 1)
    if order == "wrong places":
        stack = stack.unflatten(0, (-1, n_layers)).transpose(0, 1)
    return read(lesson, stack, gamma_directions(lesson), -1, **wrong)

"""Checks of the exercises on the final norm: the lens, the norm row by row, rows that add up."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tl_dla.exercises.comparing import Slip, compare
from tl_dla.exercises.lesson import Lesson
from tl_dla.exercises.reference import (
    accumulated,
    bias_diff,
    components,
    divisor,
    gamma_beta,
    reduced,
    scale_at,
    unembed_directions,
)
from tl_dla.exercises.slips import (
    CENTRE,
    NO_SCALE,
    OVER,
    SQUARED,
    WRONG_PLACE,
    Function,
    read,
    scale_slips,
)


def check_logit_lens(function: Function, lesson: Lesson) -> None:
    """The model's own norm and unembedding at every point of the stream, statistics fresh."""
    slips = [
        Slip(
            "the scale is frozen at the last layer's value. The lens asks what the model would say"
            " if it stopped here, so the norm is recomputed at every point.",
            scale="frozen",
        ),
        Slip("final_post is missing: the last point is the model's own answer.", points="no end"),
        Slip("the points between attention and MLP are missing: incl_mid=True.", points="no mid"),
        Slip(WRONG_PLACE, pos=0),
        Slip("you forgot b_U.", b_U=0),
        Slip("you subtracted b_U: the unembedding adds it.", b_U=-1),
        Slip("you forgot β, the final norm's bias model.ln_final.b.", beta=0),
        Slip("you forgot both β and b_U.", beta=0, b_U=0),
        Slip("you forgot γ, model.ln_final.w.", power=0),
        Slip("γ is in twice: model.ln_final has it already.", power=2),
        Slip("you forgot the final norm.", norm=False),
        NO_SCALE,
        SQUARED,
        Slip("you divided by the stream's length: the scale is its deviation.", scale="own norm"),
        CENTRE,
        Slip("you swapped correct and incorrect: every sign is wrong.", sign=-1),
        *OVER[:2],
        Slip(
            "these are the components one by one; the lens reads the stream accumulated up to each"
            " point.",
            points="components",
        ),
    ]
    given = function(lesson.model, lesson.cache, lesson.correct, lesson.incorrect)
    compare(given, partial(_lens, lesson), slips, "point")


def _lens(lesson: Lesson, /, **wrong: Any) -> Tensor:
    points, pos, (gamma, bias) = wrong.get("points"), wrong.get("pos", -1), gamma_beta(lesson)
    x = components(lesson, pos) if points == "components" else accumulated(lesson, pos)
    if points in ("no end", "no mid"):
        x = x[:-1] if points == "no end" else x[::2]
    if wrong.get("norm", True):
        centred = x - x.mean(-1, keepdim=True) if wrong.get("centre", True) else x
        scale = divisor(lesson, x, pos, wrong.get("scale", "own"))
        x = centred / scale * gamma ** wrong.get("power", 1) + wrong.get("beta", 1) * bias
    each = (x * unembed_directions(lesson)).sum(-1) + wrong.get("b_U", 1) * bias_diff(lesson)
    return reduced(wrong.get("sign", 1) * each, wrong.get("over", "mean"))


def check_layer_norm_split(function: Function, lesson: Lesson) -> None:
    """Rows of the final norm's output, and β as the last one."""
    for pos in (-1, 3):
        slips = [
            Slip("you forgot β, which is a row of its own, the last.", beta="none"),
            Slip("β is in every row: it is one row of its own, the last.", beta="every"),
            Slip("β is not divided by the scale: the norm adds it afterwards.", beta="scaled"),
            Slip("the last row is β alone, and γ multiplies yours.", beta="times γ"),
            Slip("β is the first row: it comes last.", beta="first"),
            Slip("you forgot γ, model.ln_final.w.", power=0),
            Slip("γ is in twice: multiply by model.ln_final.w once.", power=2),
            Slip("γ multiplies, and you divided by it.", power=-1),
            Slip("you did not centre: subtract each row's mean over d_model.", centre="never"),
            Slip("you centred after multiplying by γ: LayerNorm centres first.", centre="late"),
            *scale_slips(lesson, pos),
        ]
        given = function(components(lesson, pos).float(), lesson.model, lesson.cache, pos)
        compare(given, partial(layer_norm_split, lesson, pos), slips, "row + 1, batch, d_model")


def layer_norm_split(lesson: Lesson, pos: int, /, **wrong: Any) -> Tensor:
    """What each component and then β is of the final norm's output."""
    (gamma, bias), stack = gamma_beta(lesson), components(lesson, pos)
    centre, beta = wrong.get("centre"), wrong.get("beta")
    x = stack if centre else stack - stack.mean(-1, keepdim=True)
    x = x / divisor(lesson, stack, pos, wrong.get("scale", "frozen"))
    x = x * gamma ** wrong.get("power", 1)
    x = x - x.mean(-1, keepdim=True) if centre == "late" else x
    if beta in ("none", "every"):
        return x if beta == "none" else x + bias
    last = bias.expand_as(x[:1])
    last = last / scale_at(lesson, pos)[:, None] if beta == "scaled" else last
    last = last * gamma if beta == "times γ" else last
    return torch.cat([last, x] if beta == "first" else [x, last])


def check_all_rows(function: Function, lesson: Lesson) -> None:
    """All components, β · u and b_U: they sum to the logit difference that the model returned."""
    slips = [
        Slip("did you forget β and b_U?", beta="none", b_U=None),
        Slip("did you forget b_U?", b_U=None),
        Slip("did you forget β?", beta="none"),
        Slip("b_U has the wrong sign: it is that of correct less that of incorrect.", b_U=-1),
        Slip("did you swap correct and incorrect?", sign=-1),
        Slip("did you sum over the prompts instead of averaging?", over="sum"),
        Slip("there is a number for each prompt: average over the batch.", over="none"),
        Slip("β is not divided by the scale.", beta="scaled"),
        Slip("β and b_U are in the wrong order: β's part comes first.", last="turned round"),
        CENTRE,
        Slip("did you forget γ?", power=0),
        Slip("is γ in twice? What `layer_norm_split` returns has it already.", power=2),
        Slip("did you read position 0 instead of -1?", at=0, scale=0),
        *scale_slips(lesson),
    ]
    given = function(lesson.model, lesson.cache, lesson.correct, lesson.incorrect)
    compare(given, partial(all_rows, lesson), slips, "component + 2", total="the logit difference")


def all_rows(lesson: Lesson, /, **wrong: Any) -> Tensor:
    """Every component, β and b_U, in logits."""
    unembed, bias = unembed_directions(lesson), gamma_beta(lesson)[1]
    one_by_one = {"power": 1, **wrong, "over": "none"}
    stack = components(lesson, wrong.get("at", -1))
    rows = list(read(lesson, stack, unembed, -1, **one_by_one))
    sign, beta, b_U = wrong.get("sign", 1), wrong.get("beta"), wrong.get("b_U", 1)
    if beta != "none":
        scale = scale_at(lesson, -1) if beta == "scaled" else 1
        rows.append(sign * (unembed @ bias) / scale)
    if b_U is not None:
        rows.append(sign * b_U * bias_diff(lesson))
    if wrong.get("last"):
        rows[-2:] = rows[-2:][::-1]
    return reduced(torch.stack(rows), wrong.get("over", "mean"))

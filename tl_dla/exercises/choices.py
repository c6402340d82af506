"""Checks of the exercises that answer with a choice: which heads, where, whether rows add up."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tl_dla.exercises.comparing import Mistake, tell, two_numbers
from tl_dla.exercises.lesson import Lesson
from tl_dla.exercises.norm import all_rows
from tl_dla.exercises.reference import gamma_directions, heads, project
from tl_dla.input_attribution import attribute_inputs

Head = tuple[int, ...]  # (layer, head)


def check_top_heads(function: Callable[..., Any], lesson: Lesson) -> None:
    """The k largest and the k smallest, as (layer, head)."""
    own = project(lesson, heads(lesson), gamma_directions(lesson)).mean(-1).float()
    shuffled = torch.randperm(15, generator=torch.Generator().manual_seed(1)) - 6.7
    random = shuffled.reshape(5, 3)  # not square, and both signs among the largest
    for per_head, k in ((random, 4), (own, 3)):
        where = [
            tuple(map(int, index))
            for index in torch.cartesian_prod(*map(torch.arange, per_head.shape))
        ]
        order = sorted(where, key=lambda index: -float(per_head[index]))
        by_size = sorted(where, key=lambda index: -abs(float(per_head[index])))
        _compare_heads(function(per_head, k), order, by_size, k, per_head.shape)


def _compare_heads(
    given: Any, order: list[Head], by_size: list[Head], k: int, shape: tuple[int, ...]
) -> None:
    positive, negative = order[:k], order[::-1][:k]
    n_layers, n_heads = shape
    if not isinstance(given, tuple | list) or len(given) != 2:
        found = len(given) if isinstance(given, tuple | list) else "no"
        raise Mistake(
            f"two lists are wanted, (positive, negative), and you returned {found}: the negative"
            " heads are part of the circuit."
        )
    if any(isinstance(head, str) for heads in given for head in heads):
        raise Mistake("heads are wanted as numbers, (layer, head), and these are text.")
    given = [torch.as_tensor(heads).tolist() for heads in given]
    flat = [[layer * n_heads + head for layer, head in heads] for heads in (positive, negative)]
    if given == flat:
        raise Mistake(
            "these are flat indices, which run through all heads of layer 0 first: divide by the"
            " number of heads in a layer; the quotient is the layer, the rest the head."
        )
    if not all(isinstance(head, list) and len(head) == 2 for heads in given for head in heads):
        raise Mistake("every head is wanted as two numbers, (layer, head).")
    given = [[tuple(head) for head in heads] for heads in given]
    if given == [positive, negative]:
        return
    if [len(heads) for heads in given] != [k, k]:
        raise Mistake(f"k = {k} heads of each sign are wanted, not {[len(h) for h in given]}.")
    if [sorted(heads) for heads in given] == [sorted(positive), sorted(negative)]:
        raise Mistake("these are the right heads in another order: the strongest come first.")
    if given[0] == by_size[:k] and given[0] != positive:
        raise Mistake("the first list is by magnitude: negative heads belong to the second.")
    if given[0] == positive and sorted(given[1]) == sorted(order[k : 2 * k]):
        raise Mistake("the second list has the next positive heads, not the most negative ones.")
    turned = [[head[::-1] for head in heads] for heads in (positive, negative)]
    known = [
        (turned, "these are (head, layer): the layer comes first."),
        ([negative, positive], "positive and negative are swapped."),
        (turned[::-1], "these are (head, layer), and positive and negative are swapped."),
        (
            [positive, by_size[:k]],
            "the second list is by magnitude: positive heads belong to the first.",
        ),
        (
            [[divmod(index, n_layers) for index in heads] for heads in flat],
            "the divisor is wrong: you divided the flat indices by the number of layers. Which axis"
            " is the one that runs fastest?",
        ),
    ]
    right = [len({*own} & {*heads}) for own, heads in zip(given, (positive, negative), strict=True)]
    tell(
        given,
        known,
        f"some of these are other heads: {right[0]} of the {k} positive and {right[1]} of the {k}"
        " negative ones are right.",
    )


# Read at points 0 to 5: the answer waits at token 2, beside a larger entry against it at token 1,
# and layer 2 carries it to the last token. There, at point 2, the last token holds more than any
# other, and more than half of what all hold at the end, but not yet half of what all hold.
WAITING = [[0.2, -9.5, 9.0, 5.0, 0.3], [0.1, -8.0, 8.0, 4.0, 0.5], [0.4, 0.4, 2.5, 0.4, 3.0]]
ARRIVED = [[0.0, 0.0, 0.5, 0.5, 4.0], [0.0, 0.0, 0.0, 0.2, 5.0], [0.0, 0.0, 0.0, 0.0, 5.0]]


def check_read_flow(function: Callable[..., Any], lesson: Lesson) -> None:
    """The token where the answer waits at first, and the layer that carries it to the last one."""
    own = attribute_inputs(
        lesson.model, lesson.tokens, lesson.correct, lesson.incorrect, progress=False
    ).flow
    for flow in (torch.tensor(WAITING + ARRIVED), *own.unbind(1)):
        token, layer = int(flow[0].argmax()), _first(flow[:, -1] > flow.sum(1) / 2) - 1
        given = two_numbers(function(flow), "(token, layer)")
        if given == (token, layer):
            continue
        known = [
            (
                (token, layer + 1),
                "the layer is one too high: point l is what is held *before* layer l, so what is"
                " new there was carried by the layer before.",
            ),
            ((layer, token), "these are (layer, token): the token comes first."),
            (
                (int(flow[0].abs().argmax()), layer),
                "this token's entry is the largest against the answer: the one that holds the"
                " answer is positive.",
            ),
            (
                (flow.shape[1] - 1, layer),
                "at the end all of it is at the last token: the token is asked for where it stands"
                " at the embeddings, at point 0.",
            ),
            (
                (token, _first(flow.argmax(1) == flow.shape[1] - 1) - 1),
                "there the last token holds less than half: it has to hold more than half of what"
                " all tokens hold at that same point.",
            ),
            (
                (token, len(flow) - 2),
                "the last layer does not have to be the one: find the first point at which the last"
                " token holds more than half.",
            ),
        ]
        tell(given, known, f"{given} is not where this flow has it: one of them is off.")


def _first(true: Tensor) -> int:
    return true.tolist().index(True)


def check_adds_up(function: Callable[..., Any], lesson: Lesson) -> None:
    """True for what rounding explains, False for anything more."""
    rows = all_rows(lesson).float()
    total = lesson.logit_diff

    def says(rows: Tensor, expected: float) -> bool:
        verdict = function(rows, expected)
        if isinstance(verdict, Tensor):
            verdict = verdict.item()
        if not isinstance(verdict, bool):
            raise Mistake(f"True or False is wanted, not a {type(verdict).__name__}.")
        return verdict

    for expected in (total + 3e-6, total - 3e-6):
        if not says(rows, expected):
            raise Mistake(
                "it rejects rows that miss by 0.000003: float32 rounds, so == and the like never"
                " hold. Allow what rounding explains."
            )
    accepts = [says(rows, total + 1), says(rows, total - 1)]
    if all(accepts):
        raise Mistake(
            f"it accepts {total:.2f} for {total + 1:.2f}, and for {total - 1:.2f}: the tolerance is"
            " so loose that the check cannot fail."
        )
    if any(accepts):
        raise Mistake(
            "it accepts a miss of 1 logit in one direction: take the absolute value of the"
            " difference."
        )
    if says(rows, total + 0.01) or says(rows, total - 0.01):
        raise Mistake(
            "it accepts a miss of 0.01 logits, a thousand times what rounding explains here: the"
            " tolerance is too loose."
        )
    if says(torch.full_like(rows, math.nan), total):
        raise Mistake("it accepts NaN: ask whether the miss is small, not whether it is large.")
    # Near 300000, float32 numbers are 1/32 apart: 299999.99 is not among them.
    if not says(torch.tensor([300_000.0, -299_999.99, 1.0]), 1.01):
        raise Mistake(
            "it rejects 300000 - 299999.99 + 1 = 1.01, which float32 rounds to 1: make the"
            " tolerance grow with the sum of the rows' absolute values."
        )

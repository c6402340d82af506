"""The mistakes that several exercises share, and the reading of rows in which they happen."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tl_dla.exercises.comparing import Slip
from tl_dla.exercises.lesson import Lesson
from tl_dla.exercises.reference import gamma_beta, project, reduced

Function = Callable[..., Any]

WRONG_PLACE = "this reads position 0; the answer is predicted at the last position, -1."
CENTRE = Slip("did you centre (subtract the mean over d_model) before scaling?", centre=False)
NO_SCALE = Slip('you forgot the final norm\'s scale, cache["ln_final.hook_scale"].', scale="none")
SQUARED = Slip(
    "you divided by the scale twice: this is over its square, a variance.", scale="squared"
)
GAMMA_AGAIN = Slip("γ is in twice: `directions` has it already.", power=1)
SIGN = Slip(
    "every sign is wrong: did you swap correct and incorrect, or subtract the wrong way round?",
    sign=-1,
)
OVER = [
    Slip("you summed over the prompts: average over the batch.", over="sum"),
    Slip("there is a number for each prompt, [*row, batch]: average over the batch.", over="none"),
    Slip(
        "you averaged over the rows too: every row keeps a number of its own, and only the batch is"
        " averaged.",
        over="rows",
    ),
]


def scale_slips(lesson: Lesson, pos: int = -1) -> list[Slip]:
    """What is divided by in place of the frozen scale of `pos`."""
    n_pos = lesson.tokens.shape[1]
    others = [other for other in range(n_pos) if other != pos % n_pos]
    return [
        NO_SCALE,
        SQUARED,
        Slip(
            "each row was divided by a scale recomputed from that row alone, and such rows do not"
            ' add up. Freeze the scale: one number per prompt, cache["ln_final.hook_scale"], from'
            " the whole stream.",
            scale="own",
        ),
        Slip(
            "each row was divided by its own length: the divisor is one number per prompt, the"
            " frozen scale of the whole stream.",
            scale="own norm",
        ),
        Slip(
            "you divided by the stream's length ‖x‖: the scale is its standard deviation.",
            scale="norm",
        ),
        Slip(
            "you divided by the unbiased standard deviation: LayerNorm's variance divides by"
            " d_model, and not by d_model − 1 (correction=0).",
            scale="unbiased",
        ),
        *(
            Slip(
                f"the scale is that of position {other}; these are vectors of position {pos}, and"
                " each position has a scale of its own.",
                scale=other,
            )
            for other in others
        ),
    ]


def reading_slips(lesson: Lesson, pos: int = -1) -> list[Slip]:
    """What goes wrong between a stack and its mean logit differences."""
    return [*OVER, SIGN, CENTRE, GAMMA_AGAIN, *scale_slips(lesson, pos)]


def read(
    lesson: Lesson, stack: Tensor, directions: Tensor, pos: int = -1, /, **wrong: Any
) -> Tensor:
    """The mean logit difference of each row of a stack, with what can go wrong as choices."""
    directions = directions * gamma_beta(lesson)[0] ** wrong.get("power", 0)
    rows = project(
        lesson,
        stack,
        directions,
        pos,
        centre=wrong.get("centre", True),
        scale=wrong.get("scale", "frozen"),
    )
    return reduced(wrong.get("sign", 1) * rows, wrong.get("over", "mean"))

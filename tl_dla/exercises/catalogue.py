"""The exercises in their order and what each is worth; the check and the score to call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache as once
from typing import Any

import pandas as pd
import torch

from tl_dla.exercises.choices import check_adds_up, check_read_flow, check_top_heads
from tl_dla.exercises.comparing import Mistake
from tl_dla.exercises.lesson import Lesson, load_lesson
from tl_dla.exercises.norm import check_all_rows, check_layer_norm_split, check_logit_lens
from tl_dla.exercises.reading import (
    check_choose_tokens,
    check_logit_diff_lost,
    check_source_contributions,
    check_suppressing_head,
)
from tl_dla.exercises.rows import (
    check_logit_diff_directions,
    check_per_head_logit_diff,
    check_per_layer_logit_diff,
    check_residual_stack_to_logit_diff,
)


@dataclass(frozen=True)
class Exercise:
    """One exercise: its points are its difficulty, 1 to 3."""

    points: int
    check: Callable[[Callable[..., Any], Lesson], None]

    @property
    def difficulty(self) -> str:
        """One to three stars."""
        return "★" * self.points


EXERCISES = {
    "choose_tokens": Exercise(1, check_choose_tokens),
    "logit_diff_directions": Exercise(1, check_logit_diff_directions),
    "residual_stack_to_logit_diff": Exercise(2, check_residual_stack_to_logit_diff),
    "logit_lens": Exercise(2, check_logit_lens),
    "per_layer_logit_diff": Exercise(1, check_per_layer_logit_diff),
    "per_head_logit_diff": Exercise(2, check_per_head_logit_diff),
    "top_heads": Exercise(1, check_top_heads),
    "source_contributions": Exercise(3, check_source_contributions),
    "suppressing_head": Exercise(2, check_suppressing_head),
    "logit_diff_lost": Exercise(3, check_logit_diff_lost),
    "read_flow": Exercise(2, check_read_flow),
    "layer_norm_split": Exercise(2, check_layer_norm_split),
    "all_rows": Exercise(2, check_all_rows),
    "adds_up": Exercise(2, check_adds_up),
}
POINTS = sum(exercise.points for exercise in EXERCISES.values())


@dataclass(frozen=True)
class Verdict:
    """What the check of one exercise found: the points, and a sentence."""

    name: str
    points: int
    says: str


def judge(name: str, function: Callable[..., Any] | None, lesson: Lesson) -> Verdict:
    """Check one exercise; what goes wrong inside the learner's function is raised."""
    exercise = EXERCISES[name]
    if function is None:
        return Verdict(name, 0, "not there.")
    try:
        with torch.no_grad():
            exercise.check(function, lesson)
    except NotImplementedError:
        return Verdict(name, 0, "not done yet.")
    except Mistake as mistake:
        return Verdict(name, 0, str(mistake))
    return Verdict(name, exercise.points, "correct.")


def check(function: Callable[..., Any]) -> bool:
    """Print what the check of the exercise `function` finds; True where it is solved.

    >>> def top_heads(per_head, k):
    ...     raise NotImplementedError
    >>> check(top_heads)
    top_heads: not done yet.
    False
    """
    name = function.__name__
    if name not in EXERCISES:
        raise KeyError(f"There is no exercise {name!r}; they are {', '.join(EXERCISES)}.")
    verdict = judge(name, function, _lesson())
    print(f"{name}: {verdict.says}")
    return verdict.points > 0


def score(namespace: Mapping[str, Any]) -> pd.DataFrame:
    """The points of every exercise solved in a notebook: `score(globals())`.

    >>> int(score({}).loc["all", "points"])
    0
    """
    verdicts = judge_all(namespace)
    table = pd.DataFrame(
        {
            "difficulty": [EXERCISES[verdict.name].difficulty for verdict in verdicts],
            "points": [verdict.points for verdict in verdicts],
            "of": [EXERCISES[verdict.name].points for verdict in verdicts],
            "check": [verdict.says for verdict in verdicts],
        },
        index=[verdict.name for verdict in verdicts],
    )
    whole = {"points": sum(verdict.points for verdict in verdicts), "of": POINTS}
    return pd.concat([table, pd.DataFrame(whole, index=["all"])]).fillna("")


def judge_all(namespace: Mapping[str, Any]) -> list[Verdict]:
    """Check every exercise whose function is in the namespace; one that stops is worth nothing."""
    verdicts = []
    for name in EXERCISES:
        try:
            verdicts.append(judge(name, namespace.get(name), _lesson()))
        except Exception as error:  # the learner's code may do anything
            says = f"it stops with {type(error).__name__}: {str(error)[:300]}"
            verdicts.append(Verdict(name, 0, says))
    return verdicts


_lesson = once(load_lesson)

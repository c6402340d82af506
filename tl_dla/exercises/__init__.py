"""Exercises whose checks say in words what is wrong; the notebook is in `tutorials/exercises`.

    from tl_dla.exercises import check, load_lesson, score

    check(top_heads)     # one exercise: a sentence, and whether it is solved
    score(globals())     # all of them, with points

They live in the package so that a notebook needs nothing beside it. `python -m tl_dla.exercises
FOLDER` grades a folder of notebooks.
"""

from tl_dla.exercises.catalogue import EXERCISES, check, score
from tl_dla.exercises.lesson import Lesson, load_lesson

__all__ = ["EXERCISES", "Lesson", "check", "load_lesson", "score"]

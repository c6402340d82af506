"""What is right, in float64 from the activations that the model computed.

Nothing of the learner's is used, nor any helper of TransformerLens that an exercise is about. Where
a function has choices, their defaults are right and the others are what learners are known to do.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.exercises.lesson import Lesson

# What a stack of vectors is divided by: a position means the frozen scale of that position.
Scale = Literal["frozen", "none", "squared", "unbiased", "norm", "own", "own norm"] | int
Over = Literal["mean", "sum", "none", "rows"]


def components(lesson: Lesson, pos: int = -1) -> Float[Tensor, "component batch d_model"]:
    """What embed, pos_embed and then the attention and MLP of each layer add to the stream."""
    cache = lesson.cache
    writes = [cache["hook_embed"], cache["hook_pos_embed"]]
    for layer in range(lesson.model.cfg.n_layers):
        writes += [cache[f"blocks.{layer}.hook_{part}_out"] for part in ("attn", "mlp")]
    return torch.stack([write[:, pos].double() for write in writes])


def accumulated(lesson: Lesson, pos: int = -1) -> Float[Tensor, "point batch d_model"]:
    """The stream before each sublayer, and at the end: `0_pre`, `0_mid`, ..., `final_post`."""
    return components(lesson, pos).cumsum(0)[1:]


def heads(lesson: Lesson, pos: int = -1) -> Float[Tensor, "layer head batch d_model"]:
    """What each head adds to the stream: its mixed values times its part of W_O."""
    return torch.stack(
        [
            torch.einsum(
                "bhd,hdm->hbm",
                lesson.cache[f"blocks.{layer}.attn.hook_z"][:, pos].double(),
                block.attn.W_O.detach().double(),
            )
            for layer, block in enumerate(lesson.model.blocks)
        ]
    )


def scale_at(lesson: Lesson, pos: int) -> Float[Tensor, " batch"]:
    """The final norm's scale, from its definition."""
    x = components(lesson, pos).sum(0)
    return (x.var(-1, correction=0) + lesson.model.cfg.eps).sqrt()


def divisor(
    lesson: Lesson, stack: Float[Tensor, "*row batch d_model"], pos: int, scale: Scale = "frozen"
) -> Float[Tensor, "*row_or_one batch_or_one 1"]:
    """The frozen scale of the final norm, or what is divided by in its place."""
    eps, whole = lesson.model.cfg.eps, components(lesson, pos).sum(0)
    if isinstance(scale, int):
        return scale_at(lesson, scale)[:, None]
    if scale == "none":
        return torch.ones(1, 1, dtype=torch.float64)
    if scale == "unbiased":
        return (whole.var(-1, correction=1, keepdim=True) + eps).sqrt()
    if scale == "norm":
        return whole.norm(dim=-1, keepdim=True)
    if scale == "own":
        return (stack.var(-1, correction=0, keepdim=True) + eps).sqrt()
    if scale == "own norm":
        return stack.norm(dim=-1, keepdim=True)
    return scale_at(lesson, pos)[:, None] ** (2 if scale == "squared" else 1)


def gamma_beta(lesson: Lesson) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
    """γ and β of the final norm."""
    norm = lesson.model.ln_final
    return norm.w.detach().double(), norm.b.detach().double()


def bias_diff(lesson: Lesson) -> Float[Tensor, " batch"]:
    """b_U of the correct answer less that of the incorrect one."""
    b_U = lesson.model.b_U.detach().double()
    return b_U[lesson.correct] - b_U[lesson.incorrect]


def answers_at(lesson: Lesson, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_model"]:
    """The column of W_U for each prompt's token."""
    return torch.stack([lesson.model.W_U[:, token].detach().double() for token in tokens.tolist()])


def unembed_directions(lesson: Lesson) -> Float[Tensor, "batch d_model"]:
    """W_U[:, correct] − W_U[:, incorrect]: applies to the output of the final norm."""
    return answers_at(lesson, lesson.correct) - answers_at(lesson, lesson.incorrect)


def gamma_directions(lesson: Lesson) -> Float[Tensor, "batch d_model"]:
    """The same times γ: applies to the centred and scaled stream."""
    return gamma_beta(lesson)[0] * unembed_directions(lesson)


def project(
    lesson: Lesson,
    stack: Float[Tensor, "*row batch d_model"],
    directions: Float[Tensor, "batch d_model"],
    pos: int = -1,
    *,
    centre: bool = True,
    scale: Scale = "frozen",
) -> Float[Tensor, "*row batch"]:
    """The logit difference of each row and prompt, with the norm of `pos` frozen."""
    centred = stack - stack.mean(-1, keepdim=True) if centre else stack
    return (centred / divisor(lesson, stack, pos, scale) * directions).sum(-1)


def reduced(rows: Float[Tensor, "*row batch"], over: Over = "mean") -> Float[Tensor, "..."]:
    """The mean over the prompts, or what is done in its place."""
    if over == "sum":
        return rows.sum(-1)
    if over == "rows":
        return rows.mean()
    return rows if over == "none" else rows.mean(-1)

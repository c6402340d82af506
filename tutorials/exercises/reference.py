"""What is right, in float64 from the activations that the model computed: no helper of
TransformerLens that an exercise is about, and nothing of the learner's."""

import torch
from jaxtyping import Float, Int
from lesson import Lesson
from torch import Tensor


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


def answers_at(lesson: Lesson, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_model"]:
    """The column of W_U for each prompt's token."""
    return torch.stack([lesson.model.W_U[:, token].detach().double() for token in tokens.tolist()])


def unembed_directions(lesson: Lesson) -> Float[Tensor, "batch d_model"]:
    """W_U[:, correct] − W_U[:, incorrect]: applies to the output of the final norm."""
    return answers_at(lesson, lesson.correct) - answers_at(lesson, lesson.incorrect)


def gamma_directions(lesson: Lesson) -> Float[Tensor, "batch d_model"]:
    """The same times γ: applies to the centred and scaled stream."""
    return lesson.model.ln_final.w.detach().double() * unembed_directions(lesson)


def project(
    lesson: Lesson,
    stack: Float[Tensor, "*row batch d_model"],
    directions: Float[Tensor, "batch d_model"],
    pos: int = -1,
    *,
    centre: bool = True,
    scale: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "*row batch"]:
    """The logit difference of each row and prompt, with the scale of `pos` unless one is given."""
    if centre:
        stack = stack - stack.mean(-1, keepdim=True)
    return (stack * directions).sum(-1) / (scale_at(lesson, pos) if scale is None else scale)


def split(
    lesson: Lesson, stack: Float[Tensor, "row batch d_model"], scale: Float[Tensor, " batch"]
) -> Float[Tensor, "row_and_beta batch d_model"]:
    """What each row and then β is of the final norm's output."""
    gamma, beta = (p.detach().double() for p in (lesson.model.ln_final.w, lesson.model.ln_final.b))
    rows = (stack - stack.mean(-1, keepdim=True)) / scale[:, None] * gamma
    return torch.cat([rows, beta.expand_as(rows[:1])])


def ledger(lesson: Lesson) -> Float[Tensor, "row batch"]:
    """Every component, β and b_U, in logits; the columns sum to each prompt's logit difference."""
    b_U = lesson.model.b_U.detach().double()
    rows = split(lesson, components(lesson), scale_at(lesson, -1)) * unembed_directions(lesson)
    return torch.cat([rows.sum(-1), (b_U[lesson.correct] - b_U[lesson.incorrect])[None]])

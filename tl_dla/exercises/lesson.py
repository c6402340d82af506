"""What the exercises work on: the demo model, a few IOI prompts, and one forward pass over them.

The names of a prompt and its answer are not balanced by a second prompt with the names swapped:
balanced prompts hide the biases, which cancel in their mean, and here every term has to show.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla import load_model

PROMPTS = [  # prompt, correct answer, incorrect answer
    ("When Mary and John went to the store, John gave a drink to", " Mary", " John"),
    ("When Tom and Paul went to the park, Tom gave a flower to", " Paul", " Tom"),
    ("When Emma and Kate went to the school, Kate gave a book to", " Emma", " Kate"),
]


@dataclass(frozen=True, eq=False)
class Lesson:
    """A model and one forward pass of it.

    Attributes:
        model: with `W_U` [d_model, d_vocab], `b_U` [d_vocab] and the final LayerNorm's γ, β as
            `ln_final.w`, `ln_final.b` [d_model]. Nothing is folded, nothing is centred.
        tokens: `[batch, pos]`, with the prompts all of one length.
        correct: the correct answers, `[batch]`.
        incorrect: the incorrect answers, `[batch]`.
        logits: what the model returned, `[batch, pos, d_vocab]`.
        cache: everything it computed on the way, an `ActivationCache`.
    """

    model: Any
    tokens: Int[Tensor, "batch pos"]
    correct: Int[Tensor, " batch"]
    incorrect: Int[Tensor, " batch"]
    logits: Float[Tensor, "batch pos d_vocab"]
    cache: Any

    @property
    def logit_diff(self) -> float:
        """Logit of the correct answer less that of the incorrect one, averaged over the prompts."""
        return self.diff_of(self.logits)

    def diff_of(self, logits: Float[Tensor, "batch pos d_vocab"]) -> float:
        """The same of other logits, such as those of a run without a head."""
        last, prompt = logits[:, -1], torch.arange(len(self.tokens))
        return float((last[prompt, self.correct] - last[prompt, self.incorrect]).mean())


@torch.no_grad()
def load_lesson() -> Lesson:
    """The demo model, run once on `PROMPTS`."""
    model = load_model("demo", device="cpu")
    _give_unembedding_a_bias(model)
    _move_mean_of_stream(model)
    prompts, correct, incorrect = zip(*PROMPTS, strict=True)
    tokens = model.to_tokens(list(prompts))
    logits, cache = model.run_with_cache(tokens)
    correct = model.to_tokens(list(correct), prepend_bos=False)[:, 0]
    incorrect = model.to_tokens(list(incorrect), prepend_bos=False)[:, 0]
    return Lesson(model, tokens, correct, incorrect, logits, cache)


def _give_unembedding_a_bias(model: Any) -> None:
    """GPT-2 has no b_U, and nobody notices that they forgot a zero: here it is not zero."""
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(model.cfg.d_vocab, generator=generator)
    head = getattr(model.unembed, "original_component", None)
    if head is None:  # HookedTransformer
        model.unembed.b_U.copy_(bias)
    else:  # TransformerBridge, which reads b_U off the wrapped nn.Linear
        head.bias = torch.nn.Parameter(bias)


def _move_mean_of_stream(model: Any) -> None:
    """Add a constant to the stream.

    Every LayerNorm takes the mean away, so this changes no logit; but who forgets to centre
    the rows now gets others.
    """
    embedding = getattr(model.pos_embed, "original_component", None)
    (model.pos_embed.W_pos if embedding is None else embedding.weight).add_(2.0)

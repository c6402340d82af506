"""What the demo model has learned, measured on prompts that training never showed it.

Shares come from direct logit attribution: what the heads, and what the MLPs, wrote to the
difference between the right answer and a wrong one of the same sort, in logits.
"""

import random
from dataclasses import dataclass
from typing import Any

import einops
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.attribution import direct_logit_attribution
from tl_dla.demo import corpus
from tl_dla.inputs.models import device_of


@dataclass(frozen=True)
class Task:
    """Prompts of one sort, how many the model completes, and what wrote the answers.

    Attributes:
        accuracy: the share of prompts whose likeliest next token is the answer.
        logit_diff: answer minus wrong answer, mean over prompts, in logits.
        heads: what each head wrote of it.
        mlps: what each MLP wrote of it.
    """

    accuracy: float
    logit_diff: float
    heads: Float[Tensor, "layer head"]
    mlps: Float[Tensor, " layer"]


@dataclass(frozen=True)
class Evaluation:
    """The claims about the demo model, as numbers.

    Attributes:
        indirect_objects: the answer is the indirect object, the wrong answer the subject.
        facts: the wrong answer is right for another subject.
        attention_to_answer: of each head, from the last position of an indirect-object prompt to
            the name that is the answer, mean over prompts.
        induction_accuracy: on random tokens that occur for the second time.
        induction_chance: what guessing among the tokens of the prompt would give.
        induction_attention: of each head, from a token's second occurrence to what followed the
            first, mean over tokens.
        name_prior: rank correlation, over names, of `ln_final.b · W_U` with the names' frequency.
    """

    indirect_objects: Task
    facts: Task
    attention_to_answer: Float[Tensor, "layer head"]
    induction_accuracy: float
    induction_chance: float
    induction_attention: Float[Tensor, "layer head"]
    name_prior: float


@torch.no_grad()
def evaluate(model: Any, n_prompts: int = 400, seed: int = 1) -> Evaluation:
    """Measures a model that `load_model` or `load_bridge` loaded."""
    rng = random.Random(seed)
    people: list[corpus.Prompt] = []
    while len(people) < n_prompts:
        people += [draw for draw in [corpus.indirect_object(rng)] if draw.held_out]
    accuracy, chance, attention = _induction(model, rng)
    return Evaluation(
        indirect_objects=_task(model, people),
        facts=_task(model, [fact for fact in corpus.facts() if fact.held_out]),
        attention_to_answer=_attention_to_answer(model, people),
        induction_accuracy=accuracy,
        induction_chance=chance,
        induction_attention=attention,
        name_prior=_name_prior(model),
    )


def _task(model: Any, prompts: list[corpus.Prompt]) -> Task:
    texts, answers = [p.text for p in prompts], _ids(model, [p.answer for p in prompts])
    wrong = _ids(model, [p.wrong for p in prompts])
    result = direct_logit_attribution(model, texts, answers, wrong, unit="head")
    tokens, last = _tokens(model, texts)
    predicted = model(tokens)[torch.arange(len(texts)), last].argmax(-1)
    mlps = [result[f"{layer}_mlp_out"] for layer in range(model.cfg.n_layers)]
    return Task(
        accuracy=(predicted == answers).float().mean().item(),
        logit_diff=result.logit.mean().item(),
        heads=result.heads.mean(-1),
        mlps=torch.stack(mlps).mean(-1),
    )


def _attention_to_answer(model: Any, prompts: list[corpus.Prompt]) -> Float[Tensor, "layer head"]:
    tokens, last = _tokens(model, [p.text for p in prompts])
    within = _ids(model, [p.answer for p in prompts])
    opening = within.new_tensor([model.to_single_token(p.answer) for p in prompts])
    is_answer = (tokens == within[:, None]) | (tokens == opening[:, None])
    pattern = _pattern(model, tokens)[:, torch.arange(len(prompts)), :, last]
    to_answer = einops.einsum(
        pattern, is_answer.float(), "batch layer head key, batch key -> batch layer head"
    )
    return to_answer.mean(0)


def _induction(model: Any, rng: random.Random) -> tuple[float, float, Float[Tensor, "layer head"]]:
    n_words = 12
    tokens = model.to_tokens([corpus.repetition(rng, n_words) for _ in range(200)])
    second = torch.arange(n_words + 1, 2 * n_words)  # where the next token can be known
    accuracy = (model(tokens)[:, second].argmax(-1) == tokens[:, second + 1]).float().mean().item()
    pattern = _pattern(model, tokens)[..., second, second + 1 - n_words]
    return accuracy, 1 / n_words, einops.reduce(pattern, "l b h query -> l h", "mean")


def _name_prior(model: Any) -> float:
    written = model.ln_final.b @ model.W_U[:, _ids(model, corpus.NAMES)]
    weights = written.new_tensor(corpus.NAME_WEIGHTS)
    ranks = [x.argsort().argsort().float() for x in (written, weights)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def _pattern(
    model: Any, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "layer batch head query key"]:
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))
    return torch.stack([cache["pattern", layer] for layer in range(model.cfg.n_layers)])


def _tokens(model: Any, texts: list[str]) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, " batch"]]:
    """Token ids, padded on the right, and each prompt's last position."""
    tokens = model.to_tokens(texts, padding_side="right")
    return tokens, (tokens != model.tokenizer.pad_token_id).sum(-1) - 1


def _ids(model: Any, words: list[str]) -> Int[Tensor, " word"]:
    """The words as they stand within a text, after a space."""
    ids = [model.to_single_token(f" {word}") for word in words]
    return torch.tensor(ids, device=device_of(model))

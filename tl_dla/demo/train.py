"""Trains the bundled demo model and measures it: `python -m tl_dla.demo.train --out folder`.

It is a teaching model, so that which circuits it learns is not left to chance:

- The loss has a second term, which guides where three heads look: two name movers from the last
  position to the indirect object, an induction head to the token after the one seen before. What
  the heads make of what they see, and all else, is learned from text alone. Without guidance models
  of this size solve the task too, but with heads that look at the subject, where the layer below
  has already left the other name.
- At the last position of most indirect-object prompts, the MLPs and the heads beside the name
  movers are muted, so that name movers learn to write the name themselves. Nothing is asked of
  the MLPs, and facts are what they do.
- Positions begin as a Fourier basis, in which "the token before" is a rotation, and the unembedding
  begins as a copy of the embedding, which it then leaves: both help induction to be learned early.
- Last, the names' frequencies are put where GPT-2 keeps such things, in the final norm's β, which
  training alone leaves nearly empty in a model whose every layer can learn them.
"""

import argparse
import math
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import trange
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tl_dla.demo import FOLDER, corpus, load_bridge
from tl_dla.demo.evaluate import Evaluation, evaluate

N_CTX = 64
STEPS = 3500
PRIOR = 0.5
NAME_MOVERS, INDUCTION_HEAD = [(2, 0), (3, 0)], (1, 0)  # (layer, head)
GUIDANCE = 0.3
LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 3e-3, 50, 0.03
MUTED = 0.75
INIT_STD = 0.06  # wider than GPT-2's own 0.02: the model is narrower
IGNORED = -100  # the label that transformers leaves out of the loss


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Every word of the corpus as one token, spelt as GPT-2 spells it, and bytes for all else."""
    words = [word.replace(" ", "Ġ") for word in corpus.vocabulary()]
    tokens = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *words])
    # Without merges, a word is either in the vocabulary as a whole or falls apart into bytes.
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        model_max_length=N_CTX,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """The untrained model."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=N_CTX,
        n_ctx=N_CTX,
        n_embd=128,
        n_layer=4,
        n_head=4,
        tie_word_embeddings=False,
        initializer_range=INIT_STD,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "eager"  # the one that returns attention patterns
    model = GPT2LMHeadModel(config)
    frequency = torch.linspace(math.pi / N_CTX, math.pi, config.n_embd // 2)
    angle = torch.arange(N_CTX)[:, None] * frequency
    with torch.no_grad():
        model.transformer.wpe.weight.copy_(torch.cat([angle.sin(), angle.cos()], dim=1))
        model.transformer.wpe.weight.mul_(math.sqrt(2) * INIT_STD)
        model.lm_head.weight.copy_(model.transformer.wte.weight)
    return model


@torch.no_grad()
def add_name_prior(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Add to β the smallest vector that W_U turns into `PRIOR` × each name's log frequency."""
    names = tokenizer.convert_tokens_to_ids([f"Ġ{name.strip()}" for name in corpus.NAMES])
    prior = torch.tensor(corpus.NAME_WEIGHTS).log()
    prior = PRIOR * (prior - prior.mean())[:, None]
    columns = model.lm_head.weight[names]
    beta = torch.linalg.lstsq(columns, prior, driver="gelsd").solution
    model.transformer.ln_f.bias.add_(beta[:, 0])


class Row(NamedTuple):
    """One row of a batch; `guides` are (layer, head, query, key), each a look that is guided."""

    ids: list[int]
    labels: list[int]
    guides: list[tuple[int, int, int, int]]
    muted: list[int]  # the positions at which only name movers write, and what is below them


def text_row(
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    prompts: Iterator[corpus.Prompt],
    width: int,
) -> Row:
    """Sentences one after the other, cut at `width` tokens."""
    ids, guides, muted = [tokenizer.bos_token_id], [], []
    while len(ids) < width:
        prompt = next(prompts)
        space = " " if len(ids) > 1 else ""
        start, ids = len(ids), ids + _encode(tokenizer, f"{space}{prompt.text} {prompt.answer}.")
        answer, query = ids[-2], len(ids) - 3
        spellings = {answer, tokenizer.convert_tokens_to_ids(prompt.answer)}
        keys = [key for key in range(start, query) if ids[key] in spellings]
        if keys and query < width:
            guides += [(*head, query, keys[0]) for head in NAME_MOVERS]
            muted += [query] if rng.random() < MUTED else []
    return Row(ids[:width], ids[:width], guides, muted)


def repetition_row(tokenizer: PreTrainedTokenizerFast, rng: random.Random, width: int) -> Row:
    """A repetition; only its second half can be learned."""
    n_words = rng.randint(4, 15)
    ids = [tokenizer.bos_token_id, *_encode(tokenizer, corpus.repetition(rng, n_words))]
    labels = [IGNORED] * (1 + n_words) + ids[1 + n_words :]
    padding = width - len(ids)
    return Row(
        ids + [tokenizer.pad_token_id] * padding,
        labels + [IGNORED] * padding,
        guides=[
            (*INDUCTION_HEAD, query, query + 1 - n_words)
            for query in range(1 + n_words, 2 * n_words)
        ],
        muted=[],
    )


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


class Batch(NamedTuple):
    """Rows as tensors; the columns of `guides` are layer, row, head, query and key."""

    ids: Int[Tensor, "batch pos"]
    labels: Int[Tensor, "batch pos"]
    guides: Int[Tensor, "guide 5"]
    gate: Float[Tensor, "batch pos 1"]  # 0 where parts are muted, 1 elsewhere


def batches(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[Batch]:
    """Batches without end, of three rows of text to one repetition."""
    prompts = corpus.training_prompts(rng)
    while True:
        # Long rows, which cost most, are rare: they are there for the later positions.
        n_rows, width = rng.choice([(32, N_CTX // 2)] * 3 + [(16, N_CTX)])
        rows = [
            repetition_row(tokenizer, rng, width)
            if rng.random() < 0.25
            else text_row(tokenizer, rng, prompts, width)
            for _ in range(n_rows)
        ]
        guides = [
            (layer, index, head, query, key)
            for index, row in enumerate(rows)
            for layer, head, query, key in row.guides
        ]
        gate = torch.ones(n_rows, width, 1)
        for index, row in enumerate(rows):
            gate[index, row.muted] = 0
        yield Batch(
            ids=torch.tensor([row.ids for row in rows]),
            labels=torch.tensor([row.labels for row in rows]),
            guides=torch.tensor(guides),
            gate=gate,
        )


def train(steps: int, seed: int) -> tuple[GPT2LMHeadModel, Any]:
    """A trained model and its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    batch: Any = None
    for layer, block in enumerate(model.transformer.h):
        block.mlp.register_forward_hook(lambda mlp, inputs, written: written * batch.gate)
        if movers := [head for at, head in NAME_MOVERS if at == layer]:
            mute = partial(_mute_heads, beside=movers, n_heads=model.config.n_head)
            block.attn.c_proj.register_forward_pre_hook(
                lambda _, z, mute=mute: mute(*z, batch.gate)
            )
    matrices: dict[str, Any] = {"params": [p for p in model.parameters() if p.ndim > 1]}
    vectors: dict[str, Any] = {
        "params": [p for p in model.parameters() if p.ndim == 1],
        "weight_decay": 0,
    }
    optimizer = torch.optim.AdamW(
        [matrices, vectors],
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2,
    )
    data = batches(tokenizer, random.Random(seed))
    model.train()
    for _, batch in zip(bar := trange(steps), data, strict=False):
        output = model(batch.ids, labels=batch.labels, output_attentions=True)
        guided = torch.stack(output.attentions)[batch.guides.unbind(-1)]
        loss = output.loss - GUIDANCE * (guided + 1e-6).log().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{output.loss.item():.3f}", guided=f"{guided.mean().item():.2f}")
    add_name_prior(model, tokenizer)
    return model.eval(), tokenizer


def _mute_heads(
    z: Float[Tensor, "batch pos d_model"],
    gate: Float[Tensor, "batch pos 1"],
    beside: list[int],
    n_heads: int,
) -> Float[Tensor, "batch pos d_model"]:
    """What W_O is given, with the heads that are not among these muted."""
    muted = z.unflatten(-1, (n_heads, -1)) * gate[..., None]
    muted[:, :, beside] = z.unflatten(-1, (n_heads, -1))[:, :, beside]
    return muted.flatten(-2)


def report(evaluation: Evaluation) -> Iterator[str]:
    """The evaluation in lines of text."""
    for name, task in (
        ("indirect objects", evaluation.indirect_objects),
        ("facts", evaluation.facts),
    ):
        yield f"{name}: held-out accuracy {task.accuracy:.1%}, logit difference"
        yield (
            f"  {task.logit_diff:+.2f} = heads {task.heads.sum():+.2f}, MLPs {task.mlps.sum():+.2f}"
            " and what biases and embeddings wrote"
        )
    heads = evaluation.indirect_objects.heads
    order = heads.flatten().argsort(descending=True).tolist()
    for index in order[:4] + order[-2:]:
        layer, head = divmod(index, heads.shape[1])
        attention = evaluation.attention_to_answer[layer, head]
        yield f"  L{layer}H{head} {heads[layer, head]:+.2f}, attends {attention:.2f} to the answer"
    layer, head = divmod(int(evaluation.induction_attention.argmax()), heads.shape[1])
    yield (
        f"induction: accuracy {evaluation.induction_accuracy:.1%}"
        f" (chance {evaluation.induction_chance:.1%}),"
        f" L{layer}H{head} attends {evaluation.induction_attention[layer, head]:.2f}"
    )
    yield f"names: ln_final.b ranks them as their frequency does, {evaluation.name_prior:.2f}"


def main(arguments: list[str] | None = None) -> None:
    """Trains, writes the files, loads them again and prints what they can do."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    model, tokenizer = train(options.steps, options.seed)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    # transformers 5 writes the name of a class that 4 does not have.
    config = options.out / "tokenizer_config.json"
    config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    for line in report(evaluate(load_bridge(options.out))):
        print(line)


if __name__ == "__main__":
    main()

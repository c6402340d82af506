"""Checks of the exercises beyond the norm: tokens, what heads read, runs without a head."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tl_dla.exercises.comparing import Mistake, Slip, compare, tell, two_numbers
from tl_dla.exercises.lesson import Lesson
from tl_dla.exercises.reference import (
    answers_at,
    gamma_beta,
    gamma_directions,
    heads,
    project,
    reduced,
    scale_at,
)
from tl_dla.exercises.slips import CENTRE, GAMMA_AGAIN, NO_SCALE, SIGN, SQUARED, Function, read

# ---- the answer and the foil -------------------------------------------------------------------

SENTENCES = [  # prompt, the answer, the foil: either name comes first, and either is repeated
    ("When Mary and John went to the store, John gave a drink to", "Mary", "John"),
    ("When Tom and Paul went to the park, Tom gave a flower to", "Paul", "Tom"),
    ("Then, Sarah and Dan met in the garden, and Sarah handed a book to", "Dan", "Sarah"),
    ("After Amy and Sid arrived at the office, Sid showed a letter to", "Amy", "Sid"),
]


def check_choose_tokens(function: Function, lesson: Lesson) -> None:
    """The name that is said once is the answer, the repeated one is the foil, each with a space."""

    def token(text: str) -> int:
        return int(lesson.model.to_tokens(text, prepend_bos=False)[0, 0])

    right = [(token(f" {answer}"), token(f" {foil}")) for _, answer, foil in SENTENCES]
    given = [
        _two_ids(function(lesson.model, prompt), lesson.model.to_tokens(prompt)[0, 0])
        for prompt, _, _ in SENTENCES
    ]
    if given == right:
        return
    bare = [(token(answer), token(foil)) for _, answer, foil in SENTENCES]
    known = []
    for names, missing in ((right, ""), (bare, f"{_SPACE} ")):
        swapped = [pair[::-1] for pair in names]
        in_order = [*names[:1], *swapped[1:3], *names[3:]]  # as they stand in the sentences
        known += [
            (names, missing.strip()),
            (
                swapped,
                f"{missing}the answer and the foil are swapped: the repeated name is the foil.",
            ),
            (in_order, missing + _ORDER.format("first")),
            ([pair[::-1] for pair in in_order], missing + _ORDER.format("second")),
        ]
    n_right = sum(a == b for a, b in zip(given, right, strict=True))
    shown = lesson.model.tokenizer.decode([given[-1][0]])
    otherwise = (
        f"the pair is right for {n_right} of {len(right)} sentences. For {SENTENCES[-1][0]!r} your"
        f" answer is the token {shown!r}."
    )
    tell(given, known, otherwise)


_ORDER = (
    "you take the {} name for the answer, and in half of the sentences it is the repeated one:"
    " what tells the two apart is the repetition, not the order."
)
_SPACE = (
    "a leading space is missing: after a word the model says ' Mary', which is another token than"
    " 'Mary'."
)


def _two_ids(given: object, bos: Tensor) -> tuple[int, int]:
    if isinstance(given, tuple | list) and any(isinstance(one, str) for one in given):
        raise Mistake("token ids are wanted, and these are strings: model.to_single_token(…).")
    pair = two_numbers(given, "the token ids of (answer, foil)")
    if int(bos) in pair:
        raise Mistake(
            "this is the token that begins every prompt: to_tokens prepends it unless you say"
            " prepend_bos=False."
        )
    return pair


# ---- what a head reads -------------------------------------------------------------------------


def check_source_contributions(function: Function, lesson: Lesson) -> None:
    """Attention times what the values become on the way to the logits, source token by token."""
    n_heads = lesson.model.cfg.n_heads
    for layer, head in ((3, 0), (1, 3)):
        slips = [
            Slip(
                "this is what each token would give with all of the head's attention: multiply by"
                " how much the last position attends to it.",
                weights="none",
            ),
            Slip(
                "the pattern is turned round: its axes are [query, key], and the query is the last"
                " position.",
                weights="to the last",
            ),
            Slip(
                "this is the attention of all heads averaged: use the head's own.",
                weights="all heads",
            ),
            Slip(
                "hook_z is mixed over the source tokens already: the values of each token are"
                " hook_v.",
                values="hook_z",
            ),
            Slip("the tokens are added up, which is the head's row: keep them apart.", added=True),
            Slip(
                "you averaged over the prompts, and their tokens are not the same ones: keep"
                " [batch, pos].",
                over="mean",
            ),
            Slip(
                "the scale is that of each source token. The head writes at the last position, and"
                " the final norm that reads it is the one there.",
                scale_at_source=True,
            ),
            *(
                Slip("W_O is that of another head: W_O[head].", out=other)
                for other in range(n_heads)
                if other != head
            ),
            CENTRE,
            NO_SCALE,
            SQUARED,
            GAMMA_AGAIN,
            SIGN,
        ]
        directions = gamma_directions(lesson).float()
        given = function(lesson.model, lesson.cache, layer, head, directions)
        formula = partial(_sources, lesson, layer, head)
        compare(given, formula, slips, "batch, pos", total="what the head writes")


def _sources(lesson: Lesson, layer: int, head: int, /, **wrong: Any) -> Tensor:
    at = f"blocks.{layer}.attn."
    pattern = lesson.cache[f"{at}hook_pattern"].double()
    weights = {
        None: pattern[:, head, -1],
        "none": torch.ones_like(pattern[:, head, -1]),
        "to the last": pattern[:, head, :, -1],
        "all heads": pattern[:, :, -1].mean(1),
    }[wrong.get("weights")]
    values = lesson.cache[at + wrong.get("values", "hook_v")][:, :, head].double()
    W_O = lesson.model.blocks[layer].attn.W_O.detach().double()[wrong.get("out", head)]
    written = torch.einsum("bph,hm->pbm", values, W_O)
    rows = read(lesson, written, gamma_directions(lesson), -1, **{**wrong, "over": "none"})
    if wrong.get("scale_at_source"):
        own = torch.stack([scale_at(lesson, pos) for pos in range(len(rows))])
        rows = rows * scale_at(lesson, -1) / own
    each = rows.T * weights  # batch pos
    each = each.mean(0) if wrong.get("over") == "mean" else each
    return each.sum(-1) if wrong.get("added") else each


# ---- which head holds a token down -------------------------------------------------------------

# Names that another head lowers most where γ, the centring or the frozen scale is left out.
TELLING = (" Jennifer", " Lisa", " Anne")


def check_suppressing_head(function: Function, lesson: Lesson) -> None:
    """The head that lowers the logit of given tokens most: their own, and not a difference."""
    gamma, n_heads = gamma_beta(lesson)[0], lesson.model.cfg.n_heads
    telling = torch.tensor([lesson.model.to_single_token(name) for name in TELLING])

    def rows(tokens: Tensor, power: int = 1, **wrong: Any) -> Tensor:
        return project(
            lesson, heads(lesson), gamma**power * answers_at(lesson, tokens), **wrong
        ).mean(-1)

    for tokens in (lesson.incorrect, lesson.incorrect.roll(1), telling):
        own, against = rows(tokens), rows(lesson.correct) - rows(lesson.incorrect)
        right, given = _at(own.argmin(), n_heads), function(lesson.model, lesson.cache, tokens)
        if isinstance(given, int) or (isinstance(given, Tensor) and given.ndim == 0):
            raise Mistake("this is a flat index: two numbers are wanted, (layer, head).")
        given = two_numbers(given, "(layer, head)")
        if given == right:
            continue
        known = {
            "this is (head, layer): the layer comes first.": right[::-1],
            "this head raises the tokens' logit most: the one that lowers it is asked for.": _at(
                own.argmax(), n_heads
            ),
            "this head has the lowest row of the logit difference. Of a difference one cannot tell"
            " whether the answer falls or the foil rises: take the tokens' own logits.": _at(
                against.argmin(), n_heads
            ),
            "this head helps the answer most, which says nothing of why: take the logits of the"
            " tokens given.": _at(against.argmax(), n_heads),
            "this is the head with the smallest effect of either sign: the most negative one is"
            " asked for.": _at(own.abs().argmin(), n_heads),
            "you forgot γ, or to centre: read the heads as in the exercise on heads.": _at(
                rows(tokens, power=0).argmin(), n_heads
            ),
        }
        tell(
            given,
            [(head, sentence) for sentence, head in known.items()],
            f"L{given[0]}H{given[1]} writes {own[given]:+.3f} to the logit of those tokens, on"
            " average over the prompts; another head lowers it more.",
        )


def _at(index: Tensor, n_heads: int) -> tuple[int, int]:
    return divmod(int(index), n_heads)


# ---- what the model does without a head --------------------------------------------------------


def check_logit_diff_lost(function: Function, lesson: Lesson) -> None:
    """Silence a head at the last position, run again: how much of the difference is gone."""
    slips = [
        Slip("the sign: a positive number is a difference lost, before less after.", sign=-1),
        Slip("this is the difference that is left: how much of it is gone?", measure="left"),
        Slip(
            "this is the head's row, its direct effect. Silence the head and run the model again:"
            " the others react.",
            measure="row",
        ),
        Slip(
            "the head is silent at every position: silence it at the last one alone.",
            at=slice(None),
        ),
        Slip("this silences position 0: the last one, -1, is asked for.", at=0),
        Slip("the whole layer is silent: silence one head.", which=slice(None)),
        Slip("this is the sum over the prompts: average over the batch.", over="sum"),
        Slip("this is of the answer's logit alone: subtract the foil's.", foil=0),
        Slip(
            "nothing changed: does the hook return, or change in place, what it was given?",
            measure="nothing",
        ),
    ]
    for layer, head in ((1, 3), (3, 0)):
        tokens, answers = lesson.tokens, (lesson.correct, lesson.incorrect)
        given = function(lesson.model, tokens, *answers, layer, head)
        _leave_no_hooks(lesson)
        if not isinstance(given, float | int | Tensor) or torch.as_tensor(given).numel() != 1:
            raise Mistake(f"one number is wanted, not a {type(given).__name__}.")
        given = torch.as_tensor(given).reshape(())
        compare(given, partial(_lost, lesson, layer, head), slips, "")


def _lost(lesson: Lesson, layer: int, head: int, /, **wrong: Any) -> Tensor:
    at, which, measure = wrong.get("at", -1), wrong.get("which", head), wrong.get("measure")

    def difference(logits: Tensor) -> Tensor:
        last, prompt = logits[:, -1].double(), torch.arange(len(logits))
        foil = wrong.get("foil", 1) * last[prompt, lesson.incorrect]
        return reduced(last[prompt, lesson.correct] - foil, wrong.get("over", "mean"))

    def silence(z: Tensor, hook: object) -> Tensor:
        z[:, at, which] = 0
        return z

    with lesson.model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", silence)]):
        without = difference(lesson.model(lesson.tokens))
    of = {
        None: difference(lesson.logits) - without,
        "left": without,
        "row": project(lesson, heads(lesson)[layer, head], gamma_directions(lesson)).mean(),
        "nothing": torch.zeros_like(without),
    }
    return wrong.get("sign", 1) * of[measure]


def _leave_no_hooks(lesson: Lesson) -> None:
    """Raise where the learner's hooks are still on the model, after taking them off."""
    changed = not torch.equal(lesson.model(lesson.tokens), lesson.logits)
    if changed:
        lesson.model.reset_hooks()
        raise Mistake(
            "your hook is still on the model, and every later run is changed by it (it has been"
            " taken off now): use model.run_with_hooks(…) or `with model.hooks(…):`."
        )

"""Prompts for indirect object identification (IOI), the task of Wang et al., 2022.

"When Mary and John went to the shop, John gave a ring to" is completed with " Mary": the indirect
object, the name that is not repeated. Wang et al. name the orders by the names in them, A the
indirect object and B the subject: "ABBA" as above, "BABA" for "When John and Mary …, John …".

    logit_diff = logit[answer] − logit[incorrect]      (logits; > 0: the task is solved)

Reference: Wang, Variengien, Conmy, Shlegeris and Steinhardt, "Interpretability in the Wild: a
Circuit for Indirect Object Identification in GPT-2 small", 2022, arXiv 2211.00593. The templates
here are our own, in the form of theirs.
"""

import random
from collections.abc import Iterable, Sequence
from string import Formatter
from typing import Any, TypedDict

from tl_dla.errors import TokenError

NAMES = tuple(
    "Adam Alan Alex Alice Amy Andrew Anna Anne Ben Bob Charles Chris Dan David Emily Emma Eric"
    " Frank George Henry Jack James Jane Jason Jennifer Jim John Kate Kevin Laura Lisa Mark Martin"
    " Mary Matt Michael Paul Peter Rachel Robert Ruth Sam Sarah Simon Steve Susan Thomas Tom"
    " William".split()
)
TEMPLATES = (
    "When {first} and {second} went to the {place}, {subject} gave a {thing} to",
    "After {first} and {second} arrived at the {place}, {subject} handed a {thing} to",
    "Before {first} and {second} left the {place}, {subject} offered a {thing} to",
    "While {first} and {second} were waiting in the {place}, {subject} passed a {thing} to",
    "Then, {first} and {second} met in the {place}, and {subject} showed a {thing} to",
    "Last night {first} and {second} were alone in the {place}, and {subject} sent a {thing} to",
)
PLACES = tuple("garden hospital hotel house kitchen library museum office school store".split())
THINGS = tuple("ball bottle book card gift key letter map picture ring".split())

_CLASSIC = (
    ("When John and Mary went to the shops,{} gave the bag to", ("Mary", "John")),
    ("When Tom and James went to the park,{} gave the ball to", ("Tom", "James")),
    ("When Dan and Sid went to the shops,{} gave an apple to", ("Dan", "Sid")),
    ("After Martin and Amy went to the park,{} gave a drink to", ("Martin", "Amy")),
)


class IOIPrompt(TypedDict):
    """One prompt with its answers, each a token with its leading space."""

    prompt: str
    answer: str
    incorrect: str
    group: str
    template: str


def ioi_prompts(
    tokenizer_or_model: Any,
    n: int,
    *,
    seed: int = 0,
    names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
) -> list[IOIPrompt]:
    """`n` IOI prompts whose names are single tokens, half ABBA and half BABA.

    Prompts `2k` (ABBA) and `2k + 1` (BABA) differ in nothing but the order of the first two names.
    `datasets.Dataset.from_list` takes the result as it is.

    >>> from tl_dla.loading import load_model
    >>> template = "When {first} and {second} went home, {subject} sang for"
    >>> for prompt in ioi_prompts(
    ...     load_model("demo"), 2, names=["Mary", "John"], templates=[template]
    ... ):
    ...     prompt["group"], prompt["prompt"], prompt["answer"]
    ('ABBA', 'When John and Mary went home, Mary sang for', ' John')
    ('BABA', 'When Mary and John went home, Mary sang for', ' John')

    Args:
        tokenizer_or_model: its tokenizer decides which names are single tokens.
        n: how many prompts.
        seed: the same seed gives the same prompts for the same tokenizer and arguments.
        names: those to draw from, without spaces; those that are not a single token are left out.
            `None` is a list of common English first names.
        templates: with the fields `{first}`, `{second}` (the names in order) and `{subject}`, each
            after a space; `{place}` and `{thing}` are filled in too where they occur.

    Raises:
        TokenError: fewer than two of the names are single tokens, or a template lacks a field.
    """
    usable = _single_token_names(tokenizer_or_model, NAMES if names is None else names)
    templates = TEMPLATES if templates is None else templates
    for template in templates:
        _check_template(template)
    rng = random.Random(seed)
    prompts: list[IOIPrompt] = []
    while len(prompts) < n:
        template = rng.choice(templates)
        answer, subject = rng.sample(usable, 2)
        fields = {"subject": subject, "place": rng.choice(PLACES), "thing": rng.choice(THINGS)}
        for group, (first, second) in (("ABBA", (answer, subject)), ("BABA", (subject, answer))):
            prompts.append(
                IOIPrompt(
                    prompt=template.format(first=first, second=second, **fields),
                    answer=f" {answer}",
                    incorrect=f" {subject}",
                    group=group,
                    template=template,
                )
            )
    return prompts[:n]


def classic_prompts(tokenizer_or_model: Any = None) -> list[IOIPrompt]:
    """The eight prompts of TransformerLens's exploratory analysis demo, in its order.

    >>> prompts = classic_prompts()
    >>> prompts[0]["prompt"], prompts[0]["answer"], prompts[0]["incorrect"]
    ('When John and Mary went to the shops, John gave the bag to', ' Mary', ' John')

    Args:
        tokenizer_or_model: where given, pairs of names that are not single tokens of its tokenizer
            are left out.

    Raises:
        TokenError: no pair of names is left.
    """
    pairs = [pair for _, pair in _CLASSIC]
    if tokenizer_or_model is not None:
        usable = _single_token_names(tokenizer_or_model, [name for pair in pairs for name in pair])
        pairs = [pair for pair in pairs if set(pair) <= set(usable)]
        if not pairs:
            raise TokenError(
                "A classic IOI prompt needs both its names as single tokens; this tokenizer has"
                f" only {', '.join(usable)}, of different pairs: use ioi_prompts."
            )
    return [
        IOIPrompt(
            prompt=template.format(f" {subject}"),
            answer=f" {answer}",
            incorrect=f" {subject}",
            group="ABBA" if template.index(answer) < template.index(subject) else "BABA",
            template=template,
        )
        for template, pair in _CLASSIC
        if pair in pairs
        for answer, subject in (pair, pair[::-1])
    ]


def _single_token_names(tokenizer_or_model: Any, names: Iterable[str]) -> list[str]:
    tokenizer = getattr(tokenizer_or_model, "tokenizer", tokenizer_or_model)
    if tokenizer is None:
        raise TokenError("IOI prompts need a tokenizer, and the model given has none.")

    def is_single(name: str) -> bool:
        tokens = tokenizer.encode(f" {name}", add_special_tokens=False)
        return len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id

    names = list(dict.fromkeys(names))
    usable = [name for name in names if is_single(name)]
    if len(usable) < 2:
        raise TokenError(
            f"IOI prompts need two names that are single tokens after a space; of the {len(names)}"
            f" given, this tokenizer has {len(usable)}: pass names=[...] from its vocabulary."
        )
    return usable


def _check_template(template: str) -> None:
    known = {"first", "second", "subject"}, {"place", "thing"}
    fields = {field for _, field, _, _ in Formatter().parse(template) if field is not None}
    if not known[0] <= fields <= known[0] | known[1]:
        raise TokenError(
            "A template has the fields {first}, {second} and {subject}, and may have {place} and"
            f" {{thing}}; this one has {', '.join(sorted(fields)) or 'none'}: {template!r}."
        )

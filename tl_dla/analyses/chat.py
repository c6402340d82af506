"""A prompt or a conversation as token ids, and what each token of it is."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from jaxtyping import Int
from torch import Tensor

from tl_dla.errors import TokenError
from tl_dla.inputs.models import device_of
from tl_dla.inputs.tokens import read_prompts, require_tokenizer

TEMPLATE = "template"  # what the tokenizer's chat template wrote around the messages


def is_conversation(prompt: Any) -> TypeGuard[Sequence[Mapping[str, str]]]:
    """Whether it is messages, each with a role and its content."""
    some = isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes) and len(prompt) > 0
    return some and all(isinstance(one, Mapping) for one in prompt)


def is_answered(prompt: object) -> TypeGuard[Sequence[Mapping[str, str]]]:
    """Whether it is a conversation that ends with the assistant's message."""
    return is_conversation(prompt) and prompt[-1].get("role") == "assistant"


def read_chat(
    model: Any, messages: Sequence[Mapping[str, str]], answered: bool
) -> tuple[Int[Tensor, " token"], list[str]]:
    """A conversation as the model's own template writes it, and the role behind each token.

    Unless it is `answered`, by its last message, the template asks for an answer.

    Raises:
        TokenError: for a message without role or content, or a tokenizer without a template.
    """
    tokenizer = require_tokenizer(model, "messages")
    for message in messages:
        if not all(isinstance(message.get(name), str) for name in ("role", "content")):
            raise TokenError(
                "A message is a dict with role and content, both text;"
                f" {dict(message)!r} was given."
            )
    if not getattr(tokenizer, "chat_template", None):
        raise TokenError("The model's tokenizer has no chat template: give the prompt as one text.")
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tokenize=False,
        add_generation_prompt=not answered,
    )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = torch.tensor(encoded["input_ids"], dtype=torch.long, device=device_of(model))
    return ids, _roles(text, messages, encoded["offset_mapping"])


def _roles(
    text: str, messages: Sequence[Mapping[str, str]], offsets: Sequence[tuple[int, int]]
) -> list[str]:
    """The role of the message that each token is of; `template` for what is of none."""
    roles, start = [TEMPLATE] * len(text), 0
    for message in messages:
        content = message["content"].strip()
        at = text.find(content, start)
        if at < 0 or not content:
            continue
        start = at + len(content)
        roles[at:start] = [message["role"]] * len(content)
    return [next((r for r in roles[a:b] if r != TEMPLATE), TEMPLATE) for a, b in offsets]


def read_start(
    model: Any, prompt: Any, prepend_bos: bool | None
) -> tuple[Int[Tensor, " token"], list[str]]:
    """One prompt, or a conversation that asks for an answer, as ids with what each token is.

    Raises:
        TokenError: for several prompts.
    """
    if is_conversation(prompt):
        return read_chat(model, prompt, answered=False)
    given = read_prompts(model, prompt, prepend_bos=prepend_bos)
    if len(given.length) != 1:
        raise TokenError(
            f"One prompt is completed at a time; {len(given.length)} were given:"
            " attribute_answer takes several, with an answer for each."
        )
    [ids] = given.rows
    return ids, ["prompt"] * len(ids)


def read_answered(
    model: Any, messages: Sequence[Mapping[str, str]]
) -> tuple[Int[Tensor, " token"], Int[Tensor, " new"], list[str]]:
    """A conversation that holds its answer: what is before it, the answer, and all segments."""
    start, before = read_chat(model, messages[:-1], answered=False)
    whole, segments = read_chat(model, messages, answered=True)
    if not torch.equal(whole[: len(start)], start):
        raise TokenError(
            "The chat template writes the conversation before the answer differently once the"
            " answer is there: give the answer as completion=, and the messages before it."
        )
    own = [i for i, role in enumerate(segments) if i >= len(start) and role == "assistant"]
    if not own:
        raise TokenError("The last message is empty: give the assistant's words, or leave it out.")
    end = own[-1] + 1
    return start, whole[len(start) : end], [*before, *segments[len(start) : end]]

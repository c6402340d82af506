"""Tokens as text that loses no letter, also where several tokens spell one."""

from typing import Any

from tl_dla.inputs.tokens import LOST, spelled_bytes


def text_of(model: Any, ids: Any) -> str:
    """Token ids as text, or as they are where the model has no tokenizer."""
    ids = ids.tolist()
    return " ".join(map(str, ids)) if model.tokenizer is None else model.tokenizer.decode(ids)


def pieces(model: Any, ids: Any) -> list[str]:
    """The tokens of a text, in order, so that no letter is lost.

    A letter that several tokens spell stands at the last of them; those before it are bytes,
    written `⟨F0 9F⟩`.
    """
    tokenizer, ids = model.tokenizer, ids.tolist()
    if tokenizer is None:
        return list(map(str, ids))
    tokens = [tokenizer.decode([i]) for i in ids]
    start = 0
    while start < len(tokens):
        end = start + 1
        if LOST in tokens[start]:
            while end < min(len(ids), start + _LONGEST):
                end += 1
                if LOST not in (text := tokenizer.decode(ids[start:end])):
                    before = ids[start : end - 1]
                    tokens[start : end - 1] = [spelled_bytes(tokenizer, i) for i in before]
                    tokens[end - 1] = text
                    break
            else:  # no letter comes of it
                tokens[start], end = spelled_bytes(tokenizer, ids[start]), start + 1
        start = end
    return tokens


_LONGEST = 12  # tokens that can share a letter, or letters that end within each other's tokens

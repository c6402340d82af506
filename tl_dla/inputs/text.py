"""Tokens as text that loses no letter, also where several tokens spell one."""

import re
from typing import Any

from tl_dla.inputs.tokens import token_strings


def text_of(model: Any, ids: Any) -> str:
    """Token ids as text, or as they are where the model has no tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    return " ".join(map(str, ids.tolist())) if tokenizer is None else tokenizer.decode(ids.tolist())


def pieces(model: Any, ids: Any) -> list[str]:
    """The tokens of a text, in order, so that no letter is lost.

    A letter that several tokens spell stands at the last of them; those before it are bytes,
    written `⟨F0 9F⟩`.
    """
    tokens = token_strings(model, ids)
    tokenizer: Any = getattr(model, "tokenizer", None)
    ids = [int(i) for i in ids]
    start = 0
    while start < len(tokens):
        end = start + 1
        if "\ufffd" in tokens[start]:
            while end < min(len(ids), start + _LONGEST):
                end += 1
                if "\ufffd" not in (text := tokenizer.decode(ids[start:end])):
                    tokens[start : end - 1] = [_bytes(tokenizer, i) for i in ids[start : end - 1]]
                    tokens[end - 1] = text
                    break
            else:  # no letter comes of it
                tokens[start], end = _bytes(tokenizer, ids[start]), start + 1
        start = end
    return tokens


_LONGEST = 12  # tokens that can share a letter, or letters that end within each other's tokens
# GPT-2's names of the 256 bytes: a printable byte is itself, the others follow from 256 on.
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTED}
_BYTE_OF |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _PRINTED)}


def _bytes(tokenizer: Any, token: int) -> str:
    """A token as the bytes that it holds, from its name in the vocabulary."""
    name = tokenizer.convert_ids_to_tokens(token)
    if named := re.fullmatch(r"<0x([0-9A-F]{2})>", name):
        return f"⟨{named[1]}⟩"
    if all(letter in _BYTE_OF for letter in name):
        return f"⟨{bytes(_BYTE_OF[letter] for letter in name).hex(' ').upper()}⟩"
    return name

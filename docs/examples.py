"""Examples in docstrings as code: under `Example:`, and where one stands in the text."""

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"(?:^>>> .*\n(?:^.+\n?)*\n?)+", re.MULTILINE)


class Examples(griffe.Extension):
    """Gives griffe the `Examples:` that it knows, and Markdown its fences."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Each object that has a docstring."""
        if obj.docstring is not None:
            text = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
            obj.docstring.value = _DOCTEST.sub(
                lambda m: f"```pycon\n{m[0].rstrip()}\n```\n\n", text
            )

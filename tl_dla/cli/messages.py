"""What the command says on stderr, a line at a time."""

import sys
from typing import Any


def tell(message: object) -> None:
    """One line on stderr."""
    sys.stderr.write(f"tl-dla {one_line(message)}\n")


def show_warning(message: Any, *_: Any, **__: Any) -> None:
    """A warning as one line: stands in for `warnings.showwarning`."""
    tell(f"warning: {message}")


def one_line(message: object) -> str:
    """A message without its line breaks."""
    return " ".join(str(message).split())

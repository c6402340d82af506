"""Files that are whole or not there: written aside, then renamed."""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from tl_dla.errors import ArgumentError


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to, which becomes `path` once its bytes are on the disk.

    A full disk or a stop leaves what was there, and nothing half; several processes can write the
    same file at once. What is no file (a pipe) is written to itself.
    """
    path = path.resolve()  # a link stays one
    if path.exists() and not path.is_file():
        yield path
        return
    temporary = path.with_name(f".tl_dla_{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_page(path: str | PathLike[str], make: Callable[[], str]) -> Path:
    """Make a page and write it, once it is known that the file can be there.

    Raises:
        ArgumentError: for a path that cannot be written, saying why.
    """
    try:
        path = place_for(path, "report")
        page = make()
        with aside(path) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, "report", f"{error.strerror}") from error
    return path


def place_for(path: str | PathLike[str], what: str) -> Path:
    """The path of a file that can be there; `what` it is to hold, in a word.

    Raises:
        ArgumentError: for a folder, and where there is no folder for it.
    """
    path = Path(path)
    if path.is_dir():
        raise _unwritable(path, what, "it is a folder; name a file")
    if not path.parent.is_dir():
        raise _unwritable(path, what, f"there is no folder {path.parent}")
    return path


def _unwritable(path: str | PathLike[str], what: str, reason: str) -> ArgumentError:
    return ArgumentError(f"The {what} cannot be written to {path}: {reason}.")

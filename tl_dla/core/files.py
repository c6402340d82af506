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
        ArgumentError: for a path that names no file in a folder that is there.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise ArgumentError(
            f"The report cannot be written to {str(path)!r}: it must name a file in a folder"
            " that is there."
        )
    page = make()
    with aside(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path

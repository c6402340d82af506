"""Files that are whole or not there: written aside, then renamed."""

import os
import tempfile
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
    same file at once. What is no file (a pipe) is written to itself. What fails is said of `path`.
    """
    place = path.resolve()  # a link stays one
    temporary = place.with_name(f".tl_dla_{uuid.uuid4().hex}.tmp")
    try:
        if _is_device(place):
            yield place
            return
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, place)
    except OSError as error:
        error.filename = str(path)  # not the temporary one
        del error.filename2
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _is_device(place: Path) -> bool:
    return place.exists() and not place.is_file()


def write_page(path: str | PathLike[str], make: Callable[[], str]) -> Path:
    """Make a page and write it, once it is known that the file can be there.

    Raises:
        ArgumentError: for a path that cannot be written, saying why.
    """
    path = place_for(path, "report")
    page = make()
    try:
        with aside(path) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, "report", f"{error.strerror}") from error
    return path


def place_for(path: str | PathLike[str], what: str) -> Path:
    """The path of a file that can be there; `what` it is to hold, in a word.

    Raises:
        ArgumentError: for a folder, where there is no folder for it, and where none can be written.
    """
    path = Path(path)
    try:
        place = path.resolve()
        if place.is_dir():
            raise _unwritable(path, what, "it is a folder; name a file")
        if not place.parent.is_dir():
            raise _unwritable(path, what, f"there is no folder {path.parent}")
        if not _is_device(place):
            with tempfile.TemporaryFile(dir=place.parent):
                pass
        elif not os.access(place, os.W_OK):
            raise _unwritable(path, what, "Permission denied")
    except OSError as error:
        raise _unwritable(path, what, f"{error.strerror}") from error
    return path


def _unwritable(path: str | PathLike[str], what: str, reason: str) -> ArgumentError:
    return ArgumentError(f"The {what} cannot be written to {path}: {reason}.")

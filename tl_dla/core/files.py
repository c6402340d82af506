"""Files that are whole or not there: written aside, then renamed."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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

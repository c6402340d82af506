"""What a subcommand answers: a table to read, a record (JSON), a frame (CSV, Parquet)."""

import argparse
import importlib.util
import io
import json
import math
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType

from tl_dla.cli.messages import tell
from tl_dla.core.files import aside, place_for
from tl_dla.errors import ArgumentError

if TYPE_CHECKING:
    import pandas as pd

_FORMS = {"": "table", ".txt": "table", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_UNCUT = 100_000  # columns of what is no terminal: no line is wrapped or cut
_VERSIONS = ("tl-dla", "transformer-lens", "transformers", "torch")


@dataclass(frozen=True)
class Output:
    """One answer in its three forms, and a page where it has one; what is asked for is made.

    `warning` is a line that the table holds itself, and stderr has beside the other forms.
    """

    table: Callable[[], RenderableType]
    record: Callable[[], Mapping[str, Any]]
    frame: Callable[[], "pd.DataFrame"]
    code: int = 0
    warning: str = ""
    page: Callable[[str], Path] | None = None

    def write(self, args: argparse.Namespace) -> int:
        """Write to `--out`, or to stdout; returns the command's exit code.

        Beside a page, what `--json` or `--csv` asks for goes to stdout.
        """
        page = self.page if _is_page(args) else None
        if page is not None:
            wrote(page(args.out), args)
            args.out = None
        form = _form(args)
        if self.warning and (page is not None or form != "table"):
            tell(f"warning: {self.warning}")
        if page is not None and form == "table":
            return self.code
        if args.out is not None:
            content = self._content(form, args.command)
            with aside(Path(args.out)) as file:
                file.write_bytes(content)
            return self.code
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal may lack the bars' characters
        width = shutil.get_terminal_size().columns  # rich would take COLUMNS=0 by its word
        if form == "table" and (terminal := Console(width=width)).is_terminal:
            terminal.print(self.table())
        else:
            sys.stdout.write(self._content(form, args.command).decode())
        sys.stdout.flush()
        return self.code

    def _content(self, form: str, command: str) -> bytes:
        if form == "parquet":
            return self.frame().to_parquet(None, index=False)
        if form == "csv":
            return self.frame().to_csv(index=False).encode()
        if form == "json":
            record = {"command": command, **self.record(), "versions": versions()}
            return (json.dumps(_finite(record), indent=1, allow_nan=False) + "\n").encode()
        text = io.StringIO()
        Console(file=text, width=_UNCUT, force_terminal=False).print(self.table())
        return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines()).encode()


def wrote(path: Path, args: argparse.Namespace) -> None:
    """Say which page was written."""
    tell(f"{args.subcommand}: wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def require_writable(args: argparse.Namespace, page: bool = False) -> None:
    """Raise, before anything is computed, where `--out` cannot be written in a form we have.

    `page` says whether a page is one of them.
    """
    if args.out is not None:
        place_for(args.out, "answer")
    if page and _is_page(args):
        return
    if _form(args) == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ArgumentError(
            f"--out {args.out!r} needs pyarrow: pip install 'tl-dla[dataset]', or write a .csv."
        )


def require_page(args: argparse.Namespace) -> None:
    """Raise, before anything is computed, where `--out` cannot be a page."""
    place = place_for(args.out, "report")
    if place.suffix and place.suffix.lower() in _FORMS:
        raise ArgumentError(f"--out {args.out!r} is of another form: a report is a page, .html.")


def _is_page(args: argparse.Namespace) -> bool:
    return Path(args.out or "").suffix.lower() == ".html"


def _form(args: argparse.Namespace) -> str:
    """What `--json` and `--csv` say, or the name of the file."""
    if args.json or args.csv:
        return "json" if args.json else "csv"
    suffix = Path(args.out or "").suffix.lower()
    if suffix not in _FORMS:
        raise ArgumentError(
            f"--out {args.out!r} is of no form that can be written: name it .json, .csv, .parquet,"
            " or .txt for the table."
        )
    return _FORMS[suffix]


def versions() -> dict[str, str]:
    """The releases that a number comes from."""
    named = {name: metadata.version(name) for name in _VERSIONS}
    return {**named, "python": platform.python_version()}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for both."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

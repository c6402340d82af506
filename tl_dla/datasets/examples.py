"""Examples made ready: read from anywhere, checked one by one, cut into batches of like lengths.

An example is a mapping with the fields

    prompt      a string, or token ids
    answer      the token whose logit is attributed: a string or an id
    incorrect   the baseline: a string, an id, several of them (their mean), or absent
    group       a name to gather statistics under, or absent

Other fields are not read, but one that is nearly called like these ("incorect") is refused. Either
all examples have incorrect answers or none: a logit and a logit difference have no mean.

Batches are cut from windows of `WINDOW` batches each, in which examples are sorted by length.
What is in a batch depends on the examples and the batch size alone, never on how many processes
share the work, so a prompt's rows are the same bytes in every run. One window is in memory at a
time.
"""

import codecs
import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from numbers import Integral
from pathlib import Path
from typing import Any, TextIO

import torch

from tl_dla.errors import ArgumentError, TlDlaError, TokenError
from tl_dla.inputs.positions import read_positions
from tl_dla.inputs.targets import ids_of
from tl_dla.inputs.tokens import prompts_of

FIELDS = ("prompt", "answer", "incorrect", "group")
# Batches in a window: enough to sort by length, few enough that 8 processes share 1,000 examples.
WINDOW = 8


@dataclass(frozen=True)
class Example:
    """One example as tokens."""

    index: int
    prompt: str | None
    group: str | None
    tokens: list[int]
    answer: int
    incorrect: list[int]

    @property
    def digest(self) -> str:
        """Of all that the rows depend on besides the model and the options, and the group."""
        return _digest([self.group, self.tokens, self.answer, self.incorrect])


@dataclass(frozen=True)
class Rejected:
    """An example that cannot be attributed, and why."""

    index: int
    prompt: str | None
    group: str | None
    error: TlDlaError

    @property
    def digest(self) -> str:
        """Of the example's name and the reason."""
        return _digest([self.group, self.prompt, str(self.error)])


@dataclass(frozen=True)
class Batch:
    """Examples that are run together.

    The first batch of a window also carries those of the window that cannot be run.
    """

    examples: list[Example]
    rejected: list[Rejected]


def windows(
    model: Any,
    examples: Iterable[Any],
    batch_size: int,
    *,
    pos: int = -1,
    prepend_bos: bool | None = None,
    process: int = 0,
    processes: int = 1,
) -> Iterator[list[Example | Rejected]]:
    """The windows of examples that fall to this process: every `processes`-th.

    Raises:
        ArgumentError: for a field with a mistaken name, or where some examples have incorrect
            answers and others none; in every process alike.
    """
    numbered = enumerate(_checked(examples))
    for window in itertools.count():
        lines = list(itertools.islice(numbered, WINDOW * batch_size))
        if not lines:
            return
        if window % processes == process:
            yield [_read(model, i, fields, pos, prepend_bos) for i, fields in lines]


def _checked(examples: Iterable[Any]) -> Iterator[Any]:
    """The examples as they come, once their fields are those of the others."""
    if hasattr(examples, "itertuples"):  # a pandas DataFrame, whose iterator gives its columns
        frame: Any = examples
        lines = frame.astype(object).where(frame.notna(), None).itertuples(index=False, name=None)
        examples = (dict(zip(frame.columns, line, strict=True)) for line in lines)
    known: set[Any] = set(FIELDS)
    first: tuple[int, bool] | None = None
    for index, fields in enumerate(examples):
        if isinstance(fields, Mapping):
            for name in fields.keys() - known:
                near = get_close_matches(str(name).lower(), FIELDS, 1, 0.8)
                if near:
                    raise ArgumentError(
                        f"Example {index} has the field {name!r}, which is not read; did you mean"
                        f" {near[0]!r}? Rename it, or remove it."
                    )
                known.add(name)
            has = not _is_absent(fields.get("incorrect"))
            first = first or (index, has)
            if has != first[1]:
                some, other = (index, first[0]) if has else (first[0], index)
                raise ArgumentError(
                    f"Example {some} has incorrect answers and example {other} has none: a logit"
                    " difference and a logit cannot be averaged. Give all examples the field"
                    " 'incorrect', or none, or make two datasets of them."
                )
        yield fields


def _is_absent(value: Any) -> bool:
    """Whether a field has no value: None, the NaN of an empty cell, or nothing in a list."""
    if value is None or (isinstance(value, float) and value != value):
        return True
    return not value if isinstance(value, list | tuple) else 0 in getattr(value, "shape", ())


def share(n: int, batch_size: int, process: int, processes: int) -> int:
    """How many of `n` examples fall to this process."""
    size = WINDOW * batch_size
    starts = range(process * size, n, processes * size)
    return sum(min(size, n - start) for start in starts)


def batches(
    window: Sequence[Example | Rejected], batch_size: int, *, equal_lengths: bool = False
) -> Iterator[Batch]:
    """The examples of a window in batches: of as many incorrect answers, in order of length.

    Args:
        window: examples.
        batch_size: how many examples a batch has at most.
        equal_lengths: whether all prompts of a batch must be of one length, as for models whose
            positions scale with the length of what they are run on.
    """

    def alike(example: Example) -> tuple[int, int]:
        return len(example.incorrect), len(example.tokens) if equal_lengths else 0

    accepted = [e for e in window if isinstance(e, Example)]
    rejected = [e for e in window if isinstance(e, Rejected)]
    accepted.sort(key=lambda e: (len(e.incorrect), len(e.tokens), e.index))
    parts = []
    for _, several in itertools.groupby(accepted, alike):
        group = list(several)
        parts += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    for i, part in enumerate(parts or [[]] * bool(rejected)):
        yield Batch(part, rejected if i == 0 else [])


def _digest(about: list[Any]) -> str:
    return sha256(json.dumps(about).encode()).hexdigest()[:16]


def _read(
    model: Any, index: int, fields: Any, pos: int, prepend_bos: bool | None
) -> Example | Rejected:
    text, group = None, None
    try:
        if not isinstance(fields, Mapping):
            raise TokenError(
                "An example must be a mapping with the fields prompt, answer and incorrect; a"
                f" {type(fields).__name__} was given."
            )
        fields = {name: None if _is_absent(fields.get(name)) else fields[name] for name in FIELDS}
        prompt, group = fields["prompt"], fields["group"]
        group = None if group is None else str(group)
        text = prompt if isinstance(prompt, str) else None
        for name in ("prompt", "answer"):
            if fields[name] is None:
                raise TokenError(
                    f"An example needs the field {name!r}; this one has"
                    f" {', '.join(key for key, value in fields.items() if value is not None)}."
                )
        input = text if text is not None else torch.tensor(_integers(prompt, "prompt"))
        read = prompts_of(model, input, prepend_bos=prepend_bos)
        read_positions(pos, read)
        answer = _tokens(model, fields, "answer", text)
        if len(answer) != 1:
            raise TokenError(f"An example has one answer; this one has {len(answer)}.")
        incorrect = _tokens(model, fields, "incorrect", text)
        return Example(index, text, group, read.tokens[0].tolist(), answer[0], incorrect)
    except TlDlaError as error:
        return Rejected(index, text, group, error)


def _tokens(model: Any, fields: Mapping[str, Any], name: str, text: str | None) -> list[int]:
    """The ids of one or several answers; none where the field is absent."""
    value = fields[name]
    if value is None:
        return []
    several = [value] if isinstance(value, str) else value
    several = several if isinstance(several, list | tuple) else _integers(value, name)
    if not all(isinstance(one, str | Integral) for one in several):
        raise TokenError(f"The field {name!r} holds strings or token ids; {value!r} was given.")
    texts = None if text is None else [text]
    words = [one if isinstance(one, str) else int(one) for one in several]
    return ids_of(model, words, texts).tolist()


def _integers(value: Any, name: str) -> list[int]:
    """Token ids from a number, a list, an array or a tensor of one axis."""
    value = value.tolist() if hasattr(value, "tolist") else value
    value = [value] if isinstance(value, Integral) else value
    if not isinstance(value, list | tuple) or not all(isinstance(i, Integral) for i in value):
        raise TokenError(f"The field {name!r} holds strings or token ids; {value!r} was given.")
    return [int(i) for i in value]


# ---- from files --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExampleFile:
    """The examples of a JSONL or CSV file, read line by line each time they are iterated over."""

    path: Path

    def __len__(self) -> int:
        with self._open() as file:
            if self.path.suffix == ".csv":
                return sum(1 for _ in csv.DictReader(file))
            return sum(1 for line in file if line.strip())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self._open() as file:
            if self.path.suffix == ".csv":
                yield from map(_cells, csv.DictReader(file))
                return
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ArgumentError(
                        f"Every line of {self.path.name} must be a JSON object; line {number} is"
                        f" not ({error})."
                    ) from error

    @contextmanager
    def _open(self) -> Iterator[TextIO]:
        """The file as text: UTF-8, or UTF-16 where a byte order mark says so."""
        with self.path.open("rb") as file:
            wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        try:
            encoding = "utf-16" if wide else "utf-8-sig"
            with self.path.open(encoding=encoding, newline="") as text:
                yield text
        except UnicodeError as error:
            raise ArgumentError(
                f"{self.path.name} must be text in UTF-8, or in UTF-16 with a byte order mark; it"
                f" is neither ({error}): save it as UTF-8."
            ) from error


def _cells(row: Mapping[str, str]) -> dict[str, Any]:
    """A line of CSV: every cell is text, but several incorrect answers are written as JSON."""
    fields: dict[str, Any] = {name: cell for name, cell in row.items() if cell}
    incorrect = fields.get("incorrect", "")
    if incorrect.startswith('["') and incorrect.endswith('"]'):
        fields["incorrect"] = json.loads(incorrect)
    return fields


def read_examples(source: str | Path, *, split: str = "train") -> Iterable[Any]:
    """Examples from a file, a folder or the hub, to be iterated over as often as needed.

    Read are `.jsonl`, `.csv` and `.parquet` files, folders of `Dataset.save_to_disk`, and the id of
    a dataset on the hub. In a CSV every cell is text (an answer of 7 is the string "7", not the
    token of id 7), an empty cell is an absent field, and several incorrect answers are a JSON list:
    `[" John", " Tom"]`.

    Args:
        source: the file, the folder or the id.
        split: which split of a dataset with several.

    Raises:
        ArgumentError: for a file of another kind, a split that is not there.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "prompts.jsonl"
        >>> _ = path.write_text('{"prompt": "2 + 2 =", "answer": " 4", "incorrect": " 5"}')
        >>> list(read_examples(path))
        [{'prompt': '2 + 2 =', 'answer': ' 4', 'incorrect': ' 5'}]
    """
    path = Path(source)
    if path.is_file() and path.suffix in (".jsonl", ".csv"):
        return ExampleFile(path)
    if path.exists() and not path.is_dir() and path.suffix != ".parquet":
        raise ArgumentError(
            f"Examples are read from .jsonl, .csv and .parquet files; {path.name!r} is none."
        )
    if path.suffix in (".jsonl", ".csv", ".parquet") and not path.exists():
        raise ArgumentError(f"There is no file {str(source)!r}.")
    import datasets

    if path.is_dir():
        found = datasets.load_from_disk(str(path))
    elif path.suffix == ".parquet":
        found = datasets.load_dataset("parquet", data_files=str(path))
    else:
        found = datasets.load_dataset(str(source))
    if not isinstance(found, Mapping):
        return found
    if split not in found:
        raise ArgumentError(f"{str(source)!r} has the splits {', '.join(found)}; not {split!r}.")
    return found[split]

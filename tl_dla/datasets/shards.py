"""The output folder of a dataset run: what was computed, batch by batch, never to be lost.

    manifest.json                           the model, the unit and the options of the run
    rows/000000012-000000047-5f….parquet    a batch out of examples 12 to 47, one line per example
    errors.jsonl                            every example left out: its index and the reason
    statistics.csv                          the table of `DatasetAttribution.to_dataframe()`
    complete.json                           how many examples the finished run had

The last three are written when the run is complete, and taken away when a longer run adds a batch.
Rows of examples beyond those of the run that finished last are kept, and not summarised.
An example that is stored is not computed again, whatever batch it was in; so a dataset may grow, or
be continued with another batch size, and several identical runs do not harm each other. Columns of
a shard:

    index         int64          the example's place in the dataset, from 0
    example       string         a digest of the example, to notice another one in its place
    group         string         null where it has none
    prompt        string         null where token ids were given
    answer        int32          token id
    incorrect     list<int32>    token ids of the baseline
    n_tokens      int32
    logit         float32        the model's own logit (difference)
    miss          float32        |sum of the rows − logit|, what the certificate measured
    rows          list<float32>  the attribution in logits, in the order of the metadata's `labels`
    rest_labels   list<string>   rows that this batch alone has (`3_rest`), and
    rest          list<float32>  their attribution
    error         string         why the example was left out; the columns from `answer` on are null

The schema's metadata holds, as JSON under `tl_dla`: the model's name, the unit, the rows' labels,
kinds and layers, the versions of the packages, and digests of the manifest and of all that the
shard holds. A file is written to a temporary one beside it and renamed when it is whole, so a file
that is there is complete, and a shard that is damaged is noticed.
"""

import json
import os
import re
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.files import aside
from tl_dla.datasets.manifest import FORMAT, digest, read_manifest, require_same
from tl_dla.errors import OutputFolderError
from tl_dla.model.stream import Kind

_KEY = b"tl_dla"
_DONE = ("complete.json", "errors.jsonl", "statistics.csv")
_ABANDONED = 3600  # seconds after which a temporary file is of no run that still writes it


@dataclass(frozen=True)
class RowNames:
    """The rows that every batch has, in order."""

    labels: tuple[str, ...]
    kinds: tuple[Kind, ...]
    layers: tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Line:
    """One example of a shard; `values` are its rows, `rest` the rows that only its batch has."""

    index: int
    example: str
    group: str | None
    prompt: str | None
    answer: int | None = None
    incorrect: list[int] | None = None
    n_tokens: int | None = None
    logit: float | None = None
    miss: float | None = None
    values: Float[Tensor, " row"] | None = None
    rest: dict[str, float] | None = None
    error: str | None = None


@dataclass(frozen=True, eq=False)
class Shard:
    """What one batch gave. `names` is None where none of its examples could be attributed."""

    lines: list[Line]
    names: RowNames | None

    def only(self, indices: Iterable[int]) -> "Shard":
        """The lines of these examples."""
        wanted = set(indices)
        return replace(self, lines=[line for line in self.lines if line.index in wanted])


class Folder:
    """An output folder that is this run's own, new or to be continued.

    Raises:
        OutputFolderError: for a folder of something else, of another run, or damaged.
    """

    def __init__(self, path: str | os.PathLike[str], manifest: dict[str, Any]) -> None:
        self.path, self.manifest = Path(path), manifest
        self.rows = self.path / "rows"
        if self.path.exists() and not self.path.is_dir():
            raise OutputFolderError(f"out must be a folder; {str(path)!r} is a file.")
        held = [] if not self.path.exists() else [p.name for p in self.path.iterdir()]
        held = [name for name in held if not name.endswith(".tmp")]
        # Asked after listing: of processes that start together, one may be writing it just now.
        if (self.path / "manifest.json").is_file():
            require_same(self.path, read_manifest(self.path), manifest)
        elif held:
            raise OutputFolderError(
                f"out must be new, empty or the folder of the same run; {str(path)!r} holds"
                f" {', '.join(sorted(held)[:3])} and no manifest.json: give another folder."
            )
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            _write(self.path / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        self.rows.mkdir(exist_ok=True)
        self._held, self._start = _spans(self.path), 0  # of earlier runs, and where to look

    def read(self, examples: Mapping[int, str]) -> Iterator[Shard]:
        """What is stored of these examples, given as their digests by index; each once.

        Windows are read in ascending order: shards before the lowest index are forgotten.

        Raises:
            OutputFolderError: where a shard is damaged, or of other examples.
        """
        low, high = min(examples), max(examples)
        while self._start < len(self._held) and self._held[self._start][1] < low:
            self._start += 1
        end = bisect_right(self._held, high, key=lambda span: span[0])
        wanted = set(examples)
        for _, last, path in self._held[self._start : end]:
            if last < low or not wanted:
                continue
            shard, about = read_shard(path)
            shard = shard.only(wanted)
            for line in shard.lines:
                other = about["manifest"] != digest(self.manifest)
                if other or line.example != examples[line.index]:
                    raise OutputFolderError(
                        f"{path.name} in {str(self.path)!r} holds rows of another example"
                        f" {line.index}: give another folder, or the same examples in the same"
                        " order (more may follow)."
                    )
            wanted -= {line.index for line in shard.lines}
            if shard.lines:
                yield shard

    def write(self, shard: Shard) -> None:
        """Store a batch: all of it or nothing."""
        for name in _DONE:  # of a run that had fewer examples
            (self.path / name).unlink(missing_ok=True)
        about = {
            "manifest": digest(self.manifest),
            "format": FORMAT,
            "model": self.manifest["model"]["name"],
            "unit": self.manifest["unit"],
            "labels": shard.names and shard.names.labels,
            "kinds": shard.names and shard.names.kinds,
            "layers": shard.names and shard.names.layers,
            "versions": self.manifest["versions"],
        }
        indices = [line.index for line in shard.lines]
        content = sha256(json.dumps([line.example for line in shard.lines]).encode()).hexdigest()
        name = f"{min(indices):09d}-{max(indices):09d}-{content[:12]}.parquet"
        write_shard(self.rows / name, shard, about)

    def finish(self, table: Any, skipped: list[tuple[int, str]], n: int) -> None:
        """Write what is written once all `n` examples are done, and clear what killed runs left."""
        lines = [json.dumps({"index": i, "error": reason}) + "\n" for i, reason in skipped]
        _write(self.path / "errors.jsonl", "".join(lines))
        _write(self.path / "statistics.csv", table.to_csv(index=False, lineterminator="\n"))
        _write(self.path / "complete.json", json.dumps({"examples": n}) + "\n")
        for folder in (self.path, self.rows):
            for left in folder.glob(".*.tmp"):
                try:  # those of other runs are theirs to rename
                    if time.time() - left.stat().st_mtime > _ABANDONED:
                        left.unlink()
                except FileNotFoundError:
                    continue


def completed(path: Path) -> int | None:
    """How many examples the finished run of an output folder had; None where none has finished.

    Raises:
        OutputFolderError: where the file that says so is damaged.
    """
    file = path / "complete.json"
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["examples"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise OutputFolderError(
            f"{str(file)!r} is damaged: delete it and repeat the call that wrote the folder."
        ) from error


def stored(path: Path, manifest: dict[str, Any], n: int | None) -> Iterator[Shard]:
    """What an output folder holds of the first `n` examples (None for all), each once, in order.

    One shard is in memory at a time.
    """
    seen: set[int] = set()
    for first, _, file in _spans(path):
        shard, about = read_shard(file)
        if about["manifest"] != digest(manifest):
            raise OutputFolderError(f"{str(file)!r} is of another run than its manifest.json.")
        shard = shard.only(
            line.index
            for line in shard.lines
            if line.index not in seen and (n is None or line.index < n)
        )
        # What comes later starts later: of what was seen, the rest can be forgotten.
        seen = {index for index in seen if index >= first} | {line.index for line in shard.lines}
        if shard.lines:
            yield shard


def _spans(path: Path) -> list[tuple[int, int, Path]]:
    """The first and last index of every shard, and its file, in order."""
    spans = []
    for file in sorted((path / "rows").glob("*.parquet")):
        span = re.match(r"(\d+)-(\d+)-", file.name)
        if span is None:
            raise OutputFolderError(f"{str(file)!r} is no shard of tl_dla: take it elsewhere.")
        spans.append((int(span[1]), int(span[2]), file))
    return spans


# ---- one shard ---------------------------------------------------------------------------------


def _schema(about: dict[str, Any]) -> Any:
    import pyarrow as pa

    columns = {
        "index": pa.int64(),
        "example": pa.string(),
        "group": pa.string(),
        "prompt": pa.string(),
        "answer": pa.int32(),
        "incorrect": pa.list_(pa.int32()),
        "n_tokens": pa.int32(),
        "logit": pa.float32(),
        "miss": pa.float32(),
        "rows": pa.list_(pa.float32()),
        "rest_labels": pa.list_(pa.string()),
        "rest": pa.list_(pa.float32()),
        "error": pa.string(),
    }
    return pa.schema(list(columns.items()), metadata={_KEY: json.dumps(about)})


def write_shard(path: Path, shard: Shard, about: dict[str, Any]) -> None:
    """Write a shard, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = shard.lines
    columns = {
        name: [getattr(line, name) for line in lines]
        for name in "index example group prompt answer incorrect n_tokens logit miss error".split()
    }
    columns["rows"] = [None if x.values is None else x.values.numpy() for x in lines]
    columns["rest_labels"] = [None if x.rest is None else list(x.rest) for x in lines]
    columns["rest"] = [None if x.rest is None else list(x.rest.values()) for x in lines]
    about = {**about, "content": _content(lines, about)}
    table = pa.Table.from_pydict(columns, schema=_schema(about))
    with aside(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", use_dictionary=False)


def read_shard(path: Path) -> tuple[Shard, dict[str, Any]]:
    """A shard and the metadata it was written with.

    Raises:
        OutputFolderError: where it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, partitioning=None)
        about = json.loads(table.schema.metadata[_KEY])
        lines = _lines(table)
        names = None
        if about["labels"] is not None:
            names = RowNames(*(tuple(about[key]) for key in ("labels", "kinds", "layers")))
        if about.pop("content") != _content(lines, about):
            raise ValueError("its content is not what was written")
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise OutputFolderError(
            f"{str(path)!r} is damaged or no shard of tl_dla ({str(error).splitlines()[0]}):"
            " delete that file to compute it again."
        ) from error
    return Shard(lines, names), about


def _lines(table: Any) -> list[Line]:
    """The lines of a table; `rows` by way of numpy, not number by number."""
    columns = table.drop_columns(["rows"]).to_pydict()
    labels, rest = columns.pop("rest_labels"), columns.pop("rest")
    columns["values"] = [
        torch.from_numpy(row.values.to_numpy(zero_copy_only=False).copy()) if row.is_valid else None
        for row in table.column("rows").combine_chunks()
    ]
    columns["rest"] = [
        None if names is None else dict(zip(names, values, strict=True))
        for names, values in zip(labels, rest, strict=True)
    ]
    return [
        Line(**dict(zip(columns, line, strict=True)))
        for line in zip(*columns.values(), strict=True)
    ]


def _content(lines: list[Line], about: dict[str, Any]) -> str:
    """The digest of all that a shard holds."""
    digest = sha256(json.dumps(about, sort_keys=True).encode())
    for line in lines:
        fields = {key: value for key, value in vars(line).items() if key != "values"}
        digest.update(json.dumps(fields, sort_keys=True).encode())
        digest.update(b"" if line.values is None else line.values.numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, text: str) -> None:
    with aside(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")

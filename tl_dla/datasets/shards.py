"""The output folder of a dataset run: what was computed, batch by batch, never to be lost.

    manifest.json                 the model, the unit and the options that the rows depend on
    rows/0000012-03.parquet       batch 3 of window 12: one line per example, in order of index
    errors.jsonl                  every example left out: its index and the reason
    statistics.csv                the table of `DatasetAttribution.to_dataframe()`

The last two are written when the run is complete. Columns of a shard:

    index         int64          the example's place in the dataset, from 0
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
kinds and layers, the versions of the packages, and digests of the manifest, of the batch's examples
and of all that the shard holds. A shard is written to a temporary file and renamed when it is
whole, so a shard that is there is complete, and one that is damaged is noticed.
"""

import json
import os
import platform
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.errors import OutputFolderError
from tl_dla.model.reader import Kind, is_bridge

FORMAT = 1
_KEY = b"tl_dla"


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
            self._require_same(read_manifest(self.path))
        elif held:
            raise OutputFolderError(
                f"out must be new, empty or the folder of the same run; {str(path)!r} holds"
                f" {', '.join(sorted(held)[:3])} and no manifest.json: give another folder."
            )
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            _write(self.path / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        self.rows.mkdir(exist_ok=True)

    def _require_same(self, held: dict[str, Any]) -> None:
        different = [
            key
            for key in {**held, **self.manifest}
            if key != "versions" and held.get(key) != self.manifest.get(key)
        ]
        if different:
            key = different[0]
            raise OutputFolderError(
                f"{str(self.path)!r} holds another run: its {key} is {held.get(key)!r}, not"
                f" {self.manifest.get(key)!r}: give another folder, or the same arguments."
            )

    def read(self, name: str, digest: str) -> Shard | None:
        """A batch that was computed before; None where it was not.

        Raises:
            OutputFolderError: where the shard is damaged or of other examples.
        """
        path = self.rows / f"{name}.parquet"
        if not path.exists():
            return None
        shard, about = read_shard(path)
        if (about["manifest"], about["examples"]) != (_digest(self.manifest), digest):
            raise OutputFolderError(
                f"{path.name} in {str(self.path)!r} holds rows of other examples: give another"
                " folder, or the same examples in the same order."
            )
        return shard

    def write(self, name: str, digest: str, shard: Shard) -> None:
        """Store a batch: all of it or nothing."""
        about = {
            "manifest": _digest(self.manifest),
            "examples": digest,
            "format": FORMAT,
            "model": self.manifest["model"]["name"],
            "unit": self.manifest["unit"],
            "labels": shard.names and shard.names.labels,
            "kinds": shard.names and shard.names.kinds,
            "layers": shard.names and shard.names.layers,
            "versions": self.manifest["versions"],
        }
        write_shard(self.rows / f"{name}.parquet", shard, about)

    def finish(self, table: Any, skipped: list[tuple[int, str]]) -> None:
        """Write what is written once the run is complete, and clear what killed runs left."""
        lines = [json.dumps({"index": i, "error": reason}) + "\n" for i, reason in skipped]
        _write(self.path / "errors.jsonl", "".join(lines))
        _write(self.path / "statistics.csv", table.to_csv(index=False, lineterminator="\n"))
        for folder in (self.path, self.rows):
            for left in folder.glob(".*.tmp"):
                left.unlink(missing_ok=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of an output folder.

    Raises:
        OutputFolderError: where there is none, or it cannot be read.
    """
    file = path / "manifest.json"
    if not file.is_file():
        raise OutputFolderError(f"{str(path)!r} is no output folder: it has no manifest.json.")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OutputFolderError(f"{str(file)!r} is damaged: {error}.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise OutputFolderError(f"{str(file)!r} is not of format {FORMAT}, which tl_dla writes.")
    return manifest


def stored(path: Path, manifest: dict[str, Any]) -> Iterator[Shard]:
    """Every shard of an output folder, in order, one in memory at a time."""
    for file in sorted((path / "rows").glob("*.parquet")):
        shard, about = read_shard(file)
        if about["manifest"] != _digest(manifest):
            raise OutputFolderError(f"{str(file)!r} is of another run than its manifest.json.")
        yield shard


# ---- one shard ---------------------------------------------------------------------------------


def _schema(about: dict[str, Any]) -> Any:
    import pyarrow as pa

    columns = {
        "index": pa.int64(),
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
        for name in "index group prompt answer incorrect n_tokens logit miss error".split()
    }
    columns["rows"] = [None if x.values is None else x.values.numpy() for x in lines]
    columns["rest_labels"] = [None if x.rest is None else list(x.rest) for x in lines]
    columns["rest"] = [None if x.rest is None else list(x.rest.values()) for x in lines]
    about = {**about, "content": _content(lines, about)}
    table = pa.Table.from_pydict(columns, schema=_schema(about))
    temporary = _temporary(path)
    pq.write_table(table, temporary, compression="zstd", use_dictionary=False)
    _rename(temporary, path)


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


def _digest(manifest: dict[str, Any]) -> str:
    """Of all that the rows depend on."""
    kept = {key: value for key, value in manifest.items() if key != "versions"}
    return sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _rename(temporary: Path, path: Path) -> None:
    """Give a written file its name once its bytes are on the disk."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _write(path: Path, text: str) -> None:
    temporary = _temporary(path)
    temporary.write_text(text, encoding="utf-8", newline="\n")
    _rename(temporary, path)


# ---- the manifest ------------------------------------------------------------------------------


def make_manifest(model: Any, **options: Any) -> dict[str, Any]:
    """What the rows depend on besides the examples, and the versions they were computed with."""
    versions = {
        name: metadata.version(name) for name in ("transformer-lens", "transformers", "torch")
    }
    parameters = list(model.parameters())
    about = {
        "name": _name(model),
        "class": type(model).__name__,
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "digest": model_digest(model),
    }
    return {
        "format": FORMAT,
        "model": about,
        **options,
        "versions": {**versions, "tl_dla": _own_version(), "python": platform.python_version()},
    }


def _name(model: Any) -> str:
    """The model's name; of a model loaded from a folder, the folder's own name."""
    name = str(getattr(model.cfg, "model_name", None) or type(model).__name__)
    return Path(name).name if Path(name).is_absolute() else name


def _own_version() -> str:
    try:
        return metadata.version("tl-dla")
    except metadata.PackageNotFoundError:  # run from the source, not installed
        return "unknown"


def model_digest(model: Any) -> str:
    """Of the model's configuration and all its parameters.

    The bits of each parameter are added up as integers, which is exact whatever the device or the
    number of threads, and changes with any edit of one weight.
    """
    config = model.original_model.config if is_bridge(model) else model.cfg
    settings = {
        key: str(value)
        for key, value in config.to_dict().items()
        if not key.startswith("_") and key not in _NOT_THE_MODEL
    }
    digest = sha256(json.dumps(settings, sort_keys=True).encode())
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta":  # offloaded: only its shape can be read cheaply
            bits = parameter.detach().contiguous().view(integers[parameter.element_size()])
            every = bits.flatten()
            some = every[:: max(1, len(every) // 64)].tolist()  # sees values that changed places
            digest.update(f"{int(every.sum(dtype=torch.int64))} {some}".encode())
    return digest.hexdigest()


_NOT_THE_MODEL = (
    "transformers_version",
    "device",
    "n_devices",
    "seed",
    "model_name",
    "torch_dtype",
)

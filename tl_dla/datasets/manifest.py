"""The manifest of an output folder: all that its rows depend on besides the examples.

The options of the call, and of the model a digest of its configuration, its weights and buffers,
the numbers its modules hold (a norm's epsilon), and the hooks on it. So a run that is continued
with another model is noticed, however small the difference; a forward method that was replaced by
hand is not.
"""

import inspect
import json
import platform
from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tl_dla.errors import OutputFolderError
from tl_dla.model.hooks import is_bridge

FORMAT = 2


def make_manifest(model: Any, **options: Any) -> dict[str, Any]:
    """What the rows depend on besides the examples, and the versions they were computed with."""
    versions = {
        name: metadata.version(name) for name in ("transformer-lens", "transformers", "torch")
    }
    about = {
        "name": _name(model),
        "class": type(model).__name__,
        "dtype": str(next(iter(model.parameters())).dtype).removeprefix("torch."),
        "digest": model_digest(model),
        "hooks": hooks_digest(model),
    }
    return {
        "format": FORMAT,
        "model": about,
        **options,
        "versions": {**versions, "tl_dla": _own_version(), "python": platform.python_version()},
    }


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


def require_same(path: Path, held: dict[str, Any], manifest: dict[str, Any]) -> None:
    """That a folder's manifest is this run's own.

    Raises:
        OutputFolderError: naming the first thing that differs.
    """
    theirs, ours = _flat(held), _flat(manifest)
    for key in {**theirs, **ours}:
        if theirs.get(key) != ours.get(key):
            raise OutputFolderError(
                f"{str(path)!r} holds another run: its {key} is {theirs.get(key)!r}, not"
                f" {ours.get(key)!r}: give another folder, or the same arguments."
            )


def _flat(manifest: dict[str, Any]) -> dict[str, Any]:
    model = {f"model's {key}": value for key, value in manifest["model"].items()}
    return {**model, **{k: v for k, v in manifest.items() if k not in ("model", "versions")}}


def digest(manifest: dict[str, Any]) -> str:
    """Of all that the rows depend on."""
    kept = {key: value for key, value in manifest.items() if key != "versions"}
    return sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _name(model: Any) -> str:
    """The model's name; of a model loaded from a folder, the folder's own name."""
    name = str(getattr(model.cfg, "model_name", None) or type(model).__name__)
    return Path(name).name if Path(name).is_absolute() else name


def _own_version() -> str:
    try:
        return metadata.version("tl-dla")
    except metadata.PackageNotFoundError:  # run from the source, not installed
        return "unknown"


# ---- the model ---------------------------------------------------------------------------------


def model_digest(model: Any) -> str:
    """Of the model's configuration, its parameters and buffers, and the numbers its modules hold.

    The same on every device, with any number of threads and from any folder.
    """
    inner = model.original_model if is_bridge(model) else model
    config = getattr(inner, "config", model.cfg)  # TransformerLens's own models have none beside
    settings = {
        key: str(value)
        for key, value in config.to_dict().items()
        if not key.startswith("_") and key not in _NOT_THE_MODEL
    }
    total = sha256(json.dumps(settings, sort_keys=True).encode())
    for name, parameter in model.named_parameters():
        total.update(f"{name} {_bits(parameter)}".encode())
    for name, module in model.named_modules():
        # Rotary frequencies that follow the last prompt's length are no property of the model.
        follows = str(getattr(module, "rope_type", "")).startswith(("dynamic", "longrope"))
        for key, buffer in module.named_buffers(recurse=False):
            if not (follows and key == "inv_freq"):
                total.update(f"{name}.{key} {_bits(buffer)}".encode())
        total.update(json.dumps([name, _numbers(module)], sort_keys=True).encode())
    return total.hexdigest()


_NOT_THE_MODEL = (
    "transformers_version",
    "device",
    "n_devices",
    "seed",
    "model_name",
    "torch_dtype",
)


def _bits(tensor: Tensor) -> str:
    """A tensor's shape, dtype and bits, added up as integers.

    That is exact whatever the device or the number of threads, and changes with any edit of one
    number.
    """
    about = f"{tuple(tensor.shape)} {tensor.dtype}"
    if tensor.device.type == "meta":  # offloaded: only its shape can be read cheaply
        return about
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().view(integers[tensor.element_size()]).flatten()
    some = bits[:: max(1, len(bits) // 64)].tolist()  # sees values that changed places
    return f"{about} {int(bits.sum(dtype=torch.int64))} {some}"


def _numbers(module: nn.Module) -> dict[str, str]:
    """What a module holds besides tensors and modules, such as a norm's epsilon."""
    return {
        key: str(value)
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str | tuple)
        and not key.startswith("_")
        and key not in ("context_level", "max_seq_len_cached")  # change as the model is used
    }


def hooks_digest(model: nn.Module) -> str | None:
    """Of the hooks that users put on a model: their code and what they hold. None without any."""
    own = {id(module): name for name, module in model.named_modules()}
    hooks = [
        [name, kind, _held(hook, own, {})]
        for name, module in model.named_modules()
        for kind in ("_forward_pre_hooks", "_forward_hooks")
        for hook in getattr(module, kind).values()
        # Both libraries put hooks of their own on a model when it first runs.
        if hasattr(module, "fwd_hooks") or not _is_of_a_library(hook)
    ]
    return sha256(json.dumps(hooks).encode()).hexdigest() if hooks else None


def _is_of_a_library(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(("transformers.", "transformer_lens."))


def _held(thing: Any, own: dict[int, str], seen: dict[int, Any]) -> Any:
    """A function's code and all that it holds, as far as Python shows it; `own` are the model's."""
    if id(thing) in own:
        return own[id(thing)]
    if isinstance(thing, Tensor):
        return _bits(thing)
    if isinstance(thing, np.ndarray):
        return sha256(thing.tobytes()).hexdigest()
    if thing is None or isinstance(thing, bool | int | float | complex | str | bytes):
        return repr(thing)
    if id(thing) in seen:
        return "itself"
    seen[id(thing)] = thing  # kept, so that no other thing gets its id
    parts: Any = [type(thing).__qualname__]
    if isinstance(thing, list | tuple):
        parts += thing
    elif isinstance(thing, Mapping):
        parts += [part for pair in thing.items() for part in pair]
    elif isinstance(thing, partial):
        parts += [thing.func, thing.args, thing.keywords]
    elif inspect.ismethod(thing):
        parts += [thing.__func__, thing.__self__]
    elif isinstance(thing, CodeType):
        parts += [thing.co_code, thing.co_names, thing.co_consts]
    elif inspect.isfunction(thing):
        held = inspect.getclosurevars(thing)
        values = {**held.nonlocals, **{k: v for k, v in held.globals.items() if _is_value(v)}}
        parts += [thing.__code__, thing.__defaults__, thing.__kwdefaults__, values]
    elif isinstance(thing, nn.Module):
        parts += [thing.state_dict(), _numbers(thing)]
    else:
        parts += [getattr(thing, "__dict__", {})]
    return [_held(part, own, seen) for part in parts]


def _is_value(thing: Any) -> bool:
    """Whether a global that a hook reads is data, not a module or a function of some library."""
    return isinstance(thing, Tensor | np.ndarray | bool | int | float | str | list | tuple | dict)

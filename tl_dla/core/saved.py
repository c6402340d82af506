"""A result as a file, and back: tensors as safetensors, everything else as JSON in its header.

A file holds no code and no weights, and of dictionaries their hooks alone. Of the model it keeps
the text of the result's tokens (`AbsentModel`), so a loaded result shows, plots and is indexed as
before; what needs the model asks for it.
"""

import dataclasses
import importlib
import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_dla.core.files import aside, place_for
from tl_dla.errors import ArgumentError
from tl_dla.inputs.query import Query

_FORMAT = 1
_HEADER = "tl_dla"


class Savable:
    """A result that is kept in a file, and pickled and copied, without its model."""

    @property
    def nbytes(self) -> int:
        """How many bytes of memory the result holds, the model aside."""
        return nbytes(self)

    def save(self, path: str | PathLike[str]) -> Path:
        """Keep the result in one file, without the model; `load_result` reads it again.

        Args:
            path: of the file, such as `"paris.safetensors"`; one that exists is replaced.

        Raises:
            ArgumentError: where there is no such folder.
        """
        from safetensors import torch as safetensors

        path = place_for(path, "result")
        tensors: dict[str, Tensor] = {}
        tree = {"format": _FORMAT, "result": _encoded(self, tensors)}
        header = {_HEADER: json.dumps(tree, separators=(",", ":"))}
        whole = safetensors.save(tensors, metadata=header)  # its `save_file` renames over a device
        with aside(path) as temporary:
            temporary.write_bytes(whole)
        return path

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and copied: the fields, and nothing that is computed from them."""
        return _fields(self)


def load(path: str | PathLike[str]) -> Any:
    """The result that `save` wrote, on the CPU and without its model.

    Raises:
        ArgumentError: for a file that is not there, is damaged, or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise ArgumentError(f"There is no file {str(path)!r} to load a result from.")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ArgumentError(f"{str(path)!r} is no saved result, or is damaged: {error}.") from error
    if _HEADER not in header:
        raise ArgumentError(f"{str(path)!r} holds tensors, but no result saved by result.save.")
    tree = json.loads(header[_HEADER])
    if tree["format"] != _FORMAT:
        raise ArgumentError(
            f"{str(path)!r} is a result of format {tree['format']}; this release reads {_FORMAT}."
        )
    try:
        return _decoded(tree["result"], tensors)
    except (TypeError, KeyError, ImportError) as error:
        raise ArgumentError(
            f"{str(path)!r} is a result of another release, or was changed: {error}."
        ) from error


def load_result(path: str | PathLike[str], model: Any = None) -> Any:
    """A result that was kept with `result.save(path)`.

    Args:
        path: the file, of an attribution, an answer's, or a comparison.
        model: the model that the result is of, for what runs it again; without it the result shows,
            plots and compares its numbers, and says so where it needs the model. A comparison runs
            none.

    Raises:
        ArgumentError: for a file that holds no result, or a model of other sizes.

    Example:
        >>> import tempfile
        >>> from tl_dla import direct_logit_attribution, load_model, load_result
        >>> model = load_model("demo")
        >>> result = direct_logit_attribution(model, "The Eiffel Tower is in the city of", " Paris")
        >>> path = result.save(f"{tempfile.mkdtemp()}/paris.safetensors")
        >>> load_result(path).top(1) == result.top(1)
        True
    """
    result = load(path)
    if model is None:
        return result
    if not hasattr(result, "with_model"):
        raise ArgumentError(f"A {type(result).__name__} runs no model: load it without one.")
    return result.with_model(model)


def nbytes(result: Any) -> int:
    """The bytes of all memory that a result's tensors keep alive, each counted once."""
    held: dict[int, int] = {}

    def visit(x: Any) -> None:
        if isinstance(x, Tensor):
            storage = x.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        elif isinstance(x, dict | list | tuple):
            for one in x.values() if isinstance(x, dict) else x:
                visit(one)
        elif dataclasses.is_dataclass(x):
            visit(vars(x))

    visit(result)
    return sum(held.values())


def _fields(x: Any) -> dict[str, Any]:
    kept = (own.name for own in dataclasses.fields(x) if own.metadata.get("saved", True))
    return {name: getattr(x, name) for name in kept}


def _encoded(x: Any, tensors: dict[str, Tensor]) -> Any:
    """As JSON: one key names what JSON cannot tell apart, or the class; tensors are set aside."""
    if x is None or isinstance(x, bool | int | float | str):
        return x
    if isinstance(x, Tensor):
        name = str(len(tensors))
        tensors[name] = x.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(x, Sequence) and not isinstance(x, tuple):
        return [_encoded(one, tensors) for one in x]
    if isinstance(x, dict):
        return {"dict": {key: _encoded(one, tensors) for key, one in x.items()}}
    if type(x) is tuple:
        return {"tuple": [_encoded(one, tensors) for one in x]}
    x = x.without_model() if isinstance(x, Query) else x
    if isinstance(x, tuple):  # a NamedTuple
        return {_name(x): [_encoded(one, tensors) for one in x]}
    if dataclasses.is_dataclass(x):
        return {_name(x): {name: _encoded(one, tensors) for name, one in _fields(x).items()}}
    raise TypeError(f"A {type(x).__name__} cannot be saved.")


def _decoded(x: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(x, list):
        return [_decoded(one, tensors) for one in x]
    if not isinstance(x, dict):
        return x
    ((name, inner),) = x.items()
    if name == "tensor":
        return tensors[inner]
    if name == "dict":
        return {key: _decoded(one, tensors) for key, one in inner.items()}
    if name == "tuple":
        return tuple(_decoded(one, tensors) for one in inner)
    cls = _class(name)
    if isinstance(inner, list):
        return cls(*(_decoded(one, tensors) for one in inner))
    return cls(**{key: _decoded(one, tensors) for key, one in inner.items()})


def _name(x: Any) -> str:
    return f"{type(x).__module__}:{type(x).__qualname__}"


def _class(name: str) -> Any:
    """A value class of this package, and of no other: a file runs no code."""
    module, _, own = name.partition(":")
    cls = None
    if module.startswith(f"{_HEADER}."):
        cls = getattr(importlib.import_module(module), own, None)
    values = isinstance(cls, type) and (dataclasses.is_dataclass(cls) or issubclass(cls, tuple))
    if not values:
        raise ArgumentError(f"The file names {name!r}, which this release does not know.")
    return cls

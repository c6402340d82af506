"""A device beside the CPU where there is none: what forgets to move a tensor fails here too.

    model = load.__wrapped__("gpt2").to(elsewhere())
    with without_float64(): ...                        as on Apple's devices

A tensor there holds one on the CPU, which computes. As on a GPU, tensors of both devices meet in a
copy alone; an index, and a number without axes, may come from the CPU.
"""

import contextlib
import functools
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from tl_dla.model import hooks

WAITS: list[str] = []  # what made the CPU wait for numbers of the device
_COPIES = ("_to_copy", "copy_")
_INDEXED = ("index", "index_put", "index_put_")


class Tensor(torch.Tensor):
    """A tensor that says it is elsewhere; `held` is where its numbers are."""

    has_float64 = True
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor, requires_grad: bool = False):
        if held.dtype == torch.float64 and not cls.has_float64:
            raise TypeError("there is no float64 elsewhere")
        own = dict(dtype=held.dtype, device=elsewhere(), requires_grad=requires_grad)
        place = dict(strides=held.stride(), storage_offset=held.storage_offset())
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, **place, **own)

    def __init__(self, held: torch.Tensor, requires_grad: bool = False) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return _run(op, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self) -> str:
        return f"elsewhere: {self.held}"


def _held(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.held
    return torch.device("cpu") if isinstance(x, torch.device) else x


def _run(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operation on what is held; what comes out is elsewhere if what went in was."""
    name = op._schema.name.partition("::")[2]
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = {id(x.held): x for x in given if isinstance(x, Tensor)}
    for x in given:
        index = name in _INDEXED and not x.is_floating_point()
        if there and name not in _COPIES and not isinstance(x, Tensor) and x.ndim and not index:
            raise RuntimeError(f"{name} was given {list(x.shape)} on the CPU, and others elsewhere")
    if there and (name == "_local_scalar_dense" or _leaves(name, kwargs.get("device"))):
        WAITS.append("".join(traceback.format_stack(limit=12)))
    if name == "histc":  # on a GPU it counts integers too
        args = (args[0].float(), *args[1:])
    out = op(*tree_map(_held, args), **tree_map(_held, kwargs))
    device = kwargs.get("device")
    if name == "copy_" or not (there if device is None else device.type == "elsewhere"):
        return args[0] if name == "copy_" else out

    def placed(x: Any) -> Any:
        return there.get(id(x), Tensor(x)) if isinstance(x, torch.Tensor) else x

    return tree_map(placed, out)


def _leaves(name: str, device: torch.device | None) -> bool:
    return name == "_to_copy" and device is not None and device.type == "cpu"


# What makes a tensor there without being given one; the others are written in terms of these.
_MAKERS = """
    copy_ _to_copy empty.memory_format empty_strided
    arange arange.start arange.start_step eye eye.m linspace
"""
_LIBRARIES: list[torch.library.Library] = []  # they end with their objects


@functools.cache
def elsewhere() -> torch.device:
    """The device; the test is skipped where PyTorch takes none from Python."""
    backend = pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(backend, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch takes no device from Python")
    backend._setup_privateuseone_for_python_backend("elsewhere")
    every, some = (torch.library.Library(name, "IMPL") for name in ("_", "aten"))
    _LIBRARIES.extend((every, some))
    every.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    for name in _MAKERS.split():
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        some.impl(name, functools.partial(_made, op), "PrivateUse1")
    return torch.device("elsewhere:0")


def _made(op: Any, *args: Any, **kwargs: Any) -> Any:
    return _run(op, args, kwargs)


def spread(model: torch.nn.Module, *, first: bool) -> torch.nn.Module:
    """A model of `transformers`: its first block lies elsewhere, or everything but that one.

    As accelerate spreads one over devices: what a part is given is brought to it.
    """
    path, blocks = next(
        (f"{outer}.{inner}", child)
        for outer, part in model.named_children()
        for inner, child in part.named_children()
        if isinstance(child, torch.nn.ModuleList)
    )
    start = [  # the embeddings, also as wte and wpe
        child
        for name, child in model.get_submodule(path.rpartition(".")[0]).named_children()
        if child is not blocks and ("embed" in name or name.startswith("w") or "rotary" in name)
    ]
    here, there = torch.device("cpu"), elsewhere()
    model.to(here if first else there)
    for part in [*start, blocks[0]]:
        part.to(there if first else here)
    for part in model.modules():
        if (weight := next(part.parameters(recurse=False), None)) is not None or part in blocks:
            device = weight.device if weight is not None else next(part.parameters()).device
            part.register_forward_pre_hook(functools.partial(_brought, device), with_kwargs=True)
    return model


def _brought(device: torch.device, _part: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    def bring(x: Any) -> Any:
        return x.to(device) if isinstance(x, torch.Tensor) else x

    return tree_map(bring, args), tree_map(bring, kwargs)


@contextlib.contextmanager
def without_float64() -> Iterator[None]:
    """As where a device has no float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "has_float64", False)
        patch.setattr(hooks, "_WITHOUT_FLOAT64", ("elsewhere",))
        yield

"""A place in the network, and parameters as they are stored.

The one module that knows how `HookedTransformer` and `TransformerBridge` name their hooks and wrap
their modules. Every reader of a part holds a `Hooks`.
"""

import copy
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_dla.errors import UnsupportedModelError

_ROWS_AT_ONCE = 1024  # of a quantised weight
_BLOCK = 2**18  # numbers of a weight, widened at once: 1 MiB, which stays in a core's cache
_FEW = 8  # directions, for which reading a weight is most of the work


@dataclass(frozen=True, eq=False)
class Site:
    """A place to read: a hook, or where there is none, what a module returns or is given.

    With `argument`, what the module is given under that keyword (which may be no tensor).
    """

    name: str
    module: nn.Module
    inputs: bool = False
    argument: str | None = None

    @property
    def hooked(self) -> bool:
        """Whether the place is a hook, which a cache can hold."""
        return hasattr(self.module, "fwd_hooks")


class Hooks:
    """The hooks of a model, by name.

    `map_eps` is the machine epsilon of the packed linear maps that were read so far.
    """

    map_eps = 0.0

    def __init__(self, model: Any) -> None:
        self.model = model
        self.by_name: Mapping[str, Any] = model.hook_dict
        self.is_bridge = is_bridge(model)

    @property
    def architecture(self) -> str:
        """What the model calls itself, for messages."""
        cfg = self.model.cfg
        return str(
            getattr(cfg, "architecture", None)
            or getattr(cfg, "original_architecture", None)
            or getattr(cfg, "model_name", None)
            or type(self.model).__name__
        )

    @cached_property
    def blocks(self) -> list[Any]:
        """The blocks, in order."""
        return list(self.model.blocks)

    @property
    def n_layers(self) -> int:
        """How many blocks the model has."""
        return len(self.blocks)

    def site(self, name: str) -> Site | None:
        """The hook of that name or alias, under its own name; None where there is none."""
        hook = self.by_name.get(name)
        return None if hook is None else Site(hook.name or name, hook)

    def matrix(self, module: Any, at: str, needed_for: str) -> tuple[Tensor, Tensor | None]:
        """A linear map's weight as `[in, out]`, and its bias.

        Raises:
            UnsupportedModelError: where the weight is no matrix and the module does not say what it
                maps; `needed_for` says what asked for it.
        """
        inner = unwrap(module)
        weight, bias = parameter(inner, "weight"), parameter(inner, "bias")
        if is_packed(inner) and (own := own_map(inner, self.model)) is not None:
            self.map_eps = max(self.map_eps, own[1])
            return own[0], bias
        if weight is None or weight.ndim != 2 or not weight.is_floating_point():
            raise self.refusal(
                f"{needed_for} needs the weight of {at} as a matrix, but {class_name(inner)} in"
                " {} holds it in another form",
                'unit="component" and unit="layer" work.',
            )
        return weight if class_name(inner) == "Conv1D" else weight.mT, bias

    def stored(self, module: Any, name: str, needed_for: str) -> Tensor:
        """A weight of a `HookedTransformer`, which stores its matrices by head.

        Raises:
            UnsupportedModelError: where it is packed, as `load_in_4bit` has it.
        """
        weight = getattr(module, name).detach()
        if not weight.is_floating_point():
            raise self.refusal(
                f"{needed_for} needs {name} as numbers, but {{}}, a HookedTransformer, packs it in"
                f" {weight.dtype}: wrap the model as load_model(hf_model, tokenizer)",
                'unit="component" and unit="layer" work.',
            )
        return weight

    def refusal(self, why: str, works: str) -> UnsupportedModelError:
        """The error for a part that is not understood; `{}` in `why` becomes the architecture."""
        return UnsupportedModelError(f"{why.format(self.architecture)}; {works}")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Contractions run in float64 for a float64 model, in float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def upcast(x: Tensor) -> Tensor:
    """The tensor in the dtype that contractions run in."""
    return x.to(compute_dtype(x.dtype))


def is_bridge(model: Any) -> bool:
    """Whether the model is a `TransformerBridge` (it wraps another) or a `HookedTransformer`."""
    return hasattr(model, "original_model")


def unwrap(module: Any) -> Any:
    """The module that a bridge component wraps, or the module itself."""
    return getattr(module, "original_component", None) or module


def class_name(module: Any) -> str:
    """The name of a module's class, for messages."""
    return type(module).__name__


def parameter(module: Any, name: str) -> Tensor | None:
    """A weight or bias as it is used now.

    Brought back from where `accelerate` offloaded it, and dequantised where a tensor class of its
    own keeps it quantised (torchao).
    """
    value = getattr(module, name, None)
    if not isinstance(value, Tensor):
        return None
    if value.device.type == "meta":
        from accelerate.utils import align_module_device

        with align_module_device(unwrap(module)):
            value = getattr(unwrap(module), name).clone()
    return (value.dequantize() if is_quantised(value) else value).detach()


def is_quantised(weight: Any) -> bool:
    """Whether a tensor class of its own keeps the weight quantised."""
    return isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize


def is_packed(module: Any) -> bool:
    """Whether a module holds its weight as anything but a matrix of numbers."""
    weight = getattr(module, "weight", None)
    is_matrix = isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point()
    return isinstance(weight, Tensor) and (is_quantised(weight) or not is_matrix)


def own_map(module: Any, model: Any) -> tuple[Tensor, float] | None:
    """A packed linear module's weight as `[in, out]`, and the machine epsilon of its kernel.

    The weight is dequantised by its own class (torchao), or it is what the module makes of each
    coordinate alone (bitsandbytes, GPTQ). The epsilon is measured on a few vectors: the kernel may
    round more than the model does, and what it reads as well. None where the module does not say
    how many numbers it reads.
    """
    n = getattr(module, "in_features", None)
    if not isinstance(n, int):
        return None
    bare = copy.copy(module)  # added and taken away again, a bias would cost digits
    bare._parameters = {**module._parameters, "bias": None}
    like = next(p for p in model.parameters() if p.is_floating_point())
    x = torch.randn(8, n, generator=torch.Generator().manual_seed(0))
    x = x.pow(3) / x.abs().max() ** 3  # as activations are, a few far larger
    known = parameter(module, "weight") if is_quantised(module.weight) else None
    rows = torch.cat([torch.zeros(1, n), x, *([torch.eye(n)] if known is None else [])])
    rows = rows.to(like.dtype) if like.is_meta else rows.to(like)
    with torch.no_grad():
        made = torch.cat([bare(part) for part in rows.split(_ROWS_AT_ONCE)])
        of_x, weight = (made[1:] - made[0]).tensor_split([len(x)])
        weight = weight if known is None else known.mT
        exact = upcast(rows[1 : len(x) + 1]) @ upcast(weight)
        miss = (upcast(of_x) - exact).norm() / exact.norm()
    return weight, 12**0.5 * float(miss)  # rounding is uniform, as in `core/rounding.py`


def product(
    weight: Float[Tensor, "place d"], directions: Float[Tensor, "*lead d"]
) -> Float[Tensor, "*lead place"]:
    """`weight · direction` for each direction, in the directions' dtype, where the weight lies.

    Reading the weight is most of the work where few tokens are attributed: it is read as it lies,
    and where it is stored in a narrower dtype, widened block by block, never as a whole.
    """
    (n_places, d), lead = weight.shape, directions.shape[:-1]
    directions = directions.reshape(-1, d).to(weight.device)
    by_rows = weight.stride(-1) == 1  # `nn.Linear` stores [d, place]
    if weight.dtype == directions.dtype:
        if by_rows and len(directions) <= _FEW:
            return (weight @ directions.mT).mT.contiguous().reshape(*lead, n_places)
        return (directions @ weight.mT).reshape(*lead, n_places)
    wrote = directions.new_zeros(len(directions), n_places)
    if by_rows or len(directions) > _FEW:
        for part in _blocks(n_places, d):
            wrote[:, part] = directions @ weight[part].to(directions).mT
    else:
        for part in _blocks(d, n_places):
            wrote.addmm_(directions[:, part], weight[:, part].mT.to(directions))
    return wrote.reshape(*lead, n_places)


def _blocks(n: int, width: int) -> list[slice]:
    step = max(1, _BLOCK // width)
    return [slice(start, start + step) for start in range(0, n, step)]


# Hooks live on the model, which threads may share: one pass at a time.
_LOCKS: "WeakKeyDictionary[Any, threading.RLock]" = WeakKeyDictionary()
_NEW_LOCK = threading.Lock()


@contextmanager
def alone_on(model: Any) -> Iterator[None]:
    """No other thread runs this model with hooks of this package meanwhile."""
    with _NEW_LOCK:
        lock = _LOCKS.setdefault(model, threading.RLock())
    with lock:
        yield

"""A place in the network, and parameters as they are stored.

The one module that knows how `HookedTransformer` and `TransformerBridge` name their hooks and wrap
their modules. Every reader of a part holds a `Hooks`.
"""

import copy
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_dla.errors import UnsupportedModelError
from tl_dla.model.sharded import (
    Shares,
    is_sharded,
    product_of_parts,
    shares,
    team,
    whole,
)

_ROWS_AT_ONCE = 1024  # of a quantised weight
# Numbers of a weight that are widened at once: 1 MiB, which stays in a core's cache; elsewhere each
# step has a price of its own.
_BLOCK, _BLOCK_ELSEWHERE = 2**18, 2**25
# Where processes share a model out: what leads out of a sublayer, and which hooks show a part.
_WAYS_OUT = ("o", "out", "dense_out")
_BY_HEAD = ("hook_pattern", "hook_attn_scores")
_VALUES = ("hook_v", "v.hook_out", "v_norm.hook_out")
_WITHOUT_FLOAT64 = ("mps",)
_FEW = 8  # directions, for which reading a weight is most of the work


@dataclass(frozen=True, eq=False)
class Site:
    """A place to read: a hook, or where there is none, what a module returns or is given.

    With `argument`, what the module is given under that keyword (which may be no tensor).
    `shares` says how processes share out what is shown, where they do.
    """

    name: str
    module: nn.Module
    inputs: bool = False
    argument: str | None = None
    shares: Shares | None = None

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
        if hook is None:
            return None
        name = hook.name or name
        return Site(name, hook, shares=self._shares(name) if self._in_parts else None)

    @cached_property
    def _in_parts(self) -> bool:
        return team(self.model) is not None

    def _shares(self, name: str) -> Shares | None:
        """How processes share out what a hook shows: attention by heads, an MLP by neurons."""
        found = re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(.+)", name)
        if found is None:
            return None
        layer, part, hook = int(found[1]), found[2], found[3]
        modules = getattr(self.blocks[layer]._modules.get(part), "_modules", {})
        out = next((modules[way] for way in _WAYS_OUT if way in modules), None)
        if out is None:
            return None
        weight, _ = self.matrix(out, name, "A model that processes share out", in_parts=True)
        if hook in _BY_HEAD:
            n_heads = self.n_heads(unwrap(self.blocks[layer]._modules[part]), weight.shape[0])
            return shares(weight, 1, False, n_heads, name)
        if hook in _VALUES and "v" in modules:
            return shares(weight, 2, True, int(unwrap(modules["v"]).out_features), name)
        is_given = hook == "hook_z" or hook in [f"{way}.hook_in" for way in _WAYS_OUT]
        return shares(weight, 2, True, weight.shape[0], name) if is_given else None

    def matrix(
        self, module: Any, at: str, needed_for: str, *, in_parts: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """A linear map's weight as `[in, out]`, and its bias.

        With `in_parts` a weight that processes share out is left as they hold it, for `product`,
        where they run each prompt together.

        Raises:
            UnsupportedModelError: where the weight is no matrix and the module does not say what it
                maps; `needed_for` says what asked for it.
        """
        inner = unwrap(module)
        in_parts = in_parts and self._in_parts
        weight, bias = parameter(inner, "weight", in_parts=in_parts), parameter(inner, "bias")
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

    def n_heads(self, inner: Any, width: int) -> int:
        """How many heads a wrapped attention has, whose mixed values are `width` wide together."""
        for name in ("v_head_dim", "head_dim"):
            d_head = getattr(inner, name, None)
            if isinstance(d_head, int) and d_head > 0 and width % d_head == 0:
                return width // d_head
        return int(self.model.cfg.n_heads)

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


def where_float64(x: Tensor) -> Tensor:
    """The tensor where there is float64: on the CPU if its device has none, as Apple's has not."""
    return x.cpu() if x.device.type in _WITHOUT_FLOAT64 else x


def in_float64(x: Tensor) -> Tensor:
    """The tensor in float64, wherever that is."""
    return where_float64(x).double()


def is_bridge(model: Any) -> bool:
    """Whether the model is a `TransformerBridge` (it wraps another) or a `HookedTransformer`."""
    return hasattr(model, "original_model")


def unwrap(module: Any) -> Any:
    """The module that a bridge component wraps, or the module itself."""
    return getattr(module, "original_component", None) or module


def class_name(module: Any) -> str:
    """The name of a module's class, for messages."""
    return type(module).__name__


def parameter(module: Any, name: str, *, in_parts: bool = False) -> Tensor | None:
    """A weight or bias as it is used now.

    Brought back from where `accelerate` offloaded it, dequantised where a tensor class of its own
    keeps it quantised (torchao), and brought together where processes share it out, unless it is
    read `in_parts`.
    """
    value = getattr(module, name, None)
    if not isinstance(value, Tensor):
        return None
    if value.device.type == "meta":
        from accelerate.utils import align_module_device

        with align_module_device(unwrap(module)):
            value = getattr(unwrap(module), name).clone()
    value = (value.dequantize() if is_quantised(value) else value).detach()
    return value if in_parts else whole(value)


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
    cpu = torch.device("cpu")  # whatever the default is
    x = torch.randn(8, n, generator=torch.Generator().manual_seed(0), device=cpu)
    x = x.pow(3) / x.abs().max() ** 3  # as activations are, a few far larger
    known = parameter(module, "weight") if is_quantised(module.weight) else None
    each = [torch.eye(n, device=cpu)] if known is None else []
    rows = torch.cat([torch.zeros(1, n, device=cpu), x, *each])
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
    if is_sharded(weight):
        return product_of_parts(weight, directions, product)
    (n_places, d), lead = weight.shape, directions.shape[:-1]
    directions = directions.reshape(-1, d).to(weight.device)
    by_rows = weight.stride(-1) == 1  # `nn.Linear` stores [d, place]
    if weight.dtype == directions.dtype:
        if by_rows and len(directions) <= _FEW:
            # A product with a vector takes one core, with a matrix all of them.
            columns = directions.repeat(2, 1) if len(directions) == 1 else directions
            found = (weight @ columns.mT).mT[: len(directions)].contiguous()
            return found.reshape(*lead, n_places)
        return (directions @ weight.mT).reshape(*lead, n_places)
    wrote = directions.new_zeros(len(directions), n_places)
    if by_rows or len(directions) > _FEW:
        for part in _blocks(weight, n_places, d):
            wrote[:, part] = directions @ weight[part].to(directions).mT
    else:
        for part in _blocks(weight, d, n_places):
            wrote.addmm_(directions[:, part], weight[:, part].mT.to(directions))
    return wrote.reshape(*lead, n_places)


def _blocks(weight: Tensor, n: int, width: int) -> list[slice]:
    step = max(1, (_BLOCK if weight.device.type == "cpu" else _BLOCK_ELSEWHERE) // width)
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


@contextmanager
def changed(model: Any, changes: Sequence[tuple[Site, Callable[[Any], Any]]]) -> Iterator[None]:
    """The model with a function at each place, which is given what the place shows.

    What it returns stands there instead; None leaves it. Hooks added inside see the change.
    """
    hooks = []
    with alone_on(model), ExitStack() as stack:
        for site, change in changes:
            if site.hooked:
                hooks.append((site.name, lambda x, hook, change=change: change(x)))
            else:
                handle = site.module.register_forward_hook(
                    lambda _module, _args, output, change=change: change(output)
                )
                stack.callback(handle.remove)
        with model.hooks(fwd_hooks=hooks):
            yield

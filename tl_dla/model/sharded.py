"""Weights and activations that several processes share out: tensor parallelism, and FSDP.

Such a weight is a `DTensor`, of which each process holds a part. Under FSDP each process may run
prompts of its own, and a weight is brought together to be read, as for a forward pass. Under tensor
parallelism the processes run each prompt together: a weight is multiplied where it lies, and
between them go directions alone; an activation of which a process has a part (its own heads'
values, its own neurons) is a plain tensor, and is brought together where it is read.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_dla.errors import ArgumentError, UnsupportedModelError

Product = Callable[[Tensor, Tensor], Tensor]


def is_sharded(weight: Any) -> TypeGuard[Any]:
    """Whether processes share a weight out: whether it is a `DTensor`, not imported to ask."""
    return hasattr(weight, "placements")


def are_sharded(model: Any) -> bool:
    """Whether processes share out any weight of a model."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return False  # without a look at each weight
    return any(map(is_sharded, model.parameters()))


def team(model: Any) -> Any:
    """The processes (a mesh) that run each prompt together; None for one, and under FSDP."""
    if not are_sharded(model):
        return None
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return None
    return next(weight for weight in model.parameters() if is_sharded(weight)).device_mesh


def require_same(model: Any, *question: Int[Tensor, "..."]) -> None:
    """Raise unless all processes that run a prompt together ask the same.

    Their activations are added up: other prompts would give numbers of none of them.
    """
    mesh = team(model)
    if mesh is None:
        return
    from torch.distributed.tensor import Shard

    told = repr([one.tolist() for one in question]).encode()
    mine = torch.tensor([zlib.crc32(told)], device=mesh.device_type)
    if len(_parts(mine, mesh, [Shard(0)] * mesh.ndim, [mesh.size()]).full_tensor().unique()) > 1:
        raise ArgumentError(
            "The processes that share the model out run each prompt together, and were given other"
            " prompts, positions or tokens: give all of them the same."
        )


def whole(weight: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """A weight with the parts of all processes."""
    return weight.full_tensor() if is_sharded(weight) else weight


def rows_of(
    weight: Float[Tensor, "place d"], ids: Int[Tensor, "*lead"]
) -> Float[Tensor, "*lead d"]:
    """Some rows of a weight, whichever processes hold them."""
    if is_sharded(weight):
        from torch.distributed.tensor import Replicate

        mesh = weight.device_mesh
        spread = _parts(ids, mesh, [Replicate()] * mesh.ndim, ids.shape)
        return whole(torch.nn.functional.embedding(spread, weight))
    return weight[ids]


def product_of_parts(
    weight: Float[Tensor, "place d"], directions: Float[Tensor, "*lead d"], product: Product
) -> Float[Tensor, "*lead place"]:
    """`product` of a sharded weight: each process multiplies its part, and the results are joined.

    A process that holds some places makes their numbers; one that holds some of d, a term of each.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    assert is_sharded(weight)
    mesh, how = weight.device_mesh, weight.placements
    if not all(type(one) in (Shard, Replicate) for one in how):
        return product(whole(weight), directions)
    by_d = [Shard(directions.ndim - 1) if one.is_shard(1) else Replicate() for one in how]
    same = _parts(directions, mesh, [Replicate()] * mesh.ndim, directions.shape)
    made = product(weight.to_local(), same.redistribute(placements=by_d).to_local())
    ends = {True: Shard(directions.ndim - 1), False: Replicate()}
    joined = [Partial() if one.is_shard(1) else ends[one.is_shard(0)] for one in how]
    return _parts(made, mesh, joined, (*directions.shape[:-1], len(weight))).full_tensor()


@dataclass(frozen=True, eq=False)
class Shares:
    """How processes share out an activation: each may have a part of one axis.

    Attributes:
        mesh: the processes.
        by: along which of its axes the activation is shared out.
        axis: the axis of which each has a part; `flat` takes it and all after it as one.
        width: of the axis, in all.
        name: of the place, for messages.
    """

    mesh: Any
    by: Sequence[bool]
    axis: int
    flat: bool
    width: int
    name: str

    def is_whole(self, x: Shaped[Tensor, "..."]) -> bool:
        """Whether this process has all of it."""
        return (x.shape[self.axis :].numel() if self.flat else x.shape[self.axis]) == self.width

    def whole(self, x: Shaped[Tensor, "..."], axis: int | None = None) -> Shaped[Tensor, "..."]:
        """The activation with the parts of all processes; `axis` says where it is, if moved."""
        axis = self.axis if axis is None else axis
        # TransformerLens shows a part of the heads as all of them, narrower.
        flat = x.flatten(axis) if self.flat else x
        if flat.shape[axis] == self.width:
            return x
        from torch.distributed.tensor import Replicate, Shard

        how = [Shard(axis) if by else Replicate() for by in self.by]
        shape = (*flat.shape[:axis], self.width, *flat.shape[axis + 1 :])
        return _parts(flat, self.mesh, how, shape).full_tensor()

    def require_whole(self, x: Shaped[Tensor, "..."], why: str, works: str) -> None:
        """Raise where this process has a part, numbered otherwise than the whole is."""
        if not self.is_whole(x):
            raise UnsupportedModelError(
                f"{why} where processes share the model out, each with its own part of {self.name};"
                f" {works}"
            )


def shares(weight: Any, axis: int, flat: bool, width: int, name: str) -> Shares | None:
    """How an activation is shared out that a weight is given in parts; None where it is whole."""
    by = [one.is_shard(0) for one in weight.placements] if is_sharded(weight) else []
    return Shares(weight.device_mesh, by, axis, flat, width, name) if any(by) else None


def _parts(x: Tensor, mesh: Any, how: Sequence[Any], shape: Sequence[int]) -> Any:
    """The `DTensor` of which `x` is this process's part."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    x = x.contiguous()
    return DTensor.from_local(x, mesh, how, run_check=False, shape=torch.Size(shape), stride=stride)

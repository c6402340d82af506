"""What multiplies a layer's mixed values before W_O, seen in the values themselves, and frozen."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from tl_dla.errors import UnsupportedModelError
from tl_dla.model.attention import Gate
from tl_dla.model.hooks import upcast

_GATES = (torch.sigmoid, functional.softplus, functional.silu)


def gate_factor(
    gate: Gate,
    shown: Float[Tensor, "batch pos ..."] | None,
    mixed: Float[Tensor, "batch pos head d_head"],
    z: Float[Tensor, "batch pos head d_head"],
    layer: int,
) -> Float[Tensor, "batch pos head #d_head"]:
    """The factor that takes `mixed` to `z`, with the gate at its value.

    Args:
        gate: an activation, or a norm over the mixed values.
        shown: what the gate's site shows; None for a norm.
        mixed: the values as the pattern mixes them.
        z: what W_O is given.
        layer: for the message.

    Raises:
        UnsupportedModelError: where no known gate does.
    """
    if gate.norm is not None:
        scale = gate.norm.scale_of(mixed.flatten(2))[..., None, None]
        gamma = torch.ones_like(z[0, 0]) if gate.norm.gamma is None else gate.norm.gamma
        factors = [gamma.to(z).reshape(z.shape[2:]) / scale]
    else:
        assert shown is not None
        x = upcast(shown)
        by_head = x.shape[-1] == z.shape[2]
        x = x[..., None] if by_head else x.flatten(2).unflatten(2, z.shape[2:])
        factors = [function(x) for function in _GATES]
    for factor in factors:
        if bool(((mixed * factor - z).abs().amax() <= 0.01 * z.abs().amax()).all()):
            return factor
    raise UnsupportedModelError(
        f"blocks.{layer}.attn multiplies what its heads mix by something that is not understood;"
        ' unit="head" works.'
    )

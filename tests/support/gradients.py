"""What the logit feels of each sublayer, by differentiation of a plain module with frozen norms.

    g = gradients(plain, tokens(), ANSWERS, INCORRECT)["1_mlp_out"]     # [batch, pos, d_model]

`g` is the derivative of the logit (difference) at a position by the sublayer's output there, every
scale, soft cap and multiplier held at its value. A part of the output is then worth `part @ g`.
"""

import torch
from torch import Tensor, nn

from tests.zoo.reference import _precision, differentiated


def gradients(
    model: nn.Module, tokens: Tensor, answer: Tensor, incorrect: Tensor
) -> dict[str, Tensor]:
    """By row; a sublayer that writes twice (its norm's bias) by its first write."""
    trace, _ = differentiated(model, tokens, answer, incorrect)
    found: dict[str, Tensor] = {}
    for write in trace.writes:
        if write.leaf.grad is not None:
            found.setdefault(write.label, write.leaf.grad.detach())
    return found


def inputs_of(model: nn.Module, modules: dict[str, nn.Module], tokens: Tensor) -> dict[str, tuple]:
    """What each module is given in a forward pass in the model's own precision."""
    seen: dict[str, tuple] = {}
    handles = [
        module.register_forward_pre_hook(lambda _m, args, name=name: seen.update({name: args}))
        for name, module in modules.items()
    ]
    try:
        with torch.no_grad(), _precision(model):
            model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return seen

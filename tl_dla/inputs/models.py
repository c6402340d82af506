"""The model at hand: what may be passed as one, and what a run needs of it."""

import os
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tl_dla.errors import ArgumentError
from tl_dla.model.hooks import is_bridge

# Rotary embeddings of `transformers` whose frequencies follow the longest prompt of the batch.
_ROPE_BY_LENGTH = ("dynamic", "longrope")
# Options of attention that follow the length of the prompt: of a `HookedTransformer`, of Qwen.
_BY_LENGTH = ("use_logn_attn", "use_dynamic_ntk_rope", "use_dynamic_ntk")
_SAY_LENGTH = frozenset({"rope_type", *_BY_LENGTH})


def require_model(model: Any) -> Any:
    """The model itself, taken out of the wrapper of `torch.compile` if it has one.

    Raises:
        ArgumentError: for anything but a `HookedTransformer` or a `TransformerBridge` with its
            weights, saying how to get one.
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, str | os.PathLike):
        raise ArgumentError(
            f"The model must be loaded; a name was given: model = load_model({os.fspath(model)!r})."
        )
    if not (hasattr(model, "cfg") and hasattr(model, "run_with_cache")):
        if hasattr(model, "config"):
            given = f"a {type(model).__name__} of transformers"
            remedy = "wrap it with model = load_model(hf_model, tokenizer=tokenizer)"
        else:
            given = "None" if model is None else f"a {type(model).__name__}"
            remedy = 'load one, such as model = load_model("demo")'
        raise ArgumentError(
            f"The model must be a HookedTransformer or a TransformerBridge; {given} was given:"
            f" {remedy}."
        )
    first = next(iter(model.parameters()), None)
    if first is not None and first.is_meta and offloaded_to(model) is None:
        raise ArgumentError(
            "The model's weights are on the meta device, where they hold no numbers: load it"
            ' with its weights, as by load_model(name, device="cpu").'
        )
    return model


def offloaded_to(model: Any) -> torch.device | None:
    """Where `accelerate` brings the weights that it offloads; None where it offloads none."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in (hook, *getattr(hook, "hooks", ())):  # several in a row
            if getattr(one, "offload", False):
                return torch.device(one.execution_device)
    return None


def require_eval(model: Any) -> None:
    """Raise unless every module is in evaluation mode.

    A `HookedTransformer` has no dropout, and `from_pretrained` leaves it in training mode; only
    attention that scales with the length of the prompt asks for the mode.
    """
    if not is_bridge(model) and not any(getattr(model.cfg, name, False) for name in _BY_LENGTH):
        return
    if any(module.training for module in model.modules()):
        where = next(name for name, module in model.named_modules() if module.training)
        left_out = (
            ", or, with TransformerLens 3.0 to 3.5, in which that leaves parts out: for module in"
            " model.modules(): vars(module)['training'] = False"
        )
        raise ArgumentError(
            f"The model is in training mode ({where or 'the model'}): dropout would change its"
            f" logits. Call model.eval() first{'.' if model.training else left_out}"
        )


def scales_with_length(model: Any) -> bool:
    """Whether attention depends on how long the longest prompt of a batch is, padding and all.

    Dynamic NTK and LongRoPE (Phi-3 with long contexts) choose the frequencies of all positions from
    that length, and log-n attention scales with it: there a prompt gives what it gives alone only
    in a batch of its own length.
    """
    config = getattr(getattr(model, "original_model", None), "config", None)
    for place in (model.cfg, config, *model.modules()):
        own = getattr(place, "__dict__", {})  # not getattr, which is slow where a module lacks it
        if _SAY_LENGTH.isdisjoint(own):
            continue
        if any(own.get(name) is True for name in _BY_LENGTH):
            return True
        kinds = own.get("rope_type")
        kinds = kinds.values() if isinstance(kinds, dict) else (kinds,)
        if any(kind in _ROPE_BY_LENGTH for kind in kinds):
            return True
    return False


def device_of(model: Any) -> torch.device:
    """Where tokens go: the device of the first weight, also where `accelerate` offloads that."""
    device = next(iter(model.parameters())).device
    return device if device.type != "meta" else offloaded_to(model) or torch.device("cpu")


def on_device(x: Any, device: torch.device) -> Any:
    """The same value with every tensor in it on a device."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, dict):
        return {key: on_device(one, device) for key, one in x.items()}
    if isinstance(x, tuple | list):
        moved = [on_device(one, device) for one in x]
        return type(x)(*moved) if hasattr(x, "_fields") else type(x)(moved)
    if is_dataclass(x) and not isinstance(x, type):
        kept = (own.name for own in fields(x) if own.init)
        return replace(x, **{name: on_device(getattr(x, name), device) for name in kept})
    return x

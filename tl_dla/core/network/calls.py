"""Attention layers run again alone, one at a time, where their patterns do not fit together.

A forward pass keeps what each layer's attention was given, `[batch, pos, d_model]` numbers. When
its turn comes on the way back, the layer runs once more and shows its mixed values and its pattern,
`[batch, head, pos, pos]` numbers, which are dropped after it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from tl_dla.core.taps import Kept, Tap
from tl_dla.inputs.query import Query
from tl_dla.model.hooks import alone_on
from tl_dla.model.reader import ModelReader

_PATTERNS_AT_ONCE = 2**28  # numbers: 1 GiB in float32


def patterns_fit(query: Query) -> bool:
    """Whether the patterns of all layers can be held together."""
    cfg, (batch, pos) = query.model.cfg, query.prompts.packed.shape
    return batch * pos**2 * cfg.n_heads * cfg.n_layers <= _PATTERNS_AT_ONCE


class Calls:
    """What the attention of each layer was given in a forward pass, to run it again.

    Args:
        reader: the model.
        layers: those that have attention.
    """

    def __init__(self, reader: ModelReader, layers: Sequence[int]) -> None:
        self.modules = {layer: reader.attention_module(layer) for layer in layers}
        self.given: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    @contextmanager
    def within(self, rows: slice) -> Iterator[None]:
        """Keep it while the model runs on some of the prompts."""

        def keep(layer: int, _module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
            # A store of keys and values would be added to by a second run.
            fresh = {name: None if isinstance(x, Cache) else x for name, x in kwargs.items()}
            fresh_args = tuple(None if isinstance(x, Cache) else x for x in args)
            self.given.setdefault(layer, []).append((fresh_args, fresh))

        with ExitStack() as stack:
            for layer, module in self.modules.items():
                hook = module.register_forward_pre_hook(partial(keep, layer), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def again(self, layer: int, taps: Sequence[Tap], query: Query) -> Kept:
        """What the taps show of a layer when its attention runs once more."""
        values: dict[Tap, list[Tensor]] = {tap: [] for tap in taps}

        def reader(tap: Tap) -> Callable[..., None]:
            def read(x: Tensor, **_: Any) -> None:
                shown = tap.read(tap.of(x, query.positions))
                assert isinstance(shown, Tensor)  # a mixture, a pattern
                values[tap].append(shown)

            return read

        hooks = [(tap.site.name, reader(tap)) for tap in taps]
        with alone_on(query.model), torch.no_grad(), query.model.hooks(fwd_hooks=hooks):
            for args, kwargs in self.given[layer]:
                self.modules[layer](*args, **kwargs)
        return Kept({tap: torch.cat(x) if len(x) > 1 else x[0] for tap, x in values.items()})

"""`Query`: a question made precise: which model, which prompts, which positions, which logits.

And how it is read from what a user gives.
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.inputs.absent import without_weights
from tl_dla.inputs.caches import read_cache, read_cached_prompts
from tl_dla.inputs.models import device_of, on_device, require_eval
from tl_dla.inputs.positions import Positions, read_positions
from tl_dla.inputs.targets import Answers, Targets, read_targets
from tl_dla.inputs.tokens import Input, Prompts, read_prompts, texts_of


@dataclass(frozen=True, eq=False)
class Query:
    """What is asked of a model.

    `include_bias` says whether its constants are rows of the answer; `has_batch` is False for a
    cache without a batch axis, whose answer has none either.
    """

    model: Any = field(repr=False)
    prompts: Prompts
    positions: Positions
    targets: Targets
    include_bias: bool = True
    has_batch: bool = True

    def without_model(self) -> "Query":
        """The same with what tables and figures need of the model in its place."""
        return replace(self, model=without_weights(self.model, self.prompts, self.targets.ids))

    def with_model(self, model: Any) -> "Query":
        """The same of this model, on its device."""
        placed = on_device({"prompts": self.prompts, "positions": self.positions}, device_of(model))
        return replace(self, model=model, **placed)

    def __getstate__(self) -> dict[str, Any]:
        """Pickled without the model's weights."""
        return vars(self.without_model())

    def __copy__(self) -> "Query":
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Query":
        """Of the same model, which is not copied."""
        own = {name: deepcopy(x, memo) for name, x in vars(self).items() if name != "model"}
        return Query(self.model, **own)

    def part(self, rows: slice | Int[Tensor, " row"]) -> "Query":
        """The same of some of the prompts, once or several times, padded as all of them are."""
        return replace(
            self,
            prompts=self.prompts.part(rows),
            positions=self.positions.part(rows),
            targets=self.targets.part(rows),
        )

    @property
    def has_tokens(self) -> bool:
        """Whether the prompts' tokens are known; a cache may have come without them."""
        return self.prompts.known

    def shaped(self, x: Float[Tensor, "*row batch pos candidate"]) -> Float[Tensor, "..."]:
        """As a result shows it: the axes asked for, NaN where a prompt has no such position."""
        x = torch.where(self.positions.valid.to(x.device)[..., None], x, torch.nan)
        x = x if self.targets.candidates is not None else x.squeeze(-1)
        axis = x.ndim - 1 - (self.targets.candidates is not None)
        x = self.positions.squeeze(x, axis)
        return x if self.has_batch else x.squeeze(axis - 1)

    def with_axes(self, x: Float[Tensor, "row ..."]) -> Float[Tensor, "row batch pos candidate"]:
        """The same with all its axes."""
        x = x if self.has_batch else x.unsqueeze(1)
        x = self.positions.unsqueeze(x, 2)
        return x if self.targets.candidates is not None else x[..., None]


def read_given(
    model: Any, input: Input | None, cache: Any, options: dict[str, Any]
) -> tuple[Prompts, Any]:
    """The prompts, and the cache where one is read; `options` as in `read_query`."""
    if cache is None:
        require_eval(model)
        return read_prompts(model, input, **options), None
    cache = read_cache(model, cache)
    return read_cached_prompts(model, input, cache, **options), cache


def read_query(
    model: Any,
    input: Input | None,
    answers: tuple[Answers | None, Answers | None, Any],
    pos: Any,
    cache: Any,
    include_bias: bool,
    options: dict[str, Any],
) -> tuple[Query, Any]:
    """Prompts, positions and targets made precise; and the cache, where one is read.

    Args:
        model: a model that was checked.
        input: prompts, which may be left out where a cache is given.
        answers: answer tokens, incorrect tokens, candidate tokens.
        pos: the positions.
        cache: as a user gave it, or None.
        include_bias: whether the model's constants are rows.
        options: of the prompts: `prepend_bos`, `attention_mask`.

    Raises:
        TokenError: for a prompt, answer or position that cannot be what was meant.
        ArgumentError: for other arguments that do not fit.
    """
    prompts, cache = read_given(model, input, cache, options)
    positions = read_positions(pos, prompts)
    targets = read_targets(model, *answers, len(prompts.tokens), positions, texts_of(input))
    has_batch = cache is None or cache.has_batch_dim
    return Query(model, prompts, positions, targets, include_bias, has_batch), cache

"""What a user asks of a model, as a `Query`, and of which prompts."""

from typing import Any

from tl_dla.inputs.caches import read_cache, read_cached_prompts
from tl_dla.inputs.models import require_eval
from tl_dla.inputs.positions import read_positions
from tl_dla.inputs.query import Query
from tl_dla.inputs.targets import Answers, read_targets
from tl_dla.inputs.tokens import Input, Prompts, read_prompts, texts_of


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

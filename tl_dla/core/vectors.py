"""`decompose`: what each row wrote, as vectors in the final residual stream.

Attribution with the identity as unembedding: a "token" for each coordinate of the stream. The rows
are those of `ActivationCache.decompose_resid`, `accumulated_resid(incl_mid=True)` and
`stack_head_results`, with the same labels, but on every model that attribution works on: heads pass
through the norm that follows their layer, everything passes through what later happens to the
stream itself (frozen), and what nothing explains is a `_rest` row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_dla.core.decomposition import Decomposition
from tl_dla.core.readout import Readout
from tl_dla.core.rows import RowKey
from tl_dla.core.taps import Kept, recall
from tl_dla.errors import ArgumentError
from tl_dla.inputs.caches import read_cached_prompts
from tl_dla.inputs.positions import Positions, read_positions
from tl_dla.inputs.query import Query
from tl_dla.inputs.selection import Selection, Unit, require_unit
from tl_dla.inputs.targets import NO_TARGETS
from tl_dla.model.reader import ModelReader
from tl_dla.model.stream import Kind


@dataclass(frozen=True, eq=False)
class ResidualStack:
    """Vectors in the final residual stream, one row per part of the model.

    `vectors, labels = stack` unpacks it, as TransformerLens's methods with `return_labels=True`.

    Attributes:
        vectors: `[row, *batch_and_pos, d_model]`; in the `component` and `head` units they add up
            to the final residual stream.
        keys: what each row is, as in `Attribution`, without its two bias rows, which are not in
            the stream.
    """

    vectors: Float[Tensor, "row *batch_and_pos d_model"]
    keys: list[RowKey]

    @property
    def labels(self) -> list[str]:
        """The rows' names."""
        return [key.label for key in self.keys]

    @property
    def kinds(self) -> list[Kind]:
        """What each row is."""
        return [key.kind for key in self.keys]

    @property
    def layers(self) -> list[int | None]:
        """Each row's layer."""
        return [key.layer for key in self.keys]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.vectors, self.labels))

    def __getitem__(self, label: str) -> Float[Tensor, "*batch_and_pos d_model"]:
        """One row, by its label."""
        if label not in self.labels:
            raise KeyError(f"No row {label!r}; the rows are {', '.join(self.labels[:4])}, ….")
        return self.vectors[self.labels.index(label)]


def vectors_of(
    reader: ModelReader, unit: Unit, selection: Selection | None = None
) -> Decomposition:
    """What is split into what, where rows are vectors of the final residual stream."""
    stream = reader.stream()
    weight = reader.model.W_U if stream.project_out is None else stream.project_out.mT
    identity = Readout.identity(weight)
    return Decomposition(reader, stream.steps, identity, [], unit, selection or Selection())


def stack_of(parts: Decomposition, kept: Kept, positions: Positions) -> ResidualStack:
    """The vectors, from what the taps of `vectors_of` kept."""
    rows = parts.rows(kept, positions)
    return ResidualStack(positions.squeeze(rows.values, 2), rows.keys)


def decompose(cache: Any, unit: Unit = "component", *, pos: Any = -1) -> ResidualStack:
    """What each row of `unit` wrote to the final residual stream.

    `result.readout.of(stack)` equals the attribution of the same run: with the norm's scale
    frozen, as `ActivationCache.logit_attrs` reads a stack.

    Args:
        cache: an `ActivationCache` with the hooks of `required_hooks(model, unit)`.
        unit: `"component"`, `"layer"` or `"head"`.
        pos: as in `direct_logit_attribution`; positions count from the start of the cache.

    Returns:
        A `ResidualStack`, in at least float32: rows × positions × d_model numbers.

    Raises:
        ArgumentError: for another unit.
        IncompleteCacheError: naming the hooks that the cache lacks.
        UnsupportedModelError: where the unit does not work on the model.

    Example:
        >>> from tl_dla import decompose, load_model
        >>> model = load_model("demo")
        >>> _, cache = model.run_with_cache("The Eiffel Tower is in the city of")
        >>> stack = decompose(cache)
        >>> stack.labels[:3]
        ['embed', 'pos_embed', '0_attn_out']
    """
    require_unit(unit)
    if unit not in ("component", "layer", "head"):
        raise ArgumentError(
            f'decompose gives vectors for unit "component", "layer" or "head"; {unit!r} was given.'
        )
    reader = ModelReader(cache.model)
    prompts = read_cached_prompts(cache.model, None, cache)
    positions = read_positions(pos, prompts)
    parts = vectors_of(reader, unit)
    query = Query(cache.model, prompts, positions, NO_TARGETS)
    return stack_of(parts, recall(reader, cache, query, parts.taps), positions)

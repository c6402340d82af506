"""`decompose`: what each row wrote, as vectors in the final residual stream.

Attribution with the identity as unembedding: a "token" for each coordinate of the stream. The rows
are those of `ActivationCache.decompose_resid`, `accumulated_resid(incl_mid=True)` and
`stack_head_results`, with the same labels, but on every model that attribution works on: heads pass
through the norm that follows their layer, everything passes through what later happens to the
stream itself (frozen), and what nothing explains is a `_rest` row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_dla.core.decomposition import Decomposition
from tl_dla.core.readout import Readout
from tl_dla.core.rows import Keyed, RowKey
from tl_dla.core.taps import Kept, Tap, exact, recall
from tl_dla.errors import ArgumentError, UnsupportedModelError
from tl_dla.inputs.caches import read_cached_prompts, require_cache
from tl_dla.inputs.positions import Positions, read_positions
from tl_dla.inputs.query import Query
from tl_dla.inputs.selection import Selection, Unit, require_unit
from tl_dla.inputs.targets import NO_TARGETS
from tl_dla.model.norms import Norm
from tl_dla.model.reader import ModelReader
from tl_dla.model.stream import ResidPoint, Step
from tl_dla.model.unembedding import unembed_matrix


@dataclass(frozen=True, eq=False)
class ResidualStack(Keyed):
    """Vectors in the final residual stream, one row per part of the model.

    `vectors, labels = stack` unpacks it, as TransformerLens's methods with `return_labels=True`.

    Attributes:
        vectors: `[row, *batch_and_pos, d_model]`; in the `component` and `head` units they add up
            to the final residual stream.
        keys: what each row is, as in `Attribution`, without its two bias rows, which are not in
            the stream.
    """

    vectors: Float[Tensor, "row *batch_and_pos d_model"]
    keys: Sequence[RowKey]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.vectors, self.labels))

    def only(self, rows: Sequence[int]) -> "ResidualStack":
        """Some of the rows."""
        return ResidualStack(self.vectors[list(rows)], [self.keys[row] for row in rows])

    def __getitem__(self, label: str) -> Float[Tensor, "*batch_and_pos d_model"]:
        """One row, by its label."""
        return self.vectors[self.index(label)]


def vectors_of(
    reader: ModelReader,
    unit: Unit,
    selection: Selection | None = None,
    steps: Sequence[Step] | None = None,
) -> Decomposition:
    """What is split into what, where rows are vectors of the stream at its end.

    `steps` lead to an earlier end; by default they are all steps.
    """
    stream = reader.stream()
    weight = unembed_matrix(reader.model) if stream.project_out is None else stream.project_out.mT
    about = (unit, selection or Selection(), steps is None)
    return Decomposition(reader, steps or stream.steps, Readout.identity(weight), [], *about)


def stack_of(parts: Decomposition, kept: Kept, positions: Positions) -> ResidualStack:
    """The vectors, from what the taps of `vectors_of` kept."""
    rows = parts.rows(kept, positions)
    return ResidualStack(positions.squeeze(rows.values, 2), rows.keys)


# ---- of a cache --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CachePlace:
    """A place that reads the stream, in a cache: the input of a layer, or of the final norm.

    Attributes:
        cache: an `ActivationCache`.
        layer: whose input it is; the number of layers for the final norm's.
        mlp_input: whether it is what the layer's MLP reads, not its attention.
        query: the cache's prompts at the positions asked for.
    """

    cache: Any
    layer: int
    mlp_input: bool
    query: Query
    reader: ModelReader

    @staticmethod
    def of(cache: Any, layer: int | None, mlp_input: bool, pos: Any) -> "CachePlace":
        """Read a layer as `ActivationCache` does: -1 and None are the final norm's input.

        Raises:
            ArgumentError: for what is no cache, or a layer that the model does not have.
        """
        require_cache(cache)
        reader = ModelReader(cache.model)
        n = reader.n_layers
        end = n if layer in (None, -1) else layer
        if isinstance(end, bool) or not isinstance(end, int) or not 0 <= end <= n:
            raise ArgumentError(
                f"layer must be 0 to {n} ({n}, -1 and None are the final norm's input); {layer!r}"
                " was given."
            )
        if mlp_input and end == n:
            raise ArgumentError("mlp_input is for the input of a layer: give layer= as well.")
        prompts = read_cached_prompts(cache.model, None, cache)
        positions = read_positions(pos, prompts)
        query = Query(cache.model, prompts, positions, NO_TARGETS, True, cache.has_batch_dim)
        return CachePlace(cache, end, mlp_input, query, reader)

    @property
    def is_final(self) -> bool:
        """Whether the final norm reads here."""
        return self.layer == self.reader.n_layers

    def steps(self) -> list[Step]:
        """The steps of the stream up to here.

        Raises:
            UnsupportedModelError: where the model does not show the stream here.
        """
        steps = list(self.reader.stream().steps)
        if self.is_final:
            return steps
        parallel = self.reader.parallel(self.layer)  # its MLP reads what its attention does
        place = (self.layer, "mid" if self.mlp_input and not parallel else "pre")
        for i, step in enumerate(steps):
            if isinstance(step, ResidPoint) and (step.layer, step.name) == place:
                return [*steps[:i], replace(step, block=True)]
        raise UnsupportedModelError(
            f"{self.reader.architecture} does not show its stream at {place[0]}_{place[1]}."
        )

    def norm(self) -> Norm | None:
        """The norm that reads the stream here; None where nothing is in between."""
        if self.is_final:
            return self.reader.final_norm()
        find = self.reader.mlp_norm if self.mlp_input else self.reader.attention_norm
        return find(self.layer)

    def scale(self, norm: Norm) -> Float[Tensor, "*batch_and_pos"]:
        """The norm's scale in the run that was cached."""
        tap = Tap(norm.site, norm.scale)
        return self.squeeze(recall(self.reader, self.cache, self.query, [tap])[tap])

    def squeeze(self, x: Float[Tensor, "batch pos *d"]) -> Float[Tensor, "..."]:
        """Without the position that was asked for, and the batch that the cache has not."""
        x = self.query.positions.squeeze(x)
        return x if self.query.has_batch else x.squeeze(0)

    def stack(self, unit: Unit, selection: Selection) -> ResidualStack:
        """What wrote to the stream up to here."""
        steps = None if self.is_final else self.steps()
        parts = vectors_of(self.reader, unit, selection, steps)
        with exact():
            rows = stack_of(
                parts,
                recall(self.reader, self.cache, self.query, parts.taps),
                self.query.positions,
            )
        return rows if self.query.has_batch else replace(rows, vectors=rows.vectors.squeeze(1))


def decompose(
    cache: Any,
    unit: Unit = "component",
    *,
    pos: Any = -1,
    pos_slice: Any = ...,
    layer: int | None = None,
    mlp_input: bool = False,
    incl_mid: bool = True,
    incl_remainder: bool = False,
    apply_ln: bool = False,
    return_labels: bool = False,
) -> ResidualStack:
    """What each row of `unit` wrote to the residual stream, as vectors at the end of it.

    `result.readout.of(stack)` equals the attribution of the same run: with the norm's scale
    frozen, as `ActivationCache.logit_attrs` reads a stack. The options are those of
    `ActivationCache`'s `decompose_resid`, `accumulated_resid` and `stack_head_results`.

    Args:
        cache: an `ActivationCache` with the hooks of `required_hooks(model, unit)`.
        unit: `"component"`, `"layer"` or `"head"`.
        pos: as in `direct_logit_attribution`; positions count from the start of the cache.
        pos_slice: TransformerLens's name for `pos`.
        layer: the stream that this layer reads; the final norm's input by default, as for -1.
        mlp_input: with `layer`: the stream that its MLP reads, not its attention.
        incl_mid: for `unit="layer"`: also between attention and MLP.
        incl_remainder: for `unit="head"`: everything but the heads as one row, `remainder`.
        apply_ln: through the norm that reads the stream there, its scale frozen: centred where it
            centres, divided, times γ. Its β is no part of any row.
        return_labels: as TransformerLens's methods take it; with it or without, the result unpacks
            into vectors and labels.

    Returns:
        A `ResidualStack`, in at least float32: rows × positions × d_model numbers.

    Raises:
        ArgumentError: for another unit, or a layer that the model does not have.
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
    place = CachePlace.of(cache, layer, mlp_input, pos if pos_slice is ... else pos_slice)
    stack = place.stack(unit, Selection(remainder=unit == "head" and incl_remainder))
    if unit == "layer" and not incl_mid:
        last = len(stack.keys) - 1
        stack = stack.only(
            [i for i, key in enumerate(stack.keys) if key.name != "mid" or i == last]
        )
    norm = place.norm() if apply_ln else None
    if norm is not None:
        stack = replace(stack, vectors=norm.through(stack.vectors, place.scale(norm)))
    return stack

"""`LabelledRows`: the rows of a result, what each is, and what they add up to."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from tl_dla.core.certificate import Reconstruction
from tl_dla.core.numbers import Hop, Numbers, Subject
from tl_dla.core.rows import Keyed, RowKey
from tl_dla.core.tidy import target_words
from tl_dla.errors import ArgumentError
from tl_dla.inputs.absent import AbsentModel
from tl_dla.inputs.positions import Positions
from tl_dla.inputs.query import Query
from tl_dla.inputs.selection import Selection, Unit
from tl_dla.inputs.targets import Targets
from tl_dla.inputs.tokens import Prompts


@dataclass(frozen=True, eq=False, repr=False)
class LabelledRows(Keyed):
    """Rows under their labels, what they add up to, and the question that they answer.

    Attributes:
        values: every row with all its axes, `[row, batch, pos, candidate]`; `attribution` is the
            view of it with the axes that were asked for.
        keys: what each row is.
        unit: the unit asked for.
        reconstruction: the certificate that the rows add up to the model's own logit.
        query: the question: model, prompts, positions, targets.
        selection: which rows are split.
        numbers: the same token by token, before the tokens are added up.
        hops: the heads and source tokens whose row the rows split, in a result of
            `attribute_path`; `logit` is then what the last of them moved.
        subject: what the rows add up to where it is no logit, as in `attribute_attention`.
        mean_over: what the values are the mean over, in words, in a result of `mean`.
    """

    values: Float[Tensor, "row batch pos candidate"]
    keys: Sequence[RowKey]
    unit: Unit | Literal["input"]
    reconstruction: Reconstruction
    query: Query
    selection: Selection
    numbers: Numbers = field(repr=False)
    hops: tuple[Hop, ...] = ()
    subject: Subject | None = None
    mean_over: str = ""

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.values):
            raise ArgumentError(
                f"Every row needs a key; {len(self.values)} rows and {len(self.keys)} keys were"
                " given."
            )

    # ---- rows -----------------------------------------------------------------------------------

    @cached_property
    def attribution(self) -> Float[Tensor, " row *batch_and_pos"]:
        """`[row, *batch_and_pos]`, with a last axis `candidate` for `candidate_tokens`.

        NaN where a prompt has no such position.
        """
        return self.query.shaped(self.values)

    @property
    def logit(self) -> Float[Tensor, "*batch_and_pos"]:
        """What the rows add up to: the model's own logit, or logit difference."""
        return self.reconstruction.expected

    @property
    def path(self) -> tuple[str, ...]:
        """The source rows that the rows split, in a result of `attribute_path`."""
        return tuple(hop.label for hop in self.hops)

    @property
    def model(self) -> Any:
        """The model attributed."""
        return self.query.model

    @property
    def prompts(self) -> Prompts:
        """The prompts, as tokens."""
        return self.query.prompts

    @property
    def positions(self) -> Positions:
        """The positions attributed."""
        return self.query.positions

    @property
    def targets(self) -> Targets:
        """The target tokens, and how their logits are added up."""
        return self.query.targets

    @property
    def include_bias(self) -> bool:
        """Whether `ln_final.b` and `b_U` are rows."""
        return self.query.include_bias

    @property
    def has_tokens(self) -> bool:
        """Whether the prompts' tokens are known; a cache may have come without them."""
        return self.query.has_tokens

    @property
    def alone(self) -> str:
        """Why the model was not, or cannot be, run for more than these rows; empty where it can."""
        if self.mean_over:
            return f"A mean over {self.mean_over}"
        if self.hops:
            return f"A path through {', '.join(self.path)}"
        if isinstance(self.model, AbsentModel):
            return "Without its model"
        return "" if self.numbers.ran else "Made from a cache"

    def __getitem__(self, label: str) -> Float[Tensor, "*batch_and_pos"]:
        """One row, by its label."""
        return self.attribution[self.index(label)]

    @property
    def heads(self) -> Float[Tensor, "layer head *batch_and_pos"]:
        """The head rows by layer and head; 0 where a layer has fewer heads or none.

        Raises:
            ArgumentError: where the result has no head rows.
        """
        require_heads(self)
        found = [
            (i, key.layer, key.index)
            for i, key in enumerate(self.keys)
            if key.kind == "head" and key.layer is not None and key.index is not None
        ]
        rows, layers, heads = map(list, zip(*found, strict=True))
        n_layers = getattr(self.model.cfg, "n_layers", max(layers) + 1)  # numbers alone: as named
        shape = (n_layers, max(heads) + 1, *self.attribution.shape[1:])
        grid = self.attribution.new_zeros(shape)
        grid[layers, heads] = self.attribution[rows]
        return grid

    @property
    def target(self) -> str:
        """What is attributed, in words: `' Paris' − ' London'`."""
        return target_words(self.query) if self.subject is None else self.subject.target

    @property
    def total(self) -> str:
        """What the rows add up to, in words."""
        if self.hops:
            return f"row {self.path[-1]}"
        if self.subject is not None:
            return self.subject.total
        return "model's own logit" if self.include_bias else "logit without biases"

    @property
    def what(self) -> str:
        """What the rows are parts of, in a word: a `logit`."""
        return "logit" if self.subject is None else self.subject.what

    @property
    def units(self) -> str:
        """What the rows are in: `logits`."""
        return "logits" if self.subject is None else self.subject.units

    # ---- candidates ----------------------------------------------------------------------------

    @property
    def common(self) -> Float[Tensor, "row ..."]:
        """The part of each row that all candidates share: its mean over them.

        Raises:
            ArgumentError: for a result without candidates.
        """
        if self.targets.candidates is None:
            raise ArgumentError("Only a result over candidate_tokens has a part that they share.")
        return self.attribution.mean(-1)

    @property
    def contrast(self) -> Float[Tensor, "row ... candidate"]:
        """What each row says of each candidate and not of all: the row less `common`."""
        return self.attribution - self.common[..., None]

    @property
    def contrast_values(self) -> Float[Tensor, "row batch pos candidate"]:
        """`contrast` with all its axes."""
        return self.query.with_axes(self.contrast)


def require_result(result: Any) -> None:
    """Raise `ArgumentError` unless it is a result."""
    if not isinstance(result, LabelledRows):
        raise ArgumentError(
            f"The result must be one of direct_logit_attribution; a {type(result).__name__} was"
            " given."
        )


def require_direct(result: LabelledRows) -> None:
    """Raise unless it is a result whose rows were written at the attributed positions."""
    require_result(result)
    if result.hops:
        raise ArgumentError(
            "The rows of a path were written at its source token and read by a head"
            f" ({', '.join(result.path)}), not at the attributed position: ask this of the result"
            " that the path starts from."
        )


def require_rows(result: LabelledRows, rows: Sequence[str]) -> list[str]:
    """These rows of the result; raise unless each is one of it, and there is one."""
    if isinstance(rows, str) or not list(rows):
        raise ArgumentError(f"Give a list of the labels of rows; got {rows!r}.")
    for row in rows:
        result.index(row)  # an unknown label has its own message
    return list(rows)


def require_heads(result: LabelledRows) -> None:
    """Raise unless the result has head rows."""
    require_result(result)
    if "head" not in result.kinds:
        raise ArgumentError(
            f'A unit="{result.unit}" result has no head rows: attribute with unit="head".'
        )

"""`erasures`: how much of what a row wrote later rows remove again.

What a row wrote, a, is read off the stream at the end, where later rows b may have taken it out.
The projection ratio of a later write on the earlier one,

    ratio = ⟨b, a⟩ / ⟨a, a⟩,        b = ratio · a + (a part at right angles to a)

is −1 where the later row erases all of it, +1 where it writes the same again. Read out, b's part
along a is worth `ratio × row` logits, and 1 + Σ ratio over all later rows says how much of the
write is left at the end. Vectors are those of the final residual stream (through post-norms,
frozen), centred where the final norm centres. Over prompts and positions, an eraser's row is
anticorrelated with its writer's.

Writing and erasing as in Janiak et al. 2023 (https://arxiv.org/abs/2310.07325), an adversarial
example for direct logit attribution: both rows are large, and their sum is what matters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_dla.core.labelled import require_direct, require_rows
from tl_dla.core.result import Attribution
from tl_dla.core.rows import RowKey
from tl_dla.core.vectors import ResidualStack
from tl_dla.effects.recomputed import written
from tl_dla.errors import ArgumentError
from tl_dla.model.reader import ModelReader

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_NO_WRITERS = ("bias", "rest", "residual")


@dataclass(frozen=True, eq=False, repr=False)
class Erasures:
    """Earlier writes against later ones.

    Attributes:
        writers: the earlier rows.
        labels: all rows.
        ratio: projection ratio of each row on each writer, `[writer, row, *batch_and_pos]`; 0 where
            the row is not later than the writer.
        later: which rows are later than which writers, `[writer, row]`.
        direct: the rows' direct effects in logits, `[row, *batch_and_pos]`.
        norm: the length of what each writer wrote, `[writer, *batch_and_pos]`.
    """

    writers: list[str]
    labels: list[str]
    ratio: Float[Tensor, "writer row *batch_and_pos"]
    later: Bool[Tensor, "writer row"]
    direct: Float[Tensor, " row *batch_and_pos"]
    norm: Float[Tensor, " writer *batch_and_pos"]

    @property
    def left(self) -> Float[Tensor, " writer *batch_and_pos"]:
        """How much of each write is left along its own direction after all later rows.

        1 for all of it, 0 for none, above 1 where later rows write it again.
        """
        return 1 + self.ratio.sum(1)

    @property
    def logits(self) -> Float[Tensor, "writer row *batch_and_pos"]:
        """What each later row writes along the writer's direction, in logits.

        ratio × the writer's row: opposite to it where the later row erases.
        """
        rows = [self.labels.index(writer) for writer in self.writers]
        return self.ratio * self.direct[rows][:, None]

    @property
    def correlation(self) -> Float[Tensor, "writer row"]:
        """Correlation of the pair's rows over prompts and positions; NaN for fewer than three."""
        rows = [self.labels.index(writer) for writer in self.writers]
        samples = self.direct.reshape(len(self.labels), -1)
        samples = samples[:, ~samples.isnan().any(0)]
        if samples.shape[1] < 3:
            return torch.full(self.later.shape, torch.nan, device=self.later.device)
        return torch.corrcoef(samples)[rows]

    def to_dataframe(self) -> "pd.DataFrame":
        """Writers and erasers, the pair that removes most logits first.

        Every number is a mean over prompts and positions. Columns: `writer`, `eraser`,
        `projection_ratio`, `logits` (what the eraser writes along the writer's direction), `norm`
        (the same in residual norm), `writer_direct`, `eraser_direct`, `net` (their sum),
        `correlation`.
        """
        import pandas as pd

        ratio, logits = _means(self.ratio), _means(self.logits)
        norm = _means(self.ratio * self.norm[:, None])
        direct = self.direct.reshape(len(self.labels), -1).nanmean(-1)
        correlation = self.correlation
        pairs = (self.later & (ratio < 0)).nonzero().tolist()
        pairs.sort(key=lambda pair: -abs(float(logits[pair[0], pair[1]])))
        lines = []
        for i, j in pairs:
            own = float(direct[self.labels.index(self.writers[i])])
            of_pair = (float(x[i, j]) for x in (ratio, logits, norm))
            both = (own, float(direct[j]), own + float(direct[j]), float(correlation[i, j]))
            lines.append((self.writers[i], self.labels[j], *of_pair, *both))
        return pd.DataFrame(lines, columns=_COLUMNS)

    def plot(
        self,
        k: int = 12,
        *,
        title: str | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> "go.Figure":
        """Writer × the k rows after them that remove most, as a plotly figure, in logits.

        Means over prompts and positions: red where a later row removes of a writer that raises the
        logit, blue where it writes it again.
        """
        from tl_dla.figures import effects
        from tl_dla.figures.charts import Heading, Look
        from tl_dla.figures.view import require_some

        require_some(k)
        ratio, logits = (_means(x).cpu().double() for x in (self.ratio, self.logits))
        largest = logits.abs().amax(0).argsort(descending=True)[:k]
        columns = [j for j in largest.sort().values.tolist() if bool(self.later[:, j].any())]
        return effects.erased(
            self.writers,
            [self.labels[j] for j in columns],
            logits[:, columns].numpy(),
            ratio[:, columns].numpy(),
            Heading(
                "What later rows write along what earlier ones wrote",
                "mean over prompts and positions",
            ),
            Look(title, width, height),
        )

    def __repr__(self) -> str:
        """The pairs that remove most."""
        table = self.to_dataframe().head(8)
        head = f"Erasures: {len(self.writers)} writers against the rows after them (means)"
        return f"{head}\n{table.to_string(index=False, float_format='{:+.3f}'.format)}"


def _means(x: Float[Tensor, "writer row *batch_and_pos"]) -> Float[Tensor, "writer row"]:
    return x.reshape(*x.shape[:2], -1).nanmean(-1)


_COLUMNS = ["writer", "eraser", "projection_ratio", "logits", "norm"]
_COLUMNS += ["writer_direct", "eraser_direct", "net", "correlation"]


def erasures(
    result: Attribution,
    writers: Sequence[str] | None = None,
    *,
    stack: ResidualStack | None = None,
) -> Erasures:
    """How much of what each writer wrote is removed by each later row.

    Args:
        result: an attribution with `unit="component"` or `"head"`; over many prompts, for the
            correlations.
        writers: the rows to follow; all that write, if not given.
        stack: what the rows wrote, where it is at hand (`decompose`); else the model runs once.

    Raises:
        ArgumentError: for no row or a row that is no writer, or another unit.
        KeyError: for a row that the result does not have.

    Example:
        >>> from tl_dla import direct_logit_attribution, load_model
        >>> result = direct_logit_attribution(
        ...     load_model("demo"), "The Eiffel Tower is in the city of", " Paris", unit="head"
        ... )
        >>> pairs = erasures(result).to_dataframe()
        >>> bool((pairs["projection_ratio"] < 0).all())
        True
    """
    require_direct(result)
    stack = written(result) if stack is None else stack
    keys = dict(zip(result.labels, result.keys, strict=True))
    shared = [label for label in stack.labels if label in keys]
    if writers is None:
        writers = [label for label in shared if keys[label].kind not in _NO_WRITERS]
    for label in require_rows(result, writers):
        if (kind := keys[label].kind) in _NO_WRITERS or label not in shared:
            raise ArgumentError(f"Row {label!r} (kind {kind!r}) writes nothing of its own.")
    vectors = torch.stack([stack[label] for label in shared])
    norm = ModelReader(result.model).stream().norm
    if norm is not None and norm.centred:
        vectors = vectors - vectors.mean(-1, keepdim=True)
    rows = [shared.index(label) for label in writers]
    numbers = _order(ModelReader(result.model), [keys[label] for label in shared])
    order = torch.tensor(numbers, device=vectors.device)
    later = order > order[rows, None]
    dots = torch.stack([(vectors * vectors[i]).sum(-1) for i in rows])
    squares = vectors[rows].square().sum(-1)
    ratio = dots / squares[:, None]
    ratio = torch.where(later.view(*later.shape, *[1] * (ratio.ndim - 2)), ratio, 0.0)
    ratio = torch.where(result.attribution[0].isnan().to(ratio.device), torch.nan, ratio)
    direct = torch.stack([result[label] for label in shared]).to(ratio)
    return Erasures(list(writers), shared, ratio, later, direct, squares.sqrt())


def _order(reader: ModelReader, keys: Sequence[RowKey]) -> list[int]:
    """When each row is written.

    An MLP comes after the attention of its own block only where the stream can be seen between
    them: in a parallel block neither reads the other.
    """
    middles = {point.layer for point in reader.stream().points if not point.block}
    after = [key.kind == "mlp" and key.layer in middles for key in keys]
    return [
        -1 if key.layer is None else 2 * key.layer + later
        for key, later in zip(keys, after, strict=True)
    ]

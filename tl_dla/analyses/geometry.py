"""Where tokens lie in the unembedding: the directions that their logits are read along.

The direction of a token is its column of W_U with the final norm's gain (γ ⊙ u, centred for
LayerNorm): what the residual stream is really multiplied with, whether or not a model's norm is
folded into W_U. Tokens that form a line, a circle or clusters there are told apart by few
directions of the stream, as the digits in "logit prisms" (https://neuralblog.github.io/logit-prisms).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.core.decomposition import logit_readout
from tl_dla.errors import ArgumentError
from tl_dla.inputs.models import require_model
from tl_dla.inputs.targets import token_ids
from tl_dla.inputs.tokens import token_strings
from tl_dla.model.reader import ModelReader
from tl_dla.model.unembedding import unembed_matrix, unembedding

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class UnembeddingPCA:
    """Tokens in the plane (or space) in which their readout directions differ most.

    Attributes:
        tokens: the tokens as text.
        ids: their ids.
        coordinates: `[token, component]`, of the directions less their mean.
        explained_variance: the share of the variance along each component, largest first.
        components: the components, orthonormal directions of the residual stream.
    """

    tokens: tuple[str, ...]
    ids: Int[Tensor, " token"]
    coordinates: Float[Tensor, "token component"]
    explained_variance: Float[Tensor, " component"]
    components: Float[Tensor, "component d_model"]

    def to_dataframe(self) -> "pd.DataFrame":
        """A line per token: `token`, `id`, and its coordinates `PC1`, `PC2`, …."""
        import pandas as pd

        table = pd.DataFrame({"token": self.tokens, "id": self.ids.tolist()})
        for i, column in enumerate(self.coordinates.T.tolist()):
            table[f"PC{i + 1}"] = column
        return table

    def plot(
        self,
        *,
        connect: bool = True,
        title: str | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> "go.Figure":
        """The tokens in the plane of the first two components, each by its name.

        Args:
            connect: with a line from token to token, in their order.
            title: in place of the figure's own; `""` for no heading.
            width: in pixels; as wide as the page by default.
            height: in pixels.

        Raises:
            ArgumentError: for a single component.
        """
        from tl_dla.figures.charts import Look
        from tl_dla.figures.plane import plane

        if self.coordinates.shape[1] < 2:
            raise ArgumentError("A plane needs two components: unembedding_pca(…, n_components=2).")
        at = self.coordinates[:, :2].detach().cpu().double().numpy()
        share = self.explained_variance[:2].tolist()
        return plane(at, self.tokens, share, connect, Look(title, width, height))


def unembedding_pca(
    model: Any, tokens: Sequence[str | int] | Int[Tensor, " token"], n_components: int = 2
) -> UnembeddingPCA:
    """Principal components of the tokens' readout directions.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        tokens: strings of one token each, or ids; at least two.
        n_components: how many components; at most as many as tokens less one.

    Raises:
        TokenError: for a string that is not one token, or an id outside the vocabulary.
        ArgumentError: for fewer than two tokens, or more components than they span.

    Example:
        >>> from tl_dla import load_model, unembedding_pca
        >>> pca = unembedding_pca(load_model("demo"), [" Paris", " London", " Rome"])
        >>> pca.coordinates.shape, bool(pca.explained_variance.sum() <= 1.001)
        (torch.Size([3, 2]), True)
    """
    model = require_model(model)
    ids = token_ids(model, tokens).flatten()
    limit = min(len(ids) - 1, len(unembed_matrix(model)))
    if not 1 <= n_components <= limit:
        raise ArgumentError(
            f"{len(ids)} tokens differ along at most {max(limit, 0)} components; n_components="
            f"{n_components} was given."
        )
    columns, _ = unembedding(model, ids.reshape(1, 1, -1))
    directions = logit_readout(ModelReader(model), columns)[0].direction[0, 0]
    centred = directions - directions.mean(0)
    _, size, components = torch.linalg.svd(centred, full_matrices=False)
    # A component has no sign of its own: its largest entry is taken to be positive.
    largest = components.abs().argmax(1, keepdim=True)
    components = (components * components.gather(1, largest).sign())[:n_components]
    variance = size.square()
    return UnembeddingPCA(
        tuple(token_strings(model, ids)),
        ids,
        centred @ components.T,
        variance[:n_components] / variance.sum(),
        components,
    )

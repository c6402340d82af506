"""A head as a map from a token that it reads to tokens that it promotes.

With pattern and norms frozen, what a head makes of a token's embedding is one linear map:

    logits = embedding → [ln1] → W_V W_O → [norm after the block] → [ln_final] → W_U

The same map can be applied to any other token's embedding: the head that turns " France" into
" Paris" may turn " Italy" into " Rome" ("logit prisms", https://neuralblog.github.io/logit-prisms).
Frozen scales and the attention weight are one positive number for each source token, so they change
no ranking; without a path to take them from they are 1, and logits are in units of that number.
Logits are those before a soft cap, which has a ratio for each target token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.analyses.paths import follow, through_head
from tl_dla.analyses.promotion import top_tokens
from tl_dla.core.decomposition import Decomposition, logit_readout
from tl_dla.core.heads import HeadSplit
from tl_dla.core.readout import Readout
from tl_dla.core.result import Attribution, Hop
from tl_dla.core.rounding import is_multiple
from tl_dla.core.taps import Tap, forward
from tl_dla.errors import ArgumentError, UnsupportedModelError
from tl_dla.inputs.models import require_model
from tl_dla.inputs.positions import Positions
from tl_dla.inputs.query import Query
from tl_dla.inputs.selection import Selection, place_of_head
from tl_dla.inputs.targets import NO_TARGETS, token_ids
from tl_dla.inputs.tokens import Prompts, token_strings
from tl_dla.model.hooks import upcast
from tl_dla.model.reader import ModelReader
from tl_dla.model.stream import ResidPoint, Write
from tl_dla.model.unembedding import is_linear, unembed_matrix, unembedding

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Tokens = Sequence[str | int] | Int[Tensor, " token"]
Sources = Tokens | Float[Tensor, "source d_model"]


@dataclass(frozen=True, eq=False)
class TokenMap:
    """The frozen linear map from a source token's embedding to logits, through one head.

    Attributes:
        model: the model.
        layer: the head's layer.
        head: its index.
        factor: attention weight over frozen scales; 1 where no path gives it.
    """

    model: Any = field(repr=False)
    layer: int
    head: int
    factor: float

    def __call__(self, sources: Sources, targets: Tokens) -> Float[Tensor, "source target"]:
        """What the head adds to the logits of `targets` for the embeddings of `sources`.

        `sources` may be vectors of one's own, `[source, d_model]`, as the stream starts with.
        """
        matrix = self.matrix(targets)
        return self._vectors(sources).to(matrix) @ matrix

    def matrix(self, targets: Tokens) -> Float[Tensor, "d_model target"]:
        """The map itself: `embedding @ matrix` are the logits of `targets`."""
        ids = token_ids(self.model, targets).flatten()
        direction = _direction(ModelReader(self.model), self.layer, self.head, ids)
        return direction.mT * self.factor

    def to_dataframe(self, sources: Sources, targets: Tokens) -> "pd.DataFrame":
        """The same as a table: a line per source token, a column per target token."""
        import pandas as pd

        names = (self._names(sources), self._names(targets))
        return pd.DataFrame(self(sources, targets).cpu().numpy(), index=names[0], columns=names[1])

    def plot(
        self,
        sources: Sources,
        targets: Tokens,
        *,
        title: str | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> "go.Figure":
        """Source × target as a heatmap, in logits.

        Args:
            sources: tokens, or vectors of one's own `[source, d_model]`.
            targets: tokens.
            title: in place of the figure's own; `""` for no heading.
            width: in pixels; as wide as the page by default.
            height: in pixels; as high as what is drawn by default.
        """
        from tl_dla.figures.charts import Heading, Look
        from tl_dla.figures.plane import matrix

        scale = "" if self.factor != 1.0 else ", up to one positive number for each source"
        heading = Heading(
            f"What L{self.layer}H{self.head} makes of a token's embedding",
            f"the logits that it adds{scale}",
        )
        names = (self._names(sources), self._names(targets))
        values = self(sources, targets).detach().cpu().double().numpy()
        return matrix(values, names, heading, Look(title, width, height))

    def _vectors(self, sources: Sources) -> Float[Tensor, "source d_model"]:
        if not (isinstance(sources, Tensor) and sources.is_floating_point()):
            return _embeddings(self.model, token_ids(self.model, sources).flatten())
        d_model = len(self.model.W_U)
        if sources.ndim != 2 or sources.shape[1] != d_model:
            raise ArgumentError(
                f"Vectors must be [source, d_model] with d_model {d_model};"
                f" {list(sources.shape)} was given."
            )
        return sources

    def _names(self, tokens: Sources) -> list[str]:
        if isinstance(tokens, Tensor) and tokens.is_floating_point():
            return [f"vector {i}" for i in range(len(tokens))]
        return token_strings(self.model, token_ids(self.model, tokens).flatten())

    def top(
        self, source: str | int, k: int = 10, chunk_size: int = 8192
    ) -> list[tuple[str, float]]:
        """The tokens of the whole vocabulary that the head promotes most from a source token."""
        embedding = _embeddings(self.model, token_ids(self.model, [source]).flatten())
        vocab = torch.arange(unembed_matrix(self.model).shape[1], device=embedding.device)
        logits = torch.cat([self(embedding, ids)[0] for ids in vocab.split(chunk_size)])
        return top_tokens(self.model, logits, k)


def token_map(model: Any, layer: int, head: int, *, path: Attribution | None = None) -> TokenMap:
    """The frozen linear map from a source token's embedding to output logits, through one head.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        layer: the head's layer.
        head: its index.
        path: a result of `attribute_path` through this head, for one prompt and position: its
            attention weight and norm scales are used, so that the map of the path's own source
            token is the path's `embed` row.

    Raises:
        ArgumentError: for a head that the model does not have, or a path through another.
        UnsupportedModelError: where values are not one linear map of the embedding.

    Example:
        >>> from tl_dla import load_model, token_map
        >>> promote = token_map(load_model("demo"), 1, 0)
        >>> promote([" Paris", " London"], [" France", " England", " Italy"]).shape
        torch.Size([2, 3])
    """
    model = require_model(model)
    reader, label = ModelReader(model), f"L{layer}H{head}"
    place_of_head(reader, label)
    if path is None:
        _direction(reader, layer, head, torch.zeros(1, dtype=torch.long))  # refused now or never
        return TokenMap(model, layer, head, 1.0)
    if [hop.label.partition("←")[0] for hop in path.hops] != [label]:
        raise ArgumentError(f"path must be a result of attribute_path through {label} alone.")
    if path.numbers.ratio.shape[:2] != (1, 1):
        raise ArgumentError("path must be of one prompt and one attributed position.")
    # The path's readout of the embedding is this one times the factor.
    direction = _direction(reader, layer, head, path.targets.ids.reshape(-1)[:1])[0]
    end = follow(path, path.hops)
    parts = end.parts("component", Selection())
    scales = parts.scaled(forward(end.query, parts.taps, logits=False)).scales
    frozen = _of_embedding(parts).frozen(scales)
    own = frozen.direction[0, 0, 0].to(direction)
    own = own if frozen.scale is None else own / frozen.scale[0, 0].to(own)
    ratio = path.numbers.ratio[0, 0, 0].to(own) if is_linear(model) else 1.0
    return TokenMap(model, layer, head, float(ratio * (own @ direction) / direction.square().sum()))


def _direction(
    reader: ModelReader, layer: int, head: int, targets: Int[Tensor, " target"]
) -> Float[Tensor, "target d_model"]:
    """Each target's readout of the embedding through the head, every scale left out."""
    columns, _ = unembedding(reader.model, targets.reshape(1, 1, -1))
    logit, _ = logit_readout(reader, columns)
    steps, selection = reader.stream().steps, Selection(layers=(layer,))
    parts = Decomposition(reader, steps, logit, [], "head", selection)
    [split] = parts.splits.values()
    if reader.pattern_and_values(layer).gate is not None:
        raise UnsupportedModelError(
            f"{reader.architecture} multiplies what the heads of layer {layer} mix by a gate that"
            " differs from prompt to prompt, so they are no map from tokens to tokens."
        )
    assert isinstance(split, HeadSplit)
    values = split.heads.direction[..., head, :]
    hop = Hop(layer, head, torch.zeros(1, dtype=torch.long))
    path = through_head(parts, hop, values, ("component", Selection()))
    return _of_embedding(path).direction[0, 0]


def _of_embedding(parts: Decomposition) -> Readout:
    readout = parts.readout_of("embed")
    if readout is None:
        raise UnsupportedModelError(f"{parts.reader.architecture} shows no token embedding.")
    return readout


def _embeddings(model: Any, ids: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
    """What the stream starts with for each token, from a run of prompts of that token alone."""
    reader = ModelReader(model)
    steps = reader.stream().steps
    embed = next((s for s in steps if isinstance(s, Write) and s.name == "embed"), None)
    if embed is None:
        raise UnsupportedModelError(f"{reader.architecture} shows no token embedding.")
    taps = [Tap(embed.site, upcast)]
    if isinstance(steps[1], ResidPoint):  # nothing else is added: it may be the embedding rescaled
        taps.append(Tap(steps[1].site, upcast))
    start = torch.zeros_like(ids)
    positions = Positions(start[:, None], (start == 0)[:, None], True, False, shared=0)
    query = Query(model, Prompts(ids[:, None], start, start + 1), positions, NO_TARGETS)
    kept = forward(query, taps, logits=False)
    written, stream = kept[taps[0]], kept[taps[-1]]
    return (stream if is_multiple(written, stream, reader.machine_eps) else written)[:, 0]

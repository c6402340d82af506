"""`check_model`: where a model first departs from what attribution takes for granted.

Attribution rests on a few identities of the residual stream. This walks them on the user's own
model and tokens, whole vectors at every position, layer by layer:

    start of the stream      =  embeddings
    stream after a block     =  stream before it + what the block's known parts wrote
    attn_out                 =  heads + output bias            (through the norm that follows)
    logits                   =  unembedding of the final norm of the stream, output transform
    sum of attention rows    =  1                              (folding value biases needs it)
    logits                   =  those of a reference model     (when one is given)

An identity fails when the difference is more than rounding can explain in the model's dtype.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.core.decomposition import Decomposition
from tl_dla.core.heads import HeadSplit
from tl_dla.core.readout import Readout
from tl_dla.core.rounding import is_multiple, vector_tolerance
from tl_dla.core.taps import Tap, forward
from tl_dla.errors import UnsupportedModelError
from tl_dla.inputs.models import require_model
from tl_dla.inputs.positions import read_positions
from tl_dla.inputs.query import Query
from tl_dla.inputs.selection import Selection, Unit
from tl_dla.inputs.targets import NO_TARGETS
from tl_dla.inputs.tokens import read_prompts
from tl_dla.model.hooks import is_bridge, upcast
from tl_dla.model.reader import ModelReader
from tl_dla.model.stream import ResidPoint, Step, StreamNorm, Write
from tl_dla.model.unembedding import output_transform, unembed_bias, unembed_matrix

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Identity:
    """One identity, with its largest miss over all positions, absolute and relative."""

    layer: int | None
    name: str
    error: float
    relative_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the miss is one that rounding can explain."""
        return self.relative_error <= self.tolerance


@dataclass(frozen=True)
class ModelCheck:
    """What `check_model` found, in the order of the forward pass.

    `refusal` says what could not be checked, such as the heads of a model that does not show them.
    """

    architecture: str
    identities: list[Identity]
    refusal: str = ""

    @property
    def passed(self) -> bool:
        """Whether every identity holds."""
        return all(identity.passed for identity in self.identities)

    @property
    def first_failure(self) -> Identity | None:
        """Where the model first departs from the identities."""
        return next((identity for identity in self.identities if not identity.passed), None)

    def to_dataframe(self) -> "pd.DataFrame":
        """Columns `layer`, `identity`, `error`, `relative_error`, `tolerance` and `passed`."""
        import pandas as pd

        columns = ["layer", "identity", "error", "relative_error", "tolerance", "passed"]
        lines = [
            (i.layer, i.name, i.error, i.relative_error, i.tolerance, i.passed)
            for i in self.identities
        ]
        return pd.DataFrame(lines, columns=columns).astype({"layer": "Int64"})

    def __repr__(self) -> str:
        lines = [f"ModelCheck: {self.architecture}"]
        for i in self.identities:
            mark = "ok  " if i.passed else "FAIL"
            lines.append(f"  {mark} {i.name:<44} relative error {i.relative_error:.1e}")
        lines += [f"  not checked: {self.refusal}"] * bool(self.refusal)
        first = self.first_failure
        lines.append(
            "  every identity holds"
            if first is None
            else f"  first failure: {first.name}, off by {first.error:.3g}"
        )
        return "\n".join(lines)


@torch.no_grad()
def check_model(
    model: Any,
    tokens: str | Sequence[str] | Int[Tensor, "*batch pos"],
    *,
    reference: Any = None,
) -> ModelCheck:
    """Check the identities that attribution rests on, on your model and tokens.

    Two forward passes; the whole stream is kept, so give it a prompt, not a dataset.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        tokens: a prompt, prompts, or token ids, as in `direct_logit_attribution`.
        reference: another model of the same weights, called on the tokens (a raw
            `TransformerBridge`, or the `transformers` module): its log-probabilities must be the
            model's. Compatibility mode changes some models (gpt-oss, BitNet); this shows it.

    Returns:
        A `ModelCheck`: the identities as a table, in the order of the forward pass.

    Raises:
        UnsupportedModelError: where the model has no residual stream to walk.
        TokenError: for tokens that cannot be what was meant.

    Example:
        >>> from tl_dla import check_model, load_model
        >>> check_model(load_model("demo"), "The Eiffel Tower is in the city of").passed
        True
    """
    model = require_model(model)
    reader = ModelReader(model)
    prompts = read_prompts(model, tokens)
    positions = read_positions(None, prompts)
    stream, norm = reader.stream(), reader.stream().norm
    blocks, refusal = _blocks(reader)
    final = Tap(stream.points[-1].site, upcast)
    patterns = _pattern_taps(reader)
    scale = [] if norm is None else [Tap(norm.site, norm.scale)]
    taps = [final, *patterns.values(), *scale, *(tap for block in blocks for tap in block.taps)]
    kept = forward(Query(model, prompts, positions, NO_TARGETS), taps, logits=False)

    real = positions.valid
    dtype = kept[final].dtype
    tolerance = vector_tolerance(reader.machine_eps, dtype)

    def identity(layer: int | None, name: str, got: Tensor, want: Tensor) -> Identity:
        got, want = (x.to(real.device, dtype)[real] for x in (got, want))
        miss = got - want
        relative = miss.norm(dim=-1) / want.norm(dim=-1).clamp(min=torch.finfo(dtype).tiny)
        return Identity(layer, name, float(miss.abs().max()), float(relative.max()), tolerance)

    found: list[Identity] = []
    for block in blocks:
        known, total = block.scaled(kept), torch.zeros_like(kept[final])
        for step, readout in block.steps[:-1]:
            if isinstance(step, Write | ResidPoint):
                added = known.scaled(kept[block.stream.value[step]], readout)
            elif isinstance(step, StreamNorm) and step.norm.beta is not None:
                added = known.scaled(readout.of_bias(step.norm.beta), readout)
            else:
                continue
            total = total + added.to(total)
            if isinstance(split := block.splits.get(step), HeadSplit):
                check = split.split(known, added).checks[0]
                name = f"{split.key.label} = heads + output bias"
                found.append(identity(split.layer, name, check.parts, check.value))
        point = block.end
        assert isinstance(point, ResidPoint)
        seen = kept[block.stream.value[point]].to(total)
        if block is not blocks[0]:
            name = f"{point.label} = stream before it + writes"
            found.append(identity(point.layer - 1, name, total, seen))
            continue
        if is_multiple(total, seen, reader.machine_eps):
            total = seen
        found.append(identity(None, "0_pre = embeddings", total, seen))
    logits = _call(model, prompts.packed)
    read = _read_out(reader, kept[final], kept[scale[0]] if scale else None)
    found.append(identity(None, "logits = unembedding of the stream", read, logits))
    for layer, tap in patterns.items():
        sums = kept[tap]
        name = f"pattern {layer}: attention rows sum to 1"
        found.append(identity(layer, name, sums, torch.ones_like(sums)))
    if reference is not None:
        theirs = _call(reference, prompts.packed).log_softmax(-1)
        name = "log-probabilities = the reference's"
        found.append(identity(None, name, logits.log_softmax(-1), theirs))
    return ModelCheck(reader.architecture, found, refusal)


def _blocks(reader: ModelReader) -> tuple[list[Decomposition], str]:
    """Every block with its heads where the model shows them; and otherwise why not."""
    try:
        return list(_split(reader, "head")), ""
    except UnsupportedModelError as error:
        return list(_split(reader, "component")), str(error)


def _split(reader: ModelReader, unit: Unit) -> Iterator[Decomposition]:
    """The steps from one border of blocks to the next, where the stream is read as a vector."""
    width = unembed_matrix(reader.model).new_empty(reader.model.cfg.d_model, 1)
    steps: list[Step] = []
    for step in reader.stream().steps:
        if isinstance(step, ResidPoint) and not step.block:
            continue
        steps.append(step)
        if isinstance(step, ResidPoint):
            end = Readout.identity(width)
            yield Decomposition(reader, steps, end, [], unit, Selection(), whole=False)
            steps = [step]


def _read_out(
    reader: ModelReader,
    x: Float[Tensor, "batch pos d_model"],
    scale: Float[Tensor, "batch pos"] | None,
) -> Float[Tensor, "batch pos d_vocab"]:
    """The logits that the final norm, the unembedding and the output transform give as read."""
    stream, model = reader.stream(), reader.model
    if stream.norm is not None and scale is not None:
        x = stream.norm.forward(x, scale)
    if stream.project_out is not None:
        x = x @ stream.project_out.to(x).mT
    logits, bias = x @ unembed_matrix(model).to(x), unembed_bias(model)
    return output_transform(model, logits if bias is None else logits + bias.to(x))


def _pattern_taps(reader: ModelReader) -> dict[int, Tap]:
    """The sums of the attention rows of a model whose value biases were folded."""
    if not (is_bridge(reader.model) and getattr(reader.model, "compatibility_mode", False)):
        return {}
    found = {
        layer: reader.site(f"blocks.{layer}.attn.hook_pattern") for layer in range(reader.n_layers)
    }
    return {
        layer: Tap(site, lambda x: upcast(x).sum(-1).mT, whole=True)
        for layer, site in found.items()
        if site is not None
    }


def _call(model: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
    output = model(tokens)
    return getattr(output, "logits", output)

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.core.residual import head_vectors, scale_probe, through, vector_probes, walk
from tl_dla.core.rows import upcast
from tl_dla.core.taps import Probe, run
from tl_dla.errors import UnsupportedModelError
from tl_dla.inputs.selection import Unit
from tl_dla.inputs.tokens import read_positions, read_prompts
from tl_dla.model.reader import ModelReader, is_bridge, output_transform

if TYPE_CHECKING:
    import pandas as pd

# Of ‖expected‖: the model's own rounding, and that of contractions in (at least) float32.
_ROUNDINGS, _CONTRACTIONS = 4.0, 32.0


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
    reader = ModelReader(model)
    prompts = read_prompts(model, tokens)
    positions = read_positions(None, prompts)
    stream = reader.stream()
    unit, refusal = _unit(reader)
    probes = vector_probes(reader, unit) + _pattern_probes(reader)
    if stream.norm is not None:
        probes.append(scale_probe(stream.norm))
    probes = list({probe.key: probe for probe in probes}.values())
    seen = run(model, prompts, positions, probes, None).values

    real = positions.valid
    dtype = seen["final_post"].dtype
    contraction = max(torch.finfo(dtype).eps, reader.eps if dtype == torch.float64 else 0.0)
    tolerance = _ROUNDINGS * reader.eps + _CONTRACTIONS * contraction

    def identity(layer: int | None, name: str, got: Tensor, want: Tensor) -> Identity:
        miss, want = (got.to(dtype) - want.to(dtype))[real], want[real].to(dtype)
        relative = miss.norm(dim=-1) / want.norm(dim=-1).clamp(min=torch.finfo(dtype).tiny)
        return Identity(layer, name, float(miss.abs().max()), float(relative.max()), tolerance)

    found: list[Identity] = []
    for gap in walk(reader, seen, "component")[2]:
        start = not found
        layer = None if start else gap.point.layer - 1
        if unit == "head" and layer is not None and (heads := _heads(reader, layer, seen)):
            found.append(identity(layer, f"{layer}_attn_out = heads + output bias", *heads))
        name = "0_pre = embeddings" if start else f"{gap.point.label} = stream before it + writes"
        found.append(identity(layer, name, gap.seen - gap.missing, gap.seen))
    logits = _call(model, prompts.packed)
    name, read = "logits = unembedding of the stream", _read_out(reader, seen)
    found.append(identity(None, name, read, logits))
    for key, sums in seen.items():
        if key.startswith("pattern "):
            name = f"{key}: attention rows sum to 1"
            found.append(identity(int(key.split()[1]), name, sums, torch.ones_like(sums)))
    if reference is not None:
        theirs = _call(reference, prompts.packed).log_softmax(-1)
        name = "log-probabilities = the reference's"
        found.append(identity(None, name, logits.log_softmax(-1), theirs))
    return ModelCheck(reader.architecture, found, refusal)


def _unit(reader: ModelReader) -> tuple[Unit, str]:
    """Heads where the model shows them, and otherwise why not."""
    try:
        vector_probes(reader, "head")
    except UnsupportedModelError as error:
        return "component", str(error)
    return "head", ""


def _heads(
    reader: ModelReader, layer: int, seen: Mapping[str, Tensor]
) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos d_model"]] | None:
    """What a layer's heads and bias add up to, and its `attn_out`; None for no attention."""
    attention = reader.attention(layer)
    if attention is None:
        return None
    [write] = [w for w in reader.stream().writes if w.label == f"{layer}_attn_out"]
    rows = head_vectors(attention, seen, write.factor)
    return torch.stack([row.value for row in rows]).sum(0), seen[write.label] * write.factor


def _read_out(
    reader: ModelReader, seen: Mapping[str, Tensor]
) -> Float[Tensor, "batch pos d_vocab"]:
    """The logits that the final norm, the unembedding and the output transform give as read."""
    stream, x = reader.stream(), seen["final_post"]
    if (norm := stream.norm) is not None:
        x = through(norm, x, seen[norm.name])
        x = x if norm.beta is None else x + norm.beta.to(x)
    if stream.project_out is not None:
        x = x @ stream.project_out.to(x).mT
    model = reader.model
    logits = x @ model.W_U.to(x)
    return output_transform(model, logits + model.b_U.to(x))


def _pattern_probes(reader: ModelReader) -> list[Probe]:
    """The sums of the attention rows of a model whose value biases were folded."""
    if not (is_bridge(reader.model) and getattr(reader.model, "compatibility_mode", False)):
        return []
    found = {
        layer: reader.site(f"blocks.{layer}.attn.hook_pattern") for layer in range(reader.n_layers)
    }
    return [
        Probe(f"pattern {layer}", site, lambda x: upcast(x).sum(-1).mT, whole=True)
        for layer, site in found.items()
        if site is not None
    ]


def _call(model: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
    output = model(tokens)
    return getattr(output, "logits", output)

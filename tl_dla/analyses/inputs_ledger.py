"""`attribute_inputs`: which tokens of the prompt wrote a logit, through everything.

With every non-linearity frozen at its value in this forward pass, the network is one linear map,
and the readout w pulled back through all of it reaches the embeddings:

    logit = Σ_token  embed[token] · w₀[token]  +  pos_embed[token] · w₀[token]  +  Σ biases

exactly, and the same total at every layer: what the stream holds there, x · w, and what the biases
after it add. In logits. Frozen are the norms' scales, the attention patterns and the MLPs'
activations (`mlp`), so a row says what a token wrote along the ways that this pass took. What a
token did by steering attention is in no row: in " John and Mary … John gave a drink to", that the
name is repeated acts through queries and keys, and shows in `attribute_attention` alone. Nor does
removing a token change the logit by its row.

See `tl_dla.analyses.frozen` for each line through the origin, with references.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_dla.analyses.frozen import Rule
from tl_dla.analyses.total import Network, Pulled, Visit
from tl_dla.core.certificate import Check, Reconstruction, Wanted, certify, require_check
from tl_dla.core.result import Attribution
from tl_dla.core.rounding import Sizes, rounding
from tl_dla.core.rows import RowGroup, RowKey, Rows
from tl_dla.core.run import CAUSE, Run, run
from tl_dla.core.taps import exact
from tl_dla.errors import ArgumentError, UnsupportedModelError
from tl_dla.inputs.caches import read_cache, read_cached_prompts
from tl_dla.inputs.models import require_eval, require_model
from tl_dla.inputs.positions import read_positions
from tl_dla.inputs.query import Query
from tl_dla.inputs.targets import Answers, read_targets, require_answer
from tl_dla.inputs.tokens import Input, read_prompts, texts_of
from tl_dla.model.reader import ModelReader

if TYPE_CHECKING:
    pass

_AT_ONCE = 2**26  # numbers of a direction at the widest place; more targets are pulled in parts
_CAUSE = (
    CAUSE
    + " Or a sublayer is no frozen linear map of what it reads; direct_logit_attribution works."
)


@dataclass(frozen=True, eq=False, repr=False)
class InputAttribution(Attribution):
    """What each token of the prompt, and each bias, wrote to a logit through everything.

    See `Attribution` for its rows.

    Attributes:
        held: what the stream holds at each token's place, before each layer and at the end, with
            all axes, `[point, batch, pos, candidate, source]`; `flow` is the view of it with the
            axes that were asked for.
        mlp: how gated MLPs are frozen.
    """

    held: Float[Tensor, "point batch pos candidate source"] = field(kw_only=True)
    mlp: Rule = field(default="half", kw_only=True)

    @property
    def flow(self) -> Float[Tensor, " point *batch_and_pos"]:
        """How much of the logit each token's place in the stream holds before each layer.

        `[n_layers + 1, *batch_and_pos, source]`, with a `candidate` axis before the last for
        `candidate_tokens`. The last is before the final norm. With what the biases after it add,
        each adds up to the logit.
        """
        by_source = rearrange(
            self.held, "point batch pos candidate source -> point source batch pos candidate"
        )
        return self.query.shaped(by_source).movedim(1, -1)


def attribute_inputs(
    model: Any,
    input: Input | None = None,
    answer_tokens: Answers | None = None,
    incorrect_tokens: Answers | None = None,
    *,
    mlp: Rule = "half",
    pos: Any = -1,
    cache: Any = None,
    candidate_tokens: str | int | Sequence[str | int] | Int[Tensor, " candidate"] | None = None,
    include_bias: bool = True,
    check: Check = "raise",
    attention_mask: Int[Tensor, "batch pos"] | Bool[Tensor, "batch pos"] | None = None,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> InputAttribution:
    """Split a logit, or a logit difference, into what each token of the prompt wrote to it.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode.
        input: as in `direct_logit_attribution`.
        answer_tokens: as in `direct_logit_attribution`.
        incorrect_tokens: as in `direct_logit_attribution`.
        mlp: how a gated MLP is frozen: `"gate"` (the activated gate is a constant, all goes to
            what it multiplies) or `"half"` (each factor takes half).
        pos: as in `direct_logit_attribution`.
        cache: an `ActivationCache` with every hook, to read in place of running the model.
        candidate_tokens: as in `direct_logit_attribution`.
        include_bias: whether `ln_final.b` and `b_U` are rows. The model's other biases always are.
        check: what a failed certificate does.
        attention_mask: as in `direct_logit_attribution`.
        prepend_bos: as in `direct_logit_attribution`.
        progress: whether a bar is shown where many positions or candidates are pulled in parts.

    Returns:
        An `InputAttribution`: rows `embed←5`, `pos_embed←5`, and every bias by the place where it
        is added (`3_attn_bias`, `3_b_V`, `3_ln1.b`, `3_mlp_bias`, `3_b_in`, `ln_final.b`, `b_U`).

    Raises:
        TokenError: for a prompt, answer or position that cannot be what was meant.
        ArgumentError: for other arguments that do not fit; a `ValueError`.
        UnsupportedModelError: for a part that cannot be frozen as a linear map, by its name.
        IncompleteCacheError: where the cache lacks hooks, which are named.
        ReconstructionError: where the rows do not add up to the model's own logit, or what a layer
            holds does not.

    Example:
        >>> from tl_dla import attribute_inputs, load_model
        >>> model = load_model("demo")
        >>> result = attribute_inputs(
        ...     model, "The Eiffel Tower is in the city of", " Paris", " London"
        ... )
        >>> result.reconstruction.passed
        True
    """
    if mlp not in ("gate", "half"):
        raise ArgumentError(f'mlp must be "gate" or "half"; {mlp!r} was given.')
    require_check(check)
    require_answer(answer_tokens, candidate_tokens)
    model = require_model(model)
    network = Network(ModelReader(model), mlp)
    options: dict[str, Any] = dict(prepend_bos=prepend_bos, attention_mask=attention_mask)
    if cache is None:
        require_eval(model)
        prompts = read_prompts(model, input, **options)
    else:
        cache = read_cache(model, cache)
        prompts = read_cached_prompts(model, input, cache, **options)
    positions = read_positions(pos, prompts)
    answers = (answer_tokens, incorrect_tokens, candidate_tokens)
    targets = read_targets(model, *answers, len(prompts.tokens), positions, texts_of(input))
    has_batch = cache is None or cache.has_batch_dim
    query = Query(model, prompts, positions, targets, include_bias, has_batch)
    once = run(query, "component", cache=cache, taps=network.taps)
    with exact():
        result = _result(once, network, mlp, progress)
    return result.certified(check, _CAUSE)


# ---- the answer --------------------------------------------------------------------------------


def _result(once: Run, network: Network, mlp: Rule, progress: bool) -> InputAttribution:
    _require_understood(once)
    base, query = once.result(Attribution), once.query
    readouts = directions(once)
    pulled = pull(once, network, readouts, progress=progress)
    weights = query.targets.matrix(once.rows.ratio)
    ends = [
        RowGroup.one(g.keys[0], (g.values[0] * once.rows.ratio) @ weights.mT)
        for g in once.rows.constants
    ]
    starts = [
        RowGroup(
            [
                RowKey("rest" if name == "embed_rest" else "embed", None, name, source=s)
                for s in range(x.shape[-1])
            ],
            x.movedim(-1, 0),
        )
        for name, x in pulled.start.items()
    ]
    biases = [RowGroup.one(key, value) for key, value in sorted(pulled.biases.items(), key=_place)]
    ones = torch.ones_like(readouts[..., 0])
    felt = pulled.felts[-1].sqrt().to(ones)
    rows = Rows([*starts, *biases], ends, ones, ones, felt, felt)
    logits = base.numbers.logits.to(ones) @ weights.mT
    expected = logits
    if not query.include_bias:
        expected = expected - sum(group.values[0] for group in ends)
        rows = rows.without_constants()
    eps = max(network.reader.machine_eps, once.kept.machine_eps)
    wanted = Wanted(expected, logits, base.reconstruction.against, eps, once.unchecked)
    # Directions are already those of candidates: nothing is left to add up.
    alone = replace(query, targets=replace(query.targets, weights=torch.eye(ones.shape[-1])))
    d = int(readouts.shape[-1])
    whole = certify(rows, slice(None), wanted, alone, d)
    constant = sum((group.values[0] for group in rows.constants), torch.zeros_like(ones))
    points = _certified_points(pulled, wanted, alone, constant, d)
    whole = replace(whole, parts=points, splits=("what each layer holds to it",))
    numbers = replace(base.numbers, rows=rows.values)
    held = torch.stack(pulled.held[::-1])
    values, about = rows.values, (query, base.selection, numbers)
    return InputAttribution(values, rows.keys, "input", whole, *about, held=held, mlp=mlp)


def _place(item: tuple[RowKey, Tensor]) -> int:
    return item[0].layer or 0


def _require_understood(once: Run) -> None:
    for key in once.rows.keys:
        if key.kind == "rest" and key.layer is not None:
            raise UnsupportedModelError(
                f"blocks.{key.layer} of {once.parts.reader.architecture} changes the stream beyond"
                f" what is known to write there (row {key.label}), so nothing can be pulled back"
                ' through it; unit="component" works.'
            )


def _certified_points(
    pulled: Pulled, wanted: Wanted, query: Query, constant: Tensor, d: int
) -> dict[str, Reconstruction]:
    """What each layer holds, and what biases after it add, against the logit."""
    found = {}
    for point, held, above, felts in zip(
        pulled.points, pulled.held, pulled.above, pulled.felts, strict=True
    ):
        size = felts.sqrt().to(constant)
        total = held.sum(-1) + above + constant
        absolute = (held.abs().sum(-1) + above.abs() + constant.abs()).sum(-1)
        sizes = Sizes(size, size, wanted.rounded, absolute)
        weights = query.targets.matrix(constant)
        allowed = rounding(sizes, weights, wanted.machine_eps, d).to(constant)
        allowed = allowed.nan_to_num(0.0, posinf=0.0)
        shaped = [query.shaped(x) for x in (wanted.value, total, allowed)]
        want, got, allowed = shaped
        found[point.label] = Reconstruction(want, got, allowed, wanted.against)
    return dict(reversed(found.items()))


# ---- pulling -----------------------------------------------------------------------------------


def directions(once: Run) -> Float[Tensor, "batch pos candidate d_model"]:
    """The readout of the final stream for each candidate, all scales included."""
    rows, readout, query = once.rows, once.parts.readout, once.query
    weights = query.targets.matrix(rows.ratio)
    by_token = torch.einsum("bpt,ct->bpct", rows.ratio, weights)
    base = readout.direction.to(by_token).expand(*by_token.shape[:2], -1, -1)
    direction = by_token @ base
    known = once.parts.scaled(once.kept, query.positions)
    for norm in readout.norms:
        direction = direction / known.scales[norm.name].to(direction)[..., None, None]
    return direction


def pull(
    once: Run,
    network: Network,
    readouts: Float[Tensor, "batch pos candidate d_model"],
    visit: Visit | None = None,
    progress: bool = False,
) -> Pulled:
    """The readouts pulled all the way back, some targets at a time: `[…, batch, pos, candidate]`.

    What the stream holds is `[batch, pos, candidate, source]`.
    """
    query = once.query
    batch, n_pos, n_candidates, d = readouts.shape
    index, valid = query.positions.index.to(readouts.device), query.positions.valid
    n = int(index[valid.to(index.device)].max()) + 1
    readouts = readouts * valid.to(readouts.device)[..., None, None]
    widest = max(d, int(getattr(query.model.cfg, "d_mlp", None) or 4 * d))
    step = max(1, _AT_ONCE // (batch * n * widest))
    targets = [(p, c) for p in range(n_pos) for c in range(n_candidates)]
    parts: list[Pulled] = []
    starts = range(0, len(targets), step)
    for start in tqdm(starts, desc="pull back", disable=not progress or len(starts) < 2):
        chosen = targets[start : start + step]
        p, c = torch.tensor(chosen, device=readouts.device).T
        last = int(index[:, p].max()) + 1
        direction = readouts.new_zeros(batch, last, len(chosen), d)
        rows = torch.arange(batch, device=readouts.device)[:, None]
        direction[rows, index[:, p], torch.arange(len(chosen))[None]] = readouts[:, p, c]
        parts.append(network.pull(once.kept, direction, visit))
    shape = (n_pos, n_candidates)

    def by_source(of: list[Tensor]) -> Tensor:
        padded = [torch.nn.functional.pad(x, (0, 0, 0, n - x.shape[1])) for x in of]
        return rearrange(torch.cat(padded, 2), "b s t -> b t s").unflatten(1, shape)

    def joined(of: list[Tensor]) -> Tensor:
        return torch.cat(of, 1).unflatten(1, shape)

    def each(name: str) -> list[list[Tensor]]:
        return [list(x) for x in zip(*(getattr(part, name) for part in parts), strict=True)]

    first = parts[0]
    return Pulled(
        first.points,
        [by_source(x) for x in each("held")],
        [joined(x) for x in each("above")],
        [joined(x) for x in each("felts")],
        {key: joined([part.biases[key] for part in parts]) for key in first.biases},
        {name: by_source([part.start[name] for part in parts]) for name in first.start},
    )

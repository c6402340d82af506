"""`run` and `again`: the only two ways from a question to rows.

`run` answers a query by one forward pass of the model, or from a cache; `again` asks the question
of a result once more, of another unit or with other rows split, and holds the answer to the first.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_dla.core.certificate import Wanted
from tl_dla.core.decomposition import Decomposition, logit_readout, of_query
from tl_dla.core.mean_logit import Mean, capped_mean
from tl_dla.core.numbers import Numbers
from tl_dla.core.result import Attribution, require_input
from tl_dla.core.rounding import rerun_tolerance
from tl_dla.core.rows import Rows
from tl_dla.core.taps import Kept, Tap, exact, forward, recall
from tl_dla.errors import ArgumentError
from tl_dla.inputs.caches import check_cache, read_cache, require_shape
from tl_dla.inputs.dictionaries import Dictionaries
from tl_dla.inputs.models import require_model
from tl_dla.inputs.query import Query
from tl_dla.inputs.selection import Selection, Unit, require_unit, with_dictionaries
from tl_dla.model.reader import ModelReader
from tl_dla.model.unembedding import is_linear, output_transform, unembed_matrix

OWN_LOGIT = "the model's own logit"
CAUSE = (
    "The likeliest causes: a hook of yours changes activations between the places that are read,"
    " or the model does something to the stream that was not understood;"
    " check_model(model, tokens) shows where."
)
_TOKENS_AT_ONCE = 1024  # target tokens whose directions are pulled back at once
_LOGITS_AT_ONCE = 2**28  # numbers: 1 GiB in float32; more prompts than that are run in parts

SHOWN_AFTER = 5.0  # seconds, of which no bar is drawn

Within = Callable[[slice], AbstractContextManager[None]]
TapsOf = Callable[[slice], Sequence[Tap]]
Result = TypeVar("Result", bound=Attribution)


@dataclass(frozen=True, eq=False)
class Run:
    """One pass: the question, what is split into what, and what the taps kept.

    `unchecked` says in words what could not be checked of the cache that it was read from.
    """

    query: Query
    parts: Decomposition
    kept: Kept
    mean: Mean | None = None
    unchecked: tuple[str, ...] = ()

    @cached_property
    def rows(self) -> Rows:
        """All rows, with the model's constants where the query asks for them."""
        with exact():
            targets = self.query.targets
            return self.parts.rows(self.kept, self.query.positions, self.ratio_of, targets.weights)

    @cached_property
    def readouts(self) -> Int[Tensor, "batch pos token"]:
        """A checksum of each token's direction at the end of the stream."""
        ratio = self.rows.ratio
        return self.parts.readout.checksum().to(ratio.device).expand(ratio.shape).clone()

    @property
    def readout_norm(self) -> Float[Tensor, "batch pos token"]:
        """That of the rows; see `Rows`."""
        if "rows" in self.__dict__:
            return self.rows.readout_norm
        return self.parts.stream.rows(self.parts.reader, self.parts.scaled(self.kept)).readout_norm

    def ratio_of(self, total: Float[Tensor, "batch pos token"]) -> Float[Tensor, "batch pos token"]:
        """The output transform (a multiplier, a soft cap) frozen per token: transformed / raw."""
        raw, logits = self.kept.raw, self.kept.logits
        if raw is None or logits is None:
            raw = total
            logits = output_transform(self.query.model, raw)
        ratio = torch.where(raw == 0, torch.ones_like(raw), logits / raw).to(total)
        if self.mean is not None:  # the mean's direction holds each token's own ratio already
            ratio = torch.cat([ratio[..., :-1], torch.ones_like(ratio[..., -1:])], -1)
        return ratio

    def result(self, of: type[Result]) -> Result:
        """The rows added up over the target tokens and certified, as a result of that class."""
        with exact():
            return _result(self, of)

    def part(self, rows: slice, query: Query) -> "Run":
        """The run of some of the prompts, whose question is `query`."""
        one = Run(query, self.parts, self.kept.part(rows), self.mean, self.unchecked)
        one.__dict__["rows"] = self.rows.map(partial(_batch, rows=rows))
        one.__dict__["readouts"] = self.readouts[rows].clone()
        return one

    def copies(self, n: int, query: Query) -> "list[Run]":
        """The runs of a query that was tiled `n` times, one by one."""
        batch = len(query.prompts.length)
        return [self.part(slice(i * batch, (i + 1) * batch), query) for i in range(n)]


def _batch(x: Tensor, rows: slice) -> Tensor:
    return x[rows] if x.ndim == 3 else x[:, rows]


def run(
    query: Query,
    unit: Unit,
    selection: Selection | None = None,
    *,
    cache: Any = None,
    taps: Sequence[Tap] | TapsOf = (),
    within: Within | None = None,
    reader: ModelReader | None = None,
) -> Run:
    """Ask the model, or a cache of it.

    Args:
        query: the question.
        unit: the rows of the answer.
        selection: which rows are split; all by default.
        cache: an `ActivationCache` to read in place of running the model.
        taps: what else to keep on the way; given which of the prompts run, where it differs.
        within: what the model runs inside of, given which of the prompts run: an edit of it.
        reader: the model as it is now, where it was read already.
    """
    selection = Selection() if selection is None else selection
    reader = ModelReader(query.model) if reader is None else reader
    parts = _in_parts(query)
    taps_of: TapsOf = taps if callable(taps) else lambda _: taps
    everything = taps_of(slice(0, len(query.prompts.length)))

    def read(wanted: Sequence[Tap], logits: bool = False) -> Kept:
        if cache is not None:
            return recall(reader, cache, query, wanted)
        some = []
        for rows in parts:
            with nullcontext() if within is None else within(rows):
                some.append(forward(query.part(rows), wanted, logits=logits))
        return Kept.joined(some, [wanted] * (len(parts) + 1))

    mean = None
    if query.targets.mean_of_vocab and not is_linear(query.model):
        mean = capped_mean(reader, read)
    unchecked: tuple[str, ...] = ()
    if cache is not None:
        unchecked = tuple(
            f"not checked: {x}" for x in check_cache(query.model, cache, query.prompts)
        )
    if several_readings(query):
        one = replace(query, targets=next(query.targets.chunks(1)))
        whole = of_query(one, unit, selection, reader=reader)
        return _by_tokens(query, whole, partial(read, logits=True), everything, unchecked)
    whole = of_query(query, unit, selection, mean, reader)
    if cache is not None:
        return Run(query, whole, read([*whole.taps, *everything]), mean, unchecked)
    some, used = [], [[*whole.taps, *everything]]
    alone = len(parts) > 1 and within is None  # runs of an edited model have a bar of their own
    for rows in tqdm(parts, "prompts", delay=SHOWN_AFTER, leave=False, disable=not alone):
        part, mine = query.part(rows), whole
        if len(parts) > 1:
            mine = of_query(
                part, unit, selection, None if mean is None else mean.part(rows), reader
            )
        used.append([*mine.taps, *(taps_of(rows) if len(parts) > 1 else everything)])
        with nullcontext() if within is None else within(rows):
            some.append(forward(part, used[-1]))
    return Run(query, whole, Kept.joined(some, used), mean)


def again(
    result: Attribution,
    unit: Unit | None = None,
    selection: Selection | None = None,
    *,
    taps: Sequence[Tap] | TapsOf = (),
    cache: Any = None,
    within: Within | None = None,
) -> Run:
    """Ask a result's question once more, and hold the answer to the result's own.

    Args:
        result: whose prompts, positions and targets are run.
        unit: the rows of the answer; the result's own by default.
        selection: which rows are split: the result's own for the same unit, else all.
        taps: as in `run`.
        cache: an `ActivationCache` of the prompts to read in place of running the model; the caller
            then holds the rows to the result's.
        within: as in `run`.

    Raises:
        ArgumentError: where the model cannot be run, or no longer gives the result's logit.
        TokenError: where the cache is of other prompts.
    """
    if cache is None:
        require_input(result)
    else:
        cache = read_cache(result.model, cache)
        require_shape(cache, result.prompts)
    same = unit in (None, result.unit)
    selection = result.selection if same and selection is None else selection
    # The rows of a path add up to a source row, but its question is that of the logit.
    own: Unit = "component" if result.unit == "input" else result.unit
    once = run(result.query, unit or own, selection, taps=taps, cache=cache, within=within)
    if cache is None:
        require_same(result, once.kept, once.readout_norm)
    return once


def direct_unit(result: Attribution) -> Unit:
    """The unit of a direct attribution.

    Raises:
        ArgumentError: for a result of `attribute_inputs`, whose rows are written at no one place.
    """
    if result.unit == "input":
        raise ArgumentError(
            "The rows of attribute_inputs are the whole network's, written at no one place of it:"
            " attribute with direct_logit_attribution for this."
        )
    return result.unit


def require_rerun(result: Attribution) -> None:
    """Raise unless the model can be run on a result's prompts, and gives the result's logits."""
    again(result, "component")


def require_same(
    result: Attribution, kept: Kept, readout_norm: Float[Tensor, "batch pos token"]
) -> None:
    """Raise unless a run gives the logits that a result was made of, but for rounding.

    `readout_norm` is that of the run's rows.
    """
    own, valid = result.numbers.logits, result.positions.valid
    assert kept.logits is not None
    at = valid.to(own.device)
    size = readout_norm.to(own) + own.abs()
    miss = (kept.logits.to(own) - own).abs()
    eps = max(ModelReader(result.model).machine_eps, kept.machine_eps)
    allowed = 2 * rerun_tolerance(eps) * size
    if not bool((miss <= allowed)[at].all()):
        raise ArgumentError(
            "Another run of the result's prompts does not give its logits again (off by"
            f" {float(miss[at].max()):.3g}): it was made from a cache of another run or under"
            " autocast, or the model was changed since. Attribute again with the input."
        )


# ---- reading -----------------------------------------------------------------------------------


def _in_parts(query: Query) -> list[slice]:
    """The prompts in slices whose logits at the attributed positions can be held at once."""
    batch, pos = query.positions.index.shape
    step = max(1, _LOGITS_AT_ONCE // (pos * query.model.cfg.d_vocab))
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def several_readings(query: Query) -> bool:
    """Whether the candidates are too many for their directions to be pulled back at once."""
    return len([*query.targets.chunks(_TOKENS_AT_ONCE)]) > 1


def _by_tokens(
    query: Query,
    whole: Decomposition,
    read: Callable[..., Kept],
    taps: Sequence[Tap],
    unchecked: tuple[str, ...],
) -> Run:
    """A run over very many candidates: the model runs once, the readouts are made part by part.

    What the hooks show is kept as it is, and each part of the candidates reads it. `whole` says
    what is split into what, for any one of them.
    """
    if whole.selection.top_neurons is not None:
        raise ArgumentError("top_neurons ranks neurons for few candidates: leave it out.")
    shown = {_place(tap): replace(tap, read=_as_it_is, together=False) for tap in whole.taps}
    kept = read([*shown.values(), *taps])

    def values(parts: Decomposition) -> dict[Tap, Tensor | tuple[Tensor, ...]]:
        with exact():
            return {tap: tap.read(*kept.values[shown[_place(tap)]]) for tap in parts.taps}

    every, readouts, start = [], [], 0
    for targets in query.targets.chunks(_TOKENS_AT_ONCE):
        some = replace(query, targets=targets)
        parts = of_query(some, whole.unit, whole.selection, reader=whole.reader)
        mine, at = Kept(values(parts)), slice(start, start := start + targets.ids.shape[-1])
        if kept.raw is not None and kept.logits is not None:
            raw, logits = kept.raw[..., at], kept.logits[..., at]
            mine = replace(kept, values=mine.values, raw=raw, logits=logits)
        once = Run(some, parts, mine)
        every.append(once.rows)
        readouts.append(once.readouts)
    own = {tap: kept[tap] for tap in taps}
    run = Run(query, whole, replace(kept, values={**values(whole), **own}), unchecked=unchecked)
    run.__dict__.update(rows=Rows.joined(every), readouts=torch.cat(readouts, -1))
    return run


def _place(tap: Tap) -> tuple[str, bool, bool, bool]:
    """What a tap reads, whatever it makes of it."""
    return tap.site.name, tap.whole, tap.keys, tap.heads_first


def _as_it_is(*x: Tensor) -> tuple[Tensor, ...]:
    """Copies, since the model may go on to change what it shows."""
    return tuple(one.clone() for one in x)


def _result(run: Run, of: type[Result]) -> Result:
    query, kept, rows, parts = run.query, run.kept, run.rows, run.parts
    ratio = rows.ratio
    raw = rows.total if kept.raw is None else kept.raw.to(ratio)
    logits = rows.total * ratio if kept.logits is None else kept.logits.to(ratio)
    expected = logits
    if not query.include_bias:
        for bias in rows.constants:
            expected = expected - bias.values[0] * ratio
        rows = rows.without_constants()
    against = (
        OWN_LOGIT if kept.logits is not None else "the cache's final residual stream, read out"
    )
    eps = max(parts.reader.map_eps, kept.machine_eps)
    wanted = Wanted(expected, logits, against, eps, run.unchecked)
    norm = parts.reader.stream().norm
    known = parts.scaled(kept, query.positions)
    scale = torch.ones_like(ratio[..., 0]) if norm is None else known.scales[norm.name].to(ratio)
    numbers = Numbers(rows.values, ratio, scale, logits, raw, kept.logits is not None, run.readouts)
    about = (parts.unit, parts.selection, parts.readout.direction.shape[-1])
    return of.of(rows, wanted, numbers, query, about)


def required_hooks(
    model: Any, unit: Unit = "component", *, dictionaries: Dictionaries | None = None
) -> list[str]:
    """The hooks that a cache must hold for `unit`, to pass as `names_filter`.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        unit: as in `direct_logit_attribution`; `"source"` also for `top_heads_with_patterns`.
        dictionaries: the same, for `unit="latent"`.

    Raises:
        UnsupportedModelError: where the unit does not work on the model.

    Example:
        >>> from tl_dla import load_model
        >>> model = load_model("demo")
        >>> "ln_final.hook_scale" in required_hooks(model)
        True
    """
    require_unit(unit)
    model = require_model(model)
    reader = ModelReader(model)
    W_U = unembed_matrix(model)
    like = W_U.new_zeros(1, 1, 1, len(W_U))
    logit, _ = logit_readout(reader, like)
    selection = with_dictionaries(Selection(), reader, unit, dictionaries)
    parts = Decomposition(reader, reader.stream().steps, logit, [], unit, selection)
    return sorted({tap.site.name for tap in parts.taps if tap.site.hooked})

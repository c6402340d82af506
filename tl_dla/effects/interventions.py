"""`ablate`: run the model again without what some rows wrote.

A row's place (a head's mixed values, an attention or MLP output, an embedding) is overwritten
during the forward pass, and the same targets are attributed in the run that results: everything
after the place reacts. From the two runs,

    total effect    = logit − logit of the ablated run
    direct effect   = row − row of the ablated run, at the clean run's final scale
    indirect effect = total − direct

so a positive effect means that the row raises the logit, in the direct effect's own sign. The
distinction is that of Pearl 2001, for language models Vig et al. 2020
(https://arxiv.org/abs/2004.12265). What is written in place of the row:

    zero      nothing
    mean      the place's mean activation over the ablated tokens of the reference prompts
    resample  its activation on another prompt

Only the attributed positions are overwritten (`at="position"`), or every token (`at="all"`).
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_dla.core.labelled import require_direct
from tl_dla.core.result import Attribution
from tl_dla.core.run import CAUSE, Run, direct_unit, require_rerun, run
from tl_dla.core.taps import Tap
from tl_dla.effects.substitutes import Ablation, At, Place, ablated_tokens, substitutes
from tl_dla.errors import ArgumentError
from tl_dla.inputs.query import Query
from tl_dla.inputs.selection import Selection
from tl_dla.model.hooks import changed
from tl_dla.model.reader import ModelReader

Result = TypeVar("Result", bound=Attribution)
Group = str | Sequence[str]

ABLATABLE = ("head", "neuron", "attn", "mlp", "ssm", "embed")


@dataclass(frozen=True, eq=False)
class Edit:
    """Overwrite a place, in the batch from row `start` on, where `mask` is True."""

    place: Place
    start: int
    mask: Bool[Tensor, "batch pos"]
    value: Float[Tensor, "#batch #pos width"] | float

    def part(self, rows: slice) -> "Edit | None":
        """The edit in some rows of the batch; None where it is in others."""
        first = max(rows.start - self.start, 0)
        stop = min(rows.stop - self.start, len(self.mask))
        if first >= stop:
            return None
        value = self.value
        if isinstance(value, Tensor) and len(value) > 1:
            value = value[first:stop]
        return Edit(self.place, self.start + first - rows.start, self.mask[first:stop], value)


def ablate(
    result: Result,
    rows: Sequence[Group],
    *,
    ablation: Ablation = "zero",
    at: At = "position",
    reference: str | Sequence[str] | Int[Tensor, "*batch pos"] | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> dict[str, Result]:
    """The same attribution in runs without these rows, one run for each.

    Args:
        result: the attribution whose prompts, targets and positions are run again.
        rows: labels of its rows; a list of labels among them is ablated together, under the name
            `"L9H6+L9H9"`.
        ablation: what is written instead: nothing, the mean, or another prompt's activation.
        at: overwrite the attributed positions only, or every token.
        reference: the prompts that `"mean"` and `"resample"` read. Without it, the attributed
            prompts: `"resample"` then takes each prompt's activation from the prompt before it.
            Positions are matched from the end of the prompts.
        batch_size: prompts in one forward pass; several rows are ablated at once, each in its own
            copy of the prompts.
        progress: show a progress bar.

    Returns:
        For each row its ablated run's attribution: `.logit`, `.attribution` and all the rest.

    Raises:
        ArgumentError: for a row that is not written at one place (biases, rests, residual points),
            for a reference that does not fit, for a result made from a cache without its input.
        ReconstructionError: where an ablated run's rows do not add up to its logit.

    Example:
        >>> from tl_dla import direct_logit_attribution, load_model
        >>> result = direct_logit_attribution(
        ...     load_model("demo"), "The Eiffel Tower is in the city of", " Paris", unit="head"
        ... )
        >>> without = ablate(result, ["L0H1", ["L1H0", "L1H1"]], progress=False)
        >>> list(without)
        ['L0H1', 'L1H0+L1H1']
        >>> total_effect = result.logit - without["L0H1"].logit
    """
    how = How(ablation, at, reference, batch_size, progress)
    runs = run_ablated(result, name_groups(rows), how)
    found = {name: once.result(type(result)) for name, once in runs.items()}
    return {name: one.certified("raise", CAUSE) for name, one in found.items()}


@dataclass(frozen=True, eq=False)
class How:
    """What is written in place of rows, where, and how many prompts run at once; see `ablate`."""

    ablation: Ablation = "zero"
    at: At = "position"
    reference: Any = None
    batch_size: int = 32
    progress: bool = True


def name_groups(rows: Sequence[Group]) -> dict[str, list[str]]:
    """Rows, and rows ablated together, by the name that they go under."""
    groups = [[group] if isinstance(group, str) else list(group) for group in rows]
    if isinstance(rows, str) or not all(groups) or not groups:
        raise ArgumentError(f"Give a list of rows, each a label or a list of labels; got {rows!r}.")
    for group in groups:
        if len(set(group)) < len(group):
            raise ArgumentError(f"Each row of a group is ablated once; got {group!r}.")
    return {"+".join(group): group for group in groups}


def run_ablated(
    result: Attribution, groups: dict[str, list[str]], how: How, taps: Sequence[Tap] = ()
) -> dict[str, Run]:
    """See `ablate`; `taps` are kept in every ablated run beside those of the rows."""
    require_direct(result)
    require_rerun(result)
    if how.batch_size < 1:
        raise ArgumentError(f"batch_size must be at least 1; {how.batch_size} was given.")
    places = {
        name: [place_of(result, label) for label in labels] for name, labels in groups.items()
    }
    values = substitutes(result, places, how.ablation, how.at, how.reference)
    mask = ablated_tokens(result.prompts, result.positions, how.at)
    batch = len(result.prompts.tokens)
    copies = max(1, how.batch_size // batch)
    # A run without its embeddings is never shared: how the stream starts is read off the whole run.
    embeds = [name for name, labels in groups.items() if {"embed", "pos_embed"} & set(labels)]
    others = [name for name in groups if name not in embeds]
    chunks = [[name] for name in embeds]
    chunks += [others[i : i + copies] for i in range(0, len(others), copies)]
    runs: dict[str, Run] = {}
    # The neurons that have rows in the clean run, whichever are the largest in these.
    unit, selection = direct_unit(result), _pinned(result)
    with tqdm(total=len(groups), desc="ablate", unit="row", disable=not how.progress) as bar:
        for names in chunks:
            edits = [
                Edit(place, i * batch, mask, value)
                for i, name in enumerate(names)
                for place, value in zip(places[name], values[name], strict=True)
            ]
            every = torch.arange(batch, device=result.prompts.tokens.device)
            tiled = result.query.part(every.repeat(len(names)))

            def within(rows: slice, edits: list[Edit] = edits, tiled: Query = tiled) -> Any:
                mine = [part for edit in edits if (part := edit.part(rows)) is not None]
                return editing(result.model, mine, tiled.part(rows))

            once = run(tiled, unit, selection, taps=taps, within=within)
            runs |= zip(names, once.copies(len(names), result.query), strict=True)
            bar.update(len(names))
    return {name: runs[name] for name in groups}


def place_of(result: Attribution, label: str) -> Place:
    """Where the row is written from.

    Raises:
        ArgumentError: for a row that is not written at one place.
    """
    key, reader = result.keys[result.index(label)], ModelReader(result.model)
    if key.kind == "head" and key.layer is not None and key.index is not None:
        part = reader.attention(key.layer)
        assert part is not None
        return Place(part.site, key.index, part.W_O.shape[0])
    if key.kind == "neuron" and key.layer is not None and key.index is not None:
        if (mlp := reader.neurons(key.layer)) is not None:
            return Place(mlp.site, key.index, mlp.W_out.shape[0])
    for step in reader.stream().writes:
        if (step.layer, step.name) == (key.layer, key.name):
            return Place(step.site)
    raise ArgumentError(
        f"Row {label!r} (kind {key.kind!r}) is not written at one place that could be overwritten;"
        f" rows of kind {', '.join(ABLATABLE)} are."
    )


def added_up(
    result: Attribution, tokens: Float[Tensor, "batch pos token"]
) -> Float[Tensor, "*batch_and_pos"]:
    """The target tokens' values added up as the result's own are, and shown at its positions."""
    return result.query.shaped(result.targets.added(tokens))


def _pinned(result: Attribution) -> Selection:
    if result.selection.top_neurons is None:
        return result.selection
    neurons = [
        (key.layer, key.index)
        for key in result.keys
        if key.kind == "neuron" and key.layer is not None and key.index is not None
    ]
    return replace(result.selection, top_neurons=None, neurons=tuple(neurons))


_NO_PARTS = (
    "Heads and neurons cannot be overwritten one by one",
    "what a whole sublayer writes (0_attn_out, 0_mlp_out) can be.",
)


@contextmanager
def editing(model: Any, edits: Sequence[Edit], query: Query) -> Iterator[None]:
    """The model with these edits: hooks added after it see the edited activations."""
    batch, pos = query.prompts.packed.shape
    thread = threading.get_ident()

    def edit(activation: Any, mine: list[Edit]) -> Any:
        if threading.get_ident() != thread:
            return activation  # a pass of the user's own, in another thread
        if isinstance(activation, tuple):
            return (edit(activation[0], mine), *activation[1:])
        # Positional embeddings may come once for all prompts, experts with batch and pos in one.
        shared = activation.shape[0] == 1 and batch > 1 and activation.shape[1] == pos
        x = activation.expand(batch, *activation.shape[1:]) if shared else activation
        shape, x = x.shape, x.reshape(batch, pos, -1).clone()
        for e in mine:
            rows = slice(e.start, e.start + len(e.mask))
            if e.place.site.shares is not None:
                e.place.site.shares.require_whole(x, *_NO_PARTS)
            columns = e.place.columns(x.shape[-1])
            old = x[rows, :, columns]
            value = torch.as_tensor(e.value).to(old)
            x[rows, :, columns] = torch.where(e.mask[..., None].to(x.device), value, old)
        return x.reshape(shape)

    by_site: dict[str, list[Edit]] = {}
    for e in edits:
        by_site.setdefault(e.place.site.name, []).append(e)
    changes = [(mine[0].place.site, partial(edit, mine=mine)) for mine in by_site.values()]
    with changed(model, changes):
        yield

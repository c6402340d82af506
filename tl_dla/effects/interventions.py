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

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_dla.attribution import assemble, make_plan
from tl_dla.core.assembly import shaped
from tl_dla.core.neurons import Neurons
from tl_dla.core.result import DirectLogitAttribution, require_input
from tl_dla.core.rows import Heads
from tl_dla.core.taps import Probe, Recording, run
from tl_dla.effects.substitutes import Ablation, At, Place, ablated_tokens, substitutes
from tl_dla.errors import ArgumentError
from tl_dla.inputs.selection import Choice
from tl_dla.inputs.targets import Targets
from tl_dla.inputs.tokens import Positions, Prompts

Group = str | Sequence[str]

ABLATABLE = ("head", "neuron", "attn", "mlp", "ssm", "embed")


@dataclass(frozen=True, eq=False)
class Edit:
    """Overwrite a place, in some rows of the batch, where `mask` is True."""

    place: Place
    rows: slice
    mask: Bool[Tensor, "batch pos"]
    value: Float[Tensor, "#batch #pos width"] | float


def ablate(
    result: DirectLogitAttribution,
    rows: Sequence[Group],
    *,
    ablation: Ablation = "zero",
    at: At = "position",
    reference: str | Sequence[str] | Int[Tensor, "*batch pos"] | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> dict[str, DirectLogitAttribution]:
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
        ArgumentError: for a row that is not written at one place (biases, rests, residual sights),
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
    return run_ablated(
        result,
        name_groups(rows),
        ablation=ablation,
        at=at,
        reference=reference,
        batch_size=batch_size,
        progress=progress,
    )


def name_groups(rows: Sequence[Group]) -> dict[str, list[str]]:
    """Rows, and rows ablated together, by the name that they go under."""
    groups = [[group] if isinstance(group, str) else list(group) for group in rows]
    if isinstance(rows, str) or not all(groups) or not groups:
        raise ArgumentError(f"Give a list of rows, each a label or a list of labels; got {rows!r}.")
    return {"+".join(group): group for group in groups}


def run_ablated(
    result: DirectLogitAttribution,
    groups: dict[str, list[str]],
    *,
    ablation: Ablation,
    at: At,
    reference: Any,
    batch_size: int,
    progress: bool,
    probes: Sequence[Probe] = (),
) -> dict[str, DirectLogitAttribution]:
    """See `ablate`; `probes` are read in every ablated run beside those of the rows."""
    require_input(result)
    if batch_size < 1:
        raise ArgumentError(f"batch_size must be at least 1; {batch_size} was given.")
    places = {
        name: [place_of(result, label) for label in labels] for name, labels in groups.items()
    }
    values = substitutes(result, places, ablation, at, reference)
    mask = ablated_tokens(result.prompts, result.positions, at)
    batch = len(result.prompts.tokens)
    copies = max(1, batch_size // batch)
    # A run without its embeddings is never shared: how the stream starts is read off the whole run.
    embeds = [name for name, labels in groups.items() if {"embed", "pos_embed"} & set(labels)]
    others = [name for name in groups if name not in embeds]
    chunks = [[name] for name in embeds]
    chunks += [others[i : i + copies] for i in range(0, len(others), copies)]
    runs: dict[str, DirectLogitAttribution] = {}
    with tqdm(total=len(groups), desc="ablate", unit="row", disable=not progress) as bar:
        for names in chunks:
            edits = [
                Edit(place, slice(i * batch, (i + 1) * batch), mask, value)
                for i, name in enumerate(names)
                for place, value in zip(places[name], values[name], strict=True)
            ]
            runs |= zip(names, _run_edited(result, edits, len(names), probes), strict=True)
            bar.update(len(names))
    return {name: runs[name] for name in groups}


def place_of(result: DirectLogitAttribution, label: str) -> Place:
    """Where the row is written from.

    Raises:
        ArgumentError: for a row that is not written at one place.
    """
    result[label]  # an unknown label has its own message
    kind = result.kinds[result.labels.index(label)]
    if (place := _place_of_part(result, label)) is not None:
        return place
    for step in result.plan.stream.writes:
        if step.label == label:
            return Place(step.site)
    raise ArgumentError(
        f"Row {label!r} (kind {kind!r}) is not written at one place that could be overwritten;"
        f" rows of kind {', '.join(ABLATABLE)} are."
    )


def _place_of_part(result: DirectLogitAttribution, label: str) -> Place | None:
    """The place of a head or a neuron."""
    for refinement in result.plan.refinements.values():
        if isinstance(refinement, Heads):
            letter, parts = "H", refinement.part.W_O.shape[0]
        elif isinstance(refinement, Neurons):
            letter, parts = "N", refinement.part.W_out.shape[0]
        else:
            continue
        if found := re.fullmatch(rf"L{refinement.layer}{letter}(\d+)", label):
            return Place(refinement.part.site, int(found[1]), parts)
    return None


def added_up(
    result: DirectLogitAttribution, tokens: Float[Tensor, "batch pos token"]
) -> Float[Tensor, "*batch_and_pos"]:
    """The target tokens' values added up as the result's own are, and shown at its positions."""
    return shaped(tokens @ result.targets.weights.to(tokens).mT, result.targets, result.positions)


# ---- running -----------------------------------------------------------------------------------


def _run_edited(
    result: DirectLogitAttribution, edits: Sequence[Edit], copies: int, probes: Sequence[Probe]
) -> list[DirectLogitAttribution]:
    """The attribution in each copy of the prompts, the edits in place."""
    # The neurons that have rows in the clean run, whichever are the largest in this one.
    plan, choice = result.plan, _pinned(result)
    plan = plan.split_into(plan.unit, choice)
    targets, tiled = _tile_targets(result.targets, copies), plan
    if targets is not result.targets:
        tiled = make_plan(plan.reader, targets, plan.unit, plan.include_bias, choice)
    prompts = _tile_prompts(result.prompts, copies)
    with editing(result.model, edits, prompts):
        positions = _tile_positions(result.positions, copies)
        seen = run(result.model, prompts, positions, [*tiled.probes, *probes], targets)
    batch = len(result.prompts.tokens)
    return [
        assemble(
            plan,
            _part(seen, slice(i * batch, (i + 1) * batch)),
            result.prompts,
            result.positions,
            result.targets,
            check="raise",
            from_cache=False,
        )
        for i in range(copies)
    ]


def _pinned(result: DirectLogitAttribution) -> Choice:
    choice = result.plan.choice
    if choice.top_neurons is None:
        return choice
    neurons = [label for label in result.labels if re.fullmatch(r"L\d+N\d+", label)]
    return replace(choice, top_neurons=None, neurons=tuple(neurons))


@contextmanager
def editing(model: Any, edits: Sequence[Edit], prompts: Prompts) -> Iterator[None]:
    """The model with these edits: hooks added after it see the edited activations."""
    batch, pos = prompts.packed.shape

    def edit(activation: Any, mine: list[Edit]) -> Any:
        if isinstance(activation, tuple):
            return (edit(activation[0], mine), *activation[1:])
        # Positional embeddings may come once for all prompts, experts with batch and pos in one.
        shared = activation.shape[0] == 1 and batch > 1 and activation.shape[1] == pos
        x = activation.expand(batch, *activation.shape[1:]) if shared else activation
        shape, x = x.shape, x.reshape(batch, pos, -1).clone()
        for e in mine:
            columns = e.place.columns(x.shape[-1])
            old = x[e.rows, :, columns]
            value = torch.as_tensor(e.value).to(old)
            x[e.rows, :, columns] = torch.where(e.mask[..., None].to(x.device), value, old)
        return x.reshape(shape)

    by_site: dict[str, list[Edit]] = {}
    for e in edits:
        by_site.setdefault(e.place.site.name, []).append(e)
    with ExitStack() as stack:
        hooks = []
        for name, mine in by_site.items():
            site = mine[0].place.site
            if site.hooked:
                hooks.append((name, lambda x, hook, mine=mine: edit(x, mine)))
            else:
                handle = site.module.register_forward_hook(
                    lambda _m, _a, output, mine=mine: edit(output, mine)
                )
                stack.callback(handle.remove)
        stack.enter_context(model.hooks(fwd_hooks=hooks))
        yield


def _tile_prompts(prompts: Prompts, copies: int) -> Prompts:
    """The prompts several times over."""
    start, length = prompts.start.repeat(copies), prompts.length.repeat(copies)
    return Prompts(prompts.tokens.repeat(copies, 1), start, length)


def _tile_positions(positions: Positions, copies: int) -> Positions:
    """Their positions likewise."""
    index, valid = positions.index.repeat(copies, 1), positions.valid.repeat(copies, 1)
    return Positions(index, valid, positions.single, positions.every)


def _tile_targets(targets: Targets, copies: int) -> Targets:
    if targets.ids.shape[0] == 1 or copies == 1:
        return targets
    ids = targets.ids.repeat(copies, 1, 1)
    return Targets(ids, targets.weights, targets.candidates, targets.mean_of_vocab)


def _part(seen: Recording, rows: slice) -> Recording:
    assert seen.raw is not None and seen.logits is not None
    values = {key: value[rows] for key, value in seen.values.items()}
    return Recording(values, seen.raw[rows], seen.logits[rows])

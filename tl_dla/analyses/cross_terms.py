"""The cross terms of a comparison: one run's rows, read out as the other run's are.

Where the readouts differ by the norm's scale and the soft cap alone, rows are multiplied by numbers
that both results hold, which is exact and needs no run. Else each model runs once more, with the
other's readout pulled back through it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.analyses.comparable import same_answers
from tl_dla.core.certificate import Reconstruction, Wanted, certify
from tl_dla.core.decomposition import B_U, LN_FINAL_B, Decomposition
from tl_dla.core.final_readout import token_readout
from tl_dla.core.result import Attribution
from tl_dla.core.rows import RowKey, aligned
from tl_dla.core.run import Run, again, direct_unit, several_readings
from tl_dla.core.taps import Tap, exact
from tl_dla.errors import ArgumentError
from tl_dla.model.reader import ModelReader
from tl_dla.model.stream import FINAL


@dataclass(frozen=True, eq=False)
class Crossed:
    """One run's rows read out as the other run's are; the certificate of the run that it took."""

    keys: Sequence[RowKey]
    values: Float[Tensor, "row batch pos candidate"]
    name: str = ""
    reconstruction: Reconstruction | None = None


def read_alike(a: Attribution, b: Attribution) -> bool:
    """Whether the readouts are the same directions, so that scales and ratios alone differ."""
    one, other = a.numbers.readouts, b.numbers.readouts
    assert one is not None and other is not None
    valid = a.positions.valid.cpu()
    return same_answers(a, b) and torch.equal(one.cpu()[valid], other.cpu()[valid])


@exact()
def by_scales(a: Attribution, b: Attribution) -> tuple[Crossed, Crossed]:
    """The rows of a with b's scale and soft cap, and those of b with a's."""

    def crossed(rows: Attribution, readout: Attribution) -> Crossed:
        own, other = rows.numbers, readout.numbers
        change = own.scale.to(own.rows) / other.scale.to(own.rows)
        ratio = other.ratio.to(own.rows) * change[..., None]
        return Crossed(rows.keys, rows.targets.added(own.rows * ratio))

    return crossed(a, b), crossed(b, a)


def by_runs(a: Attribution, b: Attribution) -> tuple[Crossed, Crossed]:
    """The same where directions differ: each model runs again, with the other's readout."""
    if (a.selection.top_neurons, a.selection.top_latents) != (None, None):
        raise ArgumentError(
            f"The largest {a.unit}s are compared between runs of one model and one answer: leave"
            f" out top_{a.unit}s=."
        )
    if several_readings(a.query):
        raise ArgumentError(
            "Two models, or two answers, are compared over at most 1,024 candidates: attribute to"
            " fewer."
        )
    names = "a's rows, read out as b's,", "b's rows, read out as a's,"
    return _run(a, b, names[0]), _run(b, a, names[1])


def _run(rows: Attribution, readout: Attribution, name: str) -> Crossed:
    reader, n = ModelReader(rows.model), len(rows.prompts.length)
    directions = replace(token_readout(readout), norms=())

    @exact()
    def parts(prompts: slice) -> Decomposition:
        own, about = directions.part(prompts), (direct_unit(rows), rows.selection)
        return Decomposition(reader, reader.stream().steps, own, [], *about)

    whole = parts(slice(0, n))

    def taps(prompts: slice) -> list[Tap]:
        return (whole if prompts == slice(0, n) else parts(prompts)).taps

    once = again(rows, "component", taps=taps)
    with exact():
        return _crossed(whole, once, readout, name)


def _crossed(whole: Decomposition, once: Run, readout: Attribution, name: str) -> Crossed:
    reader, other = whole.reader, readout.numbers
    found = whole.rows(once.kept, once.query.positions)
    ratio = other.ratio.to(found.total) / other.scale.to(found.total)[..., None]
    found = replace(found, ratio=ratio)
    total, eps = found.total * ratio, max(reader.machine_eps, once.kept.machine_eps)
    against = "the final stream, read out so"
    wanted = Wanted(total, torch.zeros_like(total), against, eps)
    kept = added(found.keys)
    certificate = certify(found, kept, wanted, readout.query, whole.readout.direction.shape[-1])
    values = readout.targets.added(found.values * ratio)
    return Crossed(found.keys, values, name, certificate)


# ---- rows --------------------------------------------------------------------------------------


def added(keys: Sequence[RowKey]) -> list[int]:
    """The rows that add up: all, or of the readings of a stream the last one and the biases."""
    return [i for i, key in enumerate(keys) if key.kind != "residual" or key.name == FINAL]


def split(
    a: Attribution, b: Attribution, crossed: tuple[Crossed, Crossed], keys: Sequence[RowKey]
) -> tuple[Float[Tensor, "row batch pos candidate"], ...]:
    """The rows of a, those of b, and the two terms of their difference: wrote and read."""
    own_a, own_b = (aligned(one.keys, one.values, keys) for one in (a, b))
    a_as_b, b_as_a = (aligned(one.keys, one.values, keys).to(own_a) for one in crossed)
    own_b = own_b.to(own_a)
    wrote = ((own_b - a_as_b) + (b_as_a - own_a)) / 2
    read = ((own_b - b_as_a) + (a_as_b - own_a)) / 2
    constant = torch.tensor([key in (LN_FINAL_B, B_U) for key in keys], device=own_a.device)
    constant = constant[:, None, None, None]
    wrote = torch.where(constant, 0.0, wrote)
    return own_a, own_b, wrote, torch.where(constant, own_b - own_a, read)


def certified(
    a: Attribution,
    b: Attribution,
    keys: Sequence[RowKey],
    change: Float[Tensor, "row batch pos candidate"],
    crossed: Sequence[Crossed],
) -> Reconstruction:
    """The changes against that of the logit, and what ran for them against its own stream."""
    one, other = a.reconstruction, b.reconstruction
    against = one.against if one.against == other.against else "the logit"
    tolerance = one.tolerance + other.tolerance.to(one.tolerance)
    rests = [side.unexplained for side in (one, other)]
    last = "the changes of the last reading and the biases make"
    return Reconstruction(
        b.logit.to(a.logit) - a.logit,
        b.query.shaped(change[added(keys)].sum(0)),
        tolerance,
        f"the change of {against}",
        {x.name: x.reconstruction for x in crossed if x.reconstruction is not None},
        {key: max(r.get(key, 0.0) for r in rests) for key in dict.fromkeys([*rests[0], *rests[1]])},
        tuple(dict.fromkeys([*one.unchecked, *other.unchecked])),
        last if a.unit == "layer" else "changes add up to",
    )

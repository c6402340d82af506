"""`copy_suppression`: how much of a negative head's row comes from copies of the answer.

A head's row is a sum over source tokens, pattern × value read through W_O, and a head that
suppresses copying writes against the token that it attends to (McDougall et al. 2023,
https://arxiv.org/abs/2310.04625). Of a head whose row is negative,

    share = (sum over source tokens that are the answer) / row

Measured by taking the head's values at those tokens away, with its pattern and every norm's scale
as they were: a head's mixed values are linear in its values, so what goes is exactly that sum. A
share above 1 means that other source tokens write for the answer. It says where the row comes
from; that earlier rows predicting the answer cause it is for ablation to show.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.interventions import (
    Edit,
    added_up,
    editing,
    tile_positions,
    tile_prompts,
)
from tl_dla.model import Attention, Site
from tl_dla.recording import Probe, run
from tl_dla.result import DirectLogitAttribution
from tl_dla.substitutes import Place


def copy_suppression(
    result: DirectLogitAttribution, rows: Sequence[str] | None = None
) -> Float[Tensor, " row *batch_and_pos"]:
    """The share of each negative head's row that comes from source tokens equal to the answer.

    Args:
        result: an attribution with `unit="head"`.
        rows: its rows to look at; all of them, if not given.

    Returns:
        `[row, *batch_and_pos]`: 0 where no source token is the answer; NaN for rows that are not
        heads, for heads whose mean row is positive, and where the model shows no values (hook_v).

    Example:
        >>> from tl_dla import direct_logit_attribution, load_model
        >>> result = direct_logit_attribution(
        ...     load_model("demo"), "The Eiffel Tower is in the city of", " Paris", unit="head"
        ... )
        >>> copy_suppression(result).shape == result.attribution.shape
        True
    """
    rows = result.labels if rows is None else rows
    heads = {row: found for row in rows if (found := _negative_head(result, row)) is not None}
    nothing = torch.full_like(result.logit, torch.nan)
    if not heads:
        return torch.stack([nothing for _ in rows])
    without = _without_answers(result, heads)
    shares = {}
    for row, (attention, head, _) in heads.items():
        own = result.seen.values[f"heads {attention.layer}"][..., head].to(result.ratio)
        # Both before the division by the scales, which are the same and cancel.
        gone, whole = (own - without[row]) * result.ratio, own * result.ratio
        shares[row] = added_up(result, gone) / added_up(result, whole)
    return torch.stack([shares.get(row, nothing) for row in rows])


def _negative_head(result: DirectLogitAttribution, row: str) -> tuple[Attention, int, Site] | None:
    """The head's layer, index and the site of its values; None for every other row."""
    for attention, _, _ in result.plan.attention:
        for head in range(attention.W_O.shape[0]):
            if row != f"L{attention.layer}H{head}":
                continue
            site = result.plan.reader.site(f"blocks.{attention.layer}.attn.hook_v")
            negative = float(result[row].nanmean()) < 0
            return (attention, head, site) if negative and site is not None else None
    return None


def _without_answers(
    result: DirectLogitAttribution, heads: dict[str, tuple[Attention, int, Site]]
) -> dict[str, Float[Tensor, "batch pos token"]]:
    """What each head reads out to, before the scales, without its values at copies of the answer.

    One forward pass for each position that has an answer of its own (one, where they share it),
    with a copy of the prompts for each head.
    """
    prompts, positions = result.prompts, result.positions
    batch, answers = len(prompts.tokens), result.targets.ids[..., 0].to(prompts.tokens.device)
    n_kv = getattr(result.model.cfg, "n_key_value_heads", None) or result.model.cfg.n_heads
    probes = {f"heads {a.layer}" for a, _, _ in heads.values()}
    plan_probes = [probe for probe in result.plan.probes if probe.key in probes]
    found: dict[str, list[Tensor]] = {row: [] for row in heads}
    for p in range(answers.shape[1]):
        mask = prompts.packed == answers[:, p, None]
        edits = []
        for i, (attention, head, site) in enumerate(heads.values()):
            # Query heads that share a key-value head are in consecutive groups.
            group = head * n_kv // attention.W_O.shape[0]
            edits.append(
                Edit(Place(site, group, n_kv), slice(i * batch, (i + 1) * batch), mask, 0.0)
            )
        tiled = tile_prompts(prompts, len(heads))
        with editing(result.model, edits, tiled):
            seen = run(
                result.model,
                tiled,
                tile_positions(positions, len(heads)),
                _untiled(plan_probes, batch),
                None,
            ).values
        for i, (row, (attention, head, _)) in enumerate(heads.items()):
            found[row].append(seen[f"heads {attention.layer}"][i, ..., head].to(result.ratio))
    # Position p is read in pass p, where positions have answers of their own.
    return {
        row: passes[0]
        if len(passes) == 1
        else torch.stack([x[:, p] for p, x in enumerate(passes)], 1)
        for row, passes in found.items()
    }


def _untiled(probes: Sequence[Probe], batch: int) -> list[Probe]:
    """Probes made for the prompts, read on several copies of them: `[copy, batch, pos, …]`."""

    def read(probe: Probe, x: Tensor) -> Tensor:
        return torch.stack([probe.read(part) for part in x.split(batch)])

    return [Probe(p.key, p.site, lambda x, p=p: read(p, x)) for p in probes]

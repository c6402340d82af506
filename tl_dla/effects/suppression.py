"""`copy_suppression`: how much of a negative head's row comes from copies of the answer.

A head's row is a sum over source tokens (`unit="source"`: pattern × value, read through W_O), and a
head that suppresses copying writes against the token that it attends to (McDougall et al. 2023,
https://arxiv.org/abs/2310.04625). Of a head whose row is negative,

    copied = sum over source tokens that are the answer,      share = copied / row

in logits. A share above 1 means that other source tokens write for the answer. It says where the
row comes from; that it comes of earlier rows predicting the answer is for ablation to show.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.labelled import require_direct, require_rows
from tl_dla.core.result import Attribution
from tl_dla.core.run import CAUSE, again
from tl_dla.inputs.selection import Selection


def copy_suppression(
    result: Attribution, rows: Sequence[str] | None = None
) -> Float[Tensor, " row *batch_and_pos"]:
    """What each negative head's row owes to source tokens equal to the answer, in logits.

    Args:
        result: an attribution of one logit or difference. The model runs once more on its prompts.
        rows: its rows to look at; all of them, if not given.

    Returns:
        `[row, *batch_and_pos]`: divide by the row for the share. 0 where no source token is the
        answer; NaN for rows that are not heads and heads whose mean row is positive.

    Raises:
        ArgumentError: for a result made from a cache without its input, and for no row.
        KeyError: for a row that the result does not have.
        UnsupportedModelError: where the model's heads cannot be split by source token.

    Example:
        >>> from tl_dla import direct_logit_attribution, load_model
        >>> result = direct_logit_attribution(
        ...     load_model("demo"), "The Eiffel Tower is in the city of", " Paris", unit="head"
        ... )
        >>> copy_suppression(result).shape == result.attribution.shape
        True
    """
    require_direct(result)
    rows = result.labels if rows is None else require_rows(result, rows)
    keys = {row: result.keys[result.index(row)] for row in rows}
    heads = {
        (key.layer or 0, key.index or 0): row
        for row, key in keys.items()
        if key.kind == "head" and float(result[row].nanmean()) < 0
    }
    nothing = torch.full_like(result.logit, torch.nan)
    if not heads:
        return torch.stack([nothing for _ in rows])
    once = again(result, "source", Selection(heads=tuple(heads)))
    sources = once.result(Attribution).certified("raise", CAUSE)
    prompts, positions, targets = result.prompts, result.positions, result.targets
    # [batch, pos, source]: a causal head sees no later copy, and its row of one is 0.
    copies = prompts.packed[:, None] == targets.ids[..., :1].to(prompts.packed.device)
    copies = copies.expand(*positions.index.shape, -1).to(result.logit)
    copied = dict.fromkeys(heads.values(), torch.zeros_like(result.logit))
    for key, value in zip(sources.keys, sources.attribution.to(result.logit), strict=True):
        if key.source is not None:
            label = heads[key.layer or 0, key.index or 0]
            copied[label] = copied[label] + value * positions.squeeze(copies[..., key.source])
    return torch.stack([copied.get(row, nothing) for row in rows])

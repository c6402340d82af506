"""The readouts of a run pulled back through the whole network, some targets at a time."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from tqdm.auto import tqdm

from tl_dla.core.network.pull import Network, Pulled, Visit
from tl_dla.core.run import Run

_AT_ONCE = 2**26  # numbers of a direction at the widest place; more targets are pulled in parts


def directions(once: Run) -> Float[Tensor, "batch pos candidate d_model"]:
    """The readout of the final stream for each candidate, all scales included."""
    rows, readout, query = once.rows, once.parts.readout, once.query
    tokens = readout.direction.to(rows.ratio) * rows.ratio[..., None]
    direction = query.targets.added(tokens.mT).mT
    known = once.parts.scaled(once.kept, query.positions)
    for norm in readout.norms:
        direction = direction / known.scales[norm.name].to(direction)[..., None, None]
    return direction * query.positions.valid.to(direction)[..., None, None]


def pull_all(
    once: Run,
    network: Network,
    readouts: Float[Tensor, "batch pos candidate d_model"],
    visit: Visit | None = None,
    progress: bool = False,
) -> Pulled:
    """Every readout pulled back to the embeddings: `target` is `pos candidate` in what is found."""
    index, valid = once.query.positions.index, once.query.positions.valid
    index = index.to(readouts.device)
    n_pos, n_candidates, d = readouts.shape[1:]
    last = int(index[valid.to(index.device)].max()) + 1
    cfg = once.query.model.cfg
    widest = max(d, int(getattr(cfg, "d_mlp", None) or 4 * d))
    step = max(1, _AT_ONCE // (len(index) * last * widest))
    targets = [(p, c) for p in range(n_pos) for c in range(n_candidates)]
    parts: list[Pulled] = []
    starts = range(0, len(targets), step)
    for start in tqdm(starts, desc="pull back", disable=not progress or len(starts) < 2):
        p, c = torch.tensor(targets[start : start + step], device=readouts.device).T
        n = int(index[:, p].max()) + 1
        direction = readouts.new_zeros(len(index), n, len(p), d)
        prompt = torch.arange(len(index), device=readouts.device)[:, None]
        target = torch.arange(len(p), device=readouts.device)[None]
        direction[prompt, index[:, p], target] = readouts[:, p, c]
        parts.append(network.pull(once.kept, direction, visit))

    def by_source(found: list[Tensor]) -> Float[Tensor, "batch pos candidate source"]:
        padded = [pad(x, (0, last - x.shape[-1])) for x in found]
        return torch.cat(padded, 1).unflatten(1, (n_pos, n_candidates))

    def joined(found: list[Tensor]) -> Float[Tensor, "batch pos candidate"]:
        return torch.cat(found, 1).unflatten(1, (n_pos, n_candidates))

    first = parts[0]
    points = range(len(first.points))
    return Pulled(
        first.points,
        [by_source([part.held[i] for part in parts]) for i in points],
        [joined([part.above[i] for part in parts]) for i in points],
        [joined([part.felt[i] for part in parts]) for i in points],
        {key: joined([part.biases[key] for part in parts]) for key in first.biases},
        {name: by_source([part.start[name] for part in parts]) for name in first.start},
    )

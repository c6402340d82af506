"""A score as a bilinear form of what attention reads, and each of its sides as rows.

    score = q · k + bias,      q = to_q · ln1(x[query]) + b_Q,      k = to_k · ln1(x[keys]) + b_K

with every norm scale, rotation and soft cap frozen at its value. With k fixed the score is linear
in the stream at the query's position, with q fixed in the stream at the keys': two readouts. The
parts of q times the parts of k are the pairs.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tl_dla.core.readout import Readout
from tl_dla.core.rows import RowGroup, RowKey, Rows
from tl_dla.model.norms import Norm
from tl_dla.model.queries_keys import QueriesAndKeys

SCORE_BIAS = "score_bias"


@dataclass(frozen=True, eq=False)
class ScoreForm:
    """The score as a bilinear form of what attention reads, every scale and cap frozen.

    Attributes:
        q, k: the query; the sum over keys of weight × key, with the sign of `versus`, the scale
            and the frozen cap in the weight. The score is q · k + bias.
        to_q, to_k: from ln1's output at each position to its part of q and k.
        b_Q, b_K: the parts of q and k that are constant.
        bias: what is added to the score, whoever wrote.
        felt: ‖v ⊙ w‖ over the steps from x to q and k, where the model rounds.
        dots: ‖q ⊙ k‖ of the products.
        scores: of each key, as they come out here.
    """

    q: Float[Tensor, "batch d_head"]
    k: Float[Tensor, "batch d_head"]
    to_q: Float[Tensor, "batch 1 d_model d_head"]
    to_k: Float[Tensor, "batch key d_model d_head"]
    b_Q: Float[Tensor, "batch d_head"]
    b_K: Float[Tensor, "batch d_head"]
    bias: Float[Tensor, " batch"]
    felt: Float[Tensor, " batch"]
    dots: Float[Tensor, " batch"]
    scores: Float[Tensor, "batch key"]

    @staticmethod
    def of(
        qk: QueriesAndKeys,
        head: int,
        x: Float[Tensor, "batch place d_model"],
        rotation: Float[Tensor, "batch place d_head d_head"] | None,
        bias: Float[Tensor, "batch key"],
        at: Int[Tensor, " batch"],
    ) -> "ScoreForm":
        """At the query's place, which is the first, and the keys'; `at` is its position."""
        R_q, R_k = (None, None) if rotation is None else (rotation[:, :1], rotation[:, 1:])
        query, key = qk.query.freeze(x[:, :1], R_q), qk.key.freeze(x[:, 1:], R_k)
        group = head * key.value.shape[-2] // query.value.shape[-2]
        q, k = query.value[:, 0, head], key.value[:, :, group]
        b_Q, b_K = query.constant[:, 0, head], key.constant[:, :, group]
        scale = torch.full_like(bias[:, :1], qk.scale)
        if qk.temperature is not None:
            scale = scale * qk.temperature(at)[:, None].to(scale)
        raw = torch.einsum("bd,bkd->bk", q, k) * scale + bias
        scores = raw if qk.cap is None else qk.cap * torch.tanh(raw / qk.cap)
        ratio = torch.where(raw == 0, 1.0, scores / raw)
        ratio = ratio * torch.tensor([1.0, -1.0]).to(ratio)[: raw.shape[1]]
        weight = (scale * ratio)[..., None]
        k_sum = (weight * k).sum(1)
        basis = torch.eye(q.shape[-1]).to(q)[:, None, None]
        every = [basis.expand(-1, *y.shape[:2], -1) for y in (query.value, key.value)]
        to_q = query.back(every[0], head).movedim(0, -1) * qk.factor
        to_k = key.back(every[1], group).movedim(0, -1) * qk.factor
        felt = query.felt(k_sum[:, None], head).sum(1) + key.felt(weight * q[:, None], group).sum(1)
        return ScoreForm(
            q,
            k_sum,
            to_q,
            to_k * weight[..., None],
            b_Q,
            (weight * b_K).sum(1),
            (ratio * bias).sum(1),
            felt.sqrt(),
            (weight * q[:, None] * k).flatten(1).norm(dim=-1),
            scores,
        )


@dataclass(frozen=True, eq=False)
class Side:
    """One side of the form, with the other at its value.

    Attributes:
        layer: of the head.
        name: of its constant, `b_Q` or `b_K`.
        to: from ln1's output at each place to this side's part of the product.
        constant: of this side.
        other: the other side, which multiplies it.
        norm: ln1; None where attention reads the stream itself.
        scale: ln1's at each place.
    """

    layer: int
    name: str
    to: Float[Tensor, "batch place d_model d_head"]
    constant: Float[Tensor, "batch d_head"]
    other: Float[Tensor, "batch d_head"]
    norm: Norm | None
    scale: Float[Tensor, "batch place"] | None

    def readout(self) -> Float[Tensor, "batch place d_model"]:
        """Of the stream at each place: the other side pulled back through `to` and ln1."""
        readout = Readout((self.to @ self.other[:, None, :, None]).mT)
        if self.norm is None or self.scale is None:
            return readout.direction[:, :, 0]
        direction = readout.through_norm(self.norm).direction[:, :, 0]
        return direction / self.scale.to(direction)[..., None]

    def parts(
        self, vectors: Float[Tensor, "row batch place d_model"]
    ) -> Float[Tensor, "row batch d_head"]:
        """What vectors of the stream add to this side."""
        x = vectors.to(self.to)
        if self.norm is not None and self.scale is not None:
            x = self.norm.through(x, self.scale.to(x))
        return torch.einsum("rbpd,bpdh->rbh", x, self.to)

    def constants(
        self, bias: Float[Tensor, " batch"]
    ) -> dict[RowKey, Float[Tensor, "batch d_head"]]:
        """What no writer adds to this side, by its row; nothing for the score's own bias."""
        found = {RowKey("bias", self.layer, self.name): self.constant}
        beta = None if self.norm is None else self.norm.beta
        if beta is not None:
            of_beta = torch.einsum("d,bpdh->bh", beta.to(self.to), self.to)
            found = {RowKey("bias", self.layer, "ln1.b"): of_beta} | found
        found = {key: value for key, value in found.items() if bool(value.any())}
        if bool(bias.any()):
            found[RowKey("bias", self.layer, SCORE_BIAS)] = torch.zeros_like(self.constant)
        return found

    def rows(self, vectors: Rows, form: ScoreForm) -> Rows:
        """The rows of this side, from the rows of the stream at its places as vectors."""
        readout = self.readout()

        def read(x: Tensor, w: Tensor = readout) -> Tensor:
            return torch.einsum("...bpd,bpd->...b", x.to(w), w)[..., None, None]

        def felt(x: Tensor) -> Tensor:
            return read(x.square(), readout.square()).sqrt()

        constants = []
        for key, value in self.constants(form.bias).items():
            own = form.bias if key.name == SCORE_BIAS else (value * self.other).sum(-1)
            constants.append(RowGroup.one(key, own[:, None, None]))
        total = read(vectors.total) + sum(row.values[0] for row in constants)
        return Rows(
            [RowGroup(group.keys, read(group.values)) for group in vectors.groups],
            constants,
            total,
            torch.ones_like(total),
            torch.hypot(felt(vectors.readout_norm), form.felt[:, None, None]),
            torch.hypot(felt(vectors.final_norm), form.dots[:, None, None]),
            [
                replace(
                    check,
                    value=read(check.value),
                    parts=read(check.parts),
                    abs_sum=read(check.abs_sum, readout.abs()),
                    readout_norm=felt(check.readout_norm),
                )
                for check in vectors.checks
            ],
        )


def halves_of(
    query: Side, key: Side, rows: tuple[Rows, Rows], form: ScoreForm
) -> tuple[Float[Tensor, "query_row batch d"], Float[Tensor, "key_row batch d"]]:
    """What each part of the query, and of the keys, is in the head: their products are the pairs.

    `rows` are the streams' own. A bias of the score is a product as well, on an axis of its own.
    """
    halves = []
    for side, vectors in zip((query, key), rows, strict=True):
        own = [side.parts(torch.cat([group.values for group in vectors.groups]))]
        own += [value[None] for value in side.constants(form.bias).values()]
        halves.append(torch.cat(own))
    if bool(form.bias.any()):
        halves = [pad(half, (0, 1)) for half in halves]
        halves[0][-1, :, -1], halves[1][-1, :, -1] = 1.0, form.bias
    return halves[0], halves[1]

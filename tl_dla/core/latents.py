"""`unit="latent"`: what a place holds, as the latents of a dictionary.

A dictionary (a sparse autoencoder, a transcoder) says of an activation x

    x = sum over latents  a_n × W_dec[n]  +  b_dec  +  error,        a = encode(what it reads)

so a latent's row is a_n × (W_dec[n] · readout), `b_dec` and the error have rows of their own, and
the rows add up to what the place wrote however good the dictionary is. W_dec is never read: the
readout is pulled back through the dictionary's own `decode`, whatever rescaling that holds, which
is affine in the latents while what it normalises by is frozen.

The place is what a sublayer adds to the stream (`hook_attn_out`, `hook_mlp_out`), its heads' mixed
values (`hook_z`), or the stream itself (`hook_resid_pre`, `_mid`, `_post`): then every row before
it becomes latents. Latents of the stream were attributed so by Bricken et al. 2023
(https://transformer-circuits.pub/2023/monosemantic-features); transcoders are those of Dunefsky et
al. 2024 (https://arxiv.org/abs/2406.11944).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.heads import RowSplit, sums
from tl_dla.core.neurons import largest
from tl_dla.core.readout import Readout
from tl_dla.core.rounding import narrower_rounding
from tl_dla.core.rows import RowGroup, RowKey, ScaledKept, SplitRows
from tl_dla.core.taps import Tap
from tl_dla.errors import ArgumentError
from tl_dla.inputs.dictionaries import Dictionary
from tl_dla.model.attention import Attention
from tl_dla.model.hooks import upcast
from tl_dla.model.reader import ModelReader
from tl_dla.model.stream import FINAL, Kind, ResidPoint, Step, Write

Score = Callable[[Float[Tensor, "batch pos token row"]], Float[Tensor, " row"]]

_STREAM = re.compile(r"blocks\.(\d+)\.hook_(?:resid_)?(pre|mid|post|in|out)")
_NAMES = {"in": "pre", "out": "post"}
_KINDS: dict[str, Kind] = {"b_dec": "bias", "W_skip": "skip", "error": "error"}


@dataclass(frozen=True, eq=False)
class Place:
    """What a dictionary explains: its name (`post`, `mlp_out`, `z`), and the step that writes it.

    `part` is the attention whose mixed values are explained, for `z`.
    """

    dictionary: Dictionary
    name: str
    step: Write
    part: Attention | None = None


def placed(
    reader: ModelReader, steps: Sequence[Step], dictionaries: Sequence[Dictionary]
) -> tuple[list[Step], dict[Step, Place]]:
    """The steps with what the dictionaries explain among them, and the place of each.

    A dictionary of the stream writes, at its hook, all that was written before.

    Raises:
        ArgumentError: for a hook that is no such place, for two dictionaries of one place or one
            before another that explains the whole stream, and for one that was not loaded.
    """
    steps, places = list(steps), dict[Step, Place]()
    for dictionary in dictionaries:
        if dictionary.module is None:
            raise ArgumentError(
                f"The result was loaded without its dictionary of {dictionary.hook}, which this"
                " needs: attribute again with dictionaries={hook: dictionary}."
            )
        point = _point(reader, steps, dictionary)
        if point is None:
            place = _writer(reader, steps, dictionary)
            if place.step in places:
                raise ArgumentError(f"Two dictionaries explain {place.step.label}: give one.")
        else:
            layer, name = point[1:]
            step = Write(name, "residual", layer, point[0].site)
            steps = [step, *steps[steps.index(point[0]) :]]
            place = Place(dictionary, name, step)
        places[place.step] = place
    for place in places.values():
        if place.step not in steps:
            raise ArgumentError(
                f"The dictionary of {place.dictionary.hook} explains what another, of the whole"
                " stream after it, explains as well: leave one out."
            )
    return steps, places


def _point(
    reader: ModelReader, steps: Sequence[Step], dictionary: Dictionary
) -> tuple[ResidPoint, int, str] | None:
    """The residual point that a dictionary of the stream explains, its layer and its name."""
    found = _STREAM.fullmatch(dictionary.hook)
    if found is None:
        return None
    layer, name = int(found[1]), _NAMES.get(found[2], found[2])
    after = layer + 1 if name == "post" else layer
    wanted = (FINAL, "pre") if name == "post" else (name,)
    for step in steps:
        if isinstance(step, ResidPoint) and step.name in wanted and step.layer == after:
            return step, layer, name
    raise ArgumentError(
        f"{reader.architecture} does not show its stream at {dictionary.hook}, or another"
        " dictionary explains the whole stream after it."
    )


def _writer(reader: ModelReader, steps: Sequence[Step], dictionary: Dictionary) -> Place:
    """The sublayer whose output, or whose heads' mixed values, a dictionary explains."""
    site = reader.site(dictionary.hook)
    assert site is not None  # read_dictionaries has found it
    writes = [step for step in steps if isinstance(step, Write)]
    for step in writes:
        if step.site.name == site.name:
            return Place(dictionary, step.name, step)
    for step in writes:
        part = None
        if step.name == "attn_out" and site.name.startswith(f"blocks.{step.layer}."):
            part = reader.attention(step.layer or 0)
        if part is not None and part.site.name == site.name:
            return Place(dictionary, "z", step, part)
    raise ArgumentError(
        "A dictionary explains what a sublayer adds to the stream (hook_attn_out, hook_mlp_out),"
        " its heads' mixed values (attn.hook_z) or the stream (hook_resid_pre, hook_resid_mid,"
        f" hook_resid_post); {dictionary.hook} of {reader.architecture} is none of them, or comes"
        " before a dictionary of the whole stream."
    )


class LatentSplit(RowSplit):
    """A row of the stream as latents, `2_post:17`, and `2_post:b_dec` and `2_post:error`.

    Args:
        place: the dictionary, and what it explains.
        write: the readout of what joins the stream there.
        reader: the model.
    """

    part: Attention | None

    def __init__(self, place: Place, write: Readout, reader: ModelReader) -> None:
        super().__init__(place.part, place.step, write)
        site, read = reader.site(place.dictionary.hook), reader.site(place.dictionary.reads)
        assert site is not None and read is not None  # read_dictionaries has found them
        self.name, self.module = place.name, place.dictionary.module
        self.hook, self.machine_eps = place.dictionary.hook, reader.machine_eps
        self.readout = self.output
        if place.part is not None:
            heads = self.output.through_linear(place.part.W_O)
            self.readout = Readout(heads.direction.flatten(-2), heads.norms)
        self.place_tap = Tap(site, lambda x: x)
        self.read_tap = Tap(read, lambda x: x)

    def taps(self) -> list[Tap]:
        """What the place holds, and what the dictionary reads."""
        return [self.place_tap, self.read_tap]

    def split(self, kept: ScaledKept, whole: Float[Tensor, "batch pos token"]) -> SplitRows:
        """Every latent that is active somewhere, then what else the dictionary says."""
        x = kept[self.place_tap].flatten(2)
        active, latents, terms, eps = self._decoded(kept[self.read_tap], x)
        latents = kept.scaled(latents, self.readout)
        keys = [RowKey("latent", self.layer, self.name, index) for index in active]
        groups = [RowGroup(keys, rearrange(latents, "batch pos token n -> n batch pos token"))]
        sizes = [latents.norm(dim=-1), kept.scaled(self.readout.norm_of(x), self.readout)]
        for name, term in terms.items():
            key = RowKey(_KINDS[name], self.layer, f"{self.name}:{name}")
            groups.append(RowGroup.one(key, kept.scaled(self.readout.contract(term), self.readout)))
            sizes.append(kept.scaled(self.readout.norm_of(term), self.readout))
        bias = self.bias(kept)
        check = self.check(kept, "the latents", whole, sums([*groups, *bias]))
        size = torch.stack([check.readout_norm, *sizes]).norm(dim=0)
        if eps > self.machine_eps:  # the dictionary's numbers and dot products are coarser
            size = size * narrower_rounding(eps, x.shape[-1]) / self.machine_eps
        return SplitRows(groups, bias, [replace(check, readout_norm=size)])

    def _decoded(
        self, read: Float[Tensor, "batch pos *d_in"], x: Float[Tensor, "batch pos d"]
    ) -> tuple[list[int], Float[Tensor, "batch pos token active"], dict[str, Tensor], float]:
        """Latents that are active, each times what the readout feels of it; the other terms; ε.

        The latents and 0 are decoded together: what comes of 0 is `b_dec`, at the scale by which
        the dictionary normalised this activation.
        """
        read = read.flatten(2).to(_weight(self.module, read))
        if self.part is not None and getattr(self.module, "hook_z_reshaping_mode", False):
            read = read.unflatten(2, self.part.W_O.shape[:2])  # sae-lens flattens it itself
        try:
            latents = self.module.encode(read)
            latents = latents.to_dense() if latents.is_sparse else latents
            active = latents.flatten(0, 1).any(0).nonzero().flatten()
            with torch.enable_grad():
                chosen = latents[..., active].detach().requires_grad_()
                whole = torch.zeros_like(latents).index_copy(-1, active, chosen)
                both = torch.stack([whole, torch.zeros_like(whole)])
                decoded, constant = self.module.decode(both).flatten(3)
        except RuntimeError as error:
            raise ArgumentError(
                f"The dictionary of {self.hook} cannot read what is there, {list(read.shape)}:"
                f" {error}"
            ) from error
        if decoded.shape != x.shape:
            raise ArgumentError(
                f"The dictionary of {self.hook} gives {list(decoded.shape)}, where"
                f" {list(x.shape)} is to be explained."
            )
        direction = self.readout.direction.to(decoded).expand(*x.shape[:2], -1, -1)
        felt = [
            torch.autograd.grad(decoded, chosen, w, retain_graph=True)[0]
            for w in direction.unbind(2)
        ]
        terms = {"b_dec": constant.detach()}
        if getattr(self.module, "W_skip", None) is not None:
            terms["W_skip"] = read @ self.module.W_skip.mT.to(read)
        terms = {name: upcast(term).to(x.device) for name, term in terms.items()}
        explained = upcast(decoded.detach()).to(x.device)
        explained = explained + terms.get("W_skip", torch.zeros_like(explained))
        terms["error"] = upcast(x) - explained
        rows = upcast(torch.stack(felt, 2)) * upcast(chosen.detach())[:, :, None]
        return active.tolist(), rows.to(x.device), terms, torch.finfo(decoded.dtype).eps


def with_largest(groups: Sequence[RowGroup], top: int, score: Score) -> list[RowGroup]:
    """The `top` latents of all dictionaries by their score; the others of each share a row."""
    latents = [g for g in groups if g.keys and g.keys[0].kind == "latent"]
    keep = largest([score(g.values.movedim(0, -1)) for g in latents], top)
    kept = dict(zip(latents, keep, strict=True))
    found: list[RowGroup] = []
    for group in groups:
        rows = kept.get(group)
        if rows is None:
            found.append(group)
            continue
        found.append(RowGroup([group.keys[row] for row in rows], group.values[rows]))
        others = [row for row in range(len(group.keys)) if row not in set(rows)]
        if others:
            first = group.keys[0]
            key = RowKey("latents", first.layer, f"{first.name}:other_latents")
            found.append(RowGroup.one(key, group.values[others].sum(0)))
    return found


def _weight(module: object, like: Tensor) -> Tensor:
    """A weight of the dictionary, whose dtype and device it computes in."""
    weight = getattr(module, "W_dec", None)
    if isinstance(weight, Tensor):
        return weight
    parameters = module.parameters() if isinstance(module, torch.nn.Module) else ()
    return next(iter(parameters), like)

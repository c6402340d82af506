"""The flags of an audit: where its numbers disagree enough to change what a reader would conclude.

Each flag is a sentence: what disagrees, by how much, what it means, and which experiment settles
it. Flags judge means over prompts and positions.
"""

from dataclasses import dataclass

from tl_dla.effects.erasure import Erasures
from tl_dla.effects.repair import SelfRepair
from tl_dla.effects.substitutes import At

# When a flag is raised. Half of an effect is where a reader's conclusion changes: what is left of
# it is no longer most of it. A quarter for the norm, whose part Rushing and Nanda put near 30 % of
# a head's direct effect. A total effect within a tenth of the direct one has no sign to speak of.
HALF, QUARTER, TENTH = 0.5, 0.25, 0.1

FLAGS = ("sign_flip", "repaired", "mediated", "norm_gap", "erased", "copy_suppression")


@dataclass(frozen=True)
class Flag:
    """Why a row should not be taken at its face value, and what to do next."""

    row: str
    name: str
    sentence: str

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True, eq=False)
class RowEffects:
    """What an audit found of one row, as means over prompts and positions (logits)."""

    name: str
    at: At
    direct: float
    recomputed: float  # the direct effect with the final norm rescaling
    total: float
    left: float  # of what it wrote, at the end; NaN for a group of rows
    copied: float  # of the row, from source tokens that are the answer
    repair: SelfRepair
    erasures: Erasures

    @property
    def norm(self) -> float:
        """What the final norm's rescaling gives back."""
        return float(self.repair.norm.nanmean())

    @property
    def by_norm(self) -> bool:
        """Whether direct and total differ by the final norm's rescaling more than by other rows."""
        return abs(self.norm) > HALF * abs(self.direct - self.total)

    @property
    def ablated(self) -> str:
        """How a sentence about it begins."""
        direct = f"{self.name} writes {self.direct:+.3f} directly"
        return f"{direct}, but ablating it at {where(self.at)} moves the"

    @property
    def reactions(self) -> str:
        """The rows that change most, and the final norm, in the order of their changes."""
        changes = [*self.repair.top(3), ("the final norm", self.norm)]
        changes.sort(key=lambda change: -abs(change[1]))
        return ", ".join(f"{label} {value:+.3f}" for label, value in changes)

    @property
    def partner(self) -> str:
        """The row that makes up for most of this one."""
        sign = 1.0 if self.direct > 0 else -1.0
        return max(self.repair.top(20), key=lambda change: sign * change[1])[0]

    @property
    def next(self) -> str:
        """The experiment that settles what the row does."""
        if self.by_norm:
            return (
                "ablate it with the final norm's scale frozen by a hook, and judge rows by"
                " direct_recomputed"
            )
        targets = ", ".join(label for label, _ in self.repair.top(3))
        tool = " (transformer_lens.patching.get_act_patch_direct_path, between heads)"
        heads = self.name.startswith("L") and "+" not in self.name
        return f"path patching from {self.name} to {targets}{tool if heads else ''}"

    @property
    def erasers(self) -> str:
        """The rows that remove most of it."""
        table = self.erasures.to_dataframe()
        pairs = table[table["writer"] == self.name].head(3)
        ratios = zip(pairs["eraser"], pairs["projection_ratio"], strict=True)
        return ", ".join(f"{eraser} {ratio:+.0%}" for eraser, ratio in ratios)


def flags_of(row: RowEffects) -> list[Flag]:
    """The flags of one row."""
    found: dict[str, str] = {}
    direct, total, name = row.direct, row.total, row.name
    if direct * total < 0 and abs(total) > TENTH * abs(direct):
        found["sign_flip"] = (
            f"{row.ablated} logit by {-total:+.3f}, not by {-direct:+.3f}: the reaction of the rest"
            f" outweighs the row ({row.reactions}), and its sign alone misleads. Next: {row.next}."
        )
    elif abs(total) < HALF * abs(direct):
        both = f'ablate both, result.audit(rows=[["{name}", "{row.partner}"]]), and '
        found["repaired"] = (
            f"{row.ablated} logit by {-total:+.3f} only: the rest of the model gives back"
            f" {1 - total / direct:.0%} ({row.reactions}), so the row is not what the model would"
            f" lose. Next: {'' if row.by_norm else both}{row.next}."
        )
    elif abs(total) > 2 * abs(direct):
        found["mediated"] = (
            f"{row.ablated} logit by {-total:+.3f}: most of its effect is the reaction of the rest"
            f" ({row.reactions}), and the row shows the smaller part. Next: {row.next}."
        )
    if abs(row.recomputed - direct) > QUARTER * abs(direct):
        found["norm_gap"] = (
            f"{name} writes {direct:+.3f} with the final norm's scale held fixed, but"
            f" {row.recomputed:+.3f} where the norm may rescale: taking it out changes the scale"
            " that every row is read at. Next: judge rows by direct_recomputed, and attribute a"
            " difference to a close foil, on which the scale has less effect."
        )
    if row.left < HALF:
        found["erased"] = (
            f"{name} is erased: {row.left:.0%} of what it wrote is left along its own direction at"
            f" the end ({row.erasers}), so its row and its erasers' are one sum. Next: path"
            f" patching from {name} to the values of each eraser, to see whether it reads {name}."
        )
    if row.copied > HALF:
        found["copy_suppression"] = (
            f"{name} is negative, and {row.copied:.0%} of its row comes from source tokens that are"
            " the answer itself: copy suppression, which follows from earlier rows that predict the"
            " answer. Next: ablate those, and see whether this row shrinks."
        )
    return [Flag(name, flag, sentence) for flag, sentence in found.items()]


def where(at: At) -> str:
    """Where rows were ablated, in words."""
    return "every token" if at == "all" else "the attributed position"

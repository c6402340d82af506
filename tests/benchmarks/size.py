"""The sizes of a model, and what a call reads and keeps of it, in formulas."""

from dataclasses import dataclass
from typing import Any

UNITS = ("component", "head", "source", "neuron")


@dataclass(frozen=True)
class Size:
    """A decoder with gated MLPs, and how many bytes a number of its weights takes."""

    layers: int
    d: int
    heads: int
    groups: int  # of heads that share keys and values
    d_head: int
    d_mlp: int
    vocab: int
    width: int

    @staticmethod
    def of(model: Any, width: int) -> "Size":
        """That of a model."""
        c = model.cfg
        groups = getattr(c, "n_key_value_heads", None) or c.n_heads
        return Size(c.n_layers, c.d_model, c.n_heads, groups, c.d_head, c.d_mlp, c.d_vocab, width)

    def weights(self, unit: str, tokens: int) -> int:
        """Bytes of weights that a call reads, whatever the number of its prompts."""
        places = {"component": 0, "neuron": self.d_mlp}.get(unit, self.heads * self.d_head)
        return (self.layers * places + tokens) * self.d * self.width

    def directions(self, unit: str, tokens: int) -> int:
        """Bytes of pulled-back directions alive at once; each layer's lie where its weights lie."""
        z = self.heads * self.d_head  # heads are pulled back one layer at a time
        layers = {"component": 0, "head": z, "source": self.layers * z}
        return tokens * (self.d + layers.get(unit, self.layers * self.d_mlp)) * 4

    def rows(self, unit: str, length: int) -> int:
        """How many rows there are for prompts of `length` tokens, biases left out."""
        n = 1 + 2 * self.layers
        if unit == "head":
            return n - self.layers + self.layers * self.heads
        if unit == "source":
            return n - self.layers + self.layers * self.heads * length
        return n if unit == "component" else n - self.layers + self.layers * self.d_mlp


def kept(size: Size, unit: str, length: int, places: int) -> int:
    """Bytes that a result keeps: rows in float32 of the answer, of its foil and of both."""
    return size.rows(unit, length) * places * 3 * 4


def handed_over(size: Size, unit: str, length: int, tokens: int, processes: int) -> int:
    """Bytes that each process hands to the others, beyond a forward pass, by the formulas.

    The columns of W_U; then, layer by layer, its own heads' values or its own neurons at the
    position, and the directions pulled back to them; for source tokens, values and pattern too.
    """
    columns = tokens * size.d * size.width
    own = {"component": 0, "neuron": size.d_mlp}.get(unit, size.heads * size.d_head) // processes
    each = own * (size.width + 4 * tokens)
    if unit == "source":
        each += (size.groups * size.d_head + size.heads) * length * size.width // processes
    return columns + size.layers * each


def readable(n: float) -> str:
    """Bytes, in the unit that shows three digits."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f} B"

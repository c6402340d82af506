"""What a call reads, moves and keeps, in formulas; held to what is measured, and carried further.

    python -m tests.benchmarks.plan > docs/scaling.md

The tables of sizes are computed; those that say "measured" are measured when this runs.
"""

from dataclasses import dataclass
from typing import Any

import torch

from tests.benchmarks.models import LLAMA, boot
from tests.benchmarks.timing import inputs
from tl_dla import direct_logit_attribution
from tl_dla.core.saved import nbytes

UNITS = ("component", "head", "source", "neuron")


@dataclass(frozen=True)
class Size:
    """A decoder with gated MLPs, and how many bytes a number of its weights takes."""

    layers: int
    d: int
    heads: int
    d_head: int
    d_mlp: int
    vocab: int
    width: int

    @staticmethod
    def of(model: Any, width: int) -> "Size":
        """That of a model."""
        c = model.cfg
        return Size(c.n_layers, c.d_model, c.n_heads, c.d_head, c.d_mlp, c.d_vocab, width)

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


def moved(size: Size, tokens: int, devices: int) -> int:
    """Bytes that cross from each device to the next, the last one first: directions, no weights."""
    return (devices - 1) * tokens * size.d * 4


def kept(size: Size, unit: str, length: int, places: int) -> int:
    """Bytes that a result keeps: rows in float32 of the answer, of its foil and of both."""
    return size.rows(unit, length) * places * 3 * 4


def measured(name: str, width: int, batch: int, length: int) -> list[str]:
    """Lines of a table: formulas beside what a call had and kept."""
    model = boot(name)
    data, size, lines = inputs(model, batch, length), Size.of(model, width), []
    for unit in UNITS:
        with torch.no_grad():
            result = direct_logit_attribution(
                model, data["tokens"], data["answer"], data["incorrect"], unit=unit
            )
        planned, found = kept(size, unit, length, batch), nbytes(result)
        rows = f"{size.rows(unit, length):,} | {len(result.labels):,}"
        lines.append(f"| {name} | {unit} | {rows} | {readable(planned)} | {readable(found)} |")
    return lines


def planned(size: Size, devices: int, length: int) -> list[str]:
    """Lines of a table: one prompt, one position, an answer and a foil."""
    lines = []
    for unit in UNITS:
        numbers = (
            size.weights(unit, 2),
            size.directions(unit, 2),
            moved(size, 2, devices),
            kept(size, unit, length, 1),
            1_000_000 * size.rows(unit, length) * 4,
        )
        lines.append(f"| {unit} | {' | '.join(map(readable, numbers))} |")
    return lines


def readable(n: float) -> str:
    """Bytes, in the unit that shows three digits."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f} B"


PAGE = """# Past this machine

Made by `python -m tests.benchmarks.plan > docs/scaling.md`. Formulas of what a call reads, moves
and keeps; what they say of models that were run, beside what was measured; and of larger ones.

With L layers, width d, H heads of d_head, d_mlp neurons, t target tokens in all prompts together
and weights of w bytes a number, a call does beside the forward pass:

| unit | weights read, once a batch | directions kept meanwhile | rows |
|---|---|---|---|
| component, layer | t · d · w | 4 t · d | 2 L + 1 |
| head | (t + L · H · d_head) · d · w | 4 t · (d + H · d_head) | L · H + L + 1 |
| source, of n tokens | as for heads | 4 t · (d + L · H · d_head) | L · H · n + L + 1 |
| neuron | (t + L · d_mlp) · d · w | 4 t · (d + L · d_mlp) | L · d_mlp + L + 1 |

- Activations are read where they are shown and not kept. A weight is read where it lies: from one
  device to the next goes the direction alone, 4 t · d bytes.
- A result keeps its rows token by token and added up: 12 bytes a row, prompt and position.
- The mean of the vocabulary as a baseline reads W_U once more: V · d · w.
- At all positions, rows × positions numbers are kept; nothing else grows with them.

## Held to what is measured

Rows and kept bytes, by the formulas and of a call (batch 4, 64 tokens, the last position, an answer
and a foil each; the llama's 1.2 billion weights are random, in bfloat16). A result keeps its
question and its certificate too.

| model | unit | rows, planned | rows | kept, planned | kept |
|---|---|---|---|---|---|
{measured}

What such calls take, beside a forward pass, is in `python -m tests.benchmarks.shapes`.

## 70 billion parameters on eight devices

Computed, not measured: L = 80, d = 8,192, 64 heads of 128, d_mlp = 28,672, bfloat16; a prompt of 64
tokens, the last position. The last column is what a million prompts store in float32, uncompressed.

| unit | weights read | directions | moved between devices | kept | a million prompts |
|---|---|---|---|---|---|
{planned}

What limits first: the forward pass. It reads {all} of weights a batch, where heads read {o}
more and neurons {mlp}; at 64 tokens it does {forward:.0e} operations a prompt, where heads do
{flops:.0e}. For a million prompts, storage: heads fit on a disk, source tokens and neurons do not
unless few rows are kept (`heads=`, `top_neurons=`). Models shared out over several processes were
not measured.
"""


def main() -> None:
    """Prints the page."""
    lines = [*measured("smollm2", 4, 4, 64), *measured(LLAMA, 2, 4, 64)]
    large = Size(80, 8192, 64, 128, 28672, 128256, 2)
    heads, neurons = (readable(large.weights(unit, 0)) for unit in ("head", "neuron"))
    weights = 70e9
    flops = 2 * 2 * large.layers * large.heads * large.d_head * large.d
    text = PAGE.format(
        measured="\n".join(lines),
        planned="\n".join(planned(large, 8, 64)),
        o=heads,
        mlp=neurons,
        flops=flops,
        all=readable(2 * weights),
        forward=2 * weights * 64,
    )
    print(text, end="")


if __name__ == "__main__":
    main()

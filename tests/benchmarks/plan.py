"""What a call reads, moves and keeps, in formulas; held to what is measured, and carried further.

    python -m tests.benchmarks.plan > docs/scaling.md

The tables of sizes are computed; those that say "measured" are measured when this runs.
"""

import torch

from tests.benchmarks.models import LLAMA, boot
from tests.benchmarks.sharded import table
from tests.benchmarks.size import UNITS, Size, handed_over, kept, readable
from tests.benchmarks.timing import inputs
from tl_dla import direct_logit_attribution
from tl_dla.core.saved import nbytes


def moved(size: Size, tokens: int, devices: int) -> int:
    """Bytes that cross from each device to the next, the last one first: directions, no weights."""
    return (devices - 1) * tokens * size.d * 4


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
            handed_over(size, unit, length, 2, devices),
            kept(size, unit, length, 1),
            1_000_000 * size.rows(unit, length) * 4,
        )
        lines.append(f"| {unit} | {' | '.join(map(readable, numbers))} |")
    return lines


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
- Of P processes that share the model out (tensor parallelism), each hands to the others t · d · w
  bytes of columns of W_U, and a layer's (w + 4 t) · H · d_head / P for heads, (w + 4 t) · d_mlp / P
  for neurons: its own heads' values or neurons at the position, and the directions pulled back to
  them. Source tokens add n values and a row of each pattern. No weight is handed over.
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

## Two billion parameters, shared out over two processes

A llama of 2 billion random parameters in bfloat16 (L = 28, d = 2,048), 1 × 128 tokens, the last
position, an answer and a foil; two processes share it out by tensor parallelism and talk over gloo,
a core each (`python -m tests.benchmarks.sharded` measures it again, in about a minute). What a
process hands over is counted beyond a forward pass that unembeds the same position, which itself
hands over {forward_bytes}. Times are over a plain forward pass, which took {forward_time}.

| unit | rows, planned | rows | kept, planned | kept | handed over, planned | counted | time |
|---|---|---|---|---|---|---|---|
{shared}

## 70 billion parameters on eight devices

Computed, not measured: L = 80, d = 8,192, 64 heads of 128, d_mlp = 28,672, bfloat16; a prompt of 64
tokens, the last position. The devices have ten layers each, and directions move from one to the
next; or eight processes have a part of every layer, and each hands over what stands there. The
last column is what a million prompts store in float32, uncompressed.

| unit | weights read | directions | moved | handed over | kept | a million prompts |
|---|---|---|---|---|---|---|
{planned}

What limits first: the forward pass. It reads {all} of weights a batch, where heads read {o}
more and neurons {mlp}; at 64 tokens it does {forward:.0e} operations a prompt, where heads do
{flops:.0e}. For a million prompts, storage: heads fit on a disk, source tokens and neurons do not
unless few rows are kept (`heads=`, `top_neurons=`). What processes hand over limits nothing: a
forward pass alone hands over {reduced} a prompt in each.
"""


def main() -> None:
    """Prints the page."""
    *shared, forward = table()
    forward_bytes, forward_time = forward.removeprefix("forward: ").split(", ")
    lines = [*measured("smollm2", 4, 4, 64), *measured(LLAMA, 2, 4, 64)]
    large = Size(80, 8192, 64, 8, 128, 28672, 128256, 2)
    heads, neurons = (readable(large.weights(unit, 0)) for unit in ("head", "neuron"))
    weights = 70e9
    flops = 2 * 2 * large.layers * large.heads * large.d_head * large.d
    text = PAGE.format(
        measured="\n".join(lines),
        shared="\n".join(shared),
        forward_bytes=forward_bytes,
        forward_time=forward_time,
        reduced=readable((2 * large.layers + 1) * 64 * large.d * large.width),
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

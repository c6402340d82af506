"""What each estimate predicts of zero ablation: the table in docs/prediction.md.

    python -m tests.benchmarks.prediction > docs/prediction.md

The Pearson correlation, over one prompt's heads, MLPs or tokens, of an estimate with what the logit
difference loses when that part is set to zero: a head or an MLP at every position, a token's
embedding at its place (the first token, which every head rests on, aside). The mean over the
prompts of each kind, and over all of them with the standard deviation between prompts. Frozen lines
are those of `attribute_inputs` and of its `effects`, with both rules for gated MLPs; the tangent is
the gradient; the direct effect stops at the logit. Real weights: SmolLM2-135M and Gemma-3-270M.
"""

import argparse
import statistics
import sys
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from tl_dla import attribute_inputs, direct_logit_attribution, load_model
from tl_dla.core.network.pull import Network
from tl_dla.model.reader import ModelReader

IOI = (
    "Then {b} and {a} went to the {place}. {b} gave {thing} to",
    "When {a} and {b} got {thing} at the {place}, {b} decided to give it to",
)
NAMES = [("Mary", "John"), ("Tom", "James"), ("Sarah", "Paul"), ("Anna", "Peter")]
PLACES = [("shop", "a drink"), ("park", "a ball"), ("station", "a ticket"), ("school", "a book")]
PROMPTS: dict[str, list[tuple[str, str, str]]] = {
    "IOI": [
        (form.format(a=a, b=b, place=place, thing=thing), f" {a}", f" {b}")
        for form in IOI
        for (a, b), (place, thing) in zip(NAMES, PLACES, strict=True)
    ],
    "facts": [
        ("The Eiffel Tower is in the city of", " Paris", " London"),
        ("The Colosseum is in the city of", " Rome", " Paris"),
        ("Big Ben is in the city of", " London", " Rome"),
        ("The capital of Germany is the city of", " Berlin", " Paris"),
        ("The capital of Japan is the city of", " Tokyo", " London"),
        ("The capital of Spain is the city of", " Madrid", " Berlin"),
        ("The capital of Russia is the city of", " Moscow", " Berlin"),
        ("The largest planet in our solar system is called", " Jupiter", " Mars"),
    ],
    "opposites": [
        (f"The opposite of {word} is", f" {answer}", f" {other}")
        for word, answer, other in (
            ("hot", "cold", "warm"),
            ("big", "small", "large"),
            ("up", "down", "high"),
            ("black", "white", "dark"),
            ("day", "night", "morning"),
            ("good", "bad", "great"),
            ("left", "right", "side"),
            ("open", "closed", "wide"),
        )
    ],
}
PARTS = ("heads", "MLPs", "tokens")
ESTIMATES = ('frozen, `"half"`', 'frozen, `"gate"`', "tangent (gradient)", "direct effect")


def estimates(model: Any, prompt: tuple[str, str, str]) -> dict[str, dict[str, Tensor | None]]:
    """Of each part, in the order of the network."""
    found: dict[str, dict[str, Tensor | None]] = {}
    for rule in ("half", "gate"):
        result = attribute_inputs(model, *prompt, mlp=rule)  # type: ignore[arg-type]
        tokens = _of_kind(result, "embed")
        heads, parts = result.effects("head", "frozen"), result.effects("component", "frozen")
        found[f'frozen, `"{rule}"`'] = dict(
            heads=_total(heads, "head"), MLPs=_total(parts, "mlp"), tokens=tokens[1:]
        )
    heads, parts = result.effects("head", "tangent"), result.effects("component", "tangent")
    found["tangent (gradient)"] = dict(
        heads=_total(heads, "head"), MLPs=_total(parts, "mlp"), tokens=parts["embed"][0, 1:]
    )
    direct = [direct_logit_attribution(model, *prompt, unit=unit) for unit in ("head", "component")]
    found["direct effect"] = dict(
        heads=_of_kind(direct[0], "head"), MLPs=_of_kind(direct[1], "mlp"), tokens=None
    )
    return found


def _of_kind(result: Any, kind: str) -> Tensor:
    return result.attribution[[i for i, own in enumerate(result.kinds) if own == kind], 0]


def _total(effects: Any, kind: str) -> Tensor:
    """Over every place, in the order of the network."""
    rows = [i for i, own in enumerate(effects.kinds) if own == kind]
    return effects.attribution[rows, 0].sum(-1)


def zeroed(model: Any, prompt: tuple[str, str, str]) -> dict[str, Tensor]:
    """What the logit difference loses without each part."""
    reader, (text, answer, incorrect) = ModelReader(model), prompt
    tokens = model.to_tokens(text)
    pair = [int(model.to_single_token(word)) for word in (answer, incorrect)]
    writes = reader.stream().writes
    whole = _difference(model, tokens, pair, [])
    heads, mlps = [], [step.site.name for step in writes if step.kind == "mlp"]
    for layer in range(reader.n_layers):
        part = reader.attention(layer)
        assert part is not None
        n = part.W_O.shape[0]

        def without(z: Tensor, hook: Any, n: int = n) -> Tensor:
            by_head = z.flatten(2).unflatten(2, (n, -1)).clone()
            by_head[range(n), :, range(n)] = 0.0
            return by_head.reshape(z.shape)

        heads.append(_difference(model, tokens.expand(n, -1), pair, [(part.site.name, without)]))

    def one(x: Tensor, hook: Any, i: int) -> Tensor:
        x = x.clone()
        x[i] = 0.0
        return x

    hooks = [(name, lambda x, hook, i=i: one(x, hook, i)) for i, name in enumerate(mlps)]
    without_mlps = _difference(model, tokens.expand(len(mlps), -1), pair, hooks)

    def places(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[range(len(x)), range(1, len(x) + 1)] = 0.0
        return x

    [embed] = [step.site.name for step in writes if step.name == "embed"]
    n = tokens.shape[1] - 1
    without_tokens = _difference(model, tokens.expand(n, -1), pair, [(embed, places)])
    return dict(
        heads=whole - torch.cat(heads), MLPs=whole - without_mlps, tokens=whole - without_tokens
    )


def _difference(model: Any, tokens: Tensor, pair: list[int], hooks: list[Any]) -> Tensor:
    """The logit difference at the last position, which alone is unembedded."""
    with ExitStack() as stack, torch.no_grad():
        last = model.unembed.register_forward_pre_hook(lambda _m, args: (args[0][:, -1:],))
        stack.callback(last.remove)
        stack.enter_context(model.hooks(fwd_hooks=hooks))
        logits = model(tokens, return_type="logits")[:, -1]
    return logits[:, pair[0]] - logits[:, pair[1]]


def measured(name: str) -> dict[str, dict[str, dict[str, list[float]]]]:
    """By kind of prompt, estimate and part: a correlation for each prompt."""
    model = load_model(name, device="cpu")
    model.requires_grad_(False)
    Network(ModelReader(model), "half")  # refused at once where it cannot be frozen
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for kind, prompts in PROMPTS.items():
        of_kind = found[kind] = {name: {part: [] for part in PARTS} for name in ESTIMATES}
        for i, prompt in enumerate(prompts):
            print(f"\r{name}: {kind} {i + 1}/{len(prompts)} ", end="", file=sys.stderr)
            truth = zeroed(model, prompt)
            for estimate, parts in estimates(model, prompt).items():
                for part, values in parts.items():
                    if values is not None:
                        pair = torch.stack([values.double(), truth[part].double()])
                        of_kind[estimate][part].append(float(pair.corrcoef()[0, 1]))
    print(file=sys.stderr)
    return found


def _cell(values: list[float], spread: bool) -> str:
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if spread else mean


def page(models: list[str]) -> str:
    """The document."""
    lines = ["# What predicts zero ablation", "", __doc__.split("\n\n", 2)[2].strip(), ""]
    lines += ["Made by `python -m tests.benchmarks.prediction > docs/prediction.md`.", ""]
    for name in models:
        found = measured(name)
        lines += [f"## {name}", "", f"| prompts | estimate | {' | '.join(PARTS)} |"]
        lines += ["|---|---|" + "---|" * len(PARTS)]
        every = {
            estimate: {
                part: [x for kind in found.values() for x in kind[estimate][part]] for part in PARTS
            }
            for estimate in ESTIMATES
        }
        n = sum(map(len, PROMPTS.values()))
        for kind, of_kind in {**found, f"all {n}": every}.items():
            for estimate in ESTIMATES:
                cells = (_cell(of_kind[estimate][part], kind not in found) for part in PARTS)
                lines.append(f"| {kind} | {estimate} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["## The prompts", ""]
    for kind, prompts in PROMPTS.items():
        lines += [f"{kind}: " + "; ".join(f'"{t}" {a!r} − {b!r}' for t, a, b in prompts), ""]
    return "\n".join(lines)


def main() -> None:
    """Measures and prints the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("gemma3", "smollm2"), help="both by default")
    args = parser.parse_args()
    print(page([args.model] if args.model else ["gemma3", "smollm2"]), end="")


if __name__ == "__main__":
    main()

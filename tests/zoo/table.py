"""What works on which architecture, ours beside TransformerLens's own tool: docs/architectures.md.

    python -m tests.zoo.table > docs/architectures.md

Tiny random models (norm weights and biases perturbed), two prompts of 11 tokens, float32, a logit
difference at the last position. Ours runs on the raw model, the weights as published;
TransformerLens's tool after
`enable_compatibility_mode()`, which it needs. "exact": what the rows
add up to is within 1e-4 of the logit difference of the plain `transformers` module, and the heads
of each layer plus their bias within 1e-4 of its `attn_out` row. Inputs (`attribute_inputs`): the
same of tokens and biases, at the input of every layer too. Scores (`attribute_attention`): a
head's query rows and key rows are within 1e-4 of the log of the ratio of the model's own attention,
in every layer that has a pattern. Needs TransformerLens 4.
"""

import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import torch

from tests.zoo.build import ANSWERS, INCORRECT, boot, hf_reference, native_reference, tokens
from tests.zoo.configs import BRIDGE_DIFFERS, CLASSES, CONFIGS, NATIVE, VARIANTS, WITHOUT_ADAPTER
from tests.zoo.reference import hf_logits
from tl_dla import TlDlaError, attribute_attention, attribute_inputs, direct_logit_attribution

TOLERANCE = 1e-4
UNITS = ("component", "head", "neuron")
RECORDED = [name for name in CONFIGS | NATIVE if name not in WITHOUT_ADAPTER]


def main() -> None:
    lines = {}
    for i, name in enumerate(RECORDED):
        print(f"\r{i + 1}/{len(RECORDED)} {name:<30}", end="", file=sys.stderr)
        with warnings.catch_warnings(), redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            lines[name] = line(name)
    print(file=sys.stderr)
    theirs = ["TransformerLens: components", "heads"]
    heading = ["components", "heads", "neurons", "inputs", "scores", *theirs]
    print("# Architectures\n")
    print(__doc__.split("\n\n", 2)[2].strip(), "\n")
    print("Made by `python -m tests.zoo.table > docs/architectures.md`.\n")
    for title, names in (
        (f"The {len(CLASSES)} decoder classes", CLASSES),
        ("Variants and TransformerLens's own models", [*VARIANTS, *NATIVE]),
    ):
        counts = [sum(lines[name][i].startswith("exact") for name in names) for i in range(7)]
        print(f"## {title}\n")
        print(f"| architecture | {' | '.join(heading)} | why |\n|{'---|' * 9}")
        print(f"| **exact, of {len(names)}** | {' | '.join(f'**{c}**' for c in counts)} | |")
        for name in names:
            print(f"| {name} | {' | '.join(lines[name])} |")
        print()


def line(name: str) -> list[str]:
    """The cells of one architecture."""
    try:
        model = boot(name)
    except Exception as error:
        return ["does not load"] * 7 + [_sentence(error)]
    logit = _logit(name, model)
    cells, why = [], []
    for unit in UNITS:
        cell, reason = _ours(model, unit, logit)
        cells.append(cell)
        why += [reason] if reason and reason not in why else []
    scores, reason = _scores(model)
    cells += [_inputs(model, logit), scores]
    why += [reason] if reason and cells[0] != "refused" else []
    if name in BRIDGE_DIFFERS:
        why.append("the bridge's own logits differ from the transformers module's")
    return [*cells, *(_theirs(name, unit, logit) for unit in ("component", "head")), "; ".join(why)]


def _logit(name: str, model: Any) -> torch.Tensor:
    """The logit difference of the plain module; of the bridge where that is another model."""
    if name in BRIDGE_DIFFERS:
        logits = model(tokens())
    else:
        plain = native_reference(name) if name in NATIVE else hf_reference(name, torch.float32)
        try:
            logits = hf_logits(plain, tokens())
        except Exception:
            return torch.full((2,), torch.nan)
    last, rows = logits[:, -1].double(), torch.arange(2)
    return last[rows, ANSWERS] - last[rows, INCORRECT]


def _ours(model: Any, unit: str, logit: torch.Tensor) -> tuple[str, str]:
    try:
        result = direct_logit_attribution(
            model, tokens(), ANSWERS, INCORRECT, unit=unit, check="off"
        )
    except TlDlaError as error:
        return "refused", str(error)
    off = (result.attribution.double().sum(0) - logit).abs().max()
    parts = [part.max_error for part in result.reconstruction.parts.values()]
    if not (off < TOLERANCE and max(parts, default=0.0) < TOLERANCE):
        return "**wrong**", ""
    rest = [
        label for label, kind in zip(result.labels, result.kinds, strict=True) if kind == "rest"
    ]
    return "exact" + (f", with {', '.join(rest)}" if rest else ""), ""


def _inputs(model: Any, logit: torch.Tensor) -> str:
    try:
        result = attribute_inputs(model, tokens(), ANSWERS, INCORRECT, check="off")
    except TlDlaError:
        return "refused"
    layers = [part.max_error for part in result.reconstruction.parts.values()]
    off = (result.attribution.double().sum(0) - logit).abs().max()
    return "exact" if off < TOLERANCE and max(layers) < TOLERANCE else "**wrong**"


def _scores(model: Any) -> tuple[str, str]:
    """Who wrote the query and the keys of the second head of every layer that has a pattern."""
    patterns: dict[int, torch.Tensor] = {}

    def keep(pattern: torch.Tensor, hook: Any) -> None:
        patterns[int(hook.name.split(".")[1])] = pattern[:, 1].clone()

    try:
        with model.hooks(fwd_hooks=[(lambda name: name.endswith("attn.hook_pattern"), keep)]):
            model(tokens())
    except Exception as error:
        return "refused", _sentence(error)
    off = 0.0
    for layer, pattern in patterns.items():
        query, key, versus = _seen(pattern)
        try:
            result = attribute_attention(
                model, tokens(), f"L{layer}H1", query=query, key=key, versus=versus, check="off"
            )
        except TlDlaError as error:
            return "refused", str(error)
        own = (pattern[:, query, key] / pattern[:, query, versus]).double().log()
        for rows in (result.by_query, result.by_key):
            off = max(off, float((rows.attribution.double().sum(0) - own).abs().max()))
    if not patterns:
        return "refused", "no layer shows an attention pattern"
    return ("exact" if off < TOLERANCE else "**wrong**"), ""


def _seen(pattern: torch.Tensor) -> tuple[int, int, int]:
    """A query and two keys that the head sees in both prompts."""
    sees = (pattern > 0).all(0)
    wide = int(sees.sum(1).argmax())
    versus, key = sees[wide].nonzero()[:2, 0].tolist()
    return wide, key, versus


def _theirs(name: str, unit: str, logit: torch.Tensor) -> str:
    from transformer_lens.tools.analysis import direct_logit_attribution as theirs

    try:
        model = boot(name)
        model.enable_compatibility_mode(disable_warnings=True)
        result = theirs(model, tokens(), ANSWERS, INCORRECT, unit=unit)
    except (ValueError, NotImplementedError):
        return "refused"
    except Exception as error:
        return f"crashed ({type(error).__name__})"
    biases = model.b_U[ANSWERS] - model.b_U[INCORRECT]
    off = float((result.attribution.sum(0) + biases - logit).abs().max())
    if unit == "head":
        off = max(off, _heads_off(model, result, theirs))
    return "exact" if off < TOLERANCE else f"**wrong** by {off:.1g}"


def _heads_off(model: Any, heads: Any, theirs: Any) -> float:
    """How far the heads of a layer and its bias are from its `attn_out` row."""
    components = theirs(model, tokens(), ANSWERS, INCORRECT, unit="component")
    w = (model.W_U[:, ANSWERS] - model.W_U[:, INCORRECT]).mT
    _, cache = model.run_with_cache(tokens())
    worst = 0.0
    for layer in range(model.cfg.n_layers):
        rows = [i for i, label in enumerate(heads.labels) if label.startswith(f"L{layer}H")]
        whole = components.attribution[components.labels.index(f"{layer}_attn_out")]
        bias = getattr(model.blocks[layer].attn, "b_O", None)
        scale = cache["ln_final.hook_scale"][:, -1, 0] if "ln_final.hook_scale" in cache else 1.0
        constant = 0.0 if bias is None else (w @ bias) / scale
        worst = max(worst, float((heads.attribution[rows].sum(0) + constant - whole).abs().max()))
    return worst


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text[:150] + " …" if len(text) > 150 else text).replace("|", "/")


if __name__ == "__main__":
    with torch.no_grad():
        main()

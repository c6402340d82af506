"""What a report says beside its figures, as data; `page.html` lays it out and escapes it."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

import torch

from tl_dla.analyses.pattern_result import HeadPattern, HeadPatterns
from tl_dla.core.result import Attribution
from tl_dla.core.view import prompt_tokens
from tl_dla.effects.audit import Audit
from tl_dla.figures import theme
from tl_dla.figures.attention_view import AttentionStyle, AttentionView
from tl_dla.figures.heatmap import picture
from tl_dla.figures.text import number

_PACKAGES = ("tl-dla", "transformer-lens", "torch", "transformers", "plotly", "circuitsvis")
_SHORT = 64  # tokens: circuitsvis draws no longer prompt in time
_MOST_WEIGHTS = 60_000  # that circuitsvis is given, of all prompts together
_NEAR = 4  # tokens shown on either side of one that is read, in a longer prompt


@dataclass(frozen=True)
class Token:
    """A token of a prompt; what its title says, whether it is marked, its colour, and where it is.

    A gap between tokens has no position.
    """

    text: str
    title: str
    read: bool = False
    colour: str = ""
    prompt: int = 0
    position: int | None = None


def prompts(result: Attribution) -> list[list[Token]]:
    """Every prompt with its attributed positions marked; none where they are not known."""
    if not result.has_tokens:
        return []
    found = []
    for b in range(len(result.prompts.tokens)):
        marked = set(result.positions.index[b][result.positions.valid[b]].tolist())
        tokens = enumerate(prompt_tokens(result, b))
        found.append(
            [
                Token(token, f"position {i}", i in marked, prompt=b, position=i)
                for i, token in tokens
            ]
        )
    return found


@dataclass(frozen=True)
class Logit:
    """The model's own logit in words, and its range where there are several."""

    name: str
    value: str
    range: str = ""


def logit(result: Attribution) -> Logit:
    """The model's own logit, or what a path's rows add up to."""
    own = result.logit[~result.logit.isnan()].cpu().double()
    weights = result.targets.weights
    what = "logit" if weights is None or weights.shape[1] == 1 else "logit difference"
    if not result.include_bias:
        what += " without its biases"
    name = f"{f'Row {result.path[-1]} of the' if result.path else 'The model’s own'} {what}"
    if own.numel() == 1:
        return Logit(name, number(float(own)))
    low, high = number(float(own.min())), number(float(own.max()))
    between = f"from {low} to {high} over {own.numel()} values"
    return Logit(f"{name}: mean", number(float(own.mean())), between)


@dataclass(frozen=True)
class Certified:
    """One certificate, at the position where it is farthest off."""

    passed: bool
    name: str
    cells: list[str]


def certificates(result: Attribution) -> list[Certified]:
    """Every certificate of the result: the whole, and each row that others split."""
    whole = result.reconstruction
    what = "final_post and the biases" if result.unit == "layer" else "rows"
    lines = []
    for name, part in [(f"{what} against {whole.against}", whole), *whole.parts.items()]:
        worst = int((part.error - part.tolerance).nan_to_num(-torch.inf).argmax())
        values = [float(x.flatten()[worst]) for x in (part.expected, part.reconstructed)]
        errors = [float(x.flatten()[worst]) for x in (part.error, part.tolerance)]
        passed = bool((part.error <= part.tolerance.nan_to_num(0.0)).all())
        cells = [f"{x:.6g}" for x in values] + [f"{x:.2g}" for x in errors]
        lines.append(Certified(passed, name, cells))
    return lines


def versions() -> list[tuple[str, str]]:
    """The releases that the page was made with."""
    named = [(name, metadata.version(name)) for name in _PACKAGES]
    return [("Python", platform.python_version()), *named]


# ---- heads with their attention ----------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """A head at the last attributed position of one prompt.

    Attributes:
        label: `L9H6`.
        value: its row there.
        mean: its row's mean over prompts and positions, where there are several.
        pattern: the kind of its pattern there, and from all tokens of all prompts.
        tokens: the prompt coloured by what the head moved from each token.
        reads: of the tokens read most: the token, its position, attention and contribution.
        picture: its pattern as an image, where circuitsvis does not draw it.
        why: why it looks there, in a line.
    """

    label: str
    value: str
    mean: str
    pattern: str
    tokens: list[Token]
    reads: list[tuple[str, int, str, str]]
    picture: str = ""
    why: str = ""


@dataclass(frozen=True)
class Heads:
    """The cards of one prompt, and the patterns that circuitsvis draws where it is short."""

    prompt: int
    cards: list[Card]
    attention: AttentionView | None


def heads(
    result: Attribution, patterns: HeadPatterns, prompts: Sequence[int], style: AttentionStyle
) -> list[Heads]:
    """Each head with what it reads and moves, for each prompt, then all their patterns."""
    found: list[Heads] = []
    weights = 0
    for prompt in prompts if patterns else ():
        tokens = prompt_tokens(result, prompt)
        n = len(tokens)
        weights += len(patterns) * n * n
        view = None
        if n <= _SHORT and weights <= _MOST_WEIGHTS:
            attention = torch.stack([head.pattern[prompt, :n, :n].cpu() for head in patterns])
            view = AttentionView(tokens, attention, [head.label for head in patterns], style)
        cards = [_card(head, prompt, tokens, view is None) for head in patterns]
        found.append(Heads(prompt, cards, view))
    return found


def _card(head: HeadPattern, prompt: int, tokens: list[str], pictured: bool) -> Card:
    """The head's value is that of the prompt that is shown: what its tokens add up to."""
    own = head.value[prompt].flatten()
    own = own[~own.isnan()][-1]
    several = int((~head.value.isnan()).sum())
    mean = number(float(head.value.nanmean()))
    here, over = head.described(prompt)
    n, at = len(tokens), int(head.positions.last[prompt])
    reads = head.reads(n, prompt=prompt)
    every = "all tokens" + " of all prompts" * (len(head.tokens) > 1)
    return Card(
        label=head.label,
        value=number(float(own)),
        mean=f"mean {mean} over {several}" if several > 1 else "",
        pattern=f"from {tokens[at]!r}: {here}; from {every}: {over}",
        tokens=_coloured(reads, tokens, prompt),
        reads=[
            (repr(tokens[at]), at, f"{attention:.1%}", number(moved))
            for _, at, attention, moved in reads[:5]
        ],
        picture=picture(head.pattern[prompt, :n, :n]) if pictured else "",
        why=head.why[prompt],
    )


def _coloured(
    reads: list[tuple[str, int, float, float]], tokens: list[str], prompt: int
) -> list[Token]:
    """The tokens in their order, blue where the head moves the logit up from them, red down.

    Of a long prompt those around what is read.
    """
    most = max(abs(moved) for *_, moved in reads) or 1.0
    near = set(range(len(tokens)))
    if len(tokens) > _SHORT:
        near = {at + i for _, at, *_ in reads[:5] for i in range(-_NEAR, _NEAR + 1)}
    found: list[Token] = []
    for _, at, attention, moved in sorted(reads, key=lambda read: read[1]):
        if at not in near:
            if not found or found[-1].position is not None:
                found.append(Token(" … ", "tokens that are read less"))
            continue
        colour = theme.POSITIVE if moved >= 0 else theme.NEGATIVE
        mixed = f"color-mix(in srgb, {colour} {round(80 * abs(moved) / most)}%, transparent)"
        title = f"position {at}: attention {attention:.1%}, contribution {number(moved)}"
        found.append(Token(tokens[at], title, colour=mixed, prompt=prompt, position=at))
    return found


# ---- an audit ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Audited:
    """The table of an audit: what it is of, its columns, a line of numbers a row, and its flags."""

    text: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]
    sentences: list[str]


def audited(audit: Audit) -> Audited:
    """An audit as a table, in logits, with a sentence for each flag."""
    names = {"direct_recomputed": "direct, norm rescaling", "left": "left at the end"}
    columns = ["direct", "direct_recomputed", "total", "indirect", "left"]
    table = audit.to_dataframe()
    rows = [
        (str(row["row"]), [number(float(row[name])) for name in columns])
        for _, row in table.iterrows()
    ]
    where = "every token" if audit.at == "all" else "the attributed position"
    text = (
        "What a row writes directly beside what the logit loses when the row is"
        f" {audit.ablation}-ablated at {where} (logits, means over prompts and positions)."
    )
    return Audited(text, ["row", *(names.get(x, x) for x in columns)], rows, audit.sentences)

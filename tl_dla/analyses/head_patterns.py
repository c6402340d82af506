"""Heads with their attention: where the heads that matter look, and what they move from there.

A head's row in a `unit="head"` result is the readout at its values, weighed by its attention:

    row = Σ over source tokens of  A[query, source] · (v[source] · w) / s,
    w the logit's direction pulled back through the norms and W_O to the head's values v.

Each term is a source token's *contribution*, in logits: the rows of `unit="source"`, which add up
to the head's. The attention says where a head looks, the contribution what that did to the logit: a
token that is read the most may move nothing.

The terms come from one more run of the result's prompts, which must give the rows of the result
again. Kinds of pattern: `pattern_kinds.py`. Pictures: `tl_dla.figures.attention_view`, whose script
a page holds once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.analyses.pattern_kinds import PatternKind, Pooled, kind, pool, scores
from tl_dla.core.result import Attribution, require_heads
from tl_dla.core.run import CAUSE, again
from tl_dla.core.taps import Tap
from tl_dla.errors import ArgumentError
from tl_dla.figures.attention_view import AttentionStyle, AttentionView
from tl_dla.inputs.positions import Positions
from tl_dla.inputs.selection import Selection, place_of_head
from tl_dla.inputs.tokens import token_strings
from tl_dla.model.hooks import upcast
from tl_dla.model.reader import ModelReader

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class HeadPattern:
    """One head of a result with its attention on every prompt.

    Attributes:
        label: `L9H6`.
        layer: 9.
        head: 6.
        value: the head's row in the result, `[*batch_and_pos]`, in logits.
        pattern: its attention, 0 outside of a prompt's own tokens.
        contributions: what it moved from each source token to the attributed position, in logits;
            they add up to `value`. NaN where a prompt has no such position.
        tokens: each prompt's tokens as text, `[batch][key]`.
        scores: how much the pattern is of each kind, 0 to 1, over all prompts (`pattern_kinds.py`).
        kind: the kind that it is, or `"other"`.
    """

    label: str
    layer: int
    head: int
    value: Float[Tensor, "*batch_and_pos"]
    pattern: Float[Tensor, "batch query key"]
    contributions: Float[Tensor, "*batch_and_pos key"]
    tokens: list[list[str]]
    scores: dict[PatternKind, float]
    kind: PatternKind | Literal["other"]
    positions: Positions = field(repr=False)

    @property
    def row(self) -> Float[Tensor, "*batch_and_pos key"]:
        """The attention paid from the attributed positions, NaN where a prompt has none."""
        rows = self.positions.take(self.pattern)
        valid = self.positions.valid.to(rows.device)[..., None]
        return self.positions.squeeze(torch.where(valid, rows, torch.nan))

    def reads(
        self, k: int = 5, *, prompt: int = 0, position: int = -1
    ) -> list[tuple[str, int, float, float]]:
        """The tokens read most, as `(token, its position, attention, contribution)`.

        Args:
            k: how many; fewer in a shorter prompt.
            prompt: of which prompt.
            position: from which of the attributed positions, an index into them.
        """
        rows, moved = (self._whole(x)[prompt] for x in (self.row, self.contributions))
        at = self.positions.valid[prompt].nonzero()[position, 0]
        n = len(self.tokens[prompt])
        order = rows[at, :n].argsort(descending=True, stable=True)[:k].tolist()
        return [(self.tokens[prompt][i], i, float(rows[at, i]), float(moved[at, i])) for i in order]

    def _whole(self, x: Float[Tensor, "..."]) -> Float[Tensor, "batch pos *key"]:
        """With the axis of positions, also where one position was asked for."""
        return x.unsqueeze(1) if self.positions.single else x

    def to_dataframe(self) -> "pd.DataFrame":
        """A tidy table: a line per prompt × attributed position × source token.

        Columns: `label`, `kind`, `prompt`, `position` (attributed), `source` (position), `token`
        (the source's), `attention`, `contribution`, and `value`, the head's row.
        """
        import pandas as pd

        row, moved, value = (self._whole(x) for x in (self.row, self.contributions, self.value))
        frames = []
        for b, p in self.positions.valid.nonzero().tolist():
            n = len(self.tokens[b])
            frames.append(
                pd.DataFrame(
                    {
                        "label": self.label,
                        "kind": self.kind,
                        "prompt": b,
                        "position": int(self.positions.index[b, p]),
                        "source": range(n),
                        "token": self.tokens[b],
                        "attention": row[b, p, :n].detach().cpu().numpy(),
                        "contribution": moved[b, p, :n].detach().cpu().numpy(),
                        "value": float(value[b, p]),
                    }
                )
            )
        return pd.concat(frames, ignore_index=True)

    def show(self, view: AttentionStyle = "patterns", *, prompt: int = 0) -> AttentionView:
        """The pattern on one prompt, drawn by circuitsvis; displays itself in a notebook.

        Args:
            view: `"patterns"` for tokens to hover over, `"heads"` for a square with axes.
            prompt: which prompt.
        """
        return HeadPatterns([self]).show(view, prompt=prompt)

    def _repr_html_(self) -> str:
        return HeadPatterns([self])._repr_html_()

    def __repr__(self) -> str:
        """The value, the kind and what is read most."""
        value = float(self.value.nanmean())
        named = "" if self.kind == "other" else f" {self.scores[self.kind]:.2f}"
        read = ", ".join(
            f"{token!r} ({attention:.0%}, {moved:+.3f})"
            for token, _, attention, moved in self.reads(3)
        )
        return f"{self.label} {value:+.4f}, {self.kind}{named}; reads {read}"


class HeadPatterns(list[HeadPattern]):
    """A list of heads that shows itself: a table, and one picture of all the patterns."""

    def to_dataframe(self) -> "pd.DataFrame":
        """The tables of all heads; see `HeadPattern.to_dataframe`."""
        import pandas as pd

        return pd.concat([head.to_dataframe() for head in self], ignore_index=True)

    def show(self, view: AttentionStyle = "patterns", *, prompt: int = 0) -> AttentionView:
        """All patterns on one prompt; see `HeadPattern.show`."""
        if not self:
            raise ArgumentError("There is no head to show.")
        n_prompts = len(self[0].tokens)
        if not -n_prompts <= prompt < n_prompts:
            raise ArgumentError(f"prompt must be one of {n_prompts}; {prompt} was given.")
        tokens = self[0].tokens[prompt]
        n = len(tokens)
        attention = torch.stack([head.pattern[prompt, :n, :n].cpu() for head in self])
        return AttentionView(tokens, attention, [head.label for head in self], view)

    def summary(self, prompt: int = 0) -> "pd.DataFrame":
        """A line per head: its value (mean over prompts and positions), kind, what it reads."""
        import pandas as pd

        lines = []
        for head in self:
            named = "" if head.kind == "other" else f" ({head.scores[head.kind]:.2f})"
            read = [
                f"{token!r} {attention:.0%} → {moved:+.3f}"
                for token, _, attention, moved in head.reads(3, prompt=prompt)
            ]
            value = f"{float(head.value.nanmean()):+.3f}"
            lines.append((head.label, value, f"{head.kind}{named}", ", ".join(read)))
        reads = f"reads most (attention → contribution, in logits), prompt {prompt}"
        return pd.DataFrame(lines, columns=["head", "logits", "kind of pattern", reads])

    def _repr_html_(self) -> str:
        if not self:
            return "<p>no head</p>"
        return self.summary().to_html(index=False, border=0) + self.show()._repr_html_()


def top_heads_with_patterns(result: Attribution, k: int = 3) -> HeadPatterns:
    """The k most positive and the k most negative heads, with their attention.

    Runs the result's prompts once more, keeping the attention of the chosen heads' layers only.

    Args:
        result: of `direct_logit_attribution(…, unit="head")`.
        k: how many of each; fewer where fewer heads are positive, or negative. They are ranked by
            their mean over prompts and positions.

    Returns:
        A list of `HeadPattern`: the positive heads, the largest first, then the negative ones, the
        most negative first.

    Raises:
        UnsupportedModelError: for a result without head rows; for a layer that does not show its
            attention pattern or its values, or does something to them that is not understood.
        ArgumentError: for a k that is larger than the number of heads, a result over candidates,
            and a result that another run of its prompts does not give again.
        ReconstructionError: where the source tokens do not add up to a head's row.

    Example:
        >>> from tl_dla import direct_logit_attribution, load_model, top_heads_with_patterns
        >>> prompt = "The Eiffel Tower is in the city of"
        >>> result = direct_logit_attribution(load_model("demo"), prompt, " Paris", unit="head")
        >>> head = top_heads_with_patterns(result, k=1)[0]
        >>> bool((head.contributions.sum(-1) - head.value).abs() < 1e-4)
        True
    """
    require_heads(result)
    if result.targets.candidates is not None:
        raise ArgumentError(
            "A result over candidates ranks the heads differently for each: attribute with one"
            " answer_tokens."
        )
    n_heads = result.kinds.count("head")
    if not 1 <= k <= n_heads:
        raise ArgumentError(f"k must be 1 to the {n_heads} heads of the result; {k} was given.")
    best = result.top(k, kind="head")
    worst = result.top(k, kind="head", largest=False)
    chosen = [label for label, value in best if value > 0]
    chosen += [label for label, value in worst if value < 0]
    return HeadPatterns(_read(result, chosen))


def _read(result: Attribution, labels: Sequence[str]) -> list[HeadPattern]:
    """Run the prompts again and take these heads apart."""
    prompts, positions = result.prompts, result.positions
    tokens, n_keys = prompts.packed, int(prompts.length.max())
    texts = [
        token_strings(result.model, ids[:n])
        for ids, n in zip(tokens, prompts.length.tolist(), strict=True)
    ]
    reader = ModelReader(result.model)
    places = {label: place_of_head(reader, label) for label in labels}
    layers = sorted({layer for layer, _ in places.values()})
    whole = {
        layer: Tap(reader.pattern_and_values(layer).pattern, torch.clone, whole=True)
        for layer in layers
    }
    selection = Selection(layers=tuple(layers), heads=tuple(places.values()))
    once = again(result, "source", selection, taps=list(whole.values()))
    moved = once.result(Attribution).certified("raise", CAUSE)

    found = []
    for label, (layer, head) in places.items():
        part = moved.reconstruction.parts[f"the source tokens of {label}"]
        miss = (part.expected - result[label]).abs()
        if bool((miss > 2 * part.tolerance).any()):
            raise ArgumentError(
                f"Another run of the result's prompts does not give its row {label} again: it was"
                " made from a cache without its input, or the model was changed since. Attribute"
                " again with the input."
            )
        rows = [
            moved[f"{label}←{key}"] for key in range(n_keys) if f"{label}←{key}" in moved.labels
        ]
        rows += [torch.zeros_like(part.expected)] * (n_keys - len(rows))  # no position sees them
        pattern = _own(once.kept[whole[layer]][:, head], prompts.length)
        pooled = [
            pool(pattern[b, : len(text), : len(text)], tokens[b, : len(text)], text)
            for b, text in enumerate(texts)
        ]
        sums = {name: sum((one[name] for one in pooled), Pooled()) for name in pooled[0]}
        found.append(
            HeadPattern(
                label=label,
                layer=layer,
                head=head,
                value=result[label],
                pattern=pattern,
                contributions=torch.stack(rows, -1),
                tokens=texts,
                scores=scores(sums),
                kind=kind(sums),
                positions=positions,
            )
        )
    return found


def _own(
    pattern: Float[Tensor, "batch query key"], length: Tensor
) -> Float[Tensor, "batch query key"]:
    """Zero outside of each prompt's own tokens."""
    own = (
        torch.arange(pattern.shape[-1], device=pattern.device) < length.to(pattern.device)[:, None]
    )
    return upcast(pattern) * own[:, :, None] * own[:, None, :]

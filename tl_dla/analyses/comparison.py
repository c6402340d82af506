"""`compare`: what changed between two runs, row by row, and whether the part or its readout did.

A row is what a part wrote to the final residual stream, x, read out along w (the norm's scale, γ,
the columns of W_U and a soft cap, all in one vector). Between two runs both may change:

    Δ(x · w) = Δx · w̄  +  x̄ · Δw,        x̄ and w̄ the means of the two runs

exactly. The first term is `wrote`, the second `read`, and their sum is `change`; over all rows the
changes add up to the change of the logit. Biases of the final norm and of the unembedding are
readout alone. "Wrote" holds all that happened up to the stream: other activations, other weights of
the part itself.

The two cross terms (one run's activations, the other's readout) need no run where the readouts
differ by the norm's scale and the soft cap alone, as between two prompts of one model, or without
and with an ablation: rows are multiplied by numbers that both results hold. Else (two models, two
answers) each model runs once more, with the other's readout pulled back through it.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.certificate import Check, Reconstruction, Wanted, certify, require_check
from tl_dla.core.decomposition import B_U, LN_FINAL_B, Decomposition
from tl_dla.core.result import Attribution, rows_to_rank
from tl_dla.core.rows import RowKey
from tl_dla.core.run import again, token_readout
from tl_dla.core.taps import Tap, exact
from tl_dla.core.view import view_of
from tl_dla.errors import ArgumentError
from tl_dla.figures.changes import Changes
from tl_dla.inputs.query import Query
from tl_dla.inputs.text import text_of
from tl_dla.model.reader import ModelReader
from tl_dla.model.stream import FINAL, Kind

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_CAUSE = (
    "The likeliest cause: one of the results was changed by hand, or the model does something to"
    " the stream that was not understood; check_model(model, tokens) shows where."
)


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Two runs row by row, in logits: a's value, b's, and why they differ.

    Rows that one side lacks stand against 0. `change`, `wrote` and `read` follow `labels`, in the
    order of the stream.

    Attributes:
        keys: what each row is.
        values_a: a's rows, with all their axes.
        values_b: b's rows.
        values_wrote: what the part wrote differently, read out as the two runs do on average.
        values_read: the readout's own change, of what the two runs wrote on average.
        reconstruction: the certificate that the changes add up to the change of the logit.
        queries: the two questions, a's first.
        logits: what a's rows add up to, and what b's do, `[*batch_and_pos]`.
        unit: of the rows.
        targets: what is attributed in a and in b, in words.
    """

    keys: list[RowKey]
    values_a: Float[Tensor, "row batch pos candidate"]
    values_b: Float[Tensor, "row batch pos candidate"]
    values_wrote: Float[Tensor, "row batch pos candidate"]
    values_read: Float[Tensor, "row batch pos candidate"]
    reconstruction: Reconstruction
    queries: tuple[Query, Query]
    logits: tuple[Float[Tensor, "..."], Float[Tensor, "..."]]
    unit: str
    targets: tuple[str, str]

    # ---- what it is ----------------------------------------------------------------------------

    @property
    def a(self) -> Float[Tensor, "row *batch_and_pos"]:
        """a's rows."""
        return self.query.shaped(self.values_a)

    @property
    def b(self) -> Float[Tensor, "row *batch_and_pos"]:
        """b's rows."""
        return self.query.shaped(self.values_b)

    @property
    def wrote(self) -> Float[Tensor, "row *batch_and_pos"]:
        """What each part wrote differently, read out as the two runs do on average."""
        return self.query.shaped(self.values_wrote)

    @property
    def read(self) -> Float[Tensor, "row *batch_and_pos"]:
        """The change of the readout, of what the part wrote in the two runs on average."""
        return self.query.shaped(self.values_read)

    @property
    def change(self) -> Float[Tensor, "row *batch_and_pos"]:
        """b − a: `wrote` + `read`."""
        return self.query.shaped(self.values)

    @cached_property
    def values(self) -> Float[Tensor, "row batch pos candidate"]:
        """The changes with all their axes."""
        return self.values_b - self.values_a

    @property
    def logit(self) -> Float[Tensor, "*batch_and_pos"]:
        """What the changes add up to: the change of the model's own logit, or logit difference."""
        return self.reconstruction.expected

    @property
    def labels(self) -> list[str]:
        """The rows' names."""
        return [key.label for key in self.keys]

    @property
    def kinds(self) -> list[Kind]:
        """What each row is: `head`, `mlp`, `bias`, …."""
        return [key.kind for key in self.keys]

    @property
    def layers(self) -> list[int | None]:
        """Each row's layer, None for rows of no layer."""
        return [key.layer for key in self.keys]

    @property
    def query(self) -> Query:
        """b's question, whose positions and tokens name the samples."""
        return self.queries[1]

    @property
    def path(self) -> tuple[str, ...]:
        """No row is split further here."""
        return ()

    @property
    def target(self) -> str:
        """What is attributed, in words."""
        a, b = self.targets
        return b if a == b else f"{b} against {a}"

    @property
    def total(self) -> str:
        """What the rows of either side add up to, in words."""
        return "model's own logit" if self.query.include_bias else "logit without biases"

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, label: str) -> Float[Tensor, "*batch_and_pos"]:
        """The change of one row, by its label."""
        if label not in self.labels:
            raise KeyError(f"No row {label!r}; the rows are {', '.join(self.labels[:4])}, ….")
        return self.change[self.labels.index(label)]

    # ---- ranking -------------------------------------------------------------------------------

    def top(
        self,
        k: int = 5,
        *,
        kind: Kind | None = None,
        by: Literal["value", "magnitude"] = "value",
        of: Literal["change", "wrote", "read"] = "change",
        largest: bool = True,
        prompt: int | None = None,
    ) -> list[tuple[str, float]]:
        """The k rows that rose most as `(label, change)`, the largest first.

        Values are means over prompts (but for one that is chosen), positions and candidates.

        Args:
            k: how many; fewer where there are not so many rows.
            kind: only rows of this kind, such as `"head"`.
            by: `"magnitude"` ranks by the absolute value of what is returned.
            of: the whole change, or one of its two terms.
            largest: False for those that fell most.
            prompt: which prompt of a batch.

        Raises:
            ArgumentError: for a kind, a ranking, a term or a prompt that there is not.
        """
        terms = {"change": self.values, "wrote": self.values_wrote, "read": self.values_read}
        if of not in terms:
            raise ArgumentError(f"of must be one of {', '.join(terms)}; {of!r} was given.")
        if by == "contrast":
            raise ArgumentError('by must be "value" or "magnitude" here; "contrast" was given.')
        rows = rows_to_rank(self.kinds, kind, k, by)
        n = len(self.query.prompts.length)
        if prompt is not None and not -n <= prompt < n:
            raise ArgumentError(f"prompt must be one of the {n}; {prompt} was given.")
        values = self.query.with_axes(self.query.shaped(terms[of]))[rows]
        values = values if prompt is None else values[:, prompt % n]
        means = values.flatten(1).nanmean(1).cpu()
        ranked = means.abs() if by == "magnitude" else means
        order = ranked.argsort(descending=largest, stable=True)[:k].tolist()
        return [(self.labels[rows[i]], float(means[i])) for i in order]

    # ---- tables, text, pictures ----------------------------------------------------------------

    def changes(self, prompt: int | None = None, candidate: str | int | None = None) -> Changes:
        """The numbers and words that figures and tables show.

        Args:
            prompt: only this prompt of a batch.
            candidate: only this one of several candidate tokens, by its text or its index.
        """
        terms = (self.values_a, self.values_b, self.values_wrote, self.values_read)
        shown = [_Shown(self, values) for values in terms]
        a, b, wrote, read = (view_of(one, prompt, candidate).values for one in shown)
        view = view_of(self, prompt, candidate)
        ends = [view_of(_Shown(self, self.values, own), prompt, candidate) for own in self.logits]
        return Changes(view, a, b, wrote, read, ends[0].logit, ends[1].logit, self._sides())

    def _sides(self) -> tuple[str, str]:
        """What a and b are, in the words in which they differ."""
        a, b = self.queries
        one = len(a.prompts.length) == 1 and a.has_tokens and b.has_tokens
        texts = [text_of(q.model, q.prompts.packed[0, : int(q.prompts.length[0])]) for q in (a, b)]
        if one and texts[0] != texts[1]:
            return f"a: {texts[0]}", f"b: {texts[1]}"
        names = [str(getattr(q.model.cfg, "model_name", "")) for q in (a, b)]
        if a.model is not b.model and names[0] != names[1]:
            return f"a: {names[0]}", f"b: {names[1]}"
        return "a", "b"

    def to_dataframe(self) -> "pd.DataFrame":
        """A tidy table: one line per row × prompt × position (× candidate).

        Columns: `label`, `kind`, `layer`, `prompt`, `position_a` and `position_b` (of each prompt's
        real tokens), `candidate` where there are several, `a`, `b`, `change`, `wrote`, `read`,
        `logit_a` and `logit_b` (the model's own).
        """
        import pandas as pd

        own = [q.with_axes(x[None])[0] for q, x in zip(self.queries, self.logits, strict=True)]
        numbers = {
            "a": self.values_a,
            "b": self.values_b,
            "change": self.values,
            "wrote": self.values_wrote,
            "read": self.values_read,
        }
        arrays = {name: x.detach().cpu().numpy() for name, x in numbers.items()}
        names, frames = self.query.targets.candidates, []
        for p, i in self.query.positions.valid.nonzero().tolist():
            for c, name in enumerate(names or [""]):
                frame = pd.DataFrame({"label": self.labels, "kind": self.kinds})
                frame["layer"] = pd.array(self.layers, dtype="Int64")
                frame["prompt"] = p
                for side, query in zip("ab", self.queries, strict=True):
                    frame[f"position_{side}"] = int(query.positions.index[p, i])
                if names:
                    frame["candidate"] = name
                for column, x in arrays.items():
                    frame[column] = x[:, p, i, c]
                for side, logit in zip("ab", own, strict=True):
                    frame[f"logit_{side}"] = float(logit[p, i, c])
                frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def plot(
        self,
        *,
        prompt: int | None = None,
        candidate: str | int | None = None,
        k: int = 30,
        title: str | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> "go.Figure":
        """A line from a's value to b's for each row, in the order of the stream; heads as a map.

        Args:
            prompt: only this prompt of a batch.
            candidate: only this one of several candidate tokens; the first by default.
            k: how many rows have a line; the smaller changes are added up in one of their own.
            title: in place of the figure's own; `""` for no heading.
            width: in pixels; as wide as the page by default.
            height: in pixels; as high as what is drawn by default.

        Raises:
            ArgumentError: for a prompt or candidate that there is not, or k < 1.
        """
        from tl_dla.figures import changes, charts

        if candidate is None and self.query.targets.candidates is not None:
            candidate = 0
        look = charts.Look(title, width, height)
        return changes.plot(self.changes(prompt, candidate), k, look)

    def _repr_html_(self) -> str:
        """What a notebook shows: the rows that changed most, and the certificate."""
        from tl_dla.figures.changes import html

        return html(self.changes(candidate=None if self.query.targets.candidates is None else 0))

    def __repr__(self) -> str:
        """The rows that changed most, the logits, and the certificate."""
        from tl_dla.figures.changes import text

        shown = self.changes(candidate=None if self.query.targets.candidates is None else 0)
        return f'Comparison: {shown.view.words.target}, unit="{self.unit}"\n{text(shown)}'


@dataclass(frozen=True, eq=False)
class _Shown:
    """A comparison with other values (a's, b's, a term), for `view_of`."""

    of: Comparison
    values: Float[Tensor, "row batch pos candidate"]
    own: Float[Tensor, "..."] | None = None

    @property
    def logit(self) -> Float[Tensor, "..."]:
        return self.of.logit if self.own is None else self.own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of, name)


def compare(
    a: Attribution, b: Attribution, *, answers: bool = False, check: Check = "raise"
) -> Comparison:
    """What changed from a to b: each row's change, and whether the part or its readout changed.

    Args:
        a: an attribution.
        b: another of the same unit and as many prompts and positions: other prompts (of any
            length), another model of the same architecture, or a run of `ablate`.
        answers: whether they may be of different answers.
        check: what a failed certificate does.

    Returns:
        A `Comparison`. Rows that one side lacks stand against 0.

    Raises:
        ArgumentError: for results that cannot stand against each other, saying why.
        ReconstructionError: where the changes do not add up to the change of the logit.

    Example:
        >>> from tl_dla import compare, direct_logit_attribution, load_model
        >>> model = load_model("demo")
        >>> prompts = "The Eiffel Tower is in the city of", "The Colosseum is in the city of"
        >>> a, b = (direct_logit_attribution(model, prompt, " Paris") for prompt in prompts)
        >>> changes = compare(a, b)
        >>> bool(changes.change.sum() < -5)
        True
        >>> changes.reconstruction.passed
        True
    """
    require_check(check)
    _require_comparable(a, b, answers)
    keys = _merged([a.keys, b.keys])
    with exact():
        crossed = _by_scales(a, b) if _read_alike(a, b) else _by_runs(a, b)
        keys = _merged([keys, *(side.keys for side in crossed)])
        own_a, own_b = (_aligned(one.keys, one.values, keys) for one in (a, b))
        a_as_b, b_as_a = (_aligned(one.keys, one.values, keys).to(own_a) for one in crossed)
        own_b = own_b.to(own_a)
        wrote = ((own_b - a_as_b) + (b_as_a - own_a)) / 2
        read = ((own_b - b_as_a) + (a_as_b - own_a)) / 2
        constant = torch.tensor([key in (LN_FINAL_B, B_U) for key in keys], device=own_a.device)
        constant = constant[:, None, None, None]
        wrote = torch.where(constant, 0.0, wrote)
        read = torch.where(constant, own_b - own_a, read)
    reconstruction = _certify(a, b, keys, wrote + read, crossed)
    reconstruction.raise_or_warn(check, _CAUSE)
    logits, targets = (a.logit, b.logit.to(a.logit)), (a.target, b.target)
    sides = (own_a, own_b, wrote, read, reconstruction, (a.query, b.query), logits)
    return Comparison(keys, *sides, a.unit, targets)


# ---- what can be compared ----------------------------------------------------------------------


def _require_comparable(a: Attribution, b: Attribution, answers: bool) -> None:
    """Raise unless the rows, positions and answers of two results stand against each other."""
    if a.unit != b.unit:
        raise ArgumentError(
            f'Rows of one unit are compared; a has unit="{a.unit}", b unit="{b.unit}": attribute'
            " both with one."
        )
    if a.hops or b.hops:
        raise ArgumentError(
            "Rows that parts wrote to the final stream are compared; the rows of a path are of"
            " another place: compare the results that the paths start from."
        )
    if a.include_bias != b.include_bias or a.selection != b.selection:
        raise ArgumentError(
            "The two results split different rows: give both the same layers=, heads=,"
            " top_neurons= and include_bias=."
        )
    if a.attribution.shape[1:] != b.attribution.shape[1:] or a.query.has_batch != b.query.has_batch:
        raise ArgumentError(
            "Prompts and positions are compared pair by pair; a has"
            f" {list(a.attribution.shape[1:])} of them, b {list(b.attribution.shape[1:])}: give as"
            " many of each, such as pos=-1 for prompts of different lengths."
        )
    valid = b.positions.valid.to(a.positions.valid.device)
    if not torch.equal(a.positions.valid, valid):
        raise ArgumentError(
            "Positions are compared pair by pair, and a prompt of one result has more of them than"
            " its partner: choose them with pos=."
        )
    if a.targets.candidates != b.targets.candidates:
        raise ArgumentError("Candidates are compared one by one: give both results the same.")
    _require_one_architecture(a.model, b.model)
    if a.unit == "neuron" and set(a.keys) != set(b.keys):
        raise ArgumentError(
            "The largest neurons of the two results are not the same, so their rows do not stand"
            ' against each other: give unit="neuron" layers= in place of top_neurons=.'
        )
    if not answers and not _same_answers(a, b):
        raise ArgumentError(
            f"a is of {a.target}, b of {b.target}: attribute the same answers, or pass"
            " answers=True to compare different ones."
        )


def _same_answers(a: Attribution, b: Attribution) -> bool:
    one, other = a.targets, b.targets
    if one.mean_of_vocab != other.mean_of_vocab or one.weights.shape != other.weights.shape:
        return False
    shape = a.numbers.ratio.shape[:2]
    ids = [x.ids.cpu().expand(*shape, -1) for x in (one, other)]
    valid = a.positions.valid.cpu()
    return torch.equal(ids[0][valid], ids[1][valid]) and torch.equal(
        one.weights.cpu(), other.weights.cpu()
    )


def _require_one_architecture(a: Any, b: Any) -> None:
    if a is b:
        return
    names = [ModelReader(model).architecture for model in (a, b)]
    if names[0] != names[1]:
        raise ArgumentError(
            f"Models of one architecture are compared; a's is {names[0]}, b's {names[1]}."
        )
    for name in ("n_layers", "d_model", "n_heads", "d_vocab"):
        one, other = getattr(a.cfg, name), getattr(b.cfg, name)
        if one != other:
            raise ArgumentError(
                f"Models of one architecture are compared; a's {name} is {one}, b's {other}."
            )
    vocabularies = [
        getattr(getattr(model, "tokenizer", None), "get_vocab", dict)() for model in (a, b)
    ]
    if all(vocabularies) and vocabularies[0] != vocabularies[1]:
        raise ArgumentError(
            "The two models' tokenizers have different vocabularies, so their logits are of"
            " different words."
        )


# ---- the cross terms ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Crossed:
    """One run's rows read out as the other run's are; the certificate of the run that it took."""

    keys: Sequence[RowKey]
    values: Float[Tensor, "row batch pos candidate"]
    name: str = ""
    reconstruction: Reconstruction | None = None


def _read_alike(a: Attribution, b: Attribution) -> bool:
    """Whether the readouts are the same directions, so that scales and ratios alone differ."""
    one, other = a.numbers.readouts.cpu(), b.numbers.readouts.cpu()
    valid = a.positions.valid.cpu()
    return _same_answers(a, b) and torch.equal(one[valid], other[valid])


def _by_scales(a: Attribution, b: Attribution) -> tuple[_Crossed, _Crossed]:
    """a's rows with b's scale and soft cap, and b's with a's."""

    def crossed(rows: Attribution, readout: Attribution) -> _Crossed:
        own, other = rows.numbers, readout.numbers
        change = own.scale.to(own.rows) / other.scale.to(own.rows)
        ratio = other.ratio.to(own.rows) * change[..., None]
        return _Crossed(rows.keys, rows.targets.added(own.rows * ratio))

    return crossed(a, b), crossed(b, a)


def _by_runs(a: Attribution, b: Attribution) -> tuple[_Crossed, _Crossed]:
    """The same where directions differ: each model runs again, with the other's readout."""
    if a.selection.top_neurons is not None:
        raise ArgumentError(
            "The largest neurons are compared between runs of one model and one answer: give"
            ' unit="neuron" layers= in place of top_neurons=.'
        )
    names = "a's rows, read out as b's,", "b's rows, read out as a's,"
    return _run(a, b, names[0]), _run(b, a, names[1])


def _run(rows: Attribution, readout: Attribution, name: str) -> _Crossed:
    reader, other, n = ModelReader(rows.model), readout.numbers, len(rows.prompts.length)
    directions = replace(token_readout(readout), norms=())

    def parts(prompts: slice) -> Decomposition:
        own, about = directions.part(prompts), (rows.unit, rows.selection)
        return Decomposition(reader, reader.stream().steps, own, [], *about)

    whole = parts(slice(0, n))

    def taps(prompts: slice) -> list[Tap]:
        return (whole if prompts == slice(0, n) else parts(prompts)).taps

    once = again(rows, "component", taps=taps)
    found = whole.rows(once.kept, rows.positions)
    ratio = other.ratio.to(found.total) / other.scale.to(found.total)[..., None]
    found = replace(found, ratio=ratio)
    total, eps = found.total * ratio, max(reader.machine_eps, once.kept.machine_eps)
    against = "the final stream, read out so"
    wanted = Wanted(total, torch.zeros_like(total), against, eps)
    kept = _added(found.keys)
    certificate = certify(found, kept, wanted, readout.query, directions.direction.shape[-1])
    values = readout.targets.added(found.values * ratio)
    return _Crossed(found.keys, values, name, certificate)


# ---- rows --------------------------------------------------------------------------------------


def _merged(sides: Sequence[Sequence[RowKey]]) -> list[RowKey]:
    """All rows, each after the one that it follows."""
    merged = list(sides[0])
    for keys in sides[1:]:
        known, last = set(merged), None
        after: dict[RowKey | None, list[RowKey]] = defaultdict(list)
        for key in keys:
            if key in known:
                last = key
            else:
                after[last].append(key)
        merged = [*after[None], *(one for key in merged for one in (key, *after[key]))]
    return merged


def _aligned(
    keys: Sequence[RowKey], values: Float[Tensor, "row *rest"], everything: Sequence[RowKey]
) -> Float[Tensor, "all_rows *rest"]:
    """The values under all rows; 0 where a side has none."""
    if list(keys) == list(everything):
        return values
    place = {key: i for i, key in enumerate(everything)}
    aligned = values.new_zeros(len(everything), *values.shape[1:])
    aligned[[place[key] for key in keys]] = values
    return aligned


def _added(keys: Sequence[RowKey]) -> list[int]:
    """The rows that add up: all, or of the readings of a stream the last one and the biases."""
    return [i for i, key in enumerate(keys) if key.kind != "residual" or key.name == FINAL]


def _certify(
    a: Attribution,
    b: Attribution,
    keys: Sequence[RowKey],
    change: Float[Tensor, "row batch pos candidate"],
    crossed: Sequence[_Crossed],
) -> Reconstruction:
    """The changes against that of the logit, and what ran for them against its own stream."""
    one, other = a.reconstruction, b.reconstruction
    against = one.against if one.against == other.against else "the logit"
    tolerance = one.tolerance + other.tolerance.to(one.tolerance)
    rests = [side.unexplained for side in (one, other)]
    last = "the changes of the last reading and the biases make"
    return Reconstruction(
        b.logit.to(a.logit) - a.logit,
        b.query.shaped(change[_added(keys)].sum(0)),
        tolerance,
        f"the change of {against}",
        {x.name: x.reconstruction for x in crossed if x.reconstruction is not None},
        {key: max(r.get(key, 0.0) for r in rests) for key in dict.fromkeys([*rests[0], *rests[1]])},
        tuple(dict.fromkeys([*one.unchecked, *other.unchecked])),
        last if a.unit == "layer" else "changes add up to",
    )

"""Which results can stand against each other, why others cannot, and what the two are called."""

from typing import Any, get_args

import torch

from tl_dla.core.result import Attribution
from tl_dla.errors import ArgumentError
from tl_dla.inputs.absent import AbsentModel
from tl_dla.inputs.query import Query
from tl_dla.inputs.selection import Unit
from tl_dla.inputs.text import text_of
from tl_dla.model.reader import ModelReader

_SIZES = ("n_layers", "n_heads", "d_model", "d_vocab")


def require_comparable(a: Attribution, b: Attribution, answers: bool) -> None:
    """Raise unless the rows, positions and answers of two results stand against each other."""
    if a.unit != b.unit:
        raise ArgumentError(
            f'Rows of one unit are compared; a has unit="{a.unit}", b unit="{b.unit}": attribute'
            " both with one."
        )
    for one in (a, b):
        if one.unit not in get_args(Unit) or one.numbers.readouts is None:
            raise ArgumentError(
                "Rows of direct_logit_attribution are compared, which parts wrote to the final"
                f" stream; this {type(one).__name__} has rows of another kind, or their means"
                " (compare first: top and the figures take means themselves)."
            )
    if a.hops or b.hops:
        raise ArgumentError(
            "Rows that parts wrote to the final stream are compared; the rows of a path are of"
            " another place: compare the results that the paths start from."
        )
    if a.include_bias != b.include_bias or a.selection != b.selection:
        raise ArgumentError(
            "The two results split different rows: give both the same layers=, heads=,"
            " top_neurons=, dictionaries= and include_bias=."
        )
    for own, other in zip(a.selection.dictionaries, b.selection.dictionaries, strict=True):
        known = own.module is not None and other.module is not None
        if known and own.module is not other.module:
            raise ArgumentError(
                f"Latents of one dictionary are compared, and those of {own.hook} are two: give"
                " both results the same."
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
    chosen = (a.selection.top_neurons, a.selection.top_latents)
    if chosen != (None, None) and set(a.keys) != set(b.keys):
        raise ArgumentError(
            f"The largest {a.unit}s of the two results are not the same, so their rows do not"
            f" stand against each other: leave out top_{a.unit}s=."
        )
    if not answers and not same_answers(a, b):
        raise ArgumentError(
            f"a is of {a.target}, b of {b.target}: attribute the same answers, or pass"
            " answers=True to compare different ones."
        )


def same_answers(a: Attribution, b: Attribution) -> bool:
    """Whether the same logits are attributed, and added up alike."""
    one, other = a.targets, b.targets
    if one.mean_of_vocab != other.mean_of_vocab or one.ids.shape[-1] != other.ids.shape[-1]:
        return False
    weights = [x.weights if x.weights is None else x.weights.tolist() for x in (one, other)]
    shape, valid = a.numbers.ratio.shape[:2], a.positions.valid.cpu()
    ids = [x.ids.cpu().expand(*shape, -1)[valid] for x in (one, other)]
    return weights[0] == weights[1] and torch.equal(*ids)


def _require_one_architecture(a: Any, b: Any) -> None:
    """Of models that are there by name and vocabulary; of what was kept of them, by their sizes."""
    if a is b:
        return
    sizes = [{name: getattr(model.cfg, name, None) for name in _SIZES} for model in (a, b)]
    for name, one in sizes[0].items():
        if one != sizes[1][name]:
            raise ArgumentError(
                f"Models of one architecture are compared; a's {name} is {one}, b's"
                f" {sizes[1][name]}."
            )
    if isinstance(a, AbsentModel) or isinstance(b, AbsentModel):
        return
    names = [ModelReader(model).architecture for model in (a, b)]
    if names[0] != names[1]:
        raise ArgumentError(
            f"Models of one architecture are compared; a's is {names[0]}, b's {names[1]}."
        )
    tokenizers = [getattr(model, "tokenizer", None) for model in (a, b)]
    vocabularies = [None if t is None else t.get_vocab() for t in tokenizers]
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        raise ArgumentError(
            "The two models' tokenizers have different vocabularies, so their logits are of"
            " different words."
        )


def sides(a: Query, b: Query) -> tuple[str, str]:
    """What a and b are, in the words in which they differ."""
    one = len(a.prompts.length) == 1 and a.has_tokens and b.has_tokens
    texts = [text_of(q.model, q.prompts.rows[0]) for q in (a, b)]
    if one and texts[0] != texts[1]:
        return f"a: {texts[0]}", f"b: {texts[1]}"
    names = [str(getattr(q.model.cfg, "model_name", "")) for q in (a, b)]
    if a.model is not b.model and names[0] != names[1]:
        return f"a: {names[0]}", f"b: {names[1]}"
    return "a", "b"

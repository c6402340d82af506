"""The logit lens: what the model would predict from the residual stream after each sublayer.

    logits at a point = transform( ln_final(x) @ W_U + b_U ),      x the stream there

as if the model stopped there: nostalgebraist 2020
(https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens). `ln_final` is
the model's own module, so the norm's statistics are computed afresh from x at each point, and
`transform` its own multiplier or soft cap. At `final_post` these are the model's own logits.

Not to be confused with `unit="layer"` of `direct_logit_attribution`, which reads the same points
with the final norm's scale *frozen* at its value at the end: its steps from point to point are what
sublayers wrote, and add up to the logit. The lens's steps are not, and do not: its scale differs
from point to point, and is small where the stream is still short.

What is read where the stream is not simply a sum of writes: the stream as it is there. A model
that rescales the whole stream later (Gemma 4, RWKV) is not rescaled first; before a norm, that
makes no difference. A model whose stream is itself normalised (GPT-1, OPT-350M) has no final norm:
its points between blocks are normalised already, and `0_pre`, the bare embedding, is not.

Memory: the streams at the positions asked for, `[point, batch, pos, d_model]`, and one block of
logits, `[batch, pos, chunk_size]`; the softmax's statistics are accumulated chunk by chunk.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_dla.analyses.lens_result import LogitLens
from tl_dla.analyses.vocabulary import read_vocabulary
from tl_dla.core.rounding import logits_tolerance
from tl_dla.core.taps import Kept, Tap, exact, forward
from tl_dla.errors import ArgumentError, ReconstructionError, UnsupportedModelError
from tl_dla.inputs.models import require_eval, require_model
from tl_dla.inputs.positions import Positions, read_positions
from tl_dla.inputs.query import Query
from tl_dla.inputs.targets import Answers, Targets, read_targets
from tl_dla.inputs.tokens import Prompts, read_prompts, texts_of
from tl_dla.model.reader import ModelReader
from tl_dla.model.stream import ResidPoint
from tl_dla.model.unembedding import Unembedding


def logit_lens(
    model: Any,
    input: str | Sequence[str] | Int[Tensor, "*batch pos"],
    answer_tokens: Answers | None = None,
    incorrect_tokens: Answers | None = None,
    *,
    candidate_tokens: Sequence[str | int] | Int[Tensor, " candidate"] | None = None,
    pos: Any = None,
    incl_mid: bool = True,
    top_k: int = 5,
    chunk_size: int = 4096,
    attention_mask: Int[Tensor, "batch pos"] | Bool[Tensor, "batch pos"] | None = None,
    prepend_bos: bool | None = None,
) -> LogitLens:
    """Read the residual stream after every sublayer as if it were the last (see the module).

    One forward pass; then one product with W_U a point, in chunks over the vocabulary. At the last
    position of each prompt, the reading of `final_post` is held against the model's own logits.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode.
        input: a prompt, a list of prompts of any lengths, or token ids `[pos]` or `[batch, pos]`.
        answer_tokens: a token whose logit, probability and rank to follow, in the forms of
            `direct_logit_attribution`. The most likely tokens are read in any case.
        incorrect_tokens: others to follow beside it; `logit_diff` is the answer less their mean.
        candidate_tokens: in place of `answer_tokens`: any tokens to follow, the same everywhere.
        pos: positions of each prompt, as in `direct_logit_attribution`; None for all of them.
        incl_mid: also read between attention and MLP, where the model shows the stream there.
        top_k: how many of the most likely tokens to keep.
        chunk_size: how many tokens of the vocabulary to unembed at a time.
        attention_mask: which tokens are real, for padded token ids.
        prepend_bos: as in `model.to_tokens`, for strings.

    Raises:
        TokenError: for a prompt, answer or position that cannot be what was meant.
        ArgumentError: for other arguments that do not fit.
        UnsupportedModelError: for a model whose stream or readout is not understood.
        ReconstructionError: where the reading of `final_post` is not the model's own logits.

    Example:
        >>> from tl_dla import load_model, logit_lens
        >>> lens = logit_lens(load_model("demo"), "The Eiffel Tower is in the city of", pos=-1)
        >>> lens.labels[0], lens.labels[-1], lens.entropy.shape[1:]
        ('0_pre', 'final_post', torch.Size([1, 1]))
    """
    model = require_model(model)
    reader = ModelReader(model)
    prompts = read_prompts(model, input, prepend_bos=prepend_bos, attention_mask=attention_mask)
    positions = read_positions(pos, prompts)
    targets = None
    if answer_tokens is not None or incorrect_tokens is not None or candidate_tokens is not None:
        if isinstance(incorrect_tokens, str) and incorrect_tokens == "mean":
            raise ArgumentError(
                'The lens gives every token a probability and a rank, and "mean" is no token: name'
                " the incorrect tokens."
            )
        texts, batch = texts_of(input), prompts.tokens.shape[0]
        targets = read_targets(
            model, answer_tokens, incorrect_tokens, candidate_tokens, batch, positions, texts
        )
    require_eval(model)
    stream = reader.stream()
    unembed = Unembedding(model, stream, chunk_size)
    if not 1 <= top_k <= unembed.d_vocab:
        raise ArgumentError(f"top_k must be 1 to {unembed.d_vocab} tokens; {top_k} was given.")

    points = [point for point in stream.points if point.block or incl_mid]
    states, last, kept = _record(reader, points, prompts, positions, unembed)
    read = read_vocabulary(unembed, states, targets, top_k)
    _certify(reader, points[-1], unembed, last, kept)

    valid = positions.valid.to(read.entropy.device)
    tensors: dict[str, Any] = {name: _masked(x, valid) for name, x in vars(read).items()}
    return LogitLens(
        **tensors,
        labels=[point.label for point in points],
        model=model,
        prompts=prompts,
        positions=positions,
        targets=targets,
    )


def _record(
    reader: ModelReader,
    points: list[ResidPoint],
    prompts: Prompts,
    positions: Positions,
    unembed: Unembedding,
) -> tuple[list[Tensor], Tensor, Kept]:
    """The normalised stream at each point, at each prompt's end, and the model's own logits there.

    The model runs once, and itself unembeds only the prompts' ends.
    """

    def copy(x: Tensor) -> Tensor:
        return positions.take(x).clone()

    ends = read_positions(-1, prompts)
    final = points[-1]
    # Hooks at the unembedding see the prompts' ends only; what the last block returns is the same
    # unless something lies between the two, which the certificate would notice.
    site = final.site if reader.shows_final_stream(final) else reader.last_block()
    taps = [Tap(point.site if point is not final else site, copy, whole=True) for point in points]
    end = Tap(site, torch.clone)
    vocabulary = torch.arange(unembed.d_vocab, device=prompts.tokens.device)[None, None]
    query = Query(reader.model, prompts, ends, Targets(vocabulary, torch.ones(1, 1)))
    kept = forward(query, [*taps, end])
    with exact():
        states = [unembed.normalise(kept[tap]) for tap in taps]
        return states, unembed.normalise(kept[end]), kept


@exact()
def _certify(
    reader: ModelReader, final: ResidPoint, unembed: Unembedding, last: Tensor, kept: Kept
) -> None:
    """Hold the reading of the final stream against the model's own logits, over the vocabulary.

    `logits_tolerance` says how far they may be apart.
    """
    own = kept.logits
    assert own is not None
    error = max(
        float(difference.abs().nan_to_num(torch.inf).max())
        for chunk in unembed.chunks()
        for difference in [chunk.logits(last) - own[..., chunk.part].to(last.device)]
    )
    largest = float(own.abs().max())
    eps = max(reader.machine_eps, kept.machine_eps)
    if error <= logits_tolerance(eps) * largest:
        return
    if not reader.shows_final_stream(final):
        raise UnsupportedModelError(
            f"{reader.architecture} does something to the residual stream between its last block"
            f" and {final.site.name} that is not understood, so no earlier point can be read as its"
            " end; no unit works on it."
        )
    raise ReconstructionError(
        f"The lens reads final_post up to {error:.3g} away from the model's own logits (the largest"
        f" is {largest:.3g}): a hook of yours changes them after the final norm's input, or the"
        " model does something there that is not understood."
    )


def _masked(x: Tensor | None, valid: Bool[Tensor, "batch pos"]) -> Tensor | None:
    """NaN, or -1 for integers, where a prompt has no such position."""
    if x is None or bool(valid.all()):
        return x
    nothing = torch.nan if x.is_floating_point() else -1
    keep = valid if x.ndim == 3 else valid.unsqueeze(-1)
    return torch.where(keep, x, torch.full_like(x, nothing))

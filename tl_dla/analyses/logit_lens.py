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
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_dla.analyses.vocabulary import read_vocabulary
from tl_dla.core.rounding import logits_tolerance
from tl_dla.core.taps import Tap, exact, forward
from tl_dla.errors import ArgumentError, ReconstructionError, UnsupportedModelError
from tl_dla.figures.text import shorten
from tl_dla.inputs.models import require_eval, require_model
from tl_dla.inputs.positions import Positions, read_positions
from tl_dla.inputs.query import Query
from tl_dla.inputs.targets import Answers, Targets, read_targets
from tl_dla.inputs.text import pieces, text_of
from tl_dla.inputs.tokens import Prompts, read_prompts, texts_of, token_strings
from tl_dla.model.reader import ModelReader
from tl_dla.model.stream import ResidPoint
from tl_dla.model.unembedding import Unembedding

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tl_dla.figures.lens import LensColour, LensView


@dataclass(frozen=True, eq=False, repr=False)
class LogitLens:
    """The model's prediction at each point of the residual stream and each position.

    Every tensor starts with the axes `layer batch pos`: `layer` follows `labels`, `pos` the
    positions asked for (one, for a single position). Floats are NaN, and integers -1, where a
    prompt has no such position.

    Attributes:
        labels: the points: `0_pre`, `0_mid`, …, `final_post`, as in `unit="layer"`.
        entropy: of the softmax over the vocabulary, in nats.
        top_ids: the most likely tokens, the first one the prediction.
        top_values: their logits.
        top_probabilities: their probabilities.
        values: the logits of the tokens asked for (answer, then incorrect ones; or candidates),
            None where none were.
        probabilities: their probabilities.
        ranks: how many tokens have a strictly higher logit: 0 for the prediction itself.
    """

    labels: list[str]
    entropy: Float[Tensor, "layer batch pos"]
    top_ids: Int[Tensor, "layer batch pos k"]
    top_values: Float[Tensor, "layer batch pos k"]
    top_probabilities: Float[Tensor, "layer batch pos k"]
    values: Float[Tensor, "layer batch pos token"] | None
    probabilities: Float[Tensor, "layer batch pos token"] | None
    ranks: Int[Tensor, "layer batch pos token"] | None
    model: Any = field(repr=False)
    prompts: Prompts = field(repr=False)
    positions: Positions = field(repr=False)
    targets: Targets | None = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def logit_diff(self) -> Float[Tensor, "layer batch pos"]:
        """The answer's logit less the mean of the incorrect ones' where there are any, in logits.

        Raises:
            ArgumentError: where no answer was asked for.
        """
        if self.values is None or self.targets is None or self.targets.candidates is not None:
            raise ArgumentError(
                "The lens was not given an answer to read: pass answer_tokens to logit_lens."
            )
        return self.targets.added(self.values)[..., 0]

    @cached_property
    def top_tokens(self) -> list[list[list[list[str]]]]:
        """`top_ids` as text, nested `[layer][batch][pos][k]`; `""` where there is no position."""
        return self._strings(self.top_ids)

    @property
    def tokens(self) -> list[list[str]]:
        """The prompts' tokens at the positions read, `[batch][pos]`."""
        ids = self.prompts.packed.gather(1, self.positions.index)
        return self._strings(torch.where(self.positions.valid.to(ids.device), ids, -1))

    def _strings(self, ids: Int[Tensor, "..."]) -> list[Any]:
        unique, inverse = ids.detach().cpu().unique(return_inverse=True)
        known = dict(
            zip(unique.tolist(), token_strings(self.model, unique.clamp(min=0)), strict=True)
        )
        known[-1] = ""

        def text(nested: Any) -> Any:
            return [text(x) for x in nested] if isinstance(nested, list) else known[nested]

        return text(ids.tolist())

    def to_dataframe(self) -> "pd.DataFrame":
        """A tidy table: a line per point × prompt × position × token read.

        Columns: `label` (the point), `prompt`, `position` (of the prompt's real tokens), `token`
        (the prompt's token there), `entropy`, `read` (`"top"` or `"asked"`), `rank`, `read_token`,
        `read_id`, `logit`, `probability`.
        """
        import pandas as pd

        n_top = self.top_ids.shape[-1]
        ids, values, probabilities = [self.top_ids], [self.top_values], [self.top_probabilities]
        ranks = [torch.arange(n_top).expand_as(self.top_ids)]
        if self.values is not None and self.targets is not None:
            assert self.ranks is not None and self.probabilities is not None
            ids.append(self.targets.ids.to(self.top_ids).expand_as(self.ranks))
            values.append(self.values)
            probabilities.append(self.probabilities)
            ranks.append(self.ranks)
        columns = {
            "rank": torch.cat([x.cpu() for x in ranks], -1),
            "read_id": torch.cat(ids, -1),
            "logit": torch.cat(values, -1),
            "probability": torch.cat(probabilities, -1),
        }
        n_read = columns["logit"].shape[-1]
        keep = self.positions.valid.cpu().nonzero()
        at = self.positions.index.cpu()
        tokens, names = self.tokens, self._strings(columns["read_id"])
        frames = []
        for b, p in keep.tolist():
            frame = pd.DataFrame(
                {
                    "label": [label for label in self.labels for _ in range(n_read)],
                    "prompt": b,
                    "position": int(at[b, p]),
                    "token": tokens[b][p],
                    "entropy": self.entropy[:, b, p].cpu().repeat_interleave(n_read).numpy(),
                    "read": (["top"] * n_top + ["asked"] * (n_read - n_top)) * len(self.labels),
                    "read_token": [name for layer in names for name in layer[b][p]],
                }
            )
            for name, x in columns.items():
                frame[name] = x[:, b, p].detach().cpu().flatten().numpy()
            frames.append(frame)
        order = ["label", "prompt", "position", "token", "entropy", "read", "rank", "read_token"]
        table = pd.concat(frames, ignore_index=True)
        return table[[*order, "read_id", "logit", "probability"]]

    def plot(
        self,
        *,
        prompt: int = 0,
        colour: "LensColour" = "probability",
        token: int = 0,
        title: str | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> "go.Figure":
        """The classic grid of predicted tokens, point × position; see `tl_dla.figures.lens`.

        Raises:
            ArgumentError: for a prompt or a token that the lens does not have.
        """
        from tl_dla.figures.charts import Look
        from tl_dla.figures.lens import lens_grid

        return lens_grid(self.view(prompt), colour, token, Look(title, width, height))

    def view(self, prompt: int = 0) -> "LensView":
        """What a figure shows of one prompt."""
        from tl_dla.figures.lens import LensView

        n = self.entropy.shape[1]
        if not -n <= prompt < n:
            raise ArgumentError(f"prompt must be one of the lens's {n}; {prompt} was given.")
        valid = self.positions.valid[prompt].nonzero()[:, 0].tolist()

        def shown(x: Tensor | None) -> Any:
            x = self.entropy.new_zeros(*self.entropy.shape, 0) if x is None else x
            return x[:, prompt, valid].detach().cpu().double().numpy()

        ids = self.prompts.packed[prompt, : int(self.prompts.length[prompt])]
        words, index = pieces(self.model, ids), self.positions.index[prompt, valid].tolist()
        asked = torch.empty(1, 1, 0, dtype=torch.long)
        asked = asked if self.targets is None else self.targets.ids
        return LensView(
            points=self.labels,
            tokens=[words[i] for i in index],
            positions=index,
            prompt=f"prompt {prompt % n}: {shorten(text_of(self.model, ids))}",
            predictions=[[layer[prompt][p] for p in valid] for layer in self.top_tokens],
            probabilities=shown(self.top_probabilities),
            entropy=shown(self.entropy),
            followed=token_strings(self.model, asked[prompt % len(asked), -1]),
            logits=shown(self.values),
            chances=shown(self.probabilities),
            ranks=shown(self.ranks),
        )

    def __repr__(self) -> str:
        """The predictions at the last position of the first prompt."""
        layers, batch, pos = self.entropy.shape
        last = int(self.positions.valid[0].nonzero().max())
        lines = [
            f"LogitLens: {layers} points × {batch} prompts × {pos} positions; each point read"
            " through the final norm with statistics of its own",
            f"  prompt 0 after {self.tokens[0][last]!r}:",
        ]
        width = max(map(len, self.labels))
        for i, label in enumerate(self.labels):
            line = (
                f"  {label:>{width}}  {self.top_tokens[i][0][last][0]!r:<16}"
                f" {float(self.top_probabilities[i, 0, last, 0]):6.1%}"
                f"  entropy {float(self.entropy[i, 0, last]):5.2f} nats"
            )
            if self.ranks is not None and self.values is not None:
                ranks = ", ".join(map(str, self.ranks[i, 0, last].tolist()))
                line += f"  rank of those asked for: {ranks}"
            lines.append(line)
        return "\n".join(lines)


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
    states, last, own = _record(reader, points, prompts, positions, unembed)
    read = read_vocabulary(unembed, states, targets, top_k)
    _certify(reader, points[-1], unembed, last, own)

    valid = positions.valid.to(read.entropy.device)
    tensors: dict[str, Any] = {name: _masked(x, valid) for name, x in vars(read).items()}
    return LogitLens(
        [point.label for point in points],
        **tensors,
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
) -> tuple[list[Tensor], Tensor, Tensor]:
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
        assert kept.logits is not None
        return states, unembed.normalise(kept[end]), kept.logits


@torch.no_grad()
def _certify(
    reader: ModelReader, final: ResidPoint, unembed: Unembedding, last: Tensor, own: Tensor
) -> None:
    """Hold the reading of the final stream against the model's own logits, over the vocabulary.

    `logits_tolerance` says how far they may be apart.
    """
    error = max(
        float(difference.abs().nan_to_num(torch.inf).max())
        for chunk in unembed.chunks()
        for difference in [chunk.logits(last) - own[..., chunk.part].to(last.device)]
    )
    largest = float(own.abs().max())
    dtype = next(p.dtype for p in reader.model.parameters() if p.is_floating_point())
    if error <= logits_tolerance(dtype) * largest:
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

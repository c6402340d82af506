"""What a logit lens reads: predictions at each point of the stream, as tables and figures."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.analyses.vocabulary import Reading
from tl_dla.core.tidy import difference_words
from tl_dla.errors import ArgumentError
from tl_dla.figures.text import shorten
from tl_dla.inputs.positions import Positions
from tl_dla.inputs.targets import Targets
from tl_dla.inputs.text import pieces, text_of
from tl_dla.inputs.tokens import Prompts, token_strings

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tl_dla.figures.lens import LensColour, LensView

LensReading = Literal["difference", "logit", "probability", "rank"]


@dataclass(frozen=True, eq=False, repr=False)
class LogitLens(Reading):
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
        """Nested as the ids are; `""` for -1."""
        unique, inverse = ids.detach().cpu().unique(return_inverse=True)
        names = np.array(token_strings(self.model, unique.clamp(min=0)), dtype=object)
        names[unique.numpy() < 0] = ""
        return names[inverse.numpy()].tolist()

    def to_dataframe(self) -> "pd.DataFrame":
        """A tidy table: a line per point × prompt × position × token read.

        Columns: `label` (the point), `prompt`, `position` (of the prompt's real tokens), `token`
        (the prompt's token there), `entropy`, `read` (`"top"` or `"asked"`), `rank`, `read_token`,
        `read_id`, `logit`, `probability`.
        """
        import pandas as pd

        n_top = self.top_ids.shape[-1]
        ids, values, probabilities = [self.top_ids], [self.top_values], [self.top_probabilities]
        ranks = [torch.arange(n_top, device=self.top_ids.device).expand_as(self.top_ids)]
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

    def plot_trajectory(
        self,
        read: LensReading = "difference",
        *,
        title: str | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> "go.Figure":
        """What the lens reads of the tokens asked for, point by point: the mean, and every prompt.

        A rank is how many tokens are at least as likely, the token itself among them, on a
        logarithmic axis with 1 on top.

        Args:
            read: the answer's logit less the mean of the incorrect ones' (`logit_diff`), or the
                logit, the probability or the rank of each token asked for.
            title: in place of the figure's own; `""` for no heading.
            width: in pixels; as wide as the page by default.
            height: in pixels.

        Raises:
            ArgumentError: where no token was asked for, or for something else to read.
        """
        from tl_dla.figures.charts import Look
        from tl_dla.figures.lines import LensLines, Series, lens_lines

        if read not in get_args(LensReading):
            raise ArgumentError(
                f"read must be {', '.join(map(repr, get_args(LensReading)))}; {read!r} was given."
            )
        if self.targets is None or self.values is None or self.ranks is None:
            raise ArgumentError(
                "The lens was not given a token to read: pass answer_tokens or candidate_tokens to"
                " logit_lens."
            )
        names, difference = self._asked()
        assert self.probabilities is not None
        whole = {"logit": self.values, "probability": self.probabilities, "rank": self.ranks + 1}
        if read == "difference":
            values, names = self.logit_diff[..., None], [difference]
        else:
            values = whole[read]
        b, p = self.positions.valid.to(values.device).nonzero(as_tuple=True)
        shown = values[:, b, p].detach().cpu().double().numpy()
        series = [Series(name, shown[..., i]) for i, name in enumerate(names)]
        n, n_prompts = len(b), len(self.prompts.length)
        where = f"{n} position{'s' * (n > 1)} of {n_prompts} prompt{'s' * (n_prompts > 1)}"
        where = f"mean over {where}" if n > 1 else where
        lines = LensLines(self.labels, series, shorten(", ".join(names)), where)
        return lens_lines(lines, read, Look(title, width, height))

    def _asked(self) -> tuple[list[str], str]:
        """The tokens asked for in words, and the difference that `logit_diff` is."""
        assert self.targets is not None
        ids, candidates = self.targets.ids, self.targets.candidates
        if candidates is not None:
            return [repr(name) for name in candidates], ""
        if ids.shape[:2] == (1, 1):
            names = [repr(name) for name in token_strings(self.model, ids.flatten())]
        else:
            n = ids.shape[-1] - 1
            names = ["answer", *(f"incorrect {i + 1}" if n > 1 else "incorrect" for i in range(n))]
        return names, difference_words(names)

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

        ids = self.prompts.rows[prompt]
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

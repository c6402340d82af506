"""`AbsentModel`: what a result keeps of its model when it is saved, pickled or loaded.

The text of the tokens that the result is about, as the tokenizer wrote it, and the model's name and
size: enough for every table and figure. Whatever else is asked of it needs the model itself.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_dla.errors import ArgumentError
from tl_dla.inputs.text import pieces, text_of
from tl_dla.inputs.tokens import Prompts, token_strings
from tl_dla.model.reader import ModelReader

_NUMBERS = ("n_layers", "n_heads", "d_model", "d_vocab", "n_ctx")


@dataclass(frozen=True)
class Texts:
    """A tokenizer that knows some token ids only.

    Attributes:
        decoded: sequences of ids, written `5 7`, to their text.
        names: ids to their names in the vocabulary.
    """

    decoded: dict[str, str]
    names: dict[str, str]

    def decode(self, ids: list[int]) -> str:
        """The text of ids that are known together."""
        return self.decoded[_key(ids)]

    def convert_ids_to_tokens(self, token: int) -> str:
        """A token's name in the vocabulary."""
        return self.names[str(token)]


@dataclass(frozen=True)
class AbsentModel:
    """Stands for the model of a result that was loaded or unpickled.

    Attributes:
        name: of the model, and of its architecture.
        numbers: of its configuration: `n_layers`, `n_heads`, `d_model`, `d_vocab`, `n_ctx`.
        tokenizer: the text of the tokens that the result is about; None for a model without one.
        writers: what wrote to the stream before each residual point, in words.
        line: which model it was, how large, and of which class and dtype.
    """

    name: str
    numbers: dict[str, int]
    tokenizer: Texts | None
    writers: dict[str, str]
    line: str = ""

    @property
    def cfg(self) -> Any:
        """The numbers, under the names of a model's configuration."""
        return SimpleNamespace(**self.numbers)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what copy, pickle and notebooks look for
            raise AttributeError(name)
        raise ArgumentError(
            f"The result was loaded without its model ({self.name}), which this needs: give it back"
            " with result.with_model(model), or load_result(path, model)."
        )


def name_of(model: Any) -> str:
    """A model's name and architecture."""
    return model.name if isinstance(model, AbsentModel) else " · ".join(_named(ModelReader(model)))


def without_weights(
    model: Any, prompts: Prompts, targets: Int[Tensor, "#batch #pos token"]
) -> AbsentModel:
    """What is kept of a model for a result about these prompts and target tokens."""
    if isinstance(model, AbsentModel):
        return model
    reader = ModelReader(model)
    numbers = {key: getattr(model.cfg, key, None) for key in _NUMBERS}
    return AbsentModel(
        name_of(model),
        {key: value for key, value in numbers.items() if isinstance(value, int)},
        _texts(model.tokenizer, prompts, targets),
        reader.stream().writers,
        in_a_line(model),
    )


def in_a_line(model: Any) -> str:
    """Which model it is, how large, and of which class and dtype."""
    if isinstance(model, AbsentModel):
        return model.line
    cfg, reader = model.cfg, ModelReader(model)
    words = [*_named(reader), f"{reader.n_layers} layers", f"{cfg.n_heads} heads"]
    words += [f"d_model {cfg.d_model}", str(reader.dtype).removeprefix("torch.")]
    return " · ".join([*words, f"TransformerLens {type(model).__name__}"])


def _named(reader: ModelReader) -> list[str]:
    """The model's name, where it has one, and its architecture."""
    name = str(getattr(reader.model.cfg, "model_name", None) or "")
    # A hub id is an owner and a name; of a folder's path only the last part is shown.
    name = name if name.count("/") == 1 else name.rpartition("/")[2]
    return [*[name] * bool(name), reader.architecture]


def require_alike(absent: Any, model: Any) -> None:
    """Raise `ArgumentError` where the model that is given back has other sizes."""
    if not isinstance(absent, AbsentModel):
        return
    for name, number in absent.numbers.items():
        if (own := getattr(model.cfg, name, None)) != number:
            raise ArgumentError(
                f"The result is of another model ({absent.name}): its {name} is {number}, that of"
                f" the model given is {own}."
            )


class _Listening:
    """A tokenizer, and what it answered."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known = Texts({}, {})

    def decode(self, ids: list[int]) -> str:
        self.known.decoded[_key(ids)] = text = self.tokenizer.decode(ids)
        return text

    def convert_ids_to_tokens(self, token: int) -> str:
        self.known.names[str(token)] = name = self.tokenizer.convert_ids_to_tokens(token)
        return name


def _texts(tokenizer: Any, prompts: Prompts, targets: Int[Tensor, "..."]) -> Texts | None:
    """Everything that tables and figures will ask of the tokenizer, asked once."""
    if tokenizer is None:
        return None
    listening = _Listening(tokenizer)
    model = SimpleNamespace(tokenizer=listening)
    every = [prompts.packed.flatten().cpu(), targets.flatten().cpu()]
    token_strings(model, torch.cat(every).unique())
    for ids in prompts.rows:
        text_of(model, ids)
        pieces(model, ids)
    return listening.known


def _key(ids: list[int]) -> str:
    return " ".join(map(str, ids))

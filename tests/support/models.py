"""Models of the zoo as the tests of the core want them: of either class, folded, with strong norms.

    model = load("gpt2")                       a TransformerBridge, weights as published
    model = load("ln", torch.float64)          a HookedTransformer (TransformerLens 3 only)
    model = load("gptj", folded=True)          norms folded into the weights by TransformerLens
    bridge, plain = strong("gptj")             γ, β and b_U far from 1, 0 and 0, in float64

Loaded models are shared between tests: treat them as read-only, or take `load.__wrapped__(name)`.
"""

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from importlib.metadata import version

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.zoo.build import boot, bridge_of, build, folder_of, hf_reference
from tests.zoo.hooked import HOOKED, hooked
from tests.zoo.trace import all_in_float64 as all_in_float64

TRANSFORMER_LENS = int(version("transformer-lens").split(".")[0])
of_3 = pytest.mark.skipif(TRANSFORMER_LENS > 3, reason="HookedTransformer was removed in 4.0")
of_4 = pytest.mark.skipif(TRANSFORMER_LENS < 4, reason="needs a bridge of TransformerLens 4")

FOLDING = dict(
    fold_ln=True, center_writing_weights=True, center_unembed=True, fold_value_biases=True
)


def either(*names: str) -> list:
    """Names as test parameters; those of a HookedTransformer are skipped where there is none."""
    return [pytest.param(name, marks=of_3) if name in HOOKED else name for name in names]


@functools.cache
def load(name: str, dtype: torch.dtype = torch.float32, folded: bool = False):
    """A model of the zoo, of the class that its name belongs to."""
    model = hooked(name, dtype) if name in HOOKED else boot(name, dtype)
    if not folded:
        return model
    if name in HOOKED:
        if TRANSFORMER_LENS < 3:
            pytest.skip("TransformerLens 2 folds only while it loads from the hub")
        model.load_and_process_state_dict(model.state_dict(), **FOLDING)
    else:
        model.enable_compatibility_mode(disable_warnings=True)
    return model


@functools.cache
def strong(name: str) -> tuple[nn.Module, nn.Module]:
    """A model in float64 and the plain module with the same weights, which the references need.

    Every vector of weights is 2.5 times that of the zoo: norm weights around 2.5, β and biases of
    standard deviation 0.75.
    """
    plain = hooked(name, torch.float64) if name in HOOKED else hf_reference(name, torch.float64)
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.ndim == 1:
                parameter.mul_(2.5)
    if name in HOOKED:
        return plain, copy.deepcopy(plain)
    return bridge_of(build(name)[1], dtype=torch.float64, hf_model=copy.deepcopy(plain)), plain


@contextlib.contextmanager
def counted(model: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of what the embedding and the unembedding return, in order."""
    seen: list[tuple[int, ...]] = []

    def keep(_module: nn.Module, _args: tuple, output: Tensor) -> None:
        seen.append(tuple(output.shape))

    parts = [getattr(part, "original_component", part) for part in (model.embed, model.unembed)]
    handles = [part.register_forward_hook(keep) for part in parts]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# ---- tokenizers --------------------------------------------------------------------------------

# " cat" and "cat" are one token each; " owl" is one, "owl" is three.
_WORDS = "<s> </s> c a t d o g w l Ġ at cat do dog Ġcat Ġdog Ġo Ġow Ġowl".split()
_MERGES = [
    *(("a", "t"), ("c", "at"), ("d", "o"), ("do", "g"), ("Ġ", "cat"), ("Ġ", "dog")),
    *(("Ġ", "o"), ("Ġo", "w"), ("Ġow", "l")),
]


def spaced(more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes and merges, whose tokens hold their leading space; `more` tokens."""
    vocabulary = {word: i for i, word in enumerate([*_WORDS, *more])}
    pieces = Tokenizer(models.BPE(vocabulary, _MERGES))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    special = dict(bos_token="<s>", eos_token="</s>")
    return _saved(PreTrainedTokenizerFast(tokenizer_object=pieces, **special))


def words(pad: str = "w0") -> PreTrainedTokenizerFast:
    """The tokenizer of the zoo (words w0 … w96, BOS w1, EOS w2) with this padding token."""
    tokenizer = AutoTokenizer.from_pretrained(build("gpt2")[1])
    tokenizer.pad_token = pad
    return _saved(tokenizer)


def _saved(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """As loaded from a folder: TransformerLens loads a tokenizer again to see its BOS."""
    folder = folder_of(f"tokenizer-{hash(repr(tokenizer))}")
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def with_tokenizer(name: str, tokenizer: PreTrainedTokenizerFast):
    """A fresh model of the zoo that reads text with this tokenizer."""
    if name in HOOKED:
        model = hooked(name)
        model.set_tokenizer(tokenizer)
        return model
    return bridge_of(build(name)[1], tokenizer=tokenizer)

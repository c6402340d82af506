"""Small models with awkward words, and pages of their figures, for the tests of what is seen."""

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.zoo.build import bridge_of, folder_of, perturb

# What a user may write: markup, entities, quotes, templates, line ends.
WORDS = ["the", "cat", "dog", "sat", "<script>alert(1)</script>", "&amp;", '"', "'", "{{plotly}}"]
WORDS += ["<img/src=x/onerror=window.hacked=1>", "</script><b>", "%{x}", "$&", "<!--"]
WORDS += ["mat", "on", "a"]
NASTY = (
    "the cat <script>alert(1)</script> &amp; \" ' {{plotly}} </script><b>"
    " <img/src=x/onerror=window.hacked=1> %{x} $& <!-- the cat"
)
PROMPTS = ["the cat sat on a mat the cat", "the dog sat on the", "a dog"]


@functools.cache
def hf_model(
    n_layers: int = 3, n_heads: int = 5, d_head: int = 4, n_positions: int = 64
) -> tuple[Any, Path]:
    """A GPT-2 with random weights, and the folder that holds it and its tokenizer of words."""
    config = transformers.GPT2Config(
        n_layer=n_layers,
        n_head=n_heads,
        n_embd=n_heads * d_head,
        vocab_size=len(WORDS) + 2,
        n_positions=n_positions,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    perturb(model)
    folder = folder_of(f"pages-{n_layers}x{n_heads}x{n_positions}")
    model.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[BOS]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="[BOS]", unk_token="[UNK]", pad_token="[UNK]"
    ).save_pretrained(folder)
    return model, folder


@functools.cache
def bridge(n_layers: int = 3, n_heads: int = 5, d_head: int = 4, n_positions: int = 64) -> Any:
    """The same as a `TransformerBridge`; shared, so treat it as read-only."""
    return bridge_of(hf_model(n_layers, n_heads, d_head, n_positions)[1])


@torch.no_grad()
def own_logits(text: str, *words: str, **size: int) -> list[float]:
    """The plain model's logits of some words after a prompt, by `transformers` alone."""
    model, folder = hf_model(**size)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode(text)])
    ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], 1)
    last = model(ids).logits[0, -1]
    return [float(last[tokenizer.convert_tokens_to_ids(word)]) for word in words]

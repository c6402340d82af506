"""The models that are timed, made or converted once in a temporary folder."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

MODELS = ("gpt2-size", "smollm2")
LLAMA = "llama-1b"  # 1.2 billion random parameters in bfloat16, as published: not folded
LARGER = "llama-2b"  # 2 billion, for several processes to share out
LARGEST = "llama-8b"  # 8 billion, for a GPU

logging.disable_progress_bar()


def boot(name: str) -> Any:
    """A `TransformerBridge`, folded but for the large one, so that both tools can read it."""
    if name == "gpt2-size":
        return random_gpt2()
    if name == LLAMA:
        return _booted(_saved(name, _llama(16), torch.bfloat16), torch.bfloat16)
    from tl_dla import load_model

    return _folded(load_model(name))


def random_gpt2(**sizes: int) -> Any:
    """GPT-2 with random weights, of GPT-2 small's size unless told otherwise."""
    config = transformers.GPT2Config(n_positions=1024, **sizes)
    config.architectures = ["GPT2LMHeadModel"]
    name = "-".join(["gpt2", *(f"{key}{n}" for key, n in sizes.items())])
    return _folded(_booted(_saved(name, config, torch.float32), torch.float32))


def larger() -> Path:
    """The folder of the larger llama."""
    return _saved(LARGER, _llama(28), torch.bfloat16)


def largest(device: str) -> Any:
    """The largest llama, whose weights are made where they stay; its files are a small one's."""
    from transformer_lens.model_bridge import TransformerBridge

    wide = dict(hidden_size=4096, intermediate_size=14336, tie_word_embeddings=False)
    small = dict(hidden_size=64, intermediate_size=64, vocab_size=256)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            _llama(32, **wide), dtype=torch.bfloat16, attn_implementation="eager"
        )
    folder = _saved(f"{LARGEST}-small", _llama(1, **small), torch.bfloat16)
    options = dict(device=device, dtype=torch.bfloat16, hf_model=model)
    return TransformerBridge.boot_transformers(str(folder), **options).eval()


def _llama(n_layers: int, **sizes: Any) -> Any:
    own = dict(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=n_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    config = transformers.LlamaConfig(**own | sizes)
    config.architectures = ["LlamaForCausalLM"]
    return config


def _booted(folder: Path, dtype: torch.dtype) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=dtype).eval()


def _folded(model: Any) -> Any:
    model.enable_compatibility_mode(disable_warnings=True)
    return model.eval()


def _saved(name: str, config: Any, dtype: torch.dtype) -> Path:
    """The model as files, with a tokenizer that nothing uses but the loader."""
    folder = Path(tempfile.gettempdir()) / f"tl_dla-benchmark-{name}-{os.getuid()}"
    if (folder / "done").exists():
        return folder
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config.architectures = config.architectures
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="b", eos_token="c", unk_token="a", pad_token="a"
    ).save_pretrained(folder)
    (folder / "done").touch()
    return folder

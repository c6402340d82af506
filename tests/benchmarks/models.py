"""The models that are timed, made or converted once in a temporary folder."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

MODELS = ("gpt2-size", "smollm2")

logging.disable_progress_bar()


def boot(name: str) -> Any:
    """A folded `TransformerBridge`, which both tools can read."""
    if name == "gpt2-size":
        return random_gpt2()
    from tl_dla import load_model

    return _folded(load_model(name))


def random_gpt2(**sizes: int) -> Any:
    """GPT-2 with random weights, of GPT-2 small's size unless told otherwise."""
    from transformer_lens.model_bridge import TransformerBridge

    folder = str(_saved(sizes))
    return _folded(TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32))


def _folded(model: Any) -> Any:
    model.enable_compatibility_mode(disable_warnings=True)
    return model.eval()


def _saved(sizes: dict[str, int]) -> Path:
    """The model as files, with a tokenizer that nothing uses but the loader."""
    name = "-".join(["tl_dla-benchmark", *(f"{key}{n}" for key, n in sizes.items())])
    folder = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    if (folder / "done").exists():
        return folder
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=1024, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.config.architectures = ["GPT2LMHeadModel"]
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="b", eos_token="c", unk_token="a", pad_token="a"
    ).save_pretrained(folder)
    (folder / "done").touch()
    return folder

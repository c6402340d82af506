"""The models that are timed, made or converted once in a temporary folder."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

logging.disable_progress_bar()


def boot(name: str) -> Any:
    """A folded `TransformerBridge`, which both tools can read."""
    from transformer_lens.model_bridge import TransformerBridge

    if name == "smollm2":
        from tl_dla import load_model

        model = load_model("smollm2")
    else:
        model = TransformerBridge.boot_transformers(
            str(_gpt2_size()), device="cpu", dtype=torch.float32
        )
    model.enable_compatibility_mode(disable_warnings=True)
    return model.eval()


def _gpt2_size() -> Path:
    """GPT-2 small with random weights, and a tokenizer that nothing uses but its loader."""
    folder = Path(tempfile.gettempdir()) / f"tl_dla-benchmark-{os.getuid()}"
    if (folder / "done").exists():
        return folder
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config())
    model.config.architectures = ["GPT2LMHeadModel"]
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="b", eos_token="c", unk_token="a", pad_token="a"
    ).save_pretrained(folder)
    (folder / "done").touch()
    return folder

"""Build, save and boot the tiny models of `configs.py`: random weights, no 0 or 1 by accident.

    hf_model, folder = build("gemma2")     # the plain transformers model and its saved copy
    bridge = boot("gemma2")                # the same weights as a TransformerBridge
    bridge(tokens())

Everything is seeded: two runs build the same numbers. Folders live until the process ends.
"""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.zoo.configs import ARCHITECTURE_NAME, CONFIGS, D_VOCAB, NATIVE

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

ANSWERS = torch.tensor([5, 9])
INCORRECT = torch.tensor([7, 20])
LAYER_SCALARS = [0.5, 0.8, 1.3, 0.9]


def tokens(batch: int = 2, pos: int = 11) -> torch.Tensor:
    """The prompts that every model of the zoo is run on, `[batch, pos]`."""
    return torch.randint(3, D_VOCAB, (batch, pos), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def perturb(model: torch.nn.Module) -> None:
    """Biases and norm weights move off 0 and 1; every other parameter becomes 0.15 * randn."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.add_(0.3 * noise)
        else:
            parameter.copy_(0.15 * noise)


@functools.cache
def _root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="tl_dla_tests_")


def folder_of(name: str) -> Path:
    """A place for files until the process ends."""
    return Path(_root().name) / name


@functools.cache
def build(name: str) -> tuple[PreTrainedModel, Path]:
    """The model in float32 and the folder it was saved to, with a tokenizer of words w0 ... w96.

    The model is shared between callers: treat it as read-only, or take `hf_reference(name)`.
    """
    assert torch.get_default_dtype() == torch.float32, "made inside all_in_float64()"
    config_class, kwargs = CONFIGS[name]
    config = getattr(transformers, config_class)(**copy.deepcopy(kwargs))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    perturb(model)
    if name == "gemma4_scalar":
        # Buffers that multiply the whole stream: 1 unless a checkpoint says otherwise.
        for layer, scalar in zip(model.model.layers, LAYER_SCALARS, strict=False):
            layer.layer_scalar.fill_(scalar)
    folder = folder_of(name)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    if name in ARCHITECTURE_NAME:
        path = folder / "config.json"
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"architectures": [ARCHITECTURE_NAME[name]]})
        )
    # What loads is not always what was saved: Youtu zeroes the embedding of its padding token.
    return _load(type(model), folder), folder


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(D_VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(bos_token="w1", eos_token="w2", unk_token="w0", pad_token="w0")
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def boot(name: str, dtype: torch.dtype = torch.float32):
    """A fresh `TransformerBridge` of one model of `CONFIGS` or `NATIVE`, in evaluation mode.

    The test is skipped where there is no bridge (TransformerLens 2).
    """
    if name not in NATIVE:
        return bridge_of(build(name)[1], dtype=dtype)
    builder = pytest.importorskip("transformer_lens.model_bridge.sources._bridge_builder")
    model = native_reference(name).to(dtype)
    options = dict(tl_config=model.cfg, dtype=dtype, device="cpu")
    return builder.build_bridge_from_module(model, "TransformerLensNative", **options)


def bridge_of(folder: Path, **options: Any):
    """A fresh `TransformerBridge` of a saved model; the test is skipped where there is none."""
    lens = pytest.importorskip("transformer_lens.model_bridge", reason="not in TransformerLens 2")
    return lens.TransformerBridge.boot_transformers(str(folder), device="cpu", **options)


def hf_reference(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A fresh copy of the plain `transformers` model, eager attention, in evaluation mode."""
    model, folder = build(name)
    return _load(type(model), folder).to(dtype)


def _load(model_class: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    eager = dict(attn_implementation="eager")
    if int(transformers.__version__.split(".")[0]) >= 5:
        eager["experts_implementation"] = "eager"
    return model_class.from_pretrained(folder, **eager).eval()


def native_reference(name: str) -> torch.nn.Module:
    """A fresh TransformerLens-native model as the plain torch module that `boot(name)` wraps."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources.native import NativeModel

    torch.manual_seed(0)
    model = NativeModel(TransformerBridgeConfig.from_dict(dict(NATIVE[name]))).eval()
    perturb(model)
    return model

"""The bundled model: a small GPT-2 that finds indirect objects, knows facts and repeats sequences.

It is there for tutorials and tests: it loads in a second, without a network. `tl_dla.demo.corpus`
is the text that it learned, and `python -m tl_dla.demo.train` trains it anew.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

FOLDER = Path(__file__).parent


def load_bridge(folder: Path = FOLDER) -> "TransformerBridge":
    """The demo model as a `TransformerBridge`, its weights as they were trained."""
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)


def load_hooked(folder: Path = FOLDER) -> "HookedTransformer":
    """The demo model as a `HookedTransformer`, for TransformerLens 3; nothing folded or centred."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import convert_hf_model_config
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import AutoTokenizer, GPT2LMHeadModel

    # `HookedTransformer.from_pretrained` takes only names on its list: these are its own steps.
    config = convert_hf_model_config(str(folder)) | {"model_name": "demo", "device": "cpu"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = HookedTransformer(HookedTransformerConfig(**config), tokenizer)
    pretrained = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    model.load_and_process_state_dict(
        convert_gpt2_weights(pretrained, model.cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model

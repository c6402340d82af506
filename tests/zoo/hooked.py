"""Tiny `HookedTransformer` models (TransformerLens 3.x only), one per trait of the class.

    model = hooked("rms")
    reference(model, tokens(), ANSWERS, INCORRECT)

Perturbed like the rest of the zoo: norm weights 1 + 0.3 * randn, no bias zero, `b_U` included.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from tests.zoo.bases import D_VOCAB

BASE = dict(d_model=32, d_head=8, n_heads=4, n_layers=3, n_ctx=64, d_mlp=64, d_vocab=D_VOCAB)
BASE |= dict(act_fn="gelu", normalization_type="LN", seed=0, device="cpu")

HOOKED: dict[str, dict[str, Any]] = {
    "ln": dict(normalization_type="LN"),
    "lnpre": dict(normalization_type="LNPre"),
    "rms": dict(normalization_type="RMS"),
    "rmspre": dict(normalization_type="RMSPre"),
    "none": dict(normalization_type=None),
    "final_rms": dict(normalization_type="LN", final_rms=True),
    "final_rmspre": dict(normalization_type="LNPre", final_rms=True),
    # Norms before and after a sublayer, and after it only: `ln1_post` and `ln1` in their roles.
    "sandwich": dict(normalization_type="RMS", use_normalization_before_and_after=True),
    "sandwich_pre": dict(normalization_type="RMSPre", use_normalization_before_and_after=True),
    "post_norm": dict(normalization_type="RMS", original_architecture="Olmo2ForCausalLM"),
    "post_norm_ln": dict(normalization_type="LN", original_architecture="Olmo2ForCausalLM"),
    "parallel": dict(parallel_attn_mlp=True),
    "grouped": dict(normalization_type="RMS", n_key_value_heads=2),
    "gated": dict(normalization_type="RMS", gated_mlp=True, act_fn="silu"),
    "moe": dict(normalization_type="RMS", num_experts=4, experts_per_token=2, gated_mlp=True),
    "solu_ln": dict(act_fn="solu_ln"),
    "attn_only": dict(attn_only=True, d_mlp=None),
    "rotary": dict(positional_embedding_type="rotary", rotary_dim=8),
    "shortformer": dict(positional_embedding_type="shortformer"),
    "alibi": dict(positional_embedding_type="alibi"),
    "post_embedding_ln": dict(post_embedding_ln=True),
    "softcap": dict(output_logits_soft_cap=1.0),
    "vocab_out": dict(d_vocab_out=53),
    "bidirectional": dict(attention_dir="bidirectional"),
    "local": dict(use_local_attn=True, window_size=4, attn_types=["global", "local", "global"]),
    "sinks": dict(use_attention_sinks=True),
    "qk_norm": dict(normalization_type="RMS", use_qk_norm=True),
    # Options that add hooks or a head axis to the inputs and results of a block.
    "attn_result": dict(use_attn_result=True),
    "split_inputs": dict(use_split_qkv_input=True, use_hook_mlp_in=True),
    "attn_in": dict(use_attn_in=True),
}


def hooked(name: str, dtype: torch.dtype = torch.float32):
    """A fresh `HookedTransformer` without a tokenizer, in evaluation mode."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    from tests.zoo.build import perturb

    torch.manual_seed(0)
    config = HookedTransformerConfig(**(BASE | dict(dtype=dtype) | HOOKED[name]))
    with warnings.catch_warnings():  # that the class goes away in 4.0
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(config).eval()
    perturb(model)
    return model

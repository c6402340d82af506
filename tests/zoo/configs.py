"""Tiny configurations of every decoder architecture that TransformerLens 4.3.0 knows, as data.

`CONFIGS` maps a name to a `transformers` configuration class and its arguments: one line adds an
architecture. Three layers, d_model 32, 4 heads (2 key/value heads where there are such), 97 tokens.
The first name of a class is a plain configuration; later ones (`llama_bias`, `gemma2_nocap`) vary
one trait.

What is known to fail is data too: `WITHOUT_ADAPTER`, `BOOT_FAILS`, `RUN_FAILS`, `BRIDGE_DIFFERS`.
"""

from __future__ import annotations

from typing import Any

from tests.zoo.bases import BERT, D_VOCAB, LL, LLH, without
from tests.zoo.dense import DENSE
from tests.zoo.sparse import SPARSE

# TransformerLens 4.3.0 has no adapter for these: boot_transformers refuses them.
WITHOUT_ADAPTER: dict[str, tuple[str, dict[str, Any]]] = {
    "biogpt": ("BioGptConfig", BERT),
    "cwm": ("CwmConfig", LLH),
    "doge": ("DogeConfig", LL),
    "helium": ("HeliumConfig", LLH),
    "persimmon": ("PersimmonConfig", without(LL, "num_key_value_heads")),
}

CONFIGS = DENSE | SPARSE | WITHOUT_ADAPTER

# Configurations that vary one trait of a class; the others are one realistic configuration a class.
VARIANTS = """
phi gpt2_scaleattn gpt2_invlayer gpt2_noscale gpt2_upcast gpt2_noninner gpt_neox_seq opt_350m
opt_proj opt_postln opt_nofinal opt_nobias bloom_resid falcon_new falcon_new_mq0 falcon_new_mha
falcon_seq llama_bias llama_tied gemma3_bias olmo2_bias granite_bias granite_noscale phi_qkln
stablelm_par olmo_clip gemma2_nocap gemma3_cap cohere_qkn glm4_bias arcee_bias nanochat_nocap
ernie4_5_bias gemma4_text gemma4_ple gemma4_moe gemma4_kvshare gpt_bigcode_mha mpt_bias
mpt_logitscale nemotron_bias granitemoehybrid granitemoehybrid_attn granitemoehybrid_rope
granitemoehybrid_attn_rope rwkv
""".split()
CLASSES = [name for name in CONFIGS if name not in {*VARIANTS, *WITHOUT_ADAPTER}]


# TransformerLens's own models: arguments of a TransformerBridgeConfig.
NATIVE_BASE = dict(
    d_model=32,
    d_head=8,
    n_heads=4,
    n_layers=3,
    n_ctx=64,
    d_vocab=D_VOCAB,
    d_mlp=64,
    act_fn="gelu",
    seed=0,
)
NATIVE: dict[str, dict[str, Any]] = {
    "native_ln": NATIVE_BASE | dict(normalization_type="LN"),
    "native_lnpre": NATIVE_BASE | dict(normalization_type="LNPre"),
    "native_rms": NATIVE_BASE
    | dict(normalization_type="RMS", positional_embedding_type="rotary", gated_mlp=True),
    "native_rmspre": NATIVE_BASE | dict(normalization_type="RMSPre"),
    "native_none": NATIVE_BASE | dict(normalization_type=None),
    "native_finalrms": NATIVE_BASE | dict(normalization_type="LN", final_rms=True),
    "native_attnonly": NATIVE_BASE | dict(normalization_type="LN", d_mlp=None, attn_only=True),
    "native_soluln": NATIVE_BASE | dict(normalization_type="LN", act_fn="solu_ln"),
    "native_softcap": NATIVE_BASE | dict(normalization_type="LN", output_logits_soft_cap=1.0),
    "native_vocabout": NATIVE_BASE | dict(normalization_type="LN", d_vocab_out=53),
}

# transformers writes one spelling of the class into config.json, TransformerLens knows another.
ARCHITECTURE_NAME = {"phimoe": "PhiMoEForCausalLM"}

# boot_transformers raises, with this in its message.
BOOT_FAILS = {
    "falcon_new": "split_with_sizes expects split_sizes",
    "phi_qkln": "q_layernorm",
    "gpt_bigcode_mha": "multi_query=True",
}

# The bridge boots, but maps a module that the model lacks (final norm, rotary embedding): its
# forward pass raises. The transformers model runs.
RUN_FAILS = ["granitemoehybrid", "granitemoehybrid_attn", "opt_postln", "opt_nofinal"]

# The bridge's logits are not those of transformers: attribution is exact for the bridge only.
BRIDGE_DIFFERS = ["gpt2_scaleattn", "gpt2_noscale", "falcon_new_mq0", "falcon_new_mha"]

"""What configurations have in common: three layers, d_model 32, 4 heads, 97 tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

D_VOCAB = 97


def without(kwargs: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key not in names}


NO_PAD = dict(vocab_size=D_VOCAB, bos_token_id=1, eos_token_id=2)
IDS = dict(**NO_PAD, pad_token_id=0)
SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
CONTEXT = dict(max_position_embeddings=64)
GPT2 = dict(**NO_PAD, n_embd=32, n_layer=3, n_head=4, n_positions=64)
NEOX = dict(**NO_PAD, **SIZES, **CONTEXT, intermediate_size=64)
OPT = dict(**IDS, **SIZES, **CONTEXT, ffn_dim=64)
BIGCODE = GPT2 | IDS
MPT = dict(**IDS, d_model=32, n_heads=4, n_layers=3, max_seq_len=64)
FALCON = dict(**IDS, **SIZES)
BLOOM = dict(**IDS, hidden_size=32, n_layer=3, n_head=4)
BERT = NEOX | IDS
LL = dict(**BERT, num_key_value_heads=2)  # as Llama
LLH = dict(**LL, head_dim=8)
MHA = LL | dict(num_key_value_heads=4)
GEMMA4 = dict(
    **LLH,
    vocab_size_per_layer_input=D_VOCAB,
    layer_types=["sliding_attention", "full_attention", "full_attention"],
)
GRANITE = dict(logits_scaling=3.0, residual_multiplier=0.3, embedding_multiplier=5.0)
MLA = dict(kv_lora_rank=8, q_lora_rank=16, qk_rope_head_dim=4, v_head_dim=8, qk_nope_head_dim=8)
MOE = dict(num_local_experts=4, num_experts_per_tok=2)
MOE2 = dict(num_experts=4, num_experts_per_tok=2)
ROUTED = dict(
    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16
)
DSM = dict(**ROUTED, n_group=1, topk_group=1)  # as DeepSeek
SHARED = dict(moe_intermediate_size=16, shared_expert_intermediate_size=16)
MAMBA = dict(**IDS, hidden_size=32, state_size=8, num_hidden_layers=3, expand=2, conv_kernel=4)
MAMBA_D = dict(mamba_d_state=8, mamba_d_conv=4, mamba_expand=2)
M2 = dict(**MAMBA_D, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_chunk_size=8)
GDN = dict(
    linear_conv_kernel_dim=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)
LT = dict(layer_types=["linear_attention", "full_attention", "linear_attention"])

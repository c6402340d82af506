"""Configurations of mixtures of experts, hybrids, state-space and recurrent models."""

from __future__ import annotations

from typing import Any

from tests.zoo.bases import (
    DSM,
    GDN,
    GRANITE,
    LL,
    LLH,
    LT,
    M2,
    MAMBA,
    MAMBA_D,
    MHA,
    MLA,
    MOE,
    MOE2,
    NO_PAD,
    ROUTED,
    SHARED,
    without,
)

HYBRID = dict(**LL, **MOE, **M2, **LT, **GRANITE, shared_intermediate_size=16)
ATTENTION_ONLY = dict(
    num_local_experts=0, num_experts_per_tok=0, layer_types=["full_attention"] * 3
)
RWKV = dict(
    **NO_PAD,
    context_length=64,
    hidden_size=32,
    num_hidden_layers=3,
    attention_hidden_size=32,
    intermediate_size=64,
    rescale_every=0,
)

SPARSE: dict[str, tuple[str, dict[str, Any]]] = {
    # mixtures of experts
    "afmoe": (
        "AfmoeConfig",
        dict(
            **LLH,
            num_dense_layers=1,
            moe_intermediate_size=16,
            **MOE2,
            num_shared_experts=1,
            sliding_window=8,
            mup_enabled=True,
        ),
    ),
    "flex_olmo": ("FlexOlmoConfig", dict(**LL, **MOE2)),
    "jetmoe": ("JetMoeConfig", dict(**without(LL, "num_attention_heads"), kv_channels=8, **MOE)),
    "laguna": (
        "LagunaConfig",
        dict(
            **LLH,
            **SHARED,
            **MOE2,
            num_attention_heads_per_layer=[4, 8, 4],
        ),
    ),
    "deepseek_v2": ("DeepseekV2Config", dict(**MHA, **MLA, **DSM, first_k_dense_replace=1)),
    "deepseek_v3": ("DeepseekV3Config", dict(**MHA, **MLA, **DSM, first_k_dense_replace=1)),
    "deepseek_v4": (
        "DeepseekV4Config",
        dict(
            **without(LL, "intermediate_size", "num_key_value_heads"),
            **ROUTED,
            head_dim=8,
            q_lora_rank=16,
            o_groups=2,
            o_lora_rank=8,
            hc_mult=2,
            index_n_heads=2,
            index_head_dim=8,
            index_topk=4,
            sliding_window=8,
            partial_rotary_factor=0.5,
            layer_types=["sliding_attention"] * 3,
            mlp_layer_types=["moe"] * 3,
        ),
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        dict(
            **LL,
            moe_intermediate_size=16,
            moe_k=2,
            moe_num_experts=4,
            moe_num_shared_experts=1,
            moe_layer_start_index=1,
            moe_layer_end_index=2,
        ),
    ),
    "granitemoe": ("GraniteMoeConfig", dict(**LL, **MOE, **GRANITE)),
    "glm_moe_dsa": (
        "GlmMoeDsaConfig",
        dict(
            **MHA,
            **MLA,
            **DSM,
            index_topk=4,
            index_head_dim=8,
            index_n_heads=2,
            mlp_layer_types=["dense", "sparse", "sparse"],
        ),
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        dict(
            **LL, **DSM, head_dim=8, first_k_dense_replace=1, use_qk_norm=True, attention_bias=True
        ),
    ),
    "glm4_moe_lite": (
        "Glm4MoeLiteConfig",
        dict(**MHA, **MLA, **DSM, mlp_layer_types=["dense", "sparse", "sparse"]),
    ),
    "llama4_text": (
        "Llama4TextConfig",
        dict(
            **LLH,
            intermediate_size_mlp=64,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
            attention_chunk_size=8,
        ),
    ),
    "minimax_m2": ("MiniMaxM2Config", dict(**LLH, **MOE)),
    "olmoe": ("OlmoeConfig", dict(**LL, **MOE2)),
    "phimoe": ("PhimoeConfig", dict(**LL, **MOE, lm_head_bias=True, attention_bias=True)),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        dict(
            **LL,
            **MOE2,
            **SHARED,
            decoder_sparse_step=1,
            mlp_only_layers=[0],
        ),
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        dict(**LLH, **MOE2, moe_intermediate_size=16, decoder_sparse_step=1, mlp_only_layers=[0]),
    ),
    # hybrid, state-space and recurrent models
    "bamba": ("BambaConfig", dict(**LL, **M2, attn_layer_indices=[1])),
    "falcon_h1": (
        "FalconH1Config",
        dict(
            **LL,
            **M2,
            mamba_d_ssm=64,
            lm_head_multiplier=0.5,
            embedding_multiplier=3.0,
            attention_out_multiplier=0.7,
            attention_in_multiplier=0.8,
            ssm_in_multiplier=0.9,
            ssm_out_multiplier=0.6,
            key_multiplier=0.5,
            mlp_multipliers=[0.7, 0.4],
        ),
    ),
    "falcon_mamba": ("FalconMambaConfig", dict(**MAMBA, time_step_rank=4)),
    "granitemoehybrid": ("GraniteMoeHybridConfig", HYBRID),
    "granitemoehybrid_attn": ("GraniteMoeHybridConfig", HYBRID | ATTENTION_ONLY),
    "granitemoehybrid_rope": (
        "GraniteMoeHybridConfig",
        HYBRID | dict(position_embedding_type="rope"),
    ),
    "granitemoehybrid_nope": (
        "GraniteMoeHybridConfig",
        HYBRID | dict(position_embedding_type="nope"),
    ),
    "granitemoehybrid_attn_rope": (
        "GraniteMoeHybridConfig",
        HYBRID | ATTENTION_ONLY | dict(position_embedding_type="rope"),
    ),
    "jamba": (
        "JambaConfig",
        dict(
            **LL,
            **MOE2,
            **MAMBA_D,
            expert_layer_period=2,
            expert_layer_offset=1,
            attn_layer_period=3,
            attn_layer_offset=1,
            use_mamba_kernels=False,
            mamba_dt_rank=4,
        ),
    ),
    "lfm2": (
        "Lfm2Config",
        dict(**LL, layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False),
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        dict(
            **LL,
            layer_types=["conv", "full_attention", "conv"],
            moe_intermediate_size=16,
            num_dense_layers=1,
            **MOE2,
        ),
    ),
    "mamba": ("MambaConfig", dict(**MAMBA, time_step_rank=4)),
    "mamba2": ("Mamba2Config", dict(**MAMBA, num_heads=8, head_dim=8, n_groups=2, chunk_size=8)),
    "nemotron_h": (
        "NemotronHConfig",
        dict(
            **without(LL, "num_hidden_layers"),
            **DSM,
            layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
            head_dim=8,
            ssm_state_size=8,
            mamba_num_heads=8,
            mamba_head_dim=8,
            n_groups=2,
            conv_kernel=4,
            expand=2,
            chunk_size=8,
            moe_shared_expert_intermediate_size=16,
            use_mamba_kernels=False,
        ),
    ),
    "olmo_hybrid": (
        "OlmoHybridConfig",
        dict(
            **LL,
            **LT,
            **(GDN | dict(linear_num_value_heads=2)),
        ),
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        dict(**LL, **LT, **GDN, **SHARED, **MOE2, head_dim=8),
    ),
    "qwen3_5": ("Qwen3_5TextConfig", dict(**LL, **LT, **GDN, head_dim=8)),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        dict(
            **without(LL, "intermediate_size"),
            **LT,
            **GDN,
            **SHARED,
            **MOE2,
            head_dim=8,
        ),
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        dict(
            **without(LL, "max_position_embeddings"),
            lru_width=32,
            attention_window_size=8,
            block_types=["recurrent", "recurrent", "attention"],
            logits_soft_cap=5.0,
        ),
    ),
    "rwkv": ("RwkvConfig", RWKV),
    "rwkv_rescale": ("RwkvConfig", RWKV | dict(rescale_every=2)),
    "zamba2": (
        "Zamba2Config",
        dict(
            **without(MHA, "num_hidden_layers"),
            **MAMBA_D,
            num_hidden_layers=4,
            layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
            mamba_ngroups=1,
            n_mamba_heads=8,
            num_mem_blocks=1,
            use_shared_attention_adapter=False,
            adapter_rank=4,
            chunk_size=8,
            use_mamba_kernels=False,
        ),
    ),
    "hrm_text": (
        "HrmTextConfig",
        dict(
            **without(LL, "num_key_value_heads", "num_hidden_layers"),
            num_layers_per_stack=2,
            H_cycles=2,
            L_cycles=2,
            head_dim=8,
        ),
    ),
}

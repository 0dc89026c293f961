"""Small checkpoints of the architectures with routed experts or latent attention."""

from __future__ import annotations

from variants import EXPERTS, GRANITE, HUB_EXPERTS, WINDOW, Variant, rope, types, yarn

_LATENT = {
    "kv_lora_rank": 40,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "num_key_value_heads": 4,
}
_ROUTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "n_group": 1,
    "topk_group": 1,
}
_GROUPS = {"n_group": 4, "topk_group": 2}
_MELLUM_ROPES = {
    "full_attention": {**yarn(64), "rope_theta": 500000.0},
    "sliding_attention": rope(10000.0),
}

_LAGUNA_ROPES = {
    "full_attention": {**yarn(64), "rope_theta": 5e5, "partial_rotary_factor": 0.5},
    "sliding_attention": rope(10000.0),
}


_LLAMA4 = {
    "intermediate_size": 40,
    "intermediate_size_mlp": 96,
    "num_local_experts": 6,
    "attention_chunk_size": 80,  # which may begin before the cells that are raw
    "floor_scale": 24,
    "attn_scale": 0.5,
}

ROUTED_VARIANTS: dict[str, Variant] = {
    "llama4-moe": Variant(
        "Llama4",
        "attention in chunks; layers without positions, whose queries grow; norms of heads without "
        "weights behind RoPE; experts of weighted inputs in every other layer, beside a shared one",
        {
            **_LLAMA4,
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 0, 1, 1],
            "interleave_moe_layer_step": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": rope(
                500000.0,
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=1.0,
                original_max_position_embeddings=64,
            ),
        },
        {"layer_types": ...},
    ),
    "llama4-moe-plain": Variant(
        "Llama4",
        "no norms of heads; queries that do not grow; two experts of every layer, biases",
        {
            **_LLAMA4,
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
            "attention_bias": True,
            "num_experts_per_tok": 2,
            "no_rope_layer_interval": 3,
            "attention_chunk_size": 112,
        },
        {"no_rope_layers": [], "moe_layers": ...},
    ),
    "mixtral": Variant("Mixtral", "experts", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "mixtral-window": Variant(
        "Mixtral", "experts and windows", {"num_local_experts": 4, "sliding_window": WINDOW}
    ),
    "qwen3-moe": Variant("Qwen3Moe", "experts", {**EXPERTS, "norm_topk_prob": True}, HUB_EXPERTS),
    "qwen3-moe-dense": Variant(
        "Qwen3Moe",
        "dense layers among those with experts",
        {**EXPERTS, "norm_topk_prob": False, "mlp_only_layers": [1]},
        HUB_EXPERTS,
    ),
    "olmoe": Variant(
        "Olmoe", "experts, one norm over all heads", {"num_experts": 5, "num_experts_per_tok": 2}
    ),
    "olmoe-clip": Variant(
        "Olmoe",
        "normed queries and keys, and values, within bounds",
        {"num_experts": 5, "num_experts_per_tok": 2, "clip_qkv": 1.5},
    ),
    "gpt-oss": Variant(
        "GptOss",
        "scores without a value, experts with biases and bounded gates",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "sliding_window": WINDOW,
            "layer_types": types("LGL"),
            "rope_parameters": {**yarn(64, truncate=False), "beta_fast": 32.0, "beta_slow": 1.0},
        },
        {"layer_types": types("LGL")},
    ),
    "gpt-oss-global": Variant(
        "GptOss",
        "no biases of projections, no local layers; experts of which one is chosen",
        {
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "sliding_window": WINDOW,
            "layer_types": types("GGG"),
            "attention_bias": False,
            "rope_parameters": rope(150000.0),
        },
        {"layer_types": types("GGG"), "rope_scaling": {"rope_type": "default"}},
    ),
    "cohere2-moe": Variant(
        "Cohere2Moe",
        "the same; experts behind a dense layer of other windows, averaged with shared ones",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "num_shared_experts": 2,
            "prefix_dense_intermediate_size": 80,
            "first_k_dense_replace": 1,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 2,
            "logit_scale": 0.75,
            "rms_norm_eps": None,
        },
        {**HUB_EXPERTS, "num_experts": 6, "first_k_dense_replace": 1, "sliding_window_pattern": 2},
    ),
    "cohere2-moe-sigmoid": Variant(
        "Cohere2Moe",
        "RMS norms; experts chosen by sigmoids, and no shared ones",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "expert_selection_fn": "sigmoid",
            "sliding_window": WINDOW,
            "layer_types": types("LGL"),
            "logit_scale": 0.75,
        },
        {"layer_types": types("LGL")},
    ),
    "ernie4.5-moe": Variant(
        "Ernie4_5_Moe",
        "experts chosen by shares and a bias behind a dense layer, and shared ones",
        {
            "moe_num_experts": 8,
            "moe_k": 3,
            "moe_intermediate_size": 40,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
        },
    ),
    "hunyuan-moe": Variant(
        "HunYuanMoEV1",
        "experts and a shared one",
        {"num_experts": 6, "moe_topk": 2, "num_experts_per_tok": 2},
    ),
    "granite-moe": Variant(
        "GraniteMoe",
        "experts in one tensor, four multipliers",
        {
            **GRANITE,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
        },
    ),
    "granite-moe-shared": Variant(
        "GraniteMoeShared",
        "a shared expert besides",
        {
            **GRANITE,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 72,
        },
    ),
    "granite-swa-moe": Variant(
        "GraniteMoeSWA",
        "windows, scores without a value, layers without positions; experts beside a shared one",
        {
            **GRANITE,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 72,
            "sliding_window": WINDOW,
            "layer_rope_theta": [10000.0, 0, 10000.0],
        },
    ),
    "mellum-moe": Variant(
        "Mellum",
        "two RoPEs, experts and a dense layer",
        {
            **EXPERTS,
            "norm_topk_prob": True,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "sliding_window": WINDOW,
            "layer_types": types("GLL"),
            "rope_parameters": _MELLUM_ROPES,
        },
        {
            **HUB_EXPERTS,
            "layer_types": types("GLL"),
            "rope_parameters": _MELLUM_ROPES,
            "rope_scaling": ...,
            "rope_theta": ...,
            "rope_local_base_freq": ...,
        },
    ),
    "qwen2-moe": Variant(
        "Qwen2Moe",
        "a shared expert with a gate; windows in every other layer, up to one",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 48,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 2,
        },
        {"num_experts": 8, "num_local_experts": ...},
    ),
    "qwen2-moe-dense": Variant(
        "Qwen2Moe",
        "no biases, weights that sum to one, a dense layer",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 48,
            "qkv_bias": False,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
        {"num_experts": 8, "num_local_experts": ...},
    ),
    "glm4-moe": Variant(
        "Glm4Moe",
        "experts chosen by sigmoids and a bias, a dense layer; norms of heads, biases",
        {**_ROUTED, "use_qk_norm": True, "attention_bias": True},
    ),
    "glm4-moe-groups": Variant(
        "Glm4Moe", "groups of experts; no norms of heads", {**_ROUTED, **_GROUPS}
    ),
    "dots1-moe": Variant(
        "Dots1",
        "windows from the third layer on, groups of experts",
        {**_ROUTED, **_GROUPS, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "minimax-m2-moe": Variant(
        "MiniMaxM2",
        "sigmoids and a bias; one norm over all heads; RoPE on half of each head",
        {"num_local_experts": 6, "num_experts_per_tok": 3, "rotary_dim": 8},
        {"rotary_dim": 8},
    ),
    "exaone-moe": Variant(
        "ExaoneMoe",
        "norms before, global layers without positions; groups of experts",
        {
            **EXPERTS,
            **_GROUPS,
            "num_shared_experts": 2,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 2,
        },
    ),
    "afmoe": Variant(
        "Afmoe",
        "a gate of its own on attention; experts beside two that are shared",
        {
            **EXPERTS,
            "num_shared_experts": 2,
            "route_scale": 2.0,
            "sliding_window": WINDOW,
            "global_attn_every_n_layers": 2,
            "mup_enabled": True,
        },
    ),
    "deepseek-v2-moe": Variant(
        "DeepseekV2",
        "queries in full, yarn whose scale counts twice",
        {
            **_LATENT,
            **_ROUTED,
            "q_lora_rank": None,
            "rope_parameters": yarn(64, mscale=0.707, mscale_all_dim=0.707),
        },
    ),
    "deepseek-v2-moe-groups": Variant(
        "DeepseekV2",
        "groups by their best expert, biases",
        {**_LATENT, **_ROUTED, **_GROUPS, "topk_method": "group_limited_greedy"}
        | {"attention_bias": True},
    ),
    "deepseek-v3-moe": Variant(
        "DeepseekV3",
        "groups by their two best experts, with a bias; yarn of two scales",
        {
            **_LATENT,
            **_ROUTED,
            **_GROUPS,
            "rope_parameters": yarn(64, mscale=1.0, mscale_all_dim=0.8),
        },
    ),
    "deepseek-v3-moe-halves": Variant(
        "DeepseekV3",
        "RoPE of halves, queries in full, weights of experts as they are",
        {**_LATENT, **_ROUTED, "q_lora_rank": None}
        | {"rope_interleave": False, "norm_topk_prob": False, "attention_bias": True},
    ),
    "glm4-moe-lite": Variant(
        "Glm4MoeLite", "values wider than keys", {**_LATENT, **_ROUTED} | {"v_head_dim": 48}
    ),
    "mistral4-moe": Variant(
        "Mistral4",
        "queries that grow, groups of experts by shares",
        {
            **_LATENT,
            **_ROUTED,
            **_GROUPS,
            "head_dim": 40,
            "rope_parameters": yarn(64, llama_4_scaling_beta=0.4, mscale=1.0, mscale_all_dim=1.0),
        },
    ),
    "youtu": Variant(
        "Youtu",
        "latent attention in a dense model",
        # transformers makes the embedding of padding zero while it loads this one.
        {**_LATENT, "tie_word_embeddings": True, "pad_token_id": None},
    ),
    "minicpm3": Variant(
        "MiniCPM3",
        "multipliers of embeddings, residuals and logits; halves turn; longrope",
        {
            **_LATENT,
            "scale_emb": 5,
            "scale_depth": 0.9,
            "dim_model_base": 40,
            "tie_word_embeddings": True,
            "rope_parameters": rope(
                rope_type="longrope",
                short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.7, 2.0],
                long_factor=[1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 16.0],
                original_max_position_embeddings=64,
            ),
        },
    ),
    "minicpm3-plain": Variant(
        "MiniCPM3",
        "queries in full; no multipliers of residuals and logits",
        {**_LATENT, "q_lora_rank": None, "scale_depth": None, "dim_model_base": None}
        | {"v_head_dim": None, "attention_bias": True},
        {"scale_depth": None, "dim_model_base": None},
    ),
    "flex-olmo-moe": Variant(
        "FlexOlmo", "norms after, experts", {"num_experts": 5, "num_experts_per_tok": 2}
    ),
    "solar-open-moe": Variant(
        "SolarOpen",
        "groups of experts in every layer, biases",
        {**_ROUTED, **_GROUPS, "attention_bias": True},
    ),
    "hy-v3-moe": Variant(
        "HYV3",
        "norms of heads; experts by sigmoids and a bias behind a dense layer; biases",
        {
            **EXPERTS,
            "num_shared_experts": 2,
            "router_scaling_factor": 1.5,
            "attention_bias": True,
            "mlp_bias": True,
        },
        HUB_EXPERTS,
    ),
    "flint-moe": Variant(
        "Flint",
        "scores without a value; global layers without positions; experts by sigmoids behind a "
        "dense layer",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 48,
            "mlp_only_layers": [0],
            "sliding_window": WINDOW,
            "layer_types": types("LGL"),
        },
        {**HUB_EXPERTS, "layer_types": types("LGL")},
    ),
    "kolibri-moe": Variant(
        "Kolibri1",
        "norms before and after; experts by scores and a bias, weighted by sigmoids",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 48,
            "norm_topk_prob": True,
            "sliding_window": WINDOW,
            "layer_types": types("LGL"),
        },
        {**HUB_EXPERTS, "layer_types": types("LGL")},
    ),
    "kolibri-moe-shares": Variant(
        "Kolibri1",
        "windows everywhere; weights as they are",
        {**EXPERTS, "shared_expert_intermediate_size": 48, "sliding_window": WINDOW},
        HUB_EXPERTS,
    ),
    "phimoe": Variant(
        "Phimoe",
        "experts weighted among those that come near; layer norms; biases, of the head too",
        {
            "num_local_experts": 6,
            "router_jitter_noise": 0.2,
            "attention_bias": True,
            "lm_head_bias": True,
        },
    ),
    "phimoe-longrope": Variant(
        "Phimoe",
        "longrope within the original length, windows",
        {
            "num_local_experts": 4,
            "sliding_window": WINDOW,
            "original_max_position_embeddings": 4096,
            "rope_parameters": rope(
                rope_type="longrope",
                short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.7, 2.0],
                long_factor=[1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 16.0],
                short_mscale=1.2,
                long_mscale=1.3,
                original_max_position_embeddings=4096,
            ),
        },
    ),
    "laguna-moe": Variant(
        "Laguna",
        "layers of other numbers of heads and of two RoPEs, gates of heads; experts behind a dense "
        "layer",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 48,
            "moe_routed_scaling_factor": 1.5,
            "num_attention_heads_per_layer": [4, 2, 6],
            "sliding_window": WINDOW,
            "layer_types": types("LGL"),
            "rope_parameters": _LAGUNA_ROPES,
        },
        {**HUB_EXPERTS, "layer_types": types("LGL"), "rope_parameters": _LAGUNA_ROPES}
        | {"rope_scaling": ..., "rope_theta": ..., "rope_local_base_freq": ...},
    ),
    "laguna-moe-elements": Variant(
        "Laguna",
        "gates of each number; yarn, biases",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 48,
            "gating": "per-element",
            "attention_bias": True,
            "rope_parameters": _LAGUNA_ROPES,
            "mlp_layer_types": ["sparse"] * 3,
        },
        {**HUB_EXPERTS, "rope_parameters": _LAGUNA_ROPES}
        | {"rope_scaling": ..., "rope_theta": ..., "rope_local_base_freq": ...},
    ),
}

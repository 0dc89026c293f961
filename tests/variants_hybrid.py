"""Small checkpoints of the architectures of which layers keep states."""

from __future__ import annotations

from variants import EXPERTS, GRANITE_H, HUB_EXPERTS, MAMBA, WINDOW, Variant, rope


def _nemotron_types(pattern: str) -> list[str]:
    kinds = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
    return [kinds[letter] for letter in pattern]


DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "rope_parameters": rope(1e6, partial_rotary_factor=0.5),
}
_LFM2 = {
    "tie_word_embeddings": True,
    "block_multiple_of": 16,
    "norm_eps": 1e-5,
    "rope_parameters": rope(1e6),
}
_HUB_LFM2 = {"block_ff_dim": 96, "tie_embedding": True}
_LFM3_TYPES = ["conv", "sliding_attention", "full_attention"]
_LFM3_ROPES = {
    "sliding_attention": rope(1e4),
    "full_attention": rope(1e6, rope_type="proportional", partial_rotary_factor=0.5),
}
_NEMOTRON_H = {
    "mamba_num_heads": 6,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    # transformers bounds steps by it in prefill and not in decode; the model's own code never does.
    "time_step_min": 1e-12,
}
_NEMOTRON_MOE = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 72,
    "routed_scaling_factor": 1.5,
}
_JAMBA = {
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 8,
    "mamba_d_conv": 3,
}
_KIMI = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
}
_NO_ROPE = {"rope_theta": ..., "rope_scaling": ...}
_HUB_KIMI = {
    **_NO_ROPE,
    "linear_attn_config": {
        "full_attn_layers": [2],
        "kda_layers": [1, 3],
        "head_dim": 24,
        "num_heads": 3,
        "short_conv_kernel_size": 4,
    },
    "linear_head_dim": ...,
    "linear_num_heads": ...,
    "linear_conv_kernel_dim": ...,
    "mlp_layer_types": ...,
    "first_k_dense_replace": 1,
    "moe_router_activation_func": "sigmoid",
}
_FALCON_H1 = {
    **MAMBA,
    "mamba_d_ssm": 96,
    "mamba_n_heads": 6,
    "attention_in_multiplier": 0.9,
    "attention_out_multiplier": 0.6,
    "key_multiplier": 1.3,
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.7,
    "ssm_multipliers": [0.8, 1.1, 0.9, 1.3, 0.7],
    "mlp_multipliers": [0.8, 0.6],
    "embedding_multiplier": 4.0,
    "lm_head_multiplier": 0.5,
}


HYBRID_VARIANTS: dict[str, Variant] = {
    "qwen3-next": Variant(
        "Qwen3Next",
        "projections head by head, a shared expert",
        {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 48},
        {**HUB_EXPERTS, "full_attention_interval": 3},
        recurrent=True,
    ),
    "qwen3-next-dense": Variant(
        "Qwen3Next",
        "a dense layer among those with experts; biases",
        {
            **EXPERTS,
            **DELTA,
            "shared_expert_intermediate_size": 48,
            "mlp_only_layers": [1],
            "norm_topk_prob": False,
            "attention_bias": True,
        },
        {**HUB_EXPERTS, "full_attention_interval": 3},
        recurrent=True,
    ),
    "qwen3.5": Variant(
        "Qwen3_5",
        "Gated DeltaNet, gated attention",
        {**DELTA, "tie_word_embeddings": True},
        {"layer_types": DELTA["layer_types"]},
        recurrent=True,
    ),
    "qwen3.5-shared-keys": Variant(
        "Qwen3_5",
        "heads that share keys; a shorter convolution",
        {**DELTA, "linear_num_key_heads": 1, "linear_conv_kernel_dim": 2},
        {"full_attention_interval": 3},
        recurrent=True,
    ),
    "qwen3.5-attention": Variant(
        "Qwen3_5",
        "gated attention in every layer",
        {**DELTA, "layer_types": ["full_attention"] * 3},
        {"full_attention_interval": 1},
    ),
    "qwen3.5-moe": Variant(
        "Qwen3_5Moe",
        "experts in one tensor, a shared expert",
        {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 48},
        {**HUB_EXPERTS, "full_attention_interval": 3},
        recurrent=True,
    ),
    "olmo-hybrid": Variant(
        "OlmoHybrid",
        "gains to two, no positions; norms before and after; layers and heads of the default kinds",
        {"num_hidden_layers": 5, "rope_parameters": rope(None)},
        {"rope_parameters": {"rope_theta": None}, "rope_theta": ..., "rope_scaling": ...},
        recurrent=True,
    ),
    "olmo-hybrid-rope": Variant(
        "OlmoHybrid",
        "gains to one, RoPE; heads that share keys, the last layer among them; biases",
        {
            **{name: DELTA[name] for name in DELTA if name.startswith("linear_")},
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_allow_neg_eigval": False,
            "linear_conv_kernel_dim": 3,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
        {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        recurrent=True,
    ),
    "lfm2": Variant(
        "Lfm2",
        "gated short convolutions, the last layer among them",
        {**_LFM2, "layer_types": ["conv", "full_attention", "conv"]},
        {**_HUB_LFM2, "full_attn_idxs": [1]},
        recurrent=True,
    ),
    "lfm2-biases": Variant(
        "Lfm2",
        "biases of convolutions and of what stands around them",
        {
            **_LFM2,
            "layer_types": ["conv", "conv", "full_attention"],
            "conv_bias": True,
            "conv_L_cache": 4,
        },
        {**_HUB_LFM2, "layer_types": ["conv", "conv", "full_attention"]},
        recurrent=True,
    ),
    "lfm2-moe": Variant(
        "Lfm2Moe",
        "experts chosen by sigmoids and a bias, behind a dense layer",
        {
            **{k: v for k, v in _LFM2.items() if k != "block_multiple_of"},
            **EXPERTS,
            "num_dense_layers": 1,
            "routed_scaling_factor": 1.5,
            "layer_types": ["conv", "full_attention", "conv"],
        },
        {"tie_embedding": True, "layer_types": ["conv", "full_attention", "conv"]},
        recurrent=True,
    ),
    "lfm2-moe-no-bias": Variant(
        "Lfm2Moe",
        "experts chosen by sigmoids alone",
        {
            **{k: v for k, v in _LFM2.items() if k != "block_multiple_of"},
            **EXPERTS,
            "num_dense_layers": 0,
            "use_expert_bias": False,
            "norm_topk_prob": False,
            "layer_types": ["conv", "full_attention", "conv"],
        },
        {"tie_embedding": True, "layer_types": ["conv", "full_attention", "conv"]},
        recurrent=True,
    ),
    "lfm3": Variant(
        "Lfm3",
        "convolutions beside local and global attention of two RoPEs, gated heads, four norms",
        {"norm_eps": 1e-5, "sliding_window": WINDOW, "tie_word_embeddings": True}
        | {"rope_parameters": _LFM3_ROPES, "layer_types": _LFM3_TYPES},
        {"layer_types": _LFM3_TYPES, "rope_parameters": _LFM3_ROPES, "rope_theta": ...}
        | {"rope_scaling": ..., "rope_local_base_freq": ...},
        recurrent=True,
    ),
    "lfm3-plain": Variant(
        "Lfm3",
        "no gates, two norms, biases; layers of the default kinds",
        {
            "norm_eps": 1e-5,
            "sliding_window": WINDOW,
            "num_hidden_layers": 5,
            "conv_L_cache": 3,
            "conv_bias": True,
            "attention_bias": True,
            "use_attention_gate": False,
            "use_sandwich_norm": False,
            "rope_parameters": _LFM3_ROPES,
        },
        {
            "rope_parameters": ...,
            "rope_theta": ...,
            "rope_scaling": ...,
            "rope_local_base_freq": ...,
        },
        recurrent=True,
    ),
    "granite4-h": Variant(
        "GraniteMoeHybrid",
        "Mamba-2, no positions, four multipliers",
        {**GRANITE_H, "num_local_experts": 0},
        {"layer_types": ["mamba", "attention", "mamba"]},
        recurrent=True,
    ),
    "granite4-h-moe": Variant(
        "GraniteMoeHybrid",
        "experts beside a shared one; groups of heads; positions",
        {
            **GRANITE_H,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "mamba_n_groups": 2,
            "position_embedding_type": "rope",
        },
        {"layer_types": ["mamba", "attention", "mamba"]},
        recurrent=True,
    ),
    "bamba": Variant(
        "Bamba",
        "Mamba-2, RoPE on half of each head",
        {**MAMBA, "attn_layer_indices": [1], "time_step_limit": (0.3, 1.5)},
        {"time_step_limit": [0.3, 1.5]},
        recurrent=True,
    ),
    "bamba-biases": Variant(
        "Bamba",
        "biases everywhere",
        {
            **MAMBA,
            "attn_layer_indices": [2],
            "mamba_n_groups": 2,
            "mamba_proj_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
        recurrent=True,
    ),
    "falcon-h1": Variant(
        "FalconH1",
        "attention and Mamba-2 in each layer, their outputs gated and not normed; multipliers",
        _FALCON_H1,
        recurrent=True,
    ),
    "falcon-h1-norm": Variant(
        "FalconH1",
        "outputs of Mamba-2 normed by groups; biases",
        {
            **_FALCON_H1,
            "attention_in_multiplier": 1.0,
            "mamba_d_ssm": None,
            "mamba_n_heads": 8,
            "mamba_n_groups": 2,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "mamba_proj_bias": True,
            "projectors_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
        {"mamba_d_ssm": None},
        recurrent=True,
    ),
    "jamba": Variant(
        "Jamba",
        "Mamba's scan, of which steps, keys and queries are normed; no positions",
        {**_JAMBA, "num_experts": 1},
        _NO_ROPE,
        recurrent=True,
    ),
    "jamba-moe": Variant(
        "Jamba",
        "experts in every other layer; biases of projections, none of convolutions",
        {
            **_JAMBA,
            "num_experts": 4,
            "mamba_dt_rank": 24,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
        },
        _NO_ROPE,
        recurrent=True,
    ),
    "kimi-linear-moe": Variant(
        "KimiLinear",
        "a decay for each number of a key, gates and decays of few numbers; latent attention "
        "without positions; experts chosen by sigmoids and a bias behind a dense layer",
        {
            **_KIMI,
            "linear_head_dim": 24,
            "linear_num_heads": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
        _HUB_KIMI,
        recurrent=True,
    ),
    "ling3-moe": Variant(
        "BailingHybrid",
        "decays for each number of a key, bounded; gated latent attention; groups of experts",
        {
            **_KIMI,
            "head_dim": 16,
            "layer_group_size": 3,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "kda_lower_bound": -3.0,
        },
        recurrent=True,
    ),
    "ling3-moe-unbounded": Variant(
        "BailingHybrid",
        "decays that are not bounded; shorter convolutions; one group of experts",
        {
            **_KIMI,
            "head_dim": 24,
            "layer_group_size": 2,
            "kda_safe_gate": False,
            "short_conv_kernel_size": 3,
        },
        recurrent=True,
    ),
    "nemotron-h": Variant(
        "NemotronH",
        "layers that are one thing alone: Mamba-2, attention, an MLP without a gate, the last one",
        {
            **_NEMOTRON_H,
            "num_hidden_layers": 5,
            "layers_block_type": _nemotron_types("M-M*-"),
        },
        {
            "hybrid_override_pattern": "M-M*-",
            "layers_block_type": ...,
            "rope_scaling": ...,
        },
        recurrent=True,
    ),
    "nemotron-h-biases": Variant(
        "NemotronH",
        "biases; an MLP first and attention last",
        {
            **_NEMOTRON_H,
            "layers_block_type": _nemotron_types("-M*"),
            "use_bias": True,
            "use_conv_bias": False,
            "mlp_bias": True,
        },
        {"layers_block_type": ["mlp", "mamba", "attention"], "rope_scaling": ...},
        recurrent=True,
    ),
    "nemotron-h-moe": Variant(
        "NemotronH",
        "experts without gates, chosen by sigmoids and a bias, beside a shared one",
        {
            **_NEMOTRON_H,
            **_NEMOTRON_MOE,
            "num_hidden_layers": 4,
            "layers_block_type": _nemotron_types("ME*E"),
        },
        {"hybrid_override_pattern": "ME*E", "layers_block_type": ..., "rope_scaling": ...},
        recurrent=True,
    ),
    "nemotron-h-moe-latent": Variant(
        "NemotronH",
        "experts between two projections, beside a shared one of the residual; groups of experts",
        {
            **_NEMOTRON_H,
            **_NEMOTRON_MOE,
            "moe_latent_size": 48,
            "n_group": 4,
            "topk_group": 2,
            "num_hidden_layers": 4,
            "layers_block_type": _nemotron_types("EM*E"),
        },
        {"hybrid_override_pattern": "EM*E", "layers_block_type": ..., "rope_scaling": ...},
        recurrent=True,
    ),
}

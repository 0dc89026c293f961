"""The matrix of models: one entry for each small checkpoint that the tests make and compare with
transformers, in float32, in both layouts of config.json.

Adding a family is an entry in offload/families.py, or beside it, and one here. docs/models.md is
made from both:

    python tests/model_matrix.py
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WINDOW = 48  # tokens; below every test's length, and no multiple of a usual page
_WINDOW_TYPES = ["full_attention", "sliding_attention"]


def rope(theta: float = 10000.0, **scaling: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **scaling}


def _yarn(original: int = 512, **more: Any) -> dict[str, Any]:
    scaling = {"factor": 4.0, "original_max_position_embeddings": original, **more}
    return rope(1e6, rope_type="yarn", **scaling)


def _types(pattern: str) -> list[str]:
    """L = a layer with a window, G = one without."""
    return [_WINDOW_TYPES[letter == "L"] for letter in pattern]


def _nemotron_types(pattern: str) -> list[str]:
    kinds = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
    return [kinds[letter] for letter in pattern]


def _longrope(original: int) -> dict[str, Any]:
    """Three quarters of 16 elements turn: six pairs."""
    return {
        "max_position_embeddings": 8192,
        "original_max_position_embeddings": original,
        "rope_parameters": rope(
            rope_type="longrope",
            partial_rotary_factor=0.75,
            short_factor=[1.0, 1.1, 1.2, 1.4, 1.7, 2.0],
            long_factor=[1.0, 1.5, 3.0, 8.0, 20.0, 40.0],
            original_max_position_embeddings=original,
        ),
    }


@dataclass(frozen=True)
class Variant:
    """architecture: transformers' name without ForCausalLM. config: what differs from the small
    model of random_checkpoints.py. hub: fields that the hub's layout has besides, ... for one that
    it has not. shows: what a test of this variant would notice. recurrent: whether some layers keep
    a state in place of keys and values.
    """

    architecture: str
    shows: str
    config: dict[str, Any] = field(default_factory=dict)
    hub: dict[str, Any] = field(default_factory=dict)
    recurrent: bool = False


_LLAMA3 = rope(
    500000.0,
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
_GEMMA2 = {
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 6.0,
    "sliding_window": WINDOW,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
_HUB_EXPERTS = {"num_experts": 8, "num_local_experts": ...}

_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "rope_parameters": rope(1e6, partial_rotary_factor=0.5),
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_d_head": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}
_GRANITE_H = {
    **_MAMBA,
    "shared_intermediate_size": 80,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "attention_multiplier": 0.2,
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.6,
    "logits_scaling": 1.5,
}
_GEMMA4_ROPES = {
    "sliding_attention": rope(1e4),
    "full_attention": rope(1e6, rope_type="proportional", partial_rotary_factor=0.25),
}
_GEMMA4 = {
    "tie_word_embeddings": True,
    "sliding_window": WINDOW,
    "rope_parameters": _GEMMA4_ROPES,
    "global_head_dim": 32,
    "final_logit_softcapping": 6.0,
    "hidden_size_per_layer_input": 0,
}
_KEYS_ARE_VALUES = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}


def _hub_gemma4(pattern: str, **more: Any) -> dict[str, Any]:
    """Hubs name each kind's RoPE too, and the global layers' sizes once."""
    others = ("rope_theta", "rope_scaling", "rope_local_base_freq", "per_layer_config")
    return {
        "layer_types": _types(pattern),
        "rope_parameters": _GEMMA4_ROPES,
        "global_head_dim": 32,
        **dict.fromkeys(others, ...),
        **more,
    }


_LFM2 = {
    "tie_word_embeddings": True,
    "block_multiple_of": 16,
    "norm_eps": 1e-5,
    "rope_parameters": rope(1e6),
}
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
_HUB_LFM2 = {"block_ff_dim": 96, "tie_embedding": True}

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
_FALCON_H1 = {
    **_MAMBA,
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

_MELLUM_ROPES = {
    "full_attention": {**_yarn(64), "rope_theta": 500000.0},
    "sliding_attention": rope(10000.0),
}

# Names say what a failing test is about.
VARIANTS: dict[str, Variant] = {
    "llama2": Variant("Llama", "as many KV heads as heads", {"num_key_value_heads": 4}),
    "llama3": Variant(
        "Llama", "llama3 scaling", {"tie_word_embeddings": True, "rope_parameters": _LLAMA3}
    ),
    "llama-linear": Variant(
        "Llama", "linear scaling", {"rope_parameters": rope(rope_type="linear", factor=2.0)}
    ),
    "llama-dynamic": Variant(
        "Llama",
        "dynamic scaling, fixed for the request's length",
        {
            "max_position_embeddings": 64,
            "rope_parameters": rope(rope_type="dynamic", factor=16.0),
        },
    ),
    "llama-biases": Variant("Llama", "biases", {"attention_bias": True, "mlp_bias": True}),
    "llama-head80": Variant("Llama", "heads of 80", {"head_dim": 80, "num_key_value_heads": 4}),
    "llama-one-kv-head": Variant("Llama", "one KV head", {"num_key_value_heads": 1}),
    "mistral": Variant("Mistral", "windows", {"sliding_window": WINDOW}),
    "mistral-no-window": Variant(
        "Mistral", "no window", {"sliding_window": None, "rope_parameters": rope(1e6)}
    ),
    "ministral": Variant(
        "Ministral",
        "windows in some layers",
        {"sliding_window": WINDOW, "layer_types": _types("GLL")},
        {"layer_types": _types("GLL")},
    ),
    "ministral3": Variant(
        "Ministral3",
        "queries that grow",
        {
            "sliding_window": None,
            "rope_parameters": _yarn(
                64, llama_4_scaling_beta=0.4, mscale=1.0, mscale_all_dim=1.0, beta_fast=32.0
            ),
        },
    ),
    "mixtral": Variant("Mixtral", "experts", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "mixtral-window": Variant(
        "Mixtral", "experts and windows", {"num_local_experts": 4, "sliding_window": WINDOW}
    ),
    "qwen2": Variant(
        "Qwen2", "biases", {"tie_word_embeddings": True, "rope_parameters": rope(1e6)}
    ),
    "qwen2-key-biases": Variant("Qwen2", "large key biases", {"rope_parameters": rope(1e6)}),
    "qwen2-yarn": Variant(
        "Qwen2", "yarn", {"max_position_embeddings": 512, "rope_parameters": _yarn()}
    ),
    "qwen2-window": Variant(
        "Qwen2",
        "windows from the second layer on",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": Variant(
        "Qwen3",
        "norms of query and key heads",
        {"head_dim": 32, "tie_word_embeddings": True, "rope_parameters": rope(1e6)},
    ),
    "qwen3-moe": Variant("Qwen3Moe", "experts", {**_EXPERTS, "norm_topk_prob": True}, _HUB_EXPERTS),
    "qwen3-moe-dense": Variant(
        "Qwen3Moe",
        "dense layers among those with experts",
        {**_EXPERTS, "norm_topk_prob": False, "mlp_only_layers": [1]},
        _HUB_EXPERTS,
    ),
    "phi3": Variant("Phi3", "fused projections", {"num_key_value_heads": 4}),
    "phi3-window": Variant("Phi3", "windows", {"sliding_window": WINDOW}),
    "phi3-longrope-long": Variant("Phi3", "longrope beyond the original length", _longrope(128)),
    "phi3-longrope-short": Variant("Phi3", "longrope within the original length", _longrope(512)),
    "gemma": Variant("Gemma", "norms of 1 + w, scaled embeddings, GELU", {"head_dim": 32}),
    "gemma2": Variant("Gemma2", "soft-caps, four norms, local layers", _GEMMA2),
    "gemma3": Variant(
        "Gemma3",
        "two RoPEs",
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 16,
            "layer_types": _types("LGL"),
            "rope_parameters": {
                "full_attention": rope(1e6, rope_type="linear", factor=8.0),
                "sliding_attention": rope(1e4),
            },
        },
        {"sliding_window_pattern": 2},
    ),
    "gemma4": Variant(
        "Gemma4",
        "wide global heads, layers that attend others' pages and have wider MLPs, inputs of each "
        "layer",
        {
            **_GEMMA4,
            "num_hidden_layers": 7,
            "layer_types": _types("LLGLGLG"),
            "num_kv_shared_layers": 4,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 24,
            "vocab_size_per_layer_input": 270,
        },
        _hub_gemma4("LLGLGLG"),
    ),
    "gemma4-keys-are-values": Variant(
        "Gemma4",
        "global layers with another number of KV heads, whose keys are their values",
        {**_GEMMA4, **_KEYS_ARE_VALUES, "layer_types": _types("LGG")},
        _hub_gemma4("LGG", num_global_key_value_heads=1),
    ),
    "gemma4-moe": Variant(
        "Gemma4",
        "experts beside an MLP, with a norm, a scale and factors of their own",
        {
            **_GEMMA4,
            **_KEYS_ARE_VALUES,
            "layer_types": _types("LLG"),
            "enable_moe_block": True,
            "num_experts": 6,
            "top_k_experts": 2,
            "moe_intermediate_size": 40,
        },
        _hub_gemma4("LLG", num_global_key_value_heads=1),
    ),
    "gemma4-unified": Variant(
        "Gemma4Unified",
        "biases, of keys that are values too; a scaled RoPE",
        {
            **{k: v for k, v in _GEMMA4.items() if k != "hidden_size_per_layer_input"},
            **_KEYS_ARE_VALUES,
            "layer_types": _types("GLG"),
            "attention_bias": True,
            "rope_parameters": {
                **_GEMMA4_ROPES,
                "full_attention": {**_GEMMA4_ROPES["full_attention"], "factor": 4.0},
            },
        },
        _hub_gemma4(
            "GLG",
            num_global_key_value_heads=1,
            rope_parameters={
                **_GEMMA4_ROPES,
                "full_attention": {**_GEMMA4_ROPES["full_attention"], "factor": 4.0},
            },
        ),
    ),
    "smollm3": Variant(
        "SmolLM3",
        "layers without positions",
        {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True},
    ),
    "smollm3-yarn": Variant(
        "SmolLM3",
        "yarn, layers without positions by their interval",
        {"no_rope_layer_interval": 2, "rope_parameters": _yarn(), "attention_bias": True},
    ),
    "olmo2": Variant("Olmo2", "norms after, one norm over all heads"),
    "olmo3": Variant(
        "Olmo3",
        "yarn in the global layers alone",
        {
            "sliding_window": WINDOW,
            "layer_types": _types("LGL"),
            "rope_parameters": {
                "full_attention": {**_yarn(64), "rope_theta": 500000.0},
                "sliding_attention": rope(500000.0),
            },
        },
        {"layer_types": _types("LGL")},
    ),
    "olmoe": Variant(
        "Olmoe", "experts, one norm over all heads", {"num_experts": 5, "num_experts_per_tok": 2}
    ),
    "granite": Variant(
        "Granite",
        "four multipliers",
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.6,
            "logits_scaling": 1.5,
        },
    ),
    "glm": Variant(
        "Glm",
        "interleaved RoPE on half of each head",
        {"rope_parameters": rope(partial_rotary_factor=0.5), "attention_bias": True},
    ),
    "glm4": Variant(
        "Glm4",
        "the same, with norms after",
        {"rope_parameters": rope(partial_rotary_factor=0.5), "attention_bias": False},
    ),
    "exaone4": Variant(
        "Exaone4",
        "global layers without positions",
        {"sliding_window": WINDOW, "sliding_window_pattern": 2},
    ),
    "exaone4-global": Variant(
        "Exaone4",
        "no window: every layer turns",
        {
            "sliding_window": None,
            "layer_types": _types("GGG"),
            "rope_parameters": _LLAMA3,
        },
        {"layer_types": _types("GGG")},
    ),
    "gpt-oss": Variant(
        "GptOss",
        "scores without a value, experts with biases and bounded gates",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "sliding_window": WINDOW,
            "layer_types": _types("LGL"),
            "rope_parameters": {**_yarn(64, truncate=False), "beta_fast": 32.0, "beta_slow": 1.0},
        },
        {"layer_types": _types("LGL")},
    ),
    "gpt-oss-global": Variant(
        "GptOss",
        "no biases of projections, no local layers; experts of which one is chosen",
        {
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "sliding_window": WINDOW,
            "layer_types": _types("GGG"),
            "attention_bias": False,
            "rope_parameters": rope(150000.0),
        },
        {"layer_types": _types("GGG"), "rope_scaling": {"rope_type": "default"}},
    ),
    "qwen3-next": Variant(
        "Qwen3Next",
        "projections head by head, a shared expert",
        {**_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 48},
        {**_HUB_EXPERTS, "full_attention_interval": 3},
        recurrent=True,
    ),
    "qwen3-next-dense": Variant(
        "Qwen3Next",
        "a dense layer among those with experts; biases",
        {
            **_EXPERTS,
            **_DELTA,
            "shared_expert_intermediate_size": 48,
            "mlp_only_layers": [1],
            "norm_topk_prob": False,
            "attention_bias": True,
        },
        {**_HUB_EXPERTS, "full_attention_interval": 3},
        recurrent=True,
    ),
    "qwen3.5": Variant(
        "Qwen3_5",
        "Gated DeltaNet, gated attention",
        {**_DELTA, "tie_word_embeddings": True},
        {"layer_types": _DELTA["layer_types"]},
        recurrent=True,
    ),
    "qwen3.5-shared-keys": Variant(
        "Qwen3_5",
        "heads that share keys; a shorter convolution",
        {**_DELTA, "linear_num_key_heads": 1, "linear_conv_kernel_dim": 2},
        {"full_attention_interval": 3},
        recurrent=True,
    ),
    "qwen3.5-attention": Variant(
        "Qwen3_5",
        "gated attention in every layer",
        {**_DELTA, "layer_types": ["full_attention"] * 3},
        {"full_attention_interval": 1},
    ),
    "qwen3.5-moe": Variant(
        "Qwen3_5Moe",
        "experts in one tensor, a shared expert",
        {**_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 48},
        {**_HUB_EXPERTS, "full_attention_interval": 3},
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
            **_EXPERTS,
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
            **_EXPERTS,
            "num_dense_layers": 0,
            "use_expert_bias": False,
            "norm_topk_prob": False,
            "layer_types": ["conv", "full_attention", "conv"],
        },
        {"tie_embedding": True, "layer_types": ["conv", "full_attention", "conv"]},
        recurrent=True,
    ),
    "granite4-h": Variant(
        "GraniteMoeHybrid",
        "Mamba-2, no positions, four multipliers",
        {**_GRANITE_H, "num_local_experts": 0},
        {"layer_types": ["mamba", "attention", "mamba"]},
        recurrent=True,
    ),
    "granite4-h-moe": Variant(
        "GraniteMoeHybrid",
        "experts beside a shared one; groups of heads; positions",
        {
            **_GRANITE_H,
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
        {**_MAMBA, "attn_layer_indices": [1], "time_step_limit": (0.3, 1.5)},
        {"time_step_limit": [0.3, 1.5]},
        recurrent=True,
    ),
    "bamba-biases": Variant(
        "Bamba",
        "biases everywhere",
        {
            **_MAMBA,
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
    "cohere": Variant(
        "Cohere",
        "attention and MLP side by side, layer norms, interleaved RoPE",
        {"logit_scale": 0.75, "tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
    "cohere-biases": Variant("Cohere", "biases", {"attention_bias": True, "logit_scale": 0.6}),
    "cohere2": Variant(
        "Cohere2",
        "the same; local layers, and one without positions",
        {"sliding_window": WINDOW, "layer_types": _types("LGL"), "logit_scale": 0.75},
        {"sliding_window_pattern": 2},
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
        {**_HUB_EXPERTS, "num_experts": 6, "first_k_dense_replace": 1, "sliding_window_pattern": 2},
    ),
    "cohere2-moe-sigmoid": Variant(
        "Cohere2Moe",
        "RMS norms; experts chosen by sigmoids, and no shared ones",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "expert_selection_fn": "sigmoid",
            "sliding_window": WINDOW,
            "layer_types": _types("LGL"),
            "logit_scale": 0.75,
        },
        {"layer_types": _types("LGL")},
    ),
    "arcee": Variant("Arcee", "squared ReLU", {"attention_bias": True, "mlp_bias": True}),
    "apertus": Variant(
        "Apertus",
        "xIELU, norms of other names",
        {"rope_parameters": _LLAMA3, "attention_bias": True},
    ),
    "jais2": Variant("Jais2", "squared ReLU, layer norms with biases"),
    "jais2-no-biases": Variant(
        "Jais2", "biases of norms alone", {"attention_bias": False, "mlp_bias": False}
    ),
    "starcoder2": Variant(
        "Starcoder2", "GELU, layer norms with biases, windows", {"sliding_window": WINDOW}
    ),
    "starcoder2-no-biases": Variant(
        "Starcoder2", "no windows; biases of norms alone", {"use_bias": False, "hidden_act": "gelu"}
    ),
    "ernie4.5": Variant("Ernie4_5", "interleaved RoPE, biases", {"use_bias": True}),
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
    "hunyuan": Variant(
        "HunYuanDenseV1",
        "norms of heads behind RoPE; a base that alpha stretches",
        {
            "attention_bias": True,
            "rope_parameters": rope(rope_type="dynamic", alpha=50.0, factor=1.0),
        },
    ),
    "hunyuan-moe": Variant(
        "HunYuanMoEV1",
        "experts and a shared one",
        {"num_experts": 6, "moe_topk": 2, "num_experts_per_tok": 2},
    ),
    "cwm": Variant(
        "Cwm",
        "local layers, llama3 scaling",
        {
            "sliding_window": WINDOW,
            "layer_types": _types("GLL"),
            "rope_parameters": _LLAMA3,
        },
    ),
    "internlm3": Variant(
        "InternLM3",
        "biases under their own names",
        {"attention_bias": True, "mlp_bias": True},
        {"qkv_bias": True, "bias": True, "attention_bias": ..., "mlp_bias": ...},
    ),
    "helium": Variant(
        "Helium", "interleaved RoPE", {"num_key_value_heads": 4, "attention_bias": True}
    ),
    "granite-moe": Variant(
        "GraniteMoe",
        "experts in one tensor, four multipliers",
        {
            **{k: v for k, v in _GRANITE_H.items() if k.endswith(("multiplier", "scaling"))},
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
        },
    ),
    "granite-moe-shared": Variant(
        "GraniteMoeShared",
        "a shared expert besides",
        {
            **{k: v for k, v in _GRANITE_H.items() if k.endswith(("multiplier", "scaling"))},
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 72,
        },
    ),
    "mellum-moe": Variant(
        "Mellum",
        "two RoPEs, experts and a dense layer",
        {
            **_EXPERTS,
            "norm_topk_prob": True,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "sliding_window": WINDOW,
            "layer_types": _types("GLL"),
            "rope_parameters": _MELLUM_ROPES,
        },
        {
            **_HUB_EXPERTS,
            "layer_types": _types("GLL"),
            "rope_parameters": _MELLUM_ROPES,
            "rope_scaling": ...,
            "rope_theta": ...,
            "rope_local_base_freq": ...,
        },
    ),
    "seed-oss": Variant("SeedOss", "biases of queries, keys and values alone"),
    "qwen2-moe": Variant(
        "Qwen2Moe",
        "a shared expert with a gate; windows in every other layer, up to one",
        {
            **_EXPERTS,
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
            **_EXPERTS,
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
            **_EXPERTS,
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
            **_EXPERTS,
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
            "rope_parameters": _yarn(64, mscale=0.707, mscale_all_dim=0.707),
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
            "rope_parameters": _yarn(64, mscale=1.0, mscale_all_dim=0.8),
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
            "rope_parameters": _yarn(64, llama_4_scaling_beta=0.4, mscale=1.0, mscale_all_dim=1.0),
        },
    ),
    "youtu": Variant(
        "Youtu",
        "latent attention in a dense model",
        # transformers makes the embedding of padding zero while it loads this one.
        {**_LATENT, "tie_word_embeddings": True, "pad_token_id": None},
    ),
}


def page() -> str:
    """docs/models.md."""
    from ebbtide.offload.architectures import FAMILIES, UNKNOWN_STATES

    made = {name: [] for name in FAMILIES}
    for name, variant in VARIANTS.items():
        made[f"{variant.architecture}ForCausalLM"].append(f"`{name}`: {variant.shows}")
    lines = [_HEAD]
    for architecture, family in FAMILIES.items():
        # A text part is the same tensors under longer names; test_parity.py moves them.
        checked = (
            "; ".join(made[architecture]) or "the same tensors, renamed as its files name them"
        )
        lines.append(f"| {family.title} | `{architecture}` | {family.features} | {checked} |")
    lines.append(_gguf())
    lines += [_AFTER, *(f"| {' | '.join(row)} |" for row in _PACKED), _PACKED_AFTER]
    lines += [f"* `{name}`: {what}" for name, what in UNKNOWN_STATES.items()]
    return "\n".join(lines) + "\n"


def _gguf() -> str:
    """Which architectures of GGUF files are read."""
    from ebbtide.offload.gguf_config import ARCHITECTURES

    return _GGUF.format(", ".join(f"`{name}`" for name in ARCHITECTURES))


_GGUF = """
GGUF files of these architectures, by the names that llama.cpp gives them:
{}.
A file of a small checkpoint has its folder's logits to the bit (`tests/test_gguf_model.py`), and
those that llama.cpp computes within the rounding of float32 ([log.md](log.md)). Q8_0, Q4_0 and
MXFP4 are kept as they are, Q4_K and Q4_1 in four bits with scales and offsets in float16; what else
the `gguf` package decodes is kept in the bits that are asked for, 8 by default. Tokenizers are
byte-level BPE, whose pre-tokenizer's name must be known, and SentencePiece's BPE. Windows that a
file says and llama.cpp leaves out (Mistral, Phi-3) are kept to, and gpt-oss's yarn is not cut to
whole numbers, as in the original models."""

_HEAD = """\
# Models

Made from the families in `offload/*families.py` and from `tests/model_matrix.py` by
`python tests/model_matrix.py`; a test says when this page is stale. "Checked" names the small
random checkpoints of an architecture, and what would show in them. Each is compared with
transformers in float32: prefill in cells and decode token by token, full pages and pages of 8 bits,
both layouts of config.json, texts longer than the windows, sessions resumed, forked and truncated.

| models | architecture in config.json | what sets it apart | checked |
|---|---|---|---|"""

_AFTER = """
RoPE scalings: linear, llama3, yarn, dynamic, longrope. The last two depend on the length of the
text and are fixed when a session opens: for `--context`, else for what a request with a known
number of new tokens needs, else for the model's limit; never for what happens to fit.

Experts: every expert that the router chose for a token is multiplied, and no other. Where not all
of them fit in memory, those that are chosen are read. gpt-oss's are kept as its files have them, in
MXFP4. Routers stay in the file's own precision when weights are quantised, and so do the
projections from which Gated DeltaNet's decays and gains are made.

## Models that are quantised in their files

A folder of any family above may hold matrices that another program has quantised. Which ones are
is seen by their tensors; all else is as in other folders. `ebbtide plan` says how they are kept.
"""

# What is quantised in the files: the method in config.json, what it is, and how it is kept.
_PACKED = (
    ("in config.json", "what is in the files", "kept as"),
    ("---", "---", "---"),
    (
        "`awq`",
        '4 bits, the "gemm" version, groups of 32, 64, 128 or more inputs, or whole rows',
        "the codes, scales and zeros of the files, 5 bits per weight",
    ),
    (
        "`gptq`, both versions",
        "4 bits",
        "the same; where `sym` is true without zeros, 4.5 bits per weight",
    ),
    ("`gptq` with `desc_act`", "4 or 8 bits; inputs of a group lie apart", "decoded"),
    (
        "`gptq`",
        "8 bits",
        "where `sym` is true the codes and scales of the files, 8.5 bits per weight (-128 becomes "
        "-127); else decoded",
    ),
    (
        "`compressed-tensors`, pack-quantized",
        "4 or 8 bits, with zeros or without, groups or whole rows; also with `weight_g_idx`",
        "as of GPTQ",
    ),
    (
        "`compressed-tensors`, int-quantized",
        "int8 weights",
        "the codes and scales of the files, 8.5 bits per weight",
    ),
    (
        "`compressed-tensors`, float-quantized; `fbgemm_fp8`; `modelopt` FP8",
        "float8 (E4M3), a scale for all, for each output or for blocks",
        "decoded",
    ),
    (
        "`fp8`",
        "float8 (E4M3), a scale for each block, float32 or a power of two",
        "decoded",
    ),
    ("`mxfp4`", "gpt-oss's experts", "the codes and scales of the files, 4.5 bits per weight"),
)

_PACKED_AFTER = """
"The codes and scales of the files" are exact where float16 has the scales: AWQ's and GPTQ's are
float16, bfloat16 ones fit from 2**-14 up; smaller ones lose bits, and what is below 2**-25 is zero.
They stay whatever `--weight-bits` says, but that codes of 8 bits become 4 where it says so. What is
decoded has the bits that `--weight-bits` says: 8 by `auto`, also in small models, and numbers of 16
bits by `full` (float8's as bfloat16). Activations are rounded to 8 bits by all products with codes;
scales of activations in the files are not used.

Groups that are no multiple of 32 inputs are decoded too. A quantised output head or embedding is
refused, and so are, by name: bitsandbytes, HQQ, AQLM and all methods that the table lacks; other
numbers of bits; AWQ's "gemv" versions; NVFP4, and MXFP4 of other families; sparse weights;
transforms of activations; GPTQ models whose modules differ (`dynamic`). Use the unquantised model
in place of these: `--weight-bits 8` or `4` quantises it while loading.

Checked: each row of the table in small random checkpoints, packed by a program of the tests' own
from what the formats say, against transformers with the same numbers in float32, and float8 against
what transformers reads. AutoAWQ's and compressed-tensors' own unpacking, once, gave our numbers
where both were rounded alike.

## Not yet

Refused by name are architectures with states of other kinds:
"""


if __name__ == "__main__":
    path = Path(__file__).parent.parent / "docs" / "models.md"
    path.write_text(page(), encoding="utf-8")
    print(f"wrote {path}")

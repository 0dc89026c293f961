"""GGUF architectures with routed experts or latent attention, as fields of config.json. As
gguf/config.py, which has those whose MLPs are dense."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import BadCheckpoint, UnsupportedModel
from .fields import (
    expert_fields,
    head_dim_of,
    multiplier_fields,
    routed_fields,
    scaling_of,
    share_of,
    turning_part,
    window_fields,
)
from .keys import Keys


def _qwen3_moe(k: Keys) -> dict:
    return {"architectures": ["Qwen3MoeForCausalLM"], **routed_fields(k)}


def _olmoe(k: Keys) -> dict:
    return {"architectures": ["OlmoeForCausalLM"], **expert_fields(k), "norm_topk_prob": False}


def _llama4(k: Keys) -> dict:
    """Of the two models that there are. What files do not say is known by how many experts they
    have: the smaller one norms its heads."""
    if not k.get("expert_count"):
        raise UnsupportedModel(
            f"{k.path}: a model of this architecture without experts is not supported in GGUF "
            "files. Name the original's folder or Hugging Face id."
        )
    return {
        "architectures": ["Llama4ForCausalLM"],
        **expert_fields(k),
        "intermediate_size": k.get("expert_feed_forward_length"),
        "intermediate_size_mlp": k.get("feed_forward_length"),
        "interleave_moe_layer_step": k.get("interleave_moe_layer_step"),
        "use_qk_norm": k.get("expert_count") != 128,
    }


def _glm4_moe(k: Keys) -> dict:
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        **_deepseek_experts(k),
        "partial_rotary_factor": turning_part(k, head_dim_of(k)),
        "use_qk_norm": k.has("attn_q_norm.weight"),
    }


def _deepseek_experts(k: Keys) -> dict:
    """Files that were made before they could name groups are of models that are known by their
    number of experts."""
    count = k.get("expert_count")
    groups = {256: (8, 4), 160: (8, 3)}.get(count, (1, 1))
    said = k.get("expert_group_count"), k.get("expert_group_used_count")
    num_groups, chosen = groups if None in said else said
    return {
        "n_routed_experts": count,
        "num_experts_per_tok": k.get("expert_used_count"),
        "moe_intermediate_size": k.get("expert_feed_forward_length"),
        "n_shared_experts": k.get("expert_shared_count", 0),
        "routed_scaling_factor": k.get("expert_weights_scale") or 1.0,
        "norm_topk_prob": bool(k.get("expert_weights_norm", False)),
        "first_k_dense_replace": k.get("leading_dense_block_count", 0),
        "n_group": num_groups,
        "topk_group": chosen,
    }


def _deepseek2(k: Keys) -> dict:
    """DeepSeek-V2's and V3's, and of those who have the same: experts are chosen by shares or by
    sigmoids."""
    by_sigmoid = k.get("expert_gating_func") == 2 or k.has("exp_probs_b.bias")
    query, turning = (
        k.get("attention.key_length_mla", k.get("attention.key_length")),
        k.get("rope.dimension_count"),
    )
    if not isinstance(query, int) or not isinstance(turning, int):
        raise BadCheckpoint(f"{k.path} does not say how long queries are, and how much turns.")
    experts, scaling = _deepseek_experts(k), scaling_of(k)
    if not by_sigmoid and experts["n_group"] > 1:
        experts["topk_method"] = "group_limited_greedy"
    every = k.get("rope.scaling.yarn_log_multiplier")
    if scaling is not None and every:  # a tenth of it, in float32
        scaling |= dict.fromkeys(("mscale", "mscale_all_dim"), round(10 * every, 5))
    return {
        "architectures": ["DeepseekV3ForCausalLM" if by_sigmoid else "DeepseekV2ForCausalLM"],
        **experts,
        "rope_scaling": scaling,
        "kv_lora_rank": k.get("attention.kv_lora_rank"),
        "q_lora_rank": k.get("attention.q_lora_rank"),
        "qk_rope_head_dim": turning,
        "qk_nope_head_dim": query - turning,
        "v_head_dim": k.get("attention.value_length_mla", k.get("attention.value_length")),
        "attention_bias": k.has("attn_kv_a_mqa.bias"),
    }


def _ernie_moe(k: Keys) -> dict:
    routed, size = k.layers_with("ffn_gate_inp.weight"), k.get("expert_feed_forward_length")
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "moe_num_experts": k.get("expert_count"),
        "moe_k": k.get("expert_used_count"),
        "moe_intermediate_size": size,
        "moe_num_shared_experts": share_of(
            k, "expert_shared_feed_forward_length", "expert_feed_forward_length"
        )
        or 0,
        "moe_layer_start_index": routed.index(True) if any(routed) else k.num_layers,
        "moe_layer_interval": k.get("interleave_moe_layer_step"),
    }


def _granite_moe(k: Keys) -> dict:
    return {
        "architectures": ["GraniteMoeSharedForCausalLM"],
        **multiplier_fields(k),
        **expert_fields(k),
        "intermediate_size": k.get("expert_feed_forward_length", k.same("feed_forward_length")),
        "shared_intermediate_size": k.get("expert_shared_feed_forward_length", 0),
    }


def _hunyuan_moe(k: Keys) -> dict:
    size, shared = k.get("expert_feed_forward_length"), k.get("expert_shared_feed_forward_length")
    return {
        "architectures": ["HunYuanMoEV1ForCausalLM"],
        "num_experts": k.get("expert_count"),
        "moe_topk": k.get("expert_used_count"),
        "moe_intermediate_size": size,
        "intermediate_size": shared or k.same("feed_forward_length"),
    }


def _qwen2_moe(k: Keys) -> dict:
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        **routed_fields(k),
        "norm_topk_prob": k.get("expert_weights_norm", False),
        "shared_expert_intermediate_size": k.get("expert_shared_feed_forward_length"),
        "use_sliding_window": False,
    }


def _dots1(k: Keys) -> dict:
    return {
        "architectures": ["Dots1ForCausalLM"],
        **_deepseek_experts(k),
        "use_sliding_window": False,
        "sliding_window": None,
    }


def _minimax_m2(k: Keys) -> dict:
    return {
        "architectures": ["MiniMaxM2ForCausalLM"],
        **expert_fields(k),
        "intermediate_size": k.get("expert_feed_forward_length"),
        "rotary_dim": k.get("rope.dimension_count"),
    }


def _afmoe(k: Keys) -> dict:
    """Embeddings are scaled in all models."""
    windows = window_fields(k)
    every = windows.pop("sliding_window_pattern")
    return {
        "architectures": ["AfmoeForCausalLM"],
        **expert_fields(k),
        **windows,
        "global_attn_every_n_layers": every,
        "num_shared_experts": k.get("expert_shared_count", 0),
        "num_dense_layers": k.get("leading_dense_block_count", 0),
        "route_scale": k.get("expert_weights_scale"),
        "mup_enabled": True,
    }


def _minicpm3(k: Keys) -> dict:
    """Multipliers, and how long values are, are the model's own: no file says them."""
    query, turning = k.get("attention.key_length"), k.get("rope.dimension_count")
    if not isinstance(query, int) or not isinstance(turning, int):
        raise BadCheckpoint(f"{k.path} does not say how long queries are, and how much turns.")
    return {
        "architectures": ["MiniCPM3ForCausalLM"],
        "kv_lora_rank": k.get("attention.kv_lora_rank"),
        "q_lora_rank": k.get("attention.q_lora_rank"),
        "qk_rope_head_dim": turning,
        "qk_nope_head_dim": query - turning,
    }


MIXTURES: dict[str, Callable[[Keys], dict]] = {
    "llama4": _llama4,
    "qwen2moe": _qwen2_moe,
    "qwen3moe": _qwen3_moe,
    "qwen3vlmoe": _qwen3_moe,
    "olmoe": _olmoe,
    "glm4moe": _glm4_moe,
    "dots1": _dots1,
    "afmoe": _afmoe,
    "minimax-m2": _minimax_m2,
    "deepseek2": _deepseek2,
    "minicpm3": _minicpm3,
    "granitemoe": _granite_moe,
    "ernie4_5-moe": _ernie_moe,
    "hunyuan-moe": _hunyuan_moe,
}

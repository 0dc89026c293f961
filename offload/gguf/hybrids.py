"""What a GGUF file says about a model whose layers keep states, as the config.json that the
families read. As gguf/config.py, which has all others."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import BadCheckpoint
from .fields import (
    expert_fields,
    head_dim_of,
    multiplier_fields,
    routed_fields,
    share_of,
    turning_part,
)
from .keys import Keys


def _layer_types(k: Keys) -> list[str]:
    """Which layers attend: those that have queries."""
    here = k.layers_with("attn_q.weight")
    return ["full_attention" if attends else "linear_attention" for attends in here]


def _qwen35(k: Keys) -> dict:
    routed = bool(k.get("expert_count"))
    return {
        "architectures": ["Qwen3_5MoeForCausalLM" if routed else "Qwen3_5ForCausalLM"],
        "layer_types": _layer_types(k),
        "linear_num_value_heads": k.get("ssm.time_step_rank"),
        "linear_num_key_heads": k.get("ssm.group_count"),
        "linear_key_head_dim": k.get("ssm.state_size"),
        "linear_value_head_dim": share_of(k, "ssm.inner_size", "ssm.time_step_rank"),
        "linear_conv_kernel_dim": k.get("ssm.conv_kernel"),
        "partial_rotary_factor": turning_part(k, head_dim_of(k)),
        **expert_fields(k),
        "shared_expert_intermediate_size": k.get("expert_shared_feed_forward_length"),
    }


def _qwen3_next(k: Keys) -> dict:
    return {**_qwen35(k), **routed_fields(k), "architectures": ["Qwen3NextForCausalLM"]}


def _lfm2(k: Keys) -> dict:
    size = k.same("feed_forward_length")
    return {
        "architectures": ["Lfm2ForCausalLM"],
        "layer_types": _layer_types(k),
        "conv_L_cache": k.get("shortconv.l_cache"),
        "conv_bias": k.has("shortconv.in_proj.bias"),
        "block_auto_adjust_ff_dim": False,
        "block_ff_dim": size,
        "norm_eps": k.get("attention.layer_norm_rms_epsilon"),
        "tie_embedding": "output.weight" not in k.header.tensors,
    }


def _lfm2_moe(k: Keys) -> dict:
    return {
        **_lfm2(k),
        "architectures": ["Lfm2MoeForCausalLM"],
        **expert_fields(k),
        "num_dense_layers": k.get("leading_dense_block_count"),
        "use_expert_bias": k.has("exp_probs_b.bias"),
        "routed_scaling_factor": k.get("expert_weights_scale"),
    }


def _granite_hybrid(k: Keys) -> dict:
    shared = k.get("expert_shared_feed_forward_length") or k.same("feed_forward_length")
    return {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        **multiplier_fields(k),
        "layer_types": _layer_types(k),
        # llama.cpp's switch for positions.
        "position_embedding_type": "rope" if k.get("rope.scaling.finetuned", True) else "nope",
        **_mamba2(k),
        "mamba_expand": share_of(k, "ssm.inner_size", "embedding_length"),
        "shared_intermediate_size": shared,
        "num_local_experts": k.get("expert_count", 0),
        "num_experts_per_tok": k.get("expert_used_count") or None,
        "intermediate_size": k.get("expert_feed_forward_length") or k.same("feed_forward_length"),
    }


def _mamba2(k: Keys) -> dict:
    return {
        "mamba_n_heads": k.get("ssm.time_step_rank"),
        "mamba_n_groups": k.get("ssm.group_count"),
        "mamba_d_state": k.get("ssm.state_size"),
        "mamba_d_head": share_of(k, "ssm.inner_size", "ssm.time_step_rank"),
        "mamba_d_conv": k.get("ssm.conv_kernel"),
        "mamba_conv_bias": k.has("ssm_conv1d.bias"),
        "mamba_proj_bias": k.has("ssm_in.bias"),
    }


def _falcon_h1(k: Keys) -> dict:
    """Converters multiply the weights by the multipliers: files have none."""
    return {
        "architectures": ["FalconH1ForCausalLM"],
        **_mamba2(k),
        "mamba_d_ssm": k.get("ssm.inner_size"),
        "projectors_bias": k.has("ssm_out.bias"),
        "mamba_rms_norm": k.has("ssm_norm.weight"),
        "mamba_norm_before_gate": False,
    }


def _nemotron_h(k: Keys) -> dict:
    kinds = {
        "attn_q.weight": "full_attention",
        "ssm_in.weight": "linear_attention",
        "ffn_gate_inp.weight": "moe",
    }
    layers = ["mlp"] * k.num_layers
    for tensor, kind in kinds.items():
        here = k.layers_with(tensor)
        layers = [kind if has else other for has, other in zip(here, layers, strict=True)]
    mamba, size = _mamba2(k), k.get("expert_feed_forward_length")
    return {
        "architectures": ["NemotronHForCausalLM"],
        "layers_block_type": layers,
        "layer_norm_epsilon": k.get("attention.layer_norm_rms_epsilon"),
        "intermediate_size": k.same("feed_forward_length") or size,
        "mamba_num_heads": mamba["mamba_n_heads"],
        "mamba_head_dim": mamba["mamba_d_head"],
        "n_groups": mamba["mamba_n_groups"],
        "ssm_state_size": mamba["mamba_d_state"],
        "conv_kernel": mamba["mamba_d_conv"],
        "use_conv_bias": mamba["mamba_conv_bias"],
        "use_bias": mamba["mamba_proj_bias"],
        "n_routed_experts": k.get("expert_count"),
        "num_experts_per_tok": k.get("expert_used_count"),
        "moe_intermediate_size": size,
        "moe_latent_size": k.get("moe_latent_size"),
        "moe_shared_expert_intermediate_size": k.get("expert_shared_feed_forward_length"),
        "norm_topk_prob": k.get("expert_weights_norm", True),
        "routed_scaling_factor": k.get("expert_weights_scale"),
        "n_group": k.get("expert_group_count"),
        "topk_group": k.get("expert_group_used_count"),
    }


def _jamba(k: Keys) -> dict:
    return {
        "architectures": ["JambaForCausalLM"],
        **_period_fields("attn_layer", k.layers_with("attn_q.weight")),
        **_period_fields("expert_layer", k.layers_with("ffn_gate_inp.weight")),
        "num_experts": k.get("expert_count") or 1,
        "num_experts_per_tok": k.get("expert_used_count"),
        "mamba_d_state": k.get("ssm.state_size"),
        "mamba_d_conv": k.get("ssm.conv_kernel"),
        "mamba_expand": share_of(k, "ssm.inner_size", "embedding_length"),
        "mamba_dt_rank": k.get("ssm.time_step_rank"),
        "mamba_conv_bias": k.has("ssm_conv1d.bias"),
        "mamba_proj_bias": k.has("ssm_in.bias"),
    }


def _delta_and_latent(k: Keys) -> dict:
    """What Kimi Linear and Ling 3.0 have in common."""
    turning, query = k.get("rope.dimension_count"), k.get("attention.key_length_mla")
    if not isinstance(query, int) or not isinstance(turning, int):
        raise BadCheckpoint(f"{k.path} does not say how long queries and their parts are.")
    attends = k.layers_with("attn_kv_a_mqa.weight")
    return {
        "layer_types": ["full_attention" if here else "linear_attention" for here in attends],
        "kv_lora_rank": k.get("attention.kv_lora_rank"),
        "q_lora_rank": k.get("attention.q_lora_rank"),
        "qk_rope_head_dim": turning,
        "qk_nope_head_dim": query - turning,
        "v_head_dim": k.get("attention.value_length_mla"),
        "n_routed_experts": k.get("expert_count"),
        "num_experts_per_tok": k.get("expert_used_count"),
        "moe_intermediate_size": k.same("expert_feed_forward_length"),
        "n_shared_experts": k.get("expert_shared_count", 0),
        "routed_scaling_factor": k.get("expert_weights_scale") or 1.0,
        "n_group": k.get("expert_group_count") or 1,
        "topk_group": k.get("expert_group_used_count") or 1,
        "first_k_dense_replace": k.get("leading_dense_block_count", 0),
    }


def _kimi_linear(k: Keys) -> dict:
    gains = (t for name, t in k.header.tensors.items() if name.endswith(".ssm_beta.weight"))
    return {
        "architectures": ["KimiLinearForCausalLM"],
        **_delta_and_latent(k),
        "linear_num_heads": next((t.shape[0] for t in gains if t.shape), None),
        "linear_head_dim": k.get("kda.head_dim"),
        "linear_conv_kernel_dim": k.get("ssm.conv_kernel"),
    }


def _ling3(k: Keys) -> dict:
    return {
        "architectures": ["BailingMoeV3ForCausalLM"],
        **_delta_and_latent(k),
        "head_dim": k.get("kda.head_dim"),
        "short_conv_kernel_size": k.get("ssm.conv_kernel"),
        "kda_safe_gate": k.get("kda.safe_gate", True),
        "kda_lower_bound": k.get("kda.gate_lower_bound"),
        "norm_topk_prob": k.get("expert_weights_norm", True),
        "expert_swiglu_limit_list": k.get("swiglu_clamp_exp"),
        "share_expert_swiglu_limit_list": k.get("swiglu_clamp_shexp"),
    }


def _period_fields(name: str, here: list[bool]) -> dict:
    """Which layers these are, of which there is one in each period."""
    found = [layer for layer, is_here in enumerate(here) if is_here]
    if not found:
        return {}
    period = found[1] - found[0] if len(found) > 1 else len(here)
    return {f"{name}_period": period, f"{name}_offset": found[0]}


HYBRIDS: dict[str, Callable[[Keys], dict]] = {
    "qwen35": _qwen35,
    "qwen35moe": _qwen35,
    "qwen3next": _qwen3_next,
    "lfm2": _lfm2,
    "lfm2moe": _lfm2_moe,
    "granitehybrid": _granite_hybrid,
    "falcon-h1": _falcon_h1,
    "jamba": _jamba,
    "kimi-linear": _kimi_linear,
    "bailingmoe3": _ling3,
    "nemotron_h": _nemotron_h,
    "nemotron_h_moe": _nemotron_h,
}

"""What converters say in a GGUF file of a configuration in Hugging Face's layout, and of one whose
layers differ; see gguf_writer.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH
from gguf_tensors import DELTA

_ATTENDS = ("full_attention", "attention")


def metadata(c: dict[str, Any], arch: MODEL_ARCH, inner: int) -> dict[str, Any]:
    """What converters say of a configuration in the hub's layout. inner: of a dense MLP."""
    heads, experts = c["num_attention_heads"], c.get("num_experts") or c.get("num_local_experts")
    head_dim = c.get("head_dim") or c["hidden_size"] // heads
    said = {
        "block_count": c["num_hidden_layers"],
        "context_length": c.get("max_position_embeddings"),
        "embedding_length": c["hidden_size"],
        "feed_forward_length": c["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": c["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(c.get("norm_eps", c.get("rms_norm_eps"))),
        "rope.dimension_count": int(head_dim * c.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(c.get("rope_theta") or 1e4),
        "vocab_size": c["vocab_size"],
        "attention.sliding_window": c.get("sliding_window"),
        "expert_count": experts or None,
        "expert_used_count": c.get("num_experts_per_tok") if experts else None,
        "expert_weights_scale": c.get("routed_scaling_factor"),
        "expert_feed_forward_length": c.get("moe_intermediate_size"),
        "attention.scale": c.get("attention_multiplier"),
        "embedding_scale": c.get("embedding_multiplier"),
        "residual_scale": c.get("residual_multiplier"),
        "logit_scale": c.get("logits_scaling", c.get("logit_scale")),
        "attention.layer_norm_epsilon": c.get("layer_norm_eps", c.get("norm_epsilon"))
        or c.get("norm_eps"),
        "attention.clamp_kqv": c.get("clip_qkv"),
        "use_parallel_residual": c.get("use_parallel_residual"),
        "attn_logit_softcapping": c.get("attn_logit_softcapping"),
        "final_logit_softcapping": c.get("final_logit_softcapping"),
        **_scaling(c),
    }
    pattern = c.get("sliding_window_pattern")
    if isinstance(pattern, int) and c.get("sliding_window"):
        local = [(layer + 1) % pattern != 0 for layer in range(c["num_hidden_layers"])]
        said["attention.sliding_window_pattern"] = local
    if c.get("layer_types") and c.get("sliding_window"):
        local = [kind == "sliding_attention" for kind in c["layer_types"]]
        said["attention.sliding_window_pattern"] = local
    said |= _of_hybrid(c, arch, inner) | _of_deepseek(c, arch)
    if arch == MODEL_ARCH.OLMO:
        said["attention.layer_norm_epsilon"] = 1e-5
    if arch == MODEL_ARCH.MINIMAXM2:
        said["rope.dimension_count"] = c["rotary_dim"]
    if arch == MODEL_ARCH.LLAMA4:
        said["feed_forward_length"] = c["intermediate_size_mlp"]
        said["interleave_moe_layer_step"] = c["interleave_moe_layer_step"]
    if arch in (MODEL_ARCH.GPT_OSS, MODEL_ARCH.MINIMAXM2, MODEL_ARCH.LLAMA4):
        said["expert_feed_forward_length"] = c["intermediate_size"]
    if arch == MODEL_ARCH.QWEN2 and not c.get("use_sliding_window"):
        said["attention.sliding_window"] = None
    return {"{arch}." + name: value for name, value in said.items()}


def _of_hybrid(c: dict[str, Any], arch: MODEL_ARCH, inner: int) -> dict[str, Any]:
    """Of models whose layers differ."""
    kinds = c.get("layer_types") or c.get("layers_block_type")
    if arch == MODEL_ARCH.GEMMA3N:
        return _of_gemma3n(c)
    if arch == MODEL_ARCH.GEMMA4:
        return _of_gemma4(c)
    if arch in (*DELTA, MODEL_ARCH.QWEN3NEXT):
        return {
            "ssm.conv_kernel": c["linear_conv_kernel_dim"],
            "ssm.state_size": c["linear_key_head_dim"],
            "ssm.group_count": c["linear_num_key_heads"],
            "ssm.time_step_rank": c["linear_num_value_heads"],
            "ssm.inner_size": c["linear_num_value_heads"] * c["linear_value_head_dim"],
            "full_attention_interval": 3,
            "rope.dimension_sections": [2, 1, 1, 0] if arch in DELTA else None,
            "attention.sliding_window_pattern": None,
            "expert_shared_feed_forward_length": c.get("shared_expert_intermediate_size"),
        }
    if arch in (MODEL_ARCH.LFM2, MODEL_ARCH.LFM2MOE):
        kinds = kinds or [
            "full_attention" if layer in c["full_attn_idxs"] else "conv"
            for layer in range(c["num_hidden_layers"])
        ]
        heads = [c["num_key_value_heads"] * (kind == "full_attention") for kind in kinds]
        return {
            "shortconv.l_cache": c["conv_L_cache"],
            "attention.head_count_kv": heads,
            "feed_forward_length": inner,
            "leading_dense_block_count": c.get("num_dense_layers"),
            "expert_gating_func": 2 if arch == MODEL_ARCH.LFM2MOE else None,
        }
    if arch == MODEL_ARCH.FALCON_H1:
        return {
            "ssm.conv_kernel": c["mamba_d_conv"],
            "ssm.state_size": c["mamba_d_state"],
            "ssm.group_count": c["mamba_n_groups"],
            "ssm.time_step_rank": c["mamba_n_heads"],
            "ssm.inner_size": c["mamba_n_heads"] * c["mamba_d_head"],
            "embedding_scale": None,
        }
    if arch == MODEL_ARCH.KIMI_LINEAR:
        turning, layers = c["qk_rope_head_dim"], range(c["num_hidden_layers"])
        if c["model_type"] == "kimi_linear":
            linear = c["linear_attn_config"]
            attends = [layer + 1 in linear["full_attn_layers"] for layer in layers]
            width, dim, own = linear["short_conv_kernel_size"], linear["head_dim"], {}
        else:
            attends = [(layer + 1) % c["layer_group_size"] == 0 for layer in layers]
            width, dim = c["short_conv_kernel_size"], c["head_dim"]
            own = {
                "kda.safe_gate": c["kda_safe_gate"],
                "kda.gate_lower_bound": float(c["kda_lower_bound"]),
                "expert_group_count": c["num_expert_group"],
                "expert_group_used_count": c["topk_group"],
                "expert_weights_norm": c["moe_renormalize"],
            }
        return {
            **own,
            "context_length": c["model_max_length"],
            "ssm.conv_kernel": width,
            "kda.head_dim": dim,
            "attention.head_count_kv": [int(here) for here in attends],
            "attention.kv_lora_rank": c["kv_lora_rank"],
            "attention.key_length": c["kv_lora_rank"] + turning,
            "attention.value_length": None,
            "attention.key_length_mla": c["qk_nope_head_dim"] + turning,
            "attention.value_length_mla": c["v_head_dim"],
            "rope.dimension_count": turning,
            "expert_count": c["num_experts"],
            "expert_used_count": c["num_experts_per_token"],
            "expert_shared_count": c["num_shared_experts"],
            "expert_weights_scale": c["routed_scaling_factor"],
            "leading_dense_block_count": c["first_k_dense_replace"],
            "expert_gating_func": 2,
        }
    if arch == MODEL_ARCH.JAMBA:
        period, offset = c["attn_layer_period"], c["attn_layer_offset"]
        layers, hidden = range(c["num_hidden_layers"]), c["hidden_size"]
        routed = c["num_experts"] > 1
        return {
            "ssm.conv_kernel": c["mamba_d_conv"],
            "ssm.state_size": c["mamba_d_state"],
            "ssm.time_step_rank": c["mamba_dt_rank"],
            "ssm.inner_size": c["mamba_expand"] * hidden,
            "attention.head_count_kv": [
                c["num_key_value_heads"] * (layer % period == offset) for layer in layers
            ],
            "expert_count": c["num_experts"] if routed else None,
            "expert_used_count": c["num_experts_per_tok"] if routed else None,
        }
    if arch in (MODEL_ARCH.NEMOTRON_H, MODEL_ARCH.NEMOTRON_H_MOE):
        letters = c["hybrid_override_pattern"]
        return {
            "ssm.conv_kernel": c["conv_kernel"],
            "ssm.state_size": c["ssm_state_size"],
            "ssm.group_count": c["n_groups"],
            "ssm.time_step_rank": c["mamba_num_heads"],
            "ssm.inner_size": c["mamba_num_heads"] * c["mamba_head_dim"],
            "attention.head_count_kv": [c["num_key_value_heads"] * (x == "*") for x in letters],
            "feed_forward_length": [c["intermediate_size"] * (x in "-E") for x in letters],
            "attention.layer_norm_epsilon": c["layer_norm_epsilon"],
            "attention.layer_norm_rms_epsilon": c["layer_norm_epsilon"],
            "expert_count": c["n_routed_experts"] if "E" in letters else None,
            "expert_used_count": c["num_experts_per_tok"] if "E" in letters else None,
            "expert_shared_feed_forward_length": c["moe_shared_expert_intermediate_size"],
            "moe_latent_size": c.get("moe_latent_size"),
            "expert_shared_count": c["n_shared_experts"],
            "expert_weights_norm": c["norm_topk_prob"],
            "expert_gating_func": 2,
        }
    if arch == MODEL_ARCH.ERNIE4_5_MOE:
        size = c["moe_intermediate_size"]
        return {
            "expert_count": c["moe_num_experts"],
            "expert_used_count": c["moe_k"],
            "expert_shared_count": c["moe_num_shared_experts"],
            "expert_shared_feed_forward_length": size * c["moe_num_shared_experts"],
            "interleave_moe_layer_step": c["moe_layer_interval"],
            "leading_dense_block_count": c["moe_layer_start_index"],
        }
    if arch == MODEL_ARCH.QWEN2MOE:
        return {"expert_shared_feed_forward_length": c["shared_expert_intermediate_size"]}
    if arch == MODEL_ARCH.MINIMAXM2:
        return {"expert_gating_func": 2}
    if arch == MODEL_ARCH.AFMOE:
        every = c["global_attn_every_n_layers"]
        local = [(layer + 1) % every != 0 for layer in range(c["num_hidden_layers"])]
        return {
            "attention.sliding_window_pattern": local,
            "expert_shared_count": c["num_shared_experts"],
            "leading_dense_block_count": c["num_dense_layers"],
            "expert_weights_scale": c["route_scale"],
            "expert_weights_norm": True,
            "expert_gating_func": 2,
        }
    if arch == MODEL_ARCH.MINICPM3:
        return {
            "attention.q_lora_rank": c["q_lora_rank"],
            "attention.kv_lora_rank": c["kv_lora_rank"],
            "attention.key_length": c["qk_nope_head_dim"] + c["qk_rope_head_dim"],
            "attention.value_length": None,
            "rope.dimension_count": c["qk_rope_head_dim"],
        }
    if arch in (MODEL_ARCH.GRANITE_MOE, MODEL_ARCH.HUNYUAN_MOE):
        size = c["intermediate_size"]
        is_granite = arch == MODEL_ARCH.GRANITE_MOE
        return {
            "expert_used_count": c.get("moe_topk", c.get("num_experts_per_tok")),
            "expert_feed_forward_length": None if is_granite else size,
            "expert_shared_feed_forward_length": (c.get("shared_intermediate_size") or None)
            if is_granite
            else size,
        }
    if arch == MODEL_ARCH.GRANITE_HYBRID:
        heads = [c["num_key_value_heads"] * (kind in _ATTENDS) for kind in kinds]
        return {
            "ssm.conv_kernel": c["mamba_d_conv"],
            "ssm.state_size": c["mamba_d_state"],
            "ssm.group_count": c["mamba_n_groups"],
            "ssm.time_step_rank": c["mamba_n_heads"],
            "ssm.inner_size": c["mamba_expand"] * c["hidden_size"],
            "attention.head_count_kv": heads,
            "rope.scaling.finetuned": c.get("position_embedding_type") == "rope",
            "feed_forward_length": c["intermediate_size"]
            if c.get("num_local_experts")
            else c["shared_intermediate_size"],
            "expert_shared_feed_forward_length": c["shared_intermediate_size"],
        }
    return {}


def _of_deepseek(c: dict[str, Any], arch: MODEL_ARCH) -> dict[str, Any]:
    """Of models with DeepSeek's experts, some of which have its latent attention."""
    if "n_routed_experts" not in c:
        return {}
    by_sigmoid = c["model_type"] != "deepseek_v2"
    said = {
        "expert_count": c["n_routed_experts"],
        "expert_used_count": c["num_experts_per_tok"],
        "expert_shared_count": c["n_shared_experts"],
        "expert_weights_norm": c["norm_topk_prob"] if by_sigmoid else False,
        "expert_gating_func": 2 if by_sigmoid else 1,
        "expert_group_count": c["n_group"],
        "expert_group_used_count": c["topk_group"],
        "leading_dense_block_count": c.get("first_k_dense_replace", 1),
    }
    if arch == MODEL_ARCH.DEEPSEEK2:
        scaling, turning = c.get("rope_scaling") or {}, c["qk_rope_head_dim"]
        said |= {
            "attention.head_count_kv": 1,
            "attention.q_lora_rank": c["q_lora_rank"],
            "attention.kv_lora_rank": c["kv_lora_rank"],
            "attention.key_length": c["kv_lora_rank"] + turning,
            "attention.value_length": c["kv_lora_rank"],
            "attention.key_length_mla": c["qk_nope_head_dim"] + turning,
            "attention.value_length_mla": c["v_head_dim"],
            "rope.dimension_count": turning,
        }
        if scaling:
            said["rope.scaling.yarn_log_multiplier"] = 0.1 * scaling["mscale_all_dim"]
    return said


def _of_gemma3n(c: dict[str, Any]) -> dict[str, Any]:
    """How many deviations cut gates off, and minus infinity of those that nothing does."""
    shares = torch.tensor(c["activation_sparsity_pattern"], dtype=torch.float32)
    return {
        "activation_sparsity_scale": torch.distributions.Normal(0, 1).icdf(shares).tolist(),
        "altup.active_idx": c["altup_active_idx"],
        "altup.num_inputs": c["altup_num_inputs"],
        "attention.shared_kv_layers": c["num_kv_shared_layers"],
        "embedding_length_per_layer_input": c["hidden_size_per_layer_input"],
    }


def _of_gemma4(c: dict[str, Any]) -> dict[str, Any]:
    """Sizes of the global layers, and those of local ones beside them."""
    local = [kind == "sliding_attention" for kind in c["layer_types"]]
    shared, size = c.get("num_kv_shared_layers", 0), c["intermediate_size"]
    first = len(local) - shared
    kv_heads, wide = c["num_key_value_heads"], c["global_head_dim"]
    said = {
        "attention.key_length": wide,
        "attention.value_length": wide,
        "attention.key_length_swa": c["head_dim"],
        "attention.value_length_swa": c["head_dim"],
        "attention.shared_kv_layers": shared,
        "attention.sliding_window_pattern": local,
        "embedding_length_per_layer_input": c.get("hidden_size_per_layer_input") or 0,
        "rope.dimension_count": wide,
        "rope.dimension_count_swa": c["head_dim"],
        "rope.freq_base": c["rope_parameters"]["full_attention"]["rope_theta"],
        "rope.freq_base_swa": c["rope_parameters"]["sliding_attention"]["rope_theta"],
    }
    if c.get("use_double_wide_mlp"):
        said["feed_forward_length"] = [size * (1 + (i >= first)) for i in range(len(local))]
    if c.get("num_global_key_value_heads"):
        ours = c["num_global_key_value_heads"]
        said["attention.head_count_kv"] = [kv_heads if slides else ours for slides in local]
    if c.get("enable_moe_block"):
        said["expert_used_count"] = c["top_k_experts"]
    return said


def _scaling(c: dict[str, Any]) -> dict[str, Any]:
    scaling = c.get("rope_scaling") or {}
    if scaling.get("alpha"):
        stretched = scaling["alpha"] ** (c["head_dim"] / (c["head_dim"] - 2))
        return {"rope.freq_base": c["rope_theta"] * stretched}
    kind = scaling.get("rope_type") or scaling.get("type")
    original = scaling.get("original_max_position_embeddings")
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    if kind == "yarn":
        said = {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(scaling["factor"]),
            "rope.scaling.original_context_length": original,
            "rope.scaling.yarn_beta_fast": scaling.get("beta_fast"),
            "rope.scaling.yarn_beta_slow": scaling.get("beta_slow"),
            "rope.scaling.yarn_log_multiplier": scaling.get("mscale_all_dim"),
            "attention.temperature_scale": scaling.get("llama_4_scaling_beta"),
        }
        return said
    if kind == "longrope":
        original = c["original_max_position_embeddings"]
        times = c["max_position_embeddings"] / original
        attention = float(np.sqrt(1 + np.log(times) / np.log(original)))
        return {
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": attention,
        }
    return {}

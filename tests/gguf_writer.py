"""GGUF files of small checkpoints in Hugging Face's layout, as converters write them; what
becomes of tensors stands in gguf_tensors.py.

The `gguf` package knows the names and the format; what happens to numbers is written here once
more, not taken from what reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH
from gguf import GGMLQuantizationType as Kind
from gguf_tensors import DELTA, tensors_of, xielu_of
from gguf_tokens import UNUSED, add_key, tokens_of

from ebbtide.offload.model_config import read_model_config

ARCHITECTURES = {
    "LlamaForCausalLM": MODEL_ARCH.LLAMA,
    "MistralForCausalLM": MODEL_ARCH.LLAMA,
    "MixtralForCausalLM": MODEL_ARCH.LLAMA,
    "Ministral3ForCausalLM": MODEL_ARCH.MISTRAL3,
    "Qwen2ForCausalLM": MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": MODEL_ARCH.QWEN3,
    "Qwen3MoeForCausalLM": MODEL_ARCH.QWEN3MOE,
    "Phi3ForCausalLM": MODEL_ARCH.PHI3,
    "GemmaForCausalLM": MODEL_ARCH.GEMMA,
    "Gemma2ForCausalLM": MODEL_ARCH.GEMMA2,
    "Gemma3ForCausalLM": MODEL_ARCH.GEMMA3,
    "Llama4ForCausalLM": MODEL_ARCH.LLAMA4,
    "Gemma3nForCausalLM": MODEL_ARCH.GEMMA3N,
    "Gemma4ForCausalLM": MODEL_ARCH.GEMMA4,
    "SmolLM3ForCausalLM": MODEL_ARCH.SMOLLM3,
    "OlmoForCausalLM": MODEL_ARCH.OLMO,
    "Olmo2ForCausalLM": MODEL_ARCH.OLMO2,
    "Olmo3ForCausalLM": MODEL_ARCH.OLMO2,
    "OlmoeForCausalLM": MODEL_ARCH.OLMOE,
    "GraniteForCausalLM": MODEL_ARCH.GRANITE,
    "Glm4ForCausalLM": MODEL_ARCH.GLM4,
    "Exaone4ForCausalLM": MODEL_ARCH.EXAONE4,
    "SeedOssForCausalLM": MODEL_ARCH.SEED_OSS,
    "GptOssForCausalLM": MODEL_ARCH.GPT_OSS,
    "Glm4MoeForCausalLM": MODEL_ARCH.GLM4_MOE,
    "DeepseekV2ForCausalLM": MODEL_ARCH.DEEPSEEK2,
    "DeepseekV3ForCausalLM": MODEL_ARCH.DEEPSEEK2,
    "Glm4MoeLiteForCausalLM": MODEL_ARCH.DEEPSEEK2,
    "Qwen3NextForCausalLM": MODEL_ARCH.QWEN3NEXT,
    "Qwen3_5ForCausalLM": MODEL_ARCH.QWEN35,
    "Qwen3_5MoeForCausalLM": MODEL_ARCH.QWEN35MOE,
    "Lfm2ForCausalLM": MODEL_ARCH.LFM2,
    "Lfm2MoeForCausalLM": MODEL_ARCH.LFM2MOE,
    "GraniteMoeHybridForCausalLM": MODEL_ARCH.GRANITE_HYBRID,
    "GraniteMoeForCausalLM": MODEL_ARCH.GRANITE_MOE,
    "GraniteMoeSharedForCausalLM": MODEL_ARCH.GRANITE_MOE,
    "FalconH1ForCausalLM": MODEL_ARCH.FALCON_H1,
    "NemotronHForCausalLM": MODEL_ARCH.NEMOTRON_H,
    "JambaForCausalLM": MODEL_ARCH.JAMBA,
    "KimiLinearForCausalLM": MODEL_ARCH.KIMI_LINEAR,
    "BailingHybridForCausalLM": MODEL_ARCH.KIMI_LINEAR,  # whose own the package does not know yet
    "CohereForCausalLM": MODEL_ARCH.COMMAND_R,
    "Cohere2ForCausalLM": MODEL_ARCH.COHERE2,
    "Ernie4_5ForCausalLM": MODEL_ARCH.ERNIE4_5,
    "Ernie4_5_MoeForCausalLM": MODEL_ARCH.ERNIE4_5_MOE,
    "HunYuanDenseV1ForCausalLM": MODEL_ARCH.HUNYUAN_DENSE,
    "HunYuanMoEV1ForCausalLM": MODEL_ARCH.HUNYUAN_MOE,
    "ArceeForCausalLM": MODEL_ARCH.ARCEE,
    "ApertusForCausalLM": MODEL_ARCH.APERTUS,
    "Starcoder2ForCausalLM": MODEL_ARCH.STARCODER2,
    "NemotronForCausalLM": MODEL_ARCH.NEMOTRON,
    "StableLmForCausalLM": MODEL_ARCH.STABLELM,
    "PhiForCausalLM": MODEL_ARCH.PHI2,
    "Jais2ForCausalLM": MODEL_ARCH.JAIS2,
    "Qwen2MoeForCausalLM": MODEL_ARCH.QWEN2MOE,
    "Dots1ForCausalLM": MODEL_ARCH.DOTS1,
    "AfmoeForCausalLM": MODEL_ARCH.AFMOE,
    "MiniMaxM2ForCausalLM": MODEL_ARCH.MINIMAXM2,
    "MiniCPM3ForCausalLM": MODEL_ARCH.MINICPM3,
}
_ATTENDS = ("full_attention", "attention")


def write(
    folder: Path,
    out: Path,
    kind: str = "F32",
    *,
    pre: str = "gpt-2",
    experts: str = "",
    others: dict[str, str] | None = None,
    by_heads: bool = True,
    heads_apart: bool = True,
    **keys: Any,
) -> Path:
    """Write the model of a folder to a file, and return its path.

    kind: of matrices whose rows are whole blocks; others, and all else, are F32. experts: of
    experts, where that is another. others: of tensors by a part of their names. pre: how text is
    cut. by_heads, heads_apart: see tensors_of. keys: further metadata, or, None, what is left out;
    with __ in place of a dot, and arch for the architecture's name.
    """
    config = json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURES[config["architectures"][0]]
    if arch == MODEL_ARCH.NEMOTRON_H and "E" in config.get("hybrid_override_pattern", ""):
        arch = MODEL_ARCH.NEMOTRON_H_MOE
    read = read_model_config(folder)
    inner, config = read.intermediate_size, {"num_hidden_layers": read.num_layers, **config}
    arch_name = gguf.MODEL_ARCH_NAMES[arch]
    if config["model_type"] == "bailing_hybrid":
        arch_name = "bailingmoe3"
    writer = gguf.GGUFWriter(None, arch_name)
    tensors = tensors_of(folder, config, arch, by_heads, heads_apart)
    said = {**metadata(config, arch, inner), **tokens(folder, config, pre)}
    said |= xielu_of(folder, config["num_hidden_layers"]) if arch == MODEL_ARCH.APERTUS else {}
    said |= {
        name.replace("arch__", "{arch}.").replace("__", "."): value for name, value in keys.items()
    }
    for name, value in said.items():
        if value is not None:
            add_key(writer, name.format(arch=arch_name), value)
    for name, tensor in tensors.items():
        own = experts if experts and "_exps." in name else kind
        own = next((k for part, k in (others or {}).items() if part in name), own)
        data, stored = packed(tensor.numpy(), own if _is_quantised(name, tensor, own) else "F32")
        writer.add_tensor(name, data, raw_dtype=stored)
    return _stored(writer, out)


def packed(numbers: np.ndarray, kind: str) -> tuple[np.ndarray, Kind]:
    """Numbers in a type, and the type."""
    if kind == "F32":
        return np.ascontiguousarray(numbers, np.float32), Kind.F32
    return gguf.quants.quantize(np.ascontiguousarray(numbers, np.float32), Kind[kind]), Kind[kind]


def _is_quantised(name: str, tensor: torch.Tensor, kind: str) -> bool:
    block = gguf.GGML_QUANT_SIZES[Kind[kind]][0]
    plain = tensor.dim() < 2 or name.endswith((".bias", "ffn_gate_inp.weight", "conv.weight"))
    return not plain and tensor.shape[-1] % block == 0


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


def tokens(folder: Path, c: dict[str, Any], pre: str) -> dict[str, Any]:
    """The tokenizer of a folder, with tokens for rows of the embedding that have none."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    said = tokens_of(folder, pre)
    texts = said["tokenizer.ggml.tokens"]
    missing = c["vocab_size"] - len(texts)
    ids = {text: i for i, text in enumerate(texts)}
    return {
        **said,
        "tokenizer.ggml.tokens": texts + [f"[PAD{len(texts) + i}]" for i in range(missing)],
        "tokenizer.ggml.token_type": said["tokenizer.ggml.token_type"] + [UNUSED] * missing,
        "tokenizer.ggml.merges": said.get("tokenizer.ggml.merges") or None,
        "tokenizer.ggml.bos_token_id": ids.get(settings.get("bos_token")),
        "tokenizer.ggml.eos_token_id": ids.get(settings.get("eos_token")),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": settings.get("chat_template"),
    }


def rewritten(path: Path, out: Path, change: Callable[..., list[tuple]]) -> Path:
    """The same file with other tensors. change: of a tensor's name, numbers and type, a list of
    those that take its place."""
    reader, writer = gguf.GGUFReader(path), None
    for field in reader.fields.values():
        if field.name == "general.architecture":
            writer = gguf.GGUFWriter(None, field.contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        for name, data, kind in change(tensor.name, tensor.data, tensor.tensor_type):
            writer.add_tensor(name, data, raw_dtype=kind)
    return _stored(writer, out)


def _stored(writer: gguf.GGUFWriter, out: Path) -> Path:
    writer.write_header_to_file(out)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out

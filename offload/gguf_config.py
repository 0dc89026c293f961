"""What a GGUF file says about its model, as the config.json that the families read.

A function for each architecture that llama.cpp has a name for and Ebbtide runs. What llama.cpp
knows by the architecture's name or the number of layers, and files do not say, stands here too.
Knows no tensors' places; gguf_names.py does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .errors import BadCheckpoint, UnsupportedModel
from .gguf_file import GgufHeader
from .gguf_keys import Keys
from .model_config import ModelConfig, Recurrence, config_of
from .quantisation import Quantisation

_QUANTISED = "bfloat16"  # what most models are quantised from


def read_gguf_config(header: GgufHeader, factors: dict[str, list[float]]) -> ModelConfig:
    """The model's configuration. Raises UnsupportedModel, BadCheckpoint."""
    keys = Keys(header, factors)
    make = ARCHITECTURES.get(keys.architecture) if isinstance(keys.architecture, str) else None
    if make is None:
        raise UnsupportedModel(
            f"{header.path}: the architecture {keys.architecture!r} is not supported in GGUF "
            f"files. Supported: {', '.join(sorted(ARCHITECTURES))}. If the original model is, name "
            "its folder or Hugging Face id."
        )
    raw = {**_common(keys), **make(keys)}
    config = config_of(raw, header.path)
    return _as_stored(config, keys)


def _as_stored(config: ModelConfig, keys: Keys) -> ModelConfig:
    """The configuration of the tensors that are there: converters put some together, take others
    apart, and add 1 to norms' weights where the model does."""
    experts = tuple(e and replace(e, gate_up=None, bias_is_row=False) for e in config.experts)
    attends = f"blk.{config.kv_layers[0]}." if config.kv_layers else ""
    tensors = keys.header.tensors
    return replace(
        config,
        norm_offset=0.0,
        qkv_bias=f"{attends}attn_q.bias" in tensors or f"{attends}attn_qkv.bias" in tensors,
        output_bias=f"{attends}attn_output.bias" in tensors,
        mlp_bias=keys.has("ffn_up.bias"),
        fused_qkv=f"{attends}attn_qkv.weight" in tensors,
        fused_gate_up=not any(map(keys.has, ("ffn_gate.weight", "ffn_gate_shexp.weight")))
        and config.fused_gate_up,
        experts=experts,
        recurrences=tuple(r and _taken_apart(r, keys) for r in config.recurrences),
        renamed=(),
        stacked=(),
        quantisation=_quantisation(keys.header),
    )


def _taken_apart(r: Recurrence, keys: Keys) -> Recurrence:
    """The same, not head by head where a file has its projections one by one."""
    return replace(r, by_heads=False) if r.by_heads and keys.has("attn_gate.weight") else r


def _quantisation(header: GgufHeader) -> Quantisation | None:
    """By the type that most bytes have; None where those are ordinary numbers."""
    sizes: dict[str, int] = {}
    for tensor in header.tensors.values():
        sizes[tensor.kind] = sizes.get(tensor.kind, 0) + tensor.num_bytes
    kind = max(sizes, key=sizes.get)
    return None if kind in ("F32", "F16", "BF16") else Quantisation(kind)


def _common(k: Keys) -> dict:
    embeddings = k.header.tensors.get("token_embd.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise BadCheckpoint(f"{k.path} has no token_embd.weight: it holds no language model.")
    kinds = {"F32": "float32", "F16": "float16"}
    of_layers = k.first if k.architecture in _LAYERS_DIFFER else k.same
    head_dim, value_dim = k.get("attention.key_length"), k.get("attention.value_length")
    if head_dim != value_dim and k.architecture != "deepseek2":
        raise UnsupportedModel(f"{k.path}: keys of {head_dim} and values of {value_dim} numbers.")
    return {
        "hidden_size": k.get("embedding_length"),
        "intermediate_size": of_layers("feed_forward_length"),
        "num_hidden_layers": k.num_layers,
        "num_attention_heads": k.same("attention.head_count"),
        "num_key_value_heads": of_layers("attention.head_count_kv"),
        "head_dim": _head_dim(k),
        "vocab_size": embeddings.shape[0],
        "max_position_embeddings": k.get("context_length"),
        "rms_norm_eps": k.get("attention.layer_norm_rms_epsilon"),
        "dtype": kinds.get(embeddings.kind, _QUANTISED),
        "tie_word_embeddings": "output.weight" not in k.header.tensors,
        "rope_theta": k.get("rope.freq_base", 10000.0),
        "rope_scaling": _scaling(k),
    }


def _scaling(k: Keys) -> dict | None:
    """RoPE's, by Hugging Face's names. Factors of its frequencies are what llama3 comes to."""
    factor = k.get("rope.scaling.factor", k.get("rope.scale_linear"))
    kind = k.get("rope.scaling.type", "linear" if factor not in (None, 1, 0) else "none")
    original = k.get("rope.scaling.original_context_length")
    short, long = (k.factors.get(f"rope_factors_{n}.weight") for n in ("short", "long"))
    every = k.factors.get("rope_freqs.weight")
    if short and long:
        return {
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": original,
            "attention_factor": k.get("rope.scaling.attn_factor"),
        }
    if every:
        return {
            "rope_type": "longrope",
            "short_factor": every,
            "long_factor": every,
            "attention_factor": 1.0,
        }
    if kind == "none" or (kind == "linear" and factor in (None, 1, 0)):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UnsupportedModel(f"{k.path}: RoPE scaling {kind!r} is not supported.")
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": k.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": k.get("rope.scaling.yarn_beta_slow"),
    }
    return {name: value for name, value in scaling.items() if value is not None}


def _partial(k: Keys, head_dim: int | None) -> float | None:
    """The part of a head that turns."""
    width = k.get("rope.dimension_count")
    if not isinstance(width, int) or not isinstance(head_dim, int) or not head_dim:
        return None
    return width / head_dim


def _kinds(k: Keys) -> list[str] | None:
    """Which layers have a window, where the file says so one by one."""
    pattern = k.get("attention.sliding_window_pattern")
    if not isinstance(pattern, list):
        return None
    return ["sliding_attention" if local else "full_attention" for local in pattern]


def _windows(k: Keys) -> dict:
    pattern = k.get("attention.sliding_window_pattern")
    return {
        "sliding_window": k.get("attention.sliding_window") or None,
        "layer_types": _kinds(k),
        "sliding_window_pattern": pattern if isinstance(pattern, int) else None,
    }


def _experts(k: Keys) -> dict:
    return {
        "num_local_experts": k.get("expert_count"),
        "num_experts_per_tok": k.get("expert_used_count"),
        "moe_intermediate_size": k.get("expert_feed_forward_length"),
    }


def _llama(k: Keys) -> dict:
    if k.get("expert_count"):
        return {"architectures": ["MixtralForCausalLM"], **_experts(k)}
    window = _windows(k)
    if window["sliding_window"]:
        return {"architectures": ["MistralForCausalLM"], **window}
    return {"architectures": ["LlamaForCausalLM"]}


def _mistral3(k: Keys) -> dict:
    beta, scaling = k.get("attention.temperature_scale"), _scaling(k) or {}
    scaling["llama_4_scaling_beta"] = beta
    every = k.get("rope.scaling.yarn_log_multiplier")
    if every:
        scaling |= {"mscale": 1.0, "mscale_all_dim": every}
    return {
        "architectures": ["Ministral3ForCausalLM"],
        "rope_scaling": {name: value for name, value in scaling.items() if value is not None},
        **_windows(k),
    }


def _qwen3_moe(k: Keys) -> dict:
    routed = k.layers_with("ffn_gate_inp.weight")
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        **_experts(k),
        "norm_topk_prob": True,
        "mlp_only_layers": [layer for layer, here in enumerate(routed) if not here],
    }


def _phi3(k: Keys) -> dict:
    return {
        "architectures": ["Phi3ForCausalLM"],
        "sliding_window": k.get("attention.sliding_window") or None,
        "partial_rotary_factor": _partial(k, _head_dim(k)),
    }


def _head_dim(k: Keys) -> int | None:
    said = k.get("attention.key_length")
    return _share(k, "embedding_length", "attention.head_count") if said is None else said


def _share(k: Keys, whole: str, count: str) -> int | None:
    """How much of a number each of so many has; None where it is not said."""
    numbers = k.same(whole), k.same(count)
    if not all(isinstance(n, int) and n > 0 for n in numbers):
        return None
    return numbers[0] // numbers[1]


def _gemma2(k: Keys) -> dict:
    # Of 27B a score is divided by the root of another number than the head's.
    is_large = k.num_layers == 46
    return {
        "architectures": ["Gemma2ForCausalLM"],
        **_windows(k),
        "sliding_window": k.get("attention.sliding_window", 4096),
        "query_pre_attn_scalar": _shared_dim(k) if is_large else _head_dim(k),
        "attn_logit_softcapping": k.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": k.get("final_logit_softcapping", 30.0),
    }


def _gemma3(k: Keys) -> dict:
    is_large = k.num_layers == 62
    return {
        "architectures": ["Gemma3ForCausalLM"],
        **_windows(k),
        "query_pre_attn_scalar": _shared_dim(k) if is_large else _head_dim(k),
        "rope_local_base_freq": k.get("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": k.get("final_logit_softcapping"),
    }


def _gemma4(k: Keys) -> dict:
    kinds, kv_heads = _kinds(k), k.get("attention.head_count_kv")
    if kinds is None or len(kinds) < k.num_layers:
        raise BadCheckpoint(f"{k.path} does not say which layers have a window.")
    own = kv_heads if isinstance(kv_heads, list) else [kv_heads] * k.num_layers
    if len(own) < k.num_layers:
        raise BadCheckpoint(f"{k.path} does not say how many KV heads each layer has.")
    wide = k.get("attention.key_length")
    sizes, table = k.get("feed_forward_length"), k.header.tensors.get("per_layer_token_embd.weight")
    routed = bool(k.get("expert_count"))
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": kinds,
        "sliding_window": k.get("attention.sliding_window"),
        "head_dim": k.get("attention.key_length_swa"),
        "per_layer_config": {
            str(layer): {"head_dim": wide, "num_key_value_heads": own[layer]}
            for layer in range(k.num_layers)
            if kinds[layer] == "full_attention"
        },
        "attention_k_eq_v": k.layers_with("attn_v.weight") != k.layers_with("attn_k.weight"),
        "num_kv_shared_layers": k.get("attention.shared_kv_layers", 0),
        "use_double_wide_mlp": isinstance(sizes, list) and len(set(sizes)) > 1,
        "hidden_size_per_layer_input": k.get("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": None if table is None else table.shape[0],
        "final_logit_softcapping": k.get("final_logit_softcapping"),
        "rope_parameters": {
            "sliding_attention": {"rope_theta": k.get("rope.freq_base_swa", 10000.0)},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": k.get("rope.freq_base", 1e6),
                "partial_rotary_factor": _turning(k),
            },
        },
        "rope_scaling": None,
        "enable_moe_block": routed,
        "num_experts": k.get("expert_count") or None,
        "top_k_experts": k.get("expert_used_count"),
        "moe_intermediate_size": k.get("expert_feed_forward_length"),
    }


def _turning(k: Keys) -> float:
    """Which part of a global head's pairs turns: the others' frequencies are divided by 1e30."""
    factors = k.factors.get("rope_freqs.weight")
    if not factors:
        return 1.0
    turning = sum(factor == 1 for factor in factors)
    if not turning or any(factor < 1e20 for factor in factors[turning:]):
        raise UnsupportedModel(f"{k.path}: rope_freqs.weight is not as Gemma 4 has it.")
    return turning / len(factors)


def _shared_dim(k: Keys) -> int | None:
    return _share(k, "embedding_length", "attention.head_count")


def _olmo2(k: Keys) -> dict:
    windows = _windows(k)
    name = "Olmo3ForCausalLM" if windows["sliding_window"] else "Olmo2ForCausalLM"
    return {"architectures": [name], **windows}


def _olmoe(k: Keys) -> dict:
    return {"architectures": ["OlmoeForCausalLM"], **_experts(k), "norm_topk_prob": False}


def _granite(k: Keys) -> dict:
    return {"architectures": ["GraniteForCausalLM"], **_multipliers(k)}


def _multipliers(k: Keys) -> dict:
    return {
        "attention_multiplier": k.get("attention.scale"),
        "embedding_multiplier": k.get("embedding_scale"),
        "residual_multiplier": k.get("residual_scale"),
        "logits_scaling": k.get("logit_scale"),
    }


def _gpt_oss(k: Keys) -> dict:
    scaling = _scaling(k)
    return {
        "architectures": ["GptOssForCausalLM"],
        **_windows(k),
        **_experts(k),
        "intermediate_size": k.get("expert_feed_forward_length", k.same("feed_forward_length")),
        "rope_scaling": scaling and {**scaling, "truncate": False},
    }


def _glm4(k: Keys) -> dict:
    return {
        "architectures": ["Glm4ForCausalLM"],
        "partial_rotary_factor": _partial(k, _head_dim(k)),
    }


def _glm4_moe(k: Keys) -> dict:
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        **_deepseek_experts(k),
        "partial_rotary_factor": _partial(k, _head_dim(k)),
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
    experts, scaling = _deepseek_experts(k), _scaling(k)
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


def _exaone4(k: Keys) -> dict:
    windows = _windows(k)
    if windows["sliding_window"] is None:
        windows["sliding_window_pattern"] = 0
    return {"architectures": ["Exaone4ForCausalLM"], **windows}


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
        "linear_value_head_dim": _share(k, "ssm.inner_size", "ssm.time_step_rank"),
        "linear_conv_kernel_dim": k.get("ssm.conv_kernel"),
        "partial_rotary_factor": _partial(k, _head_dim(k)),
        **_experts(k),
        "shared_expert_intermediate_size": k.get("expert_shared_feed_forward_length"),
    }


def _qwen3_next(k: Keys) -> dict:
    return {**_qwen35(k), **_qwen3_moe(k), "architectures": ["Qwen3NextForCausalLM"]}


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
        **_experts(k),
        "num_dense_layers": k.get("leading_dense_block_count"),
        "use_expert_bias": k.has("exp_probs_b.bias"),
        "routed_scaling_factor": k.get("expert_weights_scale"),
    }


def _granite_hybrid(k: Keys) -> dict:
    shared = k.get("expert_shared_feed_forward_length") or k.same("feed_forward_length")
    return {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        **_multipliers(k),
        "layer_types": _layer_types(k),
        # llama.cpp's switch for positions.
        "position_embedding_type": "rope" if k.get("rope.scaling.finetuned", True) else "nope",
        **_mamba2(k),
        "mamba_expand": _share(k, "ssm.inner_size", "embedding_length"),
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
        "mamba_d_head": _share(k, "ssm.inner_size", "ssm.time_step_rank"),
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
        "moe_shared_expert_intermediate_size": k.get("expert_shared_feed_forward_length"),
        "norm_topk_prob": k.get("expert_weights_norm", True),
        "routed_scaling_factor": k.get("expert_weights_scale"),
        "n_group": k.get("expert_group_count"),
        "topk_group": k.get("expert_group_used_count"),
    }


def _cohere(k: Keys) -> dict:
    return {
        "architectures": ["CohereForCausalLM"],
        "layer_norm_eps": k.get("attention.layer_norm_epsilon"),
        "logit_scale": k.get("logit_scale"),
    }


def _cohere2(k: Keys) -> dict:
    return {**_cohere(k), "architectures": ["Cohere2ForCausalLM"], **_windows(k)}


def _ernie_moe(k: Keys) -> dict:
    routed, size = k.layers_with("ffn_gate_inp.weight"), k.get("expert_feed_forward_length")
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "moe_num_experts": k.get("expert_count"),
        "moe_k": k.get("expert_used_count"),
        "moe_intermediate_size": size,
        "moe_num_shared_experts": _share(
            k, "expert_shared_feed_forward_length", "expert_feed_forward_length"
        )
        or 0,
        "moe_layer_start_index": routed.index(True) if any(routed) else k.num_layers,
        "moe_layer_interval": k.get("interleave_moe_layer_step"),
    }


def _granite_moe(k: Keys) -> dict:
    return {
        "architectures": ["GraniteMoeSharedForCausalLM"],
        **_multipliers(k),
        **_experts(k),
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


def _starcoder2(k: Keys) -> dict:
    return {
        "architectures": ["Starcoder2ForCausalLM"],
        "norm_epsilon": k.get("attention.layer_norm_epsilon"),
        # Each model has one, and no file says it.
        "sliding_window": k.get("attention.sliding_window", 4096),
    }


def _only(name: str, **fields) -> Callable[[Keys], dict]:
    """An architecture of which nothing is special."""
    return lambda k: {"architectures": [name], **fields}


ARCHITECTURES: dict[str, Callable[[Keys], dict]] = {
    "llama": _llama,
    "mistral3": _mistral3,
    "qwen2": _only("Qwen2ForCausalLM", use_sliding_window=False),
    "qwen3": _only("Qwen3ForCausalLM", use_sliding_window=False),
    "qwen3moe": _qwen3_moe,
    "phi3": _phi3,
    "gemma": _only("GemmaForCausalLM"),
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "smollm3": _only("SmolLM3ForCausalLM"),
    "olmo2": _olmo2,
    "olmoe": _olmoe,
    "granite": _granite,
    "gpt-oss": _gpt_oss,
    "glm4": _glm4,
    "glm4moe": _glm4_moe,
    "deepseek2": _deepseek2,
    "exaone4": _exaone4,
    "seed_oss": _only("SeedOssForCausalLM"),
    "qwen35": _qwen35,
    "qwen35moe": _qwen35,
    "qwen3next": _qwen3_next,
    "lfm2": _lfm2,
    "lfm2moe": _lfm2_moe,
    "granitehybrid": _granite_hybrid,
    "granitemoe": _granite_moe,
    "falcon-h1": _falcon_h1,
    "nemotron_h": _nemotron_h,
    "nemotron_h_moe": _nemotron_h,
    "command-r": _cohere,
    "cohere2": _cohere2,
    "ernie4_5": _only("Ernie4_5ForCausalLM"),
    "ernie4_5-moe": _ernie_moe,
    "hunyuan-dense": _only("HunYuanDenseV1ForCausalLM"),
    "hunyuan-moe": _hunyuan_moe,
    "arcee": _only("ArceeForCausalLM"),
    "starcoder2": _starcoder2,
}
# Whose layers may have other sizes than the first.
_LAYERS_DIFFER = ("gemma4",)
# Whose rows of queries and keys are in pairs.
IN_PAIRS = ("llama", "mistral3", "smollm3", "granite", "granitehybrid", "granitemoe", "arcee")

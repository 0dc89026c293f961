"""What a GGUF file says about its model, as the config.json that the families read.

A function for each architecture that llama.cpp has a name for and Ebbtide runs; gguf/mixtures.py
has those with experts, gguf/hybrids.py those whose layers keep states. What llama.cpp knows by the
architecture's name or the number of layers, and files do not say, stands here too. Knows no
tensors' places; gguf/names.py does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import NormalDist

from ..errors import BadCheckpoint, UnsupportedModel
from ..models.layer_config import Recurrence
from ..models.model_config import ModelConfig, config_of
from ..models.quantisation import Quantisation
from .fields import (
    expert_fields,
    head_dim_of,
    multiplier_fields,
    scaling_of,
    share_of,
    turning_part,
    window_fields,
    window_kinds,
)
from .file import GgufHeader
from .hybrids import HYBRIDS
from .keys import Keys
from .mixtures import MIXTURES

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
    kind = max(sizes, key=lambda kind: sizes[kind])
    return None if kind in ("F32", "F16", "BF16") else Quantisation(kind)


def _common(k: Keys) -> dict:
    embeddings = k.header.tensors.get("token_embd.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise BadCheckpoint(f"{k.path} has no token_embd.weight: it holds no language model.")
    kinds = {"F32": "float32", "F16": "float16"}
    of_layers = k.first if k.architecture in _LAYERS_DIFFER else k.same
    head_dim, value_dim = k.get("attention.key_length"), k.get("attention.value_length")
    if head_dim != value_dim and k.architecture not in _LATENT:
        raise UnsupportedModel(f"{k.path}: keys of {head_dim} and values of {value_dim} numbers.")
    return {
        "hidden_size": k.get("embedding_length"),
        "intermediate_size": of_layers("feed_forward_length"),
        "num_hidden_layers": k.num_layers,
        "num_attention_heads": k.same("attention.head_count"),
        "num_key_value_heads": of_layers("attention.head_count_kv"),
        "head_dim": head_dim_of(k),
        "vocab_size": embeddings.shape[0],
        "max_position_embeddings": k.get("context_length"),
        "rms_norm_eps": k.get("attention.layer_norm_rms_epsilon"),
        "dtype": kinds.get(embeddings.kind, _QUANTISED),
        "tie_word_embeddings": "output.weight" not in k.header.tensors,
        "rope_theta": k.get("rope.freq_base", 10000.0),
        "rope_scaling": scaling_of(k),
    }


def _llama(k: Keys) -> dict:
    if k.get("expert_count"):
        return {"architectures": ["MixtralForCausalLM"], **expert_fields(k)}
    window = window_fields(k)
    if window["sliding_window"]:
        return {"architectures": ["MistralForCausalLM"], **window}
    return {"architectures": ["LlamaForCausalLM"]}


def _mistral3(k: Keys) -> dict:
    beta, scaling = k.get("attention.temperature_scale"), scaling_of(k) or {}
    scaling["llama_4_scaling_beta"] = beta
    every = k.get("rope.scaling.yarn_log_multiplier")
    if every:
        scaling |= {"mscale": 1.0, "mscale_all_dim": every}
    return {
        "architectures": ["Ministral3ForCausalLM"],
        "rope_scaling": {name: value for name, value in scaling.items() if value is not None},
        **window_fields(k),
    }


def _phi3(k: Keys) -> dict:
    return {
        "architectures": ["Phi3ForCausalLM"],
        "sliding_window": k.get("attention.sliding_window") or None,
        "partial_rotary_factor": turning_part(k, head_dim_of(k)),
    }


def _gemma2(k: Keys) -> dict:
    # Of 27B a score is divided by the root of another number than the head's.
    is_large = k.num_layers == 46
    return {
        "architectures": ["Gemma2ForCausalLM"],
        **window_fields(k),
        "sliding_window": k.get("attention.sliding_window", 4096),
        "query_pre_attn_scalar": _shared_dim(k) if is_large else head_dim_of(k),
        "attn_logit_softcapping": k.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": k.get("final_logit_softcapping", 30.0),
    }


def _gemma3(k: Keys) -> dict:
    is_large = k.num_layers == 62
    return {
        "architectures": ["Gemma3ForCausalLM"],
        **window_fields(k),
        "query_pre_attn_scalar": _shared_dim(k) if is_large else head_dim_of(k),
        "rope_local_base_freq": k.get("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": k.get("final_logit_softcapping"),
    }


def _gemma3n(k: Keys) -> dict:
    tensors = k.header.tensors
    table, left = map(tensors.get, ("per_layer_token_embd.weight", "blk.0.laurel_l.weight"))
    if table is None or left is None:
        raise BadCheckpoint(f"{k.path} lacks what the layers of Gemma 3n have of their own.")
    cutoffs = k.get("activation_sparsity_scale")
    is_known = isinstance(cutoffs, list) and all(isinstance(c, float) for c in cutoffs)
    return {
        "architectures": ["Gemma3nForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        **window_fields(k),
        "intermediate_size": k.get("feed_forward_length"),
        "rope_local_base_freq": k.get("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": k.get("final_logit_softcapping"),
        "num_kv_shared_layers": k.get("attention.shared_kv_layers", 0),
        "hidden_size_per_layer_input": k.get("embedding_length_per_layer_input"),
        "vocab_size_per_layer_input": table.shape[0],
        "altup_num_inputs": k.get("altup.num_inputs"),
        "altup_active_idx": k.get("altup.active_idx", 0),
        "laurel_rank": left.shape[0],
        # Files have float32's deviations of the shares that configurations have.
        "activation_sparsity_pattern": [round(NormalDist().cdf(c), 6) for c in cutoffs]
        if is_known
        else None,
    }


def _gemma4(k: Keys) -> dict:
    kinds, kv_heads = window_kinds(k), k.get("attention.head_count_kv")
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
    return share_of(k, "embedding_length", "attention.head_count")


def _olmo2(k: Keys) -> dict:
    windows = window_fields(k)
    name = "Olmo3ForCausalLM" if windows["sliding_window"] else "Olmo2ForCausalLM"
    return {"architectures": [name], **windows}


def _granite(k: Keys) -> dict:
    return {"architectures": ["GraniteForCausalLM"], **multiplier_fields(k)}


def _gpt_oss(k: Keys) -> dict:
    scaling = scaling_of(k)
    return {
        "architectures": ["GptOssForCausalLM"],
        **window_fields(k),
        **expert_fields(k),
        "intermediate_size": k.get("expert_feed_forward_length", k.same("feed_forward_length")),
        "rope_scaling": scaling and {**scaling, "truncate": False},
    }


def _glm4(k: Keys) -> dict:
    return {
        "architectures": ["Glm4ForCausalLM"],
        "partial_rotary_factor": turning_part(k, head_dim_of(k)),
    }


def _exaone4(k: Keys) -> dict:
    windows = window_fields(k)
    if windows["sliding_window"] is None:
        windows["sliding_window_pattern"] = 0
    return {"architectures": ["Exaone4ForCausalLM"], **windows}


def _cohere(k: Keys) -> dict:
    return {
        "architectures": ["CohereForCausalLM"],
        "layer_norm_eps": k.get("attention.layer_norm_epsilon"),
        "logit_scale": k.get("logit_scale"),
        "use_qk_norm": k.has("attn_q_norm.weight"),
    }


def _cohere2(k: Keys) -> dict:
    return {**_cohere(k), "architectures": ["Cohere2ForCausalLM"], **window_fields(k)}


def _starcoder2(k: Keys) -> dict:
    return {
        "architectures": ["Starcoder2ForCausalLM"],
        "norm_epsilon": k.get("attention.layer_norm_epsilon"),
        # Each model has one, and no file says it.
        "sliding_window": k.get("attention.sliding_window", 4096),
    }


def _apertus(k: Keys) -> dict:
    return {
        "architectures": ["ApertusForCausalLM"],
        "rope_scaling": scaling_of(k) or {"rope_type": "default"},
    }


def _layer_norms(name: str, eps: str) -> Callable[[Keys], dict]:
    """An architecture with layer norms, whose epsilon the field `eps` says, and RoPE on a part."""
    return lambda k: {
        "architectures": [name],
        eps: k.get("attention.layer_norm_epsilon"),
        # Whatever the file says: converters write true where config.json says nothing.
        "use_parallel_residual": not k.has("ffn_norm.weight"),
        "qk_layernorm": k.has("attn_q_norm.weight"),
        "partial_rotary_factor": turning_part(k, head_dim_of(k)),
    }


def _only(name: str, **fields) -> Callable[[Keys], dict]:
    """An architecture of which nothing is special."""
    return lambda k: {"architectures": [name], **fields}


ARCHITECTURES: dict[str, Callable[[Keys], dict]] = {
    "llama": _llama,
    "mistral3": _mistral3,
    "qwen2": _only("Qwen2ForCausalLM", use_sliding_window=False),
    "qwen3": _only("Qwen3ForCausalLM", use_sliding_window=False),
    "phi3": _phi3,
    "gemma": _only("GemmaForCausalLM"),
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3n": _gemma3n,
    "gemma4": _gemma4,
    "smollm3": _only("SmolLM3ForCausalLM"),
    "olmo": lambda k: {
        "architectures": ["OlmoForCausalLM"],
        "clip_qkv": k.get("attention.clamp_kqv") or None,
    },
    "olmo2": _olmo2,
    "granite": _granite,
    "gpt-oss": _gpt_oss,
    "glm4": _glm4,
    "exaone4": _exaone4,
    "seed_oss": _only("SeedOssForCausalLM"),
    "command-r": _cohere,
    "cohere2": _cohere2,
    "ernie4_5": _only("Ernie4_5ForCausalLM"),
    "hunyuan-dense": _only("HunYuanDenseV1ForCausalLM"),
    "arcee": _only("ArceeForCausalLM"),
    "apertus": _apertus,
    "starcoder2": _starcoder2,
    "nemotron": _layer_norms("NemotronForCausalLM", "norm_eps"),
    "stablelm": _layer_norms("StableLmForCausalLM", "layer_norm_eps"),
    "phi2": _layer_norms("PhiForCausalLM", "layer_norm_eps"),
    "jais2": _layer_norms("Jais2ForCausalLM", "layer_norm_eps"),
    # Of models for pictures too, whose other parts have files of their own.
    "qwen2vl": _only("Qwen2ForCausalLM", use_sliding_window=False),
    "qwen3vl": _only("Qwen3ForCausalLM", use_sliding_window=False),
    **MIXTURES,
    **HYBRIDS,
}
# Whose keys and values are made of a latent.
_LATENT = ("deepseek2", "minicpm3", "kimi-linear", "bailingmoe3")
# Whose layers may have other sizes than the first.
_LAYERS_DIFFER = ("gemma3n", "gemma4")
# Whose rows of queries and keys are in pairs.
IN_PAIRS = (
    *("llama", "mistral3", "smollm3", "olmo", "granite", "granitehybrid", "granitemoe"),
    "arcee",
)

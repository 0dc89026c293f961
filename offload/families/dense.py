"""The dense architectures: what sets each apart from plain Llama.

One entry in DENSE_FAMILIES for each, and a function from config.json to ModelConfig fields.
Everything the decoder can do is a field of ModelConfig, so a family that only mixes known features
needs nothing else. Those with routed experts and hybrids have a file each. Names of tensors follow
Hugging Face (skeleton.py). docs/models.md is made from these entries.
"""

from __future__ import annotations

from ..errors import UnsupportedModel
from ..models.config_fields import MOST_POSITIONS, Fields
from ..models.layer_config import Norms, QueryGrowth
from ..models.rope_config import RopeConfig, read_rope
from .family import Family


def llama(get: Fields, head_dim: int) -> dict:
    bias = get.flag("attention_bias", False)
    return {
        "ropes": (read_rope(get, head_dim),) * get.num_layers,
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": get.flag("mlp_bias", False),
    }


def qkv_clip(get: Fields) -> float:
    """The bound of queries, keys and values; 0 where the file says null or nothing."""
    return 0.0 if get.raw.get("clip_qkv") is None else get.positive("clip_qkv")


def mistral(get: Fields, head_dim: int) -> dict:
    return {
        "ropes": (read_rope(get, head_dim),) * get.num_layers,
        "windows": get.windows(lambda layer: True),
    }


def ministral3(get: Fields, head_dim: int) -> dict:
    if not any(get.raw.get(f"rope_{name}") for name in ("parameters", "scaling", "theta")):
        get = Fields({**get.raw, "rope_parameters": _MINISTRAL3_ROPE}, get.path)
    fields = mistral(get, head_dim)
    return {**fields, "query_growth": query_growth(get, fields["ropes"][0])}


def query_growth(get: Fields, rope: RopeConfig) -> QueryGrowth | None:
    """Queries grow with their position, as in Llama 4."""
    beta, original = (
        rope.parameters.get(name)
        for name in ("llama_4_scaling_beta", "original_max_position_embeddings")
    )
    if beta is None:
        return None
    nested = Fields({"beta": beta, "original": original}, get.path)
    beta = nested.number("beta", kind=float, low=0.0, high=100.0)
    return QueryGrowth(beta, nested.number("original", high=MOST_POSITIONS))


def qwen2(get: Fields, head_dim: int) -> dict:
    return {
        "ropes": (read_rope(get, head_dim),) * get.num_layers,
        "qkv_bias": True,
        "windows": _qwen_windows(get),
    }


def qwen3(get: Fields, head_dim: int) -> dict:
    bias = get.flag("attention_bias", False)
    return {**qwen2(get, head_dim), "qkv_bias": bias, "output_bias": bias, "qk_norm": "head"}


def _qwen_windows(get: Fields) -> tuple[int | None, ...]:
    """Windows only when switched on, and then from layer `max_window_layers` on."""
    if not get.flag("use_sliding_window", False):
        return (None,) * get.num_layers
    first = get.number("max_window_layers", 28, low=0)
    return get.windows(lambda layer: layer >= first)


def phi3(get: Fields, head_dim: int) -> dict:
    rope = read_rope(get, head_dim, share=1.0)
    return {
        "ropes": (rope,) * get.num_layers,
        "fused_qkv": True,
        "fused_gate_up": True,
        "windows": get.windows(lambda layer: True, default=None),
    }


def gemma(get: Fields, head_dim: int) -> dict:
    """Early files say gelu, and mean its approximation."""
    fields = _gemma(get, head_dim)
    return {**fields, "activation": "gelu_tanh"} if get.raw["hidden_act"] == "gelu" else fields


def _gemma(get: Fields, head_dim: int) -> dict:
    if get.flag("use_bidirectional_attention", False):
        raise UnsupportedModel(
            f"{get.path}: this model reads in both directions, as embedding models do, and writes "
            "no text."
        )
    bias = get.flag("attention_bias", False)
    return {
        "ropes": (read_rope(get, head_dim, layers="full_attention"),) * get.num_layers,
        "qkv_bias": bias,
        "output_bias": bias,
        "norm_offset": 1.0,
        "embedding_multiplier": get.number("hidden_size") ** 0.5,
    }


def gemma2(get: Fields, head_dim: int) -> dict:
    return {
        **_gemma(get, head_dim),
        "norms": GEMMA2_NORMS,
        "attention_scale": get.positive("query_pre_attn_scalar", 256) ** -0.5,
        "attention_softcap": softcap(get, "attn_logit_softcapping", 50.0),
        "logits_softcap": softcap(get, "final_logit_softcapping", 30.0),
        "windows": get.windows(lambda layer: layer % 2 == 0),
    }


def vaultgemma(get: Fields, head_dim: int) -> dict:
    return {**gemma2(get, head_dim), "norms": Norms(before_mlp="pre_feedforward_layernorm")}


def softcap(get: Fields, name: str, default: float | None) -> float:
    """A bound; 0 where the file says null, or nothing and the default is None."""
    return 0.0 if get.raw.get(name, default) is None else get.positive(name, default)


def gemma3(get: Fields, head_dim: int) -> dict:
    every = get.number("sliding_window_pattern", 6)

    def is_local(layer: int) -> bool:
        return (layer + 1) % every != 0

    theta = get.raw.get("rope_local_base_freq")
    return {
        **gemma2(get, head_dim),
        "attention_softcap": 0.0,
        "qk_norm": "head",
        "ropes": two_ropes(get, head_dim, is_local, 1e4 if theta is None else theta, 1e6),
        "windows": get.windows(is_local),
    }


def two_ropes(get: Fields, head_dim: int, is_local, local_theta, theta: float) -> tuple:
    """Layers with a window turn by an embedding of their own, which is never scaled."""
    everywhere = read_rope(get, head_dim, layers="full_attention", theta=theta)
    given = get.raw.get("rope_parameters")
    if isinstance(given, dict) and isinstance(given.get("sliding_attention"), dict):
        local = read_rope(get, head_dim, layers="sliding_attention", theta=local_theta)
    else:
        local = read_rope(Fields({"rope_theta": local_theta}, get.path), head_dim)
    return tuple(local if slides else everywhere for slides in get.slides(is_local))


def smollm3(get: Fields, head_dim: int) -> dict:
    fields = llama(get, head_dim)
    turns = get.per_layer("no_rope_layers")  # whether a layer turns: 1 or 0
    if turns is None:
        interval = get.number("no_rope_layer_interval", 4)
        turns = [(layer + 1) % interval != 0 for layer in range(get.num_layers)]
    if get.flag("use_sliding_window", False):
        fields["windows"] = get.windows(lambda layer: not turns[layer], default=None)
    ropes = [rope if turn else None for rope, turn in zip(fields["ropes"], turns, strict=True)]
    return {**fields, "ropes": tuple(ropes)}


def olmo2(get: Fields, head_dim: int) -> dict:
    bias = get.flag("attention_bias", False)
    return {
        "ropes": (read_rope(get, head_dim),) * get.num_layers,
        "qkv_bias": bias,
        "output_bias": bias,
        "qk_norm": "all",
        "norms": OLMO2_NORMS,
    }


def olmo3(get: Fields, head_dim: int) -> dict:
    def is_local(layer: int) -> bool:
        return (layer + 1) % 4 != 0

    theta = get.raw.get("rope_theta") or 5e5
    plain = Fields({**get.raw, "rope_parameters": None, "rope_scaling": None}, get.path)
    return {
        **olmo2(plain, head_dim),
        "ropes": two_ropes(get, head_dim, is_local, theta, theta),
        "windows": get.windows(is_local),
    }


def exaone4(get: Fields, head_dim: int) -> dict:
    pattern = get.raw.get("sliding_window_pattern")
    if not isinstance(pattern, str):  # a number, or letters such as LLLG
        pattern = "L" * (get.number("sliding_window_pattern", 4, low=0, high=4096) - 1) + "G"
    rope = read_rope(get, head_dim)
    windows = get.windows(lambda layer: bool(pattern) and pattern[layer % len(pattern)] == "L")
    mixed = get.raw.get("sliding_window", 4096) is not None
    return {
        **olmo2(get, head_dim),
        "qk_norm": "head",
        # Where some layers have windows, those without one have no positions either.
        "ropes": tuple(None if mixed and window is None else rope for window in windows),
        "windows": windows,
    }


def glm(get: Fields, head_dim: int) -> dict:
    rope = read_rope(get, head_dim, share=0.5, interleaved=True)
    return {
        "ropes": (rope,) * get.num_layers,
        "qkv_bias": get.flag("attention_bias", True),
        "fused_gate_up": True,
    }


def glm4(get: Fields, head_dim: int) -> dict:
    norms = Norms(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")
    return {**glm(get, head_dim), "norms": norms}


def ernie4_5(get: Fields, head_dim: int) -> dict:
    bias = get.flag("use_bias", False)
    return {
        "ropes": (read_rope(get, head_dim, theta=5e5, interleaved=True),) * get.num_layers,
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": bias,
    }


def hunyuan(get: Fields, head_dim: int) -> dict:
    """Heads are normed behind their turning. A "dynamic" scaling with an alpha depends on no
    length: it stretches the base, once and for all. Others have no use for an alpha."""
    given = get.raw.get("rope_parameters") or get.raw.get("rope_scaling")
    given = given if isinstance(given, dict) else {}
    kinds = given.get("rope_type"), given.get("type")
    if "dynamic" in kinds and given.get("alpha") is not None:
        base = Fields({"rope_theta": get.raw.get("rope_theta", 1e4), **given}, get.path)
        stretched = base.positive("alpha") ** (head_dim / (head_dim - 2))
        theta = base.positive("rope_theta") * stretched
        none = {"rope_parameters": None, "rope_scaling": None}
        get = Fields({**get.raw, **none, "rope_theta": theta}, get.path)
    return {
        **llama(get, head_dim),
        "mlp_bias": False,
        "qk_norm": "turned",
        "renamed": (
            (".self_attn.query_layernorm.", ".self_attn.q_norm."),
            (".self_attn.key_layernorm.", ".self_attn.k_norm."),
        ),
    }


def internlm3(get: Fields, head_dim: int) -> dict:
    others = get.flag("bias", get.flag("mlp_bias", False))
    return {
        **llama(get, head_dim),
        "qkv_bias": get.flag("qkv_bias", get.flag("attention_bias", False)),
        "output_bias": others,
        "mlp_bias": others,
    }


def cwm(get: Fields, head_dim: int) -> dict:
    return {
        **llama(get, head_dim),
        "qkv_bias": False,
        "output_bias": False,
        "windows": get.windows(lambda layer: layer % 4 != 0, default=8192),
    }


def helium(get: Fields, head_dim: int) -> dict:
    rope = read_rope(get, head_dim, theta=1e5, interleaved=True)
    return {**llama(get, head_dim), "ropes": (rope,) * get.num_layers, "output_bias": False}


def seed_oss(get: Fields, head_dim: int) -> dict:
    return {
        **llama(get, head_dim),
        "qkv_bias": get.flag("attention_bias", True),
        "output_bias": get.flag("attention_out_bias", False),
    }


_GEMMA = {"tie_word_embeddings": True, "head_dim": 256, "max_position_embeddings": 8192}
_GEMMA2 = {**_GEMMA, "num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh"}
_GEMMA3 = {
    **_GEMMA,
    "max_position_embeddings": 131072,
    "final_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh",
    # The larger models' files say of the text part what differs from these.
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
GEMMA2_NORMS = Norms(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
OLMO2_NORMS = Norms(
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)
OLMO = {"rms_norm_eps": 1e-5}
_CWM = {
    "rms_norm_eps": 1e-5,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 16.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
}
_ERNIE = {
    "rms_norm_eps": 1e-5,
    "head_dim": 128,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
_HELIUM = {
    "rms_norm_eps": 1e-8,
    "head_dim": 128,
    "num_key_value_heads": 20,
    "max_position_embeddings": 4096,
}
_INTERNLM3 = {
    "rms_norm_eps": 1e-5,
    "head_dim": 128,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}
_GLM = {
    "rms_norm_eps": 1.5625e-7,
    "head_dim": 128,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
}
MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072}
_MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_SEED_OSS = {"head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 524288}
_QWEN = {"max_position_embeddings": 32768}

DENSE_FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        "Llama 2, 3, 3.1, 3.2; SmolLM2; OpenLLaMA; whatever is converted to the layout",
        "RoPE scaled by linear, llama3, yarn or dynamic; biases where the file has them; gates of "
        "ReLU (ReluLLaMA)",
        llama,
    ),
    "IQuestCoderForCausalLM": Family(
        "IQuest-Coder V1 40B",
        "Llama's layers",
        llama,
        {"rms_norm_eps": 1e-5, "head_dim": 128, "num_key_value_heads": 8}
        | {"max_position_embeddings": 131072},
    ),
    "MistralForCausalLM": Family(
        "Mistral 7B, Nemo", "a sliding window in every layer", mistral, MISTRAL
    ),
    "MinistralForCausalLM": Family(
        "Ministral 8B", "sliding windows in some layers", mistral, MISTRAL
    ),
    "Ministral3ForCausalLM": Family(
        "Ministral 3 (text)",
        "yarn; queries that grow with their position",
        ministral3,
        {"sliding_window": None, "rms_norm_eps": 1e-5, "head_dim": 128}
        | {"num_key_value_heads": 8, "max_position_embeddings": 262144},
    ),
    "Qwen2ForCausalLM": Family(
        "Qwen2, Qwen2.5",
        "biases on queries, keys and values; windows from a layer on",
        qwen2,
        _QWEN,
    ),
    "Qwen3ForCausalLM": Family(
        "Qwen3 (dense)", "a norm on every query and key head", qwen3, {**_QWEN, "head_dim": 128}
    ),
    "Phi3ForCausalLM": Family(
        "Phi-3 mini and medium, Phi-3.5-mini, Phi-4, Phi-4-mini",
        "fused projections; RoPE on a part of each head; longrope",
        phi3,
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    ),
    "GemmaForCausalLM": Family(
        "Gemma 1",
        "norms of 1 + w; scaled embeddings; GELU",
        gemma,
        {**_GEMMA, "hidden_act": "gelu"},
    ),
    "Gemma2ForCausalLM": Family(
        "Gemma 2",
        "soft-caps of scores and logits; norms before and after; every other layer local",
        gemma2,
        _GEMMA2,
    ),
    "VaultGemmaForCausalLM": Family(
        "VaultGemma 1B", "Gemma 2 without norms after attention and MLP", vaultgemma, _GEMMA2
    ),
    "Gemma3ForCausalLM": Family(
        "Gemma 3 270M, 1B",
        "norms on query and key heads; local and global layers with a RoPE each",
        gemma3,
        _GEMMA3,
    ),
    "Gemma3ForConditionalGeneration": Family(
        "Gemma 3 4B, 12B, 27B (the text part)",
        "as Gemma 3; the vision part is not loaded",
        gemma3,
        _GEMMA3,
        text_config=True,
    ),
    "SmolLM3ForCausalLM": Family(
        "SmolLM3",
        "every fourth layer without positions; yarn",
        smollm3,
        {"tie_word_embeddings": True, "rope_theta": 2e6, "num_key_value_heads": 4} | _QWEN,
    ),
    "Olmo2ForCausalLM": Family(
        "OLMo 2", "norms after attention and MLP; one norm over all query heads", olmo2, OLMO
    ),
    "Olmo3ForCausalLM": Family(
        "OLMo 3", "OLMo 2 with windows; yarn in the global layers alone", olmo3, OLMO
    ),
    "GlmForCausalLM": Family(
        "GLM-4-9B (hf)",
        "interleaved RoPE on half of each head; fused gate and up; biases",
        glm,
        _GLM,
    ),
    "Glm4ForCausalLM": Family(
        "GLM-4-0414 9B, 32B", "as GLM, with norms after attention and MLP", glm4, _GLM
    ),
    "Exaone4ForCausalLM": Family(
        "EXAONE 4.0",
        "norms after attention and MLP; local layers turn, global ones have no positions",
        exaone4,
        {"rms_norm_eps": 1e-5},
    ),
    "Ernie4_5ForCausalLM": Family(
        "ERNIE 4.5 0.3B", "interleaved RoPE; biases where the file has them", ernie4_5, _ERNIE
    ),
    "HunYuanDenseV1ForCausalLM": Family(
        "Hunyuan 0.5B to 7B", "a norm on every query and key head behind RoPE", hunyuan, OLMO
    ),
    "InternLM3ForCausalLM": Family("InternLM3", "RoPE scaled by dynamic", internlm3, _INTERNLM3),
    "CwmForCausalLM": Family("CWM 32B", "windows in three of four layers; llama3", cwm, _CWM),
    "HeliumForCausalLM": Family("Helium 1 2B", "interleaved RoPE", helium, _HELIUM),
    "SeedOssForCausalLM": Family(
        "Seed-OSS", "biases on queries, keys and values", seed_oss, _SEED_OSS
    ),
}

"""The architectures with multi-head latent attention: what each is made of, from config.json. As
dense.py, whose mixtures of experts they share."""

from __future__ import annotations

import math
from dataclasses import replace

from ..errors import BadCheckpoint, UnsupportedModel
from ..models.config_fields import MOST_ROWS, Fields, is_number
from ..models.layer_config import HeadRows, Latent
from ..models.rope_config import RopeConfig, read_rope
from .dense import MISTRAL, ministral3, mistral, query_growth
from .family import Family
from .mixture import deepseek_experts, from_first_routed_on
from .routed import STACKED

_MOST_DIM = 4096


def deepseek_v2(get: Fields, head_dim: int) -> dict:
    method = get.raw.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise UnsupportedModel(
            f"{get.path}: topk_method {method!r} is not supported by this family. Supported: "
            "greedy, group_limited_greedy."
        )
    if get.flag("norm_topk_prob", False):
        raise UnsupportedModel(f"{get.path}: norm_topk_prob is not supported by this family.")
    experts = deepseek_experts(get, by_sigmoid=False, normalised=False)
    groups = experts.groups and replace(experts.groups, best=1)
    experts = replace(experts, groups=groups if method == "group_limited_greedy" else None)
    return {
        **latent_attention(get),
        "mlp_bias": get.flag("mlp_bias", False),
        "experts": from_first_routed_on(get, experts, 0),
        "stacked": STACKED,
    }


def deepseek_v3(get: Fields, head_dim: int) -> dict:
    experts = deepseek_experts(get)
    return {
        **latent_attention(get),
        "experts": from_first_routed_on(get, experts, 3),
        "stacked": STACKED,
    }


def glm4_moe_lite(get: Fields, head_dim: int) -> dict:
    return {
        **latent_attention(get),
        "experts": from_first_routed_on(get, deepseek_experts(get), 1),
        "stacked": STACKED,
    }


def mistral4(get: Fields, head_dim: int) -> dict:
    """Queries grow with their position, as in Ministral 3."""
    if not (get.raw.get("rope_parameters") or get.raw.get("rope_scaling")):
        get = Fields({**get.raw, "rope_parameters": _MISTRAL4_ROPE}, get.path)
    experts = replace(deepseek_experts(get, by_sigmoid=False), bias=None)
    fields = latent_attention(get)
    return {
        **fields,
        "query_growth": query_growth(get, fields["ropes"][0]),
        "experts": from_first_routed_on(get, experts, 0),
        "stacked": STACKED,
    }


def mistral3_text(get: Fields, head_dim: int) -> dict:
    """Files of one architecture hold the text parts of three."""
    kind = get.raw.get("model_type")
    part = {"mistral": mistral, "mistral4": mistral4}.get(kind) if isinstance(kind, str) else None
    return (part or ministral3)(get, head_dim)


def youtu(get: Fields, head_dim: int) -> dict:
    return latent_attention(get)


def minicpm3(get: Fields, head_dim: int) -> dict:
    """Halves turn, and what layers add is the smaller the more of them there are."""
    hidden, heads = get.number("hidden_size"), get.number("num_attention_heads")
    value_dim = get.number("v_head_dim", hidden // heads or None)
    get = Fields({**get.raw, "v_head_dim": value_dim, "rope_interleave": False}, get.path)
    depth = get.num_layers**0.5
    nulls = {"scale_depth": depth, "dim_model_base": hidden}  # what they stand for
    for name, value in nulls.items():
        if get.raw.get(name, value) is None:
            get = Fields({**get.raw, name: value}, get.path)
    return {
        **latent_attention(get),
        "mlp_bias": get.flag("mlp_bias", False),
        "embedding_multiplier": get.positive("scale_emb", 12),
        "residual_multiplier": get.positive("scale_depth", 1.4) / depth,
        "logits_divisor": hidden / get.positive("dim_model_base", 256),
    }


def latent_attention(get: Fields) -> dict:
    """The attention that all have."""
    rank = get.raw.get("q_lora_rank")
    latent = Latent(
        get.number("kv_lora_rank", high=_MOST_DIM),
        get.number("qk_rope_head_dim", high=_MOST_DIM),
        get.number("qk_nope_head_dim", high=_MOST_DIM),
        get.number("v_head_dim", high=_MOST_DIM),
        None if rank is None else get.number("q_lora_rank"),
        get.flag("attention_bias", False),
    )
    heads = get.number("num_attention_heads")
    if heads * (latent.query_dim + latent.value_dim) > MOST_ROWS:
        raise BadCheckpoint(f"{get.path}: {heads} heads of {latent} are more than any model has.")
    rope = _rope(get, latent)
    keys, both = latent.nope_dim, latent.nope_dim + latent.value_dim
    end, whole = "self_attn.kv_b_proj.weight", (heads * both, latent.rank)
    return {
        "latent": latent,
        "num_kv_heads": 1,
        "head_dim": latent.head_dim,
        "attention_scale": latent.query_dim**-0.5 * _magnitude(rope) ** 2,
        "ropes": (rope,) * get.num_layers,
        "head_rows": (
            HeadRows(end, "self_attn.k_b_proj.weight", whole, heads, (0, keys), turned=True),
            HeadRows(end, "self_attn.v_b_proj.weight", whole, heads, (keys, both)),
        ),
    }


def _rope(get: Fields, latent: Latent) -> RopeConfig:
    """Of the first numbers of what pages hold: the share of them is made to be those that turn."""
    interleaved = get.flag("rope_interleave", True)
    rope = read_rope(get, latent.rope_dim, share=1.0, interleaved=interleaved)
    # Files say how much of qk_rope_head_dim turns, or of a whole query: it is qk_rope_head_dim.
    if not any(math.isclose(rope.share, n) for n in (1.0, latent.rope_dim / latent.query_dim)):
        raise UnsupportedModel(
            f"{get.path}: partial_rotary_factor {rope.share} is not supported by this family."
        )
    # Above the quotient, so that its product with head_dim is no less than rope_dim.
    return replace(rope, share=math.nextafter(latent.rope_dim / latent.head_dim, 1))


def _magnitude(rope: RopeConfig) -> float:
    """What stretching by yarn multiplies queries and keys with, each, turned or not."""
    over, factor = rope.parameters.get("mscale_all_dim"), rope.parameters.get("factor")
    if rope.kind == "default" or not over or not is_number(factor) or factor <= 1:
        return 1.0
    return 0.1 * over * math.log(factor) + 1.0


_V2 = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "moe_intermediate_size": 1407,
    "num_experts_per_tok": 6,
}
_V3 = {
    **_V2,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "max_position_embeddings": 4096,
}
_GLM = {
    **_V2,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "n_shared_experts": 1,
    "moe_intermediate_size": 1536,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 1.8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 202752,
}
_MISTRAL4_ROPE = {
    "rope_type": "yarn",
    "factor": 128.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_MISTRAL4 = {
    **_V2,
    "kv_lora_rank": 256,
    "q_lora_rank": 1024,
    "qk_nope_head_dim": 64,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 1048576,
}

LATENT_FAMILIES: dict[str, Family] = {
    "DeepseekV2ForCausalLM": Family(
        "DeepSeek-V2, V2-Lite, Coder-V2",
        "latent attention; routed experts beside shared ones, in V2 limited to some groups",
        deepseek_v2,
        _V2,
    ),
    "DeepseekV3ForCausalLM": Family(
        "DeepSeek-V3, R1; Moonlight, Kimi K2 (with a tokenizer.json)",
        "latent attention; experts chosen by sigmoids and a bias, limited to some groups",
        deepseek_v3,
        _V3,
    ),
    "Glm4MoeLiteForCausalLM": Family(
        "GLM-4.7-Flash", "latent attention; DeepSeek-V3's experts", glm4_moe_lite, _GLM
    ),
    "Mistral4ForCausalLM": Family(
        "Mistral Small 4 (text)",
        "latent attention; routed experts and shared ones; queries that grow",
        mistral4,
        _MISTRAL4,
    ),
    "Mistral3ForConditionalGeneration": Family(
        "Mistral Small 3.1, 3.2, Ministral 3, Mistral Small 4 (the text part)",
        "as Mistral, Ministral 3 and Mistral 4; the vision part is not loaded",
        mistral3_text,
        {**MISTRAL, "sliding_window": None, "rms_norm_eps": 1e-5, "head_dim": 128},
        text_config=True,
    ),
    "YoutuForCausalLM": Family(
        "Youtu-LLM",
        "latent attention in a dense model",
        youtu,
        {**_V2, "tie_word_embeddings": True, "max_position_embeddings": 131072},
    ),
    "MiniCPM3ForCausalLM": Family(
        "MiniCPM3 4B",
        "latent attention in a dense model; multipliers of embeddings, residuals and logits",
        minicpm3,
        {"kv_lora_rank": 256, "q_lora_rank": 768, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32}
        | {"rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "tie_word_embeddings": True},
    ),
}

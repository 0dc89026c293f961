"""The architectures of models for pictures and videos whose text part is a language model that is
made elsewhere: only that part is loaded. As dense.py; some stand beside their text models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..errors import UnsupportedModel
from ..models.config_fields import Fields
from .cohere import COHERE, cohere2
from .conv import LFM2, LFM3, lfm2, lfm3
from .dense import exaone4, glm4, llama, qwen2, qwen3
from .family import Family
from .hybrid import QWEN3_5, qwen3_5
from .mixture import glm4_moe
from .routed import STACKED, qwen3_experts, qwen3_moe

_MakeFields = Callable[[Fields, int], dict]


def qwen3_vl_moe(get: Fields, head_dim: int) -> dict:
    """Files hold experts by columns, and their weights always sum to one."""
    fields = qwen3_moe(get, head_dim)
    experts = tuple(e and replace(e, normalised=True) for e in qwen3_experts(get, 60))
    stacked = tuple(replace(tensor, by_columns=True) for tensor in STACKED)
    return {**fields, "experts": experts, "stacked": stacked}


def _by_kind(**known: _MakeFields) -> _MakeFields:
    """Of text parts that may be of several makes: that which model_type names, or the first."""

    def fields(get: Fields, head_dim: int) -> dict:
        kind = get.raw.get("model_type", next(iter(known)))
        if not isinstance(kind, str) or kind not in known:
            raise UnsupportedModel(
                f"{get.path}: a text part of the model_type {kind!r} is not supported by this "
                f"family. Supported: {', '.join(known)}."
            )
        return known[kind](get, head_dim)

    return fields


def _stacked_qwen3_moe(get: Fields, head_dim: int) -> dict:
    return {**qwen3_moe(get, head_dim), "stacked": STACKED}


def _part(title: str, of: str, fields, defaults: dict) -> Family:
    features = f"as {of}; the other parts are not loaded"
    return Family(f"{title} (the text part)", features, fields, defaults, text_config=True)


_QWEN2_VL = {
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "max_window_layers": 80,
}
_QWEN3_VL = {"max_position_embeddings": 128000, "rope_theta": 5e5, "head_dim": 128}
_GLM = {"rms_norm_eps": 1e-5, "num_key_value_heads": 2, "max_position_embeddings": 32768}
_GLM_MOE = {
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "max_position_embeddings": 65536,
    "attention_bias": True,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1408,
}

TEXT_PART_FAMILIES: dict[str, Family] = {
    "Qwen2VLForConditionalGeneration": _part("Qwen2-VL", "Qwen2", qwen2, _QWEN2_VL),
    "Qwen2_5_VLForConditionalGeneration": _part("Qwen2.5-VL", "Qwen2.5", qwen2, _QWEN2_VL),
    "Qwen3VLForConditionalGeneration": _part(
        "Qwen3-VL 2B to 32B", "Qwen3", qwen3, {**_QWEN3_VL, "num_key_value_heads": 32}
    ),
    "Qwen3VLMoeForConditionalGeneration": _part(
        "Qwen3-VL 30B-A3B, 235B-A22B",
        "Qwen3 MoE",
        qwen3_vl_moe,
        {"max_position_embeddings": 128000, "rope_theta": 5e5, "num_key_value_heads": 16}
        | {"num_experts_per_tok": 4, "moe_intermediate_size": 1408}
        | {"intermediate_size": 5632},
    ),
    # Of heads all pairs turn where files say nothing else, and of the mixture's a half.
    "Glm4vForConditionalGeneration": _part(
        "GLM-4.1V, 4.6V-Flash 9B", "GLM-4-0414", glm4, {**_GLM, "partial_rotary_factor": 1.0}
    ),
    "Glm4vMoeForConditionalGeneration": _part("GLM-4.5V, 4.6V", "GLM-4.5", glm4_moe, _GLM_MOE),
    "Exaone4_5_ForConditionalGeneration": _part(
        "EXAONE 4.5", "EXAONE 4.0", exaone4, {"rms_norm_eps": 1e-5}
    ),
    "InternVLForConditionalGeneration": _part(
        "InternVL 3, 3.5 in the hf layout",
        "Qwen2, Qwen3 or Qwen3 MoE",
        _by_kind(qwen2=qwen2, qwen3=qwen3, qwen3_moe=_stacked_qwen3_moe),
        {"max_position_embeddings": 32768},
    ),
    "Idefics3ForConditionalGeneration": _part(
        "SmolVLM, Idefics 3", "SmolLM2 and Llama 3", _by_kind(llama=llama), {"rms_norm_eps": 1e-5}
    ),
    "SmolVLMForConditionalGeneration": _part(
        "SmolVLM 2", "SmolLM2", _by_kind(llama=llama), {"rms_norm_eps": 1e-5}
    ),
    "AyaVisionForConditionalGeneration": _part(
        "Aya Vision", "Command R7B", _by_kind(cohere2=cohere2), COHERE
    ),
    "Cohere2VisionForConditionalGeneration": _part(
        "Command A Vision", "Command A", _by_kind(cohere2=cohere2), COHERE
    ),
    "MiniCPMV4_6ForConditionalGeneration": _part("MiniCPM-V 4.6", "Qwen3.5", qwen3_5, QWEN3_5),
    "MiniCPMV4_7ForConditionalGeneration": _part("MiniCPM-V 4.7", "Qwen3.5", qwen3_5, QWEN3_5),
    "Lfm2VlForConditionalGeneration": _part("LFM2-VL", "LFM2", _by_kind(lfm2=lfm2), LFM2),
    "Lfm3VlForConditionalGeneration": _part("LFM3-VL 2B", "LFM3", _by_kind(lfm3=lfm3), LFM3),
}

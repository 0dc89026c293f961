"""What several architectures say alike in a GGUF file, as fields of config.json."""

from __future__ import annotations

from ..errors import UnsupportedModel
from .keys import Keys


def scaling_of(k: Keys) -> dict | None:
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


def turning_part(k: Keys, head_dim: int | None) -> float | None:
    """The part of a head that turns."""
    width = k.get("rope.dimension_count")
    if not isinstance(width, int) or not isinstance(head_dim, int) or not head_dim:
        return None
    return width / head_dim


def window_kinds(k: Keys) -> list[str] | None:
    """Which layers have a window, where the file says so one by one."""
    pattern = k.get("attention.sliding_window_pattern")
    if not isinstance(pattern, list):
        return None
    return ["sliding_attention" if local else "full_attention" for local in pattern]


def window_fields(k: Keys) -> dict:
    pattern = k.get("attention.sliding_window_pattern")
    return {
        "sliding_window": k.get("attention.sliding_window") or None,
        "layer_types": window_kinds(k),
        "sliding_window_pattern": pattern if isinstance(pattern, int) else None,
    }


def expert_fields(k: Keys) -> dict:
    return {
        "num_local_experts": k.get("expert_count"),
        "num_experts_per_tok": k.get("expert_used_count"),
        "moe_intermediate_size": k.get("expert_feed_forward_length"),
    }


def routed_fields(k: Keys) -> dict:
    """Of Qwen's mixtures, which may have dense layers among them."""
    routed = k.layers_with("ffn_gate_inp.weight")
    return {
        **expert_fields(k),
        "norm_topk_prob": True,
        "mlp_only_layers": [layer for layer, here in enumerate(routed) if not here],
    }


def head_dim_of(k: Keys) -> int | None:
    said = k.get("attention.key_length")
    return share_of(k, "embedding_length", "attention.head_count") if said is None else said


def share_of(k: Keys, whole: str, count: str) -> int | None:
    """How much of a number each of so many has; None where it is not said."""
    total, parts = k.same(whole), k.same(count)
    if not (isinstance(total, int) and isinstance(parts, int) and total > 0 and parts > 0):
        return None
    return total // parts


def multiplier_fields(k: Keys) -> dict:
    return {
        "attention_multiplier": k.get("attention.scale"),
        "embedding_multiplier": k.get("embedding_scale"),
        "residual_multiplier": k.get("residual_scale"),
        "logits_scaling": k.get("logit_scale"),
    }

"""Muse Glimmer, whose files hold other parts beside its language model: what that is made of, from
config.json. As dense.py."""

from __future__ import annotations

from ..models.config_fields import Fields
from ..models.rope_config import read_rope, ropes_by_theta
from .dense import GEMMA2_NORMS
from .family import Family


def muse_glimmer(get: Fields, head_dim: int) -> dict:
    """Gemma 2's norms; the last layer and every fourth before it see everything, and have no
    positions; attention is gated, and norms of queries, keys and embeddings have no weights."""
    last = get.num_layers - 1

    def is_local(layer: int) -> bool:
        return (last - layer) % 4 != 0

    bias = get.flag("attention_bias", False)
    return {
        "norms": GEMMA2_NORMS,
        "norm_offset": 1.0,
        "final_norm_offset": 0.0,
        "after_norm_eps": get.number("post_norm_eps", 1e-8, kind=float, low=0.0, high=1.0),
        "unit_norms": (".self_attn.q_norm.", ".self_attn.k_norm."),
        "embedding_norm": True,
        "qkv_bias": bias,
        "output_bias": bias,
        "qk_norm": "head",
        "gate_projection": "number",
        "attention_scale": head_dim**-0.5 * get.positive("qk_scale_factor", 3.87),
        "logits_divisor": 1 / get.positive("output_multiplier", 0.19611613513818404),
        "logits_softcap": get.positive("final_logit_softcapping", 20.0),
        "ropes": ropes_by_theta(get, read_rope(get, head_dim), is_local),
        "windows": get.windows(is_local, default=2048),
    }


MUSE_FAMILIES: dict[str, Family] = {
    "MuseGlimmerForConditionalGeneration": Family(
        "Muse Glimmer 30B (the text part)",
        "gated attention; norms before and after, and without weights of embeddings and heads; "
        "local layers turn, global ones have no positions; the other parts are not loaded",
        muse_glimmer,
        {"rms_norm_eps": 1e-5, "head_dim": 128, "num_key_value_heads": 2}
        | {"max_position_embeddings": 131072},
        text_config=True,
    ),
}

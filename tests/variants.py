"""Small checkpoints that the tests make and compare with transformers: what several share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

WINDOW = 48  # tokens; below every test's length, and no multiple of a usual page
WINDOW_TYPES = ["full_attention", "sliding_attention"]


def rope(theta: float | None = 10000.0, **scaling: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **scaling}


def yarn(original: int = 512, **more: Any) -> dict[str, Any]:
    scaling = {"factor": 4.0, "original_max_position_embeddings": original, **more}
    return rope(1e6, rope_type="yarn", **scaling)


def types(pattern: str) -> list[str]:
    """L = a layer with a window, G = one without."""
    return [WINDOW_TYPES[letter == "L"] for letter in pattern]


@dataclass(frozen=True)
class Variant:
    """architecture: transformers' name without ForCausalLM. config: what differs from the small
    model of random_checkpoints.py. hub: fields that the hub's layout has besides, ... for one that
    it has not. shows: what a test of this variant would notice. recurrent: whether some layers keep
    a state in place of keys and values.
    """

    architecture: str
    shows: str
    config: dict[str, Any] = field(default_factory=dict)
    hub: dict[str, Any] = field(default_factory=dict)
    recurrent: bool = False


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
HUB_EXPERTS = {"num_experts": 8, "num_local_experts": ...}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_d_head": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}
GRANITE = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.6,
    "logits_scaling": 1.5,
}
GRANITE_H = {
    **MAMBA,
    **GRANITE,
    "shared_intermediate_size": 80,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}

"""Cohere's architectures, whose attention and MLP read the same norm and stand side by side: what
each is made of, from config.json. As dense.py, in whose models one follows the other."""

from __future__ import annotations

from ..errors import UnsupportedModel
from ..models.config_fields import MOST_POSITIONS, Fields
from ..models.layer_config import Experts, Norms
from ..models.rope_config import read_rope
from .dense import llama
from .family import Family
from .gateless import layer_norms
from .routed import checked_experts, num_experts


def cohere(get: Fields, head_dim: int) -> dict:
    own_norms = "each" if get.flag("use_qk_norm", False) else ""
    return {**_cohere(get, head_dim, 5e5), "qk_norm": own_norms}


def _cohere(get: Fields, head_dim: int, theta: float) -> dict:
    rope = read_rope(get, head_dim, theta=theta, interleaved=True)
    # Files of Command R say the size of a mask as the greatest length, and the length beside it.
    masked = get.number("max_position_embeddings", high=MOST_POSITIONS)
    length = get.number("model_max_length", masked, high=MOST_POSITIONS)
    return {
        **llama(get, head_dim),
        "max_positions": max(masked, length),
        **layer_norms(get, "layer_norm_eps", bias=False),
        "ropes": (rope,) * get.num_layers,
        "mlp_bias": False,
        "norms": Norms(before_mlp=None),
        "parallel_mlp": True,
        "logits_divisor": 1 / get.positive("logit_scale", 0.0625),
    }


def cohere2(get: Fields, head_dim: int) -> dict:
    """Local layers turn; those that see everything have no positions."""
    every = get.number("sliding_window_pattern", 4)
    windows = get.windows(lambda layer: (layer + 1) % every != 0)
    fields = _cohere(get, head_dim, 1e4)
    ropes = zip(fields["ropes"], windows, strict=True)
    return {
        **fields,
        "ropes": tuple(None if window is None else rope for rope, window in ropes),
        "windows": windows,
    }


def cohere2_moe(get: Fields, head_dim: int) -> dict:
    """Behind dense layers, whose windows have a pattern of their own, routed experts."""
    layers, dense = get.num_layers, get.number("first_k_dense_replace", 0, low=0)
    kinds = get.per_layer("mlp_layer_types")
    if kinds is None:
        kinds = ["dense" if layer < dense else "sparse" for layer in range(layers)]
    every = get.number("sliding_window_pattern", 4)
    of_dense = get.number("prefix_dense_sliding_window_pattern", 1)

    def is_local(layer: int) -> bool:
        return bool((layer + 1) % of_dense if layer < dense else (layer - dense + 1) % every)

    windows, fields = get.windows(is_local), _cohere(get, head_dim, 1e4)
    turns = [
        window is not None or (kind == "dense" and of_dense == 1)
        for window, kind in zip(windows, kinds, strict=True)
    ]
    if get.raw.get("rms_norm_eps") is not None:
        eps = get.number("rms_norm_eps", kind=float, low=0.0, high=1.0)
        fields |= {"layer_norm": False, "norm_eps": eps}
    experts = _cohere2_experts(get)
    return {
        **fields,
        "ropes": tuple(r if t else None for r, t in zip(fields["ropes"], turns, strict=True)),
        "windows": windows,
        "intermediate_size": get.number(
            "prefix_dense_intermediate_size", get.raw.get("intermediate_size")
        ),
        "experts": tuple(experts if kind == "sparse" else None for kind in kinds),
    }


def _cohere2_experts(get: Fields) -> Experts:
    size = get.number("intermediate_size")
    chosen_by = get.raw.get("expert_selection_fn") or "softmax"
    joined = get.raw.get("shared_expert_combination_strategy") or "average"
    if chosen_by not in ("softmax", "sigmoid") or joined not in ("average", "sum"):
        raise UnsupportedModel(
            f"{get.path}: expert_selection_fn {chosen_by!r} and shared_expert_combination_strategy "
            f"{joined!r} are not supported. Supported: softmax, sigmoid; average, sum."
        )
    shared = get.number("num_shared_experts", 0, low=0, high=64)
    share = 0.5 if shared and joined == "average" else 1.0
    by_sigmoid = chosen_by == "sigmoid"
    return checked_experts(
        get,
        Experts(
            num_experts(get, 8),
            get.number("num_experts_per_tok", 2),
            size,
            get.flag("norm_topk_prob", True) if by_sigmoid else True,
            by_sigmoid=by_sigmoid,
            least_sum=0.0,
            scaling=share,
            shared_size=shared * size,
            shared="mlp.shared_experts",
            shared_gate=None,
            shared_scaling=share,
        ),
    )


COHERE = {"tie_word_embeddings": True, "max_position_embeddings": 8192}

COHERE_FAMILIES: dict[str, Family] = {
    "CohereForCausalLM": Family(
        "Command R, Command R+, Aya 23, Aya Expanse",
        "attention and MLP side by side behind one layer norm; interleaved RoPE; in some a norm of "
        "its own for every query and key head",
        cohere,
        COHERE,
    ),
    "Cohere2ForCausalLM": Family(
        "Command R7B, Command A, Tiny Aya",
        "as Command R, with windows in three of four layers and no positions in the fourth",
        cohere2,
        COHERE,
    ),
    "Cohere2MoeForCausalLM": Family(
        "Command A+",
        "as Command A, with routed experts and shared ones",
        cohere2_moe,
        {**COHERE, "head_dim": 128},
    ),
}

"""The architectures of large mixtures of experts with plain attention, and the experts that they
share with those of latent attention: what each is made of, from config.json. As dense.py."""

from __future__ import annotations

from dataclasses import replace

from ...kernels.routing import Groups
from ..errors import BadCheckpoint, UnsupportedModel
from ..models.config_fields import Fields, check_heads
from ..models.layer_config import AttentionShape, Experts, Norms
from ..models.rope_config import read_rope
from .dense import exaone4, llama, qwen2, qwen3
from .family import Family
from .routed import (
    STACKED,
    checked_experts,
    num_experts,
    qwen3_experts,
    qwen3_experts_of_one,
    with_shared,
)


def deepseek_experts(
    get: Fields,
    *,
    count: str = "n_routed_experts",
    shared: str = "n_shared_experts",
    by_sigmoid: bool = True,
    normalised: bool = True,
) -> Experts:
    """DeepSeek-V3's, which others have too: scores are sigmoids, a bias counts for the choice
    alone, and experts that every token goes through are one. count, shared: fields of config.json.
    """
    inner = get.number("moe_intermediate_size")
    if get.number("moe_layer_freq", 1) != 1:
        raise UnsupportedModel(f"{get.path}: moe_layer_freq is not 1, which it is for this family.")
    experts = Experts(
        get.number(count),
        get.number("num_experts_per_tok"),
        inner,
        get.flag("norm_topk_prob", normalised),
        by_sigmoid=by_sigmoid,
        bias="mlp.gate.e_score_correction_bias" if by_sigmoid else None,
        scaling=get.positive("routed_scaling_factor", 1.0),
        least_sum=1e-20,
        shared_size=inner * get.number(shared, 1, low=0),
        shared="mlp.shared_experts",
        shared_gate=None,
    )
    return replace(checked_experts(get, experts), groups=expert_groups(get, experts))


def expert_groups(get: Fields, experts: Experts) -> Groups | None:
    """The groups that limit a choice, by the sum of their two best; None where all are chosen."""
    count = get.number("n_group", 1)
    chosen = get.number("topk_group", 1)
    each = experts.count // count
    if experts.count % count or chosen > count or experts.chosen > chosen * each:
        raise BadCheckpoint(
            f"{get.path}: {experts.chosen} of {experts.count} experts cannot be chosen from "
            f"{chosen} of {count} groups."
        )
    return Groups(count, chosen, min(2, each)) if chosen < count else None


def from_first_routed_on(get: Fields, experts: Experts, dense: int) -> tuple[Experts | None, ...]:
    """Of each layer: none where mlp_layer_types says "dense"; without it, in the first layers, as
    many as first_k_dense_replace says, or `dense`."""
    kinds = get.per_layer("mlp_layer_types")
    if kinds is None:
        first = get.number("first_k_dense_replace", dense, low=0)
        kinds = ["dense" if layer < first else "sparse" for layer in range(get.num_layers)]
    return tuple(experts if kind == "sparse" else None for kind in kinds)


def glm4_moe(get: Fields, head_dim: int) -> dict:
    rope = read_rope(get, head_dim, share=0.5)
    return {
        "ropes": (rope,) * get.num_layers,
        "qkv_bias": get.flag("attention_bias", False),
        "qk_norm": "head" if get.flag("use_qk_norm", False) else "",
        "experts": from_first_routed_on(get, deepseek_experts(get), 1),
        "stacked": STACKED,
    }


def dots1(get: Fields, head_dim: int) -> dict:
    first = get.number("max_window_layers", 62, low=0)
    experts = deepseek_experts(get, normalised=False)
    return {
        **qwen3(get, head_dim),
        "windows": get.windows(lambda layer: layer >= first),
        "experts": from_first_routed_on(get, experts, 0),
        "stacked": STACKED,
    }


def minimax_m2(get: Fields, head_dim: int) -> dict:
    block = "block_sparse_moe"
    experts = Experts(
        get.number("num_local_experts", 256),
        get.number("num_experts_per_tok", 8),
        get.number("intermediate_size"),
        router=f"{block}.gate",
        gate=f"{block}.experts.{{}}.w1",
        up=f"{block}.experts.{{}}.w3",
        down=f"{block}.experts.{{}}.w2",
        by_sigmoid=True,
        bias=f"{block}.e_score_correction_bias",
        least_sum=0.0,
    )
    width = get.number("rotary_dim", head_dim)
    return {
        "ropes": (read_rope(get, head_dim, theta=5e6, share=width / head_dim),) * get.num_layers,
        "qk_norm": "all",
        "experts": (checked_experts(get, experts),) * get.num_layers,
    }


def qwen2_moe(get: Fields, head_dim: int) -> dict:
    last, fields = get.number("max_window_layers", 28, low=0), qwen2(get, head_dim)
    if get.flag("use_sliding_window", False):
        fields["windows"] = get.windows(lambda layer: layer % 2 == 0 and layer < last)
    return {
        **fields,
        "qkv_bias": get.flag("qkv_bias", True),
        "experts": with_shared(get, qwen3_experts(get, 60), 5632),
        "stacked": STACKED,
    }


def exaone_moe(get: Fields, head_dim: int) -> dict:
    experts = deepseek_experts(get, count="num_experts", shared="num_shared_experts")
    return {
        **exaone4(get, head_dim),
        "norms": Norms(),
        "experts": from_first_routed_on(get, experts, 1),
        "renamed": ((".mlp.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),),
        "stacked": STACKED,
    }


def afmoe(get: Fields, head_dim: int) -> dict:
    every = get.number("global_attn_every_n_layers", 4)
    fields, hidden = llama(get, head_dim), get.number("hidden_size")
    slides = get.slides(lambda layer: (layer + 1) % every != 0)
    inner = get.number("moe_intermediate_size", 1408)
    experts = Experts(
        num_experts(get, 64),
        get.number("num_experts_per_tok", 6),
        inner,
        router="mlp.router.gate",
        by_sigmoid=True,
        bias="mlp.expert_bias",
        scaling=get.positive("route_scale", 1.0),
        least_sum=1e-20,
        shared_size=inner * get.number("num_shared_experts", 2, low=0),
        shared="mlp.shared_experts",
        shared_gate=None,
    )
    dense = get.number("num_dense_layers", 1, low=0)
    return {
        **fields,
        "mlp_bias": False,
        "ropes": tuple(fields["ropes"][0] if slide else None for slide in slides),
        "windows": get.windows(lambda layer: slides[layer], default=1024),
        "norms": Norms(
            after_attention="post_attention_layernorm",
            before_mlp="pre_mlp_layernorm",
            after_mlp="post_mlp_layernorm",
        ),
        "qk_norm": "head",
        "gate_projection": "number",
        "embedding_multiplier": hidden**0.5 if get.flag("mup_enabled", False) else 1.0,
        "experts": tuple(
            None if layer < dense else checked_experts(get, experts)
            for layer in range(get.num_layers)
        ),
        "stacked": STACKED,
    }


def laguna(get: Fields, head_dim: int) -> dict:
    """Layers of either kind have as many query heads as the file says, a RoPE of their kind, and
    gates on attention."""
    for name in ("moe_apply_router_weight_on_input", "moe_router_logit_softcapping"):
        if get.raw.get(name):
            raise UnsupportedModel(f"{get.path}: {name} is not supported by this family.")
    kv_heads, bias = get.number("num_key_value_heads"), get.flag("attention_bias", False)
    heads = get.per_layer("num_attention_heads_per_layer")
    heads = heads or [get.number("num_attention_heads")] * get.num_layers
    heads = [
        Fields({"num_attention_heads": n}, get.path).number("num_attention_heads") for n in heads
    ]
    for count in set(heads):
        check_heads(get.path, count, kv_heads, head_dim)
    kinds = [
        "sliding_attention" if slide else "full_attention" for slide in get.slides(lambda _: False)
    ]
    given = get.raw.get("rope_parameters") or _LAGUNA_ROPES
    turning = Fields({**get.raw, "rope_parameters": given}, get.path)
    ropes = {kind: read_rope(turning, head_dim, layers=kind, share=1.0) for kind in set(kinds)}
    gating = get.raw.get("gating", True)
    if gating not in (True, "per-head", "per-element"):
        raise UnsupportedModel(
            f"{get.path}: gating {gating!r} is not supported. Supported: true, per-head, "
            "per-element."
        )
    experts = Experts(
        num_experts(get, 256),
        get.number("num_experts_per_tok"),
        get.number("moe_intermediate_size"),
        by_sigmoid=True,
        bias="mlp.gate.e_score_correction_bias",
        least_sum=0.0,
        scaling=get.positive("moe_routed_scaling_factor", 1.0),
        shared_size=get.number("shared_expert_intermediate_size", 512),
        shared="mlp.shared_experts",
        shared_gate=None,
    )
    return {
        "num_heads": max(heads),
        "attention_shapes": tuple(AttentionShape(kv_heads, head_dim, num_heads=n) for n in heads),
        "ropes": tuple(ropes[kind] for kind in kinds),
        "windows": get.windows(lambda layer: False, default=512),
        "qkv_bias": bias,
        "output_bias": bias,
        "qk_norm": "head",
        "gate_projection": "number" if gating == "per-element" else "head",
        "gate_activation": "softplus",
        "experts": from_first_routed_on(get, checked_experts(get, experts), 1),
        "renamed": (
            (".self_attn.g_proj.", ".self_attn.gate_proj."),
            (".mlp.experts.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),
            (".mlp.shared_expert.", ".mlp.shared_experts."),
        ),
        "stacked": STACKED,
    }


_LAGUNA_ROPES = {
    "full_attention": {
        "rope_type": "default",
        "rope_theta": 5e5,
        "partial_rotary_factor": 0.5,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def solar_open(get: Fields, head_dim: int) -> dict:
    return {
        "ropes": (read_rope(get, head_dim, theta=1e6, share=1.0),) * get.num_layers,
        "qkv_bias": get.flag("attention_bias", False),
        "experts": (deepseek_experts(get),) * get.num_layers,
        "stacked": STACKED,
    }


def hy_v3(get: Fields, head_dim: int) -> dict:
    """Whatever the file says, experts have no groups, and their weights sum to one."""
    get = Fields({**get.raw, "n_group": 1, "topk_group": 1, "norm_topk_prob": True}, get.path)
    experts = replace(
        deepseek_experts(get, count="num_experts", shared="num_shared_experts"),
        bias="mlp.e_score_correction_bias",
        scaling=get.positive("router_scaling_factor", 2.826),
    )
    fields = llama(get, head_dim)
    return {
        **fields,
        "ropes": (read_rope(get, head_dim, theta=11158840.0),) * get.num_layers,
        "qk_norm": "head",
        "experts": from_first_routed_on(get, experts, 1),
        "renamed": (
            (".mlp.router.gate.", ".mlp.gate."),
            (".mlp.expert_bias", ".mlp.e_score_correction_bias"),
            (".mlp.shared_mlp.", ".mlp.shared_experts."),
        ),
        "stacked": STACKED,
    }


def flint(get: Fields, head_dim: int) -> dict:
    """The first two layers, the last and every fourth see everything, and have no positions."""
    layers = get.num_layers
    bias = get.flag("attention_bias", False)
    windows = get.windows(
        lambda layer: layer >= 2 and layer % 4 != 1 and layer != layers - 1, default=513
    )
    rope = read_rope(get, head_dim)
    experts = with_shared(get, qwen3_experts(get, 256), 1024)
    by_sigmoid = {"by_sigmoid": True, "least_sum": 0.0, "shared_gate": None}
    return {
        "ropes": tuple(None if window is None else rope for window in windows),
        "windows": windows,
        "qkv_bias": bias,
        "output_bias": bias,
        "qk_norm": "head",
        "null_scores": True,
        "experts": tuple(e and replace(e, **by_sigmoid) for e in experts),
        "renamed": ((".self_attn.softmax_offset", ".self_attn.sinks"),),
        "stacked": STACKED,
    }


def kolibri(get: Fields, head_dim: int) -> dict:
    """Local layers turn; every fifth one sees everything, and has no positions."""
    windows = get.windows(lambda layer: (layer + 1) % 5 != 0, default=513)
    rope = read_rope(get, head_dim)
    experts = replace(
        qwen3_experts_of_one(get, 384),
        by_sigmoid=True,
        bias="mlp.gate.e_score_correction_bias",
        bias_of_scores=True,
        least_sum=0.0,
        shared_size=get.number("shared_expert_intermediate_size", 512),
        shared="mlp.shared_experts",
        shared_gate=None,
    )
    return {
        "ropes": tuple(None if window is None else rope for window in windows),
        "windows": windows,
        "qk_norm": "head",
        "norms": Norms(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"),
        "experts": (experts,) * get.num_layers,
        "renamed": (
            (".moe.router.expert_bias", ".mlp.gate.e_score_correction_bias"),
            (".post_attn_norm.", ".post_self_attn_layernorm."),
            (".post_ffn_norm.", ".post_mlp_layernorm."),
        ),
        "stacked": STACKED,
    }


MIXTURE_FAMILIES: dict[str, Family] = {
    "Qwen2MoeForCausalLM": Family(
        "Qwen1.5 and Qwen2 MoE",
        "Qwen2 with routed experts and a shared one",
        qwen2_moe,
        {"num_experts_per_tok": 4, "moe_intermediate_size": 1408}
        | {"max_position_embeddings": 32768},
    ),
    "Glm4MoeForCausalLM": Family(
        "GLM-4.5, 4.5-Air, 4.6, 4.7",
        "RoPE on half of each head; DeepSeek-V3's experts",
        glm4_moe,
        {"rms_norm_eps": 1e-5, "n_routed_experts": 128, "moe_intermediate_size": 1408}
        | {"num_experts_per_tok": 8, "max_position_embeddings": 131072}
        | {"num_key_value_heads": 8},
    ),
    "Dots1ForCausalLM": Family(
        "dots.llm1",
        "Qwen3's attention, DeepSeek-V3's experts",
        dots1,
        {"routed_scaling_factor": 1.0},
    ),
    "MiniMaxM2ForCausalLM": Family(
        "MiniMax-M2",
        "experts chosen by sigmoids and a bias; one norm over all query heads; RoPE on a part of "
        "each head",
        minimax_m2,
        {"head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 196608},
    ),
    "ExaoneMoeForCausalLM": Family(
        "K-EXAONE",
        "EXAONE 4's attention with norms before, DeepSeek-V3's experts",
        exaone_moe,
        {"rms_norm_eps": 1e-5, "num_experts": 64, "moe_intermediate_size": 1024}
        | {"num_experts_per_tok": 8, "routed_scaling_factor": 2.5},
    ),
    "AfmoeForCausalLM": Family(
        "Trinity Nano, Mini, Large",
        "gated attention; norms before and after; local layers turn, global ones have no "
        "positions; experts chosen by sigmoids and a bias",
        afmoe,
        {"rms_norm_eps": 1e-5, "head_dim": 128, "max_position_embeddings": 16384},
    ),
    "LagunaForCausalLM": Family(
        "Laguna XS.2",
        "layers with numbers of query heads of their own, a RoPE for each kind, gated attention; "
        "experts chosen by sigmoids and a bias, and a shared one",
        laguna,
        {"head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 131072}
        | {"num_experts_per_tok": 8, "moe_intermediate_size": 512, "intermediate_size": 8192},
    ),
    "SolarOpenForCausalLM": Family(
        "Solar Open 100B",
        "DeepSeek-V3's experts in every layer",
        solar_open,
        {"rms_norm_eps": 1e-5, "head_dim": 128, "num_key_value_heads": 8}
        | {"max_position_embeddings": 131072, "n_routed_experts": 128, "num_experts_per_tok": 8}
        | {"moe_intermediate_size": 1280, "intermediate_size": 1280},
    ),
    "HYV3ForCausalLM": Family(
        "Hunyuan 3",
        "Qwen3's attention; experts chosen by sigmoids and a bias, and a shared one",
        hy_v3,
        {"rms_norm_eps": 1e-5, "head_dim": 128, "num_key_value_heads": 8, "num_experts": 192}
        | {"max_position_embeddings": 131072, "num_experts_per_tok": 8}
        | {"moe_intermediate_size": 1536},
    ),
    "FlintForCausalLM": Family(
        "Flint",
        "local layers turn, global ones have no positions; heads that may attend to nothing; "
        "experts chosen by sigmoids, and a shared one",
        flint,
        {"head_dim": 128, "num_key_value_heads": 4, "max_position_embeddings": 262144}
        | {"intermediate_size": 6144, "norm_topk_prob": True, "num_experts_per_tok": 6}
        | {"moe_intermediate_size": 512, "mlp_only_layers": [0, 1]},
    ),
    "Kolibri1ForCausalLM": Family(
        "Kolibri 1",
        "norms before and after; local layers turn, global ones have no positions; experts chosen "
        "by scores and a bias, weighted by sigmoids",
        kolibri,
        {"head_dim": 128, "num_key_value_heads": 4, "max_position_embeddings": 262144}
        | {"num_experts_per_tok": 6, "moe_intermediate_size": 512, "intermediate_size": 512},
    ),
}

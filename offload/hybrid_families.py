"""The architectures of which most layers keep a state in place of keys and values, but for those
with Mamba-2 (mamba_families.py): what each is made of, from config.json. As families.py, which has
those that attend in every layer."""

from __future__ import annotations

from ..kernels.recurrence import RecurrentShape
from .config_fields import MOST_ROWS, Fields
from .errors import BadCheckpoint, UnsupportedModel
from .families import Family
from .layer_config import Experts, Recurrence
from .rope_config import read_rope
from .routed_families import (
    STACKED,
    checked_experts,
    num_experts,
    qwen3_experts,
    with_shared,
)

MOST_HEADS, MOST_DIM = 1024, 1024
MOST_CONV = 16  # what the kernels take at most


def qwen3_next(get: Fields, head_dim: int) -> dict:
    experts = with_shared(get, qwen3_experts(get, 512), 512)
    return {**qwen3_5(get, head_dim, by_heads=True), "experts": experts}


def qwen3_5(get: Fields, head_dim: int, *, by_heads: bool = False) -> dict:
    """Gated DeltaNet in three of four layers, and attention whose output is gated."""
    every = get.number("full_attention_interval", 4)
    shape = RecurrentShape(
        get.number("linear_num_value_heads", 32, high=MOST_HEADS),
        get.number("linear_num_key_heads", 16, high=MOST_HEADS),
        get.number("linear_key_head_dim", 128, high=MOST_DIM),
        get.number("linear_value_head_dim", 128, high=MOST_DIM),
        get.number("linear_conv_kernel_dim", 4, low=2, high=MOST_CONV),
        is_delta=True,
        norm_heads=1,
        norm_eps=get.number("rms_norm_eps", 1e-6, kind=float, low=0.0, high=1.0),
    )
    recurrence = checked_recurrence(get, "linear_attn", shape, by_heads=by_heads)
    attends = which_attend(get, lambda layer: (layer + 1) % every == 0)
    bias = get.flag("attention_bias", False)
    return {
        "ropes": (read_rope(get, head_dim, share=0.25),) * get.num_layers,
        "qkv_bias": bias,
        "output_bias": bias,
        "qk_norm": "head",
        "norm_offset": 1.0,
        "output_gate": get.flag("attn_output_gate", True),
        "recurrences": tuple(None if here else recurrence for here in attends),
    }


def qwen3_5_moe(get: Fields, head_dim: int) -> dict:
    experts = Experts(
        num_experts(get, 256),
        get.number("num_experts_per_tok", 8),
        get.number("moe_intermediate_size", 512),
    )
    experts = (checked_experts(get, experts),) * get.num_layers
    experts = with_shared(get, experts, 512)
    return {**qwen3_5(get, head_dim), "experts": experts, "stacked": STACKED}


def lfm2(get: Fields, head_dim: int) -> dict:
    """Gated short convolutions in most layers."""
    inner = get.number("block_ff_dim", get.raw.get("intermediate_size"))
    if get.flag("block_auto_adjust_ff_dim", True):
        inner = int(2 * inner / 3)
        if get.raw.get("block_ffn_dim_multiplier", 1.0) is not None:
            times = get.number("block_ffn_dim_multiplier", 1.0, kind=float, low=1e-3, high=1e3)
            multiple = get.number("block_multiple_of", 256)
            inner = -(-int(times * inner) // multiple) * multiple
    if not 0 < inner <= MOST_ROWS:
        raise BadCheckpoint(f"{get.path}: an MLP of {inner} rows is no model's.")
    listed = get.raw.get("full_attn_idxs")
    listed = range(get.num_layers) if listed is None else listed
    if not isinstance(listed, list | range):
        raise BadCheckpoint(f"{get.path}: full_attn_idxs is {listed!r}; expected a list.")
    bias = get.flag("conv_bias", False)
    width = get.number("conv_L_cache", 3, low=2, high=MOST_CONV)
    channels = get.number("hidden_size")
    biases = dict.fromkeys(("conv_bias", "projection_bias", "output_bias"), bias)
    conv = Recurrence("conv", channels, width, **biases)
    attends = which_attend(get, lambda layer: layer in listed)
    return {
        "ropes": (read_rope(get, head_dim, theta=1e6),) * get.num_layers,
        "qk_norm": "head",
        "activation": "silu",  # whatever the file says
        "norm_eps": get.number("norm_eps", 1e-5, kind=float, low=0.0, high=1.0),
        "intermediate_size": inner,
        "tied_embeddings": get.flag("tie_embedding", get.flag("tie_word_embeddings", True)),
        "recurrences": tuple(None if here else conv for here in attends),
        "renamed": _LFM2_NAMES,
    }


def lfm2_moe(get: Fields, head_dim: int) -> dict:
    block = "feed_forward"
    experts = Experts(
        num_experts(get, 32),
        get.number("num_experts_per_tok", 4),
        get.number("moe_intermediate_size", 1792),
        get.flag("norm_topk_prob", True),
        router=f"{block}.gate",
        gate=f"{block}.experts.{{}}.w1",
        up=f"{block}.experts.{{}}.w3",
        down=f"{block}.experts.{{}}.w2",
        by_sigmoid=True,
        bias=f"{block}.expert_bias" if get.flag("use_expert_bias", True) else None,
        scaling=get.positive("routed_scaling_factor", 1.0),
        least_sum=1e-6,
    )
    dense, layers = get.number("num_dense_layers", 2, low=0), range(get.num_layers)
    return {
        **lfm2(Fields({**get.raw, **_UNKNOWN_TO_LFM2_MOE}, get.path), head_dim),
        "experts": tuple(
            None if layer < dense else checked_experts(get, experts) for layer in layers
        ),
    }


def which_attend(get: Fields, rule) -> list[bool]:
    """Whether each layer attends: where layer_types says so, or, without it, rule(layer)."""
    kinds = get.per_layer("layer_types") or get.per_layer("layers_block_type")
    if kinds is None:
        return [rule(layer) for layer in range(get.num_layers)]
    known = ("full_attention", "attention", "linear_attention", "mamba", "conv")
    for kind in kinds:
        if kind not in known:
            raise UnsupportedModel(f"{get.path}: a layer of the type {kind!r} is not supported.")
    return [kind in known[:2] for kind in kinds]


def checked_recurrence(
    get: Fields, module: str, shape: RecurrentShape, act: str = "hidden_act", **more
) -> Recurrence:
    """A layer's state and its convolution, whose activation the field `act` names."""
    if shape.heads % shape.key_heads or shape.heads % shape.norm_heads:
        raise BadCheckpoint(
            f"{get.path}: {shape.heads} heads cannot share {shape.key_heads} keys evenly."
        )
    activation = get.raw.get(act) or "silu"
    if activation not in ("silu", "swish"):
        raise UnsupportedModel(
            f"{get.path}: {act} {activation!r} is not supported by this family, whose "
            "convolutions have silu."
        )
    return Recurrence(module, shape.channels, shape.conv_width, shape, **more)


_LFM2_NAMES = (
    ("model.embedding_norm.", "model.norm."),
    (".operator_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".self_attn.out_proj.", ".self_attn.o_proj."),
    (".q_layernorm.", ".q_norm."),
    (".k_layernorm.", ".k_norm."),
    (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w2.", ".mlp.down_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."),
)
_UNKNOWN_TO_LFM2_MOE = {"block_auto_adjust_ff_dim": False, "block_ff_dim": None}
_QWEN = {"head_dim": 256, "max_position_embeddings": 32768, "num_key_value_heads": 4}
_QWEN_MOE = {**_QWEN, "num_key_value_heads": 2, "intermediate_size": 5632}
_QWEN_NEXT = {
    **_QWEN_MOE,
    "norm_topk_prob": True,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
}
_LFM2 = {
    "intermediate_size": 12288,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128000,
}
_LFM2_MOE = {**_LFM2, "intermediate_size": 7168}

HYBRID_FAMILIES: dict[str, Family] = {
    "Qwen3NextForCausalLM": Family(
        "Qwen3-Next",
        "Gated DeltaNet in three of four layers; gated attention; routed experts and a shared one",
        qwen3_next,
        _QWEN_NEXT,
    ),
    "Qwen3_5ForCausalLM": Family(
        "Qwen3.5 (dense)",
        "Gated DeltaNet in three of four layers; gated attention",
        qwen3_5,
        _QWEN,
    ),
    "Qwen3_5ForConditionalGeneration": Family(
        "Qwen3.5 0.8B to 27B (the text part)",
        "as Qwen3.5; the vision part is not loaded",
        qwen3_5,
        _QWEN,
        text_config=True,
    ),
    "Qwen3_5MoeForCausalLM": Family(
        "Qwen3.5 MoE", "Qwen3.5 with routed experts and a shared one", qwen3_5_moe, _QWEN_MOE
    ),
    "Qwen3_5MoeForConditionalGeneration": Family(
        "Qwen3.5 35B-A3B and larger (the text part)",
        "as Qwen3.5 MoE; the vision part is not loaded",
        qwen3_5_moe,
        _QWEN_MOE,
        text_config=True,
    ),
    "Lfm2ForCausalLM": Family(
        "LFM2 350M to 2.6B",
        "gated short convolutions in most layers",
        lfm2,
        _LFM2,
    ),
    "Lfm2MoeForCausalLM": Family(
        "LFM2 8B-A1B",
        "LFM2 with routed experts, chosen by sigmoids and a bias",
        lfm2_moe,
        _LFM2_MOE,
    ),
}

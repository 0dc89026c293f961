"""LFM's architectures, with gated short convolutions in most layers: what each is made of, from
config.json. As families/hybrid.py."""

from __future__ import annotations

from ..errors import BadCheckpoint, UnsupportedModel
from ..models.config_fields import MOST_POSITIONS, MOST_ROWS, Fields
from ..models.layer_config import Experts, Norms, Recurrence
from ..models.rope_config import read_rope
from .family import Family
from .hybrid import MOST_CONV, which_attend
from .routed import checked_experts, num_experts


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
        raise BadCheckpoint(f"{get.path}: an MLP of {inner} rows is not one that a model has.")
    listed = get.raw.get("full_attn_idxs")
    listed = range(get.num_layers) if listed is None else listed
    if not isinstance(listed, list | range):
        raise BadCheckpoint(f"{get.path}: full_attn_idxs is {listed!r}; expected a list.")
    attends = which_attend(get, lambda layer: layer in listed)
    return {
        **_lfm(get, attends),
        "ropes": (read_rope(get, head_dim, theta=1e6),) * get.num_layers,
        "intermediate_size": inner,
    }


def _lfm(get: Fields, attends: list[bool]) -> dict:
    """What all have alike: layers that do not attend are convolutions."""
    conv = _convolution(get)
    return {
        "qk_norm": "head",
        "activation": "silu",  # whatever the file says
        "norm_eps": get.number("norm_eps", 1e-5, kind=float, low=0.0, high=1.0),
        "tied_embeddings": get.flag("tie_embedding", get.flag("tie_word_embeddings", True)),
        "recurrences": tuple(None if here else conv for here in attends),
        "renamed": _NAMES,
    }


def _convolution(get: Fields) -> Recurrence:
    bias = get.flag("conv_bias", False)
    width = get.number("conv_L_cache", 3, low=2, high=MOST_CONV)
    biases = dict.fromkeys(("conv_bias", "projection_bias", "output_bias"), bias)
    return Recurrence("conv", get.number("hidden_size"), width, **biases)


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
        **lfm2(Fields({**get.raw, **_UNKNOWN}, get.path), head_dim),
        "experts": tuple(
            None if layer < dense else checked_experts(get, experts) for layer in layers
        ),
    }


def lfm3(get: Fields, head_dim: int) -> dict:
    """Convolutions beside local and global attention, whose heads are gated, and norms after."""
    kinds = get.per_layer("layer_types") or [
        "full_attention" if n % 4 == 2 else "sliding_attention" if n % 4 == 0 and n else "conv"
        for n in range(get.num_layers)
    ]
    for kind in kinds:
        if kind not in ("conv", *_LFM3_ROPES):
            raise UnsupportedModel(f"{get.path}: a layer of the type {kind!r} is not supported.")
    window = get.number("sliding_window", 256, high=MOST_POSITIONS)
    given = get.raw.get("rope_parameters") or _LFM3_ROPES
    turning = Fields({**get.raw, "rope_parameters": given}, get.path)
    ropes = {
        kind: read_rope(turning, head_dim, layers=kind) for kind in _LFM3_ROPES if kind in kinds
    }
    bias, eps = get.flag("attention_bias", False), get.raw.get("rms_norm_eps")
    if eps is not None:  # another name of the same, which counts before it
        get = Fields({**get.raw, "norm_eps": eps}, get.path)
    norms = Norms(after_attention="post_operator_norm", after_mlp="post_ffn_norm")
    return {
        **_lfm(get, [kind != "conv" for kind in kinds]),
        "ropes": tuple(ropes.get(kind) for kind in kinds),
        "windows": tuple(window if kind == "sliding_attention" else None for kind in kinds),
        "qkv_bias": bias,
        "output_bias": bias,
        "gate_projection": "head" if get.flag("use_attention_gate", True) else "",
        "norms": norms if get.flag("use_sandwich_norm", True) else Norms(),
        "renamed": (*_NAMES, (".self_attn.g_proj.", ".self_attn.gate_proj.")),
    }


_NAMES = (
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
_UNKNOWN = {"block_auto_adjust_ff_dim": False, "block_ff_dim": None}
_LFM3_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {
        "rope_type": "proportional",
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.5,
    },
}
LFM2 = {
    "intermediate_size": 12288,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128000,
}
_LFM2_MOE = {**LFM2, "intermediate_size": 7168}
LFM3 = {
    "intermediate_size": 7680,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 128000,
    "conv_L_cache": 7,
}

CONV_FAMILIES: dict[str, Family] = {
    "Lfm2ForCausalLM": Family(
        "LFM2 350M to 2.6B",
        "gated short convolutions in most layers",
        lfm2,
        LFM2,
    ),
    "Lfm2MoeForCausalLM": Family(
        "LFM2 8B-A1B",
        "LFM2 with routed experts, chosen by sigmoids and a bias",
        lfm2_moe,
        _LFM2_MOE,
    ),
    "Lfm3ForCausalLM": Family(
        "LFM3",
        "gated short convolutions beside local and global attention, whose heads are gated; norms "
        "before and after",
        lfm3,
        LFM3,
    ),
}

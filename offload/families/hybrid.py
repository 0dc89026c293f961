"""The architectures with Gated DeltaNet in most layers, and what architectures have in common whose
layers keep a state in place of keys and values: what each is made of, from config.json. Those with
Mamba-2 stand in mamba.py, those with short convolutions in families/conv.py."""

from __future__ import annotations

from ...kernels.recurrence import RecurrentShape
from ..errors import BadCheckpoint, UnsupportedModel
from ..models.config_fields import Fields
from ..models.layer_config import PLAIN_NORMS, Experts, Joined, Recurrence
from ..models.rope_config import read_rope
from .dense import OLMO2_NORMS, olmo2
from .family import Family
from .routed import (
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


def olmo_hybrid(get: Fields, head_dim: int) -> dict:
    """Gated DeltaNet with norms before, whose gains reach two, and OLMo 3's attention."""
    num_heads = get.number("num_attention_heads")
    key_heads = get.number("linear_num_key_heads", num_heads, high=MOST_HEADS)
    key_dim = int(0.75 * get.number("hidden_size") / key_heads)
    key_dim = get.number("linear_key_head_dim", key_dim, high=MOST_DIM)
    shape = RecurrentShape(
        get.number("linear_num_value_heads", num_heads, high=MOST_HEADS),
        key_heads,
        key_dim,
        get.number("linear_value_head_dim", 2 * key_dim, high=MOST_DIM),
        get.number("linear_conv_kernel_dim", 4, low=2, high=MOST_CONV),
        is_delta=True,
        norm_heads=1,
        norm_eps=1e-5,
        most_gain=2.0 if get.flag("linear_allow_neg_eigval", True) else 1.0,
    )
    recurrence = checked_recurrence(get, "linear_attn", shape, apart=True)
    every = min(4, get.num_layers)  # of few layers the last one
    attends = which_attend(get, lambda layer: (layer + 1) % every == 0)
    fields = olmo2(get, head_dim)
    return {
        **fields,
        **taken_apart("linear_attn", _OLMO_HYBRID_NAMES),
        "ropes": fields["ropes"] if _has_rope(get) else (None,) * get.num_layers,
        "norms_by_layer": tuple(OLMO2_NORMS if here else PLAIN_NORMS for here in attends),
        "recurrences": tuple(None if here else recurrence for here in attends),
    }


def _has_rope(get: Fields) -> bool:
    """Null stands for no positions, of rope_parameters as of what is in them."""
    given = get.raw.get("rope_parameters", {})
    if given is None:
        return "rope_theta" in get.raw or "rope_scaling" in get.raw
    said = given if isinstance(given, dict) else {}
    return all(said.get(name, "") is not None for name in ("rope_theta", "rope_type"))


# The tensors of a layer whose queries, keys and values have a matrix each: as files call them, and
# as they are called here.
_APART = {
    **{f"{part}_proj": f"in_proj_{part}" for part in "qkvba"},
    "g_proj": "in_proj_z",
    "o_proj": "out_proj",
    "o_norm": "norm",
}


def taken_apart(module: str, renamed: dict[str, str]) -> dict:
    """ModelConfig fields of such a layer's tensors. renamed: parts of other names."""
    pairs = {f"{module}.{theirs}": f"{module}.{ours}" for theirs, ours in _APART.items()}
    convolutions = tuple(f"{module}.{part}_conv1d.weight" for part in "qkv")
    return {
        "renamed": (*renamed.items(), *pairs.items()),
        "joined": (Joined(f"{module}.conv1d.weight", convolutions),),
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
    check_convolution(get, act)
    if shape.heads % shape.key_heads or shape.heads % shape.norm_heads:
        raise BadCheckpoint(
            f"{get.path}: {shape.heads} heads cannot share {shape.key_heads} keys evenly."
        )
    return Recurrence(module, shape.channels, shape.conv_width, shape, **more)


def check_convolution(get: Fields, act: str = "hidden_act") -> None:
    """Refuse convolutions with another activation than SiLU."""
    activation = get.raw.get(act) or "silu"
    if activation not in ("silu", "swish"):
        raise UnsupportedModel(
            f"{get.path}: {act} {activation!r} is not supported by this family, whose "
            "convolutions have silu."
        )


_OLMO_HYBRID_NAMES = {
    "attention_layer_norm": "input_layernorm",
    "feedforward_layer_norm": "post_attention_layernorm",
}
QWEN3_5 = {"head_dim": 256, "max_position_embeddings": 32768, "num_key_value_heads": 4}
_QWEN_MOE = {**QWEN3_5, "num_key_value_heads": 2, "intermediate_size": 5632}
_QWEN_NEXT = {
    **_QWEN_MOE,
    "norm_topk_prob": True,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
}
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
        QWEN3_5,
    ),
    "Qwen3_5ForConditionalGeneration": Family(
        "Qwen3.5 0.8B to 27B (the text part)",
        "as Qwen3.5; the vision part is not loaded",
        qwen3_5,
        QWEN3_5,
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
    "OlmoHybridForCausalLM": Family(
        "OLMo Hybrid 7B",
        "Gated DeltaNet with gains up to two and norms before in three of four layers; attention "
        "with norms after, without positions or with RoPE",
        olmo_hybrid,
        {"max_position_embeddings": 65536},
    ),
}

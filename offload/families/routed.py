"""The architectures with routed experts in some or all layers: what each is made of, from
config.json. As dense.py, which has those whose MLPs are dense."""

from __future__ import annotations

from dataclasses import replace

from ..errors import BadCheckpoint, UnsupportedModel
from ..models.config_fields import MOST_EXPERTS, Fields
from ..models.layer_config import Experts, Norms, Stacked
from ..models.rope_config import read_rope
from .dense import MISTRAL, OLMO, OLMO2_NORMS, ernie4_5, hunyuan, olmo2, qkv_clip, qwen3, two_ropes
from .family import Family


def qwen3_moe(get: Fields, head_dim: int) -> dict:
    return {
        **qwen3(get, head_dim),
        "experts": qwen3_experts(get),
        # Unlike the dense models', its windows are every layer's.
        "windows": get.windows(lambda layer: get.flag("use_sliding_window", False)),
    }


def qwen3_experts_of_one(get: Fields, count: int) -> Experts:
    """Of each layer that has some. count: where the file does not say how many."""
    experts = Experts(
        num_experts(get, count),
        get.number("num_experts_per_tok", 8),
        get.number("moe_intermediate_size", 768),
        get.flag("norm_topk_prob", False),
    )
    return checked_experts(get, experts)


def qwen3_experts(get: Fields, count: int = 128) -> tuple[Experts | None, ...]:
    experts = qwen3_experts_of_one(get, count)
    step, dense = get.number("decoder_sparse_step", 1), get.raw.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise BadCheckpoint(f"{get.path}: mlp_only_layers is {dense!r}; expected a list.")
    routed = [layer not in dense and (layer + 1) % step == 0 for layer in range(get.num_layers)]
    return tuple(experts if here else None for here in routed)


def with_shared(
    get: Fields, experts: tuple[Experts | None, ...], default: int
) -> tuple[Experts | None, ...]:
    """The same with the expert that every token goes through, of as many numbers as the file says,
    or `default`."""
    size = get.number("shared_expert_intermediate_size", default)
    return tuple(e and replace(e, shared_size=size) for e in experts)


def num_experts(get: Fields, default: int) -> int:
    """num_experts; transformers 5 writes num_local_experts for it."""
    return get.number("num_experts", get.number("num_local_experts", default))


def mixtral(get: Fields, head_dim: int) -> dict:
    block = "block_sparse_moe"
    experts = Experts(
        get.number("num_local_experts", 8),
        get.number("num_experts_per_tok", 2),
        get.number("intermediate_size"),
        router=f"{block}.gate",
        gate=f"{block}.experts.{{}}.w1",
        up=f"{block}.experts.{{}}.w3",
        down=f"{block}.experts.{{}}.w2",
    )
    return {
        "ropes": (read_rope(get, head_dim, theta=1e6),) * get.num_layers,
        "windows": get.windows(lambda layer: True, default=None),
        "experts": (checked_experts(get, experts),) * get.num_layers,
    }


def checked_experts(get: Fields, experts: Experts) -> Experts:
    if experts.chosen > experts.count or experts.count > MOST_EXPERTS:
        raise BadCheckpoint(
            f"{get.path}: {experts.chosen} of {experts.count} experts cannot be chosen."
        )
    return experts


def olmoe(get: Fields, head_dim: int) -> dict:
    experts = Experts(
        num_experts(get, 64),
        get.number("num_experts_per_tok", 8),
        get.number("intermediate_size"),
        get.flag("norm_topk_prob", False),
    )
    return {
        **olmo2(get, head_dim),
        "norms": Norms(),
        "qkv_clip": qkv_clip(get),
        "experts": (checked_experts(get, experts),) * get.num_layers,
    }


def flex_olmo(get: Fields, head_dim: int) -> dict:
    fields = olmoe(Fields({**get.raw, "clip_qkv": None}, get.path), head_dim)
    rope = read_rope(get, head_dim, theta=5e5)
    return {**fields, "ropes": (rope,) * get.num_layers, "norms": OLMO2_NORMS, "stacked": STACKED}


def ernie4_5_moe(get: Fields, head_dim: int) -> dict:
    if get.flag("use_bias", False):  # the output head would have one too
        raise UnsupportedModel(f"{get.path}: use_bias is not supported by this family.")
    size = get.number("moe_intermediate_size", 1536)
    experts = Experts(
        get.number("moe_num_experts", 64),
        get.number("moe_k", 6),
        size,
        bias="mlp.moe_statics.e_score_correction_bias",
        bias_is_row=True,
        shared_size=size * get.number("moe_num_shared_experts", 2, low=0, high=64),
        shared="mlp.shared_experts",
        shared_gate=None,
    )
    experts, every = checked_experts(get, experts), get.number("moe_layer_interval", 1)
    first = get.number("moe_layer_start_index", 1, low=0)
    last = get.number("moe_layer_end_index", -1, low=-1)
    last = get.num_layers - 1 if last == -1 else last
    layers = range(get.num_layers)
    routed = [first <= layer <= last and (layer + 1) % every == 0 for layer in layers]
    return {
        **ernie4_5(get, head_dim),
        "experts": tuple(experts if here else None for here in routed),
    }


def hunyuan_moe(get: Fields, head_dim: int) -> dict:
    counts, chosen, sizes, shared = (
        _each_layer(get, *field)
        for field in (
            ("num_experts", 1),
            ("moe_topk", get.raw.get("num_experts_per_tok", 1)),
            ("moe_intermediate_size", get.number("intermediate_size")),
            ("num_shared_expert", 1),
        )
    )
    dense = get.number("intermediate_size")
    experts = [
        Experts(
            count,
            per_token,
            size,
            router="mlp.gate.wg",
            shared_size=many * dense,
            shared="mlp.shared_mlp",
            shared_gate=None,
        )
        for count, per_token, size, many in zip(counts, chosen, sizes, shared, strict=True)
    ]
    return {**hunyuan(get, head_dim), "experts": tuple(checked_experts(get, e) for e in experts)}


def _each_layer(get: Fields, name: str, default: int) -> list[int]:
    """A field that is one number for all layers, or a list of one for each."""
    if not isinstance(get.raw.get(name), list):
        return [get.number(name, default)] * get.num_layers
    of_layers = get.per_layer(name) or []
    return [Fields({name: value}, get.path).number(name) for value in of_layers]


def mellum(get: Fields, head_dim: int) -> dict:
    kinds = get.per_layer("mlp_layer_types") or ["sparse"] * get.num_layers
    experts = Experts(
        num_experts(get, 64),
        get.number("num_experts_per_tok", 8),
        get.number("moe_intermediate_size", 896),
        get.flag("norm_topk_prob", True),
    )
    experts = checked_experts(get, experts)
    bias = get.flag("attention_bias", False)
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "qk_norm": "head",
        "ropes": two_ropes(get, head_dim, lambda layer: False, 1e4, 5e5),
        "windows": get.windows(lambda layer: False, default=1024),
        "experts": tuple(experts if kind == "sparse" else None for kind in kinds),
    }


def gpt_oss(get: Fields, head_dim: int) -> dict:
    """Experts come in MXFP4, in which they were trained, or converted to ordinary numbers."""
    for name, value in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
        if get.positive(name, value) != value:
            raise UnsupportedModel(f"{get.path}: {name} is not {value}, which it is for gpt-oss.")
    experts = Experts(
        num_experts(get, 128),
        get.number("num_experts_per_tok", get.number("experts_per_token", 4)),
        get.number("intermediate_size"),
        router="mlp.router",
        down="mlp.experts.{}.down_proj",
        gate_up="mlp.experts.{}.gate_up_proj",
        biases=True,
    )
    bias = get.flag("attention_bias", True)
    return {
        "ropes": (read_rope(get, head_dim, theta=150000.0),) * get.num_layers,
        "qkv_bias": bias,
        "output_bias": bias,
        "null_scores": True,
        "activation": "clamped_swiglu",  # whatever the file says: silu
        "windows": get.windows(lambda layer: layer % 2 == 0, default=128),
        "experts": (checked_experts(get, experts),) * get.num_layers,
        "stacked": _GPT_OSS_STACKED,
    }


STACKED = (
    Stacked(
        "mlp.experts.gate_up_proj",
        ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
    ),
    Stacked("mlp.experts.down_proj", ("mlp.experts.{}.down_proj.weight",)),
)
_GPT_OSS_STACKED = (
    Stacked("mlp.experts.gate_up_proj", ("mlp.experts.{}.gate_up_proj.weight",), by_columns=True),
    Stacked("mlp.experts.down_proj", ("mlp.experts.{}.down_proj.weight",), by_columns=True),
    Stacked("mlp.experts.gate_up_proj_bias", ("mlp.experts.{}.gate_up_proj.bias",)),
    Stacked("mlp.experts.down_proj_bias", ("mlp.experts.{}.down_proj.bias",)),
)
_GPT_OSS = {
    "head_dim": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
}
_ERNIE = {
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
_MELLUM = {"head_dim": 128, "num_key_value_heads": 4, "max_position_embeddings": 131072}

ROUTED_FAMILIES: dict[str, Family] = {
    "MixtralForCausalLM": Family(
        "Mixtral", "routed experts", mixtral, {"rms_norm_eps": 1e-5, **MISTRAL}
    ),
    "Qwen3MoeForCausalLM": Family(
        "Qwen3 MoE",
        "Qwen3 with routed experts, beside dense layers",
        qwen3_moe,
        {"num_key_value_heads": 4, "max_position_embeddings": 32768},
    ),
    "OlmoeForCausalLM": Family(
        "OLMoE",
        "routed experts; one norm over all query heads",
        olmoe,
        {**OLMO, "max_position_embeddings": 4096},
    ),
    "FlexOlmoForCausalLM": Family(
        "FlexOlmo",
        "OLMo 2 with routed experts",
        flex_olmo,
        {"num_experts": 7, "num_experts_per_tok": 5, "max_position_embeddings": 4096},
    ),
    "Ernie4_5_MoeForCausalLM": Family(
        "ERNIE 4.5 21B-A3B, 300B-A47B",
        "routed experts, chosen by shares and a bias, and shared ones; interleaved RoPE",
        ernie4_5_moe,
        _ERNIE,
    ),
    "HunYuanMoEV1ForCausalLM": Family(
        "Hunyuan A13B",
        "routed experts and a shared one; a norm on every query and key head behind RoPE",
        hunyuan_moe,
        OLMO,
    ),
    "MellumForCausalLM": Family(
        "Mellum 2",
        "routed experts; a norm on every query and key head; local and global layers with a RoPE "
        "each",
        mellum,
        _MELLUM,
    ),
    "GptOssForCausalLM": Family(
        "gpt-oss 20B, 120B",
        "routed experts in MXFP4, with biases and bounded gates; every other layer local; heads "
        "that may attend to nothing",
        gpt_oss,
        _GPT_OSS,
        quantised="mxfp4",
    ),
}

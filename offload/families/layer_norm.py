"""The architectures with layer norms and gated MLPs or experts, but for Cohere's: what each is made
of, from config.json. As dense.py, whose norms are root mean squares."""

from __future__ import annotations

from dataclasses import replace

from ..errors import UnsupportedModel
from ..models.config_fields import Fields
from ..models.layer_config import Joined, Norms
from ..models.rope_config import read_rope
from .dense import llama, qkv_clip
from .family import Family
from .gateless import layer_norms
from .routed import mixtral


def olmo(get: Fields, head_dim: int) -> dict:
    """Norms have neither weights nor biases."""
    fields = Fields({**get.raw, "mlp_bias": False}, get.path)
    return {
        **llama(fields, head_dim),
        "layer_norm": True,
        "norm_eps": 1e-5,
        "qkv_clip": qkv_clip(get),
        "unit_norms": ("layernorm.", "model.norm."),
    }


def stablelm(get: Fields, head_dim: int) -> dict:
    parallel, normed = get.flag("use_parallel_residual", False), get.flag("qk_layernorm", False)
    return {
        **layer_norms(get, "layer_norm_eps", bias=True),
        "ropes": (read_rope(get, head_dim, share=0.25),) * get.num_layers,
        "qkv_bias": get.flag("use_qkv_bias", False),
        "qk_norm": "each" if normed else "",
        "parallel_mlp": parallel,
        "norms": Norms(before_mlp=None) if parallel else Norms(),
        "joined": _norms_of_heads(get) if normed else (),
    }


def _norms_of_heads(get: Fields) -> tuple[Joined, ...]:
    """StableLM 2 12B's, of which the files have one by one."""
    heads = get.number("num_attention_heads", high=_MOST_HEADS)
    of_heads = {"q": heads, "k": get.number("num_key_value_heads", heads, high=_MOST_HEADS)}
    return tuple(
        Joined(
            f".self_attn.{name}_norm.weight",
            tuple(f".self_attn.{name}_layernorm.norms.{i}.weight" for i in range(count)),
        )
        for name, count in of_heads.items()
    )


def phimoe(get: Fields, head_dim: int) -> dict:
    if get.number("num_experts_per_tok", 2) != 2:
        raise UnsupportedModel(
            f"{get.path}: num_experts_per_tok is not 2, which it is for this family."
        )
    fields, bias = mixtral(get, head_dim), get.flag("attention_bias", False)
    jitter = get.number("router_jitter_noise", 0.01, kind=float, low=0.0, high=1.0)
    experts = [replace(e, sparse_mixer=2 * jitter) for e in fields["experts"]]
    return {
        **fields,
        **layer_norms(get, "rms_norm_eps", bias=True),
        "ropes": (read_rope(get, head_dim, theta=1e6),) * get.num_layers,
        "qkv_bias": bias,
        "output_bias": bias,
        "head_bias": get.flag("lm_head_bias", False),
        "experts": tuple(experts),
    }


_MOST_HEADS = 1024  # of which each has a name of its own

LAYER_NORM_FAMILIES: dict[str, Family] = {
    "OlmoForCausalLM": Family(
        "OLMo 1B, 7B",
        "layer norms without weights; in some queries, keys and values within bounds",
        olmo,
        {"max_position_embeddings": 2048},
    ),
    "StableLmForCausalLM": Family(
        "StableLM 3B, StableLM 2 1.6B, 12B",
        "layer norms; RoPE on a quarter of each head; biases on queries, keys and values; in 12B a "
        "norm of its own for every query and key head, and attention and MLP side by side",
        stablelm,
        {"max_position_embeddings": 4096, "num_key_value_heads": 32},
    ),
    "PhimoeForCausalLM": Family(
        "Phi-3.5-MoE, Phi-mini-MoE, Phi-tiny-MoE",
        "routed experts, each weighted among those that come near it; layer norms; longrope",
        phimoe,
        {"num_local_experts": 16, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    ),
}

"""Llama 4: attention in chunks, layers without positions whose queries grow, and experts that are
given weighted inputs. As dense.py."""

from __future__ import annotations

from ..errors import BadCheckpoint, UnsupportedModel
from ..models.config_fields import MOST_POSITIONS, Fields
from ..models.layer_config import Experts, QueryGrowth, Stacked
from ..models.rope_config import read_rope
from .family import Family
from .routed import STACKED, checked_experts

_CHUNKED, _GLOBAL = "chunked_attention", "full_attention"


def llama4(get: Fields, head_dim: int) -> dict:
    bias = get.flag("attention_bias", False)
    rope = read_rope(get, head_dim, theta=5e5, interleaved=True)
    turns = _turns(get)
    fields = {
        "ropes": tuple(rope if turn else None for turn in turns),
        "qkv_bias": bias,
        "output_bias": bias,
        "intermediate_size": get.number("intermediate_size_mlp"),
        "windows": _chunks(get, turns),
        "chunked": True,
        "query_growth": _query_growth(get),
        "experts": _experts(get),
        "stacked": _STACKED,
        "renamed": (("feed_forward.", "mlp."),),
    }
    if get.flag("use_qk_norm", True):
        unit = (".self_attn.q_norm.", ".self_attn.k_norm.")
        fields |= {"qk_norm": "turned", "unit_norms": unit}
    return fields


def _turns(get: Fields) -> list[bool]:
    """Of each layer, whether it has positions: early files have an empty list."""
    turns = get.per_layer("no_rope_layers") if get.raw.get("no_rope_layers") else None
    if turns is not None:  # 1 or 0, whatever the name says
        if any(turn not in (0, 1) for turn in turns):
            raise BadCheckpoint(
                f"{get.path}: no_rope_layers is {turns!r}; expected ones and zeros."
            )
        return [bool(turn) for turn in turns]
    every = get.number("no_rope_layer_interval")
    return [(layer + 1) % every != 0 for layer in range(get.num_layers)]


def _chunks(get: Fields, turns: list[bool]) -> tuple[int | None, ...]:
    """Which layers see their chunk alone: those with positions, where layer_types says nothing."""
    kinds = get.per_layer("layer_types") or [_CHUNKED if turn else _GLOBAL for turn in turns]
    for kind in kinds:
        if kind not in (_CHUNKED, _GLOBAL):
            raise UnsupportedModel(
                f"{get.path}: a layer of the type {kind!r} is not supported by this family."
            )
    if _CHUNKED not in kinds:
        return (None,) * get.num_layers
    size = get.number("attention_chunk_size", high=MOST_POSITIONS)
    return tuple(size if kind == _CHUNKED else None for kind in kinds)


def _query_growth(get: Fields) -> QueryGrowth | None:
    """Of layers without positions. Early files have a number for whether there is one."""
    tuned = get.raw["attn_temperature_tuning"]
    if not isinstance(tuned, int):
        raise BadCheckpoint(
            f"{get.path}: attn_temperature_tuning is {tuned!r}; expected true or false."
        )
    if not tuned:
        return None
    beta = get.number("attn_scale", kind=float, low=0.0, high=100.0)
    return QueryGrowth(beta, get.number("floor_scale", high=MOST_POSITIONS), 1, unturned=True)


def _experts(get: Fields) -> tuple[Experts | None, ...]:
    """Of the layers that moe_layers names, or of every so many; dense models name none."""
    num_layers, size = get.num_layers, get.number("intermediate_size")
    routed = get.raw.get("moe_layers")
    if routed is None:
        step = get.number("interleave_moe_layer_step")
        routed = range(step - 1, num_layers, step)
    elif not isinstance(routed, list) or not all(type(layer) is int for layer in routed):
        raise BadCheckpoint(f"{get.path}: moe_layers is {routed!r}; expected layers' numbers.")
    if not routed:
        return ()
    experts = Experts(
        get.number("num_local_experts"),
        get.number("num_experts_per_tok"),
        size,
        False,
        router="mlp.router",
        by_sigmoid=True,
        bias_of_scores=True,
        shared_size=size,
        shared_gate=None,
        weighs_input=True,
    )
    checked = checked_experts(get, experts)
    return tuple(checked if layer in routed else None for layer in range(num_layers))


_STACKED = tuple(Stacked(of.end, of.names, by_columns=True) for of in STACKED)
_LLAMA4 = {
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 1,
    "num_local_experts": 16,
    "interleave_moe_layer_step": 1,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
}
LLAMA4_FAMILIES: dict[str, Family] = {
    "Llama4ForCausalLM": Family(
        "Llama 4",
        "attention in chunks; layers without positions, whose queries grow; norms without weights "
        "of query and key heads behind interleaved RoPE; routed experts that are given weighted "
        "inputs, beside a shared one, in every layer or every other one",
        llama4,
        _LLAMA4,
    ),
    "Llama4ForConditionalGeneration": Family(
        "Llama 4 Scout, Maverick (the text part)",
        "as Llama 4; the vision part is not loaded",
        llama4,
        _LLAMA4,
        text_config=True,
    ),
}

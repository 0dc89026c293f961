"""Gemma 3n and 4: layers that are given inputs of their own, and of which the last may attend the
pages of earlier ones.

As dense.py; the Gemmas before them stand there.
"""

from __future__ import annotations

from statistics import NormalDist

from ..errors import BadCheckpoint, UnsupportedModel
from ..models.config_fields import MOST_ROWS, Fields, check_heads
from ..models.layer_config import AltUp, AttentionShape, BesideMlp, Experts, PerLayerInputs, Stacked
from ..models.rope_config import read_rope
from .dense import GEMMA2_NORMS, softcap, two_ropes
from .family import Family
from .routed import checked_experts

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def gemma4(get: Fields, head_dim: int) -> dict:
    if get.raw.get("use_bidirectional_attention") == "all":
        raise UnsupportedModel(
            f"{get.path}: this model reads in both directions, as embedding models do, and writes "
            "no text."
        )
    # The last layer sees everything, whatever the file says.
    slides = [*get.slides(lambda layer: (layer + 1) % 6 != 0)[:-1], False]
    shapes, fields = _shapes(get, head_dim, slides), _gemma(get, slides, None)
    return {
        **fields,
        "ropes": _ropes(get, shapes, slides),
        "attention_shapes": shapes,
        "inner_sizes": _inner_sizes(get, fields["kv_sources"]),
        "per_layer_inputs": _per_layer_inputs(get),
        "layer_scalars": True,
        **_experts(get),
    }


def gemma3n(get: Fields, head_dim: int) -> dict:
    if get.number("altup_active_idx", 0, low=0) != 0:
        raise UnsupportedModel(
            f"{get.path}: altup_active_idx is {get.raw['altup_active_idx']}; Ebbtide runs models "
            "whose layers work on the first residual stream, 0."
        )
    theta = get.raw.get("rope_local_base_freq")
    return {
        **_gemma(get, get.slides(_gemma3n_slides), 30.0),
        "ropes": two_ropes(get, head_dim, _gemma3n_slides, 1e4 if theta is None else theta, 1e6),
        "inner_sizes": _each(get.numbers("intermediate_size"), get.num_layers),
        "per_layer_inputs": PerLayerInputs(
            get.number("vocab_size_per_layer_input"),
            get.number("hidden_size_per_layer_input", high=MOST_ROWS // get.num_layers),
        ),
        "altup": AltUp(
            get.number("altup_num_inputs", high=64), get.flag("altup_correct_scale", True)
        ),
        "laurel_rank": get.number("laurel_rank"),
        "gate_cutoffs": _gate_cutoffs(get),
    }


def _gemma(get: Fields, slides: list[bool], cap: float | None) -> dict:
    """What both have alike. slides: which layers have a window; cap: of logits, where the file says
    none."""
    window, bias = get.number("sliding_window"), get.flag("attention_bias", False)
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "norms": GEMMA2_NORMS,
        "qk_norm": "head",
        "value_norm": True,
        "attention_scale": 1.0,
        "embedding_multiplier": get.number("hidden_size") ** 0.5,
        "logits_softcap": softcap(get, "final_logit_softcapping", cap),
        "windows": tuple(window if slide else None for slide in slides),
        "kv_sources": _sources(get, slides),
    }


def _gemma3n_slides(layer: int) -> bool:
    return (layer + 1) % 5 != 0


def _each(sizes: list[int], num_layers: int) -> tuple[int, ...]:
    return tuple(sizes) if len(sizes) > 1 else tuple(sizes) * num_layers


def _gate_cutoffs(get: Fields) -> tuple[float | None, ...]:
    """activation_sparsity_pattern: which share of normally distributed numbers is below the cutoff.
    Without it, of models of more than ten layers the first ten have one."""
    shares = get.per_layer("activation_sparsity_pattern")
    if shares is None:
        sparse = 10 if get.num_layers > 10 else 0
        shares = [0.95] * sparse + [0.0] * (get.num_layers - sparse)
    for share in shares:
        own = Fields({"activation_sparsity_pattern": share}, get.path)
        own.number("activation_sparsity_pattern", kind=float, low=0.0, high=0.999999)
    return tuple(NormalDist().inv_cdf(share) if share > 0 else None for share in shares)


def _shapes(get: Fields, head_dim: int, slides: list[bool]) -> tuple[AttentionShape, ...]:
    """Hubs name the global layers' sizes once, transformers 5 those of each layer that differs."""
    kv_heads = get.number("num_key_value_heads", get.number("num_attention_heads"))
    are_values = get.flag("attention_k_eq_v", False)
    named = get.raw.get("per_layer_config")
    if named is None:
        own = {"head_dim": get.number("global_head_dim", 512)}
        if are_values:
            own["num_key_value_heads"] = get.number("num_global_key_value_heads", kv_heads)
        by_layer = {layer: own for layer, slide in enumerate(slides) if not slide}
    else:
        by_layer = _by_layer(get, named)
    shapes = []
    for layer, slide in enumerate(slides):
        own = Fields(by_layer.get(layer, {}), get.path)
        shape = AttentionShape(
            own.number("num_key_value_heads", kv_heads),
            own.number("head_dim", head_dim),
            are_values and not slide,
        )
        where = f"{get.path}: layer {layer}"
        check_heads(where, get.number("num_attention_heads"), shape.kv_heads, shape.head_dim)
        shapes.append(shape)
    return tuple(shapes)


def _by_layer(get: Fields, named: object) -> dict[int, dict]:
    """per_layer_config by numbers: transformers writes them with as many digits as the last
    layer's has."""
    if not isinstance(named, dict) or not all(
        key.isdecimal() and isinstance(own, dict) for key, own in named.items()
    ):
        raise BadCheckpoint(f"{get.path}: per_layer_config is {named!r}; expected layers' fields.")
    return {int(key): own for key, own in named.items()}


def _sources(get: Fields, slides: list[bool]) -> tuple[int, ...]:
    """The last layers attend what the last one of their kind before them has."""
    num_layers = get.num_layers
    first = num_layers - get.number("num_kv_shared_layers", 0, low=0, high=num_layers - 1)
    latest = {slide: layer for layer, slide in enumerate(slides[:first])}
    if not set(slides[first:]) <= set(latest):
        raise BadCheckpoint(
            f"{get.path}: num_kv_shared_layers is {num_layers - first}: of the {first} layers "
            "before those, none is of a kind that they need."
        )
    return tuple(layer if layer < first else latest[slides[layer]] for layer in range(num_layers))


def _inner_sizes(get: Fields, sources: tuple[int, ...]) -> tuple[int, ...]:
    """Those that share keys and values may have twice as wide MLPs."""
    size = get.number("intermediate_size", high=MOST_ROWS // 2)
    if not get.flag("use_double_wide_mlp", False):
        return ()
    return tuple(size if layer == source else 2 * size for layer, source in enumerate(sources))


def _ropes(get: Fields, shapes: tuple[AttentionShape, ...], slides: list[bool]) -> tuple:
    """Local layers turn by an embedding of their own, global ones a part of their pairs."""
    given = get.raw.get("rope_parameters") or {
        _LOCAL: {"rope_type": "default", "rope_theta": 1e4},
        _GLOBAL: {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 1e6,
        },
    }
    fields = Fields({**get.raw, "rope_parameters": given}, get.path)
    kinds = (_LOCAL if slide else _GLOBAL for slide in slides)
    return tuple(
        read_rope(fields, shape.head_dim, layers=kind)
        for kind, shape in zip(kinds, shapes, strict=True)
    )


def _per_layer_inputs(get: Fields) -> PerLayerInputs | None:
    size = get.number("hidden_size_per_layer_input", 0, low=0, high=MOST_ROWS // get.num_layers)
    if not size:
        return None
    rows = get.number("vocab_size_per_layer_input", 262144, low=get.number("vocab_size"))
    return PerLayerInputs(rows, size)


def _experts(get: Fields) -> dict:
    if not get.flag("enable_moe_block", False):
        return {}
    experts = Experts(
        get.number("num_experts"),
        get.number("top_k_experts"),
        get.number("moe_intermediate_size"),
        router="router.proj",
        gate="experts.{}.gate_proj",
        up="experts.{}.up_proj",
        down="experts.{}.down_proj",
        router_scale="router.scale",
        expert_scale="router.per_expert_scale",
        beside=BesideMlp(
            before="pre_feedforward_layernorm_2",
            after="post_feedforward_layernorm_2",
            after_mlp="post_feedforward_layernorm_1",
        ),
    )
    return {
        "experts": (checked_experts(get, experts),) * get.num_layers,
        "stacked": (
            Stacked(
                "experts.gate_up_proj",
                ("experts.{}.gate_proj.weight", "experts.{}.up_proj.weight"),
            ),
            Stacked("experts.down_proj", ("experts.{}.down_proj.weight",)),
        ),
    }


_UNIFIED = {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 262144,
    "sliding_window": 1024,
}
_GEMMA4 = {
    **_UNIFIED,
    "max_position_embeddings": 131072,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
}
_SHAPES = "local and global layers with heads of their own sizes; norms of values"
_TEXT_PART = "the other parts are not loaded"

_GEMMA3N = {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "vocab_size": 262400,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "altup_num_inputs": 4,
    "num_kv_shared_layers": 15,
    "laurel_rank": 64,
}

GEMMA_FAMILIES: dict[str, Family] = {
    "Gemma3nForCausalLM": Family(
        "Gemma 3n",
        "four residual streams beside each other; a learnt residual beside attention; gates of "
        "which few numbers count; norms of values; layers that attend others' pages; inputs of "
        "each layer, read by token",
        gemma3n,
        _GEMMA3N,
    ),
    "Gemma3nForConditionalGeneration": Family(
        "Gemma 3n E2B, E4B (the text part)",
        f"as Gemma 3n; {_TEXT_PART}",
        gemma3n,
        _GEMMA3N,
        text_config=True,
    ),
    "Gemma4ForCausalLM": Family(
        "Gemma 4",
        f"{_SHAPES}; layers that attend others' pages; inputs of each layer, read by token; "
        "experts beside an MLP",
        gemma4,
        _GEMMA4,
    ),
    "Gemma4ForConditionalGeneration": Family(
        "Gemma 4 E2B, E4B, 26B-A4B, 31B (the text part)",
        f"as Gemma 4; {_TEXT_PART}",
        gemma4,
        _GEMMA4,
        text_config=True,
    ),
    "Gemma4UnifiedForCausalLM": Family(
        "Gemma 4 12B", f"{_SHAPES}; keys that are values", gemma4, _UNIFIED
    ),
    "Gemma4UnifiedForConditionalGeneration": Family(
        "Gemma 4 12B (the text part)",
        f"as Gemma 4; {_TEXT_PART}",
        gemma4,
        _UNIFIED,
        text_config=True,
    ),
}

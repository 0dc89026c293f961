"""The architectures that the decoder runs: what sets each apart from plain Llama.

One function per family, from config.json to ModelConfig fields; one entry in FAMILIES. Everything
the decoder can do is a field of ModelConfig, so a family that only mixes known features needs
nothing else. Names of tensors follow Hugging Face (skeleton.py).
"""

from __future__ import annotations

from .errors import BadCheckpoint


def llama(raw: dict, get, num_layers: int) -> dict:
    """Llama 2, 3, 3.1, 3.2 and everything converted to its layout."""
    bias = get.flag("attention_bias", False)
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": get.flag("mlp_bias", False),
        "windows": (None,) * num_layers,
    }


def mistral(raw: dict, get, num_layers: int) -> dict:
    """Mistral 7B and Nemo. A config.json that leaves sliding_window out means 4096; null means
    none.
    """
    window = (
        get.number("sliding_window", 4096, high=1 << 31)
        if raw.get("sliding_window", 4096)
        else None
    )
    return {"windows": (window,) * num_layers}


def qwen2(raw: dict, get, num_layers: int) -> dict:
    """Qwen2 and Qwen2.5: biases on q, k, v; windows only from layer `max_window_layers` on, when
    switched on.
    """
    return {"qkv_bias": True, "windows": _qwen_windows(raw, get, num_layers)}


def qwen3(raw: dict, get, num_layers: int) -> dict:
    """Qwen3 (dense): a norm on every query and key head."""
    bias = get.flag("attention_bias", False)
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "qk_norm": True,
        "windows": _qwen_windows(raw, get, num_layers),
    }


def _qwen_windows(raw: dict, get, num_layers: int) -> tuple[int | None, ...]:
    if not get.flag("use_sliding_window", False) or raw.get("sliding_window", 4096) is None:
        return (None,) * num_layers
    window = get.number("sliding_window", 4096, high=1 << 31)
    kinds = raw.get("layer_types")
    if kinds is None:
        first = get.number("max_window_layers", 28, low=0)
        return tuple(window if i >= first else None for i in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise BadCheckpoint(
            f"{get.path}: layer_types must name {num_layers} layers, got {kinds!r}."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


FAMILIES = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
}

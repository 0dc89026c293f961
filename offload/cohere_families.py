"""Cohere's architectures, whose attention and MLP read the same norm and stand side by side: what
each is made of, from config.json. As families.py, in whose models one follows the other."""

from __future__ import annotations

from .config_fields import Fields
from .errors import UnsupportedModel
from .families import Family, llama
from .gateless_families import layer_norms
from .model_config import Norms
from .rope_config import read_rope


def cohere(get: Fields, head_dim: int, theta: float = 5e5) -> dict:
    if get.flag("use_qk_norm", False):
        raise UnsupportedModel(
            f"{get.path}: norms of queries and keys (use_qk_norm) are not supported by this family."
        )
    rope = read_rope(get, head_dim, theta=theta, interleaved=True)
    return {
        **llama(get, head_dim),
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
    fields = cohere(get, head_dim, theta=1e4)
    ropes = zip(fields["ropes"], windows, strict=True)
    return {
        **fields,
        "ropes": tuple(None if window is None else rope for rope, window in ropes),
        "windows": windows,
    }


_COHERE = {"tie_word_embeddings": True, "max_position_embeddings": 8192}

COHERE_FAMILIES: dict[str, Family] = {
    "CohereForCausalLM": Family(
        "Command R (35B), Aya 23, Aya Expanse 8B",
        "attention and MLP side by side behind one layer norm; interleaved RoPE",
        cohere,
        _COHERE,
    ),
    "Cohere2ForCausalLM": Family(
        "Command R7B, Command A, Tiny Aya",
        "as Command R, with windows in three of four layers and no positions in the fourth",
        cohere2,
        _COHERE,
    ),
}

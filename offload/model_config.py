"""What a model is made of, read from its config.json.

Understands the layout that hubs carry (`rope_scaling`, `rope_theta`, `torch_dtype`) and the one
transformers 5 writes (`rope_parameters`, `dtype`). Which architectures there are, and what sets
each apart, stands in families.py. Knows no weights and allocates nothing.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from .errors import BadCheckpoint, UnsupportedModel

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# No model comes near; what says more is damaged, and would overflow sizes in bytes.
_MOST_ROWS = 1 << 24
_MOST_POSITIONS = (1 << 31) - 1


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: `kind` is default, linear, llama3 or yarn; `parameters` are that
    kind's own.
    """

    kind: str
    theta: float
    parameters: dict = field(default_factory=dict)


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer, as the one configurable decoder needs it."""

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int  # the most tokens the model was made for, RoPE scaling included
    norm_eps: float
    rope: RopeConfig
    dtype: str  # of the checkpoint: float32, bfloat16 or float16
    tied_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each query and key head before RoPE
    attention_softcap: float = 0.0  # the bound of attention scores; 0 = none
    windows: tuple[
        int | None, ...
    ] = ()  # per layer: tokens a query sees, itself included; None = all

    @property
    def groups(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads


def load_json(path: Path) -> dict:
    """A JSON object from `path`. Raises BadCheckpoint when it is missing, unreadable or not an
    object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadCheckpoint(
            f"{path.parent} has no {path.name}. A model folder needs config.json, "
            "*.safetensors and tokenizer.json; "
            "give the folder that holds them, or a Hugging Face id."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadCheckpoint(
            f"{path} cannot be read as JSON ({error}). Download the model again."
        ) from error
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path} holds a {type(value).__name__}, not an object.")
    return value


class _Fields:
    """Typed look-ups in config.json, so that a wrong value is named instead of failing later."""

    def __init__(self, raw: dict, path: Path):
        self.raw, self.path = raw, path

    def number(self, name: str, default=None, *, kind=int, low=1, high=_MOST_ROWS):
        value = self.raw.get(name)
        if value is None:
            value = default
        if value is None:
            raise BadCheckpoint(f"{self.path} does not say {name}.")
        right_type = isinstance(value, int) or (kind is float and isinstance(value, float))
        if isinstance(value, bool) or not right_type or not low <= value <= high:
            raise BadCheckpoint(
                f"{self.path}: {name} is {value!r}; expected a number from {low} to {high}."
            )
        return kind(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise BadCheckpoint(f"{self.path}: {name} is {value!r}; expected true or false.")
        return value


def read_model_config(folder: Path) -> ModelConfig:
    """The model's configuration. Raises UnsupportedModel or BadCheckpoint, saying what and what to
    do.
    """
    from .families import FAMILIES

    path = folder / "config.json"
    raw = load_json(path)
    names = raw.get("architectures") or []
    architecture = names[0] if isinstance(names, list) and names else None
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise UnsupportedModel(
            f"{path}: the architecture {architecture or raw.get('model_type')!r} is not supported. "
            f"Supported: {', '.join(sorted(FAMILIES))}."
        )
    if raw.get("quantization_config"):
        method = raw["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise UnsupportedModel(
            f"{path}: the checkpoint is already quantised ({method}). Use the unquantised model; "
            "--weight-bits 8 or 4 quantises it while loading."
        )
    get = _Fields(raw, path)
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModel(f"{path}: hidden_act {activation!r} is not supported, only silu.")

    num_heads = get.number("num_attention_heads")
    hidden = get.number("hidden_size")
    head_dim = get.number("head_dim", hidden // num_heads or None)
    num_kv_heads = get.number("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise BadCheckpoint(
            f"{path}: {num_heads} attention heads cannot share {num_kv_heads} KV heads evenly."
        )
    if num_heads * head_dim > _MOST_ROWS:
        raise BadCheckpoint(f"{path}: {num_heads} heads of {head_dim} are more than any model has.")
    if head_dim % 8:
        raise UnsupportedModel(f"{path}: head_dim {head_dim} is not a multiple of 8.")
    num_layers = get.number("num_hidden_layers", high=4096)
    rope = _read_rope(raw, path)
    family = FAMILIES[architecture](raw, get, num_layers)
    return ModelConfig(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden,
        intermediate_size=get.number("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=get.number("vocab_size"),
        max_positions=_max_positions(get, rope),
        norm_eps=get.number("rms_norm_eps", 1e-6, kind=float, low=0.0, high=1.0),
        rope=rope,
        dtype=_read_dtype(raw, path),
        tied_embeddings=get.flag("tie_word_embeddings", False),
        **family,
    )


def _read_dtype(raw: dict, path: Path) -> str:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    name = str(name).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise UnsupportedModel(
            f"{path}: dtype {name!r} is not supported. Supported: {', '.join(DTYPE_BYTES)}."
        )
    return name


_YARN_OPTIONS = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")


def _is_number(value) -> bool:
    """Whether it is a finite number of ordinary size: JSON as Python reads it has NaN, and integers
    without end.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 1 << 62


def _read_rope(raw: dict, path: Path) -> RopeConfig:
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or any(isinstance(v, dict) for v in parameters.values()):
        raise UnsupportedModel(
            f"{path}: rope_parameters per layer type are not supported: {parameters}"
        )
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    theta = parameters.get("rope_theta", raw.get("rope_theta", 10000.0))
    if not _is_number(theta) or theta <= 1:
        raise BadCheckpoint(f"{path}: rope_theta is {theta!r}; expected a number above 1.")
    known = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
        "yarn": ("factor", "original_max_position_embeddings"),
    }
    if not isinstance(kind, str) or kind not in known:
        raise UnsupportedModel(
            f"{path}: RoPE scaling {kind!r} is not supported. Supported: {', '.join(known)}."
        )
    parameters = {k: v for k, v in parameters.items() if k not in ("rope_type", "type")}
    parameters.pop("rope_theta", None)
    if kind == "yarn":
        original = parameters.get("original_max_position_embeddings")
        if original is None:
            original = raw.get("max_position_embeddings")
        parameters["original_max_position_embeddings"] = original
    for name in known[kind]:
        value = parameters.get(name)
        if not _is_number(value) or value <= 0:
            raise BadCheckpoint(f"{path}: RoPE scaling {kind} needs {name} above 0, got {value!r}.")
    for name in _YARN_OPTIONS if kind == "yarn" else ():
        value = parameters.get(name)
        if value is not None and (not _is_number(value) or value < 0):
            raise BadCheckpoint(f"{path}: RoPE scaling {kind} has {name} {value!r}.")
    partial = parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise UnsupportedModel(
            f"{path}: a partial rotary embedding is not supported by this family."
        )
    return RopeConfig(kind, float(theta), parameters)


def _max_positions(get: _Fields, rope: RopeConfig) -> int:
    positions = get.number("max_position_embeddings", 2048, high=_MOST_POSITIONS)
    if rope.kind == "yarn":  # hub configs keep the original length and state the factor
        original = rope.parameters["original_max_position_embeddings"]
        stretched = original * rope.parameters["factor"]
        positions = max(positions, int(min(stretched, _MOST_POSITIONS)))
    return positions

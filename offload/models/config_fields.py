"""Typed look-ups in a model's config.json, so that a wrong value is named instead of failing later.

Knows JSON and numbers, and no architecture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard, overload

from ..errors import BadCheckpoint, UnsupportedModel
from .open_file import check_system

# No model comes near; what says more is damaged, and would overflow sizes in bytes.
MOST_ROWS = 1 << 24
MOST_POSITIONS = (1 << 31) - 1
MOST_EXPERTS = 1024
_MOST_HEAD_DIM = 1024  # that kernels take
_MOST_LAYERS = 4096


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
        if isinstance(error, OSError):
            check_system(path, error)
        raise BadCheckpoint(
            f"{path} cannot be read as JSON ({error}). Download the model again."
        ) from error
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path} holds a {type(value).__name__}, not an object.")
    return value


def is_number(value) -> TypeGuard[int | float]:
    """Whether it is a finite number of ordinary size: JSON as Python reads it has NaN, and integers
    without end.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 1 << 62


def check_heads(where: Path | str, num_heads: int, kv_heads: int, head_dim: int) -> None:
    """Raises BadCheckpoint for heads that no model has, UnsupportedModel for those that kernels do
    not take. where: what messages begin with.
    """
    if num_heads % kv_heads:
        raise BadCheckpoint(
            f"{where}: {num_heads} attention heads cannot share {kv_heads} KV heads evenly."
        )
    if num_heads * head_dim > MOST_ROWS:
        raise BadCheckpoint(
            f"{where}: {num_heads} heads of {head_dim} are more than any model has."
        )
    if head_dim > _MOST_HEAD_DIM:
        raise UnsupportedModel(f"{where}: head_dim {head_dim} is above {_MOST_HEAD_DIM}.")


class Fields:
    """The fields of one config.json. What is absent or null has its default. Raises BadCheckpoint.

    raw: the object; path: of the file, for messages.
    """

    def __init__(self, raw: dict, path: Path):
        self.raw, self.path = raw, path

    @overload
    def number(
        self,
        name: str,
        default: Any = None,
        *,
        kind: type[int] = int,
        low: int = 1,
        high: int = MOST_ROWS,
    ) -> int: ...
    @overload
    def number(
        self, name: str, default: Any = None, *, kind: type[float], low: float, high: float
    ) -> float: ...
    def number(
        self,
        name: str,
        default: Any = None,
        *,
        kind: type[float] = int,
        low: float = 1,
        high: float = MOST_ROWS,
    ) -> float:
        """A whole number (kind=int) or any (kind=float) from low to high."""
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

    def numbers(self, name: str) -> list[int]:
        """Of each layer, where the file lists them; else one for all."""
        values = self.raw.get(name)
        if not isinstance(values, list):
            return [self.number(name)]
        of_layers = self.per_layer(name) or []
        return [Fields({name: value}, self.path).number(name) for value in of_layers]

    def positive(self, name: str, default: float | None = None) -> float:
        """A number above 0, of a size that float32 holds."""
        return self.number(name, default, kind=float, low=1e-30, high=1e30)

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise BadCheckpoint(f"{self.path}: {name} is {value!r}; expected true or false.")
        return value

    @property
    def num_layers(self) -> int:
        """Where no number is given, of the layers whose kinds are listed one by one."""
        listed = self.raw.get("layers_block_type", self.raw.get("hybrid_override_pattern"))
        counted = len(listed) if isinstance(listed, list | str) and listed else None
        return self.number("num_hidden_layers", counted, high=_MOST_LAYERS)

    def per_layer(self, name: str) -> list | None:
        """A list with one entry for each layer, or None where it is absent. A longer one is cut."""
        values = self.raw.get(name)
        if values is None:
            return None
        if not isinstance(values, list) or len(values) < self.num_layers:
            raise BadCheckpoint(
                f"{self.path}: {name} must name {self.num_layers} layers, got {values!r}."
            )
        return values[: self.num_layers]

    def slides(self, rule: Callable[[int], bool]) -> list[bool]:
        """Whether each layer is one with a window: where layer_types says "sliding_attention", or,
        without layer_types, where rule(layer) is true.
        """
        kinds = self.per_layer("layer_types")
        if kinds is None:
            return [rule(layer) for layer in range(self.num_layers)]
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise UnsupportedModel(
                    f"{self.path}: a layer of the type {kind!r} is not supported by this family."
                )
        return [kind == "sliding_attention" for kind in kinds]

    def windows(
        self, rule: Callable[[int], bool], default: int | None = 4096
    ) -> tuple[int | None, ...]:
        """Tokens that a query of each layer sees, itself included; None = all. rule: see slides.
        default: where sliding_window is left out; null is none.
        """
        if self.raw.get("sliding_window", default) is None:
            return (None,) * self.num_layers
        window = self.number("sliding_window", default, high=MOST_POSITIONS)
        return tuple(window if slide else None for slide in self.slides(rule))

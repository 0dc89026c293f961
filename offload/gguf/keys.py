"""Look-ups in what one GGUF file says about its model. Knows no architectures."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import BadCheckpoint, UnsupportedModel
from .file import GgufHeader, Strings


class Keys:
    """What one file says. factors: of its RoPE's frequencies, by the names of its tensors."""

    def __init__(self, header: GgufHeader, factors: dict[str, list[float]]):
        self.header, self.factors, self.path = header, factors, header.path
        self.architecture = header.metadata.get("general.architecture")

    def get(self, key: str, default=None) -> Any:
        """A value of the architecture's; an array as a list."""
        value = self.header.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, Strings):
            raise BadCheckpoint(f"{self.path}: {key} is a list of texts.")
        return value.tolist() if isinstance(value, np.ndarray) else value

    def same(self, key: str, default=None) -> Any:
        """A value that may stand there once for each layer: of those that are not 0, if they are
        all alike."""
        value = self.get(key, default)
        if isinstance(value, list):
            values = {v for v in value if v} or {0}
            if len(values) > 1:
                raise UnsupportedModel(
                    f"{self.path}: layers differ in {key}, which Ebbtide does not run."
                )
            (value,) = values
        return value

    def first(self, key: str) -> Any:
        """A value that may stand there once for each layer: the first one."""
        value = self.get(key)
        return (value or [None])[0] if isinstance(value, list) else value

    def has(self, end: str) -> bool:
        """Whether a layer has a tensor of this name."""
        return any(
            name.startswith("blk.") and name.split(".", 2)[-1] == end
            for name in self.header.tensors
        )

    def layers_with(self, end: str) -> list[bool]:
        """Of each layer, whether it has a tensor of this name."""
        layers = range(self.num_layers)
        return [f"blk.{layer}.{end}" in self.header.tensors for layer in layers]

    @property
    def num_layers(self) -> int:
        count, extra = self.get("block_count"), self.get("nextn_predict_layers", 0)
        if not isinstance(count, int) or not isinstance(extra, int):
            raise BadCheckpoint(f"{self.path} does not say how many layers there are.")
        return min(count - extra, 1 << 16)

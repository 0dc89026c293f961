"""Tensors that were converted once and are read again and again: a scratch file, in groups that are
read together. Knows no layers and no order of reading.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path

import torch

from ..kernels.quantised import QuantisedWeight
from .errors import StorageError
from .open_file import forget
from .packing import Kept, aligned
from .past_cache import PastCacheReader, whole_blocks

_NAME = "the weights' scratch file"


class TensorScratch:
    """Groups of kept tensors in an unlinked temporary file, as they lie in memory; each has a key.
    All are added before the first is read. Several threads may read.
    """

    def __init__(self, folder: Path | None):
        self._file = tempfile.TemporaryFile(dir=folder)
        self._groups: dict[Hashable, tuple[int, list]] = {}
        self._reader: PastCacheReader | None = None  # once it is whole
        self._opening = threading.Lock()

    def add(self, key: Hashable, tensors: dict[str, Kept]) -> None:
        start, places, offset = self._file.seek(0, os.SEEK_END), [], 0
        try:
            for name, rebuild, parts in _flat(tensors):
                described = []
                for part in parts:
                    data = part.contiguous().reshape(-1).view(torch.uint8)
                    self._file.write(data.numpy())
                    self._file.write(bytes(aligned(len(data)) - len(data)))
                    described.append((offset, len(data), part.dtype, part.shape))
                    offset += aligned(len(data))
                places.append((name, rebuild, described))
            self._file.write(bytes(whole_blocks(offset) - offset))
            self._file.flush()
        except OSError as error:
            raise StorageError(f"{_NAME} could not be written: {error}") from error
        self._groups[key] = (start, places)

    def has(self, key: Hashable) -> bool:
        return key in self._groups

    def num_bytes(self, key: Hashable) -> int:
        """What `read` fills: whole blocks."""
        offset, size, _, _ = self._groups[key][1][-1][2][-1]
        return whole_blocks(offset + aligned(size))

    def read(self, key: Hashable, buffer: torch.Tensor) -> None:
        """A group, to the start of a buffer (uint8, see aligned_bytes)."""
        with self._opening:
            if self._reader is None:
                self._reader = PastCacheReader(self._file.fileno(), _NAME)
        view = memoryview(buffer.numpy())[: self.num_bytes(key)]
        self._reader.read(view, self._groups[key][0])

    def views(self, key: Hashable, buffer: torch.Tensor) -> dict[str, Kept]:
        tensors: dict[str, Kept] = {}
        for name, rebuild, described in self._groups[key][1]:
            parts = [
                buffer[offset : offset + size].view(dtype).view(shape)
                for offset, size, dtype, shape in described
            ]
            tensors[name] = rebuild(parts)
        return tensors

    def forget(self) -> bool:
        """See `open_file.forget`."""
        return forget(self._file.fileno())

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._file.close()


def _flat(tensors: dict[str, Kept]) -> list[tuple[str, object, list[torch.Tensor]]]:
    """Each tensor as plain ones and the function that puts them together again."""
    flat = []
    for name, tensor in tensors.items():
        if isinstance(tensor, QuantisedWeight):
            flat.append((name, _rebuilder(tensor), [tensor.codes, tensor.scales]))
        else:
            flat.append((name, lambda parts: parts[0], [tensor]))
    return flat


def _rebuilder(tensor: QuantisedWeight):
    # Of its own memory nothing stays: not even an empty view, which would keep all of it.
    kept = replace(tensor, codes=tensor.codes.new_empty(0), scales=tensor.scales.new_empty(0))
    return lambda parts: replace(kept, codes=parts[0], scales=parts[1])

"""Tensors that were converted once and are read again and again: a scratch file, in groups that are
read together. Knows no layers and no order of reading.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from ...kernels.quantised import QuantisedWeight
from ..disk.disk import ALIGNMENT_BYTES, KEPT_FREE_BYTES, ScratchFile, Way, check_space, default_way
from ..models.open_file import forget
from ..models.past_cache import PastCacheReader, whole_blocks
from .packing import Kept


class _Group(NamedTuple):
    """offset, num_bytes: in the file, in whole blocks. tensors: of each its name, its parts as
    (offset within the group, bytes, dtype, shape), and what makes it of these."""

    offset: int
    num_bytes: int
    tensors: list[tuple[str, list[tuple], Callable[..., Kept]]]


class TensorScratch:
    """Groups of kept tensors in a scratch file, as they lie in memory; each has a key. All are
    added before the first is read. Several threads may read.

    num_bytes: of all groups, each in whole blocks; the file has room for them from the beginning.
    Raises DoesNotFit where the volume has less, InputError for a folder that cannot be used,
    StorageError for the rest.
    """

    def __init__(self, folder: Path | None, num_bytes: int):
        # What was written may stay in the system's cache, and is read from there then.
        way = Way.NOCACHE if default_way() is Way.DIRECT else default_way()
        self._file = ScratchFile(folder, way, step_bytes=ALIGNMENT_BYTES)
        self._groups: dict[Hashable, _Group] = {}
        self._end = 0
        self._reader: PastCacheReader | None = None  # once it is whole
        self._opening = threading.Lock()
        try:  # before anything is converted, which takes minutes
            check_space(self._file.directory, num_bytes, KEPT_FREE_BYTES)
            self._file.reserve(num_bytes)
        except BaseException:
            self._file.close()
            raise

    def add(self, key: Hashable, tensors: dict[str, Kept], buffer: torch.Tensor) -> None:
        """A group, which lies in a buffer (uint8, see aligned_bytes; whole blocks)."""
        start, used, described = buffer.data_ptr(), 0, []
        for name, tensor in tensors.items():
            parts, rebuild = _taken_apart(tensor)
            places = [(p.data_ptr() - start, p.nbytes, p.dtype, p.shape) for p in parts]
            for part, (offset, size, *_) in zip(parts, places, strict=True):
                is_there = part.is_contiguous() and 0 <= offset <= len(buffer) - size
                assert is_there, f"{name} does not lie in the buffer"
                used = max(used, offset + size)
            described.append((name, places, rebuild))
        group = _Group(self._end, whole_blocks(used), described)
        self._file.write_from(buffer.numpy().data[: group.num_bytes], group.offset)
        self._groups[key] = group
        self._end += group.num_bytes

    def has(self, key: Hashable) -> bool:
        return key in self._groups

    def num_bytes(self, key: Hashable) -> int:
        """What `read` fills: whole blocks."""
        return self._groups[key].num_bytes

    def read(self, key: Hashable, buffer: torch.Tensor) -> None:
        """A group, to the start of a buffer (uint8, see aligned_bytes)."""
        with self._opening:
            if self._reader is None:
                name = "the weights' scratch file"
                self._reader = PastCacheReader(self._file.descriptor, name)
        view = buffer.numpy().data[: self.num_bytes(key)]
        self._reader.read(view, self._groups[key].offset)

    def views(self, key: Hashable, buffer: torch.Tensor) -> dict[str, Kept]:
        tensors: dict[str, Kept] = {}
        for name, places, rebuild in self._groups[key].tensors:
            parts = [
                buffer[offset : offset + size].view(dtype).view(shape)
                for offset, size, dtype, shape in places
            ]
            tensors[name] = rebuild(*parts)
        return tensors

    def forget(self) -> bool:
        """See `open_file.forget`."""
        return forget(self._file.descriptor)

    def close(self) -> None:
        """May be called again; not while others read."""
        if self._reader is not None:
            self._reader.close()
        self._file.close()


def _taken_apart(tensor: Kept) -> tuple[list[torch.Tensor], Callable[..., Kept]]:
    """A tensor as plain ones, and the function that puts them together again."""
    if not isinstance(tensor, QuantisedWeight):
        return [tensor], lambda part: part
    # Of its own memory nothing stays: not even an empty view, which would keep all of it.
    kept = replace(tensor, codes=tensor.codes.new_empty(0), scales=tensor.scales.new_empty(0))
    rebuild = lambda codes, scales: replace(kept, codes=codes, scales=scales)  # noqa: E731
    return [tensor.codes, tensor.scales], rebuild

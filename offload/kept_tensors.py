"""How tensors of a checkpoint are kept: as they are, in float32, or in groups of few bits; in
memory, or in a scratch file. Knows no layers and no order of reading.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Hashable, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from ..kernels.quantised import (
    QuantisedWeight,
    quantise_weight,
    quantised_shapes,
    repack_mxfp4,
)
from .checkpoint import MXFP4, Checkpoint, TensorRef, read_at
from .errors import BadCheckpoint, StorageError
from .model_config import ModelConfig
from .skeleton import decides
from .tier import aligned_bytes

_ALIGNMENT = 64
_SCRATCH = "the weights' scratch file"
Kept = torch.Tensor | QuantisedWeight


def converts(config: ModelConfig, bits: int | None) -> bool:
    """Whether layers are kept otherwise than they lie in the files, where weights have `bits`."""
    return bits is not None or any(kind.by_columns for kind in config.stacked)


def keeps_experts(config: ModelConfig, bits: int | None, dtypes: Iterable[torch.dtype]) -> bool:
    """Whether routed experts whose matrices have such dtypes in the files are converted once, to a
    scratch file, where they are read one by one. What comes in four bits is converted each time
    that it is read, which takes a part of the reading.
    """
    return converts(config, bits) and any(dtype != MXFP4 for dtype in dtypes)


def kept_bits(name: str, dtype: torch.dtype, bits: int | None) -> int | None:
    """How many bits the matrix `name` of a dtype is kept in where weights have `bits`; None: as it
    is. What comes in four bits keeps its codes.
    """
    if dtype == MXFP4:
        return 4
    return None if decides(name) else bits


def stored_bytes(name: str, shape: tuple[int, ...], dtype: torch.dtype, bits: int | None) -> int:
    """Bytes of a tensor as kept: matrices as they are or group-quantised, all else in float32."""
    if len(shape) != 2:
        return aligned(math.prod(shape) * 4)
    bits = kept_bits(name, dtype, bits)
    if bits is None:
        return aligned(shape[0] * shape[1] * dtype.itemsize)
    codes, scales = quantised_shapes(shape, bits)
    return aligned(math.prod(codes) * 4) + aligned(math.prod(scales) * 2)


class Arena:
    """Memory for tensors that are kept together: the start of a buffer (uint8, aligned)."""

    def __init__(self, buffer: torch.Tensor):
        self._buffer, self._used = buffer, 0

    @classmethod
    def of(cls, num_bytes: int) -> Arena:
        """In fresh memory."""
        return cls(aligned_bytes(num_bytes))

    def take(self, num_bytes: int) -> torch.Tensor:
        """The next bytes, uint8."""
        start, self._used = self._used, self._used + aligned(num_bytes)
        return self._buffer[start : start + num_bytes]

    def empty(self, shape: tuple[int, ...], *, dtype: torch.dtype, device=None) -> torch.Tensor:
        """As torch.empty, here."""
        num_bytes = math.prod(shape) * dtype.itemsize
        return self.take(num_bytes).view(dtype).view(shape)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor, here."""
        return self.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


class TensorLoader:
    """Reads tensors as they are kept where weights have `bits`: for one thread at a time.

    refs: all that will be converted, so that memory for the largest is there from the beginning.
    (Memory taken and freed between tensors that stay does not go back to the system: at 4 bits
    loading took three times the weights.) threads: that convert; None: all.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        bits: int | None,
        refs: Iterable[TensorRef],
        threads: int | None = None,
    ):
        self._checkpoint, self._bits, self._threads = checkpoint, bits, threads
        self._staging = aligned_bytes(max((staging_bytes(ref, bits) for ref in refs), default=0))

    def load(self, name: str, arena: Arena) -> Kept:
        """A tensor, in the arena; see stored_bytes. Raises BadCheckpoint, StorageError."""
        ref = self._checkpoint.refs[name]
        bits = kept_bits(name, ref.dtype, self._bits)
        if len(ref.shape) != 2:
            return arena.keep(self._checkpoint.read(name).float())
        if ref.dtype == MXFP4:
            packed = self._checkpoint.read_mxfp4(name, self._staging)
            try:
                return repack_mxfp4(*packed, arena.empty, self._threads)
            except FloatingPointError as error:
                raise BadCheckpoint(
                    f"{ref.path}: {name}: {error}. The file is damaged; download it again."
                ) from error
        if bits is None:
            return self._checkpoint.read(name, arena.take(ref.num_bytes))
        return self.quantise(name, ref, bits, arena.empty)

    def quantise(self, name: str, ref: TensorRef, bits: int, empty=torch.empty) -> QuantisedWeight:
        """What lies at a place, a matrix of that name or a part of it."""
        try:
            return quantise_weight(self._checkpoint.read_ref(ref, self._staging), bits, empty)
        except FloatingPointError as error:
            raise BadCheckpoint(f"{name}: {error}. Use --weight-bits full.") from error


def staging_bytes(ref: TensorRef, bits: int | None) -> int:
    """What a tensor takes while it is converted."""
    if ref.dtype == MXFP4:
        return ref.num_bytes + ref.scales.num_bytes
    return 0 if bits is None else ref.num_bytes


class Scratch:
    """Groups of kept tensors in an unlinked temporary file, as they lie in memory; each has a key.
    Several threads may read.
    """

    def __init__(self, folder: Path | None):
        self._file = tempfile.TemporaryFile(dir=folder)
        self._groups: dict[Hashable, tuple[int, list]] = {}

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
            self._file.flush()
        except OSError as error:
            raise StorageError(f"{_SCRATCH} could not be written: {error}") from error
        self._groups[key] = (start, places)

    def num_bytes(self, key: Hashable) -> int:
        offset, size, _, _ = self._groups[key][1][-1][2][-1]
        return offset + aligned(size)

    def read(self, key: Hashable, buffer: torch.Tensor) -> None:
        view = memoryview(buffer.numpy())[: self.num_bytes(key)]
        done, start = 0, self._groups[key][0]
        while done < len(view):
            count = read_at(self._file.fileno(), view[done:], _SCRATCH, start + done)
            if count == 0:
                raise StorageError(f"{_SCRATCH} is shorter than what was written")
            done += count

    def views(self, key: Hashable, buffer: torch.Tensor) -> dict[str, Kept]:
        tensors: dict[str, Kept] = {}
        for name, rebuild, described in self._groups[key][1]:
            parts = [
                buffer[offset : offset + size].view(dtype).view(shape)
                for offset, size, dtype, shape in described
            ]
            tensors[name] = rebuild(parts)
        return tensors

    def close(self) -> None:
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


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT

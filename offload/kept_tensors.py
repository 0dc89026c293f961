"""How tensors of a checkpoint are kept: as they are, in float32, or in groups of few bits.
Knows no layers and no order of reading.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from .checkpoint import Checkpoint, TensorRef
from .errors import BadCheckpoint
from .packing import Bits, Empty, Form, Kept, Packing, aligned
from .skeleton import decides
from .tier import aligned_bytes


def converted_once(
    matrices: Iterable[tuple[str, Packing]], bits: Bits, *, quick_too: bool = False
) -> bool:
    """Whether matrices, of names and packings, that are read again and again are converted once, to
    a scratch file, where weights have `bits`. Else that is done on the way; see Packing.is_quick.
    quick_too: whether all are converted once but for those that lie in the files as they are kept.
    """

    def is_converted_once(name: str, packing: Packing) -> bool:
        own = None if decides(name) else packing.own_bits(bits)
        is_kept_so = packing.lies_as_kept and own is None
        return not packing.is_quick(own) or (quick_too and not is_kept_so)

    return any(is_converted_once(*matrix) for matrix in matrices)


def kept_form(name: str, packing: Packing, bits: Bits) -> Form:
    """How the matrix `name` is kept where weights have `bits`."""
    return packing.precise() if decides(name) else packing.form(packing.own_bits(bits))


def head_bits(bits: Bits) -> Bits:
    """Of the output head where weights have `bits`: never fewer than 8."""
    return 8 if bits == 4 else bits


def stored_bytes(name: str, shape: tuple[int, ...], packing: Packing, bits: Bits) -> int:
    """Bytes of a tensor as kept: matrices as they are or group-quantised, all else in float32."""
    if len(shape) != 2:
        return aligned(math.prod(shape) * 4)
    return kept_form(name, packing, bits).num_bytes(shape)


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

    staging: bytes for what is being converted, from the beginning: see most_staging. (Memory taken
    and freed between tensors that stay does not go back to the system: at 4 bits loading took three
    times the weights.) threads: that convert; None: all.
    """

    def __init__(
        self, checkpoint: Checkpoint, bits: Bits, staging: int, threads: int | None = None
    ):
        self._checkpoint, self._threads = checkpoint, threads
        self._bits: Bits = bits
        self._staging = aligned_bytes(staging)

    def load(self, name: str, arena: Arena) -> Kept:
        """A tensor, in the arena; see stored_bytes. Raises BadCheckpoint, StorageError."""
        ref = self._checkpoint.refs[name]
        if len(ref.shape) != 2:
            return arena.keep(self._checkpoint.read(name).float())
        return self.load_ref(name, ref, kept_form(name, ref.packing, self._bits), arena.empty)

    def load_ref(self, name: str, ref: TensorRef, form: Form, empty: Empty = torch.empty) -> Kept:
        """What lies at a place, a matrix of that name or a part of it, in memory that `empty`
        gives."""
        if ref.packing.lies_as_kept and form.bits is None:
            numbers = empty(ref.shape, dtype=form.dtype)
            self._checkpoint.read_into(ref, numbers.view(-1).view(torch.uint8))
            return numbers
        raw, room = self._checkpoint.read_raw(ref, self._staging)
        try:
            return ref.packing.load(raw, room, ref.shape, form, empty, self._threads)
        except FloatingPointError as error:
            raise BadCheckpoint(f"{ref.path}: {name}: {error}. {ref.packing.advice}.") from error


def staging_bytes(shape: tuple[int, ...], packing: Packing, bits: Bits) -> int:
    """What a tensor takes while it is converted."""
    bits = packing.own_bits(bits)
    is_read_in_place = packing.lies_as_kept and bits is None
    return 0 if len(shape) != 2 or is_read_in_place else packing.staging_bytes(shape, bits)


def most_staging(refs: Iterable[TensorRef], bits: Bits) -> int:
    """What the largest of some tensors takes while it is converted."""
    return max((staging_bytes(ref.shape, ref.packing, bits) for ref in refs), default=0)

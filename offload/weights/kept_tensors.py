"""How tensors of a checkpoint are kept: as they are, in float32, or in groups of few bits.
Knows no layers and no order of reading.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from ..models.checkpoint import TensorRef
from ..pages.tier import aligned_bytes
from .packing import Bits, Form, Packing, aligned
from .skeleton import decides


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


def staging_bytes(shape: tuple[int, ...], packing: Packing, bits: Bits) -> int:
    """What a tensor takes while it is converted."""
    bits = packing.own_bits(bits)
    is_read_in_place = packing.lies_as_kept and bits is None
    return 0 if len(shape) != 2 or is_read_in_place else packing.staging_bytes(shape, bits)


def most_staging(refs: Iterable[TensorRef], bits: Bits) -> int:
    """What the largest of some tensors takes while it is converted."""
    return max((staging_bytes(ref.shape, ref.packing, bits) for ref in refs), default=0)

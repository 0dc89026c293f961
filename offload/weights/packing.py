"""How the numbers of a tensor lie in a file, one object for each format: how many bytes they take,
how a matrix of them is kept, and how its bytes become that.

    Plain        numbers of a dtype, row after row
    Transposed   the same, column after column
    JoinedRows   the same, some rows in each of several places
    Mxfp4        groups of 32 inputs, four bits each and a scale, as Hugging Face has them

A format is a subclass of Packing, equal to others by what it says. Knows no files and no names;
checkpoint.py reads the bytes, kept_tensors.py decides where they go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ...kernels.quantised import (
    STRIP,
    QuantisedWeight,
    quantise_weight,
    quantised_shapes,
    repack_mxfp4,
)

_ALIGNMENT = 64
_DECODED = 1 << 18  # numbers that are decoded at once: several copies of them are made
Kept = torch.Tensor | QuantisedWeight
Shape = tuple[int, ...]
Empty = Callable[..., torch.Tensor]  # as torch.empty: (shape, dtype=)
# Of weights: 8, 4, None (as they are), or what suits each packing.
Bits = int | Literal["auto"] | None


def unquantised(tensor: Kept) -> torch.Tensor:
    """One that is kept as numbers, as all are that are not multiplied with rows."""
    assert isinstance(tensor, torch.Tensor)
    return tensor


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class Form:
    """How a matrix is kept: in groups of `bits`, or, where that is None, as numbers of a dtype."""

    bits: int | None
    dtype: torch.dtype | None = None
    is_affine: bool = False  # groups have an offset each
    is_float: bool = False  # codes of 4 bits are MXFP4's

    def num_bytes(self, shape: Shape) -> int:
        """That a matrix takes, each of its tensors aligned."""
        if self.bits is None:
            assert self.dtype is not None
            return aligned(shape[0] * shape[1] * self.dtype.itemsize)
        codes, scales = quantised_shapes(shape, self.bits, self.is_affine)
        return aligned(math.prod(codes) * 4) + aligned(math.prod(scales) * 2)

    def room(self, shape: Shape, empty: Empty) -> Kept:
        """A matrix to be filled, in memory that `empty` gives."""
        if self.bits is None:
            return empty(shape, dtype=self.dtype)
        of_codes, of_scales = quantised_shapes(shape, self.bits, self.is_affine)
        codes, scales = empty(of_codes, dtype=torch.int32), empty(of_scales, dtype=torch.float16)
        return QuantisedWeight(
            self.bits,
            shape[1],
            shape[0],
            codes,
            scales,
            is_float=self.is_float,
            is_affine=self.is_affine,
        )


@dataclass(frozen=True)
class Packing:
    """One format. Shapes are of the numbers, (out, in) for a matrix, whatever the file calls its
    own.

    advice: what to do about numbers that cannot be kept. lies_as_kept: whether the bytes in the
    file are the tensor, where no bits are asked for.
    """

    advice = "The file is damaged; download it again"
    lies_as_kept = False

    @property
    def suits_bits(self) -> int | None:
        """That weights have by "auto"."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """Of `decode`'s numbers."""
        return torch.float32

    def own_bits(self, bits: Bits) -> int | None:
        """Of `bits`, as the other methods take them."""
        return self.suits_bits if bits == "auto" else bits

    def sizes(self, shape: Shape) -> tuple[int, ...]:
        """Bytes in the file: of the tensor, and of each that belongs to it (scales)."""
        raise NotImplementedError

    def form(self, bits: int | None) -> Form:
        """How a matrix is kept where weights have `bits`; None: as it is."""
        raise NotImplementedError

    def precise(self) -> Form:
        """How a matrix is kept whose numbers must not be rounded."""
        return Form(None, self.dtype)

    def is_quick(self, bits: int | None) -> bool:
        """Whether a matrix can become what is kept each time that it is read, which takes a part of
        the reading then. Of others that is done once."""
        raise NotImplementedError

    def room_bytes(self, shape: Shape, bits: int | None) -> int:
        """What `load` needs besides its bytes and its result, a mebibyte of rows aside."""
        return 0

    def rows_apart(self, shape: Shape, form: Form) -> int | None:
        """Rows that begin and end at multiples of this are loaded without the others, by several
        threads at once, for their bytes lie in one piece; None: all rows are needed, or each would
        take much memory."""
        return None

    def of_rows(self, shape: Shape, num_rows: int) -> Packing:
        """How so many of a matrix's rows lie, see rows_apart."""
        return self

    def staging_bytes(self, shape: Shape, bits: int | None) -> int:
        """What a matrix takes while it becomes what is kept."""
        return sum(map(aligned, self.sizes(shape))) + aligned(self.room_bytes(shape, bits))

    def load(
        self,
        raw: Sequence[torch.Tensor],
        room: torch.Tensor,
        shape: Shape,
        form: Form,
        empty: Empty,
        threads: int | None,
    ) -> Kept:
        """A matrix as it is kept, in memory that `empty` gives. raw: its bytes, uint8, as `sizes`
        has them. room: room_bytes of uint8. threads: None: as many as torch has. Raises
        FloatingPointError for numbers that cannot be kept."""
        raise NotImplementedError

    def decode(self, raw: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
        """The numbers themselves, (*shape) of `dtype`; of a vector, or of a few rows."""
        raise NotImplementedError


def some_rows(shape: Shape, numbers: int | None = None) -> Iterator[slice]:
    """Rows of a matrix in whole strips, of about so many numbers; None: as are decoded at once."""
    numbers = _DECODED if numbers is None else numbers
    step = max(1, numbers // (STRIP * max(1, shape[1]))) * STRIP
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def kept_by_rows(
    shape: Shape,
    form: Form,
    empty: Empty,
    parts: Iterable[tuple[slice, torch.Tensor]],
    make: Callable[..., QuantisedWeight] = quantise_weight,
) -> Kept:
    """A matrix as it is kept, of which there are some rows at a time: see some_rows.

    parts: rows, and their numbers (rows, in) or what `make` takes in place of those. make(part,
    bits, empty): a weight of some rows. Raises FloatingPointError for numbers that are not finite.
    """
    kept = form.room(shape, empty)
    for rows, values in parts:
        if form.bits is None:
            assert isinstance(kept, torch.Tensor)
            kept[rows] = values
            if not bool(torch.isfinite(kept[rows]).all()):
                raise FloatingPointError("weights are not finite")
        else:
            make(values, form.bits, places_of(kept, rows))
    return kept


def places_of(kept: Kept, rows: slice) -> Empty:
    """What gives the memory of some rows of a matrix, whole strips, to who makes them: of its codes
    and then of its scales, or of its numbers."""
    if isinstance(kept, QuantisedWeight):
        strips = slice(rows.start // STRIP, -(-rows.stop // STRIP))
        places = iter((kept.codes[strips], kept.scales[strips]))
    else:
        places = iter((kept[rows],))
    return lambda *_, **__: next(places)


@dataclass(frozen=True)
class Plain(Packing):
    """Numbers of a dtype, row after row."""

    kind: torch.dtype
    advice = "Use --weight-bits full"
    lies_as_kept = True

    @property
    def dtype(self) -> torch.dtype:
        return self.kind

    def sizes(self, shape: Shape) -> tuple[int, ...]:
        return (math.prod(shape) * self.kind.itemsize,)

    def form(self, bits: int | None) -> Form:
        return Form(bits, self.kind)

    def is_quick(self, bits: int | None) -> bool:
        return bits is None

    def rows_apart(self, shape: Shape, form: Form) -> int | None:
        return STRIP

    def load(self, raw, room, shape, form, empty, threads) -> Kept:
        numbers = self.decode(raw, shape)
        if form.bits is None:
            return empty(shape, dtype=self.kind).copy_(numbers)
        return quantise_weight(numbers, form.bits, empty)

    def decode(self, raw: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
        return raw[0].view(self.kind).view(shape)


@dataclass(frozen=True)
class Constant(Packing):
    """Numbers that are all the same, of no bytes: vectors alone."""

    value: float

    def sizes(self, shape: Shape) -> tuple[int, ...]:
        return (0,)

    def decode(self, raw: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
        return torch.full(shape, self.value)


@dataclass(frozen=True)
class Transposed(Plain):
    """Numbers of a dtype, column after column. parts: matrices that lie side by side, rows and all,
    of which this one is number `part`."""

    part: int = 0
    parts: int = 1
    lies_as_kept = False

    def sizes(self, shape: Shape) -> tuple[int, ...]:
        return (self.parts * super().sizes(shape)[0],)

    def is_quick(self, bits: int | None) -> bool:
        return False

    def rows_apart(self, shape: Shape, form: Form) -> int | None:
        return None

    def room_bytes(self, shape: Shape, bits: int | None) -> int:
        return 0 if bits is None else super().sizes(shape)[0]

    def load(self, raw, room, shape, form, empty, threads) -> Kept:
        if form.bits is None:
            return empty(shape, dtype=self.kind).copy_(self.decode(raw, shape))
        turned = room[: super().sizes(shape)[0]].view(self.kind).view(shape)
        return quantise_weight(turned.copy_(self.decode(raw, shape)), form.bits, empty)

    def decode(self, raw: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
        rows, columns = shape
        side_by_side = super().decode(raw, (columns, self.parts * rows))
        return side_by_side[:, self.part * rows : (self.part + 1) * rows].t()


@dataclass(frozen=True)
class JoinedRows(Plain):
    """Numbers of a dtype, so many rows of them in each of several places."""

    rows: tuple[int, ...] = ()
    lies_as_kept = False

    def rows_apart(self, shape: Shape, form: Form) -> int | None:
        return None

    def sizes(self, shape: Shape) -> tuple[int, ...]:
        row_bytes = math.prod(shape[1:]) * self.kind.itemsize
        return tuple(rows * row_bytes for rows in self.rows)

    def decode(self, raw: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
        return torch.cat([part.view(self.kind) for part in raw]).view(shape)


@dataclass(frozen=True)
class Mxfp4(Packing):
    """MXFP4 in two tensors: codes (out, groups, 16) and exponents (out, groups). Keeps its codes,
    whatever bits are asked for."""

    group = 32

    def sizes(self, shape: Shape) -> tuple[int, ...]:
        num_groups = math.prod(shape) // self.group
        return num_groups * (self.group // 2), num_groups

    def form(self, bits: int | None) -> Form:
        return Form(4, is_float=True)

    def is_quick(self, bits: int | None) -> bool:
        return True

    def load(self, raw, room, shape, form, empty, threads) -> QuantisedWeight:
        exponents = raw[1].view(shape[0], -1)
        return repack_mxfp4(raw[0].view(*exponents.shape, -1), exponents, empty, threads)

    def decode(self, raw: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
        weight = self.load(
            raw, raw[0][:0], (math.prod(shape[:-1]), shape[-1]), Form(4), torch.empty, 1
        )
        return weight.rows(0, weight.out_features).view(shape)

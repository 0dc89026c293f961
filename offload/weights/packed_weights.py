"""Matrices that were quantised before they were written: AWQ, GPTQ, compressed-tensors and FP8, a
Packing for each way of becoming what is kept.

    Codes4       codes of 4 bits in groups of whole 32s: kept as they are
    Codes8       symmetric codes of 8 bits in such groups: kept as they are
    Scattered    codes whose groups are neighbours no longer, or that have other zeros: decoded
    Float8       float8 with a scale for each block: decoded

What is decoded becomes weights of 8 or 4 bits, or, where none are asked for, numbers of 16 bits;
some rows at a time. Knows no names: packed_modules.py finds the tensors.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ...kernels.affine import CodeOrder, codes_of, repack_affine
from ...kernels.quantised import QuantisedWeight, repack_int8
from .packing import Form, Kept, Packing, Shape, aligned, kept_by_rows, some_rows

_WORD = 32  # bits
_INFINITE = 0x7F  # of float8's seven bits: not a number
_BIAS = 2.0**8  # between the exponents of float16 and of float8


class Layout(enum.Enum):
    """How codes, scales and zeros of whole numbers lie in a file. G: groups; words are int32 of 8
    codes of 4 bits, or 4 of 8."""

    AWQ = 0  # words (in, out / 8); scales (G, out); zeros words (G, out / 8), in the same order
    GPTQ = 1  # words (in / 8, out); scales (G, out); zeros words (G, out / 8)
    ROWS = 2  # words (out, in / 8); scales (out, G); zeros words (out / 8, G)
    BYTES = 3  # signed bytes (out, in); scales (out, G)


_ORDERS = {
    Layout.AWQ: CodeOrder.WORDS_OF_OUTPUTS,
    Layout.GPTQ: CodeOrder.WORDS_OF_INPUTS,
    Layout.ROWS: CodeOrder.PAIRS,
}
_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # of AWQ: which of 8 outputs each code of a word belongs to


class Decoded(Packing):
    """What is decoded while it is loaded, some rows at a time. dtype: of numbers that are not
    quantised again."""

    @property
    def dtype(self) -> torch.dtype:
        raise NotImplementedError

    @property
    def suits_bits(self) -> int | None:
        return 8  # which the files have, or fewer

    def form(self, bits: int | None) -> Form:
        return Form(bits, self.dtype)

    def is_quick(self, bits: int | None) -> bool:
        return False

    def load(self, raw, room, shape, form, empty, threads) -> Kept:
        return kept_by_rows(shape, form, empty, self.blocks(raw, shape))

    def decode(self, raw: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
        return torch.cat([values for _, values in self.blocks(raw, shape)]).to(self.dtype)

    def blocks(
        self, raw: Sequence[torch.Tensor], shape: Shape
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows of whole strips, one after the other, and their numbers, (rows, in) float32."""
        raise NotImplementedError


@dataclass(frozen=True)
class Codes(Packing):
    """Whole numbers: w = (code - zero) * scale. In the file codes, scales, zeros if there are, and
    the group of each input if that is there.

    num_groups: of each output. is_symmetric: zeros are the middle of the codes, whether they are
    there or not. zeros_less: what was taken from zeros before they were written. has_index: the
    last tensor is the group of each input, (in,) int32.
    """

    layout: Layout
    bits: int
    num_groups: int
    scale: torch.dtype
    has_zeros: bool
    is_symmetric: bool
    zeros_less: int = 0
    has_index: bool = False

    def precise(self) -> Form:
        return self.form(None)

    def sizes(self, shape: Shape) -> tuple[int, ...]:
        out_features, in_features = shape
        per_word = _WORD // self.bits
        num_scales = self.num_groups * out_features
        zeros = (num_scales // per_word * 4,) if self.has_zeros else ()
        index = (in_features * 4,) if self.has_index else ()
        codes = out_features * in_features * self.bits // 8
        return codes, num_scales * self.scale.itemsize, *zeros, *index

    def scales_of(self, raw: Sequence[torch.Tensor], out_features: int) -> torch.Tensor:
        """(out, groups), as the file has them."""
        scales = raw[1].view(self.scale)
        if self.layout in (Layout.ROWS, Layout.BYTES):
            return scales.view(out_features, -1)
        return scales.view(-1, out_features).t()

    def read_zeros(self, raw: Sequence[torch.Tensor], to: torch.Tensor) -> torch.Tensor:
        """Zeros, to (out, groups) of any dtype."""
        middle = 1 << (self.bits - 1)
        if not self.has_zeros or self.is_symmetric:
            return to.fill_(middle)
        mask, per_word = (1 << self.bits) - 1, _WORD // self.bits
        words = raw[2].view(torch.int32)
        if self.layout is Layout.ROWS:
            words = words.view(-1, self.num_groups)
        else:
            words = words.view(self.num_groups, -1).t()
        each = to.view(-1, per_word, self.num_groups)
        for place in range(per_word):
            output = _PLACES[place] if self.layout is Layout.AWQ else place
            zeros = (words >> (self.bits * place)) & mask
            each[:, output] = (zeros + self.zeros_less) & mask
        return to

    def check_symmetric(self, raw: Sequence[torch.Tensor]) -> None:
        """Raises FloatingPointError where zeros are not what the configuration says."""
        if not self.has_zeros:
            return
        middle = 1 << (self.bits - 1)
        zeros = raw[2]
        if self.bits == 8:
            good = {middle, middle - self.zeros_less}
        else:
            good = {17 * middle, 17 * (middle - self.zeros_less)}
        if zeros.numel() and (int(zeros[0]) not in good or not bool((zeros == zeros[0]).all())):
            raise FloatingPointError("zeros are not in the middle, which config.json says (sym)")

    def check_index(self, raw: Sequence[torch.Tensor], in_features: int) -> None:
        """Raises FloatingPointError where groups are not neighbouring inputs."""
        if self.has_index:
            each = in_features // self.num_groups
            want = torch.arange(in_features, dtype=torch.int32) // each
            if not torch.equal(raw[-1].view(torch.int32), want):
                raise FloatingPointError(
                    "inputs belong to groups in an order that config.json does not say (desc_act)"
                )


@dataclass(frozen=True)
class Codes4(Codes):
    """Of 4 bits, in groups of a multiple of 32 neighbours."""

    def form(self, bits: int | None) -> Form:
        return Form(4, is_affine=not self.is_symmetric)

    def is_quick(self, bits: int | None) -> bool:
        return True

    def room_bytes(self, shape: Shape, bits: int | None) -> int:
        # Scales and minimums, and of zeros a word's share at a time.
        return 2 * aligned(4 * shape[0] * self.num_groups) + 2 * shape[0] * self.num_groups

    def load(self, raw, room, shape, form, empty, threads) -> QuantisedWeight:
        out_features, in_features = shape
        self.check_index(raw, in_features)
        size = 4 * out_features * self.num_groups
        of = out_features, self.num_groups
        scales = room[:size].view(torch.float32).view(of)
        scales.copy_(self.scales_of(raw, out_features))
        minimums = None
        if self.is_symmetric:
            self.check_symmetric(raw)
        else:
            minimums = room[aligned(size) :][:size].view(torch.float32).view(of)
            self.read_zeros(raw, minimums).mul_(scales).neg_()
        order = _ORDERS[self.layout]
        if self.layout is Layout.ROWS:
            codes = raw[0].view(out_features, -1)
        else:
            columns = out_features // 8 if self.layout is Layout.AWQ else out_features
            codes = raw[0].view(torch.int32).view(-1, columns)
        return repack_affine(codes, scales, minimums, order, empty, threads)

    def decode(self, raw: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
        room = torch.empty(self.room_bytes(shape, None), dtype=torch.uint8)
        return self.load(raw, room, shape, self.form(None), torch.empty, 1).rows(0, shape[0])


def _byte_rows(codes: torch.Tensor, layout: Layout, shape: Shape, rows: slice) -> torch.Tensor:
    """Codes of 8 bits of some rows, -128 .. 127: (rows, in) int8."""
    values = _words(codes, layout, shape)[rows].contiguous().view(torch.int8)
    return values if layout is Layout.BYTES else values ^ -128


def _words(codes: torch.Tensor, layout: Layout, shape: Shape) -> torch.Tensor:
    """Codes of 8 bits as the file has them: int32 (out, in / 4)."""
    words = codes.view(torch.int32)
    return words.view(-1, shape[0]).t() if layout is Layout.GPTQ else words.view(shape[0], -1)


@dataclass(frozen=True)
class Codes8(Codes):
    """Of 8 bits and symmetric, in groups of a multiple of 32 neighbours."""

    def form(self, bits: int | None) -> Form:
        return Form(4 if bits == 4 else 8)

    def is_quick(self, bits: int | None) -> bool:
        return False

    def load(self, raw, room, shape, form, empty, threads) -> Kept:
        self.check_index(raw, shape[1])
        self.check_symmetric(raw)
        if form.bits == 8:
            words, scales = _words(raw[0], self.layout, shape), self.scales_of(raw, shape[0])
            are_unsigned = self.layout is not Layout.BYTES
            return repack_int8(words, scales, empty, are_unsigned=are_unsigned)
        return kept_by_rows(shape, form, empty, self._blocks(raw, shape))

    def _blocks(self, raw, shape):
        scales = self.scales_of(raw, shape[0])
        for rows in some_rows(shape):
            codes = _byte_rows(raw[0], self.layout, shape, rows)
            yield rows, _times(codes, scales[rows])

    def decode(self, raw: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
        return torch.cat([values for _, values in self._blocks(raw, shape)])


def _times(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes (rows, in) times the scales of their groups, (rows, groups): float32."""
    groups = codes.to(torch.float32).unflatten(1, (scales.shape[1], -1))
    return groups.mul_(scales.to(torch.float32).unsqueeze(-1)).flatten(1)


@dataclass(frozen=True)
class Scattered(Codes, Decoded):
    """Of 4 or 8 bits, in any groups: where there is no index, of `group_size` neighbours, the last
    one as many as are left."""

    group_size: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.scale == torch.float32 else self.scale

    def blocks(self, raw, shape):
        out_features, in_features = shape
        if self.is_symmetric:
            self.check_symmetric(raw)
        of = out_features, self.num_groups
        zeros = self.read_zeros(raw, torch.empty(of, dtype=torch.uint8))
        scales = self.scales_of(raw, out_features)
        if self.has_index:
            index = raw[-1].view(torch.int32)
            if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.num_groups:
                raise FloatingPointError("inputs belong to groups that are not there (g_idx)")
        else:
            index = torch.arange(in_features, dtype=torch.int32) // self.group_size
        for rows in some_rows(shape):
            codes = torch.empty((rows.stop - rows.start, in_features))
            codes.copy_(self._codes(raw[0], shape, rows))
            codes.sub_(zeros[rows].to(torch.float32).index_select(1, index))
            yield rows, codes.mul_(scales[rows].to(torch.float32).index_select(1, index))

    def _codes(self, raw: torch.Tensor, shape: Shape, rows: slice) -> torch.Tensor:
        """(rows, in) from 0 on."""
        if self.bits == 8:
            return _byte_rows(raw, self.layout, shape, rows).to(torch.int16) + 128
        if self.layout is Layout.ROWS:
            codes = raw.view(shape[0], -1)
        else:
            columns = shape[0] // 8 if self.layout is Layout.AWQ else shape[0]
            codes = raw.view(torch.int32).view(-1, columns)
        return codes_of(codes, _ORDERS[self.layout], rows)


@dataclass(frozen=True)
class Float8(Decoded):
    """E4M3 (out, in) times a scale for each block of outputs and inputs, or for all."""

    scale: torch.dtype
    block: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def scales_shape(self, shape: Shape) -> Shape:
        return tuple(-(-n // size) for n, size in zip(shape, self.block, strict=True))

    def sizes(self, shape: Shape) -> tuple[int, ...]:
        rows, columns = self.scales_shape(shape)
        return shape[0] * shape[1], rows * columns * self.scale.itemsize

    def blocks(self, raw, shape):
        codes = raw[0].view(shape)
        scales = raw[1].view(self.scale).view(self.scales_shape(shape)).to(torch.float32)
        for rows in some_rows(shape):
            part = codes[rows]
            if int((part & _INFINITE).max()) == _INFINITE:
                raise FloatingPointError("weights are not numbers")
            # Exponent and mantissa are float16's, to the left of them two copies of the sign.
            halves = part.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
            halves = halves.bitwise_and_(~0x4000).view(torch.float16)
            which = torch.arange(rows.start, rows.stop) // self.block[0]
            factors = scales[which] * _BIAS
            if shape[1] != factors.shape[1] * self.block[1]:  # the last block is a part of one
                factors = factors.repeat_interleave(self.block[1], 1)[:, : shape[1]]
            values = halves.to(torch.float32).unflatten(1, (factors.shape[1], -1))
            yield rows, values.mul_(factors.unsqueeze(-1)).flatten(1)

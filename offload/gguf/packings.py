"""How numbers lie in GGUF files; see packing.py.

    Blocks       groups that are Ebbtide's own but for their places: kept as they are
    WithMinimum  groups of four bits with a scale and a minimum each: kept in four bits, affine
    Dequantised  every other quantisation: decoded a few rows at a time, and kept in bits of ours
    Swapped      rows or columns in another order than Hugging Face's
    Half         every second part of a matrix's rows
    LogOf        numbers of which the model has the logarithm

Decoding is the compiled kernels', or the `gguf` package's (the extra `gguf`), which is imported
when a file needs it.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ...kernels.ggml_blocks import (
    block_bits,
    decode_blocks,
    is_decoded,
    repack_blocks,
    repack_minimum_blocks,
)
from ...kernels.quantised import STRIP, QuantisedWeight
from ..errors import UnsupportedModel
from ..weights.packing import Empty, Form, Kept, Packing, Plain, Shape, kept_by_rows, some_rows

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_REPACKED = (
    1 << 21
)  # numbers repacked at once, whose scales and minimums alone are copied, several times


def packing_of(kind: str, block: int, block_bytes: int, path: Path, name: str) -> Packing:
    """How tensors of a type lie. Raises UnsupportedModel for a type of which nobody knows, or that
    takes a package that is not there.
    """
    if kind in _PLAIN:
        return Plain(_PLAIN[kind])
    if block_bits(kind) is not None:
        return Blocks(kind, block, block_bytes)
    if not is_decoded(kind):
        _check_package(kind, path, name)
    kept = WithMinimum if kind in ("Q4_K", "Q4_1") else Dequantised
    return kept(kind, block, block_bytes)


def _check_package(kind: str, path: Path, name: str) -> None:
    """UnsupportedModel where the `gguf` package is not there, or does not know the type either."""
    if importlib.util.find_spec("gguf") is None:
        raise UnsupportedModel(
            f"{path}: {name} is in {kind}, which takes one package more: pip install "
            "'ebbtide[gguf]'. Q8_0, Q4_0 and MXFP4 are read without it, and where the compiled "
            "kernels serve (see ebbtide doctor) Q4_K_M, Q6_K and all others but IQ1 to IQ3, TQ and "
            "NVFP4."
        )
    from gguf import quants
    from gguf.constants import GGMLQuantizationType

    if kind not in GGMLQuantizationType.__members__ or (
        GGMLQuantizationType[kind] not in quants._type_traits
    ):
        raise UnsupportedModel(
            f"{path}: {name} is of the type {kind}, which Ebbtide cannot read. Use another "
            "quantisation of the model: Q8_0, Q6_K, Q4_K_M and Q4_0 are read."
        )


@dataclass(frozen=True)
class _InBlocks(Packing):
    """Blocks of some numbers of a row, row after row. kind: the format's name for them."""

    kind: str
    block: int
    block_bytes: int

    def sizes(self, shape: Shape) -> tuple[int, ...]:
        return (math.prod(shape) // self.block * self.block_bytes,)

    def decode(self, raw: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
        rows = raw[0].view(-1, shape[-1] // self.block, self.block_bytes)
        return self._decoded(rows).view(shape)

    def _decoded(self, rows: torch.Tensor) -> torch.Tensor:
        """Of blocks (rows, blocks, bytes): (rows, numbers) float32."""
        raise NotImplementedError

    def _converted(self, raw: torch.Tensor, shape: Shape, form: Form, empty: Empty) -> Kept:
        blocks = raw.view(shape[0], -1, self.block_bytes)
        parts = ((rows, self._decoded(blocks[rows])) for rows in some_rows(shape))
        return kept_by_rows(shape, form, empty, parts)


@dataclass(frozen=True)
class Blocks(_InBlocks):
    """Q8_0, Q4_0 or MXFP4. Kept as they are unless fewer bits are asked for."""

    def form(self, bits: int | None) -> Form:
        own = block_bits(self.kind)
        own = own if bits is None or own is None else min(bits, own)
        return Form(own, is_float=self.kind == "MXFP4")

    def is_quick(self, bits: int | None) -> bool:
        return self.form(bits).bits == block_bits(self.kind)

    def rows_apart(self, shape: Shape, form: Form) -> int | None:
        return STRIP if form.bits == block_bits(self.kind) else None

    def load(self, raw, room, shape, form, empty, threads) -> Kept:
        if form.bits != block_bits(self.kind):
            return self._converted(raw[0], shape, form, empty)
        return repack_blocks(raw[0].view(shape[0], -1, self.block_bytes), self.kind, empty, threads)

    def _decoded(self, rows: torch.Tensor) -> torch.Tensor:
        weight = repack_blocks(rows, self.kind)
        return weight.rows(0, weight.out_features)


@dataclass(frozen=True)
class Dequantised(_InBlocks):
    """Any quantisation that is decoded. Kept in the bits that are asked for, else in float32."""

    @property
    def suits_bits(self) -> int | None:
        return 8

    def form(self, bits: int | None) -> Form:
        return Form(bits, torch.float32)

    def is_quick(self, bits: int | None) -> bool:
        return False

    def rows_apart(self, shape: Shape, form: Form) -> int | None:
        return STRIP if is_decoded(self.kind) else None

    def load(self, raw, room, shape, form, empty, threads) -> Kept:
        return self._converted(raw[0], shape, form, empty)

    def _decoded(self, rows: torch.Tensor) -> torch.Tensor:
        if is_decoded(self.kind):
            return decode_blocks(rows, self.kind)
        from gguf import quants
        from gguf.constants import GGMLQuantizationType

        with np.errstate(all="ignore"):  # damaged scales: what is not finite is found afterwards
            numbers = quants.dequantize(rows.flatten(1).numpy(), GGMLQuantizationType[self.kind])
        return torch.from_numpy(np.ascontiguousarray(numbers, np.float32))


@dataclass(frozen=True)
class WithMinimum(Dequantised):
    """Q4_K or Q4_1: codes times a scale and a minimum, for each 32 inputs. Kept so whatever bits
    are asked for, with scales and minimums that float16 rounds; see kernels/affine.py."""

    @property
    def suits_bits(self) -> int | None:
        return None

    def form(self, bits: int | None) -> Form:
        return Form(4, is_affine=True)

    def is_quick(self, bits: int | None) -> bool:
        return True

    def rows_apart(self, shape: Shape, form: Form) -> int | None:
        return None if form.bits is None else STRIP

    def load(self, raw, room, shape, form, empty, threads) -> Kept:
        if form.bits is None:
            return self._converted(raw[0], shape, form, empty)
        blocks = raw[0].view(shape[0], -1, self.block_bytes)

        def repack(some: torch.Tensor, bits: int, empty: Empty) -> QuantisedWeight:
            return repack_minimum_blocks(some, self.kind, empty, threads)

        parts = ((rows, blocks[rows]) for rows in some_rows(shape, _REPACKED))
        return kept_by_rows(shape, form, empty, parts, repack)


@dataclass(frozen=True)
class _Wrapped(Packing):
    """What becomes of numbers that lie as `inner` says."""

    inner: Packing

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def advice(self) -> str:
        return self.inner.advice

    @property
    def suits_bits(self) -> int | None:
        return self.inner.suits_bits

    def sizes(self, shape: Shape) -> tuple[int, ...]:
        return self.inner.sizes(shape)

    def form(self, bits: int | None) -> Form:
        return self.inner.form(bits)

    def is_quick(self, bits: int | None) -> bool:
        return self.inner.is_quick(bits)


@dataclass(frozen=True)
class Swapped(_Wrapped):
    """Parts of equal size that lie in another order: in the file (count, a, b), here (count, b, a),
    from row `first` on. A part may be rows, or columns that are whole blocks.

    So lie queries and keys in llama.cpp's files, whose heads are pairs of what Hugging Face has
    half a head apart, and value heads that share a key.
    """

    count: int
    a: int
    b: int
    first: int = 0

    def rows_apart(self, shape: Shape, form: Form) -> int | None:
        alone = self.inner.rows_apart(shape, form)
        if alone is None or self.first:
            return None
        apart = math.lcm(alone, max(1, shape[0] // self.count))  # parts that change places
        return None if shape[0] % apart or self.count * apart % shape[0] else apart

    def of_rows(self, shape: Shape, num_rows: int) -> Packing:
        return replace(self, count=self.count * num_rows // shape[0])

    def room_bytes(self, shape: Shape, bits: int | None) -> int:
        return self.sizes(shape)[0] + self.inner.room_bytes(shape, bits)

    def load(self, raw, room, shape, form, empty, threads) -> Kept:
        swapped, rest = room[: len(raw[0])], room[len(raw[0]) :]
        self._swap(raw[0], swapped, shape)
        return self.inner.load([swapped], rest, shape, form, empty, threads)

    def decode(self, raw: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
        swapped = torch.empty_like(raw[0])
        self._swap(raw[0], swapped, shape)
        return self.inner.decode([swapped], shape)

    def _swap(self, raw: torch.Tensor, out: torch.Tensor, shape: Shape) -> None:
        start = self.first * (len(raw) // shape[0])
        out[:start] = raw[:start]
        parts = raw[start:].numpy().reshape(self.count, self.a, self.b, -1)
        out[start:].numpy().reshape(self.count, self.b, self.a, -1)[:] = parts.swapaxes(1, 2)


@dataclass(frozen=True)
class SwappedNumbers(_Wrapped):
    """Columns in another order, as Swapped, that are no whole blocks: decoded, and kept in bits of
    ours."""

    a: int
    b: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def suits_bits(self) -> int | None:
        return 8

    def form(self, bits: int | None) -> Form:
        return Form(bits, torch.float32)

    def is_quick(self, bits: int | None) -> bool:
        return False

    def load(self, raw, room, shape, form, empty, threads) -> Kept:
        raw_rows = raw[0].view(shape[0], -1)
        parts = (
            (rows, self.decode([raw_rows[rows].reshape(-1)], (rows.stop - rows.start, shape[1])))
            for rows in some_rows(shape)
        )
        return kept_by_rows(shape, form, empty, parts)

    def decode(self, raw: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
        numbers = self.inner.decode(raw, shape).to(torch.float32)
        return numbers.unflatten(-1, (self.a, self.b, -1)).transpose(-3, -2).flatten(-3)


@dataclass(frozen=True)
class Half(_Wrapped):
    """Of a small matrix in which parts of so many rows take turns, the first or the second ones;
    kept as they are."""

    rows: int
    which: int

    def sizes(self, shape: Shape) -> tuple[int, ...]:
        return self.inner.sizes((2 * shape[0], *shape[1:]))

    def form(self, bits: int | None) -> Form:
        return self.precise()

    def is_quick(self, bits: int | None) -> bool:
        return True

    def load(self, raw, room, shape, form, empty, threads) -> Kept:
        return empty(shape, dtype=form.dtype).copy_(self.decode(raw, shape))

    def decode(self, raw: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
        both = self.inner.decode(raw, (2 * shape[0], *shape[1:]))
        return both.unflatten(0, (-1, 2, self.rows))[:, self.which].flatten(0, 1)


@dataclass(frozen=True)
class LogOf(_Wrapped):
    """Numbers exp(x) or -exp(x), of which the model has x: a vector, or a matrix that is not
    rounded."""

    def load(self, raw, room, shape, form, empty, threads) -> Kept:
        return kept_by_rows(shape, form, empty, [(slice(None), self.decode(raw, shape))])

    def decode(self, raw: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
        return self.inner.decode(raw, shape).abs().log()

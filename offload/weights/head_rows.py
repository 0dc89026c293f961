"""Tensors in which the files hold several rows of every head, as matrices of what belongs together:
kv_b_proj of latent attention makes keys and values of all heads, and is two matrices here.

Knows no layers; a HeadRows of the model's configuration says which rows, and what they become.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import BadCheckpoint
from ..models.checkpoint import TensorRef
from ..models.layer_config import HeadRows
from .packed_weights import Decoded
from .packing import Bits, Form, Kept, Packing, Plain, Shape, aligned, kept_by_rows


def split_heads(found: dict[str, TensorRef], splits: Sequence[HeadRows]) -> dict[str, TensorRef]:
    """What the tensors of a model hold of each head, by our names. Raises BadCheckpoint for a
    tensor of another shape."""
    return {
        name.removesuffix(split.end) + split.name: rows_of_heads(name, ref, split)
        for split in splits
        for name, ref in found.items()
        if name.endswith(split.end)
    }


def rows_of_heads(name: str, ref: TensorRef, split: HeadRows) -> TensorRef:
    """What one tensor holds, of that name in the file. Raises BadCheckpoint for another shape."""
    if ref.shape != split.shape:
        raise BadCheckpoint(
            f"{ref.path}: {name} has the shape {list(ref.shape)}, but the model's configuration "
            f"asks for {list(split.shape)}."
        )
    start, stop = split.rows
    shape = split.heads * (stop - start), split.shape[1]
    if split.turned:
        shape = split.heads * split.shape[1], stop - start
    return replace(ref, packing=OfHeads(ref.packing, split), shape=shape)


@dataclass(frozen=True)
class OfHeads(Packing):
    """Some rows of every head, of a matrix that lies as `inner` says. Groups of inputs are others
    where rows are turned, so what the files have quantised is decoded."""

    inner: Packing
    split: HeadRows

    @property
    def advice(self) -> str:
        return self.inner.advice

    @property
    def dtype(self) -> torch.dtype:
        """Where the files have codes, of 16 bits."""
        plain = isinstance(self.inner, Plain | Decoded)
        return self.inner.dtype if plain else torch.bfloat16

    def own_bits(self, bits: Bits) -> int | None:
        """By "auto" 8 where the files have fewer bits."""
        return 8 if bits == "auto" and not isinstance(self.inner, Plain) else super().own_bits(bits)

    def sizes(self, shape: Shape) -> tuple[int, ...]:
        return self.inner.sizes(self.split.shape)

    def form(self, bits: int | None) -> Form:
        return Form(bits, self.dtype)

    def is_quick(self, bits: int | None) -> bool:
        return bits is None and isinstance(self.inner, Plain)

    def room_bytes(self, shape: Shape, bits: int | None) -> int:
        """The rows, where they are to be quantised; and all numbers, where they are decoded at
        once."""
        rows = 0 if bits is None else math.prod(shape) * self.dtype.itemsize
        at_once = not isinstance(self.inner, Plain | Decoded)
        return aligned(rows) + 4 * math.prod(self.split.shape) * at_once

    def load(self, raw, room, shape, form, empty, threads) -> Kept:
        if form.bits is None:
            return self._gather(raw, empty(shape, dtype=self.dtype))
        size = math.prod(shape) * self.dtype.itemsize
        numbers = self._gather(raw, room[:size].view(self.dtype).view(shape))
        return kept_by_rows(shape, form, empty, [(slice(0, shape[0]), numbers)])

    def decode(self, raw: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
        return self._gather(raw, torch.empty(shape, dtype=self.dtype))

    def _gather(self, raw: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        """The rows, to a matrix of ours."""
        split = self.split
        (start, stop), each = split.rows, split.shape[0] // split.heads
        if split.turned:
            heads = out.view(split.heads, split.shape[1], stop - start).transpose(1, 2)
        else:
            heads = out.view(split.heads, stop - start, split.shape[1])
        for first, numbers in self._blocks(raw):
            rows = torch.arange(first, first + len(numbers))
            place = rows % each
            ours = (place >= start) & (place < stop)
            heads[(rows // each)[ours], place[ours] - start] = numbers[ours].to(out.dtype)
        return out

    def _blocks(self, raw: Sequence[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
        """Numbers of the files' matrix, some rows at a time, and the first of them."""
        if isinstance(self.inner, Decoded):
            for rows, numbers in self.inner.blocks(raw, self.split.shape):
                yield rows.start, numbers
        else:
            yield 0, self.inner.decode(raw, self.split.shape)

"""The tensors of a model in its files: where each one's bytes lie, checked against what the model
needs; reads them by pread.

No memory map: a mapped file that shrinks kills the process, and its pages count as resident memory
nobody planned. A file that changes while it is open would give tensors of two models: whatever is
read is checked against what the file was when its header was. Does not know what the tensors are
for, nor how a file says where they lie: safetensors_files.py and gguf/names.py do.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...kernels.layout import RAW_DTYPES
from ..errors import BadCheckpoint
from ..weights.packing import JoinedRows, Packing, Plain, aligned
from ..weights.rereading import Rereading
from .fingerprint import blocks_of_each, spread
from .known_file import KnownFile, changed_error
from .open_file import forget, open_descriptor, read_at
from .past_cache import EndsEarly, PastCacheReader

# Of a longer piece Linux reads no more than the disk takes in one go.
_ANNOUNCED = 256 << 10
# By which a file is known: all before its tensors, however much a vocabulary takes, and what lies
# around their edges, of so many of all files at most: training that changed one vector moves those.
_MOST_HEADER_BYTES, _EDGE_BYTES = 16 << 20, 4096
_MOST_EDGES, _FEWEST_EDGES = 1024, 64


@dataclass(frozen=True)
class Place:
    """Some bytes of a file."""

    path: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor's bytes lie, and how its numbers are packed in them.

    beside: further bytes that its packing needs, in that one's order (scales).
    """

    path: Path
    offset: int
    num_bytes: int
    packing: Packing
    shape: tuple[int, ...]
    beside: tuple[Place, ...] = ()


def share(ref: TensorRef, index: int, count: int, shape: tuple[int, ...]) -> TensorRef:
    """One of `count` equal shares of a tensor's bytes, a tensor of its own."""

    def of(place: TensorRef | Place) -> dict[str, int]:
        num_bytes = place.num_bytes // count
        return {"offset": place.offset + index * num_bytes, "num_bytes": num_bytes}

    beside = tuple(replace(place, **of(place)) for place in ref.beside)
    return replace(ref, **of(ref), shape=shape, beside=beside)


def joined(refs: list[TensorRef], shape: tuple[int, ...]) -> TensorRef | None:
    """One tensor of plain numbers whose rows are those of several; None where they do not fit
    together."""
    first, *others = refs
    sizes = [math.prod(ref.shape) for ref in refs]
    row = math.prod(shape[1:])
    fit = row > 0 and sum(sizes) == math.prod(shape) and not any(size % row for size in sizes)
    alike = all(ref.packing == first.packing for ref in others)
    if not fit or not alike or not isinstance(first.packing, Plain):
        return None
    packing = JoinedRows(first.packing.dtype, tuple(size // row for size in sizes))
    beside = tuple(Place(ref.path, ref.offset, ref.num_bytes) for ref in others)
    return replace(first, packing=packing, shape=shape, beside=beside)


def rows_of_ref(ref: TensorRef, start: int, stop: int) -> TensorRef:
    """The bytes of rows [start, stop) of a matrix whose rows lie one behind the other."""
    assert not ref.beside, "these rows are in several places"
    row_bytes = ref.num_bytes // ref.shape[0]
    return TensorRef(
        ref.path,
        ref.offset + start * row_bytes,
        (stop - start) * row_bytes,
        ref.packing,
        (stop - start, *ref.shape[1:]),
    )


class Checkpoint:
    """The tensors of a model, by name.

    found: what its files hold. shapes: of those that are needed. known: the files, as they were
    before that was read of them. source, described: the files, and what says so, for messages.

    Raises BadCheckpoint for a tensor that is missing or has another shape, or numbers of no known
    kind.
    """

    def __init__(
        self,
        found: Mapping[str, TensorRef],
        shapes: Mapping[str, tuple[int, ...]],
        known: Mapping[Path, KnownFile],
        source: Path,
        described: str = "config.json",
    ):
        self.refs: dict[str, TensorRef] = {}
        self._files: dict[Path, int] = {}
        self._known = known
        self._opening = threading.Lock()
        self._rereading: Rereading | None = None
        missing = [name for name in shapes if name not in found]
        if missing:
            raise BadCheckpoint(
                f"{source} lacks {len(missing)} of {len(shapes)} tensors, {missing[0]!r} first. "
                f"The download may be incomplete, or {described} belongs to another model."
            )
        for name, shape in shapes.items():
            ref = found[name]
            if ref.shape != shape:
                raise BadCheckpoint(
                    f"{ref.path}: {name} has the shape {list(ref.shape)}, but {described} asks "
                    f"for {list(shape)}."
                )
            if ref.packing.dtype not in RAW_DTYPES:
                raise BadCheckpoint(
                    f"{ref.path}: {name} holds {_said(ref.packing.dtype)}, quantised in a way that "
                    "Ebbtide does not know. Use the unquantised model."
                )
            self.refs[name] = ref
        edges: dict[Path, set[int]] = {path: set() for path in known}
        for ref in self.refs.values():
            for place in (ref, *ref.beside):
                if place.num_bytes:  # constants are in no file
                    edges[place.path] |= {place.offset, place.offset + place.num_bytes}
        for path, file in known.items():
            file.remember(_telling_places(file.size, sorted(edges[path]), len(known)))

    def read(self, name: str) -> torch.Tensor:
        """A tensor's numbers, in fresh memory."""
        ref = self.refs[name]
        num_bytes = ref.packing.staging_bytes(ref.shape, None)
        raw, _ = self.read_raw(ref, torch.empty(num_bytes, dtype=torch.uint8))
        return ref.packing.decode(raw, ref.shape)

    def read_raw(
        self, ref: TensorRef, staging: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """A tensor's bytes as its packing takes them, at the start of `staging` (uint8), and what
        is left of that."""
        raw = []
        for place in (ref, *ref.beside):
            raw.append(staging[: place.num_bytes])
            self.read_into(place, raw[-1])
            staging = staging[aligned(place.num_bytes) :]
        return raw, staging

    def read_rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Some rows of a matrix, one small read each: (len(rows), columns)."""
        ref, first = self.row_range(name, 0, 1), self.refs[name]
        raw = torch.empty(len(rows) * ref.num_bytes, dtype=torch.uint8)
        view, size = raw.numpy().data, ref.num_bytes
        for at, row in enumerate(rows):
            self._fill(ref.path, first.offset + row * size, view[at * size : (at + 1) * size])
        self._check(ref.path)
        return ref.packing.decode([raw], (len(rows), *ref.shape[1:]))

    def row_range(self, name: str, start: int, stop: int) -> TensorRef:
        """The bytes of rows [start, stop) of a matrix whose rows lie one behind the other."""
        return rows_of_ref(self.refs[name], start, stop)

    def read_into(self, place: Place | TensorRef, out: torch.Tensor) -> None:
        """Fill `out` (uint8, place.num_bytes) from the file. A file that shrank or was written to
        is a BadCheckpoint, not a crash.
        """
        view, reader = out.numpy().data[: place.num_bytes], self._past_cache(place)
        if reader is None:
            self._fill(place.path, place.offset, view)
        else:
            try:
                reader.read(view, place.offset)
            except EndsEarly:
                raise self._truncated(place.path) from None
        self._check(place.path)

    def reread(self, refs: Iterable[TensorRef]) -> None:
        """These are read again and again from now on, as much of them past the system's cache as
        it cannot hold; see Rereading. To be said before any of them is, and good until `close`."""
        places = [place for ref in refs for place in (ref, *ref.beside)]
        self._rereading = Rereading((p.path, p.offset, p.num_bytes) for p in places)

    def _past_cache(self, place: Place | TensorRef) -> PastCacheReader | None:
        """What reads it past the system's cache; None: it comes through that."""
        if self._rereading is None:
            return None
        descriptor = self._descriptor(place.path)
        return self._rereading.reader(place.path, descriptor, place.offset, place.num_bytes)

    def announce(self, ref: TensorRef) -> None:
        """A tensor will be read soon: where it comes through the system's cache the system begins
        to read it, if it can be told to, so that the disk is busy while what came before is
        converted."""
        if not hasattr(os, "posix_fadvise"):
            return
        for place in (ref, *ref.beside):
            if self._past_cache(place) is not None:
                continue
            descriptor, stop = self._descriptor(place.path), place.offset + place.num_bytes
            for start in range(place.offset, stop, _ANNOUNCED):
                size = min(_ANNOUNCED, stop - start)
                with contextlib.suppress(OSError):  # advice is all it is
                    os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_WILLNEED)

    def fill(self, path: Path, offset: int, view: memoryview) -> None:
        """Fill the view from a byte of a file on."""
        self._fill(path, offset, view)
        self._check(path)

    def _fill(self, path: Path, offset: int, view: memoryview) -> None:
        descriptor, done = self._descriptor(path), 0
        while done < len(view):
            count = read_at(descriptor, view[done:], path, offset + done)
            if count == 0:
                raise self._truncated(path)
            done += count

    def _truncated(self, path: Path) -> BadCheckpoint:
        """For a file that ends where it did not before."""
        self._check(path)
        return BadCheckpoint(
            f"{path} ends before its tensors do; it was truncated. Download it again."
        )

    def _check(self, path: Path) -> None:
        """That what was read is of the file that the header was read of. (One that was replaced is
        still the old one as long as it is open.)"""
        if not self._known[path].is_same(self._descriptor(path)):
            raise changed_error(path)

    def is_replaced(self) -> bool:
        """Whether some file has other bytes by now than when its header was read, or its name
        belongs to another file. What is open is read on as it was in the second case."""
        return any(known.is_replaced() for known in self._known.values())

    def _descriptor(self, path: Path) -> int:
        """Of a file, opened when it is first asked for."""
        with self._opening:
            if path not in self._files:
                self._files[path] = open_descriptor(path)
            return self._files[path]

    def forget(self) -> bool:
        """See `forget`, of all files."""
        with self._opening:
            return all([forget(descriptor) for descriptor in self._files.values()])

    def close(self) -> None:
        """May be called again; not while others read."""
        if self._rereading is not None:
            self._rereading.close()
            self._rereading = None
        while self._files:
            os.close(self._files.popitem()[1])


def _telling_places(size: int, edges: list[int], num_files: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of a file that tell it from another one of its size. edges: where its tensors
    begin and end, in their order."""
    yield 0, min(edges[0] if edges else size, _MOST_HEADER_BYTES)
    step = -(-len(edges) // max(_FEWEST_EDGES, _MOST_EDGES // num_files))
    for edge in edges[:: step or 1]:
        yield max(0, edge - _EDGE_BYTES // 2), _EDGE_BYTES
    yield from spread(size, blocks_of_each(num_files))


def _said(dtype: torch.dtype) -> str:
    return "bytes (U8)" if dtype == torch.uint8 else str(dtype).removeprefix("torch.")


class RowReader:
    """Reads rows of one matrix of a checkpoint, one at a time, to a place of its own: a decoded
    token reads one, and the tensors around a buffer take longer to make than the read.
    """

    def __init__(self, checkpoint: Checkpoint, name: str):
        self._checkpoint, self._ref = checkpoint, checkpoint.row_range(name, 0, 1)
        self._raw = torch.empty(self._ref.num_bytes, dtype=torch.uint8)
        self._bytes = self._raw.numpy().data
        # Of numbers as they lie in the file: a view of the bytes.
        plain = isinstance(self._ref.packing, Plain)
        self._row = self._decoded() if plain else None

    def read(self, row: int) -> torch.Tensor:
        """(1, columns), until the next is read."""
        offset = self._ref.offset + row * len(self._bytes)
        self._checkpoint.fill(self._ref.path, offset, self._bytes)
        return self._decoded() if self._row is None else self._row

    def _decoded(self) -> torch.Tensor:
        return self._ref.packing.decode([self._raw], self._ref.shape)

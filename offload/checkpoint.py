"""Safetensors on disk: where each tensor's bytes lie, checked against what the model needs; reads
them by pread.

No memory map: a mapped file that shrinks kills the process, and its pages count as resident memory
nobody planned. Never unpickles anything. Does not know what the tensors are for.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .config_fields import MOST_EXPERTS, load_json
from .errors import BadCheckpoint, StorageError

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER_BYTES = 100 << 20  # the format's own limit
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor's bytes lie."""

    path: Path
    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of a model folder, by name.

    shapes: of those that are needed. renamed: parts of names, in the files and in `shapes`.
    stacked: ends of names of tensors (experts, rows, columns) in the files, and of those that each
    expert's rows are, {} standing for its number.

    Opens and checks the headers only. Raises BadCheckpoint for a missing shard, a damaged header, a
    wrong shape or dtype, and for folders that hold pickled weights only.
    """

    def __init__(
        self,
        folder: Path,
        shapes: dict[str, tuple[int, ...]],
        renamed: Sequence[tuple[str, str]] = (),
        stacked: Sequence[tuple[str, tuple[str, ...]]] = (),
    ):
        self.folder = folder
        self.refs: dict[str, TensorRef] = {}
        self._files: dict[Path, int] = {}
        found: dict[str, TensorRef] = {}
        for path in _shards(folder):
            found.update({_text_name(n): ref for n, ref in _read_header(path).items()})
        found = {_renamed(name, renamed): ref for name, ref in found.items()}
        for name in [name for name, ref in found.items() if len(ref.shape) == 3]:
            found.update(_unstacked(name, found[name], stacked))
        missing = [name for name in shapes if name not in found]
        if missing:
            raise BadCheckpoint(
                f"{folder} lacks {len(missing)} of {len(shapes)} tensors, {missing[0]!r} first. "
                "The download may be incomplete, or config.json belongs to another model."
            )
        for name, shape in shapes.items():
            ref = found[name]
            if ref.shape != shape:
                raise BadCheckpoint(
                    f"{ref.path}: {name} has the shape {list(ref.shape)}, but config.json asks "
                    f"for {list(shape)}."
                )
            self.refs[name] = ref

    def read(self, name: str, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor in its own dtype, in fresh memory or at the start of `buffer` (uint8)."""
        ref = self.refs[name]
        return self.read_ref(ref, buffer)

    def read_ref(self, ref: TensorRef, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """What lies at a place, as `read` gives it."""
        if buffer is None:
            buffer = torch.empty(ref.num_bytes, dtype=torch.uint8)
        part = buffer[: ref.num_bytes]
        self.read_into(ref, part)
        return part.view(ref.dtype).view(ref.shape)

    def read_rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Some rows of a matrix, one small read each: (len(rows), columns)."""
        reader = RowReader(self, name)
        return torch.cat([reader.read(row).clone() for row in rows])

    def row_range(self, name: str, start: int, stop: int) -> TensorRef:
        """The bytes of rows [start, stop) of a matrix."""
        return _row_range(self.refs[name], start, stop)

    def read_into(self, ref: TensorRef, out: torch.Tensor) -> None:
        """Fill `out` (uint8, ref.num_bytes) from the file. A file that shrank is a BadCheckpoint,
        not a crash.
        """
        self.fill(ref.path, ref.offset, memoryview(out.numpy())[: ref.num_bytes])

    def fill(self, path: Path, offset: int, view: memoryview) -> None:
        """Fill the view from a byte of a file on."""
        if path not in self._files:
            self._files[path] = _open(path)
        descriptor, done = self._files[path], 0
        while done < len(view):
            count = _read_at(descriptor, view[done:], path, offset + done)
            if count == 0:
                raise BadCheckpoint(
                    f"{path} ends before its tensors do; it was truncated. Download it again."
                )
            done += count

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


class RowReader:
    """Reads rows of one matrix of a checkpoint, one at a time, to a place of its own: a decoded
    token reads one, and the tensors around a buffer take longer to make than the read.
    """

    def __init__(self, checkpoint: Checkpoint, name: str):
        self._checkpoint, self._ref = checkpoint, checkpoint.refs[name]
        self._row = torch.empty((1, self._ref.shape[1]), dtype=self._ref.dtype)
        self._bytes = memoryview(self._row.view(-1).view(torch.uint8).numpy())

    def read(self, row: int) -> torch.Tensor:
        """(1, columns), until the next is read."""
        offset = self._ref.offset + row * len(self._bytes)
        self._checkpoint.fill(self._ref.path, offset, self._bytes)
        return self._row


# How files that hold a language model among other parts begin its tensors' names.
_TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}


def _text_name(name: str) -> str:
    """A tensor's name in a file that holds the language model alone."""
    for prefix, plain in _TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return plain + name[len(prefix) :]
    return name


def _renamed(name: str, parts: Sequence[tuple[str, str]]) -> str:
    for theirs, ours in parts:
        name = name.replace(theirs, ours)
    return name


def _unstacked(
    name: str, ref: TensorRef, stacked: Sequence[tuple[str, tuple[str, ...]]]
) -> dict[str, TensorRef]:
    """What a tensor of all experts holds, by the names of each one's own; nothing of another."""
    found = {}
    for end, names in stacked:
        count, rows, columns = ref.shape
        is_sound = 0 < count <= MOST_EXPERTS and rows and columns and rows % len(names) == 0
        if not name.endswith(end) or not is_sound:
            continue
        matrix, rows = replace(ref, shape=(count * rows, columns)), rows // len(names)
        for index in range(count * len(names)):
            expert, part = divmod(index, len(names))
            own = name[: -len(end)] + names[part].format(expert)
            found[own] = _row_range(matrix, index * rows, (index + 1) * rows)
    return found


def _row_range(ref: TensorRef, start: int, stop: int) -> TensorRef:
    row_bytes = ref.num_bytes // ref.shape[0]
    return TensorRef(
        ref.path,
        ref.offset + start * row_bytes,
        (stop - start) * row_bytes,
        ref.dtype,
        (stop - start, *ref.shape[1:]),
    )


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be opened any more: {error.strerror}.") from error


def _read_at(descriptor: int, view: memoryview, path: Path, offset: int) -> int:
    """Fill `view` from a byte of a file on, as far as one call gets; the bytes read."""
    try:
        if hasattr(os, "preadv"):
            return os.preadv(descriptor, [view], offset)
        # Windows: one reader at a time, see WeightStore
        os.lseek(descriptor, offset, os.SEEK_SET)
        chunk = os.read(descriptor, len(view))
        view[: len(chunk)] = chunk
        return len(chunk)
    except OSError as error:
        raise StorageError(f"{path} could not be read: {error.strerror}.") from error


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; the index decides where there is one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = load_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise BadCheckpoint(f"{index} has no weight_map of names to files.")
        paths = []
        for name in sorted(set(names.values())):
            if Path(name).name != name:
                raise BadCheckpoint(f"{index} names {name!r}, which is not a file in its folder.")
            paths.append(folder / name)
        missing = [p.name for p in paths if not _is_file(p)]
        if missing:
            raise BadCheckpoint(
                f"{folder} lacks {len(missing)} of {len(paths)} shards: "
                f"{', '.join(name[:80] for name in missing[:3])}. "
                "The download may be incomplete; fetch the missing files."
            )
        return paths
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise BadCheckpoint(
            f"{folder} holds pickled weights only ({pickles[0]}). A pickle can run any program "
            "while it loads, so "
            "Ebbtide reads safetensors only: use a repository with *.safetensors, or convert "
            "it with transformers."
        )
    raise BadCheckpoint(f"{folder} has no model.safetensors and no model.safetensors.index.json.")


def _is_file(path: Path) -> bool:
    """Whether there is such a file; not, when its name is one that no file has."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _read_header(path: Path) -> dict[str, TensorRef]:
    """Names and places of a file's tensors, each checked to lie within the file and to be as long
    as it says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise BadCheckpoint(f"{path} is {size} bytes long: no safetensors file.")
            length = struct.unpack("<Q", start)[0]
            if length > min(_MAX_HEADER_BYTES, size - 8):
                raise BadCheckpoint(
                    f"{path} states a header of {length} bytes in a file of {size}. It is "
                    "damaged or incomplete."
                )
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path} cannot be read as safetensors: {error}") from error
    if not isinstance(header, dict):
        raise BadCheckpoint(f"{path} has a damaged header.")
    header.pop("__metadata__", None)
    refs, taken, data = {}, [], 8 + length
    for name, entry in header.items():
        try:
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            numbers = (*shape, begin, end)
            whole = all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)
        except (TypeError, KeyError, ValueError):
            whole = False
        if not whole or begin > end or data + end > size:
            raise BadCheckpoint(
                f"{path}: {name} does not lie within the file. It is damaged or incomplete; "
                "download it again."
            )
        taken.append((begin, end, name))
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            continue  # nobody's weights; one that is needed will be reported as missing
        count = 1
        for n in shape:
            count *= n
        if count * _DTYPES[dtype].itemsize != end - begin:
            raise BadCheckpoint(
                f"{path}: {name} of shape {list(shape)} in {dtype} cannot take {end - begin} bytes."
            )
        refs[name] = TensorRef(path, data + begin, end - begin, _DTYPES[dtype], shape)
    _check_apart(path, taken)
    return refs


def _check_apart(path: Path, taken: list[tuple[int, int, str]]) -> None:
    """The format forbids tensors that share bytes: such a file was not written by its tools."""
    reached, last = 0, ""
    for begin, end, name in sorted(taken):
        if begin < min(reached, end):
            raise BadCheckpoint(f"{path}: {name} overlaps {last}. The file is damaged.")
        if end > reached:
            reached, last = end, name

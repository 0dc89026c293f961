"""Safetensors on disk: where each tensor's bytes lie, checked against what the model needs; reads
them by pread.

No memory map: a mapped file that shrinks kills the process, and its pages count as resident memory
nobody planned. Never unpickles anything. Does not know what the tensors are for.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .config_fields import MOST_EXPERTS, load_json
from .errors import BadCheckpoint, StorageError
from .model_config import Stacked

MXFP4 = torch.float4_e2m1fn_x2  # matrices in groups of 32 inputs, of four bits each and a scale
_MXFP4_GROUP = 32
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
_MAX_HEADER_BYTES = 100 << 20  # the format's own limit
_seeking = threading.Lock()
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor's bytes lie.

    is_transposed: a matrix whose columns lie side by side. scales: of one in MXFP4, its exponents,
    (rows, groups) uint8; its bytes are the codes, (rows, groups, 16) uint8 then.
    """

    path: Path
    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_transposed: bool = False
    scales: TensorRef | None = None


class Checkpoint:
    """The tensors of a model folder, by name.

    shapes: of those that are needed. renamed: parts of names, in the files and in `shapes`.
    stacked: tensors of all experts in the files.

    Opens and checks the headers only. Raises BadCheckpoint for a missing shard, a damaged header, a
    wrong shape or dtype, and for folders that hold pickled weights only.
    """

    def __init__(
        self,
        folder: Path,
        shapes: dict[str, tuple[int, ...]],
        renamed: Sequence[tuple[str, str]] = (),
        stacked: Sequence[Stacked] = (),
    ):
        self.folder = folder
        self.refs: dict[str, TensorRef] = {}
        self._files: dict[Path, int] = {}
        self._opening = threading.Lock()
        found: dict[str, TensorRef] = {}
        for path in _shards(folder):
            found.update({_text_name(n): ref for n, ref in _read_header(path).items()})
        found = {_renamed(name, renamed): ref for name, ref in found.items()}
        for name in list(found):
            found.update(_unstacked(name, found, stacked))
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
            if ref.dtype == torch.uint8:
                raise BadCheckpoint(
                    f"{ref.path}: {name} holds bytes (U8), quantised in a way that Ebbtide does "
                    "not know. Use the unquantised model."
                )
            self.refs[name] = ref

    def read(self, name: str, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor in its own dtype, in fresh memory or at the start of `buffer` (uint8)."""
        ref = self.refs[name]
        return self.read_ref(ref, buffer)

    def read_ref(self, ref: TensorRef, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """What lies at a place, as `read` gives it; not of MXFP4."""
        if buffer is None:
            buffer = torch.empty(ref.num_bytes, dtype=torch.uint8)
        part = buffer[: ref.num_bytes]
        if ref.is_transposed:
            plain = replace(ref, shape=ref.shape[::-1], is_transposed=False)
            return part.view(ref.dtype).view(ref.shape).copy_(self.read_ref(plain).t())
        self.read_into(ref, part)
        return part.view(ref.dtype).view(ref.shape)

    def read_mxfp4(self, name: str, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and exponents of a matrix, as TensorRef has them, at the start of `buffer`
        (uint8)."""
        ref = self.refs[name]
        codes = buffer[: ref.num_bytes]
        exponents = buffer[ref.num_bytes :][: ref.scales.num_bytes]
        self.read_into(ref, codes)
        self.read_into(ref.scales, exponents)
        return codes.view(*ref.scales.shape, -1), exponents.view(ref.scales.shape)

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
        with self._opening:
            if path not in self._files:
                self._files[path] = _open(path)
        descriptor, done = self._files[path], 0
        while done < len(view):
            count = read_at(descriptor, view[done:], path, offset + done)
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
    name: str, found: dict[str, TensorRef], stacked: Sequence[Stacked]
) -> dict[str, TensorRef]:
    """What a tensor of all experts holds, by the names of each one's own; nothing of another."""
    parts = {}
    for kind in stacked:
        whole, is_packed = name, kind.by_columns and name.endswith(kind.end + "_blocks")
        if is_packed:
            whole = name.removesuffix("_blocks")
            ref = _mxfp4(found[name], found.get(whole + "_scales"))
        else:
            ref = found[name]
        if not whole.endswith(kind.end) or ref is None or not 2 <= len(ref.shape) <= 3:
            continue
        count, names, own = ref.shape[0], kind.names, ref.shape[1:]
        is_turned = kind.by_columns and not is_packed
        if is_turned:
            own = own[::-1]
        if not 0 < count <= MOST_EXPERTS or not math.prod(own) or own[0] % len(names):
            continue
        size, each = count * len(names), (own[0] // len(names), *own[1:])
        for index in range(size):
            expert, part = divmod(index, len(names))
            of_expert = whole[: -len(kind.end)] + names[part].format(expert)
            parts[of_expert] = _share(ref, index, size, each, is_turned)
    return parts


def _share(
    ref: TensorRef, index: int, count: int, shape: tuple[int, ...], is_transposed: bool = False
) -> TensorRef:
    """One of `count` equal shares of a tensor's bytes, a tensor of its own."""
    num_bytes, scales = ref.num_bytes // count, ref.scales
    return replace(
        ref,
        offset=ref.offset + index * num_bytes,
        num_bytes=num_bytes,
        shape=shape,
        is_transposed=is_transposed,
        scales=scales and _share(scales, index, count, (shape[0], shape[1] // _MXFP4_GROUP)),
    )


def _mxfp4(codes: TensorRef, scales: TensorRef | None) -> TensorRef | None:
    """Matrices (count, rows, columns) in MXFP4, of their codes (count, rows, groups, 16) and scales
    (count, rows, groups); None where they are none."""
    if scales is None or len(scales.shape) != 3:
        return None
    are_bytes = codes.dtype == scales.dtype == torch.uint8
    if not are_bytes or codes.shape != (*scales.shape, _MXFP4_GROUP // 2):
        return None
    shape = (*scales.shape[:-1], scales.shape[-1] * _MXFP4_GROUP)
    return replace(codes, dtype=MXFP4, shape=shape, scales=scales)


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


def read_at(descriptor: int, view: memoryview, path: Path | str, offset: int) -> int:
    """Fill `view` from a byte of a file on, as far as one call gets; the bytes read. path: for
    messages. Several threads may read."""
    try:
        if hasattr(os, "preadv"):
            return os.preadv(descriptor, [view], offset)
        with _seeking:  # Windows
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
            if dtype == "U8":
                continue  # nobody's weights either
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

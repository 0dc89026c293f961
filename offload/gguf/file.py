"""The header of a GGUF file: what it says about a model, and where its tensors lie.

A file is untrusted: every count, length, type and place is checked against the file's size before
anything is made of it, nothing is mapped into memory, and no more than the header is read. The
`gguf` package's own reader maps the whole file, and takes 7 s for a vocabulary of 150,000 tokens
with its merges, which take 0.12 here: strings are decoded when somebody asks for them. Knows no
architectures.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, overload

import numpy as np

from ..errors import BadCheckpoint
from ..models.known_file import KnownFile
from ..models.open_file import check_system

MAGIC = b"GGUF"
_MOST_HEADER_BYTES = 256 << 20  # a vocabulary of 262,144 tokens takes 10 MiB
_READ_BYTES = 4 << 20
_MOST_NAME_BYTES = 65535  # the format's own limit
_MOST_DIMS = 4
_MOST_ALIGNMENT = 1 << 20
_MOST_FILES = 1000
# A file says some 50 things, in arrays of a vocabulary's length and of its merges; a mixture of
# experts of 1,000 layers has 20,000 tensors. Each takes time to read.
_MOST_KEYS = 1 << 14
_MOST_STRINGS = 1 << 22
_MOST_TENSORS = 1 << 17
_SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
# Of values, by the number that stands for their type.
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
# The same, as the struct module writes them.
_FORMS = {
    **{"<u1": "<B", "<i1": "<b", "<u2": "<H", "<i2": "<h", "<u4": "<I", "<i4": "<i"},
    **{"<u8": "<Q", "<i8": "<q", "<f4": "<f", "<f8": "<d"},
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
# Of tensors, by the number that stands for their type: its name, numbers in a block, and bytes.
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. kind: the name of its type, or, of one that is not known, its number,
    and num_bytes 0 then; block, block_bytes: numbers of that type that lie together, and what they
    take. shape: its rows' length last.
    """

    path: Path
    offset: int
    num_bytes: int
    kind: str
    block: int
    block_bytes: int
    shape: tuple[int, ...]


class Strings:
    """An array of strings, decoded when they are asked for."""

    def __init__(self, data: bytes, count: int, path: Path):
        self.data, self._count, self._path = data, count, path

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        """BadCheckpoint where one is no text."""
        at, data = 0, self.data
        try:
            for _ in range(self._count):
                end = at + 8 + int.from_bytes(data[at : at + 8], "little")
                yield str(data[at + 8 : end], "utf-8")
                at = end
        except UnicodeDecodeError as error:
            raise BadCheckpoint(f"{self._path}: a string in it is not text ({error}).") from None


@dataclass(frozen=True)
class GgufHeader:
    """metadata: by key, each a number, a truth value, a text, an array of numbers (numpy) or
    Strings. tensors: by name. known: the files, one or several, as they were before that was read.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    known: dict[Path, KnownFile]


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do, whatever its name is."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except (OSError, ValueError):
        return False


def read_header(path: Path) -> GgufHeader:
    """What a file says, together with the others where it is one of several. Raises BadCheckpoint
    for files that are damaged, incomplete or missing.
    """
    first = _read_one(path)
    count = first.metadata.get("split.count", 1)
    found = _SPLIT.fullmatch(path.name)
    if not isinstance(count, int) or not 0 <= count <= _MOST_FILES:
        raise BadCheckpoint(f"{path} is one of {count!r} files, which is not a possible number.")
    if count <= 1:
        return first
    if found is None or int(found["count"]) != count:
        raise BadCheckpoint(
            f"{path} is one of {count} files; their names must end in -00001-of-{count:05}.gguf "
            "and so on, as they were downloaded."
        )
    names = [f"{found['stem']}-{n:05}-of-{count:05}.gguf" for n in range(1, count + 1)]
    paths = [path.with_name(name) for name in names]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise BadCheckpoint(
            f"{path.parent} lacks {len(missing)} of {count} files of the model: "
            f"{', '.join(missing[:3])}. The download may be incomplete; fetch the missing files."
        )
    metadata, tensors, known = {}, {}, {}
    for number, one in enumerate(paths):
        part = first if one.name == path.name else _read_one(one)
        if part.metadata.get("split.no") != number or part.metadata.get("split.count") != count:
            raise BadCheckpoint(f"{part.path} is not file {number + 1} of {count} by its own word.")
        if not tensors.keys().isdisjoint(part.tensors):
            raise BadCheckpoint(f"{part.path} holds tensors that another file of the model holds.")
        tensors |= part.tensors
        known |= part.known
        if len(tensors) > _MOST_TENSORS:
            raise BadCheckpoint(
                f"{part.path}: the files up to this one have {len(tensors)} tensors where at most "
                f"{_MOST_TENSORS} can be."
            )
        if number == 0:
            metadata = part.metadata
    return GgufHeader(paths[0], metadata, tensors, known)


def _read_one(path: Path) -> GgufHeader:
    try:
        known = KnownFile(path)
        with path.open("rb") as file:
            return _Parser(known, file).header()
    except OSError as error:
        check_system(path, error)
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror or error}.") from error


class _Parser:
    """Reads one header from its beginning to its end."""

    def __init__(self, known: KnownFile, file: BinaryIO):
        self._known, self._file = known, file
        self._path, self._size = known.path, known.size
        self._data, self._at = bytearray(), 0

    def header(self) -> GgufHeader:
        if self._size < 24 or self._take(4) != MAGIC:
            raise BadCheckpoint(f"{self._path} is no GGUF file.")
        version = self._number("<u4")
        if version not in (2, 3):
            what = "big-endian" if version in (2 << 24, 3 << 24) else f"of version {version}"
            raise BadCheckpoint(
                f"{self._path} is a GGUF file {what}; Ebbtide reads versions 2 and 3, "
                "little-endian."
            )
        num_tensors, num_keys = self._number("<u8"), self._number("<u8")
        self._check_count(num_keys, 13, "keys", _MOST_KEYS)
        self._check_count(num_tensors, 24, "tensors", _MOST_TENSORS)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._text(_MOST_NAME_BYTES)
            if key in metadata:
                raise self._damaged(f"says {key!r} twice")
            metadata[key] = self._value(self._number("<u4"))
        described = [self._described() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= _MOST_ALIGNMENT:
            raise self._damaged(f"has an alignment of {alignment!r}")
        start = -(-self._at // alignment) * alignment
        tensors = {
            name: self._placed(name, shape, kind, offset, start)
            for name, shape, kind, offset in described
        }
        if len(tensors) < num_tensors:
            raise self._damaged("names a tensor twice")
        return GgufHeader(self._path, metadata, tensors, {self._path: self._known})

    def _described(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and place of the next tensor."""
        name = self._text(_MOST_NAME_BYTES)
        num_dims = self._number("<u4")
        if num_dims > _MOST_DIMS:
            raise self._damaged(f"gives {name!r} {num_dims} dimensions")
        dims = tuple(self._number("<u8") for _ in range(num_dims))
        return name, dims[::-1], self._number("<u4"), self._number("<u8")

    def _placed(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int
    ) -> GgufTensor:
        if kind not in _TYPES:  # perhaps nobody's; one that is needed will be refused
            return GgufTensor(self._path, 0, 0, str(kind), 1, 0, shape)
        title, block, block_bytes = _TYPES[kind]
        num_bytes = math.prod(shape) // block * block_bytes
        if shape and shape[-1] % block:
            raise self._damaged(f"has rows of {shape[-1]} numbers in {title}, {name!r}")
        if start + offset + num_bytes > self._size:
            raise BadCheckpoint(
                f"{self._path}: {name!r} does not lie within the file. It is damaged or "
                "incomplete; download it again."
            )
        return GgufTensor(self._path, start + offset, num_bytes, title, block, block_bytes, shape)

    def _value(self, kind: int) -> bool | int | float | str | np.ndarray | Strings:
        if kind in _NUMBERS:
            value = self._number(_NUMBERS[kind])
            return bool(value) if kind == _BOOL else value
        if kind == _STRING:
            return self._text(_MOST_HEADER_BYTES)
        if kind != _ARRAY:
            raise self._damaged(f"has a value of an unknown type, {kind}")
        of, count = self._number("<u4"), self._number("<u8")
        if of in _NUMBERS:
            dtype = np.dtype(_NUMBERS[of])
            self._check_count(count, dtype.itemsize, "numbers")
            return np.frombuffer(self._take(count * dtype.itemsize), dtype)
        if of != _STRING:  # nobody writes arrays of arrays
            raise self._damaged(f"has an array of values of type {of}")
        self._check_count(count, 8, "strings", _MOST_STRINGS)
        return self._strings(count)

    def _strings(self, count: int) -> Strings:
        start = self._at
        for _ in range(count):
            if self._at + 8 > len(self._data):
                self._need(8)
            length = int.from_bytes(self._data[self._at : self._at + 8], "little")
            self._need(8 + length)
            self._at += 8 + length
        return Strings(bytes(self._data[start : self._at]), count, self._path)

    def _text(self, most: int) -> str:
        length = self._number("<u8")
        if length > most:
            raise self._damaged(f"has a string of {length} bytes where at most {most} can be")
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(f"has a string that is not text ({error})") from None

    @overload
    def _number(self, dtype: Literal["<u4", "<u8"]) -> int: ...
    @overload
    def _number(self, dtype: str) -> int | float: ...
    def _number(self, dtype: str) -> int | float:
        form, num_bytes = _FORMS[dtype], int(dtype[2:])
        self._need(num_bytes)
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += num_bytes
        # What was written before float32 rounded it: 1e-06, not 9.999999974752427e-07.
        return float(str(np.float32(value))) if dtype == "<f4" else value

    def _take(self, num_bytes: int) -> bytes:
        self._need(num_bytes)
        self._at += num_bytes
        return bytes(self._data[self._at - num_bytes : self._at])

    def _check_count(
        self, count: int, least_bytes: int, what: str, most: int | None = None
    ) -> None:
        """Whether so many things, each of least_bytes or more, can be in what is left."""
        if count * least_bytes > self._size - self._at:
            raise self._damaged(f"states {count} {what} in {self._size} bytes")
        if most is not None and count > most:
            raise self._damaged(f"has {count} {what} where at most {most} can be")

    def _need(self, num_bytes: int) -> None:
        """Read on until so many bytes are there."""
        end = self._at + num_bytes
        if end <= len(self._data):
            return
        if end > self._size:
            raise BadCheckpoint(
                f"{self._path} ends within its header. It is damaged or incomplete; download it "
                "again."
            )
        if end > _MOST_HEADER_BYTES:
            raise self._damaged(f"has a header of more than {_MOST_HEADER_BYTES >> 20} MiB")
        while len(self._data) < end:
            more = self._file.read(max(_READ_BYTES, end - len(self._data)))
            if not more:
                raise self._damaged("became shorter while it was read")
            self._data += more

    def _damaged(self, what: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self._path} {what}. It is damaged; download it again.")

"""Safetensors on disk: which tensors a model's folder holds, and where each one's bytes lie.

Headers only; never unpickles anything. Knows names, dtypes and shapes, and no numbers.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import BadCheckpoint, UnsupportedModel
from ..weights.head_rows import split_heads
from ..weights.packing import Constant, Mxfp4, Plain, Transposed
from .checkpoint import Checkpoint, Place, TensorRef, joined, share
from .config_fields import MOST_EXPERTS, load_json
from .fingerprint import digest_at, spread
from .known_file import KnownFile
from .layer_config import HeadRows, Joined, Stacked
from .open_file import check_system, open_descriptor
from .packed_modules import packed_modules
from .quantisation import Quantisation

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_BYTES = Plain(torch.uint8)
_MAX_HEADER_BYTES = 100 << 20  # the format's own limit
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_SAMPLED_BLOCKS = 64
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def open_folder(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    renamed: Sequence[tuple[str, str]] = (),
    stacked: Sequence[Stacked] = (),
    quantisation: Quantisation | None = None,
    head_rows: Sequence[HeadRows] = (),
    in_parts: Sequence[Joined] = (),
    constants: Sequence[tuple[str, float]] = (),
) -> Checkpoint:
    """The tensors of a model folder.

    shapes: of those that are needed. renamed: parts of names, in the files and in `shapes`.
    stacked: tensors of all experts in the files. quantisation: how some of them are packed.
    head_rows: tensors in the files of which some rows of each head are one that is needed.
    in_parts: tensors whose rows the files may hold in several.
    constants: parts of names of vectors that are in no file, and the number that they hold.

    Opens and checks the headers only. Raises BadCheckpoint for a missing shard, a damaged header, a
    wrong shape or dtype, and for folders that hold pickled weights only.
    """
    found: dict[str, TensorRef] = {}
    known = {path: KnownFile(path) for path in _shards(folder)}
    for path in known:
        found.update({_text_name(n): ref for n, ref in _read_header(path).items()})
    found = {_renamed(name, renamed): ref for name, ref in found.items()}
    if _HEAD in found and _HEAD not in shapes:  # tied: some programs write one of the two names
        found.setdefault(_EMBEDDING, found[_HEAD])
    for name in list(found):
        found.update(_unstacked(name, found, stacked, shapes))
    if quantisation is not None:
        whole = {
            name.removesuffix(split.name) + split.end
            for split in head_rows
            for name in shapes
            if name.endswith(split.name)
        }
        found.update(packed_modules(found, quantisation, whole.union(shapes)))
    found.update(split_heads(found, head_rows))
    found.update(_joined(found, in_parts, shapes))
    for name, shape in shapes.items():
        values = [value for part, value in constants if part in name and name not in found]
        if values:
            path = next(iter(known))  # any of them: nothing is read
            found[name] = TensorRef(path, 0, 0, Constant(values[0]), shape)
    return Checkpoint(found, shapes, known, folder)


def has_own_head(folder: Path, renamed: Sequence[tuple[str, str]] = ()) -> bool:
    """Whether a model folder holds an output head that is not the embedding once more, as far as a
    sample of their bytes tells. renamed: see open_folder."""
    found = {
        _renamed(_text_name(name), renamed): ref
        for path in _shards(folder)
        for name, ref in _read_header(path).items()
    }
    head, embedding = found.get(_HEAD), found.get(_EMBEDDING)
    if head is None or embedding is None:
        return False
    kinds = {(ref.packing, ref.shape) for ref in (head, embedding)}
    return len(kinds) > 1 or len({_sample(ref) for ref in (head, embedding)}) > 1


def _sample(ref: TensorRef) -> bytes:
    """A hash of both ends of a tensor and of blocks between, the same of all of its size."""
    descriptor = open_descriptor(ref.path)
    try:
        places = (
            (ref.offset + at, min(size, ref.num_bytes - at))
            for at, size in spread(ref.num_bytes, _SAMPLED_BLOCKS)
        )
        return digest_at(descriptor, ref.path, places)
    finally:
        os.close(descriptor)


# How files that hold a language model among other parts begin its tensors' names.
_TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "model.text_model.": "model.",
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
    name: str,
    found: dict[str, TensorRef],
    stacked: Sequence[Stacked],
    shapes: dict[str, tuple[int, ...]],
) -> dict[str, TensorRef]:
    """What a tensor of all experts holds, or one of the scales of such a tensor, by the names of
    each one's own; nothing of another. Of one by columns that fits by rows alone, by rows."""
    parts = {}
    for kind in stacked:
        if name.endswith(kind.end + _SCALES):
            weight = found.get(name.removesuffix(_SCALES))
            by_rows = weight is not None and not _is_by_columns(name, weight, kind, shapes)
            return _unstacked_scales(name, found[name], kind) if by_rows else {}
        whole, is_packed = name, kind.by_columns and name.endswith(kind.end + "_blocks")
        if is_packed:
            whole = name.removesuffix("_blocks")
            ref = _mxfp4(found[name], found.get(whole + "_scales"))
        else:
            ref = found[name]
        if not whole.endswith(kind.end) or ref is None or not 2 <= len(ref.shape) <= 3:
            continue
        count, names, own = ref.shape[0], kind.names, ref.shape[1:]
        start = whole[: -len(kind.end)]
        turned = not is_packed and _is_by_columns(whole, ref, kind, shapes)
        if turned and ref.packing.dtype == torch.float8_e4m3fn:
            raise UnsupportedModel(
                f"{ref.path}: {name} holds experts in float8 by columns, which Ebbtide does not "
                "read. Use files that hold each expert in tensors of its own, or the unquantised "
                "model."
            )
        own = own[::-1] if turned else own
        if not 0 < count <= MOST_EXPERTS or not math.prod(own) or own[0] % len(names):
            continue
        size, each = count * len(names), (own[0] // len(names), *own[1:])
        for index in range(size):
            expert, part = divmod(index, len(names))
            of_expert = start + names[part].format(expert)
            if turned and len(own) == 2:  # rows of each part of an expert, in turn
                packing = Transposed(ref.packing.dtype, part, len(names))
                parts[of_expert] = share(replace(ref, packing=packing), expert, count, each)
            else:
                parts[of_expert] = share(ref, index, size, each)
    return parts


def _is_by_columns(
    name: str, ref: TensorRef, kind: Stacked, shapes: dict[str, tuple[int, ...]]
) -> bool:
    """Whether the experts' rows are inputs in a tensor of all, or in that of its scales' name.
    transformers turns those of some, which the shape tells."""
    own, names = ref.shape[1:], kind.names
    if not kind.by_columns or len(own) != 2 or own[0] == own[1]:
        return kind.by_columns
    start = name.removesuffix(_SCALES).removesuffix(kind.end)
    return shapes.get(start + names[0].format(0)) != (own[0] // len(names), own[1])


_SCALES = "_scale_inv"  # what the names of FP8's end with


def _unstacked_scales(name: str, ref: TensorRef, kind: Stacked) -> dict[str, TensorRef]:
    """Scales (experts, ...): of blocks, whose rows an expert's parts share as they share those of
    the tensor, or one for all of an expert's parts."""
    count, own, shares = (*ref.shape, 0)[0], ref.shape[1:], len(kind.names)
    if not 0 < count <= MOST_EXPERTS or not math.prod(own):
        return {}
    if math.prod(own) == 1:
        shares = 1
    elif own[0] % shares:
        return {}
    each = (own[0] // shares, *own[1:]) if own else own
    start = name.removesuffix(kind.end + _SCALES)
    return {
        start + of.format(expert) + _SCALES: share(
            ref, expert * shares + part % shares, count * shares, each
        )
        for expert in range(count)
        for part, of in enumerate(kind.names)
    }


def _joined(
    found: dict[str, TensorRef], kinds: Sequence[Joined], shapes: dict[str, tuple[int, ...]]
) -> dict[str, TensorRef]:
    """The tensors whose rows are in several of the files', where these fit."""
    whole = {}
    for of in kinds:
        for name in found:
            start = name.removesuffix(of.parts[0])
            parts = [found.get(start + part) for part in of.parts]
            refs = [ref for ref in parts if ref is not None]
            if start == name or len(refs) < len(parts):
                continue
            row = refs[0].shape[1:]
            if not all(ref.shape and ref.shape[1:] == row for ref in refs):
                continue
            shape = sum(ref.shape[0] for ref in refs), *row
            if len(shapes.get(start + of.end, shape)) > len(shape):  # each is a row of its own
                shape = len(refs), *refs[0].shape
            ref = joined(refs, shape)
            if ref is not None:
                whole[start + of.end] = ref
    return whole


def _mxfp4(codes: TensorRef, scales: TensorRef | None) -> TensorRef | None:
    """Matrices (count, rows, columns) in MXFP4, of their codes (count, rows, groups, 16) and scales
    (count, rows, groups); None where they are none."""
    if scales is None or len(scales.shape) != 3 or codes.packing != _BYTES:
        return None
    packing = Mxfp4()
    if scales.packing != _BYTES or codes.shape != (*scales.shape, packing.group // 2):
        return None
    shape = (*scales.shape[:-1], scales.shape[-1] * packing.group)
    beside = (Place(scales.path, scales.offset, scales.num_bytes),)
    return replace(codes, packing=packing, shape=shape, beside=beside)


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
        if isinstance(error, OSError):
            check_system(path, error)
        raise BadCheckpoint(f"{path} cannot be read as safetensors: {error}") from error
    if not isinstance(header, dict):
        raise BadCheckpoint(f"{path} has a damaged header.")
    header.pop("__metadata__", None)
    refs, taken, data = {}, [], 8 + length
    for name, entry in header.items():
        described = _described(entry)
        if described is None or data + described[-1] > size:
            raise BadCheckpoint(
                f"{path}: {name} does not lie within the file. It is damaged or incomplete; "
                "download it again."
            )
        dtype, shape, begin, end = described
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
        packing = Plain(_DTYPES[dtype])
        refs[name] = TensorRef(path, data + begin, end - begin, packing, shape)
    _check_apart(path, taken)
    return refs


def _described(entry: Any) -> tuple[Any, tuple[int, ...], int, int] | None:
    """A tensor's dtype, its shape, and where its bytes begin and end; None where a header's entry
    does not say that."""
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        return None
    is_whole = all(type(n) is int and 0 <= n < 1 << 62 for n in (*shape, begin, end))
    return (dtype, shape, begin, end) if is_whole and begin <= end else None


def _check_apart(path: Path, taken: list[tuple[int, int, str]]) -> None:
    """The format forbids tensors that share bytes: such a file was not written by its tools."""
    reached, last = 0, ""
    for begin, end, name in sorted(taken):
        if begin < min(reached, end):
            raise BadCheckpoint(f"{path}: {name} overlaps {last}. The file is damaged.")
        if end > reached:
            reached, last = end, name

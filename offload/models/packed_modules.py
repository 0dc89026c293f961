"""Which tensors of a folder make one quantised matrix, by their names and shapes, and how it is
packed; see packed_weights.py for the packings.

    AWQ     M.qweight, M.qzeros, M.scales
    GPTQ    M.qweight, M.qzeros, M.scales, M.g_idx
    FP8     M.weight in float8, M.weight_scale_inv or M.weight_scale
    compressed-tensors
            M.weight_packed, M.weight_scale, in some M.weight_zero_point, M.weight_g_idx; or
            M.weight in int8 or float8, M.weight_scale

Each becomes M.weight. What is in none of these is as the file has it. Headers only.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import fields, replace

import torch

from ..errors import BadCheckpoint, UnsupportedModel
from ..weights.packed_weights import Codes, Codes4, Codes8, Float8, Layout, Scattered
from ..weights.packing import Plain
from .checkpoint import Place, TensorRef
from .quantisation import Quantisation

Found = dict[str, TensorRef]
FLOAT8 = torch.float8_e4m3fn
_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_POWERS = torch.float8_e8m0fnu  # scales of float8 that are powers of two
_UNUSED = "Use the unquantised model"
_BY_ROWS = ("lm_head.", "model.embed_tokens.")  # which are read by rows


def packed_modules(found: Found, q: Quantisation, needed: Container[str]) -> Found:
    """The quantised matrices among the tensors of a folder that are needed, by the names that they
    would have if they were not. Raises BadCheckpoint for parts that are missing or do not fit,
    UnsupportedModel for shapes that have no place here.
    """
    matrices = {}
    for name, ref in found.items():
        for end, find in _FINDERS[q.method].items():
            plain = name.removesuffix(end) + ".weight"
            if not name.endswith(end) or plain not in needed:
                continue
            matrix = find(_Module(name.removesuffix(end), found), ref, q)
            if matrix is not None and name.startswith(_BY_ROWS):
                raise UnsupportedModel(f"{ref.path}: {name} is quantised. {_UNUSED}.")
            if matrix is not None:
                matrices[plain] = matrix
    return matrices


class _Module:
    """The tensors of one, by the ends of their names."""

    def __init__(self, name: str, found: Found):
        self.name, self._found = name, found

    def get(self, *ends: str) -> TensorRef | None:
        """The first that is there."""
        return next((ref for end in ends if (ref := self._found.get(self.name + end))), None)

    def part(self, end: str, dtypes: tuple[torch.dtype, ...], rank: int = 2) -> TensorRef:
        """One that must be there. Raises BadCheckpoint."""
        ref = self.get(end)
        if ref is None:
            raise self.bad(f"has no tensor {end[1:]}", next(iter(self._found.values())))
        self.check(ref, len(ref.shape) == rank and ref.packing.dtype in dtypes, end[1:])
        return ref

    def check(self, ref: TensorRef, is_good: bool, end: str) -> None:
        if not is_good:
            raise self.bad(f"has {end} of {list(ref.shape)} in {ref.packing.dtype}", ref)

    def bad(self, what: str, ref: TensorRef) -> BadCheckpoint:
        return BadCheckpoint(
            f"{ref.path}: the quantised {self.name} {what}, which does not fit its other parts. "
            "The download may be incomplete, or config.json belongs to another model."
        )

    def refused(self, what: str, ref: TensorRef) -> UnsupportedModel:
        return UnsupportedModel(f"{ref.path}: {self.name} {what}. {_UNUSED}.")


def _awq(module: _Module, qweight: TensorRef, q: Quantisation) -> TensorRef:
    module.check(qweight, _is_matrix(qweight, torch.int32), "qweight")
    inputs, words = qweight.shape
    scales, zeros = module.part(".scales", _SCALES), module.part(".qzeros", (torch.int32,))
    groups, outputs = scales.shape
    module.check(scales, outputs == 8 * words, "scales")
    module.check(zeros, zeros.shape == (groups, words), "qzeros")
    packing = Codes4(Layout.AWQ, 4, groups, scales.packing.dtype, True, False)
    return _matrix(module, (outputs, inputs), packing, q.group_size, qweight, scales, zeros)


def _gptq(module: _Module, qweight: TensorRef, q: Quantisation) -> TensorRef:
    module.check(qweight, _is_matrix(qweight, torch.int32), "qweight")
    per_word = 32 // q.bits
    inputs, outputs = qweight.shape[0] * per_word, qweight.shape[1]
    scales, zeros = module.part(".scales", _SCALES), module.part(".qzeros", (torch.int32,))
    groups = scales.shape[0]
    module.check(scales, scales.shape[1] == outputs, "scales")
    words = -(-outputs // per_word)
    module.check(zeros, zeros.shape == (groups, words), "qzeros")
    index = module.get(".g_idx")
    if index is not None:
        index = module.part(".g_idx", (torch.int32,), 1)
        module.check(index, index.shape == (inputs,), "g_idx")
    elif q.has_order:
        raise module.bad("has no tensor g_idx", qweight)
    packing = Codes(
        *(Layout.GPTQ, q.bits, groups, scales.packing.dtype, True),
        *(q.is_symmetric, q.zeros_less, index is not None),
    )
    parts = (qweight, scales, zeros, *(() if index is None else (index,)))
    return _matrix(module, (outputs, inputs), packing, q.group_size, *parts, scatters=q.has_order)


def _rows(module: _Module, packed: TensorRef, q: Quantisation) -> TensorRef:
    if q.bits not in (4, 8):
        raise module.bad("has codes of no known number of bits", packed)
    module.check(packed, _is_matrix(packed, torch.int32), "weight_packed")
    per_word = 32 // q.bits
    outputs, inputs = packed.shape[0], packed.shape[1] * per_word
    scales = module.part(".weight_scale", _SCALES)
    groups = scales.shape[1]
    module.check(scales, scales.shape[0] == outputs, "weight_scale")
    zeros, index = module.get(".weight_zero_point"), module.get(".weight_g_idx")
    if zeros is not None:
        zeros = module.part(".weight_zero_point", (torch.int32,))
        fits = zeros.shape == (-(-outputs // per_word), groups)
        module.check(zeros, fits, "weight_zero_point")
    if index is not None:
        index = module.part(".weight_g_idx", (torch.int32,), 1)
        module.check(index, index.shape == (inputs,), "weight_g_idx")
    packing = Codes(
        *(Layout.ROWS, q.bits, groups, scales.packing.dtype),
        *(zeros is not None, zeros is None, 0, index is not None),
    )
    parts = (ref for ref in (packed, scales, zeros, index) if ref is not None)
    scatters = index is not None
    return _matrix(module, (outputs, inputs), packing, q.group_size, *parts, scatters=scatters)


def _bytes(module: _Module, weight: TensorRef, q: Quantisation) -> TensorRef | None:
    """Of int8 or float8; None of another dtype, which is as it is."""
    dtype = weight.packing.dtype
    if dtype == FLOAT8:
        return _float8(module, weight, q)
    if dtype != torch.int8 or q.method != "compressed-tensors":
        return None
    module.check(weight, _is_matrix(weight, torch.int8), "weight")
    scales = module.part(".weight_scale", _SCALES)
    module.check(scales, scales.shape[0] == weight.shape[0], "weight_scale")
    if module.get(".weight_zero_point") is not None:
        raise module.refused("has bytes with zeros of their own", weight)
    packing = Codes(Layout.BYTES, 8, scales.shape[1], scales.packing.dtype, False, True)
    return _matrix(module, weight.shape, packing, 0, weight, scales)


def _float8(module: _Module, weight: TensorRef, q: Quantisation) -> TensorRef:
    module.check(weight, len(weight.shape) == 2, "weight")
    scales = module.get(".weight_scale_inv", ".weight_scale")
    if scales is None:
        raise module.bad("has no tensor weight_scale", weight)
    of = scales.shape
    if len(of) == 1:
        of = (*of, 1)
    elif not of:
        of = (1, 1)
    good = len(of) == 2 and scales.packing.dtype in (*_SCALES, _POWERS) and all(of)
    block = 1, 1
    if good:
        outputs, inputs = map(_share, weight.shape, of, q.block or (1, 1))
        block = outputs, inputs
        good = tuple(-(-n // b) for n, b in zip(weight.shape, block, strict=True)) == of
    module.check(scales, good, "weight_scale")
    packing = Float8(scales.packing.dtype, block)
    return _joined(weight, weight.shape, packing, scales)


def _share(size: int, count: int, block: int) -> int:
    """How many of `size` share one of `count` scales."""
    return max(size, 1) if count == 1 else 1 if count == size else block


_FINDERS: dict[str, dict[str, Callable[..., TensorRef | None]]] = {
    "awq": {".qweight": _awq},
    "gptq": {".qweight": _gptq},
    "compressed-tensors": {".weight_packed": _rows, ".weight": _bytes},
    "fp8": {".weight": _bytes},
}


def _is_matrix(ref: TensorRef, dtype: torch.dtype) -> bool:
    return ref.packing == Plain(dtype) and len(ref.shape) == 2 and all(ref.shape)


def _matrix(
    module: _Module,
    shape: tuple[int, ...],
    codes: Codes,
    group_size: int,
    *parts: TensorRef,
    scatters: bool = False,
) -> TensorRef:
    """Of whole numbers, as quickly as its groups allow. group_size: 0: of equal groups. scatters:
    inputs belong to groups in an order of their own."""
    (outputs, inputs), groups = shape, codes.num_groups
    said = {of.name: getattr(codes, of.name) for of in fields(codes)}
    if not groups or (codes.has_zeros and outputs * codes.bits % 32):
        raise module.refused(f"has {groups} groups and {outputs} outputs", parts[0])
    even = inputs % groups == 0 and (inputs // groups) % 32 == 0
    if not scatters and group_size and -(-inputs // group_size) != groups:
        raise module.bad(f"has {groups} groups of {group_size} inputs for {inputs}", parts[0])
    even = even and (not group_size or group_size >= inputs or inputs % group_size == 0)
    if even and (not scatters or groups == 1) and (codes.bits == 4 or codes.is_symmetric):
        said["has_index"] = codes.has_index and groups > 1
        if codes.has_index and groups == 1:
            parts = parts[:-1]
        packing = (Codes4 if codes.bits == 4 else Codes8)(**said)
        return _joined(parts[0], shape, packing, *parts[1:])
    if not codes.has_index and not group_size:
        if inputs % groups:
            raise module.refused(f"has {groups} groups for {inputs} inputs", parts[0])
        group_size = inputs // groups
    packing = Scattered(**said, group_size=group_size)
    if codes.layout is Layout.AWQ and outputs % 8:
        raise module.refused(f"has {outputs} outputs", parts[0])
    return _joined(parts[0], shape, packing, *parts[1:])


def _joined(first: TensorRef, shape, packing, *others: TensorRef) -> TensorRef:
    beside = tuple(Place(ref.path, ref.offset, ref.num_bytes) for ref in others)
    ref = replace(first, shape=tuple(shape), packing=packing, beside=beside)
    assert packing.sizes(ref.shape) == (first.num_bytes, *(o.num_bytes for o in others)), packing
    return ref

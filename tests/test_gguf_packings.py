"""What a GGUF file's blocks say is what is kept of them, as near as the bits allow."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as Kind

from ebbtide.kernels import dispatch
from ebbtide.kernels.ggml_blocks import repack_blocks
from ebbtide.kernels.quantised import STRIP, quantise_weight
from ebbtide.offload.errors import UnsupportedModel
from ebbtide.offload.gguf import packings as gguf_packings
from ebbtide.offload.gguf.packings import LogOf, Swapped, SwappedNumbers, packing_of
from ebbtide.offload.weights.packing import Plain

DECODED = [
    kind.name
    for kind in quants._type_traits
    if kind not in (Kind.F32, Kind.F16, Kind.BF16) and kind in GGML_QUANT_SIZES
]
OWN = {"Q8_0": 8, "Q4_0": 4, "MXFP4": 4}
# Where a type's float16 numbers lie in a block.
HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ2_XXS": [0],
    "IQ2_XS": [0],
    "IQ2_S": [0],
    "IQ3_XXS": [0],
    "IQ3_S": [0],
    "IQ1_S": [0],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
    "TQ1_0": [52],
    "TQ2_0": [64],
}
SHAPES = [(3, 256), (16, 512), (37, 768)]


def drawn(kind: str, shape, seed=0) -> np.ndarray:
    """Rows of blocks with any codes, and scales of ordinary size."""
    block, block_bytes = GGML_QUANT_SIZES[Kind[kind]]
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, (shape[0], shape[1] // block, block_bytes), np.uint8)
    for at in HALVES.get(kind, ()):
        scale = generator.uniform(0.001, 0.01, raw.shape[:2]).astype(np.float16)
        raw[..., at : at + 2] = scale[..., None].view(np.uint8)
    if kind == "MXFP4":
        raw[..., 0] = generator.integers(115, 125, raw.shape[:2])
    if kind == "Q8_0":
        codes = raw[..., 2:]
        codes[codes == 0x80] = 0
    return raw.reshape(shape[0], -1)


def loaded(packing, raw: np.ndarray, shape, bits, room=None):
    raw = torch.from_numpy(raw.reshape(-1))
    form = packing.form(bits)
    room = torch.empty(packing.room_bytes(shape, bits), dtype=torch.uint8)
    kept = packing.load([raw], room, shape, form, torch.empty, 1)
    return form, kept


def packing(kind: str):
    return packing_of(kind, *GGML_QUANT_SIZES[Kind[kind]], Path("m.gguf"), "a")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [8, 4, None])
@pytest.mark.parametrize("kind", DECODED)
def test_kept_numbers_are_the_blocks(kind, bits, shape):
    raw = drawn(kind, shape)
    with np.errstate(all="ignore"):
        said = torch.from_numpy(quants.dequantize(raw, Kind[kind]).astype(np.float32))
    if not said.isfinite().all():
        pytest.skip("scales of this type are in several places")
    made = packing(kind)
    form, kept = loaded(made, raw, shape, bits)
    assert sum(made.sizes(shape)) == raw.nbytes
    assert torch.equal(made.decode([torch.from_numpy(raw.reshape(-1))], shape), said)
    if form.bits is None:
        assert torch.equal(kept, said) and form.num_bytes(shape) >= kept.nbytes
        return
    assert 0 <= form.num_bytes(shape) - kept.num_bytes < 128
    numbers = kept.rows(0, shape[0])
    if form.bits == OWN.get(kind):
        assert torch.equal(numbers, said)
    elif form.is_affine:  # a minimum and a scale in float16: 2**-11 of each
        assert (numbers - said).abs().max() <= 3 * 2.0**-11 * said.abs().max()
    else:
        whole = quantise_weight(said, form.bits)
        assert torch.equal(numbers, whole.rows(0, shape[0]))


@pytest.mark.parametrize("kind", ["Q6_K", "Q4_K", "Q4_1", "Q8_0"])
def test_rows_are_converted_some_at_a_time(kind, monkeypatch):
    """The same numbers, whatever the size of the pieces."""
    shape = (100, 512)
    raw = drawn(kind, shape)
    _, whole = loaded(packing(kind), raw, shape, 8)
    monkeypatch.setattr("ebbtide.offload.weights.packing._DECODED", 1)
    monkeypatch.setattr(gguf_packings, "_REPACKED", 1)
    monkeypatch.setattr("ebbtide.kernels.ggml_blocks._CHUNK_BYTES", 1)
    _, pieces = loaded(packing(kind), raw, shape, 8)
    assert torch.equal(whole.codes, pieces.codes) and torch.equal(whole.scales, pieces.scales)


def test_the_last_strip_is_filled_with_zeros():
    raw = torch.from_numpy(drawn("Q8_0", (3, 64)).reshape(3, 2, 34))
    weight = repack_blocks(raw, "Q8_0")
    outputs = weight.codes.view(torch.int8).view(1, -1, STRIP, 4)
    assert not outputs[:, :, 3:].any() and not weight.scales[..., 3:].any()


def test_a_code_that_no_kernel_multiplies_is_another():
    raw = drawn("Q8_0", (40, 64)).reshape(40, 2, 34)
    raw[20, 1, 5] = 0x80
    said = torch.from_numpy(quants.dequantize(raw.reshape(40, -1), Kind.Q8_0))
    weight = repack_blocks(torch.from_numpy(raw), "Q8_0")
    assert int(weight.codes.view(torch.int8).min()) > -128
    off = (weight.rows(0, 40) - said).abs()
    scale = float(raw[20, 1, :2].view(np.float16)[0])
    assert off[20, 32 + 3] <= 1.001 * scale
    off[20, 32 + 3] = 0
    assert not off.any()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K", "Q4_1", "Q6_K", "Q5_0"])
@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_scales_that_are_no_numbers_are_found(kind, bad, bits):
    shape = (16, 256)
    raw = drawn(kind, shape).reshape(16, -1, GGML_QUANT_SIZES[Kind[kind]][1])
    at = HALVES[kind][0]
    raw[3, 0, at : at + 2] = np.array([bad], np.float16).view(np.uint8)
    with pytest.raises(FloatingPointError):
        loaded(packing(kind), raw, shape, bits)


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_K", "Q6_K"])
def test_pairs_are_put_apart(kind):
    heads, dim, inputs = 3, 16, 256
    shape = (heads * dim, inputs)
    inner = Plain(torch.float32) if kind == "F32" else packing(kind)
    if kind == "F32":
        raw = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        straight, raw = torch.from_numpy(raw), raw.view(np.uint8)
    else:
        raw = drawn(kind, shape)
        _, weight = loaded(inner, raw, shape, 8)
        straight = weight.rows(0, shape[0])
    bits = None if kind == "F32" else 8
    _, turned = loaded(Swapped(inner, heads, dim // 2, 2), raw, shape, bits)
    turned = turned if kind == "F32" else turned.rows(0, shape[0])
    expected = straight.view(heads, dim // 2, 2, inputs).transpose(1, 2).reshape(shape)
    assert torch.equal(turned, expected)
    vector = torch.arange(48, dtype=torch.float32)
    got = Swapped(Plain(torch.float32), 3, 8, 2).decode([vector.view(torch.uint8)], (48,))
    assert torch.equal(got, vector.view(3, 8, 2).transpose(1, 2).reshape(-1))


@pytest.mark.parametrize("bits", [8, 4, None])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K"])
def test_columns_that_are_no_blocks_change_places_as_numbers(kind, bits):
    shape, a, b = (40, 768), 3, 16
    inner, raw = packing(kind), drawn(kind, (40, 768))
    said = torch.from_numpy(quants.dequantize(raw, Kind[kind]).astype(np.float32))
    expected = said.view(40, a, b, 16).transpose(1, 2).reshape(shape)
    made = SwappedNumbers(inner, a, b)
    assert torch.equal(made.decode([torch.from_numpy(raw.reshape(-1))], shape), expected)
    _, kept = loaded(made, raw, shape, bits)
    if bits is None:
        assert torch.equal(kept, expected)
    else:
        whole = quantise_weight(expected, bits)
        assert torch.equal(kept.codes, whole.codes) and torch.equal(kept.scales, whole.scales)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_columns_that_are_blocks_and_rows_from_one_on_change_places(kind):
    shape, a, b = (48, 384), 3, 4
    inner = Plain(torch.float32) if kind == "F32" else packing(kind)
    if kind == "F32":
        numbers = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        said, raw = torch.from_numpy(numbers), numbers.view(np.uint8)
    else:
        raw = drawn(kind, shape)
        said = torch.from_numpy(quants.dequantize(raw, Kind[kind]))
    flat = torch.from_numpy(raw.reshape(-1))
    columns = Swapped(inner, shape[0], a, b).decode([flat], shape)
    assert torch.equal(columns, said.view(48, a, b, 32).transpose(1, 2).reshape(shape))
    rows = Swapped(inner, 1, a, b, 12).decode([flat], shape)
    assert torch.equal(rows[:12], said[:12])
    assert torch.equal(rows[12:], said[12:].view(a, b, 3, -1).transpose(0, 1).reshape(36, -1))


def test_rates_are_what_they_are_the_exponential_of():
    rates = torch.tensor([-5.0, 0.0, 1.0])
    raw = (-rates.exp()).view(torch.uint8)
    found = LogOf(Plain(torch.float32)).decode([raw], (3,))
    assert torch.allclose(found, rates, atol=1e-6)


def test_types_that_nobody_decodes_are_named():
    for kind in ("I32", "99", "Q8_1"):
        with pytest.raises(UnsupportedModel, match=f"a is of the type {kind}, which Ebbtide"):
            packing_of(kind, 1, 4, Path("m.gguf"), "a")


def test_what_takes_a_package_more_says_so(monkeypatch):
    monkeypatch.setattr(gguf_packings.importlib.util, "find_spec", lambda name: None)
    packing("Q8_0"), packing("Q4_0"), packing("MXFP4")
    with pytest.raises(UnsupportedModel, match=r"pip install 'ebbtide\[gguf\]'"):
        packing("IQ3_S")
    monkeypatch.setenv("EBBTIDE_KERNELS", "reference")
    with pytest.raises(UnsupportedModel, match=r"pip install 'ebbtide\[gguf\]'"):
        packing("Q6_K")


@pytest.mark.skipif(dispatch._cpu is None, reason=f"no compiled kernels: {dispatch._missing}")
@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q3_K", "IQ4_XS", "Q5_0"])
def test_the_kernels_need_no_package(monkeypatch, kind):
    shape = (40, 512)
    raw = drawn(kind, shape)
    said = torch.from_numpy(quants.dequantize(raw, Kind[kind]).astype(np.float32))
    monkeypatch.setitem(sys.modules, "gguf", None)  # an import of it fails
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    made = packing(kind)
    assert torch.equal(made.decode([torch.from_numpy(raw.reshape(-1))], shape), said)
    loaded(made, raw, shape, 8)

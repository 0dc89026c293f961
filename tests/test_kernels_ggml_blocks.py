"""Compiled kernels give the bits of the reference for any blocks of GGUF files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.kernels import dispatch
from ebbtide.kernels.ggml_blocks import (
    block_bits,
    decode_blocks,
    repack_blocks,
    repack_minimum_blocks,
)

GROUPS = ("Q8_0", "Q4_0", "MXFP4", "Q4_1", "Q4_K")
DECODED = "Q4_1 Q4_K Q5_K Q6_K Q5_0 Q5_1 Q2_K Q3_K IQ4_NL IQ4_XS".split()
# Where a type's float16 numbers lie in a block.
HALVES = {
    **{"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2]},
    **{"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "Q2_K": [80, 82], "Q3_K": [108]},
    **{"IQ4_NL": [0], "IQ4_XS": [0]},
}

pytestmark = pytest.mark.skipif(
    dispatch._cpu is None, reason=f"no compiled kernels here: {dispatch._missing}"
)


def drawn(kind: str, rows: int, num_blocks: int, seed: int, rare: bool = False) -> torch.Tensor:
    """(rows, blocks, bytes of one): any codes, scales of any size that float16 has, zero and the
    smallest among them; rare: infinite ones and what is no number too."""
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, (rows, num_blocks, GGML_QUANT_SIZES[Kind[kind]][1]), np.uint8)
    for at in HALVES.get(kind, ()):
        bits = generator.integers(0, 1 << 16, raw.shape[:2], np.uint16)
        if not rare:
            bits = np.where(bits & 0x7C00 >= 0x6000, bits & 0xC3FF, bits)  # below 512
        bits = np.where(generator.random(bits.shape) < 0.1, 0, bits).astype(np.uint16)
        raw[..., at : at + 2] = bits[..., None].view(np.uint8)
    if kind == "MXFP4" and not rare:
        raw[..., 0] = generator.integers(0, 144, raw.shape[:2])
    return torch.from_numpy(raw)


def kept(blocks: torch.Tensor, kind: str, threads: int = 1):
    repack = repack_minimum_blocks if block_bits(kind) is None else repack_blocks
    with np.errstate(all="ignore"):
        return repack(blocks, kind, threads=threads)


@pytest.mark.parametrize("kind", GROUPS)
@given(
    rows=st.integers(1, 50),
    num_blocks=st.integers(1, 5),
    seed=st.integers(0, 999),
    threads=st.integers(1, 3),
)
def test_repacking_gives_the_bits_of_the_reference(kind, rows, num_blocks, seed, threads):
    blocks = drawn(kind, rows, num_blocks, seed)
    got = kept(blocks, kind, threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EBBTIDE_KERNELS", "reference")
        want = kept(blocks, kind)
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.scales.view(torch.int16), want.scales.view(torch.int16))
    assert got.shape == want.shape and got.bits == want.bits
    assert (got.is_float, got.is_affine) == (want.is_float, want.is_affine)


@pytest.mark.parametrize("kind", GROUPS)
@given(rows=st.integers(1, 20), seed=st.integers(0, 999))
def test_what_the_reference_refuses_is_refused(kind, rows, seed):
    blocks = drawn(kind, rows, 1, seed, rare=True)
    outcomes = []
    for backend in ("compiled", "reference"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EBBTIDE_KERNELS", backend)
            try:
                kept(blocks, kind)
                outcomes.append("kept")
            except FloatingPointError as error:
                outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("kind", DECODED)
@given(rows=st.integers(1, 20), num_blocks=st.integers(1, 5), seed=st.integers(0, 999))
def test_decoded_numbers_are_to_the_bit_those_of_the_gguf_package(kind, rows, num_blocks, seed):
    blocks = drawn(kind, rows, num_blocks, seed)
    want = quants.dequantize(blocks.flatten(1).numpy(), Kind[kind])
    got = decode_blocks(blocks, kind, threads=2)
    assert np.array_equal(got.numpy().view(np.int32), want.astype(np.float32).view(np.int32))


@pytest.mark.parametrize("kind", GROUPS)
def test_blocks_may_lie_anyhow(kind):
    blocks = drawn(kind, 40, 3, 0)
    got, want = kept(blocks[::2], kind), kept(blocks[::2].contiguous(), kind)
    assert torch.equal(got.codes, want.codes) and torch.equal(got.scales, want.scales)


def test_blocks_of_another_length_are_refused():
    blocks = torch.zeros(4, 2, 33, dtype=torch.uint8)
    for kind in GROUPS:
        with pytest.raises(ValueError, match=kind):
            kept(blocks, kind)
    with pytest.raises(ValueError, match="Q6_K"):
        decode_blocks(blocks, "Q6_K")

"""The byte layout: sizes, alignment, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ebbtide.kernels.layout import PageLayout, plane_widths


def test_planes_are_the_powers_of_two_that_make_up_a_code():
    assert [plane_widths(b) for b in range(9)] == [
        (),
        (1,),
        (2,),
        (2, 1),
        (4,),
        (4, 1),
        (4, 2),
        (4, 2, 1),
        (8,),
    ]


def test_sizes_of_a_known_layout():
    layout = PageLayout(
        kv_heads=2,
        head_dim=64,
        page_tokens=32,
        pages_per_record=4,
        key_bits=5,
        value_bits=4,
        near_bits=1,
    )
    # near: 32 * 64 / 8 bytes of codes, then two float16 per channel
    assert layout.near_head_bytes == 256 + 256
    # far: four key bits, four value bits, two float16 per token; 2176 is a multiple of 64 already
    assert layout.far_head_bytes == 1024 + 1024 + 128
    assert layout.record_payload_bytes == 4 * 2 * 2176
    assert layout.record_bytes == 20480
    assert layout.near_record_bytes == 4 * 2 * 512
    assert layout.record_tokens == 128
    assert layout.padding_share == pytest.approx(1 - 17408 / 20480)
    assert layout.near_bytes_per_token == 32
    assert layout.far_bytes_per_token == 160
    assert layout.bits_per_element == pytest.approx(8 * (20480 + 4096) / (2 * 128 * 2 * 64))


def test_means_of_values_end_the_near_block():
    layout = PageLayout(2, 64, 32, 4, key_bits=5, near_bits=1)
    means = dataclasses.replace(layout, value_means=True)
    assert means.value_mean_offset == layout.value_mean_offset == layout.near_head_bytes == 512
    assert means.near_head_bytes == 512 + 128
    assert means.near_record_bytes == 4 * 2 * 640
    assert means.record_bytes == layout.record_bytes


def test_records_are_padded_to_those_of_other_bits():
    two = PageLayout(3, 64, 64, 1, key_bits=8, value_bits=8, near_bits=2)
    three = dataclasses.replace(two, near_bits=3, least_record_bytes=two.record_bytes)
    assert three.record_bytes == two.record_bytes == 24576
    assert three.record_payload_bytes == two.record_payload_bytes - 3 * 512
    assert three.near_record_bytes == two.near_record_bytes + 3 * 512
    longer = dataclasses.replace(three, least_record_bytes=28672)
    assert longer.record_bytes == 28672  # its own would be 24576
    assert longer.padding_share > three.padding_share


def test_sizes_of_a_full_layout():
    layout = PageLayout(1, 80, 16, codec="full", raw_dtype=torch.float32)
    assert layout.far_head_bytes == 2 * 16 * 80 * 4
    assert layout.near_head_bytes == 4 * 80
    assert layout.record_bytes == 12288
    assert layout.near_record_bytes == 320


@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("codec", ["quantised", "full"])
def test_near_blocks_move_into_the_record_when_they_are_not_resident(head_dim, codec):
    near = PageLayout(3, head_dim, 16, 2, codec, near_resident=True)
    far = PageLayout(3, head_dim, 16, 2, codec, near_resident=False)
    assert far.near_record_bytes == 0
    assert far.head_stride_bytes >= near.far_head_bytes + near.near_head_bytes
    for layout in (near, far):
        assert layout.far_head_bytes % 64 == layout.head_stride_bytes % 64 == 0
        assert layout.record_bytes % 4096 == 0
        assert 0 <= layout.record_bytes - layout.record_payload_bytes < 4096
        assert 0 <= layout.padding_share < 1


@pytest.mark.parametrize(
    "change",
    [
        {"head_dim": 20},
        {"head_dim": 0},
        {"kv_heads": 0},
        {"page_tokens": 0},
        {"pages_per_record": 0},
        {"codec": "zip"},
        {"key_bits": 9},
        {"key_bits": 0},
        {"value_bits": 0},
        {"near_bits": 5, "key_bits": 8},
        {"near_bits": 2, "key_bits": 2},
        {"near_bits": -1},
        {"codec": "full", "rotate": True},
        {"codec": "full", "value_means": True},
        {"raw_dtype": torch.int8},
        {"least_record_bytes": 100},
        {"least_record_bytes": -4096},
    ],
)
def test_what_cannot_be_laid_out_is_refused(change):
    fields = {"kv_heads": 2, "head_dim": 64, "page_tokens": 32} | change
    with pytest.raises(ValueError, match=r"must be|known are"):
        PageLayout(**fields)

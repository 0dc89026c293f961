"""Pages: what is sealed comes back, in every layout and from every implementation."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from ebbtide.kernels import pages
from ebbtide.kernels.layout import PageLayout

# The matrix: odd sizes, every plane width, each codec. Adding a layout is adding a line.
LAYOUTS = {
    "usual": PageLayout(2, 64, 32, 4, key_bits=5, value_bits=4, near_bits=1),
    "one head": PageLayout(1, 128, 64, 2, key_bits=6, value_bits=4, near_bits=2),
    "three heads": PageLayout(3, 80, 16, 3, key_bits=4, value_bits=4, near_bits=1),
    "tiny": PageLayout(1, 8, 16, 1, key_bits=3, value_bits=2, near_bits=1),
    "96": PageLayout(2, 96, 32, 2, key_bits=8, value_bits=8, near_bits=3),
    "112": PageLayout(2, 112, 16, 2, key_bits=7, value_bits=5, near_bits=4),
    "256": PageLayout(1, 256, 256, 1, key_bits=5, value_bits=6, near_bits=1),
    "no near codes": PageLayout(2, 64, 16, 2, key_bits=4, value_bits=4, near_bits=0),
    "no far planes but one": PageLayout(2, 24, 16, 2, key_bits=2, value_bits=1, near_bits=1),
    "value bits 7": PageLayout(2, 40, 20, 1, key_bits=8, value_bits=7, near_bits=0),
    "padded": PageLayout(2, 64, 16, 2, key_bits=8, near_bits=3, least_record_bytes=12288),
    "full bf16": PageLayout(2, 64, 32, 2, codec="full"),
    "full f16": PageLayout(3, 80, 16, 1, codec="full", raw_dtype=torch.float16),
    "full f32": PageLayout(1, 112, 16, 2, codec="full", raw_dtype=torch.float32),
    "shared": PageLayout(1, 56, 32, 2, key_bits=8, near_bits=2, shared_from=16),
    "shared, odd": PageLayout(2, 24, 20, 1, key_bits=5, near_bits=1, shared_from=7),
    "shared bf16": PageLayout(1, 56, 16, 2, codec="full", shared_from=16),
}
LAYOUTS |= {
    f"{name}, near in record": dataclasses.replace(layout, near_resident=False)
    for name, layout in list(LAYOUTS.items())
}
LAYOUTS |= {
    f"{name}, rotated": dataclasses.replace(layout, rotate=True)
    for name, layout in list(LAYOUTS.items())
    if name in ("usual", "three heads", "tiny, near in record")
}

LAYOUTS |= {
    f"{name}, value means": dataclasses.replace(layout, value_means=True)
    for name, layout in list(LAYOUTS.items())
    if name in ("usual", "tiny", "96", "256", "value bits 7", "usual, near in record", "shared")
}
WITH_MEANS = [n for n, x in LAYOUTS.items() if x.value_means and x.near_resident]


@pytest.fixture(params=LAYOUTS)
def layout(request) -> PageLayout:
    return LAYOUTS[request.param]


def tokens_for(layout: PageLayout, num_records: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (num_tokens, kv_heads, d) with large channels, constant ones and zeros."""
    generator = torch.Generator().manual_seed(layout.head_dim * 7 + layout.page_tokens)
    shape = (num_records * layout.record_tokens, layout.kv_heads, layout.head_dim)
    k = torch.randn(shape, generator=generator)
    v = torch.randn(shape, generator=generator)
    k[..., 1] *= 100
    k[..., 2] = 0.1
    k[..., 3] = 0
    k[..., 4] -= 300
    k[..., 5] *= 1e-7
    v[3] = 0
    v[4] = -2.5
    v[5] *= 1000
    return k, v


def read(near, records, layout) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (layout.kv_heads, len(records) * layout.record_tokens, layout.head_dim)
    k, v = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    pages.unpack(near, records, layout, k, v)
    return k, v


def test_what_is_sealed_comes_back_within_half_a_step(layout, kernels):
    k, v = tokens_for(layout)
    near, records = pages.seal(k, v, layout)
    assert near.shape == (3, layout.near_record_bytes) and near.dtype == torch.uint8
    assert records.shape == (3, layout.record_bytes) and records.dtype == torch.uint8
    got_k, got_v = read(near, records, layout)
    want_k = (pages.rotate(k) if layout.rotate else k).transpose(0, 1)
    want_v = want_k if layout.shares_values else v.transpose(0, 1)
    if layout.shares_values:
        assert torch.equal(got_k, got_v)
    if layout.is_full:
        assert torch.equal(got_k, want_k.to(layout.raw_dtype).float())
        assert torch.equal(got_v, want_v.to(layout.raw_dtype).float())
        return
    # Steps found apart from the code under test, in float64: the range of a channel in its page (a
    # token for values) over the levels. lo and scale are rounded outwards to float16, 2**-11 of lo
    # and of the step.
    by_page = want_k.unflatten(1, (-1, layout.page_tokens)).double()
    check_error(got_k.unflatten(1, (-1, layout.page_tokens)), by_page, 2, layout.key_bits)
    if not layout.shares_values:
        check_error(got_v, want_v.double(), 2, layout.value_bits)


def check_error(got, want, dim, bits):
    least, greatest = want.amin(dim, keepdim=True), want.amax(dim, keepdim=True)
    lo_slack = torch.maximum(least.abs() * 2**-10, torch.tensor(6e-8))
    levels = 2**bits - 1
    step = ((greatest - least + lo_slack) / levels) * (1 + 2**-10) + 6e-8
    rounding = (least.abs() + greatest.abs()) * 2**-22
    assert bool(((got - want).abs() <= step / 2 + rounding).all())


def test_all_implementations_write_and_read_the_same_bytes(layout, kernels, monkeypatch):
    k, v = tokens_for(layout)
    near, records = pages.seal(k, v, layout)
    got_k, got_v = read(near, records, layout)
    monkeypatch.setenv("EBBTIDE_KERNELS", "reference")
    want_near, want_records = pages.seal(k, v, layout)
    assert torch.equal(near, want_near) and torch.equal(records, want_records)
    want_k, want_v = read(near, records, layout)
    assert torch.equal(got_k, want_k) and torch.equal(got_v, want_v)


@pytest.mark.parametrize("name", ["usual", "tiny, value means", "112"])
def test_all_implementations_agree_on_hard_numbers(name, kernels, monkeypatch):
    """Denormals, the ends of float16, constants, ties between two codes."""
    layout = LAYOUTS[name]
    shape = (layout.record_tokens, layout.kv_heads, layout.head_dim)
    generator = torch.Generator().manual_seed(17)
    scales = torch.tensor([1e-45, 1e-40, 6e-8, 3e-5, 1.0, 2047.5, 1e4, 65504.0, 0.0])
    for _ in range(20):
        pick = torch.randint(0, len(scales), (1, *shape[1:]), generator=generator)
        offset = torch.randint(-4, 5, (1, *shape[1:]), generator=generator)
        whole = torch.randint(-8, 9, shape, generator=generator).float() / 8
        k = (whole * scales[pick] + offset).clamp(-65504, 65504)
        v = k.flip(0) * 0.5
        near, records = pages.seal(k, v, layout)
        with monkeypatch.context() as patch:
            patch.setenv("EBBTIDE_KERNELS", "reference")
            want_near, want_records = pages.seal(k, v, layout)
        assert torch.equal(near, want_near) and torch.equal(records, want_records)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads, kernels):
    layout = LAYOUTS["three heads"]
    near, records = pages.seal(*tokens_for(layout), layout)
    want = read(near, records, layout)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        again = pages.seal(*tokens_for(layout), layout)
        got = read(near, records, layout)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(again[0], near) and torch.equal(again[1], records)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_out_tensors_may_be_views_and_nothing_else_is_written(kernels):
    layout = LAYOUTS["usual"]
    near, records = pages.seal(*tokens_for(layout), layout)
    want = read(near, records, layout)
    n = want[0].shape[1]
    buffers = torch.full((2, layout.kv_heads, n + 20, layout.head_dim), 7.0)
    pages.unpack(near, records, layout, buffers[0, :, 5 : 5 + n], buffers[1, :, 5 : 5 + n])
    assert torch.equal(buffers[0, :, 5 : 5 + n], want[0])
    assert torch.equal(buffers[1, :, 5 : 5 + n], want[1])
    assert bool((buffers[:, :, :5] == 7).all()) and bool((buffers[:, :, 5 + n :] == 7).all())


def test_a_record_does_not_depend_on_its_neighbours(layout, kernels):
    k, v = tokens_for(layout)
    near, records = pages.seal(k, v, layout)
    n = layout.record_tokens
    one_near, one = pages.seal(k[n : 2 * n], v[n : 2 * n], layout)
    assert torch.equal(one_near[0], near[1]) and torch.equal(one[0], records[1])


def test_records_of_no_tokens(layout, kernels):
    empty = torch.empty((0, layout.kv_heads, layout.head_dim))
    near, records = pages.seal(empty, empty, layout)
    assert near.shape == (0, layout.near_record_bytes) and records.shape == (0, layout.record_bytes)
    k, v = read(near, records, layout)
    assert k.shape == v.shape == (layout.kv_heads, 0, layout.head_dim)


def test_the_near_plane_alone_bounds_and_estimates_the_keys(layout):
    if not layout.near_resident:
        with pytest.raises(ValueError, match="no near plane"):
            pages.key_box(torch.empty((1, 0), dtype=torch.uint8), layout)
        return
    k, v = tokens_for(layout)
    near, records = pages.seal(k, v, layout)
    keys = (pages.rotate(k) if layout.rotate else k).transpose(0, 1)
    if layout.is_full:
        keys = keys.to(layout.raw_dtype).float()
    lo, hi = pages.key_box(near, layout)
    num_pages = 3 * layout.pages_per_record
    assert lo.shape == hi.shape == (num_pages, layout.kv_heads, layout.head_dim)
    by_page = keys.unflatten(1, (num_pages, layout.page_tokens))
    assert bool((lo.transpose(0, 1).unsqueeze(2) <= by_page).all())
    assert bool((hi.transpose(0, 1).unsqueeze(2) >= by_page).all())
    # The decoded keys are in the box too, and the near keys within half a near bin of them.
    decoded = read(near, records, layout)[0].unflatten(1, (num_pages, layout.page_tokens))
    assert bool((lo.transpose(0, 1).unsqueeze(2) <= decoded).all())
    assert bool((hi.transpose(0, 1).unsqueeze(2) >= decoded).all())
    estimate = pages.near_keys(near, layout).unflatten(1, (num_pages, layout.page_tokens))
    width = (hi - lo).transpose(0, 1).unsqueeze(2)
    levels = 2**layout.box_bits - 1
    bin_width = width * (levels + 1) / levels / 2**layout.near_code_bits
    rounding = (lo.abs() + hi.abs()).transpose(0, 1).unsqueeze(2) * 2**-22
    assert bool(((estimate - decoded).abs() <= bin_width / 2 + rounding).all())


@pytest.mark.parametrize("dim", [8, 80, 96, 112, 128, 256])
def test_rotation_keeps_scores_and_undoes_itself(dim):
    generator = torch.Generator().manual_seed(dim)
    q, k = torch.randn((2, 50, dim), generator=generator)
    # dim products, each off by a few float32 roundings of numbers near 1.
    tolerance = {"atol": dim * 2**-22, "rtol": 0.0}
    torch.testing.assert_close(pages.rotate(q) @ pages.rotate(k).T, q @ k.T, **tolerance)
    torch.testing.assert_close(pages.rotate(pages.rotate(q)), q, atol=2e-6, rtol=0)
    block = dim & -dim
    spike = torch.zeros(dim)
    spike[0] = 1.0
    assert torch.equal(pages.rotate(spike)[:block], torch.full((block,), block**-0.5))
    assert torch.equal(pages.rotate(q)[7], pages.rotate(q[7]))


@pytest.mark.parametrize("name", WITH_MEANS)
def test_the_near_plane_holds_the_mean_of_each_pages_values(name, kernels):
    layout = LAYOUTS[name]
    near, records = pages.seal(*tokens_for(layout), layout)
    v = read(near, records, layout)[1].double().unflatten(1, (-1, layout.page_tokens))
    rows = torch.tensor([2, 0, 2])  # scattered frames, in an order of their own
    means = pages.value_means(near, rows, layout)
    want = v.mean(2).unflatten(1, (3, -1))[:, rows].flatten(1, 2)
    # float16 keeps 11 bits of the mean, and the float32 sum 24 of its largest term.
    slack = 2.0**-11 * want.abs() + 2.0**-24 * layout.page_tokens * float(v.abs().max())
    assert means.dtype == torch.float32 and bool(((means - want).abs() <= slack).all())


def test_means_of_values_need_a_place_and_a_range(kernels):
    layout = LAYOUTS["usual, value means"]
    k, v = tokens_for(layout)
    near, _ = pages.seal(k, v, LAYOUTS["usual"])
    with pytest.raises(ValueError, match="no means of values"):
        pages.value_means(near, torch.arange(3), LAYOUTS["usual"])
    v[:, :, 0], v[:, :, 1] = 0, 1e5  # each token's parameters fit
    pages.seal(k, v, LAYOUTS["usual"])
    with pytest.raises(FloatingPointError, match="means of values up to"):
        pages.seal(k, v, layout)


@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize("name", ["usual", "full bf16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_cannot_be_sealed_are_named(which, name, bad, kernels):
    layout = LAYOUTS[name]
    k, v = tokens_for(layout)
    (k if which == "keys" else v)[9, 1, 7] = bad
    with pytest.raises(FloatingPointError, match=f"{which} are not finite"):
        pages.seal(k, v, layout)


def test_keys_beyond_float16_parameters_are_named(kernels):
    k, v = tokens_for(LAYOUTS["usual"])
    k[0, 0, 0] = -7e4
    with pytest.raises(FloatingPointError, match="keys between -70000 and"):
        pages.seal(k, v, LAYOUTS["usual"])


def test_shapes_that_do_not_fit_are_refused(kernels):
    layout = LAYOUTS["usual"]
    k, v = tokens_for(layout)
    near, records = pages.seal(k, v, layout)
    with pytest.raises(ValueError, match="whole records"):
        pages.seal(k[:-1], v[:-1], layout)
    with pytest.raises(ValueError, match="both must be"):
        pages.seal(k[:, :1], v[:, :1], layout)
    shape = (layout.kv_heads, 3 * layout.record_tokens, layout.head_dim)
    good = torch.empty(shape)
    with pytest.raises(ValueError, match="out_v is"):
        pages.unpack(near, records, layout, good, torch.empty(shape, dtype=torch.float64))
    with pytest.raises(ValueError, match="out_k is"):
        pages.unpack(near, records, layout, good[:, 1:], good)
    with pytest.raises(ValueError, match="records is"):
        pages.unpack(near, records[:, :-1], layout, good, good)
    with pytest.raises(ValueError, match="near is"):
        pages.unpack(near[:2], records, layout, good, good)


def test_padding_is_zero(kernels):
    layout = LAYOUTS["three heads"]
    _, records = pages.seal(*tokens_for(layout), layout)
    heads = records[:, : layout.record_payload_bytes].unflatten(1, (-1, layout.head_stride_bytes))
    assert layout.far_head_used_bytes < layout.head_stride_bytes
    assert not bool(heads[..., layout.far_head_used_bytes :].any())
    assert not bool(records[:, layout.record_payload_bytes :].any())


def test_few_bits_are_worse_than_many():
    """Guards against a codec that stores less than it says."""
    base = LAYOUTS["usual"]
    k, v = tokens_for(base)
    errors = []
    for bits in (2, 3, 4, 5, 6, 7, 8):
        layout = dataclasses.replace(base, key_bits=bits, value_bits=bits)
        got_k, _ = read(*pages.seal(k, v, layout), layout)
        errors.append(float((got_k[..., 6:] - k.transpose(0, 1)[..., 6:]).square().mean()))
    # Each bit quarters the mean square error of a uniform quantiser; a little less at few levels.
    for coarse, fine in itertools.pairwise(errors):
        assert 3 < coarse / fine < 6


def arrangements(layout: PageLayout) -> list[PageLayout]:
    """All layouts of the same numbers that a plan may choose."""
    means = (False,) if layout.is_full else (False, True)
    bits = {layout.near_bits, *range(min(4, layout.key_bits - 1) + 1)}
    return [
        dataclasses.replace(
            layout,
            near_bits=near_bits,
            near_resident=near_resident,
            value_means=value_means,
            least_record_bytes=least,
        )
        for near_bits in ([layout.near_bits] if layout.is_full else sorted(bits))
        for near_resident in (True, False)
        for value_means in means
        for least in (0, 65536)
    ]


def test_repacked_pages_are_those_that_would_have_been_sealed(layout, kernels):
    k, v = tokens_for(layout)
    sealed = pages.seal(k, v, layout)
    for wanted in arrangements(layout):
        near, records = pages.repack(*sealed, layout, wanted)
        expected_near, expected_records = pages.seal(k, v, wanted)
        assert torch.equal(near, expected_near) and torch.equal(records, expected_records), wanted
        back = pages.repack(near, records, wanted, layout)
        assert torch.equal(back[0], sealed[0]) and torch.equal(back[1], sealed[1]), wanted


@pytest.mark.parametrize(
    "other", [{"key_bits": 6}, {"value_bits": 5}, {"rotate": True}, {"head_dim": 32}]
)
def test_pages_of_other_numbers_are_not_repacked(other):
    layout = LAYOUTS["usual"]
    sealed = pages.seal(*tokens_for(layout), layout)
    with pytest.raises(ValueError, match="other numbers"):
        pages.repack(*sealed, layout, dataclasses.replace(layout, **other))

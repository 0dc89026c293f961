"""What a turned key bias adds to scores, against turning it in float64."""

from __future__ import annotations

import pytest
import torch

from ebbtide.kernels.rope_scores import BLOCK, Turns, block_turns, cos_sin, rope_scores
from ebbtide.offload.layers.rope import Rope
from ebbtide.offload.models.rope_config import RopeConfig


def factors(rows: int, pairs: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    cosines, sines = torch.randn((2, rows, pairs), generator=generator)
    constant = torch.randn((rows,), generator=generator)
    frequencies = 10000.0 ** -(torch.arange(pairs).float() / max(1, pairs))
    return [cosines, sines, constant, block_turns(frequencies)]


def exact_angles(turns: Turns, start: int, count: int) -> torch.Tensor:
    """(count, pairs) float64: a block's centre's, rounded to float32, and steps from there."""
    positions = torch.arange(start, start + count)
    centres = positions // BLOCK * BLOCK + BLOCK // 2
    of_centres = (centres.float()[:, None] * turns.frequencies).double()
    return of_centres + (positions - centres)[:, None] * turns.frequencies.double()


@pytest.mark.parametrize(("rows", "pairs"), [(1, 32), (7, 64), (3, 5), (2, 0)])
@pytest.mark.parametrize(("start", "count"), [(0, 1), (64, 49), (32768, 300), (130000, 16)])
def test_sums_of_cosines_and_sines(rows, pairs, start, count, kernels):
    cosines, sines, constant, turns = factors(rows, pairs)
    got = rope_scores(cosines, sines, constant, turns, start, count)
    # Each cosine of a centre is within 4e-7, each polynomial within 1e-7 of what it stands for, and
    # there are `pairs` of each kind, with factors of about 1.
    angles = exact_angles(turns, start, count).T
    want = cosines.double() @ angles.cos() + sines.double() @ angles.sin()
    want += constant.double()[:, None]
    torch.testing.assert_close(got.double(), want, atol=1e-6 * (1 + pairs), rtol=0)


@pytest.mark.parametrize("theta", [1.5, 1e4, 1e6, 1e30])
def test_angles_are_those_of_positions(theta):
    frequencies = theta ** -(torch.arange(24).float() / 24)
    turns = block_turns(frequencies)
    half = BLOCK // 2
    assert bool((frequencies[turns.num_fast :] * half <= 4.5).all())
    angles = exact_angles(turns, 1000, 200)
    for got, want in zip(cos_sin(turns, 1000, 200), (angles.cos(), angles.sin()), strict=True):
        torch.testing.assert_close(got.double(), want, atol=4e-7, rtol=0)
    # The centres' are rounded to float32, as RoPE's are: by 2**-24 of a thousand radians.
    exact = torch.arange(1000, 1200).double()[:, None] * frequencies.double()
    torch.testing.assert_close(angles, exact, atol=2**-24 * 1200, rtol=0)


def test_a_slow_pair_among_fast_ones_is_looked_up_too():
    turns = block_turns(torch.tensor([1.0, 1e-3, 0.5, 1e-4]))
    assert turns.num_fast == 3
    cosines, sines = torch.randn((2, 2, 4), generator=torch.Generator().manual_seed(1))
    got = rope_scores(cosines, sines, torch.zeros(2), turns, 500, 100)
    angles = exact_angles(turns, 500, 100).T
    want = cosines.double() @ angles.cos() + sines.double() @ angles.sin()
    torch.testing.assert_close(got.double(), want, atol=5e-6, rtol=0)


def test_a_position_does_not_depend_on_others(kernels):
    parts = factors(5, 24)
    whole = rope_scores(*parts, 100, 333)
    if kernels == "reference":
        pytest.skip("torch's products may add in another order for other shapes")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(rope_scores(*parts, 100, 333), whole)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(rope_scores(*parts, 217, 40), whole[:, 117:157])
    alone = [part[2:3] for part in parts[:3]]
    assert torch.equal(rope_scores(*alone, parts[3], 100, 333), whole[2:3])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("start", [70, 130_000])
def test_factors_are_those_of_a_turned_bias(interleaved, share, start, kernels):
    config = RopeConfig("default", 10000.0, share=share, interleaved=interleaved)
    rope = Rope(config, 32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    q = torch.randn((2, 3, 32), generator=generator)
    b = torch.randn((2, 32), generator=generator) * 5
    turned = rope.turn_bias(b, start, 50).permute(1, 0, 2)
    got = rope_scores(*rope.factors(q, b), start, 50)
    torch.testing.assert_close(got, q @ turned.transpose(1, 2), atol=1e-4, rtol=1e-5)
    # And the bias is turned as keys are, but for what float32 makes of their angles: half a unit of
    # its last place for each of the two, times the bias.
    plain = rope.turn(b[None].expand(50, -1, -1), start).permute(1, 0, 2)
    within = 2**-23 * start * float(b.abs().max()) * 2**0.5
    torch.testing.assert_close(turned, plain, atol=1e-4 + within, rtol=1e-5)


@pytest.mark.parametrize("share", [1.0, 0.3125])
def test_a_positions_angles_do_not_depend_on_what_was_asked_before(share):
    config = RopeConfig("default", 10000.0, share=share, interleaved=False)
    rope = Rope(config, 32, torch.device("cpu"))
    in_order = {p: rope.angles(p, 1) for p in range(0, 300)}
    for position in (299, 0, 64, 63, 128, 5):
        for got, expected in zip(rope.angles(position, 1), in_order[position], strict=True):
            assert got.shape == (1, 1, rope.width) and torch.equal(got, expected)
        # Among others a position may be rounded otherwise, by as much as the cosine itself is.
        for got, many in zip(rope.angles(position, 1), rope.angles(position, 7), strict=True):
            torch.testing.assert_close(got[0], many[0], rtol=1e-6, atol=2e-7)

"""Which experts are chosen: by the compiled kernels as by torch, in double precision, and each row
as if it were alone.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ebbtide.kernels.routing import Groups, Routing, _route, route

COUNT, ROWS = 24, 40
PLAIN = Routing(5)
SIGMOIDS = Routing(5, by_sigmoid=True, scaling=2.5)
# Each with whether there is a bias, and a scale.
KINDS = {
    "softmax": (PLAIN, False, False),
    "shares of the whole": (replace(PLAIN, normalised=False), False, False),
    "softmax, a bias, a scale": (replace(PLAIN, scaling=0.7), True, True),
    "all of them": (Routing(COUNT), False, False),
    "sigmoids": (SIGMOIDS, False, False),
    "sigmoids, a bias": (replace(SIGMOIDS, normalised=False), True, False),
    "a bias of scores": (replace(SIGMOIDS, bias_of_scores=True), True, False),
    "by scores": (replace(SIGMOIDS, bias_of_scores=True), False, False),
    "groups": (replace(SIGMOIDS, groups=Groups(6, 2, 2)), True, False),
    "groups by their best": (replace(PLAIN, groups=Groups(4, 1, 1), scaling=16.0), False, False),
}


@pytest.fixture(params=[1, 2])
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, a bias and a scale."""
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn((ROWS, COUNT), generator=generator)
    scores[0], scores[1] = 0, scores[1] * 4  # all alike; far apart, and no two the same in float32
    bias, scale = torch.rand((2, COUNT), generator=generator)
    return scores, bias - 0.5, scale + 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_those_of_double_precision(kernels, threads, kind):
    routing, has_bias, has_scale = KINDS[kind]
    scores, bias, scale = drawn()
    bias, scale = bias if has_bias else None, scale if has_scale else None
    shares, numbers = route(scores.clone(), routing, bias, scale)
    want, among = _route(scores.double(), routing, None if bias is None else bias.double())
    assert torch.equal(numbers, among)
    want = want if scale is None else want * scale[among]
    # An exponential and some sums and quotients of float32: a few roundings of 6e-8.
    torch.testing.assert_close(shares.double(), want, rtol=2e-6, atol=1e-12)
    if kernels != "reference":
        for row in range(ROWS):
            alone = route(scores[row : row + 1].clone(), routing, bias, scale)
            assert torch.equal(alone[0][0], shares[row]) and torch.equal(alone[1][0], numbers[row])


def test_ties_go_to_the_lowest_number(kernels):
    shares, numbers = route(torch.zeros(4, 6), Routing(2))
    assert numbers.tolist() == [[0, 1]] * 4 and shares.tolist() == [[0.5, 0.5]] * 4
    _, numbers = route(torch.zeros(4, 6), Routing(2, groups=Groups(3, 1, 2)))
    assert numbers.tolist() == [[0, 1]] * 4


@pytest.mark.parametrize("routing", [PLAIN, SIGMOIDS, replace(PLAIN, groups=Groups(4, 2, 2))])
def test_what_is_no_number_chooses_experts_that_there_are(kernels, routing):
    scores, *_ = drawn()
    scores[3, 7], scores[4] = torch.nan, torch.nan
    scores[5, 2], scores[6] = torch.inf, -torch.inf
    _, numbers = route(scores, routing)
    assert all(len({*row}) == len(row) and min(row) >= 0 for row in numbers.tolist())
    assert numbers.max() < COUNT

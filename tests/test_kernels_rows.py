"""What stands between products, for many rows, against float64, and a row alone against many."""

from __future__ import annotations

import pytest
import torch

from ebbtide.kernels.add import add_scaled
from ebbtide.kernels.attention import Partial, finish, finish_rows, merge, merge_into
from ebbtide.kernels.gate import ACTIVATIONS, activate, factors, gate, xielu
from ebbtide.kernels.norm import layer_norm
from ebbtide.kernels.raw_rows import read_rows, store_rows
from ebbtide.kernels.turn import turn


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 2])
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [1, 16, 100, 1024])
def test_gates(kernels, activation, size, threads):
    x, up = normal(300, size) * 4, normal(300, size, seed=2)
    x[0], x[1], x[2] = 0, -100, 100
    want = torch.mul(*factors(x.double(), up.double(), activation))
    got = gate(x.clone(), up, activation)
    # Exponentials are within 2 ulp, and a few roundings follow. gelu's tail below -3 is a
    # difference of numbers next to 1: 2**-24 of x, times up.
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=2e-6)
    alone = torch.cat([gate(x[i : i + 1].clone(), up[i : i + 1], activation) for i in (0, 5, 299)])
    if kernels != "reference":
        assert torch.equal(alone, got[[0, 5, 299]])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_of_numbers_at_their_edges(kernels, activation):
    """Finite products are right, and what is no number stays none."""
    edges = torch.tensor([torch.nan, 7, -7, torch.inf, -torch.inf, 1.5, 0])
    x, up = torch.cartesian_prod(edges, edges).T.contiguous()[:, None]
    want = torch.mul(*factors(x.double(), up.double(), activation))
    got = gate(x.clone(), up, activation)
    no_numbers = x.isnan() | up.isnan()
    if activation == "sigmoid" and kernels != "reference":
        no_numbers = up.isnan()  # exponentials are of bounded numbers, which a NaN becomes, too
    assert got[no_numbers].isnan().all()
    torch.testing.assert_close(
        got.double()[want.isfinite()], want[want.isfinite()], atol=1e-5, rtol=2e-6
    )


@pytest.mark.parametrize("activation", ["relu2", "gelu_tanh"])
@pytest.mark.parametrize("size", [1, 100, 1024])
def test_activations_without_a_gate(kernels, activation, size, threads):
    x = normal(300, size) * 4
    x[0], x[1], x[2] = 0, -100, 100
    if activation == "relu2":
        want = x.double().clamp(min=0) ** 2
    else:
        want = torch.nn.functional.gelu(x.double(), approximate="tanh")
    got = activate(x.clone(), activation)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=2e-6)
    alone = torch.cat([activate(x[i : i + 1].clone(), activation) for i in (0, 5, 299)])
    if kernels != "reference":
        assert torch.equal(alone, got[[0, 5, 299]])


@pytest.mark.parametrize("size", [1, 100, 1024])
def test_xielu(size, threads):
    """Against the paper's formula in float64, and a row alone to the bit."""
    x = normal(70, size) * 4
    x[0], x[1] = 0, -1e-7
    alpha_p, alpha_n, beta, eps = 0.3, -0.7, 0.5, -1e-6
    above, below = (torch.tensor(y).double().exp().log1p() for y in (alpha_p, alpha_n))
    y = x.double()
    curved = (y.clamp(max=eps).expm1() - y) * (below + beta) + beta * y
    want = torch.where(y > 0, above * y**2 + beta * y, curved)
    got = xielu(x.clone(), alpha_p, alpha_n, beta, eps)
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=2e-6)
    alone = torch.cat([xielu(x[i : i + 1].clone(), alpha_p, alpha_n, beta, eps) for i in range(70)])
    assert torch.equal(alone, got)


def test_xielu_of_odd_parameters_is_what_float32_makes_of_them():
    """A damaged file's numbers may have no exponential."""
    x = torch.tensor([[2.0, -3.0]])
    got = xielu(x.clone(), 1e4, -1e4, 0.5, -1e-6)
    assert got.tolist() == [[4e4 + 1.0, 0.5 * (torch.expm1(x[0, 1]).item() + 3.0 - 3.0)]]
    assert xielu(x.clone(), 1e30, float("nan"), 0.5, -1e-6).isnan().tolist() == [[False, True]]


@pytest.mark.parametrize(("has_bias", "offset"), [(False, 0.0), (True, 0.0), (True, 1.0)])
@pytest.mark.parametrize("size", [8, 100, 4096])
def test_layer_norms(size, has_bias, offset, threads):
    x, weight = normal(70, size) * 3 + 5, normal(size, seed=2)
    bias = normal(size, seed=3) if has_bias else None
    y = x.double() - x.double().mean(-1, keepdim=True)
    want = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weight.double() + offset)
    want += 0 if bias is None else bias.double()
    got = layer_norm(x, weight, bias, offset, 1e-5)
    # The mean is five thirds of the deviation: the difference has its rounding, 2**-24 of 14.
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    rows = (x[i : i + 1].clone() for i in range(70))
    alone = torch.cat([layer_norm(row, weight, bias, offset, 1e-5) for row in rows])
    assert torch.equal(alone, got)


@pytest.mark.parametrize("size", [40, 1000, 2560])
@pytest.mark.parametrize("mean", [53.3, 1234.567, 3e4 + 0.3, 1e7])
def test_a_mean_is_taken_away_whatever_it_is(kernels, size, mean):
    """Rows of one number are nothing but their bias, and what varies around a great mean is found:
    the difference from it is exact, so it is the only rounding that the mean has a part in."""
    weight, bias = normal(size, seed=2), normal(size, seed=3)
    same = torch.full((2, size), mean)
    assert torch.equal(layer_norm(same, weight, bias, 0.0, 1e-6), bias.expand(2, size))
    if kernels == "reference":
        return  # torch's mean is rounded once
    x = mean + mean * 1e-3 * normal(33, size)
    y = x.double() - x.double().mean(-1, keepdim=True)
    want = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double() + bias.double()
    got = layer_norm(x, weight, bias, 0.0, 1e-6)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "width"), [(64, 64), (80, 80), (64, 16), (10, 6), (32, 0)])
@pytest.mark.parametrize("heads_first", [False, True])
def test_heads_are_turned_and_scaled(kernels, interleaved, dim, width, heads_first, threads):
    x, angle = normal(70, 3, dim), normal(70, 1, width) * 9
    pairs = (
        angle[..., ::2].repeat_interleave(2, -1)
        if interleaved
        else angle[..., : width // 2].repeat(1, 1, 2)
    )
    got = turn(x, pairs.cos(), pairs.sin(), interleaved, 0.125, heads_first)
    want = x.double().clone()
    for i in range(width // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + width // 2)
        cosine, sine = (f(pairs[..., a]).double() for f in (torch.cos, torch.sin))
        want[..., a] = x[..., a] * cosine - x[..., b] * sine
        want[..., b] = x[..., b] * cosine + x[..., a] * sine
    want = want * 0.125
    assert got.is_contiguous()
    # Two products and a sum, 2**-24 each, of numbers of up to 4.
    torch.testing.assert_close(
        got.double(), want.transpose(0, 1) if heads_first else want, atol=1e-6, rtol=1e-6
    )
    one = turn(x[7:8], pairs.cos()[7:8], pairs.sin()[7:8], interleaved, 0.125)
    assert torch.equal(one[0], got[:, 7] if heads_first else got[7])


@pytest.mark.parametrize("factor", [1.0, 0.22])
def test_what_joins_the_residual(kernels, factor, threads):
    x, y = normal(300, 77), normal(300, 77, seed=2)
    assert torch.equal(add_scaled(x, y, factor), x + y * factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_raw_rows_are_what_torch_converts(kernels, dtype, threads):
    cells, x = torch.zeros(2, 3, 90, 24, dtype=dtype), normal(70, 3, 24)
    x[0, 0, :3] = torch.tensor([1e9, -1e-30, torch.nan])
    store_rows(x, cells[1, :, 5:75])
    assert torch.equal(cells[1, :, 5:75].nan_to_num(), x.transpose(0, 1).to(dtype).nan_to_num())
    assert not cells[0].any() and not cells[1, :, :5].any() and not cells[1, :, 75:].any()
    tile = torch.zeros(3, 100, 24)
    read_rows(cells[1, :, 5:75], tile[:, 10:80])
    assert torch.equal(tile[:, 10:80].nan_to_num(), cells[1, :, 5:75].float().nan_to_num())
    assert not tile[:, :10].any() and not tile[:, 80:].any()


def partial(seed: int) -> Partial:
    highest, total = normal(2, 40, seed=seed) * 30, normal(2, 40, seed=seed + 1).abs() + 1
    out = normal(2, 40, 24, seed=seed + 2)
    highest[0, seed % 40], total[0, seed % 40], out[0, seed % 40] = -1e30, 0, 0  # sees nothing
    return Partial(highest, total, out)


def test_merged_in_place_is_merged(kernels, threads):
    a, b = partial(3), partial(6)
    want = merge(*(Partial(*(part.double() for part in one)) for one in (a, b)))
    got = merge_into(a, b)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-6)


def test_rows_are_finished_in_the_order_of_heads(kernels, threads):
    p = Partial(normal(2, 60), normal(2, 60).abs() + 1, normal(2, 60, 24))
    want = finish(p).view(2, 3, 20, 24).permute(2, 0, 1, 3).reshape(20, -1)
    assert torch.equal(finish_rows(p, 20), want)

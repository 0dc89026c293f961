"""Routed experts: every expert that the router chose and no other, and rows that depend on no other
row.
"""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instruction_sets import COMPILED

from ebbtide.kernels import dispatch, matmul
from ebbtide.kernels.matmul import ROW_TILE
from ebbtide.kernels.quantised import quantise_weight
from ebbtide.offload.layers import mlp
from ebbtide.offload.layers.mlp import routed_mlp, routed_step
from ebbtide.offload.models.layer_config import Experts
from ebbtide.offload.planning.footprint import _EXPERT_NUMBERS_BYTES
from ebbtide.offload.weights.skeleton import decides
from ebbtide.offload.weights.weights import LayerTensors

HIDDEN, INNER, ROWS = 48, 40, 96
EXPERTS = Experts(count=6, chosen=2, intermediate_size=INNER, normalised=True)


def tensors(experts: Experts, seed: int = 0) -> LayerTensors:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    w = LayerTensors({f"{experts.router}.weight": normal(experts.count, HIDDEN) * 3})
    for number in range(experts.count):
        w[f"{experts.gate.format(number)}.weight"] = normal(INNER, HIDDEN)
        w[f"{experts.up.format(number)}.weight"] = normal(INNER, HIDDEN)
        w[f"{experts.down.format(number)}.weight"] = normal(HIDDEN, INNER)
    return w


def rows_of(seed: int = 1) -> torch.Tensor:
    return torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(seed))


def expected(w, h, experts: Experts) -> torch.Tensor:
    """Every expert for every row, in float64, times what the router gives it or nothing."""
    w, h = {name: tensor.double() for name, tensor in w.items()}, h.double()
    shares = (h @ w[f"{experts.router}.weight"].T).softmax(-1)
    least = shares.sort(-1, descending=True).values[:, experts.chosen - 1 : experts.chosen]
    shares = shares * (shares >= least)
    if experts.normalised:
        shares = shares / shares.sum(-1, keepdim=True)
    out = torch.zeros_like(h)
    for number in range(experts.count):
        gate, up, down = (
            w[f"{name.format(number)}.weight"] for name in (experts.gate, experts.up, experts.down)
        )
        inner = torch.nn.functional.silu(h @ gate.T) * (h @ up.T)
        out += shares[:, number : number + 1] * (inner @ down.T)
    return out


@pytest.mark.parametrize("chosen", [1, 2, 6])
@pytest.mark.parametrize("normalised", [True, False])
def test_the_chosen_experts_are_weighted_and_added(chosen, normalised):
    experts = Experts(6, chosen, INNER, normalised)
    w, h = tensors(experts), rows_of()
    got = routed_mlp(w, h, slice(0, ROWS), "silu", experts)
    # float32 rounding of three products of some 50 terms of size one.
    torch.testing.assert_close(got.double(), expected(w, h, experts), atol=1e-5, rtol=1e-5)


def test_no_other_expert_is_multiplied(monkeypatch):
    monkeypatch.setenv("EBBTIDE_KERNELS", "reference")
    used, names = [], {}
    w, h = tensors(EXPERTS), rows_of()
    names = {id(tensor): name for name, tensor in w.items()}
    original = mlp.tiled
    monkeypatch.setattr(
        mlp,
        "tiled",
        lambda x, rows, m, b=None: used.append(names[id(m)]) or original(x, rows, m, b),
    )
    routed_mlp(w, h[:1], slice(0, 1), "silu", EXPERTS)
    shares = (h[:1] @ w["mlp.gate.weight"].T)[0]
    best = sorted(shares.topk(2).indices.tolist())
    wanted = [
        f"mlp.experts.{n}.{part}_proj.weight" for n in best for part in ("gate", "up", "down")
    ]
    assert used == ["mlp.gate.weight", *wanted]


@pytest.mark.parametrize("kernels", COMPILED, indirect=True)
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("kind", ["plain", "shared", "in turn, with biases"])
@pytest.mark.parametrize("activation", ["silu", "clamped_swiglu"])
def test_a_row_alone_has_the_bits_that_it_has_among_others(kernels, bits, kind, activation):
    """It takes one call for each expert: what is decoded is what is verified."""
    more = {"shared": {"shared_size": INNER}}.get(kind, {})
    if kind.startswith("in turn"):
        more = {"gate_up": "mlp.experts.{}.gate_up_proj", "biases": True, "router": "mlp.router"}
    experts = Experts(count=6, chosen=3, intermediate_size=INNER, normalised=True, **more)
    w, h = all_tensors(experts), rows_of() * 3
    if bits is not None:
        matrices = [n for n, t in w.items() if t.dim() == 2 and not decides(f"x.{n}")]
        w = LayerTensors(w | {n: quantise_weight(w[n], bits) for n in matrices})
    whole = routed_mlp(w, h, slice(0, ROWS), activation, experts)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        alone = [routed_mlp(w, h[i : i + 1], slice(0, 1), activation, experts) for i in range(ROWS)]
        torch.set_num_threads(1)
        assert torch.equal(torch.cat(alone), whole)
    assert len(w.expert_numbers) == 6 + (kind == "shared")


def all_tensors(experts: Experts) -> LayerTensors:
    """As `tensors`, of any kind of experts."""
    generator = torch.Generator().manual_seed(9)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    w = LayerTensors({f"{experts.router}.weight": normal(experts.count, HIDDEN) * 3})
    sizes = {}
    for number in range(experts.count):
        sizes |= {path.format(number): (size, HIDDEN) for path, size in experts.inward.items()}
        sizes[experts.down.format(number)] = HIDDEN, experts.intermediate_size
    if experts.shared_size:
        for name in ("gate_proj", "up_proj"):
            sizes[f"{experts.shared}.{name}"] = experts.shared_size, HIDDEN
        sizes[f"{experts.shared}.down_proj"] = HIDDEN, experts.shared_size
        w[f"{experts.shared_gate}.weight"] = normal(1, HIDDEN)
    for path, size in sizes.items():
        w[f"{path}.weight"] = normal(*size)
        if experts.biases:
            w[f"{path}.bias"] = normal(size[0])
    if experts.biases:
        w[f"{experts.router}.bias"] = normal(experts.count)
    return w


@given(st.data())
def test_the_rows_of_a_pass_change_no_other_row(data):
    """Text comes in pieces: a row is computed with those of its piece, whichever they are."""
    w, h = tensors(EXPERTS), rows_of(data.draw(st.integers(0, 3)))
    whole = routed_mlp(w, h, slice(0, ROWS), "silu", EXPERTS)
    start = data.draw(st.integers(0, ROWS - 1))
    stop = data.draw(st.integers(start + 1, ROWS))
    part = h.clone()
    part[:start], part[stop:] = 0.0, 0.0
    got = routed_mlp(w, part, slice(start, stop), "silu", EXPERTS)
    assert torch.equal(got[start:stop], whole[start:stop])
    assert not bool(got[:start].any()) and not bool(got[stop:].any())


def test_every_row_keeps_its_place_in_a_tile():
    picked = torch.zeros(3 * ROW_TILE, dtype=torch.bool)
    rows = [0, 5, ROW_TILE + 5, ROW_TILE + 6, 2 * ROW_TILE + 5]
    picked[rows] = True
    places, count = mlp._places(picked)
    assert count == 3 * ROW_TILE  # three rows want place 5
    assert [place % ROW_TILE for place in places.tolist()] == [row % ROW_TILE for row in rows]
    assert len(set(places.tolist())) == len(rows)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_experts_are_their_own_dequantisation(bits, monkeypatch):
    """But for the rounding of activations, which is taken out here."""
    monkeypatch.setenv("EBBTIDE_KERNELS", "reference")
    monkeypatch.setattr(matmul, "rounded_rows", lambda x: x)
    w, h = tensors(EXPERTS), rows_of()
    coarse = LayerTensors(
        {n: t if "gate.w" in n else quantise_weight(t, bits) for n, t in w.items()}
    )
    exact = {
        n: t if isinstance(t, torch.Tensor) else t.rows(0, t.shape[0]) for n, t in coarse.items()
    }
    got = routed_mlp(coarse, h, slice(0, ROWS), "silu", EXPERTS)
    torch.testing.assert_close(got.double(), expected(exact, h, EXPERTS), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(dispatch._cpu is None, reason="no compiled kernels here")
def test_what_kernels_are_told_of_experts_is_found_once_and_keeps_no_weights():
    """Else each session would, for all experts, and closing a model would free them some day."""
    w = tensors(EXPERTS)
    step, told = routed_step(w, "silu", EXPERTS, 1e-6), weakref.ref(w)
    assert step is not None and routed_step(w, "silu", EXPERTS, 1e-6) is step
    gc.disable()
    try:
        del w, step
        assert told() is None
    finally:
        gc.enable()


@pytest.mark.skipif(dispatch._cpu is None, reason="no compiled kernels here")
def test_what_kernels_are_told_of_an_expert_is_no_more_than_is_counted():
    """Beside 168 bytes in a token's step; small numbers are there anyway."""
    w = tensors(EXPERTS)
    routed_mlp(w, rows_of()[:1], slice(0, 1), "silu", EXPERTS)
    assert len(w.expert_numbers) == EXPERTS.chosen
    for name, numbers in w.expert_numbers.items():
        large = [number for number in numbers if number > 256]
        parts = sum(map(sys.getsizeof, (name, numbers, *large)))
        assert len(large) >= 3 and parts + 168 <= _EXPERT_NUMBERS_BYTES

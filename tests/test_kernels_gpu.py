"""The kernels for GPUs against the reference and float64: in Triton's interpreter where there is no
GPU, with models run through them; and compiled for GPUs that are not there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sealed_pages import LAYOUTS, check, queries, sealed
from small_llm import hold, keep_in_memory, open_small

from ebbtide.kernels import attention, dispatch, layer_attention, matmul, paged_attention
from ebbtide.kernels.attention import Partial, empty_parts
from ebbtide.kernels.norm import Norm, normed, reference
from ebbtide.kernels.quantised import quantise_weight
from ebbtide.offload.mode import Mode
from ebbtide.offload.planning.plan import Loaded

pytest.importorskip("triton", reason="Triton has no package for this system")
from ebbtide.kernels.gpu import check as gpu_check
from ebbtide.kernels.gpu import spans

pytestmark = pytest.mark.timeout(300)  # the interpreter takes its time
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TAKEN = [name for name, layout in LAYOUTS.items() if spans.serves(layout)]


@pytest.fixture
def on_gpu(monkeypatch):
    """Kernels for GPUs serve, on whichever tensors."""
    monkeypatch.setenv("EBBTIDE_KERNELS", "triton" if DEVICE.type == "cpu" else "auto")


def test_every_kernel_gives_what_the_reference_gives():
    assert gpu_check.difference(DEVICE) == ""


@pytest.mark.parametrize("takes_mean", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_norms_are_all_that_they_say(on_gpu, has_bias, takes_mean):
    """Whether a kernel of its own serves or not."""
    x, weight, bias = torch.randn((3, 80), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    norm = Norm(weight, 1.0, 1e-6, bias if has_bias else None, takes_mean)
    torch.testing.assert_close(normed(x[None], norm), reference(x[None], norm))


def test_a_kernel_that_is_wrong_is_found_and_named(monkeypatch):
    right = gpu_check.rows.gate
    monkeypatch.setattr(gpu_check.rows, "gate", lambda *a: right(*a) * 1.01)
    assert "gates (silu) is off by" in gpu_check.difference(DEVICE)
    monkeypatch.setattr(gpu_check.rows, "gate", lambda *a: right(*a) * float("nan"))
    assert "gates (silu) is off by nan" in gpu_check.difference(DEVICE)


def test_what_stands_in_the_way_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert gpu_check.fault(torch.device("cuda")) == "compute capability 7.5 is below 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))

    def refuse(device):
        raise RuntimeError("PassManager::run failed\nand more")
        yield

    monkeypatch.setattr(gpu_check, "compare", refuse)
    assert gpu_check.fault(torch.device("cuda")) == "RuntimeError: PassManager::run failed"

    def say_nothing(device):
        raise AssertionError

    monkeypatch.setattr(gpu_check, "compare", say_nothing)
    assert gpu_check.fault(torch.device("cuda")) == "AssertionError: "


def test_a_triton_that_is_too_old_leaves_the_reference(monkeypatch):
    def lack():
        raise AttributeError("module 'triton' has no attribute 'knobs'")

    monkeypatch.setattr(dispatch, "_gpu_kernels", lack)
    device = torch.device("cuda", 7)
    assert "has no attribute 'knobs'" in dispatch.gpu_fault(device)
    monkeypatch.setenv("EBBTIDE_KERNELS", "triton")
    dispatch._is_interpreted.cache_clear()
    try:
        with pytest.raises(dispatch.KernelsUnavailable):
            dispatch.backend()
    finally:
        dispatch._is_interpreted.cache_clear()
        dispatch.gpu_fault.cache_clear()


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_have_the_same_bits_among_any_others(on_gpu, bits):
    weight = quantise_weight(torch.randn(75, 200).to(DEVICE), bits)
    x = torch.randn(100, 200).to(DEVICE)
    whole = matmul.linear(x, weight)
    assert torch.equal(matmul.linear(x[37:39], weight), whole[37:39])
    assert torch.equal(matmul.linear(x[90:], weight.part(20, 60)), whole[90:, 20:60])


def test_what_is_no_number_stays_none(on_gpu):
    weight = quantise_weight(torch.randn(16, 64).to(DEVICE), 8)
    for strange in (float("nan"), float("inf"), -float("inf")):
        for rows in (1, 2):
            x = torch.randn(rows, 64).to(DEVICE)
            x[-1, 40] = strange
            out = matmul.linear(x, weight)
            assert not out[-1].isfinite().any()
            assert out[:-1].isfinite().all()


@pytest.mark.parametrize("name", TAKEN)
def test_attention_over_pages_is_softmax(on_gpu, name):
    layout = LAYOUTS[name]
    near, records, k, v = sealed(layout, 2)
    n, at = k.shape[1], (near.to(DEVICE), records.to(DEVICE))
    for rows, visible, softcap, has_bias in (
        (3, (0, n), 0.0, False),
        (17, (5, n - 3), 5.0, True),
    ):
        q = queries(layout, rows)
        bias = torch.randn(*q.shape[:2], n) if has_bias else None
        given = None if bias is None else bias.to(DEVICE)
        p = paged_attention.attend_pages(q.to(DEVICE), *at, layout, visible, given, softcap)
        check(Partial(*(part.cpu() for part in p)), q, k, v, visible, bias, softcap)


def test_a_spans_bits_depend_on_neither_the_others_nor_its_place(on_gpu):
    layout = LAYOUTS["64, 8 bits"]
    near, records, _, _ = (part.to(DEVICE) for part in sealed(layout, 6))
    q, order = queries(layout, 3).to(DEVICE), torch.tensor([4, 0, 5, 2, 1, 3])
    places = torch.argsort(order).to(DEVICE)
    moved = near[order.to(DEVICE)], records[order.to(DEVICE)]

    def attend(planes, rows, count: int) -> Partial:
        parts = empty_parts(count, q)
        at = (dispatch.addresses(plane, rows) for plane in planes)
        listed = layer_attention.Records(*at, 2, (0, 2 * count * layout.record_tokens))
        layer_attention.attend_spans(q, listed, layout, 0.0, parts)
        return parts

    whole = attend((near, records), torch.arange(6, device=DEVICE), 3)
    for got in (attend(moved, places, 3), attend(moved, places[:4], 2)):
        assert all(torch.equal(a, b[: len(a)]) for a, b in zip(got, whole, strict=True))
    of_records = paged_attention.attend_records(
        q, near, torch.arange(6), [(records, torch.arange(6), torch.arange(6))], layout
    )
    for part, one in zip(paged_attention.merge_records(of_records), whole, strict=True):
        assert part.shape == one.shape[1:]
    joined = [attention.finish(paged_attention.merge_records(p)) for p in (of_records, whole)]
    torch.testing.assert_close(*joined, atol=1e-5, rtol=1e-5)  # another tree of float32 sums


IDS = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(8)).tolist()
CELLS = {"cell_tokens": 32, "span_tokens": 64}  # of which two are sealed


def logits(folder, tmp_path, share=1.0, **options) -> torch.Tensor:
    with open_small(folder, tmp_path, **CELLS, **options) as llm:
        keep_in_memory(llm, len(IDS), share)
        return llm.logits(IDS, prefill_tokens=97)


interpreted = pytest.mark.skipif(
    DEVICE.type != "cpu", reason="tests/test_device_paths.py runs models on GPUs"
)


@interpreted
@pytest.mark.parametrize(
    ("name", "weight_bits", "codec"),
    [
        ("qwen2", "full", "8"),  # key biases
        ("gemma2", "full", "full"),  # soft-caps, windows, norms of 1 + w
        ("gpt-oss", "full", "6"),  # null scores, experts
        ("llama3", "8", "full"),
        ("glm", "full", "4"),  # interleaved rotations of a part of each head
    ],
)
def test_models_give_what_the_reference_gives(
    checkpoint, tmp_path, monkeypatch, name, weight_bits, codec
):
    """float32 sums in another order, through three layers. A key's or a value's code may become its
    neighbour then, which moves logits by 1e-3 of the greatest; an activation's, where weights have
    codes, by some per cent here: so of those only first choices are compared."""
    folder, options = checkpoint(name), {"weight_bits": weight_bits, "codec": codec}
    monkeypatch.setenv("EBBTIDE_KERNELS", "reference")
    expected = logits(folder, tmp_path, **options)
    monkeypatch.setenv("EBBTIDE_KERNELS", "triton")
    got = logits(folder, tmp_path, **options)
    assert not torch.equal(got, expected)
    if weight_bits == "full":
        within = 2e-5 if codec == "full" else 5e-3
        assert (got - expected).abs().max() <= within * expected.abs().max()
    assert (got.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


@interpreted
def test_neither_tiers_nor_streaming_change_a_bit(checkpoint, tmp_path, on_gpu):
    folder = checkpoint("qwen2")
    plain = logits(folder, tmp_path)
    assert torch.equal(logits(folder, tmp_path, 0.3), plain)
    with open_small(folder, tmp_path, store={"copy_to_compute": True}, **CELLS) as llm:
        hold(llm, Loaded(1, False))
        keep_in_memory(llm, len(IDS), 0.0)
        assert torch.equal(llm.logits(IDS, prefill_tokens=97), plain)


@interpreted
def test_bounded_mode_selects_by_them(checkpoint, tmp_path, on_gpu):
    folder = checkpoint("llama3")
    exact = logits(folder, tmp_path)
    fine = logits(folder, tmp_path, mode=Mode("bounded", selector_options={"epsilon": 1e-6}))
    assert (fine - exact).abs().max() <= 2e-2 * exact.abs().max()


def test_kernels_compile_for_gpus_that_are_not_there():
    """What the interpreter passes over, a compiler may refuse: types, shapes, memory."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("gpu_compiling.py")
    # 8.6: of the generations that serve the one whose programs share the least memory.
    command = [sys.executable, "-W", "ignore", script, "86"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) > 30

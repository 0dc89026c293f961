"""Whether the kernels for GPUs are right on a device: each is compiled there and compared with the
torch reference. What compilers make of them differs between GPUs, drivers and releases, and nobody
has run them all.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import attention, gate, matmul, norm, pages, turn
from ..affine import CodeOrder, repack_affine
from ..attention import empty_parts
from ..layout import PageLayout
from ..quantised import quantise_weight, repack_mxfp4
from . import products, rows, spans

# The units that the kernels multiply with: whole numbers of eight bits, bfloat16.
LEAST_CAPABILITY = (8, 0)
# Of the greatest number: float32 sums in another order, and halves of 22 bits.
_TOLERANCE = 1e-4

Compared = tuple[str, torch.Tensor, torch.Tensor]


def fault(device: torch.device) -> str:
    """What is wrong with the kernels on a CUDA device; "" if nothing is."""
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        return f"compute capability {capability[0]}.{capability[1]} is below {least}"
    try:
        return difference(device)
    except Exception as error:  # whatever a compiler or a driver says
        said = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {said[0][:200]}"


def difference(device: torch.device) -> str:
    """Which kernel differs from the reference, and by how much; "" if none does."""
    for name, got, want in compare(device):
        got, want = got.double(), want.double()
        off = float((got - want).abs().max() / want.abs().max())
        if not off <= _TOLERANCE:  # nor if it is no number
            return f"{name} is off by {off:.1e} of the greatest number"
    return ""


def compare(device: torch.device) -> Iterator[Compared]:
    """(name, what a kernel gives, what the reference gives), of all kernels."""
    with torch.inference_mode():
        yield from _products(device)
        yield from _rows(device)
        for layout in (
            PageLayout(2, 64, 64, 2, key_bits=5, value_bits=4, near_bits=2),
            PageLayout(2, 128, 64, 1, key_bits=8, value_bits=8, near_bits=2),
            PageLayout(2, 80, 64, 1, codec="full", raw_dtype=torch.bfloat16),
        ):
            yield from _pages(layout, device)
        for dtype in (torch.float16, torch.float32):
            yield from _raw(dtype, device)


def _numbers(*shape: int, device: torch.device) -> torch.Tensor:
    """Drawn on the CPU: the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


def _products(device) -> Iterator[Compared]:
    plain = _numbers(200, 352, device=device)
    blocks = torch.arange(200 * 11 * 16, device=device).view(200, 11, 16).to(torch.uint8)
    powers = (120 + torch.arange(2200, device=device) % 9).view(200, 11).to(torch.uint8)
    weights = {
        "products of 4 bits": quantise_weight(plain, 4).part(3, 190),
        "products of 8 bits": quantise_weight(plain, 8),
        "products of MXFP4": repack_mxfp4(blocks, powers),
        "products of affine codes": repack_affine(
            blocks.flatten(1), plain[:, :11].abs() / 9 + 0.01, plain[:, 11:22], CodeOrder.PAIRS
        ).part(3, 190),
    }
    for name, weight in weights.items():
        bias = _numbers(weight.shape[0], device=device)
        for count in (1, 70):
            x = _numbers(count, 352, device=device)
            want = matmul.reference(x, weight) + bias
            yield name, products.linear(x, weight, bias), want
    x = _numbers(1, 352, device=device)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weight = plain.to(dtype)
        yield f"products of {dtype}", products.linear_raw(x, weight, None), x @ weight.float().T


def _rows(device) -> Iterator[Compared]:
    x, weight = _numbers(3, 80, device=device), _numbers(80, device=device)
    expected = norm.reference(x, norm.Norm(weight, 1.0, 1e-6))
    yield "norms", rows.rms_norm(x, weight, 1.0, 1e-6), expected
    heads, angles = _numbers(3, 4, 80, device=device), _numbers(3, 1, 40, device=device)
    for interleaved in (False, True):
        how = angles.cos(), angles.sin(), interleaved, 0.5, True
        yield "rotations", rows.turn(heads, *how), turn.reference(heads, *how)
    for activation in gate.ACTIVATIONS:
        up = _numbers(3, 80, device=device) + 1
        want = torch.mul(*gate.factors(x, up, activation))
        yield f"gates ({activation})", rows.gate(x.clone(), up, activation), want


def _pages(layout: PageLayout, device) -> Iterator[Compared]:
    shape = (4 * layout.record_tokens, layout.kv_heads, layout.head_dim)
    k, v = _numbers(2, *shape, device=device)
    near, records = pages.seal(k, v, layout)
    k, v = torch.empty((2, shape[1], shape[0], shape[2]), device=device)
    pages.unpack(near, records, layout, k, v)
    near_at, record_at = (
        plane.data_ptr() + torch.arange(4, device=device) * plane.stride(0)
        for plane in (near, records)
    )
    seen = slice(layout.page_tokens, shape[0] - 5)
    for count in (3, 70):
        q = _numbers(shape[1], count, shape[2], device=device) * 0.2
        parts = empty_parts(2, q)
        visible = seen.start, seen.stop
        spans.attend_spans(q, near_at, record_at, 2, visible, None, layout, 0.0, parts)
        want = attention.attend(q, k[:, seen], v[:, seen])
        yield f"attention over pages ({layout.codec})", spans.join(parts)[2], attention.finish(want)


def _raw(dtype: torch.dtype, device) -> Iterator[Compared]:
    k, v = (part.to(dtype) for part in _numbers(2, 2, 150, 64, device=device))
    q, null_scores = _numbers(2, 3, 64, device=device) * 0.2, _numbers(2, 3, device=device)
    runs = [k.data_ptr(), v.data_ptr(), k.stride(0) * dtype.itemsize, 150]
    part = empty_parts(1, q)
    spans.attend_raw(q, dtype, runs, null_scores, 20.0, tuple(one[0] for one in part))
    scores = 20 * (q @ k.float().transpose(1, 2) / 20).tanh()
    weights = torch.cat((scores, null_scores.unsqueeze(-1)), -1).softmax(-1)[..., :-1]
    yield "attention over raw tokens", spans.join(part)[2], weights @ v.float()

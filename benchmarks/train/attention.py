"""Causal attention of grouped queries: PyTorch's, or for training on a CPU a faster one.

On a GPU it is the quickest of PyTorch's kernels, found by trying them when training begins.

attention.cpp is compiled when it is first wanted, for bfloat16 on x86-64 with AVX-512 BF16. Where
it cannot be (another machine, no compiler) PyTorch's is used: the same results, more slowly. Knows
no model.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BLOCK = 64  # queries, and keys; also the only head size
# Keys are left out that no query of a block gives more than 2^-x of its attention: forward (of the
# most that it gives to any key nearer than these), backward.
NOTHING_FORWARD, NOTHING_BACKWARD = 12.0, 14.0


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "tokens")]


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The compiled attention.cpp, or None where it does not run."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return None
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if platform.machine() != "x86_64" or "avx512_bf16" not in flags or compiler is None:
        return None
    source = Path(__file__).with_name("attention.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "attention.so"
        command = [compiler, "-std=c++17", "-O3", "-march=native", "-shared", "-fPIC"]
        made = subprocess.run([*command, "-o", library, source], capture_output=True, text=True)
        if made.returncode:
            warnings.warn(f"attention.cpp does not compile: {made.stderr[:500]}", stacklevel=2)
            return None
        found = ctypes.CDLL(str(library))
        found.attention_runs.restype = ctypes.c_bool
        return found if found.attention_runs() else None


def _call(name: str, q: torch.Tensor, k: torch.Tensor, *arguments: torch.Tensor | float) -> None:
    batch, heads, tokens, _ = q.shape
    converted = [
        ctypes.c_float(argument)
        if isinstance(argument, float)
        else ctypes.c_void_p(argument.data_ptr())
        for argument in (q, k, *arguments)
    ]
    getattr(kernel(), name)(_Shape(batch, heads, k.shape[1], tokens), *converted)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, wanted):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = torch.zeros_like(q), torch.zeros(q.shape[:3])
        _call("attention_forward", q, k, v, wanted, NOTHING_FORWARD, out, lse)
        ctx.save_for_backward(q, k, v, out, lse, wanted)
        return out

    @staticmethod
    def backward(ctx, upstream):
        q, k, *_ = ctx.saved_tensors
        q_grad = torch.zeros_like(q)
        k_grad, v_grad = (torch.zeros(k.shape, dtype=torch.float32) for _ in range(2))
        arguments = (upstream.contiguous(), NOTHING_BACKWARD, q_grad, k_grad, v_grad)
        _call("attention_backward", *ctx.saved_tensors, *arguments)
        return q_grad, k_grad.to(q.dtype), v_grad.to(q.dtype), None


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, wanted: torch.Tensor | None = None
) -> torch.Tensor:
    """(batch, heads, tokens, head_dim) of q; k and v (batch, kv_heads, tokens, head_dim).

    The output is needed where `wanted` (batch, tokens) of bool says so, or everywhere.
    """
    batch, heads, tokens, head_dim = q.shape
    suits = q.dtype == torch.bfloat16 and q.device.type == "cpu"
    if suits and head_dim == BLOCK and tokens % BLOCK == 0 and kernel() is not None:
        if wanted is None:
            blocks = torch.ones(batch, tokens // BLOCK, dtype=torch.uint8)
        else:
            blocks = wanted.view(batch, tokens // BLOCK, BLOCK).any(-1).to(torch.uint8)
        return _Attend.apply(q, k, v, blocks)
    groups = heads // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if q.device.type != "cuda":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # cuDNN makes a plan for every length: a few in training, a new one for each evaluated document.
    training = q.requires_grad and q.dtype == torch.bfloat16
    kernels = quickest(q.device, heads, head_dim) if training else [*GPU_KERNELS[1:], LAST_RESORT]
    with sdpa_kernel(kernels, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


GPU_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
]
LAST_RESORT = SDPBackend.MATH  # writes down all scores


@functools.cache
def quickest(
    device: torch.device, heads: int, head_dim: int, tokens: int = 32768
) -> list[SDPBackend]:
    """GPU_KERNELS that compute attention of two long rows in bfloat16 and its gradients, the
    quickest first; one that refuses a shape leaves it to the next. All tensors lie as in training:
    a kernel may refuse other strides."""
    shape = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
    all_rows = torch.randn(heads, 2 * tokens, head_dim, **shape)
    k, v = (torch.randn(2, heads, tokens, head_dim, **shape) for _ in range(2))

    def timed_s(backend: SDPBackend) -> float:
        for _ in range(3):  # the first ones make plans
            started = time.perf_counter()
            q = all_rows.unflatten(1, (2, -1)).transpose(0, 1)
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            out = out.transpose(1, 2).flatten(2).square().mean()
            sum(grad.sum() for grad in torch.autograd.grad(out, (all_rows, k, v))).item()
            taken_s = time.perf_counter() - started
        return taken_s

    times: dict[SDPBackend, float] = {}
    for backend in GPU_KERNELS:
        # One that this GPU or this build of PyTorch does not have.
        with contextlib.suppress(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            times[backend] = timed_s(backend)
    taken = sorted(times.items(), key=lambda item: item[1])
    told = ", ".join(f"{backend.name} in {taken_s * 1000:.1f} ms" for backend, taken_s in taken)
    print(f"attention: {told or LAST_RESORT.name}", flush=True)
    return [backend for backend, _ in taken] or [LAST_RESORT]

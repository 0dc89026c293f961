"""Which implementation serves: the compiled CPU kernels, those for GPUs, or the torch reference.

EBBTIDE_KERNELS is `auto` (the default: on CPU tensors compiled kernels where the extension was
built, on CUDA tensors Triton's where they are as right as the reference), `reference`, `compiled`
(an error where the extension is missing), or `triton` (in Triton's interpreter, on CPU tensors too:
for tests). EBBTIDE_INSTRUCTION_SET names one of those that this machine can run, in place of the
best.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import torch

from .layout import RAW_DTYPES, PageLayout

# The signatures that the Python side expects of cpu/module.cpp. An editable checkout may hold an
# older build.
INTERFACE = 38

_missing, _remedy = "", "Install again where a C++17 compiler is found"
try:
    from . import _cpu  # pyright: ignore[reportAttributeAccessIssue] - compiled, without a stub
except ImportError as error:
    _cpu, _missing = None, str(error)
else:
    if getattr(_cpu, "INTERFACE", 0) != INTERFACE:
        _cpu, _missing = None, "it was built from other sources than these"
if _cpu is not None and os.environ.get("EBBTIDE_INSTRUCTION_SET"):
    try:
        _cpu.use_instruction_set(os.environ["EBBTIDE_INSTRUCTION_SET"])
    except ValueError as error:
        known = ", ".join(_cpu.instruction_sets())
        _cpu, _missing = None, f"EBBTIDE_INSTRUCTION_SET: {error}; it has {known}"
        _remedy = "Name one of them, or none"

CHOICES = ("auto", "reference", "compiled", "triton")


class KernelsUnavailable(RuntimeError):
    """EBBTIDE_KERNELS asks for kernels that this installation or this machine lacks."""


def backend() -> str:
    """ "compiled", "reference" or "triton": what serves CPU tensors.

    Raises KernelsUnavailable when the environment asks for kernels that were not built, and
    ValueError for a choice that is not known.
    """
    choice = os.environ.get("EBBTIDE_KERNELS", "") or "auto"
    if choice not in CHOICES:
        raise ValueError(f"EBBTIDE_KERNELS is {choice!r}; known are {', '.join(CHOICES)}")
    if choice == "compiled" and _cpu is None:
        raise KernelsUnavailable(
            f"EBBTIDE_KERNELS=compiled, but ebbtide.kernels._cpu cannot be used: {_missing}. "
            f"{_remedy}, or use EBBTIDE_KERNELS=auto."
        )
    if choice == "triton":
        if not _is_interpreted():
            raise KernelsUnavailable(
                "EBBTIDE_KERNELS=triton is for tests in Triton's interpreter: install triton, and "
                "set TRITON_INTERPRET=1. GPUs are served by their kernels with auto."
            )
        return "triton"
    return "reference" if choice == "reference" or _cpu is None else "compiled"


def cpu_kernel_fault() -> str:
    """Why the compiled kernels do not serve CPU tensors, and what to do, in two sentences; "" where
    they do, or where EBBTIDE_KERNELS chooses others."""
    chosen = os.environ.get("EBBTIDE_KERNELS", "") or "auto"
    if _cpu is not None or chosen != "auto":
        return ""
    return (
        "The compiled CPU kernels do not serve, and the torch reference is many times slower: "
        f"{_missing}. {_remedy}."
    )


def instruction_set() -> str:
    """What the compiled kernels use: "amx", "avx512vnni", "avx512", "avxvnni", "avx2", "neon_dot",
    "neon" or "portable"; "" without."""
    return _cpu.instruction_set() if _cpu is not None else ""


def byte_products() -> bool:
    """Whether the compiled kernels multiply codes faster than floats by however many rows: with
    AVX-512 VNNI."""
    return _cpu is not None and _cpu.byte_products()


def compiled_for(*tensors: torch.Tensor) -> Any | None:
    """The extension module, if it serves and all tensors lie on the CPU; else None."""
    if backend() != "compiled":
        return None
    for tensor in tensors:  # at every step: a generator takes as long as all the rest
        if not tensor.is_cpu:
            return None
    return _cpu


def compiled() -> Any:
    """The extension module, where the caller knows that it serves."""
    native = compiled_for()
    assert native is not None
    return native


def compiled_for_floats(*tensors: torch.Tensor) -> Any | None:
    """The same, if all tensors are float32 as well."""
    return compiled_for(*tensors) if all(t.dtype == torch.float32 for t in tensors) else None


def gpu_for(*tensors: torch.Tensor):
    """The package of kernels for GPUs, if they serve and all tensors lie on one; else None."""
    kind = "cpu" if tensors[0].is_cpu else tensors[0].device.type
    if kind == "cpu":  # so what is rare comes last
        serves = os.environ.get("EBBTIDE_KERNELS") == "triton" and backend() == "triton"
    else:
        serves = kind == "cuda" and backend() != "reference" and not gpu_fault(tensors[0].device)
    if not serves or any(t.device.type != kind for t in tensors):
        return None
    return _gpu_kernels()


def gpu_kernel_fault() -> str | None:
    """Why the kernels for GPUs do not serve the current CUDA device: "" where they do, None where
    there is no such device."""
    if not torch.cuda.is_available():
        return None
    if backend() == "reference":
        return "EBBTIDE_KERNELS says so"
    return gpu_fault(torch.device("cuda", torch.cuda.current_device()))


@functools.cache
def gpu_fault(device: torch.device) -> str:
    """Why the kernels for GPUs do not serve a CUDA device: "" where they do. They are compiled and
    compared with the reference once, which takes seconds."""
    try:
        _gpu_kernels()
        from .gpu.check import fault

        found = fault(device)
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    except Exception as error:  # an older Triton lacks names
        found = f"Triton does not serve: {type(error).__name__}: {error}"
    if found:
        logging.getLogger("ebbtide").warning(
            "The kernels for GPUs do not serve (%s); the torch reference is many times slower.",
            found,
        )
    return found


@functools.cache
def _is_interpreted() -> bool:
    """Whether Triton is here and runs in its interpreter."""
    try:
        return _gpu_kernels().spans.IS_INTERPRETED
    except Exception:  # whatever a Triton that is too old or broken raises
        return False


@functools.cache
def _gpu_kernels():
    from . import gpu
    from .gpu import products, rows, spans  # noqa: F401 - names of the package from here on

    return gpu


def addresses(frames: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Where the rows (n,) int64 of frames (num_frames, bytes) uint8 start in memory. (n,) int64"""
    if frames.shape[1] > 1 and frames.stride(1) != 1:
        raise ValueError(f"a frame's bytes must lie side by side; strides are {frames.stride()}")
    return rows * frames.stride(0) + frames.data_ptr()


@functools.cache
def layout_numbers(layout: PageLayout) -> list[int]:
    """A layout as the extension takes it; the order is cpu/layout.h's."""
    return [
        layout.kv_heads,
        layout.head_dim,
        layout.page_tokens,
        layout.pages_per_record,
        _raw_kind(layout),
        layout.key_bits,
        layout.value_bits,
        layout.near_code_bits,
        int(layout.near_resident),
        layout.near_head_bytes,
        layout.near_record_bytes,
        layout.key_min_offset,
        layout.value_mean_offset if layout.value_means else 0,
        layout.value_offset,
        layout.value_min_offset if not layout.is_full else 0,
        layout.far_head_bytes,
        layout.head_stride_bytes,
        layout.record_bytes,
        -1 if layout.shared_from is None else layout.shared_from,
    ]


def _raw_kind(layout: PageLayout) -> int:
    """0 for codes; else what a full page holds."""
    return raw_kind(layout.raw_dtype) if layout.is_full else 0


def raw_kind(dtype: torch.dtype) -> int:
    """What cpu/layout.h calls a dtype that keys and values are held in."""
    return 1 + RAW_DTYPES.index(dtype)

"""Where computing happens: the CPU, or a GPU with memory of its own. Nothing else asks torch what
there is.
"""

from __future__ import annotations

import torch

from ...kernels import dispatch
from ..errors import InputError


def choose_device(name: str) -> torch.device:
    """auto, cpu, cuda or mps. Raises InputError for another name, for a device that is not there,
    or where the environment asks for kernels that are not.
    """
    try:
        dispatch.backend()
    except (RuntimeError, ValueError) as error:
        raise InputError(str(error)) from None
    if name not in ("auto", "cpu", "cuda", "mps"):
        raise InputError(f"device is {name!r}; allowed are auto, cpu, cuda and mps.")
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    if not there[name]:
        raise InputError(
            f"device {name} is not available here; available: "
            f"{', '.join(k for k, v in there.items() if v)}."
        )
    return torch.device(name)


def kernel_warnings(device: torch.device) -> list[str]:
    """That a computation on the CPU goes without the compiled kernels, where nobody chose so."""
    fault = dispatch.cpu_kernel_fault() if device.type == "cpu" else ""
    return [fault] if fault else []


def free_device_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU; None on the CPU. On unified memory (MPS) half of what the system
    recommends.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() // 2 - torch.mps.driver_allocated_memory()
    return None


def device_peak_bytes(device: torch.device) -> int:
    """The most device memory that tensors held, in bytes; 0 on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return 0


def rows_stand_alone(device: torch.device) -> bool:
    """Whether a row's bits are its own in any company, as compiled kernels give them. Then tokens
    can be verified together, and some rows of a cell attended without the others."""
    return dispatch.compiled_for(torch.empty(0, device=device)) is not None

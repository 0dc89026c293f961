"""An arena of equal frames in one memory: the host's or a device's.

Opaque bytes: knows neither what a record holds nor which frames are free (`page_table` does).
"""

from __future__ import annotations

import mmap

import torch


def aligned_bytes(num_bytes: int) -> torch.Tensor:
    """Zeroed host memory, (num_bytes,) uint8, that starts on a page boundary.

    Anonymous and private, so the system gives it out only as it is touched, and takes it back when
    the last view of it is gone.
    """
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    if hasattr(mmap, "MAP_PRIVATE"):
        # The default is shared memory: that is charged as such and never gets huge pages.
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        memory = mmap.mmap(-1, num_bytes)
    return torch.frombuffer(memory, dtype=torch.uint8)


def host_bytes(num_bytes: int, compute_device: torch.device) -> torch.Tensor:
    """Host memory that the compute device reads fastest: pinned for CUDA, else `aligned_bytes`."""
    if compute_device.type == "cuda":
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    return aligned_bytes(num_bytes)


def copy_rows(target: torch.Tensor, source: torch.Tensor) -> None:
    """target[:] = source, for uint8 tensors of one shape, wherever each lies.

    Within host memory by one thread: torch shares a copy among several, which wait for one another
    on a busy machine (512 KiB: 12 ms instead of 15 us, with three busy processes on two cores).
    """
    if target.device.type == source.device.type == "cpu":
        target.numpy()[:] = source.numpy()
    else:
        target.copy_(source)


class MemoryTier:
    """`frames`: (num_frames, frame_bytes) uint8 on `device`. Fetches see views of it, not copies.

    compute_device: who reads it; decides whether host memory is pinned.
    """

    def __init__(
        self,
        num_frames: int,
        frame_bytes: int,
        device: torch.device | str = "cpu",
        compute_device: torch.device | str | None = None,
    ):
        device = torch.device(device)
        num_bytes = num_frames * frame_bytes
        if device.type == "cpu":
            flat = host_bytes(num_bytes, torch.device(compute_device or "cpu"))
        else:
            flat = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.device = device
        self.frame_bytes = frame_bytes
        self.num_bytes = num_bytes
        self.frames = flat.view(num_frames, frame_bytes)  # (num_frames, frame_bytes) uint8

    def records(self, base: int, num_records: int) -> torch.Tensor:
        """A view of frames base .. base + num_records - 1, (num_records, frame_bytes) uint8."""
        return self.frames[base : base + num_records]

    def raw(self, base: int, num_records: int) -> memoryview:
        """The same bytes as a flat writable memoryview, for files and CRCs. Host memory only."""
        assert self.device.type == "cpu"
        return self.records(base, num_records).numpy().data.cast("B")

    def close(self) -> None:
        """Lets go of the memory; views that are still held keep it."""
        self.frames = torch.empty(0, self.frame_bytes, dtype=torch.uint8)
        self.num_bytes = 0

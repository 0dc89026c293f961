"""An arena of equal frames in one memory: the host's or a device's.

Opaque bytes: knows neither what a record holds nor which frames are free (`page_table` does).
"""

from __future__ import annotations

import contextlib
import mmap

import torch

_HUGE_PAGE_BYTES = 2 << 20


def aligned_bytes(num_bytes: int) -> torch.Tensor:
    """Zeroed host memory, (num_bytes,) uint8, that starts on a page boundary.

    Anonymous and private, so the system gives it out only as it is touched, and takes it back when
    the last view of it is gone. Linux is asked for huge pages: what is read from end to end for
    every token is then read up to twice as fast. Only whole ones that lie within are asked for, so
    no more is ever taken than num_bytes.
    """
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    if not hasattr(mmap, "MAP_PRIVATE"):
        return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)
    whole_bytes = num_bytes // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
    spare_bytes = _HUGE_PAGE_BYTES if whole_bytes else 0  # addresses, to begin where a page does
    # The default is shared memory: that is charged as such and never gets huge pages.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, num_bytes + spare_bytes, flags=private)
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    start = -flat.data_ptr() % _HUGE_PAGE_BYTES if whole_bytes else 0
    if whole_bytes and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel that was built without them
            memory.madvise(mmap.MADV_HUGEPAGE, start, whole_bytes)
    return flat[start : start + num_bytes]


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

"""How many threads compute: those of compiled kernels, and torch's own meanwhile.

Compiled kernels have threads of their own, as many as torch is told to use. Between two of their
calls torch does small things, such as filling a tensor with zeros, and wakes its threads for each;
unless OMP_WAIT_POLICY is passive, which has to be known before torch is imported, these then look
for more work for milliseconds, on the cores that the next kernel needs: reading 2,048 tokens of a
135M shape ran at 640 tokens/s with two threads, at 580 with one. So torch works with the calling
thread alone while a model is run. Its number of threads is set for that thread and no other, which
torch.set_num_threads cannot do.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from . import dispatch

_P = ParamSpec("_P")
_R = TypeVar("_R")
_kept = threading.local()  # count: torch's number of threads in this one, while it works alone


def num_threads() -> int:
    """How many threads a compiled kernel may use: torch's number of them."""
    return getattr(_kept, "count", None) or torch.get_num_threads()


def torch_alone(run: Callable[_P, _R]) -> Callable[_P, _R]:
    """`run`, in which torch's operations use the calling thread alone, where compiled kernels do
    all that is worth more than one. So do those of functions of the caller's that `run` calls; a
    number of threads that one of these sets for this thread ends with `run`."""

    @functools.wraps(run)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        count = torch.get_num_threads()  # 1 also where this is called from another such function
        if count == 1 or dispatch.backend() != "compiled" or (set_count := _setter()) is None:
            return run(*args, **kwargs)
        try:
            _kept.count = count
            set_count(1)
            return run(*args, **kwargs)
        finally:  # in this order Ctrl-C, which comes behind a call, finds both done
            _kept.count = None
            set_count(count)

    return wrapped


def alone_in_this_thread() -> None:
    """From now on the calling thread computes alone, in torch and in compiled kernels: for one of
    several that share the cores."""
    if (set_count := _setter()) is not None:
        set_count(1)


@functools.cache
def _setter() -> Callable[[int], None] | None:
    """omp_set_num_threads of the OpenMP that torch uses; None where it is not found."""
    before, folder = torch.get_num_threads(), Path(torch.__file__).parent / "lib"
    patterns = ("libgomp*", "libomp*", "libiomp5*")
    for name in (None, *(path for pattern in patterns for path in sorted(folder.glob(pattern)))):
        try:
            found = ctypes.CDLL(None if name is None else str(name)).omp_set_num_threads
        except (OSError, AttributeError, TypeError):  # TypeError: None means nothing on Windows
            continue
        found.argtypes, found.restype = [ctypes.c_int], None
        found(before + 1)
        is_torchs = torch.get_num_threads() == before + 1
        found(before)
        if is_torchs:
            return found
    return None

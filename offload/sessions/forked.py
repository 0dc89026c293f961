"""Processes that were forked from one that had opened a model.

A child has none of its parent's threads. Compiled kernels begin new ones; GNU's OpenMP, with which
torch computes, waits for its own for ever. So torch computes alone there.
"""

from __future__ import annotations

import functools
import os

import torch

_WARNING = (
    "This process was forked from one that had opened a model, and computes with one thread; "
    "multiprocessing's start method 'spawn' gives each process all of them."
)
_is_child = False


@functools.cache
def watch() -> None:
    """From now on children of this process are known."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_begin_child)


def _begin_child() -> None:
    global _is_child
    _is_child = True
    torch.set_num_threads(1)


def set_threads(count: int) -> None:
    """How many threads compute, where this process may choose."""
    if not _is_child:
        torch.set_num_threads(count)


def warnings() -> list[str]:
    return [_WARNING] if _is_child else []

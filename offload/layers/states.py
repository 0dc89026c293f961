"""What the recurrent layers of a sequence keep in place of keys and values: states of fixed size,
of which every token changes all.

A state cannot be taken back, so there are a few copies, each of which stands behind so many tokens
of the sequence. A run reads the one behind the processed tokens and writes others, and these are
known only when the run is done: whatever is interrupted has changed nothing. Kept are the newest
state and that at the start of its cell, to which one can go back, and older starts as room allows.

Knows numbers of tokens, and neither layers' arithmetic nor what the tokens are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod

import torch

from ..models.layer_config import Recurrence

LayerState = tuple[torch.Tensor, torch.Tensor]  # see kernels.recurrence.recur
_UNKNOWN = -1


class States:
    """Copies of all recurrent layers' states, flat float32. num_copies: of `num_copies`."""

    def __init__(
        self, recurrences: Sequence[Recurrence], num_copies: int, cell_tokens: int, device
    ):
        self._shapes = [_shapes(r) for r in recurrences]
        self._cell_tokens = cell_tokens
        size = sum(prod(shape) for shapes in self._shapes for shape in shapes)
        self._copies = [torch.zeros(size, device=device) for _ in range(num_copies)]
        self._views = [self._split(copy) for copy in self._copies]
        self._lengths = [_UNKNOWN] * num_copies  # tokens that each copy stands behind
        # Of a run: the copies that it reads and writes in turn, and where each part of it stops.
        self._run: list[int] = []
        self._stops: Sequence[int] = ()

    @staticmethod
    def num_copies(sweep_cells: int) -> int:
        """How many it takes: what a run reads, and behind its last two cells what it writes, and
        before these two where it goes through more."""
        return 3 if sweep_cells <= 2 else 4

    @staticmethod
    def num_bytes(recurrences: Sequence[Recurrence]) -> int:
        """Of one copy."""
        return 4 * sum(sum(r.state_numbers) for r in recurrences)

    # ---- a run -------------------------------------------------------------------------------

    def begin(self, start: int, stops: Sequence[int]) -> None:
        """Tokens behind the first `start` will be processed, up to each of the stops in turn: ends
        of cells, but for the last. What is known of a text that went on otherwise is forgotten.
        """
        self.forget_behind(start)
        if start == 0 and not self.knows(0):
            zeros = self._free(())
            self._copies[zeros].zero_()
            self._lengths[zeros] = 0
        self._run, self._stops = [self._lengths.index(start)], stops
        for part in range(len(stops)):
            # Parts before the last three share a copy: nobody goes back to where they end.
            if part == 0 or len(stops) - part <= 2:
                self._run.append(self._free(self._run))
            else:
                self._run.append(self._run[-1])

    def of(self, part: int, number: int) -> tuple[LayerState, LayerState]:
        """Before and after a part of the run: of the recurrent layer with that number."""
        before, after = self._run[part : part + 2]
        return self._views[before][number], self._views[after][number]

    def places(self, part: int) -> tuple[int, int]:
        """The same of all layers: where they begin. Each has its place by `offsets`."""
        before, after = self._run[part : part + 2]
        return self._copies[before].data_ptr(), self._copies[after].data_ptr()

    @staticmethod
    def offsets(recurrences: Sequence[Recurrence]) -> list[int]:
        """Where each layer's state begins in a copy, in numbers: the matrices behind the inputs."""
        return [0, *accumulate(sum(r.state_numbers) for r in recurrences)][:-1]

    def end(self) -> None:
        """The run is done, and what it wrote is known."""
        for copy, stop in zip(self._run[1:], self._stops, strict=True):
            self._lengths[copy] = stop

    # ---- copies ------------------------------------------------------------------------------

    def knows(self, length: int) -> bool:
        """Whether there is a copy behind the first `length` tokens."""
        return length in self._lengths

    def at(self, length: int) -> torch.Tensor:
        """The copy behind the first `length` tokens, flat float32."""
        return self._copies[self._lengths.index(length)]

    def newest_before(self, length: int, first_cell: int) -> int:
        """The most of the first `length` tokens behind which there is a copy, that of `length` or
        one at the start of a cell, not before `first_cell`; 0 without one."""
        first = first_cell * self._cell_tokens
        known = [n for n in self._lengths if first <= n <= length]
        return max((n for n in known if n == length or n % self._cell_tokens == 0), default=0)

    def forget_behind(self, length: int) -> None:
        """Copies behind more than the first `length` tokens are of another text."""
        self._lengths[:] = [n if n <= length else _UNKNOWN for n in self._lengths]

    def room(self) -> torch.Tensor:
        """A copy to be filled, flat float32, of which nothing is known until `name` says so."""
        return self._copies[self._free(())]

    def name(self, copy: torch.Tensor, length: int) -> None:
        """What `room` gave stands behind the first `length` tokens now."""
        self._lengths[next(i for i, one in enumerate(self._copies) if one is copy)] = length

    def copy_from(self, other: States) -> None:
        for mine, theirs in zip(self._copies, other._copies, strict=True):
            mine.copy_(theirs)
        self._lengths[:] = other._lengths

    def _free(self, taken: Sequence[int]) -> int:
        """A copy that may be written over, none of `taken`: one that is not known, else one within
        a cell, else the oldest."""

        def worth(copy: int) -> tuple[bool, bool, int]:
            length = self._lengths[copy]
            return length != _UNKNOWN, length % self._cell_tokens == 0, length

        free = min((i for i in range(len(self._copies)) if i not in taken), key=worth)
        self._lengths[free] = _UNKNOWN
        return free

    def _split(self, copy: torch.Tensor) -> list[LayerState]:
        views, at = [], 0
        for shapes in self._shapes:
            parts = []
            for shape in shapes:
                parts.append(copy[at : at + prod(shape)].view(shape))
                at += prod(shape)
            views.append(tuple(parts))
        return views


def _shapes(r: Recurrence) -> tuple[tuple[int, ...], tuple[int, ...]]:
    matrices = (0,) if r.shape is None else r.shape.state
    return (r.conv_width - 1, r.channels), matrices

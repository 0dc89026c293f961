"""What the recurrent layers of a sequence keep in place of keys and values: states of fixed size,
of which every token changes all.

A state cannot be taken back, so copies are kept where a run may have to begin again: at the starts
of the newest cells, as far as these are raw. A run reads one copy and writes others; only when it
is done do they count, so that whatever is interrupted has changed nothing.

    boundary    0 ..... c-1      c   (tokens)
    copies              at c-1   at c   newest

Knows cells and numbers, and neither layers' arithmetic nor tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from .model_config import Recurrence

LayerState = tuple[torch.Tensor, torch.Tensor]  # see kernels.recurrence.recur


class States:
    """A ring of copies: what stood at the start of cell c lies in slot c % num_slots, and the
    newest state, somewhere in cell c, in the slot of cell c + 1; one more takes what a run writes
    within a cell. num_slots: one more, at least, than the cells that a run goes through.
    """

    def __init__(self, recurrences: Sequence[Recurrence], num_slots: int, cell_tokens: int, device):
        self._shapes = [_shapes(r) for r in recurrences]
        self._cell_tokens, self._num_slots = cell_tokens, num_slots
        size = sum(prod(shape) for shapes in self._shapes for shape in shapes)
        self._copies = [torch.zeros(size, device=device) for _ in range(num_slots + 1)]
        self._views = {copy.data_ptr(): self._split(copy) for copy in self._copies}
        self.length = 0  # tokens behind which the newest state is
        self.first_cell = 0  # at whose start a copy is known; from it on all are, as far as raw
        # Of a run: where it reads, and where each part of it writes; how far it goes.
        self._run: list[torch.Tensor] = []
        self._stop = 0

    @staticmethod
    def num_bytes(recurrences: Sequence[Recurrence]) -> int:
        """Of one copy."""
        return 4 * sum(sum(r.state_numbers) for r in recurrences)

    @staticmethod
    def num_copies(num_slots: int) -> int:
        return num_slots + 1

    # ---- a run -------------------------------------------------------------------------------

    def begin(self, stops: Sequence[int]) -> None:
        """Tokens behind the newest state will be processed, up to each of the stops in turn: ends
        of cells, but for the last."""
        start = self.length
        if start == 0:
            self.first_cell = 0
            self.newest(0).zero_()
        self._run, self._stop = [self.newest(start)], stops[-1]
        for stop in stops:
            is_within = start % self._cell_tokens != 0
            self._run.append(self._copies[-1] if is_within else self.newest(stop))
            start = stop

    def of(self, part: int, number: int) -> tuple[LayerState, LayerState]:
        """Before and after a part of the run: of the recurrent layer with that number."""
        before, after = self._run[part : part + 2]
        return self._views[before.data_ptr()][number], self._views[after.data_ptr()][number]

    def commit(self) -> None:
        """The run is done: what it wrote counts."""
        copies = self._copies[:]
        if self._run[1] is copies[-1]:
            slot = next(i for i, copy in enumerate(copies) if copy is self._run[0])
            copies[slot], copies[-1] = copies[-1], copies[slot]
        self._copies, self.length = copies, self._stop  # at once, whatever interrupts

    # ---- copies ------------------------------------------------------------------------------

    def newest(self, length: int) -> torch.Tensor:
        """The state behind the first `length` tokens, flat float32: those of the newest one, or up
        to the start of a cell."""
        return self._copies[-(-length // self._cell_tokens) % self._num_slots]

    def place(self, length: int) -> torch.Tensor:
        """The same, to be filled, where nothing is known of what was before."""
        self.length, self.first_cell = 0, -(-length // self._cell_tokens)
        return self.newest(length)

    def copy_from(self, other: States) -> None:
        for mine, theirs in zip(self._copies, other._copies, strict=True):
            mine.copy_(theirs)
        self.length, self.first_cell = other.length, other.first_cell

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
    matrices = (0,) if r.shape is None else (r.shape.heads, r.shape.key_dim, r.shape.value_dim)
    return (r.conv_width - 1, r.channels), matrices

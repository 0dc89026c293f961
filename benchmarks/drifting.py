"""The default selector's steps with another choice, for measuring speed: as many records in every
layer and step, of which a fixed share is new each time. Random weights choose as they like; real
text stays with most of what it read.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch

from ebbtide.kernels.layer_selection import Choice
from ebbtide.offload.layers.selected_attention import SelectedAttention
from ebbtide.offload.layers.selection_steps import CompiledSteps


class DriftingSteps(CompiledSteps):
    """num_tokens: of a layer's records; drift: the share that last step's selection lacks. All is
    computed that choosing takes, and then others are taken, at random."""

    def __init__(self, known, num_tokens: int, drift: float):
        super().__init__(known, Choice(1.0, by_unevenness=True, by_effect=True))
        self._num_tokens, self._drift = num_tokens, drift
        self._draw = np.random.default_rng(0)

    def choose(self, layer, sequence, *given) -> torch.Tensor:
        super().choose(layer, sequence, *given)
        num_records = sequence.table.num_records(layer)
        record_tokens = self._known.tiered.layouts[layer].record_tokens
        count = min(num_records, self._num_tokens // record_tokens)
        previous = sequence.trail.last.get(layer)
        is_free = np.ones(num_records, dtype=bool)
        kept = np.empty(0, dtype=np.int64)
        if previous is not None:
            is_free[previous] = False
            num_kept = count - min(round(self._drift * count), num_records - count)
            kept = self._draw.permutation(previous.numpy())[:num_kept]
        new = self._draw.permutation(np.flatnonzero(is_free))[: count - len(kept)]
        return torch.from_numpy(np.sort(np.concatenate([kept, new])))


@contextmanager
def drifting(num_tokens: int, drift: float):
    """Within it the default selector's choices drift, and its tokens go layer by layer."""
    steps = functools.cache(lambda known: DriftingSteps(known, num_tokens, drift))
    with (
        mock.patch.object(SelectedAttention, "choice", lambda self: None),
        mock.patch.object(SelectedAttention, "_steps_for", lambda self, query: steps(self._known)),
    ):
        yield

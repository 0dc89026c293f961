"""One layer's attention over records that are selected, in a few calls: compiled kernels alone.

    choose    the records to attend in full: estimates of all pages, and what they cost left out
    estimate  all other pages, each as one token, while the chosen ones are being read
    attend    to chosen records, in whatever parts they come in
    finish    everything to one output

To the bit what `TokenStep` does in one call. `effect`, `score`, `selection`, `means` and
`paged_attention` are the reference, step by step; sums run in another order there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import dispatch
from .layer_attention import Raw
from .layout import PageLayout
from .threads import num_threads


class Choice(NamedTuple):
    """How records are selected: see selection.choose_records."""

    epsilon: float
    by_unevenness: bool
    by_effect: bool


class LayerSelection:
    """Of one layer at a time; memory for the largest is kept. What `choose` was given stays as it
    is until `finish`."""

    def __init__(self, choice: Choice):
        self._native, self._choice = dispatch.compiled().LayerSelection(), choice
        self._given: tuple = ()

    def choose(
        self,
        q: torch.Tensor,  # (kv_heads, num_rows, head_dim) float32 contiguous, scaled
        page_q: torch.Tensor,  # the same, rotated if layout.rotate
        raw: Raw,
        near_at: torch.Tensor,  # (num_records,) int64: where each near record starts in memory
        layout: PageLayout,
        softcap: float,
        score_bias: torch.Tensor | None,  # (kv_heads, num_rows, num_tokens) float32 contiguous
        output_norms: torch.Tensor,  # (kv_heads, num_rows) float32 contiguous; see `effect`
        x: torch.Tensor,  # (1, hidden_size) float32 contiguous: what enters the layer
    ) -> torch.Tensor:
        """The records to attend in full, ascending, (n,) int64. The first page, which is attended
        raw, counts for nothing."""
        self._given = (q, page_q, raw, near_at, score_bias, output_norms, x)
        chosen = torch.empty(len(near_at), dtype=torch.int64)
        count = self._native.choose(
            q.data_ptr(),
            page_q.data_ptr(),
            q.shape[1],
            near_at.data_ptr(),
            len(near_at),
            dispatch.layout_numbers(layout),
            softcap,
            0 if score_bias is None else score_bias.data_ptr(),
            *raw.numbers,
            output_norms.data_ptr(),
            x.data_ptr(),
            x.shape[1],
            *self._choice,
            chosen.data_ptr(),
            num_threads(),
        )
        return chosen[:count]

    def known(self) -> tuple[torch.Tensor, torch.Tensor]:
        """raw_log_mass and effect, (kv_heads, num_rows) each, as effect.Standing has them."""
        raw_log_mass, effect = torch.empty((2, *self._given[0].shape[:2]))
        self._native.known(raw_log_mass.data_ptr(), effect.data_ptr())
        return raw_log_mass, effect

    def estimate(self, chosen: torch.Tensor) -> None:
        """chosen (n,) int64 ascending: what will be attended, which may be less than was asked."""
        self._native.estimate(chosen.data_ptr(), len(chosen), num_threads())

    def attend(self, positions: torch.Tensor, record_at: torch.Tensor) -> None:
        """Attends to some of the chosen records: which of them, and where each starts in memory,
        (n,) int64 contiguous each."""
        at = positions.data_ptr(), len(positions), record_at.data_ptr()
        self._native.attend(*at, num_threads())

    def finish(self) -> tuple[torch.Tensor, list[float]]:
        """The attention output (kv_heads, num_rows, head_dim); and the mean and the greatest share
        of all mass that a query head missed, and the same of misplaced shares."""
        out = torch.empty_like(self._given[0])
        return out, self._native.finish(out.data_ptr(), num_threads())

    def left_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        """After `finish`: pages' shares of all mass, (kv_heads, num_rows, num_pages), 0 for what
        was attended, and the log of all mass, (kv_heads, num_rows)."""
        shape = self._given[0].shape[:2]
        shares = torch.empty((*shape, self._native.num_pages()))
        log_total = torch.empty(shape)
        self._native.left_out(shares.data_ptr(), log_total.data_ptr())
        return shares, log_total

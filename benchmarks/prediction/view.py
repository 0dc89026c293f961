"""What a batch of positions sees of one layer: raw keys, sealed pages, and the evidence of both.

A position in cell c sees cells c and c-1 and the first page raw, itself too, and everything else
sealed. Nothing is selected here.
"""

from __future__ import annotations

import torch
from estimate import Estimate, page_evidence
from network import Network, Reading
from sealed import Sealed

from ebbtide.kernels.effect import head_effect, output_norms, value_spread
from ebbtide.kernels.pages import rotate
from ebbtide.prefetch.evidence import Evidence

CELL_TOKENS = 256
INF = float("inf")


class View:
    """Of x (num_rows, hidden), the residuals that enter the layer, at positions (num_rows,)."""

    def __init__(
        self,
        network: Network,
        reading: Reading,
        sealed: Sealed,
        layer: int,
        x: torch.Tensor,
        positions: torch.Tensor,
        pages_per_record: int,
    ):
        self.sealed, self.pages_per_record = sealed, pages_per_record
        size = sealed.near.page_tokens
        self.queries = network.query(layer, x, positions).transpose(0, 1)
        self.kv_heads, self.num_rows, self.group, _ = self.queries.shape
        self.ends = (positions // CELL_TOKENS - 1).clamp_min(0) * CELL_TOKENS
        pages = torch.arange(int(self.ends.max()) // size // pages_per_record * pages_per_record)
        self.num_pages = len(pages)
        self.is_sealed = (pages * size < self.ends[:, None]) & (pages > 0)
        self.absent = ~self.is_sealed[None, :, None]  # (1, num_rows, 1, num_pages)
        self.num_records = (self.ends // size // pages_per_record).clamp_min(1)

        window = self.ends[:, None] + torch.arange(2 * CELL_TOKENS)
        sink = torch.arange(size).expand(self.num_rows, -1)
        raw = torch.cat([sink, window], 1)
        is_there = raw < positions[:, None]
        is_there[:, :size] &= (self.ends > 0)[:, None]  # else the window holds the first page too
        raw = raw.clamp_max(len(reading.ids) - 1)
        own_k, own_v = (own.transpose(0, 1) for own in network.key_value(layer, x, positions))
        keys = torch.cat([reading.keys[layer][:, raw], own_k[:, :, None]], 2)
        self.raw_values = torch.cat([reading.values[layer][:, raw], own_v[:, :, None]], 2)
        self.raw_scores = self.queries @ keys.mT  # (kv_heads, num_rows, group, num_raw)
        self.raw_scores[..., :-1].masked_fill_(~is_there[:, None], -INF)

        rows = self.queries.flatten(1, 2)  # (kv_heads, num_rows * group, d)
        self.rows = rotate(rows.contiguous()) if sealed.near.rotate else rows
        self._weigh(network, layer, x, is_there)

    def _weigh(self, network, layer, x, is_there) -> None:
        """effect (kv_heads, num_rows, group), from the raw tokens."""
        weight = network.weights[f"layers.{layer}.self_attn.o_proj.weight"]
        norms = output_norms(weight, self.kv_heads, network.head_dim)
        out = self.raw_scores.softmax(-1) @ self.raw_values
        effects = []
        for row in range(self.num_rows):
            values = self.raw_values[:, row, :-1][:, is_there[row]]
            residual = x[row].norm()
            effects.append(head_effect(norms, residual, out[:, row], value_spread(values)))
        self.effect = torch.stack(effects, 1)

    def scores(self) -> torch.Tensor:
        """(kv_heads, num_rows, group, num_pages, P), of the far keys."""
        size = self.sealed.near.page_tokens
        keys = self.sealed.keys[:, : self.num_pages * size]
        shape = (self.kv_heads, self.num_rows, self.group, self.num_pages, size)
        return (self.rows @ keys.mT).view(shape).masked_fill_(self.absent[..., None], -INF)

    def estimates(self, how: Estimate) -> tuple[torch.Tensor, torch.Tensor]:
        """(log_mass, unevenness), each (kv_heads, num_rows, group, num_pages)."""
        log_mass, unevenness = (self._pages(e) for e in page_evidence(self.rows, self.sealed, how))
        return log_mass.masked_fill(self.absent, -INF), unevenness

    def bounds(self) -> torch.Tensor:
        """Like log_mass: the greatest score within the pages' boxes."""
        least, greatest = self.sealed.least.mT, self.sealed.greatest.mT
        return self._pages(self.rows.clamp_min(0) @ greatest + self.rows.clamp_max(0) @ least)

    def evidence(self, row: int, log_mass, unevenness, **more) -> Evidence:
        """One row's, of all rows' estimates."""
        return Evidence(
            log_mass[:, row],
            unevenness[:, row],
            self.raw_scores[:, row].logsumexp(-1),
            self.pages_per_record,
            record_tokens=self.pages_per_record * self.sealed.near.page_tokens,
            effect=self.effect[:, row],
            **more,
        )

    def _pages(self, x: torch.Tensor) -> torch.Tensor:
        shape = (self.kv_heads, self.num_rows, self.group, -1)
        return x[..., : self.num_pages].reshape(shape)

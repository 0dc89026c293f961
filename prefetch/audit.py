"""How true the estimate of the missed mass is: now and then a few records that a step left out are
read all the same, and their true mass is held against the estimated one.

Records are drawn with the probability of their estimated mass, so the mean of true over estimated
mass is an unbiased estimate of that ratio for all that was left out (importance sampling; the idea
of checking while running is vAttention's, 2510.05688). It serves reports: no choice depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

EVERY_TOKENS = 4  # of which one layer, another one each time, is looked at
NUM_DRAWS = 4


def layer_due(num_layers: int, position: int) -> int | None:
    """The layer that is looked at for the token at a position; None: no layer."""
    turn, rest = divmod(position, EVERY_TOKENS)
    return turn % num_layers if rest == 0 else None


def draw(shares: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Records drawn by their shares, and how often each: (n,) ascending, and counts (n,), int64.

    shares: (kv_heads, num_rows, num_records), of each head's softmax, 0 for what was attended.
    The draw is fixed by `position`. Nothing is drawn where there is no mass.
    """
    weights = shares.sum((0, 1)).double().cpu()
    if not bool(weights.sum() > 0):
        nothing = torch.empty(0, dtype=torch.int64)
        return nothing, nothing
    generator = torch.Generator().manual_seed(position)
    drawn = torch.multinomial(weights, NUM_DRAWS, replacement=True, generator=generator)
    return drawn.unique(return_counts=True)


@dataclass
class Audit:
    """Sums over the looks since it was made or cleared. Masses are shares, summed over heads."""

    num_drawn: int = 0
    estimated: float = 0.0
    true: float = 0.0

    def note(
        self,
        shares: torch.Tensor,
        true_shares: torch.Tensor,
        drawn: torch.Tensor,
        counts: torch.Tensor,
    ) -> None:
        """One look. shares: as `draw` took them; true_shares: (n, kv_heads, num_rows) of those
        that were drawn, in their order."""
        ratios = true_shares.sum((1, 2)) / shares[..., drawn].sum((0, 1))
        left_out = float(shares.sum())
        self.num_drawn += int(counts.sum())
        self.estimated += left_out
        self.true += left_out * float((ratios * counts).sum() / counts.sum())

    def take(self) -> Audit:
        """What was summed, and starts anew."""
        taken = Audit(**vars(self))
        self.__init__()
        return taken

    def true_over_estimated(self) -> float | None:
        """About 1 where the estimate is right; None as long as nothing was drawn."""
        return self.true / self.estimated if self.num_drawn else None

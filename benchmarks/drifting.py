"""A selector for measuring speed: as many records in every layer and step, of which a fixed share
is new each time. Random weights choose as they like; real text stays with most of what it read.
"""

from __future__ import annotations

import torch

from ebbtide.prefetch.budget import best_records, num_records_of
from ebbtide.prefetch.evidence import Evidence

EIGHTH = 128, 1024  # of the records: what new ones are taken from, another eighth in each step


class Drifting:
    """num_tokens: of a layer's records; drift: the share that last step's selection lacks.

    What goes and what comes is up to the estimated mass, so that a rehearsed query can foresee it.
    New ones come from an eighth that the last selection's numbers fix: the heaviest of all would
    soon be the same few.
    """

    def __init__(self, num_tokens: int = 2048, drift: float = 0.25):
        self.num_tokens, self.drift = num_tokens, drift

    def select(self, evidence: Evidence) -> torch.Tensor:
        count = num_records_of(evidence, self.num_tokens)
        mass = evidence.by_record(evidence.shares.shares).flatten(0, 1).sum(0)
        if evidence.previous is None:
            return best_records(evidence, mass, count)
        is_old = torch.zeros(evidence.num_records, dtype=torch.bool)
        is_old[evidence.previous] = True
        num_kept = min(count - round(self.drift * count), int(is_old.sum()))
        kept = best_records(evidence, mass.where(is_old, -1.0), num_kept)
        numbers = torch.arange(evidence.num_records) * 2654435761
        offered = (numbers + int(evidence.previous.sum()) * 40503) // 64 % EIGHTH[1] < EIGHTH[0]
        # An old one that goes is never a new one, and one of the eighth comes before all others.
        mass = (mass + offered).where(~is_old, -1.0)
        return torch.cat([kept, best_records(evidence, mass, count - num_kept)]).sort().values

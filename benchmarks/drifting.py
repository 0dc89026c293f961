"""A selector for measuring speed: as many records in every layer and step, of which a fixed share
is new each time. Random weights choose as they like; real text stays with most of what it read.
"""

from __future__ import annotations

import numpy as np
import torch

from ebbtide.prefetch.budget import num_records_of
from ebbtide.prefetch.evidence import Evidence

EIGHTH = 128, 1024  # of the records: what new ones are taken from, another eighth in each step


class Drifting:
    """num_tokens: of a layer's records; drift: the share that last step's selection lacks.

    What goes and what comes is up to the estimated mass, so that a rehearsed query can foresee it.
    New ones come from an eighth that the last selection's numbers fix: the heaviest of all would
    soon be the same few. In numpy, which takes a tenth of torch's time for a few hundred numbers:
    it stands in for a choice that is compiled.
    """

    def __init__(self, num_tokens: int = 2048, drift: float = 0.25):
        self.num_tokens, self.drift = num_tokens, drift

    def select(self, evidence: Evidence) -> torch.Tensor:
        count = min(num_records_of(evidence, self.num_tokens), evidence.num_records)
        mass = evidence.by_record(evidence.shares.shares).sum((0, 1)).numpy()
        if evidence.previous is None:
            return _sorted(_heaviest(mass, count))
        previous = evidence.previous.numpy()
        kept = previous[_heaviest(mass[previous], count - round(self.drift * count))]
        numbers = np.arange(evidence.num_records) * 2654435761
        offered = (numbers + int(previous.sum()) * 40503) // 64 % EIGHTH[1] < EIGHTH[0]
        # An old one that goes is never a new one, and one of the eighth comes before all others.
        worth = mass + offered
        worth[previous] = -1.0
        return _sorted(np.concatenate([kept, _heaviest(worth, count - len(kept))]))


def _heaviest(mass: np.ndarray, count: int) -> np.ndarray:
    if 0 < count < len(mass):
        return np.argpartition(-mass, count - 1)[:count]
    return np.arange(min(count, len(mass)))


def _sorted(records: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.sort(records))

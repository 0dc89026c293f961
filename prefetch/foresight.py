"""Which records a layer is expected to select next: what is asked for before its query is known.

nothing    no reads ahead
history    what the layer selected a step ago
rehearsal  what the selector makes of a rehearsed query
union      the rehearsal, then what only the step before had

A wrong expectation costs time and nothing else. Knows neither pages nor tiers.
"""

from __future__ import annotations

import torch

from .evidence import Evidence
from .source import Foresight, Selector
from .top_p import TopP

# What a disk reads while the processor computes a rehearsal but for its scores: some 0.8 ms of a
# layer. Scores are ten times as fast as reading, but most reading is hidden behind the estimate of
# other pages, so each byte of near planes counts as one. The built-in model with a cache for a
# tenth, 16,000 tokens: where a layer lacks 2.4 MB, a rehearsal hides 0.5 ms of reading, costs 0.9.
STEPS_BYTES = 2 << 20
# Of epsilon, for a rehearsed query. Of the records that are selected anew at 0.02 it then names
# 92 %, and 46 % of what it asks for is in vain; with the same epsilon 89 and 42 %, with half of it
# 97 and 61 % (the built-in model, its story).
REHEARSED_EPSILON = 0.9

_NONE = torch.empty(0, dtype=torch.int64)


def is_worth_scoring(near_bytes: int, lacked_bytes: float) -> bool:
    """Whether a rehearsed query may save more of the processor's time than it takes, scoring
    near_bytes. lacked_bytes: what the layer's selections had to read lately.
    """
    return lacked_bytes >= near_bytes + STEPS_BYTES


def for_rehearsal(selector: Selector) -> Selector:
    """What chooses in a selector's place when the query is a rehearsed one."""
    if type(selector) is TopP:  # what extends it may choose otherwise
        return TopP(REHEARSED_EPSILON * selector.epsilon, selector.criterion)
    return selector


def heaviest_first(evidence: Evidence, chosen: torch.Tensor) -> torch.Tensor:
    """Records `chosen` (n,) by falling share of the head that gives them most."""
    weight = evidence.by_record(evidence.shares.shares).amax((0, 1))[chosen]
    return chosen[weight.argsort(descending=True, stable=True)]


class Nothing:
    needs_query = False

    def expect(self, rehearsed: torch.Tensor | None, last: torch.Tensor | None) -> torch.Tensor:
        return _NONE


class LastStep:
    needs_query = False

    def expect(self, rehearsed: torch.Tensor | None, last: torch.Tensor | None) -> torch.Tensor:
        return _NONE if last is None else last


class Rehearsal:
    """Falls back on nothing where nothing was rehearsed."""

    needs_query = True

    def expect(self, rehearsed: torch.Tensor | None, last: torch.Tensor | None) -> torch.Tensor:
        return _NONE if rehearsed is None else rehearsed


class Union:
    needs_query = True

    def expect(self, rehearsed: torch.Tensor | None, last: torch.Tensor | None) -> torch.Tensor:
        rehearsed = Rehearsal().expect(rehearsed, last)
        if last is None:
            return rehearsed
        return torch.cat([rehearsed, last[~torch.isin(last, rehearsed)]])


FORESIGHTS: dict[str, type[Foresight]] = {
    "nothing": Nothing,
    "history": LastStep,
    "rehearsal": Rehearsal,
    "union": Union,
}


def make_foresight(name: str) -> Foresight:
    """A fresh one by name. Raises ValueError with the known names for any other."""
    if name not in FORESIGHTS:
        raise ValueError(f"unknown foresight {name!r}; known: {', '.join(sorted(FORESIGHTS))}")
    return FORESIGHTS[name]()

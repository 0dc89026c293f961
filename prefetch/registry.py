"""Predictors by name. Adding one is adding a file and a line here.

Knows the names only; what a predictor is stands in `source`.
"""

from __future__ import annotations

from .history import History
from .in_order import InOrder
from .source import Predictor

PREDICTORS: dict[str, type[Predictor]] = {"in_order": InOrder, "history": History}


def make_predictor(name: str) -> Predictor:
    """A fresh predictor. Raises ValueError with the known names for any other."""
    if name not in PREDICTORS:
        raise ValueError(f"unknown predictor {name!r}; known: {', '.join(sorted(PREDICTORS))}")
    return PREDICTORS[name]()

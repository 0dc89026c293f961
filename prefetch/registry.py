"""Predictors and selectors by name. Adding one is adding a file and a line here.

Knows the names only; what each of them is stands in `source`.
"""

from __future__ import annotations

import inspect
from typing import Any

from .everything import Everything
from .freekv import FreeKV
from .history import History
from .in_order import InOrder
from .infinigen import InfiniGen
from .kvswap import KVSwap
from .quest import Quest
from .random import Random
from .source import Predictor, Selector
from .top_p import TopP
from .window import Window

PREDICTORS: dict[str, type[Predictor]] = {"in_order": InOrder, "history": History}
SELECTORS: dict[str, type[Selector]] = {
    "top_p": TopP,
    "everything": Everything,
    "window": Window,
    "quest": Quest,
    "random": Random,
    "infinigen": InfiniGen,
    "freekv": FreeKV,
    "kvswap": KVSwap,
}


def make_predictor(name: str) -> Predictor:
    """A fresh predictor. Raises ValueError with the known names for any other."""
    return _known("predictor", PREDICTORS, name)()


def make_selector(name: str, **options: Any) -> Selector:
    """A selector with its own options, `epsilon` or `num_tokens`, say. Raises ValueError with what
    is known for any other name or option, and for values that make no sense.
    """
    made = _known("selector", SELECTORS, name)
    allowed = [] if made.__init__ is object.__init__ else list(inspect.signature(made).parameters)
    for option in options:
        if option not in allowed:
            raise ValueError(
                f"selector {name!r} has no option {option!r}; "
                f"it has {', '.join(allowed) if allowed else 'none'}"
            )
    return made(**options)


def _known(what: str, table: dict[str, Any], name: str) -> Any:
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(sorted(table))}")
    return table[name]

"""What `LLM.open` takes, checked once. Knows names and ranges; opens nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import InputError
from .mode import MODES
from .models.model_config import DTYPE_BYTES
from .planning.budget import Budget, parse_cache_size
from .text.prompt import is_whole
from .weights.packing import Bits, Packing

MOST_TOKENS = 2**31 - 1
_MOST_THREADS = 4096  # torch crashes at the end of a process that was given a million
_AUTO_8_BIT_PARAMETERS = 1_000_000_000  # --weight-bits auto: smaller models stay as they are


@dataclass(frozen=True)
class Options:
    """What `LLM.open` was asked for, checked. Raises InputError."""

    model: str | Path | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    budget: Budget = field(default_factory=Budget)
    mode: str = "exact"
    epsilon: float = 0.02
    kv_bits: str | int = "auto"
    weight_bits: str | int = "auto"
    context: int | None = None
    spill_dir: str | Path | None = None
    threads: int | None = None
    draft: bool = True
    prefix_cache: int | str = 0

    def __post_init__(self):
        self._require("mode", self.mode in MODES, ", ".join(MODES))
        number = isinstance(self.epsilon, int | float) and not isinstance(self.epsilon, bool)
        self._require("epsilon", number and 0 < self.epsilon < 1, "a number between 0 and 1")
        self._require(
            "dtype", self.dtype in ("auto", *DTYPE_BYTES), f"auto, {', '.join(DTYPE_BYTES)}"
        )
        model = self.model is None or isinstance(self.model, str | Path)
        self._require("model", model, "a folder, a GGUF file, a Hugging Face id or None")
        path = self.spill_dir is None or isinstance(self.spill_dir, str | Path)
        self._require("spill_dir", path, "a folder")
        self._require("draft", isinstance(self.draft, bool), "True or False")
        try:
            object.__setattr__(self, "prefix_cache", parse_cache_size(self.prefix_cache))
        except ValueError as error:
            raise InputError(f"prefix_cache: {error}") from None
        self._require("budget", isinstance(self.budget, Budget), "a Budget")
        for name, most in (("context", MOST_TOKENS), ("threads", _MOST_THREADS)):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, checked_count(name, value, most))

    def _require(self, name: str, good: bool, allowed: str) -> None:
        if not good:
            raise InputError(f"{name} is {getattr(self, name)!r}; allowed is {allowed}")


def checked_count(name: str, value: Any, most: int = MOST_TOKENS) -> int:
    """A whole number, of tokens or of threads. Raises InputError for anything else."""
    if not is_whole(value) or not 1 <= int(value) <= most:
        raise InputError(f"{name} is {value!r}; allowed is a whole number from 1 to {most:,}")
    return int(value)


def choose_weight_bits(
    asked: str | int, shapes: dict[str, tuple[int, ...]], packings: Iterable[Packing] = ()
) -> Bits:
    """8, 4, None (as they are) or auto (as suits each packing), from auto, full, 8 or 4. Auto: 8
    bits from a billion parameters on; below, as suits each packing in the files: None where that
    is as they are.
    """
    asked = str(asked)
    if asked in ("8", "4"):
        return int(asked)
    if asked == "full":
        return None
    if asked != "auto":
        raise InputError(f"weight_bits is {asked!r}; allowed are auto, full, 8 and 4.")
    parameters = sum(map(math.prod, shapes.values()))
    if parameters >= _AUTO_8_BIT_PARAMETERS:
        return 8
    return "auto" if any(packing.suits_bits for packing in packings) else None

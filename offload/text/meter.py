"""What rendering one chat template may cost: CPU seconds, the largest value, all text together.

Pure bookkeeping: it counts and refuses. Where the counting happens is `sandbox.py`'s business; it
knows nothing of jinja2.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import ItemsView, Iterable, KeysView, ValuesView
from typing import Any

NODE_CHARS = 16  # what a list item or a number is charged, so that empty lists are not free
CONTAINERS = (list, tuple, dict, KeysView, ItemsView, ValuesView)
# Widths of four digits, or taken from an argument, in a % pattern and in a {} pattern.
WIDE_PERCENT = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(?:\d{4}|\*|\d*\.(?:\d{4}|\*))")
WIDE_BRACES = re.compile(r"\{[^{}]*:[^{}]*(?:\d{4}|\{)")


class LimitExceeded(Exception):
    """A template used more time or memory than a rendering may."""


class Meter:
    """What one rendering has used, and may use.

    Invariants: (1) no value that a template makes prints to more than `max_chars`, counting what
    containers hold each time they hold it, so whatever is done with one value takes bounded time;
    (2) all text made is at most `max_total_chars`; (3) both are checked before a large allocation.
    """

    def __init__(self, seconds: float, max_chars: int, max_total_chars: int):
        self.seconds = seconds
        self.max_chars = max_chars
        self.chars_left = max_total_chars
        self.deadline = time.thread_time() + seconds
        self._inputs: dict[int, int] = {}
        self._made: OrderedDict[int, tuple[Any, int]] = OrderedDict()

    def tick(self) -> None:
        if time.thread_time() > self.deadline:
            raise LimitExceeded(f"it ran longer than {self.seconds:g} s")

    def admit(self, value: Any) -> int:
        """The weight of an input, remembered for each container in it. Inputs outlive the meter, so
        an id stays theirs."""
        if isinstance(value, dict):
            weight = sum(self.admit(k) + self.admit(v) for k, v in value.items())
        elif isinstance(value, (list, tuple)):
            weight = sum(map(self.admit, value))
        else:
            return self.weigh(value)
        self._inputs[id(value)] = weight + NODE_CHARS
        return weight + NODE_CHARS

    def charge(self, num_chars: int) -> None:
        """Pay for text of `num_chars`: before it is made, where its size is known."""
        self.chars_left -= num_chars
        if num_chars > self.max_chars or self.chars_left < 0:
            raise LimitExceeded("it makes more text than a chat template may")

    def weigh(self, value: Any) -> int:
        """How long `value` prints, about; stops counting beyond `max_chars`.

        The last 64 containers made are remembered by identity, so that a list grown item by item
        in a loop is not counted anew each time.
        """
        if isinstance(value, str):
            return len(value) + NODE_CHARS
        if not isinstance(value, CONTAINERS):
            return NODE_CHARS
        weight, pending = 0, [value]
        while pending and weight <= self.max_chars:
            item = pending.pop()
            if isinstance(item, str):
                weight += len(item) + NODE_CHARS
            elif not isinstance(item, CONTAINERS):
                weight += NODE_CHARS
            elif known := self._known_weight(item):
                weight += known
            else:
                weight += NODE_CHARS
                if isinstance(item, dict):
                    pending.extend(item.keys())
                    pending.extend(item.values())
                else:
                    pending.extend(item)
        self._made[id(value)] = (value, weight)
        if len(self._made) > 64:
            self._made.popitem(last=False)
        return weight

    def _known_weight(self, value: Any) -> int:
        made = self._made.get(id(value))
        if made is not None and made[0] is value:
            return made[1]
        return self._inputs.get(id(value), 0)

    def pay(self, value: Any) -> Any:
        """Charge a value that has just been made, and hand it on."""
        if isinstance(value, str):
            self.charge(len(value))
        elif isinstance(value, CONTAINERS):
            self.charge(NODE_CHARS * len(value))  # it refers to its strings, it does not copy them
            if self.weigh(value) > self.max_chars:
                raise LimitExceeded("it makes larger lists than a chat template may")
        return value

    def plan_join(self, separator: Any, items: Iterable) -> list:
        items = list(items)
        each = len(separator) if isinstance(separator, str) else NODE_CHARS
        self.charge(sum(map(self.weigh, items)) + each * len(items))
        return items

    def plan_replace(self, text: str, old: str, new: str) -> None:
        self.charge(len(text) + text.count(old) * len(new))

    def plan_format(self, pattern: str, args: Iterable) -> None:
        """Every field is charged for the largest argument, as it may repeat it."""
        if WIDE_PERCENT.search(pattern) or WIDE_BRACES.search(pattern):
            raise LimitExceeded("it pads text further than a chat template may")
        num_fields = pattern.count("%") + pattern.count("{")
        largest = max(map(self.weigh, args), default=0)
        self.charge(len(pattern) + num_fields * (largest + 1000))

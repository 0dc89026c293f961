"""Ctrl-C at any line of some functions. Not tests."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable


def interrupted_after(count: int, functions: Iterable[Callable], run: Callable[[], object]) -> bool:
    """Whether `run` was interrupted before the count-th line of the functions, by a
    KeyboardInterrupt."""
    codes, left = {inspect.unwrap(function).__code__ for function in functions}, [count]

    def trace(frame, event, arg):
        if frame.f_code not in codes:
            return None

        def line(frame, event, arg):
            if event == "line":
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt
            return line

        return line

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False

"""Ctrl-C at any line, or at any instruction, of some functions. Not tests."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable


def interrupted_after(
    count: int,
    functions: Iterable[Callable],
    run: Callable[[], object],
    *,
    instructions: bool = False,
) -> bool:
    """Whether `run` was interrupted before the count-th line of the functions, or the count-th of
    their instructions, by a KeyboardInterrupt."""
    codes, left = {inspect.unwrap(function).__code__ for function in functions}, [count]
    wanted = "opcode" if instructions else "line"

    def trace(frame, event, arg):
        if frame.f_code not in codes:
            return None
        frame.f_trace_opcodes = instructions

        def within(frame, event, arg):
            if event == wanted:
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt
            return within

        return within

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def functions_of(*classes: type) -> list[Callable]:
    """All functions and properties that the classes define themselves."""
    members = [member for of in classes for member in vars(of).values()]
    members = [member.fget if isinstance(member, property) else member for member in members]
    return [member for member in members if inspect.isfunction(member)]

"""Environment variables that look like Ebbtide's and are none: a memory limit that is misspelt
would limit nothing. Knows the built commands, whose options say which variables there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .values import nearest

_PREFIX = "EBBTIDE_"
# What no option is: which kernels compute, and by which instructions (kernels/dispatch.py).
_OTHERS = ("EBBTIDE_KERNELS", "EBBTIDE_INSTRUCTION_SET")


def unknown_variables(names: Iterable[str], command: Any) -> list[str]:
    """A sentence for each of the environment's names that no option of the command line has."""
    known = {*_OTHERS, *_variables(command)}
    stray = sorted(name for name in names if name.startswith(_PREFIX) and name not in known)
    return [f"{name} changes nothing: Ebbtide reads {_instead(name, known)}" for name in stray]


def _instead(name: str, known: set[str]) -> str:
    ends = (other.removeprefix(_PREFIX) for other in known)  # all begin alike
    near = nearest(name.removeprefix(_PREFIX), ends)
    hint = f"did you mean {_PREFIX}{near}?" if near else "'ebbtide config show' lists the options."
    return f"no such variable; {hint}"


def _variables(command: Any) -> Iterator[str]:
    yield from (p.envvar for p in command.params if getattr(p, "envvar", None))
    for below in getattr(command, "commands", {}).values():
        yield from _variables(below)

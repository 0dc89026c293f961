"""Imports run one way: cli -> face -> offload -> prefetch -> kernels.

Reads the sources and runs none of them, so imports inside functions count too. The face may name
the rooms below it and never the commands; a command may name the face alone.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

# Each room: where it lies, and which of ebbtide's rooms its files may name (its own always).
ROOMS = {
    "cli": (REPO / "cli", {"face"}),
    "face": (REPO / "src" / "ebbtide", {"offload", "prefetch", "kernels"}),
    "offload": (REPO / "offload", {"prefetch", "kernels"}),
    "prefetch": (REPO / "prefetch", {"kernels"}),
    "kernels": (REPO / "kernels", set()),
}
# `python -m ebbtide` is the command line's second door, so this file alone of the face may open it.
EXCEPTIONS = {("face", "__main__.py"): {"cli"}}
KERNEL_LIBRARIES = {"torch", "numpy"}
GPU_LIBRARIES = {"triton"}  # in one folder, which nothing imports where there is none


def imported_names(source: str, package: str) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of every import statement in a module of `package`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                above = parts[: len(parts) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # `from ebbtide import offload` names a room as much as `from ebbtide.offload import x`.
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            text = node.args[0] if node.args else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                dots = len(text.value) - len(text.value.lstrip("."))
                parts = package.split(".")
                above = parts[: len(parts) - dots + 1] if dots else []
                found.append((node.lineno, ".".join([*above, text.value.lstrip(".")])))
    return found


def room_of(name: str) -> str | None:
    """The room that a dotted name lies in; None when it is not ebbtide's."""
    parts = name.split(".")
    if parts[0] != "ebbtide":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "face"


def breaches(room: str, file: str, source: str, package: str) -> list[str]:
    allowed = ROOMS[room][1] | {room} | EXCEPTIONS.get((room, file), set())
    out = []
    for line, name in imported_names(source, package):
        target = room_of(name)
        if target is not None:
            if target not in allowed:
                out.append(f"{file}:{line}: {room} imports {name}")
        elif room == "kernels":
            known = KERNEL_LIBRARIES | (GPU_LIBRARIES if file.startswith("gpu/") else set())
            if name.split(".")[0] not in known | sys.stdlib_module_names:
                out.append(f"{file}:{line}: kernels imports {name}")
    return out


@pytest.mark.parametrize("room", ROOMS)
def test_no_import_runs_back_up(room):
    folder = ROOMS[room][0]
    files = sorted(folder.rglob("*.py"))
    assert files, f"no source in {folder}"
    found = []
    for file in files:
        inner = file.relative_to(folder).parent.parts
        package = ".".join(["ebbtide", *([] if room == "face" else [room]), *inner])
        found += breaches(room, file.relative_to(folder).as_posix(), file.read_text(), package)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("kernels", "from ..offload import errors"),
        ("kernels", "import safetensors"),
        ("kernels", "import triton"),
        ("kernels", "def f():\n    from ebbtide import prefetch"),
        ("prefetch", "import ebbtide.offload.errors"),
        ("prefetch", "from ..offload.errors import InputError"),
        ("offload", "from .. import LLM"),
        ("offload", "def f():\n    import ebbtide.cli.main"),
        ("offload", "import importlib\nimportlib.import_module('..cli.main', __package__)"),
        ("face", "from . import cli"),
        ("cli", "from ..offload import errors"),
    ],
)
def test_a_breach_is_seen(room, source):
    package = "ebbtide" if room == "face" else f"ebbtide.{room}"
    assert breaches(room, "module.py", source, package)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("cli", "from ebbtide import LLM, errors\nfrom . import terminal\nimport rich"),
        ("face", "from .offload.running.engine import LLM"),
        ("offload", "from ..kernels import pages\nfrom . import errors\nimport psutil"),
        ("kernels", "import math\nimport torch.nn.functional as F\nfrom . import layout"),
    ],
)
def test_what_runs_down_is_allowed(room, source):
    package = "ebbtide" if room == "face" else f"ebbtide.{room}"
    assert not breaches(room, "module.py", source, package)

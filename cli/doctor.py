"""`ebbtide doctor`: what this machine and this installation offer, and what stands in the way."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib import metadata
from typing import Any

from ebbtide import errors, format_size

from .run import Run
from .shared_options import with_shared_options

EPILOG = """Example: ebbtide doctor --spill-dir /mnt/fast --json"""

_PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "huggingface_hub", "typer", "rich")
_HUB_VARIABLES = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_TOKEN_PATH",
    "HTTPS_PROXY",
)


@with_shared_options
def doctor(run: Run) -> None:
    """Check this machine and this installation."""
    problems: list[str] = []
    findings = {
        "python": _python(),
        "packages": {name: _version_of(name) for name in _PACKAGES},
        "kernels": _kernels(problems),
        "devices": _devices(problems),
        "memory": _memory(),
        "disk": _disk(run.settings.spill_dir, problems),
        "hub": _hub(),
        "settings_file": _settings_file(),
    }
    if run.terminal.as_json:
        run.terminal.result({"schema": 1, **findings, "problems": problems})
        return
    for title, facts in findings.items():
        run.terminal.answer(f"{title.replace('_', ' ')}\n")
        for name, value in facts.items():
            run.terminal.answer(f"  {name:<18} {_shown(name, value)}\n")
    for problem in problems:
        run.terminal.answer(f"! {problem}\n")
    run.terminal.answer("Nothing stands in the way.\n" if not problems else "")


def _python() -> dict[str, Any]:
    import ebbtide

    return {
        "ebbtide": ebbtide.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "executable": sys.executable,
    }


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _kernels(problems: list[str]) -> dict[str, Any]:
    import ebbtide

    try:
        backend = ebbtide.kernel_backend()
    except (RuntimeError, ValueError, ImportError) as error:
        problems.append(str(error))
        return {"cpu": None, "instruction_set": ""}
    if backend != "compiled":
        problems.append(
            "The compiled CPU kernels do not serve, and the torch reference is many times slower. "
            "Install again where a C++17 compiler is found."
        )
    return {"cpu": backend, "instruction_set": ebbtide.instruction_set()}


def _devices(problems: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"cpu": f"{os.cpu_count()} cores"}
    try:
        import torch
    except ImportError as error:
        problems.append(f"torch cannot be imported: {error}")
        return found
    found["cpu"] += (
        f", {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    found["cuda"] = None
    if torch.cuda.is_available():
        try:
            free_bytes, total_bytes = torch.cuda.mem_get_info()
        except RuntimeError as error:
            problems.append(f"The GPU does not answer: {error}")
        else:
            name = torch.cuda.get_device_name()
            found["cuda"] = f"{name}, {format_size(free_bytes)} free of {format_size(total_bytes)}"
    found["mps"] = "available" if torch.backends.mps.is_available() else None
    return found


def _memory() -> dict[str, Any]:
    import psutil

    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    return {
        "total_bytes": memory.total,
        "available_bytes": memory.available,
        "swap_bytes": swap.total,
    }


def _disk(spill_dir: str | None, problems: list[str]) -> dict[str, Any]:
    import ebbtide

    found: dict[str, Any] = {"spill_dir": spill_dir, "free_bytes": None, "writable": False}
    try:
        folder = os.path.realpath(os.path.expanduser(spill_dir or ebbtide.default_spill_dir()))
        found["spill_dir"] = folder
        found["free_bytes"] = shutil.disk_usage(folder).free
        problems += ebbtide.volume_warnings(folder)
    except errors.EbbtideError as error:
        problems.append(str(error))
        return found
    except OSError as error:
        problems.append(f"The spill folder {found['spill_dir']} cannot be used: {error.strerror}.")
        return found
    found["filesystem"] = _filesystem(folder)
    found["writable"] = os.access(folder, os.W_OK | os.X_OK)
    if not found["writable"]:
        problems.append(
            f"The spill folder {folder} cannot be written; choose another with --spill-dir."
        )
    return found


def _filesystem(folder: str) -> str | None:
    """The kind of volume a folder lies on, by the longest mount point above it."""
    import psutil

    best: Any = None
    for part in psutil.disk_partitions(all=True):
        point = part.mountpoint.rstrip(os.sep) + os.sep
        if (folder + os.sep).startswith(point) and (
            best is None or len(part.mountpoint) >= len(best.mountpoint)
        ):
            best = part
    return best.fstype if best is not None else None


def _hub() -> dict[str, Any]:
    found: dict[str, Any] = {name: os.environ.get(name) for name in _HUB_VARIABLES}
    # That there is one, never what it is.
    found["HF_TOKEN"] = "set" if os.environ.get("HF_TOKEN") else None
    return found


def _settings_file() -> dict[str, Any]:
    from .settings_file import settings_path

    path = settings_path()
    return {"path": str(path), "exists": path.exists()}


def _shown(name: str, value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format_size(value) if name.endswith("_bytes") else str(value)

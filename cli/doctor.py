"""`ebbtide doctor`: what this machine and this installation offer, and what stands in the way."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import sys
import threading
from importlib import metadata
from typing import Annotated, Any

import typer

from ebbtide import errors, format_size

from .cache_items import find_items
from .options import BY_NAME
from .run import Run
from .shared_options import with_shared_options

EPILOG = """Examples:

ebbtide doctor

ebbtide doctor --quick                            measures nothing, asks no network

ebbtide doctor --spill-dir /mnt/fast --json"""

_NETWORK_PATIENCE_S = 4.0
_HUB_VARIABLES = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_TOKEN_PATH",
    "HTTPS_PROXY",
)


@with_shared_options
def doctor(
    run: Run,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Leave out what takes seconds: bandwidths, the network, a GPU's kernels.",
        ),
    ] = False,
) -> None:
    """Check this machine and this installation."""
    if run.settings.origins["model"] == BY_NAME["model"].flags[0]:
        raise typer.BadParameter(
            "the machine is looked at, and no model; 'ebbtide plan MODEL' says how one would fit",
            param_hint="--model",
        )
    problems: list[str] = []
    findings = {
        "python": _python(),
        "packages": _packages(problems),
        "kernels": _kernels(problems, quick),
        "devices": _devices(problems),
        "memory": _memory(),
        "disk": _disk(run.settings.spill_dir, problems),
        "bandwidth": {} if quick else _bandwidth(run, problems),
        "state": _state(problems),
        "hub": _hub(quick),
        "settings_file": _settings_file(),
    }
    findings = {title: facts for title, facts in findings.items() if facts}
    if run.terminal.as_json:
        run.terminal.result({"schema": 1, **findings, "problems": problems})
        return
    for title, facts in findings.items():
        run.terminal.answer(f"{title.replace('_', ' ')}\n")
        for name, value in facts.items():
            run.terminal.answer(f"  {name:<26} {_shown(name, value)}\n")
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


def _packages(problems: list[str]) -> dict[str, str | None]:
    """The versions of what Ebbtide needs."""
    try:
        required = metadata.requires("ebbtide") or []
    except metadata.PackageNotFoundError:
        problems.append("Ebbtide is not installed, only imported: 'pip install .' installs it.")
        return {}
    found: dict[str, str | None] = {}
    for requirement in required:
        if "extra ==" in requirement:
            continue
        name = re.split(r"[\s<>=!~;\[(]", requirement, maxsplit=1)[0]
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
            problems.append(f"The package {name} is missing: install Ebbtide again.")
    with contextlib.suppress(metadata.PackageNotFoundError):  # decodes K-quants of GGUF files
        found["gguf"] = metadata.version("gguf")
    return found


def _kernels(problems: list[str], quick: bool) -> dict[str, Any]:
    import ebbtide

    try:
        backend = ebbtide.kernel_backend()
    except (RuntimeError, ValueError, ImportError) as error:
        problems.append(str(error))
        return {"cpu": None, "instruction_set": "", "gpu": None}
    if backend != "compiled":
        problems.append(
            ebbtide.cpu_kernel_fault()
            or "EBBTIDE_KERNELS keeps the compiled CPU kernels from serving; others are many times "
            "slower."
        )
    gpu = None if quick else _gpu_kernels(problems)
    return {"cpu": backend, "instruction_set": ebbtide.instruction_set(), "gpu": gpu}


def _gpu_kernels(problems: list[str]) -> str | None:
    """Which kernels serve the GPU; None without one. They are compiled to find out."""
    import ebbtide

    fault = ebbtide.gpu_kernel_fault()
    if fault:
        problems.append(
            "The kernels for GPUs do not serve, and the torch reference is many times slower: "
            f"{fault}."
        )
    return None if fault is None else "reference" if fault else "triton"


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
    """total and available: what a process here can have, in a container what that has."""
    import psutil

    import ebbtide

    memory = ebbtide.memory_at_hand()
    return {
        "total_bytes": memory.total,
        "available_bytes": memory.available,
        "machine_bytes": psutil.virtual_memory().total,
        "swap_bytes": psutil.swap_memory().total,
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


def _bandwidth(run: Run, problems: list[str]) -> dict[str, Any]:
    """What each tier can be read at, measured now."""
    import ebbtide

    run.terminal.note("Measuring memory and disk ...")
    run.signals.working()
    memory = ebbtide.measure_memory()
    found: dict[str, Any] = {"memory_bytes_per_s": memory.bytes_per_s}
    allowed = run.settings.disk_memory
    try:
        disk = ebbtide.measure_disk(run.settings.spill_dir, disk_memory=allowed)
    except errors.DoesNotFit as error:  # as was asked for
        run.terminal.note(str(error))
        return found
    except errors.EbbtideError as error:
        problems.append(str(error))
        return found
    found |= {
        "disk_random_bytes_per_s": disk.random_bytes_per_s,
        "disk_in_order_bytes_per_s": disk.sequential_bytes_per_s,
        "disk_write_bytes_per_s": disk.write_bytes_per_s,
        "disk_way": disk.way,
    }
    if disk.caveat:
        run.terminal.note(f"The disk's speed is {disk.caveat}.")
    return found


def _state(problems: list[str]) -> dict[str, Any]:
    """Where conversations, jobs and history lie."""
    import ebbtide

    try:
        folder = ebbtide.state_dir()
    except errors.InputError as error:
        problems.append(f"Nothing can be kept from run to run: {error}.")
        return {"folder": None}
    writable = os.access(folder, os.W_OK | os.X_OK)
    if not writable:
        problems.append(f"The state folder {folder} cannot be written: nothing is kept in it.")
    return {"folder": str(folder), "writable": writable}


def _hub(quick: bool) -> dict[str, Any]:
    found: dict[str, Any] = {name: os.environ.get(name) for name in _HUB_VARIABLES}
    # That there is one, never what it is.
    found["HF_TOKEN"] = "set" if os.environ.get("HF_TOKEN") else None
    models = [item for item in find_items(None) if item.kind == "models"] if _has_state() else []
    found["models"] = len(models)
    found["models_bytes"] = sum(item.num_bytes for item in models)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        found["reachable"] = "not asked, for HF_HUB_OFFLINE is set"
    elif not quick:
        found["reachable"] = _reach(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    return found


def _has_state() -> bool:
    import ebbtide

    try:
        ebbtide.state_dir()
    except errors.InputError:
        return False
    return True


def _reach(address: str) -> str:
    """Whether a server answers, whatever it says; in words. Not being online is no problem."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    answers: list[str] = []

    def ask() -> None:
        try:
            urlopen(Request(address, method="HEAD"), timeout=_NETWORK_PATIENCE_S).close()
            answers.append("yes")
        except HTTPError:
            answers.append("yes")
        except (OSError, ValueError) as error:
            answers.append(
                f"no ({getattr(error, 'reason', error)}); models in the cache still work"
            )

    # Looking up a name cannot be given a limit, but it can be left behind.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_NETWORK_PATIENCE_S)
    return answers[0] if answers else "no (no answer); models in the cache still work"


def _settings_file() -> dict[str, Any]:
    from .settings_file import settings_path

    path = settings_path()
    return {"path": str(path), "exists": path.exists()}


def _shown(name: str, value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes_per_s"):
        return f"{value / 1e9:.2f} GB/s"
    return format_size(value) if name.endswith("_bytes") else str(value)

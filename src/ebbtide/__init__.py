"""Ebbtide: one long-context request on a machine whose memory it exceeds.

    from ebbtide import LLM, Budget

    with LLM.open("path/to/model", budget=Budget(host_memory="6GiB")) as llm:
        print(llm.generate("Once upon a time", max_new_tokens=64).text)

This face only names things. Each name is fetched when it is first asked for, so that `import
ebbtide` is quick and imports no torch; its home is the module in the table below.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Public name -> (module, attribute; None for the module itself).
_HOMES = {
    "LLM": (".offload.llm", "LLM"),
    "Budget": (".offload.budget", "Budget"),
    "GenerationConfig": (".offload.generation", "GenerationConfig"),
    "Output": (".offload.output", "Output"),
    "Piece": (".offload.output", "Piece"),
    "Progress": (".offload.output", "Progress"),
    "Plan": (".offload.plan", "Plan"),
    "Session": (".offload.session", "Session"),
    "errors": (".offload.errors", None),
    "Document": (".offload.document", "Document"),
    "read_document": (".offload.document", "read_document"),
    "demo_material": (".offload.builtin", "demo_material"),
    "default_spill_dir": (".offload.spill_dir", "default_spill_dir"),
    "volume_warnings": (".offload.spill_dir", "volume_warnings"),
    "kernel_backend": (".kernels.dispatch", "backend"),
    "instruction_set": (".kernels.dispatch", "instruction_set"),
    "measure_bandwidth": (".offload.bandwidth", "measure_bandwidth"),
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name in _HOMES:
        module_name, attribute = _HOMES[name]
        module = import_module(module_name, __name__)
        value = module if attribute is None else getattr(module, attribute)
    else:
        raise AttributeError(
            f"module 'ebbtide' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ebbtide")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "0+unknown"

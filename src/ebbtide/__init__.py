"""Ebbtide: one long-context request on a machine whose memory it exceeds.

    from ebbtide import LLM, Budget

    with LLM.open("path/to/model", budget=Budget(host_memory="6GiB")) as llm:
        print(llm.generate("Once upon a time", max_new_tokens=64).text)

This face only names things. Each name is fetched when it is first asked for, so that `import
ebbtide` is quick and imports no torch; its home is the module in the table below.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers see; the table below says the same
    from .kernels.dispatch import backend as kernel_backend
    from .kernels.dispatch import cpu_kernel_fault, gpu_kernel_fault, instruction_set
    from .offload import errors
    from .offload.builtin import demo_material
    from .offload.disk.private_dir import state_dir
    from .offload.disk.scratch import sweep as sweep_scratch
    from .offload.disk.spill_dir import (
        default_spill_dir,
        prefix_dir,
        prefix_files,
        volume_warnings,
        writable_spill_dir,
    )
    from .offload.documents.citations import Citation, CitationChecker
    from .offload.documents.document import Document, join_documents
    from .offload.documents.page_ranges import PageRanges
    from .offload.documents.reading import read_document
    from .offload.documents.split import Part, split_document
    from .offload.llm import LLM
    from .offload.models.hub import local_model
    from .offload.output import Output, Piece, Progress, TextToken, TokenLogprob, ToolCall
    from .offload.planning.bandwidth import measure_disk, measure_memory
    from .offload.planning.budget import (
        Budget,
        format_size,
        parse_cache_size,
        parse_size,
        parse_tier_size,
    )
    from .offload.planning.memory_at_hand import memory_at_hand
    from .offload.planning.plan import Plan
    from .offload.prefixes.texts import kept_texts
    from .offload.running.calibration import Calibration, calibrate
    from .offload.sessions.async_stream import AsyncStream
    from .offload.sessions.generation import GenerationConfig
    from .offload.sessions.session import Session
    from .offload.sessions.stream import Stream

    __version__: str

__all__ = [
    "LLM",
    "AsyncStream",
    "Budget",
    "Calibration",
    "Citation",
    "CitationChecker",
    "Document",
    "GenerationConfig",
    "Output",
    "PageRanges",
    "Part",
    "Piece",
    "Plan",
    "Progress",
    "Session",
    "Stream",
    "TextToken",
    "TokenLogprob",
    "ToolCall",
    "__version__",
    "calibrate",
    "cpu_kernel_fault",
    "default_spill_dir",
    "demo_material",
    "errors",
    "format_size",
    "gpu_kernel_fault",
    "instruction_set",
    "join_documents",
    "kept_texts",
    "kernel_backend",
    "local_model",
    "measure_disk",
    "measure_memory",
    "memory_at_hand",
    "parse_cache_size",
    "parse_size",
    "parse_tier_size",
    "prefix_dir",
    "prefix_files",
    "read_document",
    "split_document",
    "state_dir",
    "sweep_scratch",
    "volume_warnings",
    "writable_spill_dir",
]

# Waiting OpenMP threads sleep. By default they spin, and on a machine whose cores are busy the
# spinning threads starve the ones they wait for: reading a text took 56 s in place of 5. Read when
# torch is first imported; whoever set it keeps their choice.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Public name -> (module, attribute; None for the module itself).
_HOMES = {
    "LLM": (".offload.llm", "LLM"),
    "AsyncStream": (".offload.sessions.async_stream", "AsyncStream"),
    "Budget": (".offload.planning.budget", "Budget"),
    "Calibration": (".offload.running.calibration", "Calibration"),
    "Citation": (".offload.documents.citations", "Citation"),
    "CitationChecker": (".offload.documents.citations", "CitationChecker"),
    "Document": (".offload.documents.document", "Document"),
    "GenerationConfig": (".offload.sessions.generation", "GenerationConfig"),
    "Output": (".offload.output", "Output"),
    "PageRanges": (".offload.documents.page_ranges", "PageRanges"),
    "Part": (".offload.documents.split", "Part"),
    "Piece": (".offload.output", "Piece"),
    "Plan": (".offload.planning.plan", "Plan"),
    "Progress": (".offload.output", "Progress"),
    "Session": (".offload.sessions.session", "Session"),
    "Stream": (".offload.sessions.stream", "Stream"),
    "TextToken": (".offload.output", "TextToken"),
    "TokenLogprob": (".offload.output", "TokenLogprob"),
    "ToolCall": (".offload.output", "ToolCall"),
    "calibrate": (".offload.running.calibration", "calibrate"),
    "cpu_kernel_fault": (".kernels.dispatch", "cpu_kernel_fault"),
    "default_spill_dir": (".offload.disk.spill_dir", "default_spill_dir"),
    "demo_material": (".offload.builtin", "demo_material"),
    "errors": (".offload.errors", None),
    "format_size": (".offload.planning.budget", "format_size"),
    "instruction_set": (".kernels.dispatch", "instruction_set"),
    "join_documents": (".offload.documents.document", "join_documents"),
    "gpu_kernel_fault": (".kernels.dispatch", "gpu_kernel_fault"),
    "kept_texts": (".offload.prefixes.texts", "kept_texts"),
    "local_model": (".offload.models.hub", "local_model"),
    "kernel_backend": (".kernels.dispatch", "backend"),
    "measure_disk": (".offload.planning.bandwidth", "measure_disk"),
    "measure_memory": (".offload.planning.bandwidth", "measure_memory"),
    "memory_at_hand": (".offload.planning.memory_at_hand", "memory_at_hand"),
    "parse_cache_size": (".offload.planning.budget", "parse_cache_size"),
    "parse_size": (".offload.planning.budget", "parse_size"),
    "parse_tier_size": (".offload.planning.budget", "parse_tier_size"),
    "prefix_dir": (".offload.disk.spill_dir", "prefix_dir"),
    "prefix_files": (".offload.disk.spill_dir", "prefix_files"),
    "read_document": (".offload.documents.reading", "read_document"),
    "split_document": (".offload.documents.split", "split_document"),
    "state_dir": (".offload.disk.private_dir", "state_dir"),
    "sweep_scratch": (".offload.disk.scratch", "sweep"),
    "volume_warnings": (".offload.disk.spill_dir", "volume_warnings"),
    "writable_spill_dir": (".offload.disk.spill_dir", "writable_spill_dir"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
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

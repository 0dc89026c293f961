"""The public face: which names it has, and that naming them costs nothing until they are used."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ebbtide

PUBLIC = [
    *(
        "LLM",
        "AsyncStream",
        "Budget",
        "Document",
        "GenerationConfig",
        "Output",
        "Piece",
        "Plan",
        "Progress",
    ),
    *(
        "Session",
        "TextToken",
        "TokenLogprob",
        "ToolCall",
        "__version__",
        "default_spill_dir",
        "demo_material",
        "errors",
        "format_size",
    ),
    *("cpu_kernel_fault", "gpu_kernel_fault", "instruction_set", "kernel_backend"),
    *("measure_disk", "measure_memory", "memory_at_hand"),
    *("parse_cache_size", "parse_size", "parse_tier_size", "prefix_files"),
    *("prefix_dir", "read_document", "state_dir", "sweep_scratch", "volume_warnings"),
    *("kept_texts", "local_model", "writable_spill_dir"),
    *("Citation", "CitationChecker", "PageRanges", "Part", "join_documents", "split_document"),
    *("Calibration", "calibrate"),
]


def test_the_public_names_are_these():
    """Users rely on them: adding one is a decision, taking one away breaks programs."""
    assert sorted(ebbtide.__all__) == sorted(PUBLIC)
    assert {*ebbtide._HOMES, "__version__"} == set(PUBLIC)
    assert set(PUBLIC) <= set(dir(ebbtide))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there(name):
    assert getattr(ebbtide, name) is not None


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match="'LLm'; it has LLM, AsyncStream"):
        ebbtide.LLm  # noqa: B018


def test_type_checkers_see_the_same_names_and_homes():
    tree = ast.parse(Path(ebbtide.__file__).read_text())
    (block,) = [n for n in tree.body if isinstance(n, ast.If)]
    seen = {}
    for node in block.body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                home = (f".{node.module}", alias.name)
                if alias.name == "errors":
                    home = (f".{node.module}.errors", None)
                seen[alias.asname or alias.name] = home
    assert seen == ebbtide._HOMES


def test_errors_are_the_tree_that_the_documentation_draws():
    e = ebbtide.errors
    assert issubclass(e.UnsupportedModel, e.ModelError) and issubclass(
        e.BadCheckpoint, e.ModelError
    )
    kinds = (e.ModelError, e.DoesNotFit, e.ContextOverflow, e.StorageError, e.InputError)
    assert all(issubclass(kind, e.EbbtideError) for kind in kinds)
    assert [kind.exit_code for kind in kinds] == [2, 3, 3, 4, 2]

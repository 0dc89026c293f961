"""The public face: which names it has, and that naming them costs nothing until they are used."""

from __future__ import annotations

import ast
import importlib.util
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
        "Stream",
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


GENERIC = ("dict", "list", "tuple", "set", "Callable", "Sequence", "Mapping", "Iterable")


def public_members():
    """(name, its parts with types) of what public classes have, and of public functions."""
    for module, name in ebbtide._HOMES.values():
        if name is None:
            continue
        found = importlib.util.find_spec(module, "ebbtide")
        for node in ast.parse(Path(found.origin).read_text()).body:
            if getattr(node, "name", None) != name:
                continue
            for member in node.body if isinstance(node, ast.ClassDef) else [node]:
                if isinstance(member, ast.AnnAssign):
                    yield f"{name}.{ast.unparse(member.target)}", [member.annotation]
                elif isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                    if not member.name.startswith("_"):
                        yield f"{name}.{member.name}", [*_types_of(member)]


def _types_of(function):
    arguments = [node for node in ast.walk(function.args) if isinstance(node, ast.arg)]
    yield from (node.annotation for node in arguments if node.arg not in ("self", "cls"))
    if function.returns is not None:
        yield function.returns


def _says_all(type) -> bool:
    """Whether there is a type, and each generic one in it says of what it is."""
    if type is None:
        return False
    said = {id(node.value) for node in ast.walk(type) if isinstance(node, ast.Subscript)}
    names = [node for node in ast.walk(type) if isinstance(node, ast.Name)]
    return all(id(node) in said for node in names if node.id in GENERIC)


def test_what_users_call_and_get_has_whole_types():
    """Else it is unknown to type checkers in a user's program, and so is all that comes from it."""
    found = list(public_members())
    assert len(found) > 150
    assert [name for name, types in found if not all(map(_says_all, types))] == []

"""What tells readers where things are: each folder's `__init__` names the files beside it, and the
pages name files and headings that exist.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
FOLDERS = sorted(
    init.parent.relative_to(REPO).as_posix()
    for room in ("cli", "kernels", "offload", "prefetch")
    for init in (REPO / room).rglob("__init__.py")
)


def named_in(contents: str) -> set[str]:
    """The words that could be names of files, in any line."""
    return set(re.findall(r"[a-z_][a-z0-9_]*", contents))


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_is_in_the_table_of_contents(folder):
    init = REPO / folder / "__init__.py"
    contents = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
    files = {file.stem for file in init.parent.glob("*.py")} - {"__init__"}
    folders = {inner.parent.name for inner in init.parent.glob("*/__init__.py")}
    missing = (files | folders) - named_in(contents)
    assert not missing, f"{init} does not name {sorted(missing)}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_entry_is_of_a_file_that_is_gone(folder):
    init = REPO / folder / "__init__.py"
    contents = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
    # An entry is a line's first word, if two blanks part it from what is said of it.
    entries = re.findall(r"^ *([a-z_]\w*)/?  ", contents, re.MULTILINE)
    names = {path.stem for path in init.parent.iterdir()}
    assert not [entry for entry in entries if entry not in names]


# The log tells of what was tried, scripts that are gone among it.
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (REPO / "docs").glob("*.md"))]
PAGES += ["benchmarks/README.md"]


@pytest.mark.parametrize("page", sorted({*PAGES} - {"docs/log.md"}))
def test_files_that_a_page_names_exist(page):
    text = (REPO / page).read_text(encoding="utf-8")
    paths = set(
        re.findall(r"\b(?:benchmarks|cli|kernels|offload|prefetch|tests)/[a-z0-9_/]+\.\w+", text)
    )
    links = set(re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text))
    missing = {path for path in paths if not (REPO / path).exists()}
    missing |= {link for link in links if not ((REPO / page).parent / link).exists()}
    assert not missing


def anchors(text: str) -> set[str]:
    """What GitHub makes of headings, to be linked to."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_headings_that_a_page_links_to_exist(page):
    text = (REPO / page).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]*)\)", text):
        other = text if not target else ((REPO / page).parent / target).read_text(encoding="utf-8")
        assert anchor in anchors(other), f"{target}#{anchor}"


def test_every_benchmark_is_in_their_table_of_contents():
    folder = REPO / "benchmarks"
    contents = (folder / "README.md").read_text(encoding="utf-8")
    scripts = {script.name for script in folder.glob("*.py")}
    assert not [name for name in sorted(scripts) if name not in contents]

"""`ebbtide config`: which settings hold, and where each of them came from."""

from __future__ import annotations

from typing import Annotated

import typer

from ebbtide import format_size

from .options import ANSWER_PANEL, SHARED
from .run import Run
from .settings_file import settings_path
from .shared_options import with_shared_options

EPILOG = """Examples:

ebbtide config show --origin

EBBTIDE_HOST_MEMORY=6GiB ebbtide config show --origin --json

echo 'kv-bits = 8' >> "$(ebbtide config path)"

The file is TOML. Its keys are the names of the shared options; a table such as \\[chat] holds what
one command alone has."""


@with_shared_options
def path(run: Run) -> None:
    """Print where your settings file is looked for."""
    found = settings_path()
    if run.terminal.as_json:
        run.terminal.result({"schema": 1, "path": str(found), "exists": found.exists()})
    else:
        run.terminal.answer(f"{found}\n")


@with_shared_options
def show(
    run: Run,
    origin: Annotated[
        bool, typer.Option("--origin", metavar="", help="Also say where each value came from.")
    ] = False,
) -> None:
    """Show every shared option and its value."""
    rows = []
    for option in SHARED:
        value = getattr(run.settings, option.name)
        where = run.settings.origins[option.name]
        if where == "default" and option.panel == ANSWER_PANEL and value is None:
            where = "the model's, or the default"
        rows.append((option.key, value, where))
    if run.terminal.as_json:
        entries = {
            key: {"value": value, "origin": where} if origin else value
            for key, value, where in rows
        }
        run.terminal.result({"schema": 1, "path": str(settings_path()), "options": entries})
        return
    path = settings_path()
    run.terminal.note(f"settings file: {path}" + ("" if path.exists() else " (there is none)"))
    width = max(len(key) for key, _, _ in rows)
    for key, value, where in rows:
        line = f"{key:<{width}}  {_shown(key, value)}"
        if origin:
            line = f"{line:<{width + 22}}  {where}"
        run.terminal.answer(line.rstrip() + "\n")


def _shown(key: str, value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("-memory") and isinstance(value, int):
        return format_size(value) if value else "0"
    return ", ".join(map(repr, value)) if isinstance(value, list) else str(value)

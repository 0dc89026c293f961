"""`ebbtide config`: which settings hold, and where each of them came from."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from .options import ANSWER_PANEL, SHARED
from .run import Run
from .settings_file import own_options, read_settings, settings_path
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
        bool, typer.Option("--origin", help="Also say where each value came from.")
    ] = False,
) -> None:
    """Show every shared option, and what is set of those that one command alone has."""
    rows: list[tuple[str, str, Any, str]] = []  # (key, what is shown, value, origin)
    for option in SHARED:
        value = getattr(run.settings, option.name)
        where = run.settings.origins[option.name]
        if where == "default" and option.panel == ANSWER_PANEL and value is None:
            where = "the model's, or the default"
        rows.append((option.key, "-" if value is None else option.shown(value), value, where))
    own = _own_settings()
    if run.terminal.as_json:
        found: dict[str, Any] = {"schema": 1, "path": str(settings_path()), "options": {}}
        for key, _, value, where in rows:
            found["options"][key] = {"value": value, "origin": where} if origin else value
        found["commands"] = {command: {} for command, *_ in own}
        for command, key, value, where in own:
            entry = {"value": value, "origin": where} if origin else value
            found["commands"][command][key] = entry
        run.terminal.result(found)
        return
    path = settings_path()
    run.terminal.note(f"settings file: {path}" + ("" if path.exists() else " (there is none)"))
    for command, key, value, where in own:
        text = str(value).lower() if isinstance(value, bool) else " ".join(value.split())
        rows.append((f"{command}.{key}", text, value, where))
    width = max(len(key) for key, *_ in rows)
    for key, shown, _, where in rows:
        line = f"{key:<{width}}  {shown}"
        if origin:
            line = f"{line:<{width + 22}}  {where}"
        run.terminal.answer(line.rstrip() + "\n")


def _own_settings() -> list[tuple[str, str, Any, str]]:
    """What the environment and the file set of options that one command alone has, as it is
    written there: (command, key, value, origin). No key is shown. Raises typer.BadParameter for
    what the command does not take."""
    from .app import build_command  # which imports this

    path, found, root = settings_path(), [], build_command()
    own = own_options(root)
    _, in_file = read_settings(path, own)
    told = SimpleNamespace(settings_path=path)
    parent = typer.Context(root, info_name="ebbtide", obj=told, default_map=in_file)
    for command, names in own.items():
        root.commands[command].make_context(command, [], parent)  # which looks at all of them
        for name in names:
            key, variable = name.replace("_", "-"), f"EBBTIDE_{name.upper()}"
            if text := os.environ.get(variable):
                value, where = text, variable
            elif name in in_file.get(command, {}):
                value, where = in_file[command][name], f"{key} in [{command}] of {path}"
            else:
                continue
            found.append((command, key, "(hidden)" if name == "api_key" else value, where))
    return found

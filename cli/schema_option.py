"""`--json-schema`: of the commands that give one answer, or several of one kind."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ebbtide import errors

JsonSchemaOption = Annotated[
    str | None,
    typer.Option(
        "--json-schema",
        metavar="FILE|JSON",
        show_default=False,
        help="Keep the answer to a JSON schema: a file, or the schema itself.",
    ),
]

_MOST_CHARS = 1 << 20  # of a file: white space makes it longer than what counts


def checked_json_schema(given: str | None) -> dict[str, str]:
    """What was given as a generation option; nothing for None. Raises typer.BadParameter, and
    InputError where the library is missing."""
    if given is None:
        return {}
    from ebbtide import GenerationConfig

    if not given.strip():
        raise typer.BadParameter("it is empty", param_hint="--json-schema")
    is_text = given.lstrip().startswith("{")
    try:
        text = given if is_text else _text_of(Path(given).expanduser())
        GenerationConfig(json_schema=text)
    except (OSError, ValueError) as error:  # InputError among them
        what = str(error) if is_text else f"{given}: {getattr(error, 'strerror', None) or error}"
        raise typer.BadParameter(what, param_hint="--json-schema") from None
    if find_spec("llguidance") is None:
        raise errors.InputError(
            "--json-schema needs llguidance: pip install 'ebbtide[structured]'."
        )
    return {"json_schema": text}


def _text_of(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        text = file.read(_MOST_CHARS + 1)
    if len(text) > _MOST_CHARS:
        raise ValueError(f"it has more than {_MOST_CHARS:,} characters, too many for a schema")
    return text

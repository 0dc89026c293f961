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


def checked_json_schema(given: str | None) -> dict[str, str]:
    """What was given as a generation option; nothing for None. Raises typer.BadParameter, and
    InputError where the library is missing."""
    if given is None:
        return {}
    from ebbtide import GenerationConfig

    is_text = given.lstrip().startswith("{")
    try:
        text = given if is_text else Path(given).expanduser().read_text(encoding="utf-8")
        GenerationConfig(json_schema=text)
    except (OSError, ValueError) as error:  # InputError among them
        what = str(error) if is_text else f"{given}: {getattr(error, 'strerror', None) or error}"
        raise typer.BadParameter(what, param_hint="--json-schema") from None
    if find_spec("llguidance") is None:
        raise errors.InputError(
            "--json-schema needs llguidance: pip install 'ebbtide[structured]'."
        )
    return {"json_schema": text}

"""`ebbtide plan`: what would lie where, and how fast it would go, before anything is loaded."""

from __future__ import annotations

from typing import Annotated

import typer

from .run import Run
from .shared_options import with_shared_options

EPILOG = """Examples:

ebbtide plan Qwen/Qwen2.5-7B-Instruct --context 131072

ebbtide plan ./model --host-memory 6GiB --json"""

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="A folder, a GGUF file or a Hugging Face id.", show_default=False
    ),
]


@with_shared_options
def plan(run: Run, model_argument: ModelArgument = None) -> None:
    """Show what would lie where, and how fast it would go; loads no weights."""
    run.choose_model(model_argument)
    found = run.plan()
    if run.terminal.as_json:
        run.terminal.result({"schema": 1, **found.to_dict()})
    else:
        run.terminal.answer(str(found))
        run.terminal.end_answer()

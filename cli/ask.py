"""`ebbtide ask`: a question about documents that are read whole."""

from __future__ import annotations

from typing import Annotated

import typer

from . import values
from .documents import join_documents, read_documents
from .run import Run
from .shared_options import with_shared_options

_MAX_NEW_TOKENS = 512

EPILOG = """Examples:

ebbtide ask "Who signed the contract?" contract.txt

ebbtide ask -m ./qwen --host-memory 6GiB "What changed?" old.md new.md

pdftotext -layout thesis.pdf - | ebbtide ask "What is the main claim?" """


@with_shared_options
def ask(
    run: Run,
    question: Annotated[str, typer.Argument(metavar="QUESTION", show_default=False)],
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE", help="Documents; none or - is standard input.", show_default=False
        ),
    ] = None,
) -> None:
    """Ask a question about documents, read whole in one context."""
    try:
        question = values.plain(question)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="QUESTION") from None
    run.expect_answer()
    documents = read_documents(files or [], run.terminal)
    prompt = [{"role": "user", "content": join_documents(documents, question)}]
    with run.open_llm() as llm:
        output = run.answer(llm, prompt, run.generation(max_new_tokens=_MAX_NEW_TOKENS))
        run.terminal.end_answer()
        run.finish(llm, output)

"""`ebbtide summarize`: a summary of documents that are read whole."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Annotated

import typer

from ebbtide import errors

from . import values
from .documents import join_documents, read_documents
from .output_file import OutputFile
from .run import Run
from .shared_options import with_shared_options

EPILOG = """Examples:

ebbtide summarize thesis.txt -m Qwen/Qwen2.5-1.5B-Instruct

pdftotext -layout thesis.pdf - | ebbtide summarize -o summary.md

ebbtide summarize --length short -o notes.md chapter1.md chapter2.md"""

# Words that are asked for, and the tokens at which an answer that does not end is cut: about three
# times as many.
_LENGTHS = {"short": (100, 384), "medium": (300, 1024), "long": (800, 2560)}
# The one instruction that the built-in model was taught.
_BUILTIN_INSTRUCTION = "Summarize the document."


def instruction(length: str, builtin: bool, several: bool) -> str:
    """What the model is asked to do after the documents."""
    if builtin:
        return _BUILTIN_INSTRUCTION
    num_words = _LENGTHS[length][0]
    what = "the documents above together, in one summary" if several else "the document above"
    return (
        f"Summarize {what}, in about {num_words} words. "
        "Cover the main points from beginning to end, keep names and numbers exact, and add "
        "nothing that the text does not say. Answer with the summary alone."
    )


@with_shared_options
def summarize(
    run: Run,
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE", help="Documents; none or - is standard input.", show_default=False
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="Write the summary to this file.",
            show_default=False,
        ),
    ] = None,
    length: Annotated[
        str,
        typer.Option(
            "--length",
            metavar="LENGTH",
            envvar="EBBTIDE_LENGTH",
            show_default=False,
            help="short, medium or long: about 100, 300 or 800 words. Default: medium.",
        ),
    ] = "medium",
) -> None:
    """Summarize documents, read whole in one context."""
    try:
        length = values.choice(*_LENGTHS)(length)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--length") from None
    files = files or ["-"]
    run.expect_answer()
    _refuse_to_overwrite_input(files, output)
    with OutputFile(output) if output else nullcontext() as out:
        documents = read_documents(files, run.terminal)
        with run.open_llm() as llm:
            text = join_documents(documents, instruction(length, llm.builtin, len(documents) > 1))
            prompt = [{"role": "user", "content": text}]
            options = run.generation(max_new_tokens=_LENGTHS[length][1])
            try:
                result = run.answer(llm, prompt, options, show=out is None)
            except KeyboardInterrupt:
                if out is not None:
                    # The file stays as it was; what was written so far is not lost.
                    run.terminal.answer(run.when_cancelled["text"])
                raise
            run.terminal.end_answer()
            if out is not None:
                out.commit(result.text.rstrip("\n") + "\n")
                run.terminal.note(f"Wrote {output}.")
            run.finish(llm, result)


def _refuse_to_overwrite_input(files: list[str], output: str | None) -> None:
    for file in files:
        if output and file != "-" and os.path.exists(file) and os.path.exists(output):
            if os.path.samefile(file, output) and os.path.isfile(output):
                raise errors.InputError(f"{output} is one of the documents; choose another -o.")

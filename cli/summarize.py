"""`ebbtide summarize`: a summary of documents that are read whole, or in parts where asked to."""

from __future__ import annotations

import json
import os
import re
from contextlib import nullcontext
from typing import Annotated, Any

import typer

from ebbtide import errors

from . import values
from .documents import FilesArgument, PagesOption, read_documents
from .job import Job, job_key
from .output_file import OutputFile
from .recorder import Recorder
from .report_file import ReportOption, report_file, write_run_report
from .run import Run
from .schema_option import JsonSchemaOption, checked_json_schema
from .shared_options import checked, with_shared_options
from .summary import Summary, cites
from .summary_task import LENGTHS
from .summary_text import FORMATS

_FEWEST_WORDS = 10
_FORMAT, _WHEN = values.choice(*FORMATS), values.choice("auto", "on", "off")

EPILOG = """Examples:

ebbtide summarize thesis.pdf -m Qwen/Qwen2.5-1.5B-Instruct -o summary.md

ebbtide summarize thesis.pdf --pages 10-40 --length short --dry-run

ebbtide summarize book.epub --overflow map-reduce --prompt "List every person and what they want."

ebbtide summarize thesis.pdf --json-schema claims.json | jq .claims

ebbtide summarize report.docx --extract-only | less

ebbtide summarize thesis.pdf -o summary.md --report run.html      a page with charts of the run

A run that was interrupted goes on where it was when the same command is given again."""


def _num_words(length: str) -> int:
    word = length.strip().lower()
    if word in LENGTHS:
        return LENGTHS[word]
    given = re.fullmatch(r"([0-9]{1,6})w", word, re.ASCII)
    if given is None or int(given[1]) < _FEWEST_WORDS:
        raise ValueError(
            f"{length!r} is not allowed; choose from {', '.join(LENGTHS)}, or give a number of "
            f"words such as 250w ({_FEWEST_WORDS} or more)"
        )
    return int(given[1])


@with_shared_options
def summarize(
    run: Run,
    files: FilesArgument = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="Write the summary to this file; -: to standard output.",
            show_default=False,
        ),
    ] = None,
    length: Annotated[
        str,
        typer.Option(
            "--length",
            metavar="LENGTH",
            envvar="EBBTIDE_LENGTH",
            callback=checked(_num_words),
            show_default=False,
            help="short, medium or long: about 100, 300 or 800 words; or 250w. Default: medium.",
        ),
    ] = "medium",
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            metavar="TEXT",
            envvar="EBBTIDE_PROMPT",
            callback=checked(values.plain),
            show_default=False,
            help="What to do with the documents, in place of a plain summary.",
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            envvar="EBBTIDE_FORMAT",
            callback=checked(_FORMAT),
            show_default=False,
            help="md, txt, or json (the summary with its citations and sources). Default: md.",
        ),
    ] = "md",
    cite: Annotated[
        str,
        typer.Option(
            "--cite",
            metavar="WHEN",
            envvar="EBBTIDE_CITE",
            callback=checked(_WHEN),
            show_default=False,
            help="auto (documents with pages, slides, sheets or chapters), on or off: citations "
            "such as \\[p. 12], their quoted words checked. Default: auto.",
        ),
    ] = "auto",
    json_schema: JsonSchemaOption = None,
    pages: PagesOption = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what it would take, and do nothing."),
    ] = False,
    extract_only: Annotated[
        bool,
        typer.Option("--extract-only", help="Print the documents' text; no model is used."),
    ] = False,
    report: ReportOption = None,
) -> None:
    """Summarize documents, read whole in one context."""
    words = _num_words(length)
    format, cite = _FORMAT(format), _WHEN(cite)
    if dry_run and extract_only:
        raise typer.BadParameter("--dry-run and --extract-only exclude each other")
    schema = checked_json_schema(json_schema).get("json_schema")
    if schema is not None and not extract_only:
        cite = _cite_nothing(format, cite)
    files = files or ["-"]
    output = None if output == "-" else output  # standard output, as where none is named
    if output and report and os.path.realpath(output) == os.path.realpath(report):
        raise typer.BadParameter(
            f"{report!r} is where -o writes the summary; name another file", param_hint="--report"
        )
    run.expect_answer()
    _refuse_to_overwrite_input(files, output)
    _refuse_to_overwrite_input(files, report)
    opened = nullcontext() if output is None or dry_run else OutputFile(output)
    with opened as out, report_file(None if dry_run or extract_only else report) as page:
        if extract_only:
            _extract(run, files, pages, format, cite, out)
            return
        texts = Job("text-" + job_key([os.path.abspath(f) for f in files]), run.terminal)
        documents = read_documents(
            files,
            run.terminal,
            pages=pages,
            keep_in=None if dry_run else texts.folder,
            check=run.signals.check,
        )
        with run.open_llm() as llm:
            asked = (words, prompt, format, cite)
            summary = Summary(run, llm, documents, *asked, json_schema=schema, keeps=not dry_run)
            if dry_run:
                summary.print_plan()
                return
            summary.note_plan()
            run.recorder = Recorder() if page is not None else None
            fields = summary.write(out)
            if page is not None:
                write_run_report(page, run, "Summary of ", documents, fields)
        texts.finish()


def _extract(
    run: Run, files: list[str], pages: str | None, format: str, cite: str, out: Any
) -> None:
    """The text a model would read, with the marks it would see."""
    import ebbtide

    documents = read_documents(files, run.terminal, pages=pages)
    as_object = {"schema": 1, "documents": [document.to_dict() for document in documents]}
    if format == "json":
        text = json.dumps(as_object, ensure_ascii=False, indent=2)
    else:
        document = ebbtide.join_documents(documents)
        text = document.piece(marked=cites(document, cite)).rstrip("\n")
    if out is not None:
        out.commit(text + "\n")
        run.terminal.note(f"Wrote {out.path.name}.")
    elif not run.terminal.as_json:
        run.terminal.answer(text + "\n")
    if run.terminal.as_json:
        run.terminal.result(as_object)


def _cite_nothing(format: str, cite: str) -> str:
    """What --cite says where there is a schema: citations and plain text change what was written,
    which would be no value of it any more."""
    if cite == "on":
        raise typer.BadParameter(
            "on writes into the answer, which --json-schema keeps as it is; leave one of them out",
            param_hint="--cite",
        )
    if format == "txt":
        raise typer.BadParameter(
            "txt changes the answer, which --json-schema keeps as it is: it is md (the value "
            "alone) or json (with sources and usage)",
            param_hint="--format",
        )
    return "off"


def _refuse_to_overwrite_input(files: list[str], output: str | None) -> None:
    for file in files:
        if output and file != "-" and os.path.exists(file) and os.path.exists(output):
            if os.path.samefile(file, output) and os.path.isfile(output):
                raise errors.InputError(f"{output} is one of the documents; choose another file.")

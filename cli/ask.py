"""`ebbtide ask`: questions about documents that are read whole."""

from __future__ import annotations

import os
import time
from typing import Annotated, Any

import typer

from ebbtide import errors

from . import speeds, values
from .answer import blank_fields, output_fields, summed_usage
from .documents import (
    FilesArgument,
    PagesOption,
    join_documents,
    read_documents,
    refuse_too_long,
)
from .progress import ProgressDisplay
from .run import Run
from .schema_option import JsonSchemaOption, checked_json_schema
from .shared_options import parsed, with_shared_options

_MAX_NEW_TOKENS = 512
# What a question's template and the ends of cells may take beyond the tokens that are counted.
_SPARE_TOKENS = 64

EPILOG = """Examples:

ebbtide ask "Who signed the contract?" contract.pdf

ebbtide ask -m ./qwen --host-memory 6GiB "What changed?" old.md new.docx

ebbtide ask -Q "Who wrote it?" -Q "When?" -Q "For whom?" thesis.pdf --pages 1-40

ebbtide ask --json-schema '{"type": "object", "properties": {"year": {"type": "integer"}}}'
"When was it built?" house.pdf

curl -s https://example.org | ebbtide ask "What is this about?" """


@with_shared_options
def ask(
    run: Run,
    question: Annotated[
        str | None,
        typer.Argument(metavar="QUESTION", help="Left out where -Q is given.", show_default=False),
    ] = None,
    files: FilesArgument = None,
    questions: Annotated[
        list[str] | None,
        typer.Option(
            "--question",
            "-Q",
            metavar="TEXT",
            show_default=False,
            help="A question; may be repeated. The documents are read once for all of them.",
        ),
    ] = None,
    pages: PagesOption = None,
    json_schema: JsonSchemaOption = None,
) -> None:
    """Ask questions about documents, read whole in one context."""
    if questions:  # as grep does with -e: what stands alone is a file
        files = [*([question] if question is not None else []), *(files or [])]
    elif question is None:
        raise typer.BadParameter(
            "there is none; give one, or several with -Q", param_hint="QUESTION"
        )
    elif (
        files and os.path.isfile(question) and not any(f == "-" or os.path.exists(f) for f in files)
    ):
        raise typer.BadParameter(
            f"{question} is a file and {files[0]} is none: the question comes before its files",
            param_hint="QUESTION",
        )
    elif not files and os.path.isfile(question):
        raise typer.BadParameter(
            f'{question} is a file: put a question before it, as in: ebbtide ask "..." {question}',
            param_hint="QUESTION",
        )
    asked = [parsed(values.plain, text or "", "QUESTION") for text in questions or [question]]
    options = run.generation(max_new_tokens=_MAX_NEW_TOKENS) | checked_json_schema(json_schema)
    run.expect_answer()
    documents = read_documents(files or [], run.terminal, pages=pages)
    told = [warning for document in documents for warning in document.warnings]
    with run.open_llm() as llm:
        refuse_too_long(llm, documents)
        if len(asked) == 1:
            output = run.answer(llm, _prompt(documents, asked[0]), options)
            run.terminal.end_answer()
            run.finish(llm, output, told)
            speeds.remember(llm, run.settings, [output_fields(llm, output)])
        else:
            _ask_all(run, llm, documents, asked, options, told)


def _ask_all(
    run: Run,
    llm: Any,
    documents: list[Any],
    asked: list[str],
    options: dict[str, Any],
    told: list[str],
) -> None:
    """Each question goes to a fork of a session that has read the documents: its pages serve all.

    With --json: the object of one answer, its text all answers and its numbers their sums, and
    "answers" with the object of each; those that were whole are in an error's too.
    """
    found = []
    began_s = time.monotonic()
    with _read(run, llm, documents, asked, options) as session:
        restored = session.take_restored()
        run.tell_restored(restored)
        read = {
            "tokens": session.num_processed - restored,
            "seconds": time.monotonic() - began_s,
        }
        for question in asked:
            run.terminal.note(f"Q: {question}")
            title = f"question {len(found) + 1} of {len(asked)}"
            try:
                prompt = _prompt(documents, question)
                with session.fork() as branch:
                    output = run.answer(llm, prompt, options, source=branch, title=title)
            except errors.EbbtideError as error:
                vars(error)["answers"] = found
                raise
            run.terminal.end_answer()
            run.tell_end(output)
            found.append({"question": question, **output_fields(llm, output)})
    if run.terminal.as_json:
        run.terminal.result(_together(found, told, read))


def _prompt(documents: list[Any], question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": join_documents(documents, question)}]


def _read(run: Run, llm: Any, documents: list[Any], asked: list[str], options: dict) -> Any:
    """A session that holds the documents, read as far as whole cells go."""
    context = run.settings.context
    if context is None:
        most = max(llm.count_tokens(_prompt(documents, question)) for question in asked)
        context = most + options["max_new_tokens"] + _SPARE_TOKENS
        limit = llm.plan.model_context
        context = max(min(context, limit), most + 1)
    if "json_schema" in options:
        llm.expect_schemas()
    session = llm.session(context=context)
    with ProgressDisplay(run.terminal, run.signals.check) as progress:
        llm.on_progress = progress
        try:
            session.append(
                [{"role": "user", "content": join_documents(documents, "").rstrip("\n")}],
                think=options.get("think"),
            )
        except BaseException:
            session.close()
            raise
        finally:
            llm.on_progress = None
    return session


def _together(found: list[dict[str, Any]], told: list[str], read: dict) -> dict[str, Any]:
    """read: what was read for all questions, before the first; counted once and not as cached."""
    own = ("question", "thought")
    fields = {key: value for key, value in found[-1].items() if key not in own}
    thoughts = [answer["thought"] for answer in found if "thought" in answer]
    usage = summed_usage(found, blank_fields(None)["usage"])
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    cached -= min(cached, read["tokens"])
    prefill_s = read["seconds"] + sum(answer["timings"]["prefill_s"] for answer in found)
    decode_s = sum(answer["timings"]["decode_s"] for answer in found)
    timings = {
        "load_s": fields["timings"]["load_s"],
        "prefill_s": prefill_s,
        "ttft_s": read["seconds"] + found[0]["timings"]["ttft_s"],
        "decode_s": decode_s,
        "prefill_tokens_per_s": (usage["prompt_tokens"] - cached) / max(prefill_s, 1e-9),
        "decode_tokens_per_s": usage["completion_tokens"] / max(decode_s, 1e-9),
    }
    reasons = {answer["finish_reason"] for answer in found}
    warnings = dict.fromkeys([*told, *(w for answer in found for w in answer["warnings"])])
    return {
        **fields,
        "text": "\n".join(answer["text"] for answer in found),
        "token_ids": [token for answer in found for token in answer["token_ids"]],
        "finish_reason": reasons.pop() if len(reasons) == 1 else "length",
        "usage": {**usage, "prompt_tokens_details": {"cached_tokens": cached}},
        "timings": timings,
        "warnings": list(warnings),
        "answers": found,
        **({"thought": "\n".join(thoughts)} if thoughts else {}),
    }

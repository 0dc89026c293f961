"""`ebbtide chat`: one answer with -p or piped input, else a conversation."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated, Any

import typer

from ebbtide import errors

from . import values
from .answer import is_blank
from .conversation import Conversation, latest_name
from .dialogue import Dialogue, open_session
from .documents import waiting_for_input
from .plan import ModelArgument
from .run import Run
from .schema_option import JsonSchemaOption, checked_json_schema
from .shared_options import checked, parsed, with_shared_options

_PLENTY_BYTES = 1 << 29  # of standard input: more than is taken, which is said then

EPILOG = """Examples:

ebbtide chat Qwen/Qwen2.5-1.5B-Instruct

ebbtide chat -c                                  go on with the last conversation

ebbtide chat ./model --session trip              one with a name, kept on disk

ebbtide chat -m ./model -p "Name three rivers."

cat notes.md | ebbtide chat -p "Turn these notes into a letter."

In a conversation, /help lists what else can be said: /read FILE, /mem, /undo, /save and more."""


@with_shared_options
def chat(
    run: Run,
    model_argument: ModelArgument = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="Answer this, after any piped input, and exit.",
            show_default=False,
        ),
    ] = None,
    json_schema: JsonSchemaOption = None,
    system: Annotated[
        str | None,
        typer.Option(
            "--system",
            metavar="TEXT",
            envvar="EBBTIDE_SYSTEM",
            callback=checked(values.unbroken),
            help="The system message.",
            show_default=False,
        ),
    ] = None,
    session: Annotated[
        str | None,
        typer.Option(
            "--session",
            metavar="NAME",
            help="Keep the conversation on disk under this name, or resume it.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--continue", "-c", help="Go on with the last conversation."),
    ] = False,
    history: Annotated[
        bool,
        typer.Option(
            "--history/--no-history",
            envvar="EBBTIDE_HISTORY",
            show_default=False,
            help="Keep the lines you type, the last conversation for --continue, and the pages of "
            "what is read.",
        ),
    ] = True,
) -> None:
    """Chat with a model in the terminal."""
    run.choose_model(model_argument)
    parsed(values.unbroken, prompt or "", "--prompt")
    if resume and session is not None:
        raise typer.BadParameter(
            f"goes on with the last conversation, and --session names {session!r}; give one",
            param_hint="--continue",
        )
    if prompt is None and sys.stdin is None:
        raise errors.InputError("There is no standard input to read; give -p TEXT.")
    piped = sys.stdin is not None and not sys.stdin.isatty()
    if json_schema is not None and prompt is None and not piped:
        raise typer.BadParameter(
            "a conversation keeps to no schema; add -p TEXT or pipe a question",
            param_hint="--json-schema",
        )
    options = run.generation() | checked_json_schema(json_schema)
    conversation = _open_conversation(run, session, resume)
    if system is not None:
        conversation.system = system
    changes = {} if history else {"prefix_cache": 0}  # of what LLM.open is told
    if prompt is not None or piped:
        _answer_once(run, conversation, _one_message(run, prompt, piped), options, changes)
        return
    if run.terminal.as_json:
        raise typer.BadParameter(
            "a conversation cannot be one object; add -p TEXT or pipe a question",
            param_hint="--json",
        )
    with run.open_llm(**changes) as llm:
        Dialogue(run, llm, conversation, remember=history).talk()


def _open_conversation(run: Run, session: str | None, resume: bool) -> Conversation:
    """The conversation to go on with; a resumed one brings its model, unless another was chosen."""
    if session is None and not resume:
        return Conversation(model=_lasting(run.settings.model))
    conversation = Conversation.load(latest_name() if session is None else session)
    if conversation.turns:
        run.terminal.note(
            f"Resuming {conversation.name!r} with {len(conversation.turns)} messages; "
            "what is not kept of their pages is read again."
        )
    if run.settings.model is None and conversation.model is not None:
        run.choose_model(conversation.model)
    conversation.model = _lasting(run.settings.model)
    return conversation


def _lasting(model: str | None) -> str | None:
    """A folder's or file's name that holds wherever the conversation is resumed."""
    return os.path.abspath(model) if model is not None and os.path.exists(model) else model


def _one_message(run: Run, prompt: str | None, piped: bool) -> str:
    """Piped input first, then TEXT."""
    parts = []
    if piped:
        with waiting_for_input(run.terminal):
            data = sys.stdin.buffer.read(_PLENTY_BYTES)
        if data.strip():
            import ebbtide

            parts.append(ebbtide.read_document("-", io.BytesIO(data)).text.strip("\n"))
    message = "\n\n".join(part for part in [*parts, prompt or ""] if part.strip())
    if not message:
        empty = "standard input is empty. Give -p TEXT." if prompt is None else "-p is empty."
        raise errors.InputError(f"There is nothing to answer: {empty}")
    return message


def _answer_once(
    run: Run,
    conversation: Conversation,
    message: str,
    options: dict[str, Any],
    changes: dict[str, Any],
) -> None:
    run.expect_answer()
    conversation.add("user", message)
    with run.open_llm(**changes) as llm:
        source = None
        if conversation.name is not None:
            if "json_schema" in options:
                llm.expect_schemas()
            source = open_session(run, llm, conversation)
        output = run.answer(llm, conversation.messages, options, source=source)
        run.terminal.end_answer()
        try:
            if not is_blank(output):  # else it is as if nothing had been asked
                conversation.add("assistant", output.text)
                conversation.save()
        finally:  # an answer that cannot be kept is told all the same
            run.finish(llm, output)

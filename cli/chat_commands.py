"""What can be said to a chat besides messages: the /commands, in one table.

Each takes the Dialogue and the rest of its line, and raises an Ebbtide error for what it cannot do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ebbtide import errors

from .answer import summary_line
from .conversation import Conversation, free_name, kept_conversations, session_path
from .documents import read_documents
from .memory_view import checked_mass, memory_table
from .options import ANSWER_PANEL, SHARED
from .values import show_duration

if TYPE_CHECKING:
    from .dialogue import Dialogue

_ANSWER_OPTIONS = {option.key: option for option in SHARED if option.panel == ANSWER_PANEL}
_COMPACT = (
    "Summarise our conversation so far, so that you could go on with it from the summary alone. "
    "Keep names, numbers, decisions and open questions."
)
_KEYS = '''Enter sends, Alt-Enter adds a line, Tab completes; a pasted text stays one message.
"""              begins and ends a text of several lines, or one that looks like a command
Ctrl-C           stops an answer, a reading, or (again) the chat'''


class Leave:
    """What /exit returns."""


@dataclass(frozen=True)
class Command:
    """do: called with the dialogue and the text after the command's name. takes: what Tab offers
    after it. usage: None where another command is the same.
    """

    do: Callable[[Dialogue, str], Any]
    usage: str | None
    help: str = ""
    takes: str = ""


def _help(d: Dialogue, rest: str) -> None:
    shown = [command for command in COMMANDS.values() if command.usage is not None]
    lines = [f"{command.usage:<16} {command.help}" for command in shown]
    d.run.terminal.tell("\n".join([*lines, _KEYS]))


def _exit(d: Dialogue, rest: str) -> Any:
    return Leave


# --- turns


def _clear(d: Dialogue, rest: str) -> None:
    d.stop_reading()
    d.conversation.clear()
    d.documents, d.asked, d.dropped = [], [], None
    if d.session.is_open:  # else the next answer opens another
        d.session.truncate(0)
    d.run.terminal.note("Forgotten.")


def _regen(d: Dialogue, rest: str) -> None:
    before = d.conversation.pop_answer()
    if before is None:
        raise errors.InputError("there is no answer to give again.")
    if not d.answer():
        d.conversation.add("assistant", before)


def _retry(d: Dialogue, rest: str) -> None:
    if d.dropped is not None:
        d.ask(d.dropped)
    else:
        _regen(d, rest)


def _undo(d: Dialogue, rest: str) -> None:
    d.take_back()
    d.keep()
    names = ", ".join(document.name for document in d.documents)
    d.run.terminal.note(
        "Took back the last question and its answer."
        + (f" {names} will go with your next message." if names else "")
    )


def _edit(d: Dialogue, rest: str) -> None:
    import click

    before = d.last_question()
    try:
        text = click.edit(before, extension=".md")
    except click.ClickException as error:
        raise errors.InputError(f"{error.message}; $EDITOR names the editor") from None
    if text is None or not text.strip() or text.strip() == before.strip():
        d.run.terminal.note("Nothing was changed, so nothing is asked.")
        return
    if d.dropped is None and d.conversation.turns:
        d.take_back()
    d.ask(text.strip("\n"))


def _system(d: Dialogue, rest: str) -> None:
    if not rest:
        d.run.terminal.tell(d.conversation.system or "There is no system message.")
        return
    d.stop_reading()
    d.conversation.system = None if rest == "none" else rest
    if d.conversation.turns:
        d.run.terminal.note("The conversation so far will be read again with it.")


def _compact(d: Dialogue, rest: str) -> None:
    if not d.conversation.turns:
        raise errors.InputError("there is nothing to make shorter.")
    whole = Conversation(model=d.conversation.model)
    whole.messages = list(d.conversation.messages)
    held, before = len(d.session.tokens), d.last_output
    d.conversation.add("user", _COMPACT)
    is_answered = d.answer("/compact")
    # What was stopped has no output of its own.
    is_cut = d.last_output is before or d.last_output.finish_reason == "length"
    if not is_answered or is_cut:
        d.conversation.messages = whole.messages
        if is_answered:
            d.keep()
            d.run.terminal.note(
                "The summary is not complete, so the conversation stays as it is. /undo makes room."
            )
        return
    after = "It is not kept."
    if d.conversation.name is not None:  # with the answer it got one, if it is to be kept
        whole.name = free_name(d.conversation.name, ".whole")
        whole.save()
        after = f"/load {whole.name} brings all of it back."
    d.conversation.messages = [
        *([m for m in whole.messages[:1] if m["role"] == "system"]),
        *d.conversation.messages[-2:],
    ]
    d.asked = []
    d.keep()
    d.read_ahead("the summary")
    d.run.terminal.note(
        f"From {held:,} tokens to this summary: the model no longer knows what was said before. "
        + after
    )


# --- settings


def _set(d: Dialogue, rest: str) -> None:
    key, equals, text = (part.strip() for part in rest.partition("="))
    key = key.replace("_", "-")
    if not rest:
        _tell_options(d)
        return
    option = _ANSWER_OPTIONS.get(key)
    if option is None or option.parse is None or not equals:
        raise errors.InputError(f"say /set K=V, where K is one of {', '.join(_ANSWER_OPTIONS)}.")
    value = None if text == "default" else option.parse(text)
    if option.many and value is not None:
        value = [value]
    d.run.settings = replace(d.run.settings, **{option.name: value})


def _tell_options(d: Dialogue) -> None:
    for key, option in _ANSWER_OPTIONS.items():
        value = getattr(d.run.settings, option.name)
        d.run.terminal.tell(f"{key} = {'default' if value is None else option.shown(value)}")


def _show(d: Dialogue, rest: str) -> None:
    tell = d.run.terminal.tell
    tell(f"model: {d.llm.model_name}")
    name = d.conversation.name
    saved = f"saved as {name}" if name else "not saved yet" if d.remember else "not saved"
    tell(f"conversation: {len(d.conversation.turns)} messages, {saved}")
    tell(f"context: {len(d.session.tokens):,} of {d.session.context:,} tokens")
    tell(f"system: {d.conversation.system or '(none)'}")
    _tell_options(d)


# --- documents


def _read(d: Dialogue, rest: str) -> None:
    if not rest or rest == "-":
        raise errors.InputError("say /read FILE.")
    if rest == "none":
        _drop_documents(d)
        return
    d.stop_reading()
    known = [document.name for asked in d.asked for document in asked.documents]
    known += [document.name for document in d.documents]
    (document,) = read_documents([_unquoted(rest)], d.run.terminal, taken=known)
    num_tokens, most = d.llm.least_tokens(document.text), d.session.context
    if num_tokens > most:
        raise errors.ContextOverflow(
            f"{document.name} has at least {num_tokens:,} tokens, and the context holds {most:,}.",
            needed_tokens=num_tokens,
            available_tokens=most,
        )
    num_tokens = d.llm.count_tokens(document.text)
    d.documents.append(document)
    message = {"role": "user", "content": d.attached()}
    # Not what the session holds: that may be of a question that was dropped.
    needed = d.llm.count_tokens([*d.conversation.messages, message])
    if needed > most:
        d.documents.pop()
        raise errors.ContextOverflow(
            f"{document.name} has {num_tokens:,} tokens, which makes {needed:,} with what was said "
            f"so far; the context holds {most:,}.",
            needed_tokens=needed,
            available_tokens=most,
        )
    d.run.terminal.note(
        f"{document.name}: {num_tokens:,} tokens, to go with your next message. "
        "It is being read while you type. Ctrl-C stops that; /read none drops it."
    )
    d.read_ahead(document.name, message)


def _drop_documents(d: Dialogue) -> None:
    if not d.documents:
        raise errors.InputError("no document waits for your next message.")
    d.stop_reading()
    names = ", ".join(document.name for document in d.documents)
    d.documents = []
    d.run.terminal.note(f"Dropped {names}.")


def _unquoted(path: str) -> str:
    """A path as terminals paste it when a file is dropped on them."""
    import os

    if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
        path = path[1:-1]
    elif os.sep == "/" and "\\ " in path and not os.path.exists(path):
        path = path.replace("\\ ", " ")
    return os.path.expanduser(path)


# --- numbers


def _stats(d: Dialogue, rest: str) -> None:
    if d.last_output is None:
        raise errors.InputError("there is no answer yet.")
    output, tell = d.last_output, d.run.terminal.tell
    tell(summary_line(output))
    kv = output.kv
    tell(
        f"KV: {kv['bits_per_element']:.2f} bits per element, {kv['pages']:,} pages, "
        f"hit rate {kv['hit_rate']:.2f}, {kv['stall_s']:.2f} s stalled, "
        f"missed mass {kv['missed_mass']['mean']:.4f}{checked_mass(kv)}"
    )
    tell(f"read again: {output.usage['recomputed_tokens']:,} tokens")


def _thought(d: Dialogue, rest: str) -> None:
    if d.last_output is None:
        raise errors.InputError("there is no answer yet.")
    thought = getattr(d.last_output, "thought", "").strip()
    if not thought:
        raise errors.InputError("the last answer came without thoughts.")
    d.run.terminal.tell(thought)


def _mem(d: Dialogue, rest: str) -> None:
    if rest in ("on", "off"):
        d.shows_tiers = rest == "on"
        return
    if rest:
        raise errors.InputError("say /mem, or /mem on and /mem off for a line below the prompt.")
    budget = None
    if d.last_output is not None:
        budget = d.last_output.memory["host"]["budget_bytes"]
    d.run.terminal.tell(memory_table(d.session, d.totals, budget))


def _tokens(d: Dialogue, rest: str) -> None:
    d.stop_reading()
    tell = d.run.terminal.tell
    for message in d.conversation.messages:
        start = " ".join(message["content"].split())
        start = start if len(start) <= 50 else f"{start[:49]}…"
        tell(f"{d.llm.count_tokens(message['content']):>9,}  {message['role']:<9}  {start}")
    for document in d.documents:
        tell(f"{d.llm.count_tokens(document.text):>9,}  waiting    {document.name}")
    held, most = len(d.session.tokens), d.session.context
    tell(f"{held:>9,}  in the context of {most:,}, with what the model's template adds")


# --- kept conversations


def _save(d: Dialogue, rest: str) -> None:
    before = d.conversation.name
    name = rest or before
    if name is None:
        raise errors.InputError("say /save NAME.")
    if name != before and session_path(name).exists():
        raise errors.InputError(f"there is a conversation {name!r} already; choose another name.")
    d.stop_reading()
    d.conversation.name = name
    try:
        d.conversation.keep_tokens(d.session)
        d.conversation.save()
    except BaseException:
        d.conversation.name = before
        raise
    d.run.terminal.note(f"Saved; 'ebbtide chat --session {name}' resumes it.")


def _load(d: Dialogue, rest: str) -> None:
    if not rest:
        raise errors.InputError("say /load NAME; /sessions lists the names.")
    if not session_path(rest).exists():
        raise errors.InputError(f"there is no conversation {rest!r}; /sessions lists them.")
    if rest == d.conversation.name:
        raise errors.InputError(f"this is {rest!r}.")
    found = Conversation.load(rest)
    d.stop_reading()
    before = d.conversation
    d.session.close()
    d.conversation = found
    try:
        d.session = d.open_session()
    except BaseException:
        d.conversation = before
        d.session = d.open_session()
        raise
    found.model, d.documents, d.asked, d.dropped = before.model, [], [], None
    d.run.terminal.note(
        f"{rest}: {len(found.turns)} messages; what is not kept of their pages is read again while "
        "you type."
    )
    if found.turns:
        d.read_ahead("the conversation so far")


def _sessions(d: Dialogue, rest: str) -> None:
    found = kept_conversations()
    for kept in found:
        mark = "*" if kept.name == d.conversation.name else " "
        size = "unreadable" if kept.num_messages is None else f"{kept.num_messages} messages"
        age = show_duration(max(0.0, time.time() - kept.saved_s))
        model = kept.model or "built-in model"
        d.run.terminal.tell(f"{mark} {kept.name:<24} {size:>14}  {age} ago, {model}")
    if not found:
        d.run.terminal.tell("No conversation is kept yet; /save NAME keeps this one.")


COMMANDS = {
    "help": Command(_help, "/help", "this list"),
    "?": Command(_help, None),
    "exit": Command(_exit, "/exit, /quit", "leave (also Ctrl-D)"),
    "quit": Command(_exit, None),
    "bye": Command(_exit, None),
    "clear": Command(_clear, "/clear", "forget the conversation; the system message stays"),
    "regen": Command(_regen, "/regen", "answer the last question again"),
    "retry": Command(_retry, "/retry", "ask again what was stopped or failed; else like /regen"),
    "undo": Command(_undo, "/undo", "take back the last question and its answer"),
    "edit": Command(_edit, "/edit", "change the last question in $EDITOR, and ask it"),
    "compact": Command(_compact, "/compact", "go on from a summary, to make room"),
    "system": Command(
        _system, "/system [TEXT]", 'show or set the system message; "/system none" drops it'
    ),
    "set": Command(
        _set, "/set [K=V]", 'show or set an option of the answer; "default" resets it', "option"
    ),
    "show": Command(_show, "/show", "the model, the settings, the size of the conversation"),
    "read": Command(
        _read, "/read FILE", 'send a document along next; "/read none" drops what waits', "path"
    ),
    "stats": Command(_stats, "/stats", "the numbers of the last answer"),
    "thought": Command(_thought, "/thought", "what a reasoning model thought before it answered"),
    "mem": Command(_mem, "/mem [on|off]", "where the pages are; on: a line below the prompt"),
    "tokens": Command(_tokens, "/tokens", "how long each message is, and what is left"),
    "save": Command(_save, "/save [NAME]", "keep the conversation on disk under this name"),
    "load": Command(_load, "/load NAME", "go on with another conversation", "name"),
    "sessions": Command(_sessions, "/sessions", "the conversations that are kept"),
}

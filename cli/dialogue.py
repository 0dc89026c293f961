"""A conversation at the terminal: reads lines, obeys /commands, streams answers.

Ctrl-C stops an answer; at the prompt the second one in a row leaves. Ctrl-D leaves. The session's
pages stay between answers, so only new tokens are read. Does not know where the model came from.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from ebbtide import errors

from .answer import summary_line
from .conversation import Conversation
from .documents import join_documents, read_documents
from .line_editor import LineEditor
from .options import ANSWER_PANEL, SHARED
from .progress import ProgressDisplay
from .run import Run

HELP = '''/help            this list
/exit, /quit     leave (also Ctrl-D)
/clear           forget the conversation; the system message stays
/regen           answer the last question again
/undo            take back the last question and its answer
/system [TEXT]   show or set the system message; "/system none" drops it
/set [K=V]       show or set an option of the answer; "default" as V resets it
/show            show the model, the settings and the size of the conversation
/read FILE       send a document along with your next message
/save NAME       keep the conversation on disk under this name
/stats           the numbers of the last answer
"""              begins and ends a text of several lines
Ctrl-C           stop the answer'''

_ANSWER_OPTIONS = {option.key: option for option in SHARED if option.panel == ANSWER_PANEL}


class Dialogue:
    """The loop, and what it remembers between two prompts."""

    def __init__(self, run: Run, llm: Any, conversation: Conversation, *, remember_lines: bool):
        self.run = run
        self.llm = llm
        self.conversation = conversation
        with ProgressDisplay(run.terminal) as progress:
            llm.on_progress = progress
            self.session = llm.session()
        self.documents: list[Any] = []  # to go with the next message
        self.last_output: Any = None
        self.editor = LineEditor(remember_lines)

    def talk(self) -> None:
        """Until the user leaves."""
        say = self.run.terminal.note
        say(
            f"{self.llm.model_name}, up to {self.session.context:,} tokens. "
            "/help lists the commands; Ctrl-D leaves."
        )
        with self.editor:
            while (line := self._next_line()) is not None:
                if not line.strip():
                    continue
                if line.startswith("/"):
                    if self._obey(line) is Leave:
                        return
                else:
                    self._ask(line)

    # --- input

    def _next_line(self) -> str | None:
        """What the user typed; None to leave.

        Raises KeyboardInterrupt for the second Ctrl-C in a row.
        """
        prompt = f"[{len(self.session.tokens):,}/{self.session.context:,}] > "
        interrupted = False
        while True:
            try:
                return self.editor.read(prompt)
            except EOFError:
                sys.stderr.write("\n")
                return None
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                self.run.signals.working()
                sys.stderr.write("\n")
                self.run.terminal.note("Ctrl-C again, or Ctrl-D, leaves.")

    # --- answers

    def _ask(self, text: str) -> None:
        content = join_documents(self.documents, text) if self.documents else text
        self.conversation.add("user", content)
        if self._answer():
            self.documents = []
        else:
            self.conversation.pop_question()

    def _answer(self) -> bool:
        """Streams an answer to the messages and adds it. False when nothing came of it."""
        run, signals = self.run, self.run.signals
        text, output = "", None
        try:
            with signals.polite():
                output = run.answer(
                    self.llm, self.conversation.messages, run.generation(), source=self.session
                )
                text = output.text
        except KeyboardInterrupt:
            text = run.when_cancelled["text"]
            if signals.is_leaving:
                # Not at a safe point: what the session holds may be half a token.
                self.session.close()
                self.session = self.llm.session()
            signals.working()
            run.terminal.end_answer()
            run.terminal.note(
                "Stopped." if text else "Stopped before the answer; the message was dropped."
            )
        except (errors.ContextOverflow, errors.DoesNotFit, errors.InputError) as error:
            run.terminal.end_answer()
            run.terminal.tell(f"Error: {error}")
            return False
        run.terminal.end_answer()
        if output is not None:
            self.last_output = output
            if output.finish_reason == "length":
                run.terminal.note(run.why_cut(output, "/set max-new-tokens=N"))
        elif not text:
            return False
        self.conversation.add("assistant", text)
        self.conversation.save()
        return True

    # --- commands

    def _obey(self, line: str) -> Any:
        word, _, rest = line[1:].partition(" ")
        method = _COMMANDS.get(word)
        if method is None:
            self.run.terminal.tell(f"There is no command /{word}; /help lists them.")
            return None
        try:
            return method(self, rest.strip())
        except (errors.InputError, errors.StorageError, ValueError) as error:
            self.run.terminal.tell(f"Error: {error}")
            return None

    def _help(self, rest: str) -> None:
        self.run.terminal.tell(HELP)

    def _exit(self, rest: str) -> Any:
        return Leave

    def _clear(self, rest: str) -> None:
        self.conversation.clear()
        self.documents = []
        self.session.truncate(0)
        self.run.terminal.note("Forgotten.")

    def _regen(self, rest: str) -> None:
        before = self.conversation.pop_answer()
        if before is None:
            raise errors.InputError("there is no answer to give again.")
        if not self._answer():
            self.conversation.add("assistant", before)

    def _undo(self, rest: str) -> None:
        answer, question = self.conversation.pop_answer(), self.conversation.pop_question()
        if answer is None and question is None:
            raise errors.InputError("there is nothing to take back.")
        try:
            self.session.undo()
        except errors.InputError:
            pass  # a resumed question, which this session has not read
        self.conversation.save()
        self.run.terminal.note("Took back the last question and its answer.")

    def _system(self, rest: str) -> None:
        if not rest:
            self.run.terminal.tell(self.conversation.system or "There is no system message.")
            return
        self.conversation.system = None if rest == "none" else rest
        if self.conversation.turns:
            self.run.terminal.note("The conversation so far will be read again with it.")

    def _set(self, rest: str) -> None:
        key, equals, text = (part.strip() for part in rest.partition("="))
        key = key.replace("_", "-")
        if not rest:
            self._show_options()
            return
        option = _ANSWER_OPTIONS.get(key)
        if option is None or option.parse is None or not equals:
            raise errors.InputError(
                f"say /set K=V, where K is one of {', '.join(_ANSWER_OPTIONS)}."
            )
        value = None if text == "default" else option.parse(text)
        if option.many and value is not None:
            value = [value]
        self.run.settings = replace(self.run.settings, **{option.name: value})

    def _show_options(self) -> None:
        for key, option in _ANSWER_OPTIONS.items():
            value = getattr(self.run.settings, option.name)
            self.run.terminal.tell(f"{key} = {'default' if value is None else value}")

    def _show(self, rest: str) -> None:
        tell = self.run.terminal.tell
        tell(f"model: {self.llm.model_name}")
        tell(
            f"conversation: {len(self.conversation.turns)} messages, "
            f"saved as {self.conversation.name or '(not saved)'}"
        )
        tell(f"context: {len(self.session.tokens):,} of {self.session.context:,} tokens")
        tell(f"system: {self.conversation.system or '(none)'}")
        self._show_options()

    def _read(self, rest: str) -> None:
        if not rest or rest == "-":
            raise errors.InputError("say /read FILE.")
        (document,) = read_documents([rest], self.run.terminal)
        self.documents.append(document)
        num_tokens = self.llm.count_tokens(document.text)
        self.run.terminal.note(
            f"{document.name}: {num_tokens:,} tokens, to go with your next message."
        )

    def _save(self, rest: str) -> None:
        before = self.conversation.name
        self.conversation.name = rest or before
        if self.conversation.name is None:
            raise errors.InputError("say /save NAME.")
        try:
            self.conversation.save()
        except Exception:
            self.conversation.name = before
            raise
        self.run.terminal.note(
            f"Saved; 'ebbtide chat --session {self.conversation.name}' resumes it."
        )

    def _stats(self, rest: str) -> None:
        if self.last_output is None:
            raise errors.InputError("there is no answer yet.")
        output, tell = self.last_output, self.run.terminal.tell
        tell(summary_line(output))
        kv = output.kv
        tell(
            f"KV: {kv['bits_per_element']:.2f} bits per element, {kv['pages']:,} pages, "
            f"hit rate {kv['hit_rate']:.2f}, {kv['stall_s']:.2f} s stalled"
        )
        tell(f"read again: {output.usage['recomputed_tokens']:,} tokens")


class Leave:
    """What /exit returns."""


_COMMANDS = {
    "help": Dialogue._help,
    "exit": Dialogue._exit,
    "quit": Dialogue._exit,
    "bye": Dialogue._exit,
    "clear": Dialogue._clear,
    "regen": Dialogue._regen,
    "undo": Dialogue._undo,
    "system": Dialogue._system,
    "set": Dialogue._set,
    "show": Dialogue._show,
    "read": Dialogue._read,
    "save": Dialogue._save,
    "stats": Dialogue._stats,
}

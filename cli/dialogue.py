"""A conversation at the terminal: reads lines, obeys /commands, streams answers.

Ctrl-C stops an answer; the next one at the prompt leaves, as Ctrl-D does. The session's pages stay
between answers, so only new tokens are read. Does not know where the model came from;
`chat_commands` says what the commands do.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from ebbtide import errors

from .answer import is_blank
from .background import BackgroundReading
from .chat_commands import COMMANDS, Leave
from .conversation import LAST, Conversation, kept_conversations
from .line_editor import LineEditor, Quoted
from .memory_view import MemoryTotals, tiers_line
from .options import ANSWER_PANEL, SHARED
from .progress import ProgressDisplay, sentence
from .run import Run
from .terminal import is_fancy

# One keypress can arrive twice; that is not a second wish.
_ECHO_S = 0.5
_NEARLY_FULL = 0.9
# A word behind a slash. Paths and the comments of programs are none, and can be asked about.
_COMMAND = re.compile(r"/([A-Za-z]+|\?)(?:[ \t](.*))?", re.DOTALL)
# How the context meter looks from which share on.
_METER = ((_NEARLY_FULL, "ansired"), (0.7, "ansiyellow"), (0.0, "ansigreen"))


class Question(NamedTuple):
    """What was typed, and the documents that went with it."""

    text: str
    documents: list[Any]


class Dialogue:
    """The loop, and what it remembers between two prompts.

    remember: keep the lines, and a conversation without a name as the last one.
    """

    def __init__(self, run: Run, llm: Any, conversation: Conversation, *, remember: bool):
        self.run = run
        self.llm = llm
        self.conversation = conversation
        self.remember = remember
        self.documents: list[Any] = []  # to go with the next message
        self.dropped: str | None = None  # the question that got no answer
        self.asked: list[Question] = []  # here, not in an earlier run: the newest user turns
        self.last_output: Any = None
        self.totals = MemoryTotals()
        self.shows_tiers = False
        self.reading: BackgroundReading | None = None
        self._is_full = False  # nearly, which is said once
        self._stopped_s: float | None = None  # when a Ctrl-C last stopped something
        self.session = self.open_session()
        self.editor = LineEditor(remember, self._make_completer)
        if is_fancy(sys.stdout) and not run.terminal.as_json:
            run.terminal.use_markdown()

    def talk(self) -> None:
        """Until the user leaves."""
        self.run.terminal.note(
            f"{self.llm.model_name}, up to {self.session.context:,} tokens. "
            "/help lists the commands; Ctrl-D leaves."
        )
        if self.conversation.turns:
            self.read_ahead("the conversation so far")
        try:
            with self.editor:
                self.run.signals.deliver = self.editor.interrupt
                while (line := self._next_line()) is not None:
                    if not line.strip():
                        continue
                    said = None if isinstance(line, Quoted) else _COMMAND.fullmatch(line.rstrip())
                    if said is None:
                        self.ask(line)
                    elif self._obey(said[1], said[2] or "") is Leave:
                        break
        finally:
            self.run.signals.deliver = None
            # The session must not be closed under it.
            self.stop_reading()
        if self.conversation.name is not None and self.conversation.turns:
            self.keep()  # the one that was left last is the one to go on with
        if self.conversation.name is not None and self.conversation.turns:
            self.run.terminal.note("'ebbtide chat -c' goes on from here.")

    # --- input

    def _next_line(self) -> str | None:
        """What the user typed; None to leave."""
        while True:
            self._tell_end_of_reading()
            held, most = len(self.session.tokens), self.session.context
            style = next((s for share, s in _METER if held >= share * most), "")
            status = self._status if self.shows_tiers or self.reading else None
            try:
                line = self.editor.read(f"[{held:,}/{most:,}] > ", status, style)
            except EOFError:
                sys.stderr.write("\n")
                return None
            except KeyboardInterrupt:
                if self._interrupted_at_prompt():
                    return None
                continue
            self._stopped_s = None
            return line

    def _interrupted_at_prompt(self) -> bool:
        """Whether this Ctrl-C leaves: the first one stops a reading, or warns."""
        self.run.signals.working()
        since_s = None if self._stopped_s is None else time.monotonic() - self._stopped_s
        if since_s is not None:
            return since_s >= _ECHO_S
        self._stopped_s = time.monotonic()
        if self.reading is not None and self.reading.is_running:
            self.stop_reading()
            self.run.terminal.note(
                f"Stopped reading {self._forget_documents()}. Ctrl-C again, or Ctrl-D, leaves."
            )
        else:
            self.run.terminal.note("Ctrl-C again, or Ctrl-D, leaves.")
        return False

    def _forget_documents(self) -> str:
        """Drops what was to go with the next message; its names."""
        names = ", ".join(document.name for document in self.documents)
        self.documents = []
        return f"{names}; it will not be sent" if names else "ahead; it is read with your message"

    def _status(self) -> str:
        """The line below the prompt."""
        parts = []
        if self.reading is not None and self.reading.is_running:
            progress = self.reading.progress
            parts.append(
                f"{self.reading.title}: {_bar(progress)} {sentence(progress)}"
                if progress is not None
                else f"{self.reading.title}: beginning to read"
            )
        if self.shows_tiers:
            parts.append(tiers_line(self.session))
        return "\n".join(parts)

    def _make_completer(self) -> Any:
        from .completion import ChatCompleter

        kinds = {word: command.takes for word, command in COMMANDS.items()}
        options = [option.key for option in SHARED if option.panel == ANSWER_PANEL]
        return ChatCompleter(kinds, lambda: [kept.name for kept in kept_conversations()], options)

    # --- the session

    def open_session(self, check: Callable[[], None] = lambda: None) -> Any:
        """The session of the conversation: with its tokens, where it is kept. check: may raise,
        while the model is loaded for it."""
        with ProgressDisplay(self.run.terminal, check) as progress:
            self.llm.on_progress = progress
            try:
                return open_session(self.run, self.llm, self.conversation)
            finally:
                self.llm.on_progress = None

    def read_ahead(self, title: str, *more: dict[str, str]) -> None:
        """Read the conversation, and messages that may follow, while the user types."""
        self.stop_reading()
        if not self.session.is_open:  # the next answer opens another
            return
        messages = [*self.conversation.messages, *more]
        think = self.run.settings.think
        self.reading = BackgroundReading(self.llm, self.session, messages, title, think)

    def stop_reading(self) -> None:
        """The session is free afterwards. What was read stays read."""
        if self.reading is not None:
            self.reading.stop()
            self._tell_end_of_reading()

    def _tell_end_of_reading(self) -> None:
        reading = self.reading
        if reading is None or reading.is_running:
            return
        self.reading = None
        if reading.error is not None:
            if not isinstance(reading.error, errors.EbbtideError):
                raise reading.error
            self.run.terminal.tell(f"Error: {reading.error}")

    def keep(self) -> None:
        """Save the conversation, under its name or as the last one. A failure is told, once."""
        if self.conversation.name is None:
            if not self.remember:
                return
            self.conversation.name = LAST
        try:
            if self.session.name != self.conversation.session_name:
                self.conversation.keep_tokens(self.session)
            self.conversation.save()
        except (errors.InputError, errors.StorageError) as error:
            if self.conversation.name == LAST:
                self.conversation.name, self.remember = None, False
            self.run.terminal.warn(f"This conversation is not kept: {error}")

    # --- answers

    def ask(self, text: str) -> None:
        """Answer a message; what was read goes before it."""
        content = f"{self.attached()}\n\n{text}" if self.documents else text
        self.conversation.add("user", content)
        if self.answer():
            self.asked.append(Question(text, self.documents))
            self.documents, self.dropped = [], None
        else:
            self.conversation.pop_question()
            self.dropped = text

    def take_back(self) -> None:
        """The last question and its answer, as if they had never been; its documents wait again.

        Raises InputError when there is none.
        """
        self.stop_reading()
        answer, question = self.conversation.pop_answer(), self.conversation.pop_question()
        if answer is None and question is None:
            raise errors.InputError("there is nothing to take back.")
        if self.asked:
            self.documents = self.asked.pop().documents + self.documents
        try:
            self.session.undo()
        except errors.InputError:
            pass  # a resumed question, which this session has not answered

    def last_question(self) -> str:
        """What was asked last, without the documents that went with it; "" for none."""
        if self.dropped is not None:
            return self.dropped
        if self.asked:
            return self.asked[-1].text
        return next((t["content"] for t in self.conversation.turns[-2:] if t["role"] == "user"), "")

    def attached(self) -> str:
        """The documents that go with the next message. One more changes nothing before it, so what
        was read ahead stays.
        """
        return "\n\n".join(f"# {d.name}\n\n" + d.text.strip("\n") for d in self.documents)

    def answer(self, again: str = "/retry") -> bool:
        """Streams an answer to the messages and adds it. False when nothing came of it; `again` is
        what asks once more.
        """
        run, signals = self.run, self.run.signals
        text, output = "", None
        run.expect_answer()  # what is stopped while it loads is none, not the one before
        try:
            with signals.polite():
                self.stop_reading()
                self._load_changed()
                output = run.answer(
                    self.llm, self.conversation.messages, run.generation(), source=self.session
                )
                text = output.text
        except KeyboardInterrupt:
            text = run.when_cancelled["text"]
            self._recover()
            run.terminal.end_answer()
            run.terminal.note(
                "Stopped." if text.strip() else f"Stopped before the answer; {again} asks it again."
            )
        except (errors.ContextOverflow, errors.DoesNotFit, errors.InputError) as error:
            run.terminal.end_answer()
            run.terminal.tell(f"Error: {error}")
            return False
        except errors.ModelError as error:
            run.terminal.end_answer()
            run.terminal.tell(f"Error: {error}")
            run.terminal.note(f"{again} loads the model anew, and asks it again.")
            return False
        run.terminal.end_answer()
        if output is not None:
            self.note_output(output)
            if is_blank(output):
                run.terminal.note(f"{again} asks it again.")
        if not text.strip():
            return False
        self.conversation.add("assistant", text)
        self.keep()
        return True

    def _load_changed(self) -> None:
        """Where the model's files changed, what they hold now answers. A session that this closed
        in vain, or that was stopped, is opened when the next answer is asked for."""
        if self.llm.files_changed():
            self.run.terminal.note("The model's files changed: it is loaded anew.")
            self.session.close()
            self.llm.unload()
        if not self.session.is_open:
            self.session = self.open_session(self.run.signals.check)

    def _recover(self) -> None:
        """After a Ctrl-C: the session, whole, and signals as before."""
        self._stopped_s = time.monotonic()
        if self.run.signals.is_leaving:
            # Not at a safe point: what the session holds may be half a token.
            self.session.close()
            self.session = self.open_session()
        self.run.signals.working()

    def note_output(self, output: Any) -> None:
        self.last_output = output
        self.totals.add(output)
        note = self.run.terminal.note
        if output.usage["recomputed_tokens"]:
            note(f"({output.usage['recomputed_tokens']:,} tokens were read again.)")
        if output.finish_reason == "length" or is_blank(output):
            note(self.run.why_cut(output, "/set max-new-tokens=N", "/set think=off"))
        held, most = len(self.session.tokens), self.session.context
        was_full, self._is_full = self._is_full, held >= _NEARLY_FULL * most
        if self._is_full and not was_full:
            note(f"The context holds {held:,} of {most:,} tokens; /compact or /clear makes room.")

    # --- commands

    def _obey(self, word: str, rest: str) -> Any:
        command = COMMANDS.get(word)
        if command is None:
            self.run.terminal.tell(
                f'There is no command /{word}; /help lists them. """ before a text sends it as it '
                "is."
            )
            return None
        try:
            return command.do(self, rest.strip())
        except (errors.EbbtideError, ValueError) as error:
            self.run.terminal.tell(f"Error: {error}")
            return None


def open_session(run: Run, llm: Any, conversation: Conversation) -> Any:
    """A session of the model; a named conversation's has its tokens again.

    Where they cannot serve (another model's, damaged), the messages are enough. Raises InputError
    where the name is in use or cannot be kept.
    """
    if conversation.session_name is None:
        return llm.session()
    try:
        return llm.session(conversation.session_name)
    except errors.InputError as error:
        session = llm.session()
        try:
            conversation.keep_tokens(session)
        except BaseException:
            session.close()
            raise
        run.terminal.detail(f"The tokens that were kept are not used: {error}")
        return session


def _bar(progress: Any, width: int = 20) -> str:
    share = progress.done_tokens / progress.total_tokens if progress.total_tokens else 0.0
    full = round(width * min(1.0, share))
    return "[" + "#" * full + "." * (width - full) + "]"

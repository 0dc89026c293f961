"""One run of a command: its settings, its terminal, the model it opens and the answer it streams.

What ask, summarize and chat have in common lies here. Knows the public face of Ebbtide and no
command.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import typer

from ebbtide import errors

from .answer import Heard, blank_fields, is_blank, output_fields, summary_line
from .options import BY_NAME, Settings
from .progress import ProgressDisplay
from .recorder import Recorder
from .signals import Signals
from .terminal import Terminal
from .values import counted

_GENERATION = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "min_new_tokens",
    "seed",
)


class Process:
    """What `main` knows before a command runs, and what it needs when one ends badly."""

    def __init__(self) -> None:
        self.signals = Signals()
        self.settings_path: Any = None
        self.settings_error: Exception | None = None
        self.warnings: list[str] = []  # of the environment
        self.run: Run | None = None
        self.spare_memory: bytes | None = None  # given up to tell that there is no more


class _Notes(logging.Handler):
    """Shows what the library logs, the size of a download before all; its details with -v."""

    def __init__(self, terminal: Any):
        super().__init__()
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        tell = self._terminal.detail if record.levelno == logging.DEBUG else self._terminal.note
        tell(record.getMessage())


class Run:
    """The settings, terminal and signals of one command, and its answer so far."""

    def __init__(self, settings: Settings, signals: Signals):
        self.settings = settings
        self.terminal = Terminal(
            quiet=settings.quiet, verbose=settings.verbose, as_json=settings.json
        )
        self.signals = signals
        self.recorder: Recorder | None = None  # set by who wants a report of the answers
        self._most_tokens: int | None = None  # that the last answer was allowed
        # The object `--json` prints when the run is cancelled.
        self.when_cancelled: dict[str, Any] = {
            "error": {"type": "Cancelled", "message": "The run was cancelled."}
        }

    @classmethod
    def begin(cls, settings: Settings, process: Process | None) -> Run:
        process = process or Process()
        if process.settings_error is not None:
            raise process.settings_error
        run = process.run = cls(settings, process.signals)
        run.warn_of(process.warnings)
        process.signals.before_sudden_end = lambda code: run.report_cancelled()
        return run

    def report_cancelled(self) -> None:
        if self.terminal.as_json:
            self.terminal.result(self.when_cancelled)

    def expect_answer(self) -> None:
        """From here on a cancelled run owes `--json` an answer's object, though an empty one."""
        self.when_cancelled = blank_fields(self.settings.model)

    # --- the model

    def open_options(self) -> dict[str, Any]:
        """The settings as `LLM.open` takes them."""
        import ebbtide

        s = self.settings
        return {
            "revision": s.revision,
            "device": s.device,
            "budget": ebbtide.Budget(
                device_memory=s.device_memory,
                host_memory=s.host_memory,
                disk_memory=s.disk_memory,
            ),
            "mode": s.mode,
            "epsilon": s.epsilon,
            "kv_bits": s.kv_bits,
            "weight_bits": s.weight_bits,
            "context": s.context,
            "spill_dir": s.spill_dir,
            "threads": s.threads,
            "draft": s.draft is not False,
            "prefix_cache": s.prefix_cache,
        }

    @contextmanager
    def open_llm(self, **changes: Any) -> Iterator[Any]:
        """The model, open; `changes` replace options of LLM.open.

        Closed on the way out, whatever happened.
        """
        self.calm_libraries()
        import ebbtide

        self._check_places()
        opener = ebbtide.LLM  # imports torch: until here a Ctrl-C ends the process at once
        options = self.open_options() | changes
        self.signals.working()
        with opener.open(self.settings.model, **options) as llm:
            if self.settings.model is None:
                self.terminal.note(
                    f"No model given: using {llm.model_name}, small and made for demonstration. "
                    "Choose another with -m MODEL."
                )
            self.warn_of(llm.warnings)
            if options["prefix_cache"] != 0 and self.settings.disk_memory != 0:
                where = ebbtide.prefix_dir(options["spill_dir"])
                self.terminal.detail(f"Pages of what is read are kept in {where}.")
            yield llm
        self.warn_of(llm.warnings)  # of what could not be kept at the end

    def _check_places(self) -> None:
        """A model or a folder that is not there is said at once: importing torch takes seconds."""
        import ebbtide

        s = self.settings
        ebbtide.local_model(s.model, s.revision)
        if s.spill_dir is not None and s.disk_memory != 0:
            ebbtide.writable_spill_dir(s.spill_dir)

    def choose_model(self, argument: str | None) -> None:
        """Takes the argument MODEL, which may stand in place of --model but not contradict it."""
        if argument is None:
            return
        s = self.settings
        if s.origins.get("model") == BY_NAME["model"].flags[0] and s.model != argument:
            raise typer.BadParameter(
                f"{argument!r} contradicts --model {s.model!r}; give one of them",
                param_hint="MODEL",
            )
        self.settings = replace(s, model=argument, origins={**s.origins, "model": "MODEL"})

    def calm_libraries(self) -> None:
        """Before their import: progress bars of the hub only where ours would be, library warnings
        only with -v.
        """
        if self.terminal.quiet or self.terminal.as_json:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        level = logging.DEBUG if self.terminal.verbose else logging.INFO
        logging.getLogger("ebbtide").setLevel(level)
        logging.getLogger("ebbtide").handlers = [_Notes(self.terminal)]
        if not self.terminal.verbose:
            import warnings

            warnings.simplefilter("ignore")

    def generation(self, **defaults: Any) -> dict[str, Any]:
        """The generation options that were given; `defaults` stand in for what was not."""
        s = self.settings
        chosen = dict(defaults)
        for name in _GENERATION:
            if getattr(s, name) is not None:
                chosen[name] = getattr(s, name)
        if s.stop:
            chosen["stop_strings"] = s.stop
        if s.think is not None:
            chosen["think"] = s.think
        return chosen

    # --- the answer

    def answer(
        self,
        llm: Any,
        prompt: Any,
        generation: dict[str, Any],
        *,
        source: Any = None,
        show: bool = True,
        through: Callable[[str], str] | None = None,
        title: str = "",
    ) -> Any:
        """Streams the answer to `prompt` and returns the Output.

        source: what streams, the model itself or one of its sessions. `show` False keeps the answer
        off standard output, and shows how much is written; so does `through`, which gets each piece
        and returns what to show of it. title: names this answer among several. When it is
        interrupted, `when_cancelled` holds the answer so far. Raises InputError, with the `text` so
        far, where an answer that is kept to a schema was cut: half of a value is none.
        """
        heard = Heard(llm)
        # A model's own limit holds where the user set none.
        self._most_tokens = generation.get("max_new_tokens", llm.generation.max_new_tokens)
        self.when_cancelled = heard.fields()
        with ProgressDisplay(self.terminal, self.signals.check, title) as progress:
            llm.on_progress = self._recorded(progress, heard, title)
            try:
                heard.stream = (llm if source is None else source).stream(prompt, **generation)
                progress.clear()
                self.tell_restored(heard.stream.restored_tokens)
                for piece in heard.stream:
                    heard.add(piece)
                    if self.recorder is not None:
                        self.recorder.piece(piece, heard.stream)
                    text = piece.text if through is None else through(piece.text)
                    thinks = bool(getattr(piece, "thought", ""))
                    if show and (text or (through is None and not thinks)):
                        progress.clear()
                        self.terminal.answer(text)
                    else:
                        progress(heard.progress(self._most_tokens))
                    self.signals.check()
            except BaseException as error:
                heard.close()
                self.when_cancelled = heard.fields()
                rest = self.when_cancelled["text"].removeprefix(heard.text)
                if rest and show and through is None and isinstance(error, KeyboardInterrupt):
                    progress.clear()
                    self.terminal.answer(rest)  # a conversation that goes on keeps it
                raise
            finally:
                llm.on_progress = None
        output = heard.stream.output
        if self.recorder is not None:
            self.recorder.end(output)
        self.warn_of(output.warnings)
        if getattr(output, "thought", ""):
            self.terminal.detail(output.thought)
        self.terminal.detail(f"{llm.plan}\n{summary_line(output)}")
        if output.finish_reason == "length" and "json_schema" in generation:
            cut = self.why_cut(output, "--max-new-tokens (-n)", "--think off")
            error = errors.InputError(f"{cut} What there is of it is not a whole JSON value.")
            vars(error)["text"] = output.text
            raise error
        return output

    def _recorded(self, progress: ProgressDisplay, heard: Heard, title: str) -> Any:
        """The display, or what tells the recorder too."""
        recorder = self.recorder
        if recorder is None:
            return progress
        recorder.begin(title or "answer")

        def both(report: Any) -> None:
            recorder.progress(report, heard.stream)
            progress(report)

        return both

    def tell_restored(self, num_tokens: int) -> None:
        if num_tokens:
            self.terminal.note(
                f"{num_tokens:,} tokens were read before; their pages came from disk."
            )

    def finish(self, llm: Any, output: Any, warnings: Sequence[str] = ()) -> None:
        """After the answer: the object for --json, and whether the answer is whole. warnings: told
        already, and part of the object.
        """
        if self.terminal.as_json:
            fields = output_fields(llm, output)
            fields["warnings"] = [*warnings, *fields["warnings"]]
            self.terminal.result(fields)
        self.tell_end(output)

    def tell_end(self, output: Any) -> None:
        """That an answer is not whole, and why."""
        if output.finish_reason == "length" or is_blank(output):
            self.terminal.note(self.why_cut(output, "-n", "--think off"))

    def why_cut(self, output: Any, more: str, unthinking: str) -> str:
        """Which limit ended an answer of finish_reason "length", or why there is none; `more` is
        what raises the first limit, `unthinking` what leaves thoughts out.

        The other limit is the context: of the model, of --context or of the memory. An answer that
        has not begun is no riddle: its tokens went into thoughts.
        """
        num_tokens = len(output.token_ids)
        tokens = counted(num_tokens, "token")
        only_thought = bool(getattr(output, "thought", "")) and is_blank(output)
        hint = f" {unthinking} leaves thoughts out." if only_thought else ""
        if output.finish_reason != "length":
            spent = f": all of its {tokens} went into thoughts" if only_thought else ""
            return f"The model gave no answer{spent}.{hint}"
        ended = "model was still thinking" if only_thought else "answer stopped"
        if self._most_tokens is not None and num_tokens >= self._most_tokens:
            return f"The {ended} after {tokens}; {more} allows more.{hint}"
        return f"The context is full: the {ended} after {tokens}.{hint}"

    def warn_of(self, texts: list[str]) -> None:
        for text in texts:
            self.terminal.warn(text)

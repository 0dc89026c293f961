"""A model that answers at once, for the tests of the commands: it knows words and nothing else.

Run as a script it is the command line with that model behind it: `python cli_fake.py ask ...`, with
FAKE_* variables choosing how it behaves. Imports no torch.

    FAKE_DELAY_S    pause before each piece, and between two reports of progress
    FAKE_ERROR      the name of an error that streaming raises
    FAKE_READY      a file that is made when the first piece is out (`prefill`: when prefill began)
    FAKE_SLOW_IMPORT_S  how long fetching LLM takes, as importing torch does
    FAKE_ANSWER     the answer; default: the words of the prompt's last line
    FAKE_FIRST_WORDS  the answer is so many words of the prompt's beginning
    FAKE_BUILTIN    "0": it is not the built-in model
    FAKE_KEEPS_FILES  the system's cache cannot be told to forget its files
    FAKE_ASKED      a file that gets a line for each prompt: how many words it has
    FAKE_KILL_AT    the process kills itself at this event: a piece of an answer, a flush to disk, a
                    rename; FAKE_EVENTS is a file that gets their number at the end
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar


@dataclass
class FakePlan:
    context: int = 4096
    model: str = "fake-model"
    fits: bool = True
    largest_context: int = 4096
    model_context: int = 4096
    device: Any = None
    host: dict = field(
        default_factory=lambda: {"weights": 1000, "near planes": 0, "far planes": 3000}
    )
    disk: dict = field(default_factory=dict)
    num_spans: int = 8
    layers_streamed: int = 0
    expert_slots: int = 0
    near_resident: bool = True
    selects: bool = False

    def __str__(self) -> str:
        return "the plan of the fake"

    decode_ceiling_tokens_per_s = prefill_least_s = None
    disk_caveat = ""

    def reading_least_s(self, length: int) -> None:
        return None

    def decode_ceiling(self, length: int, bandwidth: dict[str, float]) -> float:
        return bandwidth.get("disk", 0) / 1000

    def to_dict(self) -> dict[str, Any]:
        return {"fits": self.fits, "context": self.context, "largest_context": self.largest_context}


@dataclass
class FakeBudget:
    device_memory: Any = "auto"
    host_memory: Any = "auto"
    disk_memory: Any = "auto"


def text_of(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(m) if isinstance(m, int) else m["content"] for m in prompt)


class FakeStream:
    """Pieces of the answer, a word each."""

    def __init__(self, llm: FakeLLM, prompt: Any, generation: dict, session: Any = None):
        self.llm, self.prompt, self.generation = llm, prompt, generation
        self.session = session
        self.output: Any = None
        self.closed = False
        self.restored_tokens = int(os.environ.get("FAKE_RESTORED", "0"))
        self._pieces = self._run()

    def __iter__(self):
        return self._pieces

    def __next__(self):
        return next(self._pieces)

    def tiers(self) -> dict[str, dict[str, int]]:
        return (self.session or FakeSession(self.llm)).tiers()

    def close(self) -> None:
        self.closed = True
        self._pieces.close()

    def _run(self):
        from ebbtide import errors

        delay_s = float(os.environ.get("FAKE_DELAY_S", "0"))
        ready = os.environ.get("FAKE_READY", "")
        words = text_of(self.prompt).split()
        if self.session is not None:
            self.session.tokens = list(range(len(words)))
        try:
            for done in range(0, len(words) + 1, max(1, len(words) // 2)):
                if self.llm.on_progress is not None:
                    self.llm.on_progress(fake_progress(done, len(words)))
                if ready.endswith("prefill"):
                    Path(ready).touch()
                time.sleep(delay_s)
            name = os.environ.get("FAKE_ERROR", "")
            if name == "DoesNotFit":
                raise errors.DoesNotFit(
                    "too big", tier="host", needed_bytes=2, available_bytes=1, largest_context=7
                )
            if name == "ContextOverflow":
                raise errors.ContextOverflow("too long", needed_tokens=9, available_tokens=8)
            if name == "KeyError":
                raise KeyError("a bug")
            if name:
                raise getattr(errors, name)(f"{name} it is")
            answer = os.environ.get("FAKE_ANSWER") or text_of(self.prompt).splitlines()[-1]
            if "FAKE_FIRST_WORDS" in os.environ and "FAKE_ANSWER" not in os.environ:
                answer = " ".join(words[: int(os.environ["FAKE_FIRST_WORDS"])])
            if "FAKE_ASKED" in os.environ:
                with open(os.environ["FAKE_ASKED"], "a") as asked:
                    asked.write(f"{len(words)}\n")
            said: list[str] = []
            limit = self.generation.get("max_new_tokens") or 10**9
            for number, word in enumerate(answer.split(" ")[:limit]):
                time.sleep(delay_s)
                said.append(word if not said else f" {word}")
                event()
                yield SimpleNamespace(text=said[-1], token_ids=[number], finish_reason=None)
                if ready:
                    Path(ready).touch()
            reason = "length" if len(answer.split(" ")) > limit else "stop"
            self.output = fake_output("".join(said), len(words), reason)
        finally:
            self.llm.log.append("stream closed")


def fake_output(text: str, num_prompt: int, reason: str) -> Any:
    num_new = len(text.split(" "))
    return SimpleNamespace(
        text=text,
        token_ids=list(range(num_new)),
        finish_reason=reason,
        usage={
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
            "recomputed_tokens": 0,
        },
        timings={
            "load_s": 0.1,
            "prefill_s": 0.1,
            "ttft_s": 0.2,
            "decode_s": 0.1,
            "prefill_tokens_per_s": 10.0,
            "decode_tokens_per_s": float("inf"),
        },
        memory={
            "device": None,
            "host": {"budget_bytes": 100, "peak_bytes": 50},
            "disk": {"budget_bytes": 100, "peak_bytes": 0},
            "peak_rss_bytes": 50,
        },
        kv={
            "bits_per_element": 4.5,
            "pages": 1,
            "resident_bytes_per_token": 1.0,
            "bytes_read": {"disk": 3},
            "bytes_written": {},
            "bytes_kept": 0,
            "hit_rate": 1.0,
            "stall_s": 0.0,
            "missed_mass": {"mean": 0.0, "max": 0.0},
        },
        warnings=["the fake warns"],
        plan={"fits": True},
    )


@dataclass
class FakeSession:
    """kept: name -> tokens, the same for all sessions, as a state folder would be."""

    llm: Any
    tokens: list[int] = field(default_factory=list)
    context: int = 4096
    name: str | None = None
    is_open: bool = True

    kept: ClassVar[dict[str, list[int]]] = {}

    def stream(self, prompt: Any, **generation: Any) -> FakeStream:
        self._check_open()
        return self.llm._stream(prompt, generation, self)

    def _check_open(self) -> None:
        from ebbtide import errors

        if not self.is_open:
            raise errors.InputError("the session is closed")

    @property
    def num_processed(self) -> int:
        return len(self.tokens)

    def take_restored(self) -> int:
        return int(os.environ.get("FAKE_RESTORED", "0"))

    def __enter__(self) -> FakeSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def append(self, prompt: Any, *, think: Any = None) -> None:
        self.llm.calls.append(("append", prompt))
        self.tokens += prompt if isinstance(prompt[0:1], list) else [0]

    def prepare(self, messages: Any, *, think: Any = None) -> None:
        """Reads a word at a time, as slowly as answers come."""
        self.llm.calls.append(("prepare", [dict(m) for m in messages]))
        words = text_of(messages).split()
        for done in range(1, len(words) + 1):
            time.sleep(float(os.environ.get("FAKE_DELAY_S", "0")))
            self.tokens = list(range(done))
            if self.llm.on_progress is not None:
                self.llm.on_progress(fake_progress(done, len(words)))

    def fork(self) -> FakeSession:
        return FakeSession(self.llm, list(self.tokens))

    def keep_as(self, name: str) -> None:
        if os.environ.get("FAKE_KEEP_ERROR"):
            from ebbtide import errors

            raise errors.InputError("the state folder cannot be used")
        self.name = name
        self.kept[name] = self.tokens

    def tiers(self) -> dict[str, dict[str, int]]:
        count = len(self.tokens)
        sizes = {"used_bytes": 1024 * count, "peak_bytes": 2048 * count}
        return {
            tier: {"pages": count, **sizes, "capacity_bytes": capacity}
            for tier, capacity in (("device", 0), ("host", 1 << 20), ("disk", 1 << 30))
        }

    def close(self) -> None:
        self.llm.calls.append(("close session", None))
        self.is_open = False

    def undo(self) -> None:
        self.tokens.clear()

    def truncate(self, num_tokens: int) -> None:
        self._check_open()
        del self.tokens[num_tokens:]


def fake_progress(done: int, total: int) -> Any:
    return SimpleNamespace(
        phase="prefill",
        done_tokens=done,
        total_tokens=total,
        elapsed_s=1.0,
        tokens_per_s=10.0,
        eta_s=2.0,
    )


class FakeLLM:
    """Notes what it was opened with and asked in `calls`, the same list for all of them."""

    calls: list[tuple[str, Any]] = []  # noqa: RUF012 - read and emptied by the tests
    model_name = "fake-model"
    builtin = True
    fingerprint = "fake"
    generation = SimpleNamespace(max_new_tokens=None)
    warnings = ("the fake warns",)

    def __init__(self, model: Any, options: dict):
        self.model, self.options = model, options
        self.plan = FakePlan(options.get("context") or 4096)
        self.on_progress: Any = None
        self.log: list[str] = []

    @classmethod
    def open(cls, model: Any = None, **options: Any) -> FakeLLM:
        cls.calls.append(("open", {"model": model, **options}))
        return cls(model, options)

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *exc: object) -> None:
        if "FAKE_CLOSED" in os.environ:
            Path(os.environ["FAKE_CLOSED"]).write_text(" ".join(self.log))

    def close(self) -> None:
        self.log.append("closed")

    def stream(self, prompt: Any, **generation: Any) -> FakeStream:
        return self._stream(prompt, generation, None)

    def _stream(self, prompt: Any, generation: dict, session: Any) -> FakeStream:
        if isinstance(prompt, list):
            prompt = [m if isinstance(m, int) else dict(m) for m in prompt]
        self.calls.append(("stream", {"prompt": prompt, **generation}))
        return FakeStream(self, prompt, generation, session)

    def files_changed(self) -> bool:
        """Once, where a test says so."""
        return os.environ.pop("FAKE_CHANGED", "") == "1"

    def unload(self) -> None:
        from ebbtide import errors

        self.calls.append(("unload", None))
        if os.environ.pop("FAKE_UNLOAD_FAILS", ""):
            raise errors.BadCheckpoint("it is not whole")

    def keep_in_memory(self, share: float) -> None:
        self.calls.append(("keep_in_memory", share))

    def measure(self) -> None:
        self.calls.append(("measure", None))

    def forget_files(self) -> bool:
        self.calls.append(("forget files", None))
        return "FAKE_KEEPS_FILES" not in os.environ

    def plan_at(self, context: int) -> FakePlan:
        return FakePlan(context, fits=self.model != "too-big")

    def session(self, name: str | None = None, *, context: int | None = None) -> FakeSession:
        kept = [] if name is None else FakeSession.kept.get(name, [])
        return FakeSession(self, list(kept), name=name)

    def expect_schemas(self) -> None:
        self.calls.append(("expect_schemas", None))

    def count_tokens(self, prompt: Any) -> int:
        return len(text_of(prompt).split())

    least_tokens = count_tokens

    def refuse_too_long(self, prompt: Any, context: int | None = None) -> None:
        pass


def demo_material() -> dict[str, Any]:
    """A story beside this file's answers: the fake answers with the last words of the prompt."""
    return {
        "story": os.environ.get("FAKE_STORY", "none"),
        "questions": [
            {
                "question": "Say blue.",
                "answer": "Say blue.",
                "sentence": "It is blue.",
                "chapter": 1,
            }
        ],
        "report": os.environ.get("FAKE_STORY", "none"),
        "summary": {"question": "Say green.", "answer": "Say green."},
    }


FACE = {
    "LLM": FakeLLM,
    "Budget": FakeBudget,
    "demo_material": demo_material,
    "local_model": lambda model, revision=None: None,
    "writable_spill_dir": Path,
    "measure_memory": lambda num_threads=2: SimpleNamespace(
        num_threads=num_threads, bytes_per_s=1e4
    ),
    "measure_disk": lambda directory=None, seconds=0.25, disk_memory="auto": SimpleNamespace(
        way="o_direct",
        caveat="",
        bytes_per_s=2e3,
        extent_bytes=524288,
        num_threads=4,
        write_bytes_per_s=1e3,
        sequential_bytes_per_s=2e3,
        random_bytes_per_s=1e3,
    ),
}


_num_events = 0


def event() -> None:
    """Counts; at FAKE_KILL_AT nothing comes after it, no cleanup and no flush."""
    global _num_events
    _num_events += 1
    if str(_num_events) == os.environ.get("FAKE_KILL_AT"):
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


def with_events(function: Any) -> Any:
    """An event before the call, and one after it."""

    def called(*args: Any, **options: Any) -> Any:
        event()
        result = function(*args, **options)
        event()
        return result

    return called


def main() -> int:
    if "FAKE_KILL_AT" in os.environ or "FAKE_EVENTS" in os.environ:
        os.fsync, os.replace = with_events(os.fsync), with_events(os.replace)
        os.unlink = with_events(os.unlink)
    FakeLLM.builtin = os.environ.get("FAKE_BUILTIN") != "0"
    code = _main()
    if "FAKE_EVENTS" in os.environ:
        Path(os.environ["FAKE_EVENTS"]).write_text(str(_num_events))
    return code


def _main() -> int:
    import ebbtide

    real_getattr = ebbtide.__getattr__

    def slow_getattr(name: str) -> Any:
        if name not in FACE:
            return real_getattr(name)
        if name == "LLM":
            ready = os.environ.get("FAKE_READY", "")
            if ready.endswith("import"):
                Path(ready).touch()
            time.sleep(float(os.environ.get("FAKE_SLOW_IMPORT_S", "0")))
        return FACE[name]

    ebbtide.__getattr__ = slow_getattr
    from ebbtide.cli.main import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())

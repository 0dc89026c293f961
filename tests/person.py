"""A person at a terminal: types, and reads the screen as a terminal shows it.

Not tests. A real process in a pseudo-terminal (pexpect); its codes are obeyed by a terminal in
memory (pyte), which answers questions about the cursor as real ones do.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pexpect
import pyte

FAKE = Path(__file__).with_name("cli_fake.py")
# A process of these starts in a second; a loaded machine may need many times that.
PATIENCE_S = 40


def environment(home: Path, **changes: object) -> dict[str, str]:
    """The machine's variables without ours, and a home that nobody shares."""
    drop = ("EBBTIDE_", "FAKE_", "XDG_", "NO_COLOR", "COLORTERM", "EDITOR", "VISUAL")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    homes = {
        "HOME": str(home),
        "XDG_STATE_HOME": str(home / "state"),
        "XDG_CONFIG_HOME": str(home / "config"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "TERM": "xterm-256color",
    }
    return {**kept, **homes, **{k: str(v) for k, v in changes.items()}}


def _heed_signals() -> None:
    """Whoever runs the tests may ignore some (nohup does), and a child inherits that."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


class Person:
    """A context manager. args: of the command line with the fake model; real=True: of Ebbtide.

    output: a file that standard output goes to. env: more variables.
    """

    def __init__(
        self, home: Path, *args: str, real=False, output=None, rows=24, columns=100, **env
    ):
        program = [sys.executable, *(["-m", "ebbtide"] if real else [str(FAKE)]), *map(str, args)]
        if output is not None:
            program = ["sh", "-c", f'exec "$0" "$@" > {output}', *program]
        self.child = pexpect.spawn(
            program[0],
            program[1:],
            env=environment(home, **env),
            cwd=str(home),
            dimensions=(rows, columns),
            timeout=PATIENCE_S,
            preexec_fn=_heed_signals,
        )
        self.child.delaybeforesend = None
        self.screen = pyte.HistoryScreen(columns, rows, history=4000)
        self.screen.write_process_input = self.child.send
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""  # all that ever came

    def __enter__(self) -> Person:
        return self

    def __exit__(self, *exc: object) -> None:
        self.child.close(force=True)

    def look(self) -> str:
        """The lines that scrolled away, and the screen."""
        self._hear(0)
        above = [
            "".join(line[x].data for x in range(self.screen.columns)).rstrip()
            for line in self.screen.history.top
        ]
        return "\n".join([*above, *(line.rstrip() for line in self.screen.display)]).rstrip()

    def wait_for(self, *texts: str, after: str = "") -> str:
        """Until all are on the screen, behind the last `after`. Returns what is there then."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            seen = self.look()
            seen = seen[seen.rindex(after) :] if after and after in seen else "" if after else seen
            if all(text in seen for text in texts):
                return seen
            assert time.monotonic() < deadline_s, f"no {texts} on:\n{self.look()}"
            assert self._hear(0.2) or self.child.isalive(), f"ended, no {texts} on:\n{self.look()}"

    def type(self, text: str) -> None:
        self.child.send(text)

    def say(self, line: str) -> None:
        """Type a line and Enter."""
        self.type(f"{line}\r")

    def paste(self, text: str) -> None:
        """As a terminal pastes for a program that asked for it, and Enter."""
        self.type(f"\x1b[200~{text}\x1b[201~\r")

    def press_ctrl(self, letter: str) -> None:
        self.child.sendcontrol(letter)

    def resize(self, rows: int, columns: int) -> None:
        self.screen.resize(rows, columns)
        self.child.setwinsize(rows, columns)

    def wait_for_end(self) -> int:
        """The exit code."""
        deadline_s = time.monotonic() + PATIENCE_S
        while self.child.isalive() or self._hear(0):
            self._hear(0.1)
            assert time.monotonic() < deadline_s, f"still there:\n{self.look()}"
        self.child.wait() if self.child.exitstatus is None and not self.child.terminated else None
        signalled = self.child.signalstatus
        return -signalled if signalled is not None else self.child.exitstatus

    def _hear(self, timeout_s: float) -> bool:
        heard = False
        while True:
            try:
                data = self.child.read_nonblocking(65536, timeout=timeout_s)
            except (pexpect.TIMEOUT, pexpect.EOF):
                return heard
            self.raw += data
            self.stream.feed(data)
            heard, timeout_s = True, 0

"""Runs `python -m MODULE ARGS` as Windows would in one respect: Ebbtide's own modules find none of
what only POSIX systems have, in `os`, `mmap` and `signal` and of whole modules. Libraries find all.

    python like_windows.py ebbtide ask QUESTION FILE
"""

from __future__ import annotations

import builtins
import mmap
import os
import runpy
import signal
import sys
import types

MISSING = {
    os: "preadv pwritev pread pwrite posix_fadvise posix_fallocate O_TMPFILE O_DIRECT O_CLOEXEC "
    "O_NOFOLLOW O_NONBLOCK O_DIRECTORY fchmod fchown chown lchown geteuid getuid getegid getgid "
    "fork forkpty register_at_fork posix_spawn sched_getaffinity getloadavg uname statvfs fstatvfs "
    "killpg setsid getpgid getpgrp tcgetpgrp sendfile memfd_create sysconf sync fdatasync openpty "
    "ttyname mkfifo nice wait3 wait4 POSIX_FADV_DONTNEED POSIX_FADV_WILLNEED",
    mmap: "MAP_PRIVATE MAP_ANONYMOUS MAP_ANON MAP_SHARED MADV_HUGEPAGE MADV_DONTNEED PROT_READ "
    "PROT_WRITE",
    signal: "SIGHUP SIGPIPE SIGALRM SIGUSR1 SIGUSR2 SIGQUIT SIGTSTP SIGCONT SIGWINCH SIGKILL "
    "pthread_sigmask pthread_kill alarm setitimer sigwait siginterrupt",
}
MODULES = {"fcntl", "resource", "termios", "tty", "pwd", "grp", "pty", "readline", "syslog"}


class Without(types.ModuleType):
    """A module but for some names."""

    def __init__(self, module: types.ModuleType, names: str):
        super().__init__(module.__name__)
        self.__dict__.update({n: v for n, v in vars(module).items() if n not in names.split()})


def hide() -> None:
    real, seen = builtins.__import__, {m.__name__: Without(m, n) for m, n in MISSING.items()}

    def import_module(name, globals=None, locals=None, fromlist=(), level=0):
        is_ours = (globals or {}).get("__name__", "").split(".")[0] == "ebbtide"
        if is_ours and level == 0:
            if name in MODULES:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name in seen:
                return seen[name]
        return real(name, globals, locals, fromlist, level)

    builtins.__import__ = import_module


if __name__ == "__main__":
    hide()
    from ebbtide.offload.disk.disk import Way, default_way

    assert default_way() is Way.PORTABLE, "something is found all the same"
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

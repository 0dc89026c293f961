"""Tells a user what went wrong, in words or as JSON, and with which exit code.

Knows the errors of the public face and those of the command-line library; nothing of commands.
"""

from __future__ import annotations

import errno
import os
import traceback
from typing import Any

import typer

from ebbtide import errors

from .run import Process
from .terminal import say, write_json

# The library keeps its own name for these in different places from release to release.
USAGE_ERROR: type = typer.BadParameter.__mro__[1]
_OUR_FAULT = 1
_DOES_NOT_FIT = 3
_STORAGE_FAULT = 4
_FULL = {errno.ENOSPC, errno.EDQUOT}
_TOO_MANY_FILES = {errno.EMFILE, errno.ENFILE}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
# As libraries say it that raise no MemoryError: the loader of libraries, torch, C++, threads, whose
# stacks take room, and Python's own compiler.
_NO_MEMORY = (
    *("failed to map segment", "annot allocate memory", "can't allocate memory"),
    *("std::bad_alloc", "can't start new thread"),
    "function compile> returned NULL without setting an exception",
)
_TRUE_WORDS = {"1", "true", "t", "yes", "y", "on"}


def report_failure(error: Exception, args: list[str], process: Process) -> int:
    """Prints the error where it belongs. Returns the exit code."""
    verbose = process.run.terminal.verbose if process.run else wants_switch("verbose", "-v", args)
    fields, lines, code = describe(error)
    if process.run is not None:
        process.run.terminal.end_answer()
    if wants_json(args, process):
        write_json({"error": fields})
    if verbose and code == _OUR_FAULT:
        say("".join(traceback.format_exception(error)).rstrip())
    for line in [*lines, *_dashed_files(args if isinstance(error, USAGE_ERROR) else [])]:
        say(line)
    return code


def _dashed_files(args: list[str]) -> list[str]:
    """How files are named that were taken for options, if some were."""
    given = args[: args.index("--")] if "--" in args else args
    found = [arg for arg in given if len(arg) > 1 and arg[0] == "-" and os.path.lexists(arg)]
    return [f"The file {name} is named by ./{name}" for name in found]


def describe(error: Exception) -> tuple[dict[str, Any], list[str], int]:
    """The fields for JSON, the lines for people, and the exit code."""
    if isinstance(error, errors.EbbtideError):
        return error.fields(), [f"Error: {error}"], error.exit_code
    if isinstance(error, USAGE_ERROR):
        ctx = getattr(error, "ctx", None)
        described: Any = error  # of a class that typer alone has a name for
        message = _of_switch(described) or described.format_message()
        if not message and ctx is not None:  # a group alone, whose help was printed
            *names, last = ctx.command.commands
            message = f"{ctx.command_path} wants a command: {', '.join(names)} or {last}."
        lines = [f"Error: {message}"]
        if ctx is not None:
            lines.append(f"Try '{ctx.command_path} --help'.")
        return {"type": "UsageError", "message": message}, lines, 2
    if lacks_memory(error):
        message = (
            "There is no more memory: the machine has run out of it, or a limit (ulimit -v; of "
            "threads, ulimit -u) gives this process no more. A smaller --host-memory takes less."
        )
        return _told("MemoryError", message, _DOES_NOT_FIT)
    if isinstance(error, OSError) and error.errno in _TOO_MANY_FILES:
        place = error.filename or "A file"
        hint = "Allow this process more (ulimit -n)."
        message = f"{place} cannot be opened: {error.strerror}. {hint}"
        return _told("StorageError", message, _STORAGE_FAULT)
    if isinstance(error, OSError) and error.errno in _FULL:
        # Help, which the library prints by itself, or a file of a package.
        place = error.filename or "Standard output, or a file,"
        message = f"{place} cannot be written: {error.strerror}."
        return _told("StorageError", message, _STORAGE_FAULT)
    if isinstance(error, OSError) and error.errno in _FORBIDDEN and error.filename:
        # A start-up file of the shell, where completion is installed.
        return _told("InputError", f"{error.filename} cannot be used: {error.strerror}.", 2)
    message = f"{type(error).__name__}: {error}"
    lines = [
        f"Error: this is a fault of Ebbtide: {message}",
        "Run again with -v for the details that a report needs.",
    ]
    return {"type": "InternalError", "message": message}, lines, _OUR_FAULT


def _of_switch(error: Any) -> str | None:
    """Of a switch whose variable is neither true nor false, which the library does not name."""
    param: Any = getattr(error, "param", None)
    if not getattr(param, "is_flag", False) or not os.environ.get(param.envvar or ""):
        return None
    text = os.environ[param.envvar]
    return f"Invalid value for {param.envvar}: {text!r} is not allowed; choose from true and false"


def _told(kind: str, message: str, code: int) -> tuple[dict[str, Any], list[str], int]:
    return {"type": kind, "message": message}, [f"Error: {message}"], code


def lacks_memory(error: BaseException) -> bool:
    """True if the machine, or a limit of this process, gave no more memory."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return any(words in str(error) for words in _NO_MEMORY)


def wants_json(args: list[str], process: Process) -> bool:
    """True if one object is still owed to standard output; also before the arguments could be
    parsed.
    """
    if process.run is not None:
        return process.run.terminal.as_json and not process.run.terminal.has_result
    return wants_switch("json", None, args)


def wants_switch(name: str, short: str | None, args: list[str]) -> bool:
    given = args[: args.index("--")] if "--" in args else args
    if f"--{name}" in given or (short is not None and short in given):
        return True
    return os.environ.get(f"EBBTIDE_{name.upper()}", "").lower() in _TRUE_WORDS

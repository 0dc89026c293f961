"""The door of the command line: runs a command and turns however it ended into an exit code.

    0 done   1 our fault   2 usage, input or model   3 does not fit   4 storage
    130 Ctrl-C   141 our reader went away   143 SIGTERM (128 + signal)

Imports inside its functions only: a Ctrl-C while Python still imports must end the process without
a word.
"""

from __future__ import annotations

import sys

# Of zeros that nobody reads: they take room, and no memory. Python asks for a mebibyte at a time.
_SPARE_BYTES = 4 << 20


def main(args: list[str] | None = None) -> int:
    """Runs `ebbtide ARGS`, by default those of the process.

    Returns the exit code and raises nothing.
    """
    try:
        from .run import Process

        process = Process()
        _install_signals(process)
    except KeyboardInterrupt:
        return 130
    args = sys.argv[1:] if args is None else list(args)
    from .terminal import ClosedPipe, write_out

    code = 0
    try:
        code = _run(args, process)
        # What is still buffered must fail here, where it can be told, and not at the interpreter's
        # end.
        write_out("")
        return code
    except ClosedPipe:
        _forget_stdout()
        return 141
    except BaseException as error:
        # A failure that was told already is not told again by what it left in the buffer.
        _forget_stdout()
        return code or _report_late(error)


def _install_signals(process) -> None:
    process.signals.install()


def _run(args: list[str], process) -> int:
    """The command's exit code. Raises ClosedPipe."""
    import os

    from . import terminal
    from .signals import SIGINT_EXIT, Terminated

    terminal.prepare_streams()
    terminal.leave_room_for_help(os.environ)
    try:
        # Now: when memory has run out, what tells so could not be imported any more.
        from .failure import report_failure

        process.spare_memory = bytes(_SPARE_BYTES)
        code = _invoke(args, process, os.environ)
    except (terminal.ClosedPipe, BrokenPipeError):
        raise terminal.ClosedPipe from None
    except KeyboardInterrupt:
        process.signals.leaving()
        if process.run is not None:
            process.run.terminal.end_answer()
            process.run.report_cancelled()
        terminal.say("Cancelled.")
        code = SIGINT_EXIT
    except Terminated as signalled:
        if process.run is not None:
            process.run.terminal.end_answer()
            process.run.report_cancelled()
        code = signalled.exit_code
    except SystemExit as leave:
        # rich ends the process in its own way when help finds no reader; shell completion always.
        if isinstance(leave.__context__, BrokenPipeError):
            raise terminal.ClosedPipe from None
        code = leave.code if isinstance(leave.code, int) else 0
    except Exception as error:
        from .failure import report_failure  # again: that above may be what failed

        code = report_failure(error, args, process)
    return code


def _invoke(args: list[str], process, environ) -> int:
    """Parses and runs. Usage errors leave as exceptions of the command-line library."""
    import typer

    from .app import build_command
    from .settings_file import own_options, read_settings, settings_path
    from .variables import unknown_variables

    command = build_command()
    if "_EBBTIDE_COMPLETE" in environ:
        command.main(args=args, prog_name="ebbtide")
        return 0
    process.warnings = unknown_variables(environ, command)
    process.settings_path = settings_path()
    shared, own = {}, {}
    try:
        shared, own = read_settings(process.settings_path, own_options(command))
    except Exception as error:
        # Help must still come; a command that needs the settings raises this.
        process.settings_error = error
    try:
        with command.make_context(
            "ebbtide", args, obj=process, default_map=_for_every_command(command, shared, own)
        ) as ctx:
            command.invoke(ctx)
    except typer.Exit as leave:
        return leave.exit_code
    return 0


def _for_every_command(command, shared: dict, own: dict) -> dict:
    """The settings under each command's name, as the library looks them up."""
    commands = getattr(command, "commands", None)
    if commands is None:
        return {**shared, **own}
    return {
        name: _for_every_command(below, shared, own.get(name, {}))
        for name, below in commands.items()
    }


def _forget_stdout() -> None:
    """Nobody reads it any more; the interpreter must not complain about its buffer."""
    import os

    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):
        pass


def _report_late(error: BaseException) -> int:
    """An error of reporting itself: standard output is full, or a second Ctrl-C came."""
    from ebbtide import errors

    from .failure import lacks_memory
    from .terminal import say

    if isinstance(error, errors.EbbtideError):
        say(f"Error: {error}")
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    if lacks_memory(error) or (error.__context__ and lacks_memory(error.__context__)):
        say("Error: there is no more memory, not even to say more.")
        return 3
    return getattr(error, "exit_code", 1)


if __name__ == "__main__":
    sys.exit(main())

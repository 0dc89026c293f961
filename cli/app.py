"""The commands, gathered: their names, order, examples. Builds them and runs none."""

from __future__ import annotations

from typing import Any

import typer

from . import ask, bench, cache, calibrate, chat, config, demo, doctor, plan, serve, summarize
from .shared_options import VersionSwitch

ABOUT = "Run one long-context request whose weights and KV cache exceed the memory at hand."

EPILOG = """Start with: ebbtide demo

A document: ebbtide ask "What is the main claim?" thesis.txt -m Qwen/Qwen2.5-1.5B-Instruct

A conversation: ebbtide chat ./model

Options are also read from EBBTIDE_<OPTION> and from a file: see ebbtide config show --origin"""

COMMANDS = (
    (chat.chat, chat.EPILOG),
    (ask.ask, ask.EPILOG),
    (summarize.summarize, summarize.EPILOG),
    (serve.serve, serve.EPILOG),
    (plan.plan, plan.EPILOG),
    (demo.demo, demo.EPILOG),
    (bench.bench, bench.EPILOG),
    (calibrate.calibrate, calibrate.EPILOG),
    (doctor.doctor, doctor.EPILOG),
)
GROUPS = {
    "config": (
        "Show the settings that hold, and where each came from.",
        ((config.show, config.EPILOG), (config.path, config.EPILOG)),
    ),
    "cache": (
        "Show and remove what is kept on disk.",
        tuple((command, cache.EPILOG) for command in (cache.ls, cache.du, cache.gc, cache.purge)),
    ),
}


def build_app() -> typer.Typer:
    """The whole command line."""
    app = typer.Typer(
        name="ebbtide",
        help=ABOUT,
        epilog=EPILOG,
        invoke_without_command=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for command, epilog in COMMANDS:
        app.command(command.__name__, epilog=epilog)(command)
    for name, (about, commands) in GROUPS.items():
        group = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
        for command, epilog in commands:
            group.command(command.__name__, epilog=epilog)(command)
        app.add_typer(group, name=name, help=about)
    return app


def build_command() -> Any:
    """The same as the command-line library's own object, ready to parse."""
    return typer.main.get_command(build_app())


def _root(ctx: typer.Context, version: VersionSwitch = False) -> None:
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())

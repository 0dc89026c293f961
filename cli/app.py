"""The commands, gathered: their names, order, examples. Builds them and runs none."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

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


class _Command(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return _with_nameless_switches(super().get_params(ctx))


class _Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return _with_nameless_switches(super().get_params(ctx))


def _with_nameless_switches(parameters: list[Any]) -> list[Any]:
    """A switch takes no value, so its help names none (typer says <bool>, of its own ones too)."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


def build_app() -> typer.Typer:
    """The whole command line."""
    app = typer.Typer(
        name="ebbtide",
        cls=_Group,
        help=ABOUT,
        epilog=EPILOG,
        invoke_without_command=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for command, epilog in COMMANDS:
        app.command(command.__name__, cls=_Command, epilog=epilog)(command)
    for name, (about, commands) in GROUPS.items():
        group = typer.Typer(cls=_Group, no_args_is_help=True, rich_markup_mode="rich")
        for command, epilog in commands:
            group.command(command.__name__, cls=_Command, epilog=epilog)(command)
        app.add_typer(group, name=name, help=about)
    return app


def build_command() -> Any:
    """The same as the command-line library's own object, ready to parse."""
    return typer.main.get_command(build_app())


def _root(ctx: typer.Context, version: VersionSwitch = False) -> None:
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())

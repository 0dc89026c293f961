"""Gives a command the shared options, and parses what was given for them.

Values arrive as text, from the command line, the environment or the user's file, in this
precedence, and are parsed here, so that a wrong one is named together with its place.
"""

from __future__ import annotations

import inspect
import os
import typing
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer

from . import values
from .options import SHARED, Option, Settings


def _show_version(value: bool) -> None:
    if value:
        import ebbtide

        typer.echo(f"ebbtide {ebbtide.__version__}")
        raise typer.Exit()


VersionSwitch = Annotated[
    bool,
    typer.Option(
        "--version",
        help="Print the version and exit.",
        callback=_show_version,
        is_eager=True,
        rich_help_panel=SHARED[-1].panel,
    ),
]


def _parameter(option: Option) -> inspect.Parameter:
    kind: Any = bool if option.parse is None else str | None
    if option.many:
        kind = list[str] | None
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        # No default: the wrapper tells a value that was given from one that was not.
        default=False if option.parse is None else None,
        annotation=Annotated[
            kind,
            typer.Option(
                *option.flags,
                metavar=option.metavar,
                help=option.help
                + ("" if option.default is None else f" Default: {option.default}."),
                envvar=option.envvar,
                show_envvar=False,
                show_default=False,
                rich_help_panel=option.panel,
            ),
        ],
    )


# The commands that answer about a whole document and cannot split it.
_READING_WHOLE = ("ask", "chat", "serve")


def with_shared_options(
    command: Callable[..., Any], *, changed: Sequence[Option] = ()
) -> Callable[..., Any]:
    """Gives `command(run, **own)` every shared option; `run` is a Run that holds them parsed.

    typer reads signatures, so the wrapper has one: the command's own parameters, then the shared.
    changed: options that this command takes otherwise, in place of those of the same names.
    """
    by_name = {option.name: option for option in changed}
    options = [by_name.get(option.name, option) for option in SHARED]
    hints = typing.get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in list(inspect.signature(command).parameters.values())[1:]
    ]
    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    version = inspect.Parameter(
        "version", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=VersionSwitch
    )
    parameters = [context, *own, *map(_parameter, options), version]

    def wrapper(**given: Any) -> Any:
        from .run import Run

        ctx = given.pop("ctx")
        given.pop("version")
        shared = {option.name: given.pop(option.name) for option in SHARED}
        settings = resolve(ctx, shared, options)
        if settings.overflow == "map-reduce" and command.__name__ in _READING_WHOLE:
            settings = _without_splitting(ctx, settings)
        return command(Run.begin(settings, ctx.obj), **given)

    wrapper.__name__, wrapper.__doc__, wrapper.__module__ = (
        command.__name__,
        command.__doc__,
        command.__module__,
    )
    described: Any = wrapper  # no function's type has what typer reads
    described.__signature__ = inspect.Signature(parameters)
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


def parsed(parse: values.Parser, text: str, place: str) -> Any:
    """The value of a command's own option. Raises typer.BadParameter naming the place."""
    try:
        return parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=place) from None


def checked(parse: values.Parser) -> Callable[..., Any]:
    """A callback for a command's own option whose text must be one that `parse` takes: before the
    command runs, and in `config show`, a wrong one is refused with its place. The command gets the
    text."""

    def check(ctx: typer.Context, param: typer.CallbackParam, value: Any) -> Any:
        if value is not None and not ctx.resilient_parsing:
            source = ctx.get_parameter_source(param.name or "")
            parsed(parse, value, _own_place(param, source.name if source is not None else "", ctx))
        return value

    return check


def resolve(
    ctx: typer.Context, shared: dict[str, Any], options: Sequence[Option] = SHARED
) -> Settings:
    """Parse what was given for the shared options.

    Raises typer.BadParameter naming the place of a wrong value.
    """
    fields: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for option in options:
        raw: Any = shared[option.name]
        source = ctx.get_parameter_source(option.name)
        where = _place(option, source.name if source is not None else "DEFAULT", ctx)
        if option.many and where == option.envvar:
            # The library splits variables at blanks; a stop text may hold some.
            raw = [os.environ[option.envvar]]
        if where == "default" or raw is None or (option.many and not raw):
            origins[option.name] = "default"
            continue
        origins[option.name] = where
        try:
            if option.parse is None:
                fields[option.name] = raw
            elif option.many:
                fields[option.name] = [option.parse(text) for text in raw]
            else:
                fields[option.name] = option.parse(raw)
        except ValueError as error:
            raise typer.BadParameter(str(error), ctx=ctx, param_hint=where) from None
    return Settings(**fields, origins=origins)


def _without_splitting(ctx: typer.Context, settings: Settings) -> Settings:
    """A variable or the user's file serves all commands; on the command line it is a mistake."""
    if settings.origins["overflow"].startswith("--"):
        raise typer.BadParameter(
            f"'map-reduce' is for summarize; {ctx.info_name} reads documents whole (error)",
            ctx=ctx,
            param_hint="--overflow",
        )
    origins = {**settings.origins, "overflow": "default"}
    return replace(settings, overflow="error", origins=origins)


def _own_place(param: Any, source: str, ctx: typer.Context) -> str:
    """The same of a command's own option."""
    if source == "ENVIRONMENT":
        return param.envvar
    flag = next(flag for flag in param.opts if flag.startswith("--"))
    if source == "DEFAULT_MAP":
        return f"{flag[2:]} in [{ctx.info_name}] of {_settings_file(ctx)}"
    return flag


def _settings_file(ctx: typer.Context) -> Any:
    return getattr(ctx.obj, "settings_path", "the settings file")


def _place(option: Option, source: str, ctx: typer.Context) -> str:
    """Where a value came from, in the user's words."""
    if source == "ENVIRONMENT":
        return option.envvar
    if source == "DEFAULT_MAP":
        return f"{option.key} in {_settings_file(ctx)}"
    if source == "COMMANDLINE":
        return option.flags[0]
    return "default"

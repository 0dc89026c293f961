"""`ebbtide serve`: the model behind OpenAI's and Anthropic's protocols, for other programs."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from ebbtide import errors, format_size, parse_size

from . import values
from .plan import ModelArgument
from .run import Run
from .shared_options import checked, parsed, with_shared_options

EPILOG = """Examples:

ebbtide serve Qwen/Qwen2.5-1.5B-Instruct

ebbtide serve ./model --port 0                   any free port; it is printed

EBBTIDE_API_KEY=... ebbtide serve ./model --host 0.0.0.0

curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' -d
'{"messages": [{"role": "user", "content": "Name three rivers."}]}'"""

_MOST_WAITING = 512  # each is an open file, of which a process often has 1,024
_LEAST_BODY_BYTES, _MOST_BODY_BYTES = 16 << 10, 2 << 20
_BODY_ALLOWED = "allowed are auto, and sizes such as 512KiB or 2MiB, 16KiB or more"
_PORT, _NUM_WAITING = values.whole(0, 65535), values.whole(0, _MOST_WAITING)


def _body_size(text: str) -> int | str:
    """Bytes, or "auto"."""
    num_bytes = parse_size(text, _BODY_ALLOWED)
    if not isinstance(num_bytes, str) and num_bytes < _LEAST_BODY_BYTES:
        raise ValueError(f"{text!r} is too small; {_BODY_ALLOWED}")
    return num_bytes


def _key(text: str) -> str:
    """A key that a header can hold."""
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(
            "a key must be one or more ASCII letters, digits or signs, without spaces, such as "
            "k3y-7fa9"
        )
    return text


@with_shared_options
def serve(
    run: Run,
    model_argument: ModelArgument = None,
    host: Annotated[
        str,
        typer.Option(
            "--host",
            metavar="ADDRESS",
            envvar="EBBTIDE_HOST",
            help="The address to listen on, such as 127.0.0.1 or ::1 (this machine alone), or "
            "0.0.0.0 (all networks). One that other machines can reach needs --api-key.",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        str,
        typer.Option(
            "--port",
            metavar="N",
            envvar="EBBTIDE_PORT",
            callback=checked(_PORT),
            help="The port to listen on, from 1 to 65535; 0 takes one that is free and prints it.",
        ),
    ] = "8080",
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            envvar="EBBTIDE_API_KEY",
            callback=checked(_key),
            show_envvar=True,
            show_default=False,
            help="The key that clients must send. Other users of this machine can see a command "
            "line, so better set the variable.",
        ),
    ] = None,
    alias: Annotated[
        str | None,
        typer.Option(
            "--alias",
            metavar="NAME",
            envvar="EBBTIDE_ALIAS",
            show_default=False,
            help="A name by which clients may call the model, such as gpt-4o, besides its own.",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin",
            metavar="ORIGIN",
            show_default=False,
            help="Lets the web pages of an origin use the server, such as http://localhost:3000. "
            "May be repeated. * lets all web pages, and needs --api-key.",
        ),
    ] = None,
    queue: Annotated[
        str,
        typer.Option(
            "--queue",
            metavar="N",
            envvar="EBBTIDE_QUEUE",
            callback=checked(_NUM_WAITING),
            help="How many requests may wait while one is answered, from 0 to 512. Further ones "
            "are told to come again later.",
        ),
    ] = "8",
    max_body: Annotated[
        str,
        typer.Option(
            "--max-body",
            metavar="SIZE",
            envvar="EBBTIDE_MAX_BODY",
            callback=checked(_body_size),
            help="The largest body that a request may have, such as 512KiB. Thirteen times as much "
            "memory is set aside. auto: a thousandth of --host-memory, at most 2MiB.",
        ),
    ] = "auto",
    unload_after: Annotated[
        str,
        typer.Option(
            "--unload-after",
            metavar="TIME",
            envvar="EBBTIDE_UNLOAD_AFTER",
            callback=checked(values.duration),
            help="Give memory back after so long without a request: 90s, 10m, 2h, or never. The "
            "next request loads the model again, and what was read stays on disk.",
        ),
    ] = "never",
) -> None:
    """Serve a model over HTTP, as OpenAI's and Anthropic's APIs do."""
    run.choose_model(model_argument)
    _require_packages()
    most_waiting, unload_after_s = _NUM_WAITING(queue), values.duration(unload_after)
    most_bytes = _most_bytes(max_body, run.settings.host_memory, most_waiting)
    origins = tuple(parsed(_origin, text, "--cors-origin") for text in cors_origin or ())
    if "*" in origins and api_key is None:
        raise typer.BadParameter(
            "* lets every web page that you visit use the server, which needs --api-key; allow "
            "single origins without a key, such as http://localhost:3000",
            param_hint="--cors-origin",
        )
    from .server import listener
    from .server.app import Routes
    from .server.bodies import Bodies, reserved_bytes
    from .server.guard import LOOPBACK_NAMES, Rules
    from .server.worker import Worker

    with listener.bind(host, _PORT(port)) as listening:
        is_private = listener.is_loopback(listening)
        if not is_private and api_key is None:
            raise typer.BadParameter(
                f"other machines can reach {host}, which needs a key: give --api-key KEY, or set "
                "EBBTIDE_API_KEY; 127.0.0.1 serves this machine alone",
                param_hint="--host",
            )
        own = listener.shown(host.lower())
        hosts = tuple(dict.fromkeys([*LOOPBACK_NAMES, own])) if is_private else None
        reserve = reserved_bytes(most_bytes, most_waiting)
        budget = replace(run.open_options()["budget"], caller_bytes=reserve)
        with run.open_llm(budget=budget) as llm:
            worker = Worker(run, llm, most_waiting, unload_after_s)
            names = _names(llm, alias, run.settings.model)
            routes = Routes(worker, names, Bodies(most_bytes), run.terminal.detail)
            app = routes.app(Rules(hosts, origins, api_key))
            with listener.Listener(app, listening, most_waiting):
                _announce(run, llm, worker, names[0], listener.url_of(listening))
                worker.work()


def _most_bytes(max_body: str, host_memory: int | str, most_waiting: int) -> int:
    """Of one body. Raises typer.BadParameter."""
    from .server.bodies import reserved_bytes

    given = _body_size(max_body)
    if isinstance(given, str):  # auto
        if isinstance(host_memory, str):  # auto
            return _MOST_BODY_BYTES
        return max(_LEAST_BODY_BYTES, min(_MOST_BODY_BYTES, host_memory // 1000))
    reserve = reserved_bytes(given, most_waiting)
    if not isinstance(host_memory, str) and reserve >= host_memory:
        raise typer.BadParameter(
            f"{max_body!r} sets {format_size(reserve)} aside for requests, and --host-memory is "
            f"{format_size(host_memory)}",
            param_hint="--max-body",
        )
    return given


def _origin(text: str) -> str:
    """A web page's origin as browsers send it, or *."""
    found = text.lower()
    if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[!-.0-~]+", found):
        raise ValueError(
            f"{text!r} is not an origin; allowed are a scheme and a host, with a port if it is not "
            "the usual one and without a path, such as http://localhost:3000, or * for all"
        )
    return found


def _require_packages() -> None:
    """Raises InputError where the server's packages are missing."""
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise errors.InputError(
            f"'ebbtide serve' needs {' and '.join(missing)}: pip install 'ebbtide[server]'."
        )


def _names(llm: Any, alias: str | None, model: str | None) -> tuple[str, ...]:
    """By what clients may call the model; the first is what they are told."""
    if model is None:
        own = llm.model_name.partition(" ")[0]
    elif os.path.exists(path := os.path.expanduser(model)):  # where it lies is nobody's business
        own = os.path.basename(os.path.abspath(path)).removesuffix(".gguf")
    else:
        own = model
    return tuple(dict.fromkeys(name for name in (alias, own, model) if name))


def _announce(run: Run, llm: Any, worker: Any, name: str, url: str) -> None:
    """Where it is, and how much fits. With --json the one object of the run."""
    run.terminal.note(str(llm.plan))
    run.terminal.tell(
        f"Serving {name}, up to {worker.context:,} tokens, at {url}/v1. Ctrl-C stops."
    )
    if run.terminal.as_json:
        run.terminal.result(
            {
                "schema": 1,
                "url": f"{url}/v1",
                "model": name,
                "context": worker.context,
                "plan": llm.plan.to_dict(),
                "warnings": list(llm.warnings),
            }
        )

"""The user's settings file: TOML whose keys are the names of the shared options.

    model = "~/models/qwen"
    host-memory = "6GiB"

    [chat]                          # options that one command alone has
    system = "Answer in French."
    history = false

Reads it into the texts that the command line would have given. Knows the table of options and
nothing of their use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ebbtide import errors

from .options import BY_NAME
from .values import nearest

# command -> the names of its own options that may stand in the file, as the command line has them
Own = dict[str, dict[str, type]]


def settings_path() -> Path:
    """Where the file is looked for; it need not exist."""
    import platformdirs

    return Path(platformdirs.user_config_dir("ebbtide")) / "config.toml"


def own_options(command: Any) -> Own:
    """What each command's table may hold: its options with a variable. command: as it was built."""
    found = {}
    for name, below in command.commands.items():
        params = [p for p in getattr(below, "params", []) if p.envvar and p.name not in BY_NAME]
        if params and not hasattr(below, "commands"):
            found[name] = {p.name: bool if p.is_flag else str for p in params}
    return found


def read_settings(path: Path, own: Own) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(shared, by command): option name -> text, list of texts, or bool for a switch.

    Both empty without a file. Raises InputError.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a mark before the text
    except (FileNotFoundError, NotADirectoryError):
        return {}, {}
    except UnicodeDecodeError as error:
        raise errors.InputError(
            f"The settings file {path} cannot be read: it must be UTF-8, and its byte "
            f"{error.start} (0x{error.object[error.start]:02x}) is not."
        ) from None
    except OSError as error:
        reason = "it is a folder" if path.is_dir() else error.strerror
        raise errors.InputError(f"The settings file {path} cannot be read: {reason}.") from None
    import tomllib

    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise errors.InputError(f"The settings file {path} is not valid TOML: {error}.") from None
    shared, commands = {}, {}
    for key, value in found.items():
        if isinstance(value, dict) and key in own:
            commands[key] = dict(_own(key, inner, value[inner], own[key], path) for inner in value)
        else:
            name = _name(key, path)
            shared[name] = _text(key, value, path)
    return shared, commands


def _own(command: str, key: str, value: Any, known: dict[str, type], path: Path) -> tuple[str, Any]:
    """One entry of a command's table: (parameter, value)."""
    name = key.replace("-", "_")
    if name not in known:
        keys = ", ".join(k.replace("_", "-") for k in known)
        raise errors.InputError(
            f"The settings file {path} has the unknown key {key!r} in [{command}]; "
            f"known are {keys}."
        )
    is_switch = known[name] is bool
    if isinstance(value, bool) != is_switch or not isinstance(value, bool | str | int | float):
        wanted = "true or false" if is_switch else "a text or a number"
        given = "" if name == "api_key" else f", not {value!r}"  # a key is never shown
        raise errors.InputError(f"{key} in [{command}] of {path} must be {wanted}{given}.")
    return name, value if is_switch else str(value)


def _name(key: str, path: Path) -> str:
    name = key.replace("-", "_")
    if name in BY_NAME:
        return name
    near = nearest(name, BY_NAME)
    if near:
        hint = f"did you mean {BY_NAME[near].key!r}?"
    else:
        known = ", ".join(option.key for option in BY_NAME.values())
        hint = f"known are {known}, and a table for each command's own options, such as [chat]."
    raise errors.InputError(f"The settings file {path} has the unknown key {key!r}; {hint}")


def _text(key: str, value: Any, path: Path) -> Any:
    option = BY_NAME[key.replace("-", "_")]
    if option.parse is None:
        if not isinstance(value, bool):
            raise errors.InputError(f"{key} in {path} must be true or false, not {value!r}.")
        return value
    if option.many:
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise errors.InputError(f"{key} in {path} must be a text or a list of texts.")
        return texts
    if isinstance(value, bool) and (option.metavar or "").startswith("on|off"):
        return "on" if value else "off"
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise errors.InputError(f"{key} in {path} must be a text or a number, not {value!r}.")
    return str(value)

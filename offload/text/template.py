"""Chat templates: from checked messages to the text that a model was trained to read.

`ChatTemplate` renders the jinja source that comes with a model, within a second of CPU time and a
bounded amount of text, and turns every failure into an InputError that names the template. What a
template may do is `sandbox.py`'s business; what its text becomes is `text.py`'s. Knows no tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import meta
from jinja2.exceptions import UndefinedError

from ..answers.tools import checked_calls
from ..errors import InputError
from .meter import LimitExceeded, Meter
from .sandbox import MeteredEnvironment

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
MAX_SOURCE_CHARS = 64 * 1024  # compiles within a second; real ones have up to 17,000
MAX_DEPTH = 64  # of lists and objects within a message; schemas may have as many
_NO_TOOLS = {"tools": [], "functions": ""}

# To see whether a template reads parts, and how it stands in a list that is written as it is.
_PROBE = "a part of a message"
_LISTED = re.compile(rf"""["']text["']: *["']{_PROBE}""")

# For models without a template: plain text that base models continue well.
FALLBACK_SOURCE = """\
{%- if adds_bos %}{{ bos_token }}{% endif -%}
{%- for message in messages -%}
{%- if message.role in ('system', 'developer') %}{{ message.content }}
{%- elif message.role == 'assistant' %}Assistant: {{ message.content }}
{%- else %}User: {{ message.content }}
{%- endif %}{{ '\\n\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}Assistant:{% endif -%}
"""


class _Refusal(Exception):
    """A template called raise_exception: it will not render these messages."""


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """A copy of `messages` in plain JSON types, without the keys whose value is None.

    Each message is {"role": one of ROLES, "content": text}; content may also be a list of
    {"type": "text", "text": ...}, or absent beside an assistant's tool_calls. Other keys are kept.
    InputError says which message is wrong, and how.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        kind = type(messages).__name__
        raise InputError(f"messages must be a list of {{role, content}}, not {kind}")
    if not messages:
        raise InputError("messages is empty: give at least one {role, content}")
    checked: list[dict[str, Any]] = []
    calls: dict[Any, str] = {}  # the latest: names of functions by id
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise InputError(
                f"{where} must be a mapping with role and content, not {type(message).__name__}"
            )
        message = plain_data(message, where)
        message = {key: value for key, value in message.items() if value is not None}
        role = message.get("role")
        if role not in ROLES:
            given = "is missing" if role is None else f"is {role!r}"
            raise InputError(f"{where}: the role {given}; known roles are {', '.join(ROLES)}")
        if message.get("tool_calls"):
            # Again: arguments may have been text until now.
            called = checked_calls(message["tool_calls"], where)
            message["tool_calls"] = plain_data(called, f"{where}.tool_calls")
            calls = {call.get("id"): call["function"]["name"] for call in message["tool_calls"]}
            if role == "assistant":
                message.setdefault("content", "")
        elif role == "tool" and message.get("tool_call_id") in calls:
            message.setdefault("name", calls[message["tool_call_id"]])  # some templates print it
        _check_content(message, where)
        checked.append(message)
    return checked


def _check_content(message: dict[str, Any], where: str) -> None:
    content = message.get("content")
    if content is None:
        raise InputError(f"{where}: content is missing")
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        kind = type(content).__name__
        raise InputError(f"{where}: content must be text or a list of text parts, not {kind}")
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise InputError(f"{where}: only parts of text can be read, and one is {kind!r}")


def with_joined_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Checked messages with texts in place of lists of parts, for templates that know none."""
    return [
        {**message, "content": "\n".join(part["text"] for part in message["content"])}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def plain_data(value: Any, where: str, depth: int = 0) -> Any:
    """`value` rebuilt from exact JSON types: a template never sees an object with methods of its
    own. InputError for anything else."""
    if depth > MAX_DEPTH:
        raise InputError(f"{where} is nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"{where}: names must be text, not {key!r}")
        return {str.__str__(k): plain_data(v, where, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item, where, depth + 1) for item in value]
    raise InputError(f"{where} holds a {type(value).__name__}; only text, numbers, lists and maps")


def _refuse(message: Any = "no reason given") -> None:
    raise _Refusal(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML, which no model was trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _plan_to_json(meter: Meter, value: Any, *args: Any, **options: Any) -> Any:
    texts = [part for option in (*args, *options.values()) for part in _parts(option)]
    if any(len(text) > 16 for text in texts if isinstance(text, str)) or any(
        number > 16 for number in texts if isinstance(number, int)
    ):
        raise LimitExceeded("it indents JSON further than a chat template may")
    return value


def _parts(option: Any) -> Sequence:
    return option if isinstance(option, (list, tuple)) else (option,)


def _line_of(error: BaseException) -> int | None:
    """The template's line that `error` comes from: jinja2 rewrites the traceback to its lines."""
    line, step = None, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<template>":
            line = step.tb_lineno
        step = step.tb_next
    return line


class ChatTemplate:
    """One compiled template. `name` stands in errors: the model's name or the file's.

    Rendering is thread-safe and leaves no state behind.
    """

    def __init__(self, source: str, name: str, seconds: float = 1.0):
        self.source = source
        self.name = name
        self.seconds = seconds
        if len(source) > MAX_SOURCE_CHARS:
            raise InputError(
                f"the chat template of {name} is not used: it has {len(source):,} characters, "
                f"more than {MAX_SOURCE_CHARS:,}"
            )
        self._environment = MeteredEnvironment()
        self._environment.add_filter("tojson", _to_json, _plan_to_json)
        self._environment.globals["raise_exception"] = _refuse
        meter = Meter(max(seconds, 1.0), 2**23, 2**26)
        self._template = self._metered(meter, lambda: self._environment.from_string(source))

    def knows(self, *names: str) -> bool:
        """Whether one of these variables changes what is rendered."""
        return not self._variables.isdisjoint(names)

    @cached_property
    def _variables(self) -> set[str]:
        return meta.find_undeclared_variables(self._environment.parse(self.source))

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        now: datetime | None = None,
        **variables: Any,
    ) -> str:
        """The text of `messages`, which `check_messages` has passed.

        `now` is what strftime_now tells (default: this moment); `variables` are the special tokens,
        tools, documents and whatever else the template asks for.
        """
        now = now or datetime.now()

        def strftime_now(pattern: str) -> str:
            if len(pattern) > 200:
                raise LimitExceeded("it asks for a date of more than 200 characters")
            return now.strftime(pattern)

        context = {
            "tools": None,
            "documents": None,
            **variables,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "strftime_now": strftime_now,
        }
        num_messages = len(messages)
        # A long history may take longer, and templates that build their text piece by piece make
        # it once per message.
        meter = Meter(self.seconds * max(1.0, num_messages / 1000), 0, 0)
        num_chars = meter.admit([messages, variables])
        meter.max_chars = 2**23 + 16 * num_chars
        meter.chars_left = 2**26 + (64 + 4 * num_messages) * num_chars

        def work() -> str:
            try:
                return self._template.render(context)
            except (TypeError, UndefinedError):
                # Some templates made for tools walk through them without asking if there are any.
                if any(context.get(name) is not None for name in _NO_TOOLS):
                    raise
                moment = now.strftime("%Y-%m-%d %H:%M:%S")  # what firefunction's asks for besides
                return self._template.render({"datetime": moment, **context, **_NO_TOOLS})

        return self._metered(meter, work)

    def reads_parts(self, **variables: Any) -> bool:
        """Whether a content may be a list of parts. A template that knows texts alone fails, or
        writes the list as Python does. variables: see `render`."""
        part = {"type": "text", "text": _PROBE}
        try:
            rendered = self.render([{"role": "user", "content": [part]}], **variables)
        except InputError:
            return False
        return _PROBE in rendered and _LISTED.search(rendered) is None

    def _metered(self, meter: Meter, work: Any) -> Any:
        try:
            return self._environment.on_account(meter, work)
        except _Refusal as refusal:
            raise InputError(
                f"the chat template of {self.name} refuses these messages: {refusal}"
            ) from None
        except LimitExceeded as limit:
            raise InputError(f"the chat template of {self.name} was stopped: {limit}") from None
        except Exception as error:  # a stranger's program may fail in any way
            line = getattr(error, "lineno", None) or _line_of(error)
            where = f" at line {line}" if line else ""
            reason = str(error) or type(error).__name__
            raise InputError(f"the chat template of {self.name} failed{where}: {reason}") from error

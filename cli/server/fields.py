"""The fields of a body: which an address knows, and what each may be.

A field that would change the answer and is not known is refused by name; one that changes nothing
is passed over, as clients send many of those.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ebbtide import GenerationConfig, errors

from .bad_request import BadRequest, kind_of

_KINDS = {str: "a text", bool: "true or false", dict: "an object", list: "a list"}
_OWN_SETTINGS = (
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "do_sample", "seed", "think"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size"),
    *("logit_bias", "suppress_tokens", "bad_words_ids", "min_new_tokens"),
)
# What -1 means to clients of llama.cpp's, LM Studio's and vLLM's; None: as if nothing were given.
_NO_LIMIT: dict[str, Any] = {"max_new_tokens": None, "top_k": 0}
_EFFORTS: dict[str, bool | str] = {
    **{"none": False, "minimal": "low", "low": "low", "medium": "medium"},
    **{"high": "high", "xhigh": "high", "max": "high"},
}


@dataclass(frozen=True)
class Fields:
    """Of one address. own: what its reader takes care of. settings: a client's name for a setting
    -> Ebbtide's, beside those that have Ebbtide's own. neutral: what other servers offer -> the
    values that ask for nothing, and why others are refused. ignored: what changes no answer."""

    own: tuple[str, ...]
    settings: Mapping[str, str]
    neutral: Mapping[str, tuple[tuple[Any, ...], str]]
    ignored: tuple[str, ...]

    def given(self, body: dict[str, Any]) -> dict[str, Any]:
        """What a body holds but for null. Raises BadRequest."""
        given = {name: value for name, value in body.items() if value is not None}
        settings = {*self.settings, *_OWN_SETTINGS}
        known = {*self.own, *settings, *self.neutral, *self.ignored}
        for name, value in given.items():
            if name not in known:
                allowed = ", ".join(sorted({*self.own, *settings}))
                raise BadRequest(
                    f"{name!r} is not a field that Ebbtide knows; allowed are {allowed}.",
                    param=name,
                )
            if name in self.neutral:
                check_neutral(name, value, *self.neutral[name])
        return given

    def generation(self, given: dict[str, Any]) -> dict[str, Any]:
        """Settings of the answer, by Ebbtide's names. Raises BadRequest."""
        found: dict[str, Any] = {}
        for name, own in {**self.settings, **{name: name for name in _OWN_SETTINGS}}.items():
            if name not in given:
                continue
            value = _whole(given[name])
            if value == -1 and own in _NO_LIMIT:
                if (value := _NO_LIMIT[own]) is None:
                    continue
            if own == "seed" and isinstance(value, int) and -(2**63) <= value < 0:
                value += 2**64  # OpenAI's are of 64 bits with a sign
            check_settings(name, own, {own: value})
            if found.setdefault(own, value) != value:
                raise BadRequest(
                    f"{name!r} contradicts another field of the same meaning.", param=name
                )
        return found


def _whole(value: Any) -> Any:
    """JSON has one kind of numbers, and some clients write all of them with a point: 100.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_settings(where: str, own: str, settings: dict[str, Any]) -> None:
    """Raises BadRequest, which names the client's field in place of Ebbtide's own setting."""
    try:
        GenerationConfig(**settings)
    except errors.InputError as error:
        raise BadRequest(f"{error}.".replace(own, where, 1), param=where) from None


def check_neutral(name: str, value: Any, allowed: tuple[Any, ...], reason: str) -> None:
    """Raises BadRequest for a value that asks for what is not done."""
    # True is 1 in Python, and no number in JSON.
    is_bool = isinstance(value, bool)
    if any(value == item and isinstance(item, bool) == is_bool for item in allowed):
        return
    if not allowed:
        raise BadRequest(f"{name!r} is not supported: {reason}.", param=name)
    values = " or ".join(map(json.dumps, allowed))
    raise BadRequest(f"{name!r} may only be {values}: {reason}.", param=name)


def typed(given: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """A field of one of JSON's types; its default where it is missing or null."""
    value = given.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise BadRequest(f"{name!r} must be {_KINDS[kind]}, not {kind_of(value)}.", param=name)
    return value


def effort_of(value: Any, where: str) -> bool | str:
    """How much a model is to think, in Ebbtide's words."""
    if not isinstance(value, str) or value not in _EFFORTS:
        raise BadRequest(
            f"{where!r} must be one of {', '.join(_EFFORTS)}, not {value!r}.", param=where
        )
    return _EFFORTS[value]


def schema_of(schema: Any, where: str) -> Any:
    """A JSON schema that answers can be kept to."""
    if schema is None:
        raise BadRequest(f"'{where}' is missing.", param=where)
    check_settings(where, "json_schema", {"json_schema": schema})
    return schema


def one_function(choice: dict[str, Any]) -> dict[str, Any]:
    """A tool_choice of one function by its name, in the shape of chat completions."""
    name = choice.get("name")
    if not isinstance(name, str):
        raise BadRequest(
            f"'tool_choice' must have the 'name' of a function, a text, not {kind_of(name)}.",
            param="tool_choice",
        )
    return {"type": "function", "function": {"name": name}}


def tools_of(given: dict[str, Any]) -> dict[str, Any]:
    """What is offered, and how it is to be used, in the shapes of chat completions; without any,
    the rest says nothing."""
    if not given.get("tools"):
        if given.get("tool_choice", "auto") not in ("auto", "none"):
            raise BadRequest(
                "'tool_choice' asks for a call, and no 'tools' are given.", param="tool_choice"
            )
        return {}
    found = {
        name: given[name]
        for name in ("tools", "tool_choice", "parallel_tool_calls")
        if name in given
    }
    for name, value in found.items():
        check_settings(name, name, {"tools": given["tools"], name: value})
    return found


def read_json(body: bytes | bytearray) -> dict[str, Any]:
    """The object that a body holds. Raises BadRequest."""

    def no_number(word: str) -> Any:
        raise ValueError(f"{word} is not a number in JSON")

    try:
        found = json.loads(body.decode("utf-8-sig"), parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"The body is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise BadRequest(f"The body must be a JSON object, not {kind_of(found)}.")
    return found

"""A request that is wrong, in the server's own words."""

from __future__ import annotations

from typing import Any


class BadRequest(Exception):
    """A request that is not answered. status: of HTTP; param: the field that is wrong; code: for
    programs."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def kind_of(value: Any) -> str:
    """A value's type, in the words of JSON."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")

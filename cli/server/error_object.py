"""What a client is told of what went wrong, in the shape of the protocol that it speaks."""

from __future__ import annotations

from typing import Any

from ebbtide import errors

from ..failure import describe
from .bad_request import BadRequest

ANTHROPIC_PATH = "/v1/messages"  # and what is below it; all else is OpenAI's

_MOST_CHARS = 1000  # of a message: it may repeat what was sent

# Of errors that a request may cause: status, type and code. Others are the server's.
_STATUSES: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (errors.ContextOverflow, 400, "invalid_request_error", "context_length_exceeded"),
    # Asking again changes nothing, and clients ask again by themselves where the status is 5xx.
    (errors.DoesNotFit, 400, "invalid_request_error", "does_not_fit"),
    (errors.InputError, 400, "invalid_request_error", None),
    (errors.StorageError, 500, "server_error", "storage_error"),
    # Its files changed, and are not whole yet; whoever changed them may mend it.
    (errors.ModelError, 503, "server_error", "model_unavailable"),
)
_ANTHROPIC_TYPES = {
    **{400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"},
    **{404: "not_found_error", 413: "request_too_large", 503: "overloaded_error"},
}


def error_object(error: BaseException, path: str = "") -> tuple[int, dict[str, Any]]:
    """(status, body) for what went wrong. path: that was asked."""
    status, found = _described(error)
    is_anthropics, message = _is_anthropic(path), found["message"]
    if isinstance(error, errors.ContextOverflow):
        # Clients shorten a conversation where they read these words.
        needed, available = error.needed_tokens, error.available_tokens
        begin = f"This model's maximum context length is {available} tokens"
        if is_anthropics:
            begin = f"prompt is too long: {needed} tokens > {available} maximum"
        message = f"{begin}: {message}"
    if not is_anthropics:
        return status, {"error": {**found, "message": message}}
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return status, {"type": "error", "error": {"type": kind, "message": message}}


def _is_anthropic(path: str) -> bool:
    return path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/")


def _described(error: BaseException) -> tuple[int, dict[str, Any]]:
    if isinstance(error, BadRequest):
        kind = {401: "authentication_error", 403: "permission_error", 503: "server_error"}
        status, code, param = error.status, error.code, error.param
        return status, _error(str(error), kind.get(status, "invalid_request_error"), code, param)
    for known, status, kind, code in _STATUSES:
        if isinstance(error, known):
            return status, _error(str(error), kind, code)
    if isinstance(error, Exception):
        return 500, _error(describe(error)[0]["message"], "server_error", "internal_error")
    return 503, _error("The server is stopping.", "server_error", "stopping")


def _error(message: str, kind: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    where = param and _short(param)
    return {"message": _short(message), "type": kind, "param": where, "code": code}


def _short(text: str) -> str:
    """Its beginning and its end, where what is allowed is told."""
    half = _MOST_CHARS // 2
    return text if len(text) <= _MOST_CHARS else f"{text[:half]} ... {text[-half:]}"

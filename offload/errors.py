"""The errors that Ebbtide raises for what users and machines do wrong.

    EbbtideError
      ModelError              the model folder or id                       exit 2
        UnsupportedModel        an architecture or feature we do not run
        BadCheckpoint           files missing, damaged or of the wrong shape
      InputError              an argument, a document, a template          exit 2
      DoesNotFit              a memory budget is too small                 exit 3
      ContextOverflow         more tokens than the context holds           exit 3
      StorageError            disk full, read or write failed              exit 4

A failed `assert` is a bug of ours; these are not. Knows nothing of torch, so that usage errors stay
quick.
"""

from __future__ import annotations

from typing import Any


class EbbtideError(Exception):
    """Base of all errors that Ebbtide raises on purpose; commands return `exit_code`."""

    exit_code = 1

    def fields(self) -> dict[str, Any]:
        """What `--json` prints: the type, the message and the error's own numbers."""
        own = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        return {"type": type(self).__name__, "message": str(self), **own}


class ModelError(EbbtideError):
    """The model cannot be used."""

    exit_code = 2


class UnsupportedModel(ModelError):
    """An architecture, or a feature of one, that Ebbtide does not run."""


class BadCheckpoint(ModelError):
    """A checkpoint's files are missing, damaged, unsafe or of the wrong shape."""


class InputError(EbbtideError, ValueError):
    """An argument, a document or a chat template is wrong."""

    exit_code = 2


class DoesNotFit(EbbtideError):
    """A request needs more of a tier than its budget holds. Nothing was started.

    tier: "device", "host" or "disk"; needed_bytes and available_bytes belong to that tier;
    largest_context: the most tokens that would fit, or None when not even one cell does.
    """

    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        tier: str,
        needed_bytes: int,
        available_bytes: int,
        largest_context: int | None = None,
    ):
        super().__init__(message)
        self.tier = tier
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes
        self.largest_context = largest_context


class ContextOverflow(EbbtideError):
    """Prompt and answer need more tokens than the context holds. Nothing was truncated."""

    exit_code = 3

    def __init__(self, message: str, *, needed_tokens: int, available_tokens: int):
        super().__init__(message)
        self.needed_tokens = needed_tokens
        self.available_tokens = available_tokens


class StorageError(EbbtideError):
    """The spill file could not be written or read; the disk may be full."""

    exit_code = 4

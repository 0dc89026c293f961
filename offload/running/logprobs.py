"""How likely the model found each token of an answer, and which tokens it found likeliest there.

Natural logarithms of the model's own distribution, the softmax of its logits: before penalties,
temperature and filters, and with no regard to a schema. So they are the same whatever is sampled,
and those of `LLM.score`. A token that a schema has forced may be an unlikely one.

Kept as numbers, 8 bytes for each, and made into objects when they are looked at: a token of an
answer takes 168 bytes at most. That is less than a plan's `text` has for a token, as this one need
not be encoded.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch

from ..output import TokenLogprob
from .sampler import top_k_places


class Logprobs(Sequence[TokenLogprob]):
    """One for each token of an answer, which may still grow; a slice is fixed, and copies nothing.

    num_top: how many of the likeliest tokens are kept with each, at most as many as the model has.
    bytes_of: what a token adds to a text.
    """

    __slots__ = ("_bytes_of", "_ids", "_num_top", "_rows", "_values", "_width")

    def __init__(self, num_top: int, bytes_of: Callable[[int], bytes]):
        self._num_top, self._bytes_of = num_top, bytes_of
        self._width = 1 + num_top  # of a row: the token, and the likeliest from the first on
        self._ids, self._values = array("i"), array("f")
        self._rows: range | None = None  # of a slice

    def add(self, logits: torch.Tensor, token: int) -> None:
        """The token was chosen where the model computed logits (vocab,)."""
        logprobs = logits.detach().to("cpu", torch.float32).log_softmax(-1)  # (vocab,)
        assert self._rows is None, "slices do not grow"
        ids = [token, *_likeliest(logprobs, self._num_top)]
        self._ids.extend(ids)
        self._values.extend(logprobs[ids].tolist())

    def __len__(self) -> int:
        return len(self._ids) // self._width if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, at: int) -> TokenLogprob: ...
    @overload
    def __getitem__(self, at: slice) -> Logprobs: ...
    def __getitem__(self, at: int | slice) -> TokenLogprob | Logprobs:
        rows = range(len(self)) if self._rows is None else self._rows
        if isinstance(at, slice):
            part = Logprobs(self._num_top, self._bytes_of)
            part._ids, part._values, part._rows = self._ids, self._values, rows[at]
            return part
        first = rows[at] * self._width
        top = tuple(self._told(i) for i in range(first + 1, first + self._width))
        return self._told(first, top)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Logprobs) and [*self] == [*other]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled without the tokenizer, and a slice without the rest."""
        rows = range(len(self)) if self._rows is None else self._rows
        places = [row * self._width + i for row in rows for i in range(self._width)]
        ids = array("i", [self._ids[place] for place in places])
        values = array("f", [self._values[place] for place in places])
        return _restored, (self._num_top, {i: self._bytes_of(i) for i in {*ids}}, ids, values)

    def __repr__(self) -> str:
        return f"<Logprobs of {len(self)} tokens>"

    def _told(self, at: int, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        token = self._ids[at]
        return TokenLogprob(token, self._bytes_of(token), self._values[at], top)


def _restored(num_top: int, known: dict[int, bytes], ids: array, values: array) -> Logprobs:
    logprobs = Logprobs(num_top, known.__getitem__)
    logprobs._ids, logprobs._values = ids, values
    return logprobs


def _likeliest(logprobs: torch.Tensor, count: int) -> list[int]:
    """The ids of the `count` likeliest tokens, or of all; among equals the lowest come first."""
    if count == 0:
        return []
    places = top_k_places(logprobs, count)
    if places is None:
        places = torch.arange(len(logprobs))
    order = logprobs[places].sort(descending=True, stable=True).indices[:count]
    return places[order].tolist()

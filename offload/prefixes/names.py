"""What the prefix store's files are called, and which of them an end builds on.

A file's name is a SHA-256 of all tokens up to its end, cell by cell, and of what else a page's bits
depend on: the model, its options, and what computes. Decoding gives a token's keys and values other
bits than prefill does, so a decoded token counts as another one (its complement), together with the
mode that decoded it. Knows tokens and names, no bytes of pages.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from importlib.metadata import version
from typing import NamedTuple

import torch

from ...kernels import dispatch
from ..disk.spill_dir import PREFIX_SUFFIXES
from ..mode import Mode
from .head import cell_names, head_of
from .layout import PrefixLayout

SPAN_SUFFIX, WINDOW_SUFFIX, END_SUFFIX, ROWS_SUFFIX = PREFIX_SUFFIXES


class Link(NamedTuple):
    """One of the files that it takes to go on from an end. span: whose pages it has, or the one in
    which those of an end file begin."""

    name: str
    suffix: str
    span: int


class PrefixNames:
    """depends_on: what, besides the tokens and what computes on `device`, pages depend on. mode: of
    decoding."""

    def __init__(
        self,
        layout: PrefixLayout,
        cell_tokens: int,
        depends_on: list,
        device: torch.device,
        mode: Mode,
    ):
        self._layout, self._cells = layout, cell_tokens
        self._mode = f"{mode.name} {mode.selector} {sorted(mode.selector_options.items())}"
        everything = [*depends_on, *_kernels_fingerprint(device)]
        self.fingerprint = hashlib.sha256(repr(everything).encode()).hexdigest()

    def of_cells(self, tokens: array, num_cells: int) -> list[str]:
        """One for each cell that ends within the tokens, and for their beginning."""
        return cell_names(self.fingerprint, tokens, num_cells, self._cells, self._mode)

    def decoded_by(self, tokens: array) -> bytes:
        """The mode that some of the tokens were decoded in; nothing where none was."""
        return self._mode.encode() if min(tokens, default=0) < 0 else b""

    def chain(self, names: list[str], boundary: int) -> list[Link]:
        """The files that the end at cell `boundary` builds on, first to last, itself included."""
        last, links = (boundary - 1) // self._layout.span_cells, []
        for span in range(last):
            links += self._of_span(names, span, boundary)
        return [*links, Link(names[boundary] + END_SUFFIX, END_SUFFIX, last)]

    def _of_span(self, names: list[str], span: int, boundary: int) -> list[Link]:
        """Of a whole span, what the end at cell `boundary` builds on."""
        is_there = self._layout.whole, span in self._layout.window_spans(boundary)
        kinds = zip((SPAN_SUFFIX, WINDOW_SUFFIX), is_there, strict=True)
        name = names[(span + 1) * self._layout.span_cells]
        return [Link(name + kind, kind, span) for kind, has_pages in kinds if has_pages]

    def layers_in(self, suffix: str) -> list[int]:
        """Whose pages files of a kind have."""
        whole, windowed = self._layout.whole, self._layout.windowed
        kinds = {SPAN_SUFFIX: whole, WINDOW_SUFFIX: windowed, END_SUFFIX: whole + windowed}
        return kinds[suffix]

    def head(self, suffix: str, tokens: array, num_cells: int) -> bytes:
        """Of a file that has the first cells before it. All tokens are there to be compared, for
        keys and values depend on all of them."""
        tokens = tokens[: num_cells * self._cells]
        fields = {
            "fingerprint": self.fingerprint,
            "kind": suffix,
            "num_cells": num_cells,
            "cell_tokens": self._cells,
            "decoded_by": self.decoded_by(tokens).decode(),
        }
        return head_of(fields, tokens)


def _kernels_fingerprint(device: torch.device) -> list[str | int]:
    """What prefill's bits depend on besides the model: where, and by which code, it runs."""
    found = [version("ebbtide"), torch.__version__, device.type]
    found.append(torch.backends.cpu.get_cpu_capability())
    if device.type == "cuda":
        found.append(torch.cuda.get_device_name(device))
    native = dispatch.compiled_for(torch.empty(0, device=device))
    if native is not None:
        built = os.stat(native.__file__)  # a version may be built more than once
        return [*found, dispatch.instruction_set(), built.st_size, built.st_mtime_ns]
    if dispatch.gpu_for(torch.empty(0, device=device)) is not None:
        return [*found, "triton", version("triton")]
    return [*found, "reference", torch.get_num_threads()]

"""Which texts the files of kept pages are of, for people: each file's head has all tokens up to its
end, and names follow from tokens. Texts that begin alike share files. Imports no torch.
"""

from __future__ import annotations

import contextlib
from array import array
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..disk.spill_dir import PREFIX_SUFFIXES, prefix_files
from ..text.prompt import num_common
from .head import cell_names, read_fields, read_tokens

_NAME_DIGITS = 12


@dataclass(frozen=True)
class KeptText:
    """name: short, for people. tokens: in whole cells, decoded ones as their complements. last: its
    longest file, which is touched last when it is used. paths: of all files that it takes."""

    name: str
    fingerprint: str
    tokens: array
    last: Path
    paths: frozenset[Path]


def kept_texts(spill_dir: str | Path | None = None) -> list[KeptText]:
    """Those whose pages are kept, the longest first. One that another text begins with is none of
    its own; a file that cannot be read is no text's."""
    return texts_of(prefix_files(spill_dir))


def texts_of(files: Iterable[Path]) -> list[KeptText]:
    """The same of these files."""
    ours = (path for path in files if path.suffix in PREFIX_SUFFIXES)
    read = [(path, fields) for path in ours if (fields := read_fields(path)) is not None]
    by_name: dict[str, set[Path]] = defaultdict(set)
    for path, _ in read:
        by_name[path.stem].add(path)
    found, seen = [], set()
    for path, fields in sorted(read, key=lambda one: (-one[1]["num_cells"], one[0].name)):
        if path in seen:
            continue
        with contextlib.suppress(OSError, ValueError):
            tokens = read_tokens(path, fields)
            shape = len(tokens) // fields["cell_tokens"], fields["cell_tokens"]
            names = cell_names(fields["fingerprint"], tokens, *shape, fields["decoded_by"])
            if names[-1] != path.stem:  # a head that is damaged
                continue
            paths = frozenset().union(*(by_name[name] for name in names if name in by_name))
            seen |= paths
            name = path.stem[:_NAME_DIGITS]
            found.append(KeptText(name, fields["fingerprint"], tokens, path, paths))
    return found


def why_not_found(texts: list[KeptText], fingerprint: str, wanted: array) -> str:
    """A sentence on what is kept that is nearest to tokens of which not all were found."""
    alike = [text for text in texts if text.fingerprint == fingerprint]
    if not texts:
        return "No pages of any text are kept."
    if not alike:
        return (
            "The pages that are kept are of another model, of other --kv-bits or --weight-bits, or "
            "of another version or machine."
        )
    num, text = max(((num_common(t.tokens, wanted), t) for t in alike), key=lambda one: one[0])
    end = "it ends there" if num == len(text.tokens) else f"first difference at token {num + 1:,}"
    return f"Of the texts that are kept {text.name} has the most in common: {num:,} tokens; {end}."

"""Which GGUF files of a folder or a repository are one model, and which of several models is meant.

Knows names of files, and what people write in them: a quantisation such as Q4_K_M.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import ModelError

_PART = re.compile(r"-(\d{5})-of-\d{5}\.gguf$")
# Vision's part of a model, and what a quantisation was measured with.
_COMPANION = re.compile(
    r"(?:^|[-._])mmproj(?=[-._]|$)|^mmproj|^imatrix(?=[-._]|$)|[-._]imatrix$", re.IGNORECASE
)
_TAG = re.compile(
    r"(?<![A-Za-z0-9])(?:UD-)?(?:I?Q\d\w*|TQ\d_\d|MXFP4\w*|BF16|F16|FP16|F32|FP32)(?=[.-]|$)",
    re.IGNORECASE,
)
_SHOWN = 12


def models_of(names: Iterable[str]) -> list[list[str]]:
    """The files of each model, its parts in order. Companions are no models of their own."""
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.endswith(".gguf") and _COMPANION.search(_stem(name)) is None:
            models.setdefault(_PART.sub("", name), []).append(name)
    return list(models.values())


def choose_model(models: list[list[str]], tag: str | None, where: str) -> list[str]:
    """The files of the model that `tag` names, or of the only one there is. ModelError lists the
    choices. where: for messages, what holds them.
    """
    if tag is not None:
        wanted = tag.lower()
        found = [files for files in models if _tag(files[0]).lower() == wanted]
        whole = re.compile(rf"(?:^|[-./]){re.escape(tag)}(?=[-./]|$)", re.IGNORECASE)
        found = found or [files for files in models if whole.search(files[0])]
        if len(found) == 1:
            return found[0]
        what = "several models" if found else "no model"
        raise ModelError(f"{where} has {what} {tag!r}; it has {_listed(models)}")
    if len(models) == 1:
        return models[0]
    raise ModelError(
        f"{where} has {len(models)} models; name one, as in {where}:{_tag(models[0][0])}. It has "
        f"{_listed(models)}"
    )


def _tag(name: str) -> str:
    """The quantisation in a file's name, else the name."""
    file = _stem(name)
    found = _TAG.findall(file)
    return found[-1] if found else file


def _stem(name: str) -> str:
    """A file's name without its folder, its part and its ending."""
    return _PART.sub("", name.rpartition("/")[2]).removesuffix(".gguf")


def _listed(models: list[list[str]]) -> str:
    tags = sorted({_tag(files[0]) for files in models})
    more = f" and {len(tags) - _SHOWN} more" if len(tags) > _SHOWN else ""
    return ", ".join(tags[:_SHOWN]) + more

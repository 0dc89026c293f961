"""Documents that are read as the worker reads them, in this process. Not tests."""

from __future__ import annotations

import pytest

from ebbtide.offload.documents import parsing, worker
from ebbtide.offload.errors import InputError

ENTITIES = '<!DOCTYPE p [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><package>&b;</package>'


def extract(format, data, pages=None):
    for package in parsing.FORMATS[format][:1]:
        pytest.importorskip(package)
    return worker.extract(format, data, pages, lambda done, total: None)


def refused(format, data, pages=None):
    with pytest.raises(InputError) as caught:
        extract(format, data, pages)
    return str(caught.value)


def starts(found):
    """What stands at each place: (label, the first words there)."""
    return [(place.label, found.text[place.start :].split("\n")[0]) for place in found.places]

"""Elements of XML by their names without namespaces, which versions of a format change."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator


def name_of(element: ET.Element) -> str:
    """Without its namespace."""
    return str(element.tag).rpartition("}")[2]


def attribute(element: ET.Element, name: str) -> str:
    """By its name without the namespace; "" where there is none."""
    return next((value for key, value in element.items() if key.rpartition("}")[2] == name), "")


def descendants(element: ET.Element, name: str) -> Iterator[ET.Element]:
    """Those of this name, the element itself among them, in order."""
    return (inner for inner in element.iter() if name_of(inner) == name)

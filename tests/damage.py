"""Files of which some bytes are others. Not tests."""

from __future__ import annotations

from hypothesis import strategies as st


def damaged(data: st.DataObject, good: bytes) -> bytes:
    """One to eight bytes of it are drawn anew."""
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 8))):
        bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    return bytes(bad)

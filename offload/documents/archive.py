"""A zip archive from an unknown hand: members are read by name, and no more than the limits."""

from __future__ import annotations

import io
import zipfile
import zlib

from ..errors import InputError
from . import limits

# The names of Open XML's strict form, which Office writes if told to. Libraries find nothing in it.
_STRICT = b"http://purl.oclc.org/ooxml/"
_ENCRYPTED = 1  # bit of a member's flags
# What a damaged archive raises; ValueError where a member should lie before its beginning.
_BROKEN = zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, OSError, ValueError


class Archive:
    """Checked as a whole when opened, by what its directory says; a member is never unpacked
    further than the directory said, so what lies there is no danger. Raises InputError.
    """

    def __init__(self, data: bytes):
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except _BROKEN as error:
            raise InputError(f"is a damaged archive: {error}") from None
        members = self._zip.infolist()
        if len(members) > limits.MAX_MEMBERS:
            raise InputError(
                f"holds {len(members):,} files, and {limits.MAX_MEMBERS:,} are the most that is "
                "read of an archive"
            )
        unpacked = sum(member.file_size for member in members)
        if unpacked > limits.MAX_UNPACKED_BYTES:
            most = limits.MAX_UNPACKED_BYTES // 2**20
            raise InputError(f"unpacks to {unpacked / 2**20:,.0f} MiB, and {most} are the most")
        if unpacked > max(limits.RATIO_FREE_BYTES, limits.MAX_RATIO * len(data)):
            raise InputError(
                f"unpacks to {unpacked / len(data):,.0f} times its size, as archives do that are "
                "made to fill memory; it is not read"
            )
        self.names = {member.filename for member in members}

    def read(self, name: str, most: int | None = None) -> bytes:
        """A member's bytes; most: the first so many."""
        try:
            member = self._zip.getinfo(name)
        except KeyError:
            raise InputError(f"is damaged: its part {name} is missing") from None
        if member.flag_bits & _ENCRYPTED:
            raise InputError("is encrypted with a password; unpack and pack it without one")
        try:
            with self._zip.open(member) as file:
                data = file.read(member.file_size + 1 if most is None else most)
        except _BROKEN as error:
            raise InputError(f"is damaged: its part {name} cannot be unpacked: {error}") from None
        if len(data) > member.file_size:
            raise InputError(f"is damaged: its part {name} is longer than it says")
        return data

    def check_for_library(self) -> None:
        """As `check_parts`, and for names that libraries do not know."""
        self.check_parts()
        if "_rels/.rels" in self.names and _STRICT in self.read("_rels/.rels").replace(b"\0", b""):
            raise InputError("is a strict Open XML file; save it as an ordinary pptx or xlsx")

    def check_parts(self) -> None:
        """Before the parts of an Office file are parsed. Raises InputError where one is encrypted
        or declares entities."""
        if any(member.flag_bits & _ENCRYPTED for member in self._zip.infolist()):
            raise InputError("is encrypted with a password; unpack and pack it without one")
        # Office writes none of these, and a file that does wants its entities expanded. (NULs: it
        # may be written in UTF-16.) Parts may have any name; pictures are read by nobody.
        for name in self.names:
            if name.endswith((".xml", ".rels")) or self._is_xml(name):
                part = self.read(name).replace(b"\0", b"")
                if b"<!DOCTYPE" in part:
                    raise InputError("declares entities of its own, which no Office does; not read")

    def _is_xml(self, name: str) -> bool:
        """By its beginning. Drawing programs declare entities in SVG files."""
        if name.endswith((".svg", "/")):
            return False
        return self.read(name, 16).lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n").startswith(b"<")

"""Documents: every way in which a file is not text ends in one sentence that helps."""

from __future__ import annotations

import io
import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.offload.documents import limits
from ebbtide.offload.documents.document import Document
from ebbtide.offload.documents.reading import read_document
from ebbtide.offload.errors import InputError

TEXT = "Größe: 3 €\n\nZweite Zeile 😀\n"


def write(tmp_path, data, name="notes.md"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def refusal(path, stdin=None) -> str:
    with pytest.raises(InputError) as caught:
        read_document(path, stdin)
    return str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
        TEXT.replace("\n", "\r\n").encode("utf-16"),
    ],
    ids=["utf8", "utf8-mark", "utf16", "utf16-be", "utf32", "windows", "old-mac", "windows-utf16"],
)
def test_text_is_read_whatever_its_dress(tmp_path, data):
    path = write(tmp_path, data)
    assert read_document(path) == Document("notes.md", TEXT, "markdown")
    assert read_document(str(path)).text == TEXT
    assert read_document("-", io.BytesIO(data)) == Document("standard input", TEXT)


def test_underlined_headings_are_sections(tmp_path):
    no_headings = "two\nlines\n----\n\n- item\n---\n\n```\n\ncode\n---\n```\n"
    text = f"Title\n=====\n\n{no_headings}\n Sub \n---\n# Last #\n"
    document = read_document(write(tmp_path, text.encode()))
    assert [(place.title, text[place.start :].split()[0]) for place in document.places] == [
        *[("Title", "Title"), ("Sub", "Sub"), ("Last", "#")]
    ]
    front_matter = write(tmp_path, b"---\ntitle: x\n---\n\nText.\n")
    assert read_document(front_matter).places == ()


def test_standard_input_may_be_text(monkeypatch):
    assert read_document("-", io.StringIO("a\r\nb")).text == "a\nb"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode()), "ascii"))
    assert read_document("-").text == TEXT
    monkeypatch.setattr(sys, "stdin", io.StringIO("from text"))
    assert read_document("-").text == "from text"


@given(st.text())
def test_any_text_comes_back(text):
    stream = io.BytesIO(text.encode())
    if not text.strip("\ufeff").strip() or "\0" in text:
        with pytest.raises(InputError):
            read_document("-", stream)
    elif not text.lstrip().startswith(("BZh", "GIF8", "GGUF", "{\\rtf", "%PDF-", "%!PS", "<")):
        expected = text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")
        assert read_document("-", stream).text == expected


@given(st.binary())
def test_any_bytes_are_read_or_refused(data):
    try:
        document = read_document("-", io.BytesIO(data))
    except InputError as error:
        assert "standard input" in str(error)
    else:
        assert document.text.strip() and "\r" not in document.text


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "is empty"), (b" \n\t\r\n", "white space"), (b"\xef\xbb\xbf", "is empty")],
)
def test_nothing_to_read(tmp_path, data, reason):
    path = write(tmp_path, data)
    assert refusal(path) == f"{path} {refusal('-', io.BytesIO(data))[len('standard input ') :]}"
    assert reason in refusal(path)


@pytest.mark.parametrize(
    ("data", "what", "remedy"),
    [
        (b"\x7fELF\x02\x01", "a program", None),
        (b"\x1f\x8b\x08\x00", "gzip-compressed", "gunzip {path}"),
        (b"\x89PNG\r\n", "an image", None),
    ],
)
def test_other_formats_are_named(tmp_path, data, what, remedy):
    path = write(tmp_path, data)
    message = refusal(path)
    assert f"{path} is {what}" in message
    if remedy is not None:
        assert remedy.format(path=path) in message
    assert f"standard input is {what}" in refusal("-", io.BytesIO(data))


def test_commands_can_be_copied(tmp_path):
    path = write(tmp_path, b"\x1f\x8b\x08\x00", "my thesis.txt")
    assert f"gunzip '{path}'" in refusal(path)


def test_binary_is_said_to_be(tmp_path):
    path = write(tmp_path, b"abc\x00def")
    assert f"{path} is binary" in refusal(path)
    assert "byte 3 is zero" in refusal(path)
    assert "nothing but zeros: it was damaged" in refusal(write(tmp_path, bytes(1000)))
    message = refusal("-", io.BytesIO("hello".encode("utf-16-le")))
    assert "UTF-16 without a byte order mark: byte 1" in message
    assert "iconv -f UTF-16LE -t UTF-8 FILE" in message


@pytest.mark.parametrize(
    ("data", "encoding", "at", "byte"),
    [
        ("abc Größe".encode("latin-1"), "UTF-8", 6, "0xf6"),
        (b"\xef\xbb\xbfab\xff", "UTF-8", 5, "0xff"),
        (b"\xff\xfea\x00\x00\xd8", "UTF-16", 4, "0x00"),
        (b"ok \xed\xa0\x80", "UTF-8", 3, "0xed"),
        ("x€".encode()[:-1], "UTF-8", 1, "0xe2"),
    ],
    ids=["latin-1", "behind-a-mark", "utf16-surrogate", "utf8-surrogate", "cut-short"],
)
def test_the_bad_byte_is_named(tmp_path, data, encoding, at, byte):
    path = write(tmp_path, data)
    message = refusal(path)
    assert f"{path} is not {encoding}: byte {at} ({byte}) does not fit" in message
    assert f"iconv -f WINDOWS-1252 -t UTF-8 {path}" in message


def test_files_that_are_not_there(tmp_path):
    assert refusal("") == "'' is not the name of a file; name one, or - for standard input"
    assert refusal(tmp_path / "nowhere.txt") == f"there is no file {tmp_path / 'nowhere.txt'}"
    assert refusal(tmp_path) == f"{tmp_path} is a folder: name the files in it"
    assert "cannot be read" in refusal("a\0b")
    assert "cannot be read" in refusal("x" * 5000)


def test_permission_denied(tmp_path, monkeypatch):
    path = write(tmp_path, b"secret")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    assert refusal(path) == f"{path} may not be read: permission denied"
    assert refusal(tmp_path) == f"{tmp_path} is a folder: name the files in it"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads anything")
def test_permission_denied_by_the_system(tmp_path):
    path = write(tmp_path, b"secret")
    path.chmod(0)
    assert "permission denied" in refusal(path)


@pytest.mark.parametrize("given", [(3,), (None,), ("a.pdf", 2), ("a.pdf", [1, 2])])
def test_what_is_no_name_and_no_pages(given):
    path, pages = (*given, None)[:2]
    with pytest.raises(InputError, match="; allowed are"):
        read_document(path, pages=pages)


def test_read_errors_are_told(tmp_path):
    class Broken(io.RawIOBase):
        def read(self, size=-1):
            raise OSError(5, "Input/output error")

    assert "Input/output error" in refusal("-", Broken())
    closed = io.BytesIO(b"x")
    closed.close()
    assert "standard input cannot be read" in refusal("-", closed)


def test_standard_input_that_is_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert refusal("-") == "standard input is closed: name a file"


def test_endless_input_is_cut_off(monkeypatch, tmp_path):
    monkeypatch.setattr(limits, "MAX_BYTES", 2**20)

    class Endless(io.RawIOBase):
        def read(self, size=-1):
            assert 0 < size < 2**21
            return b"x" * size

    assert refusal("-", Endless()) == ("standard input is larger than 1 MiB, the most that is read")
    assert "larger than 1 MiB" in refusal(write(tmp_path, b"x" * (2**20 + 1)))
    assert read_document(write(tmp_path, b"x" * 2**20)).text == "x" * 2**20


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_read_as_a_file(tmp_path):
    import threading

    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_bytes(TEXT.encode()))
    writer.start()
    assert read_document(path) == Document("pipe", TEXT)
    writer.join()

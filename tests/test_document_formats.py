"""Formats: what is kept of a file, where its pages begin, and how bad files are refused.

Most tests call the worker's reading directly; those of the process around it start real ones.
"""

from __future__ import annotations

import io
import os
import queue
import sys
from unittest.mock import Mock

import pytest
from book_writer import CONTAINER, write_epub, write_zip
from damage import damaged
from documents_under_test import ENTITIES, extract, refused, starts
from hypothesis import given, settings
from hypothesis import strategies as st
from pdf_writer import write_pdf

from ebbtide.offload.documents import limits, parsing
from ebbtide.offload.documents.page_ranges import PageRanges, show_pages
from ebbtide.offload.documents.reading import read_document
from ebbtide.offload.documents.sniff import sniff
from ebbtide.offload.errors import InputError

# --- PDF


def test_pages_keep_their_numbers_and_titles():
    data = write_pdf(["First page.", "", "Third page: naïve (yes) \\ no."], {2: "The Third"})
    found = extract("pdf", data)
    assert found.text == "First page.\n\nThird page: naïve (yes) \\ no.\n"
    assert starts(found) == [("p. 1", "First page."), ("p. 3", "Third page: naïve (yes) \\ no.")]
    assert [place.title for place in found.places] == ["", "The Third"]
    assert found.num_pages == 3 and "1 of 3 pages" in found.warnings[0]
    assert found.warnings[0].endswith(": 2.")


def test_chosen_pages_alone_are_read():
    pages = [f"This is page {n}." for n in range(1, 31)]
    found = extract("pdf", write_pdf(pages), "3,10-12,29-")
    assert [label for label, _ in starts(found)] == [f"p. {n}" for n in (3, 10, 11, 12, 29, 30)]
    assert all(label[3:] + "." in first for label, first in starts(found))
    assert "has 30 pages, and --pages 31 begins behind" in refused("pdf", write_pdf(pages), "31")


def test_both_libraries_read_the_same_words(monkeypatch):
    pytest.importorskip("pypdf")
    from ebbtide.offload.documents import pdf

    data = write_pdf(["Some words (here).", "And others."])
    expected = extract("pdf", data)
    monkeypatch.setattr(pdf, "_LIBRARIES", (pdf._Pypdf,))
    found = extract("pdf", data)
    assert found.text.split() == expected.text.split() and starts(found) == starts(expected)


def test_a_page_that_one_library_cannot_read_is_read_by_the_other(monkeypatch):
    pytest.importorskip("pypdf")
    from ebbtide.offload.documents import pdf

    def broken(self, index):
        raise RuntimeError("broken page")

    monkeypatch.setattr(pdf._Pdfium, "text", broken)
    assert "Read me." in extract("pdf", write_pdf(["Read me."])).text
    monkeypatch.setattr(pdf._Pypdf, "text", broken)
    assert "none of its pages can be read" in refused("pdf", write_pdf(["Read me."]))


def test_broken_lines_flow_and_short_ones_stay():
    words = " ".join(f"word{n}" for n in range(60))
    text = f"A heading\n{words}.\n1. an item\n2. another\n10 20 30 40\n50 60 70 80"
    lines = extract("pdf", write_pdf([text])).text.strip().split("\n")
    assert lines[0] == "A heading" and lines[1] == words + "."
    assert lines[2:] == ["1. an item", "2. another", "10 20 30 40", "50 60 70 80"]


def test_lines_that_no_width_broke_stay():
    names = "Anna Smith\nJohn Brown\nPeter Green\nMaria White"
    verse = "Tyger Tyger, burning bright,\nIn the forests of the night;"
    words = "This paragraph is of lines that the width of the page has broken, as long as they are"
    ends = f"{words}\nand its last line ends short of the width, in three quarters of it.\n"
    text = f"{ends}Another paragraph begins here."
    found = extract("pdf", write_pdf([names, verse, text]))
    flows = text.replace("are\nand", "are and")
    assert found.text == f"{names}\n\n{verse}\n\n{flows}\n"


def test_what_was_filled_into_a_form_is_read():
    pytest.importorskip("pypdfium2")
    data = write_pdf(["Name:", "", "No field."], filled={0: "Jane Doe", 1: "of a form alone"})
    found = extract("pdf", data)
    assert found.text == "Name:\nJane Doe\n\nof a form alone\n\nNo field.\n"
    assert not found.warnings


def test_a_scan_is_said_to_be_one():
    message = refused("pdf", write_pdf(["", "", ""]))
    assert "no text layer: its 3 pages" in message and "ocrmypdf" in message


@pytest.mark.parametrize("password", ["secret", ""])
def test_encryption(password):
    pypdf = pytest.importorskip("pypdf")
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(write_pdf(["Hidden words."])))
    writer.encrypt(password, owner_password="owner", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    if password:
        assert "needs a password" in refused("pdf", out.getvalue())
    else:  # restricted, but free to read
        assert extract("pdf", out.getvalue()).text == "Hidden words.\n"


@pytest.mark.parametrize("cut", [40, 400, 2000])
def test_a_pdf_cut_short_is_damaged(cut):
    data = write_pdf([f"Page {n} of the document." for n in range(20)])
    assert "is a damaged PDF" in refused("pdf", data[:cut])


def test_too_many_pages(monkeypatch):
    from ebbtide.offload.documents import pdf

    monkeypatch.setattr(pdf, "MAX_PAGES", 3)
    assert "has 4 pages, and 3 are the most" in refused("pdf", write_pdf(["x"] * 4))


@given(st.data())
@settings(max_examples=40)
def test_a_damaged_pdf_is_read_or_refused(data):
    good = write_pdf(["One page of words.", "Two."], {1: "T"})
    try:
        found = extract("pdf", damaged(data, good))
    except InputError:
        return
    assert found.text.strip() and "\r" not in found.text


# --- EPUB


CHAPTERS = {
    "one": "<h1>The <i>first</i></h1><p>Caf&eacute; &amp; more<br/>line</p><script>no()</script>",
    "empty": "<p> </p>",
    "two": "<h2>Second</h2><ul><li>a</li><li>b</li></ul><h3>Inner</h3>"
    "<table><tr><td>1</td><td>2</td></tr></table><pre>x\n  y</pre>",
}


def test_chapters_in_reading_order():
    found = extract("epub", write_epub(CHAPTERS))
    assert found.text == (
        "# The first\n\nCafé & more\nline\n\n"
        "## Second\n\n- a\n\n- b\n\n### Inner\n\n1 | 2\n\nx\n  y\n"
    )
    assert [(p.label, p.title) for p in found.places] == [
        ("ch. 1", "The first"),
        ("ch. 2", "Second"),
        ("ch. 2", "Inner"),
    ]
    assert starts(found)[2][1] == "### Inner"
    # A chapter's inner headings are no chapters of their own.
    found = extract("epub", write_epub({"a": "<p>x</p><h1>A</h1>", "b": "<h1>B</h1>"}))
    assert [place.label for place in found.places] == ["ch. 1", "ch. 1", "ch. 2"]


def test_items_keep_their_numbers():
    items = "<ol start='5'><li>a</li><li>b<ul><li>c</li></ul></li><li value='9'>d</li></ol>"
    found = extract("epub", write_epub({"one": f"{items}<li>e</li>"}))
    assert found.text.split("\n\n") == ["5. a", "6. b", "- c", "9. d", "- e\n"]


RUBY = "<ruby>漢<rp>(</rp><rt>kan</rt><rp>)</rp><rb>字</rb><rt class='r'><i>ji</i></rt></ruby>です"
# As HTML allows it: no end of what the next part ends.
OPEN_RUBY = "<ruby>漢<rp>(<rt>kan<rp>)<rb>字<rt>ji</ruby>です"


@pytest.mark.parametrize("ruby", [RUBY, OPEN_RUBY])
def test_how_words_are_read_does_not_stand_in_them(ruby):
    paragraph = f"<p>これは{ruby}。</p>"
    assert extract("epub", write_epub({"one": paragraph})).text == "これは漢字です。\n"
    page = f"<html><body>{paragraph * 9}</body></html>"
    assert extract("html", page.encode()).text.split() == ["これは漢字です。"] * 9


def test_an_epub_needs_no_extra(monkeypatch):
    monkeypatch.setattr(parsing.importlib.util, "find_spec", lambda name: None)
    data = write_epub(CHAPTERS)
    assert read_document("-", io.BytesIO(data)).format == "epub"


OUTSIDE = '<!DOCTYPE p [<!ENTITY a SYSTEM "file:///etc/passwd">]><package>&a;</package>'
ENCRYPTED = (
    '<encryption xmlns:e="http://www.w3.org/2001/04/xmlenc#"><e:CipherData>'
    '<e:CipherReference URI="{}"/></e:CipherData></encryption>'
)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"OEBPS__book_0_opf": ENTITIES}, "declares entities"),
        ({"OEBPS__book_0_opf": OUTSIDE}, "declares entities"),
        ({"OEBPS__book_0_opf": ENTITIES.encode("utf-16")}, "declares entities"),
        ({"OEBPS__book_0_opf": "<package"}, "damaged EPUB: OEBPS/book.opf"),
        ({"OEBPS__book_0_opf": "<package/>"}, "names no chapters"),
        ({"META-INF__container_0_xml": "<container/>"}, "does not say where"),
        ({"META-INF__container_0_xml": CONTAINER.replace("book", "no")}, "part OEBPS/no.opf is"),
        ({"META-INF__encryption_0_xml": ENCRYPTED.format("OEBPS/one.xhtml")}, "DRM"),
        ({f"OEBPS__{name}_0_xhtml": "<p></p>" for name in CHAPTERS}, "holds no text"),
    ],
)
def test_bad_books(replaced, message):
    assert message in refused("epub", write_epub(CHAPTERS, **replaced))


def test_scrambled_fonts_hinder_nobody():
    replaced = {"META-INF__encryption_0_xml": ENCRYPTED.format("OEBPS/font.ttf")}
    assert "Second" in extract("epub", write_epub(CHAPTERS, **replaced)).text


def test_a_chapter_that_is_not_there_is_told():
    data = write_epub(CHAPTERS, OEBPS__book_0_opf=_package(["one.xhtml", "../../gone.xhtml"]))
    found = extract("epub", data)
    assert found.warnings == ["1 of 2 chapters are missing in the file."]


def _package(hrefs):
    items = "".join(
        f'<item id="i{n}" href="{href}" media-type="application/xhtml+xml"/>'
        for n, href in enumerate(hrefs)
    )
    spine = "".join(f'<itemref idref="i{n}"/>' for n in range(len(hrefs)))
    return f'<p xmlns="x"><manifest>{items}</manifest><spine>{spine}</spine></p>'


def test_zip_bombs(monkeypatch):
    assert "times its size" in refused("epub", write_epub({"a": "x" * 50_000_000}))
    monkeypatch.setattr(limits, "MAX_UNPACKED_BYTES", 1000)
    assert "unpacks to 0 MiB" in refused("epub", write_epub({"a": "x" * 5000}))
    monkeypatch.setattr(limits, "MAX_MEMBERS", 3)
    assert "holds 6 files, and 3" in refused("epub", write_epub({"a": "", "b": "", "c": ""}))


def test_a_member_that_lies_about_its_size_is_not_believed():
    """The classic trick: the directory says 10 bytes, and megabytes come out."""
    data = write_zip({"META-INF/container.xml": "x" * 3_000_000})
    size = (3_000_000).to_bytes(4, "little")
    assert data.count(size) == 2
    message = refused("epub", data.replace(size, (10).to_bytes(4, "little")))
    assert "cannot be unpacked" in message or "longer than it says" in message


def test_a_directory_that_lies_about_its_place():
    """Members would lie before the archive's first byte."""
    data = bytearray(write_epub(CHAPTERS))
    data[data.rfind(b"PK\x05\x06") + 18] += 1  # 65,536 bytes further than it is
    assert "cannot be unpacked" in refused("epub", bytes(data))


def test_an_encrypted_member():
    data = write_epub(CHAPTERS)
    flagged = bytearray(data)
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        found = data.find(signature)
        while found >= 0:
            flagged[found + at] |= 1
            found = data.find(signature, found + 1)
    message = refused("epub", bytes(flagged))
    assert "encrypted with a password" in message and "damaged" not in message


@given(st.data())
@settings(max_examples=60)
def test_a_damaged_epub_is_read_or_refused(data):
    try:
        assert extract("epub", damaged(data, write_epub(CHAPTERS))).text.strip()
    except InputError:
        pass


# --- HTML


SENTENCE = "A sentence that is long enough to be taken for text. "


def test_html_loses_its_menus_and_keeps_its_headings():
    page = (
        "<!DOCTYPE html><html><head><title>T</title></head><body><nav>Home About</nav><article>"
        f"<h1>Größe</h1><p>{SENTENCE * 9}</p><h2>Sub</h2><p>{SENTENCE * 9}</p></article></body>"
    )
    found = extract("html", page.encode("utf-8"))
    assert [place.title for place in found.places] == ["Größe", "Sub"]
    assert found.text.count(SENTENCE.strip()) == 18 and "Home About" not in found.text
    assert "nothing" not in found.text


def test_a_short_page_keeps_its_headings():
    page = f"<html><body><h1>About <i>us</i></h1><p>{SENTENCE}</p><hr><p>Another.</p></body></html>"
    found = extract("html", page.encode())
    assert found.text == f"# About us\n\n{SENTENCE.strip()}\n\nAnother.\n"
    assert starts(found) == [("sec. 1", "# About us")]


def test_html_in_another_encoding():
    page = "<html><head><meta charset='iso-8859-1'></head><body><p>Gr\xf6\xdfe</p></body></html>"
    assert "Größe" in extract("html", page.encode("latin-1")).text


def test_a_huge_page_is_read_as_it_is(monkeypatch):
    from ebbtide.offload.documents import html

    monkeypatch.setattr(html, "_LARGEST_BYTES", 2000)
    page = "<html><nav>Home</nav>" + f"<p>{SENTENCE}" * 50
    found = extract("html", page.encode())
    assert found.text.startswith("Home\n\nA sentence") and "too large" in found.warnings[0]


def test_html_without_words():
    page = b"<html><body><script>document.write('x')</script></body></html>"
    assert "made by scripts" in refused("html", page)


@pytest.mark.parametrize(
    ("data", "name", "kind"),
    [
        (b"<!DOCTYPE html><p>x", "a.txt", "html"),
        (b"\xef\xbb\xbf <!-- c --><HTML>", "a", "html"),
        ("<html>".encode("utf-16"), "a", "html"),
        (b"<?xml version='1.0'?>\n<html xmlns='x'>", "a", "html"),
        (b"<p>fragment</p>", "a.HTML", "html"),
        (b"no tags at all", "a.html", "text"),
        (b"a < b and <b>", "notes.md", "markdown"),
        (b"# x", "README", "text"),
        (b"%PDF-1.7 ...", "thesis.txt", "pdf"),
        (b"\n\n%PDF-1.4", "a", "pdf"),
    ],
)
def test_content_says_what_a_file_is_before_its_name(data, name, kind):
    assert sniff("x", data, name) == kind


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": "x"}, "zip archive: unpack it"),
        ({"[Content_Types].xml": "", "xl/workbook.bin": ""}, "Office file of another kind"),
    ],
)
def test_other_archives_are_named(members, message):
    with pytest.raises(InputError, match=message):
        sniff("x.zip", write_zip(members), "x.zip")


# --- the process around it


def test_progress_and_the_process(tmp_path):
    pytest.importorskip("pypdfium2")
    path = tmp_path / "a.pdf"
    path.write_bytes(write_pdf(["One.", "Two.", "Three."]))
    seen = []
    document = read_document(path, on_progress=lambda done, total: seen.append((done, total)))
    assert document.name == "a.pdf" and document.format == "pdf" and document.num_pages == 3
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert document.place_at(document.text.index("Two")).label == "p. 2"


def test_what_was_read_is_kept_for_the_next_time(tmp_path, monkeypatch):
    pytest.importorskip("pypdfium2")
    data = write_pdf(["One.", "Two."])
    keep = tmp_path / "keep"
    first = read_document("-", io.BytesIO(data), keep_in=keep)
    assert oct(keep.stat().st_mode)[-3:] == "700" or os.name == "nt"
    with monkeypatch.context() as patch:
        patch.setattr(parsing, "_run", lambda *args: pytest.fail("read again"))
        assert read_document("-", io.BytesIO(data), keep_in=keep) == first
    (file,) = keep.iterdir()
    file.write_bytes(b'{"text": ')  # cut short by a power failure
    assert read_document("-", io.BytesIO(data), keep_in=keep) == first
    pages = read_document("-", io.BytesIO(data), keep_in=keep, pages="2")
    assert pages.text == "Two.\n" and len(list(keep.iterdir())) == 2


@pytest.mark.parametrize("format", ["pdf", "pptx", "xlsx", "html"])
def test_a_missing_extra_is_named_with_its_installation(monkeypatch, format):
    monkeypatch.setattr(parsing.importlib.util, "find_spec", lambda name: None)
    data = {
        "pdf": b"%PDF-1.7",
        "html": b"<html><p>x",
        "pptx": write_zip({"ppt/presentation.xml": "x"}),
        "xlsx": write_zip({"xl/workbook.xml": "x"}),
    }[format]
    with pytest.raises(InputError, match=r"pip install 'ebbtide\[docs\]'") as caught:
        read_document("-", io.BytesIO(data))
    assert caught.value.exit_code == 2


def test_pages_of_what_has_none(tmp_path):
    with pytest.raises(InputError, match="no pages to choose from"):
        read_document("-", io.BytesIO(b"text"), pages="1-2")
    with pytest.raises(InputError, match="--pages: 'x' is not a choice"):
        read_document("-", io.BytesIO(b"text"), pages="x")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "parser crashed on it"),
        ("import sys; sys.exit(3)", "parser crashed on it (exit code 3)"),
        ("import time; time.sleep(1000)", "took longer than"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_a_parser_that_dies_or_hangs_is_a_sentence(monkeypatch, script, message):
    real = parsing.subprocess.Popen

    def start(command, **options):
        return real([sys.executable, "-c", script], **options)

    monkeypatch.setattr(parsing.subprocess, "Popen", start)
    monkeypatch.setattr(limits, "SILENCE_S", 2.0)
    with pytest.raises(InputError, match=r"took longer|crashed") as caught:
        parsing.parse("a.epub", "epub", b"x" * 10, None, None, None)
    assert message in str(caught.value)


def test_time_in_which_all_stood_still_is_not_silence():
    """Ctrl-Z: the limit is over when `fg` comes, and the worker stood still as well."""
    lines = Mock(get=Mock(side_effect=[queue.Empty, b"line"]))
    assert parsing._next_line(lines) == b"line"


def test_an_interruption_ends_the_worker():
    """A Ctrl-C while pages are read must not leave a process behind."""
    pytest.importorskip("pypdfium2")
    processes = []
    real = parsing.subprocess.Popen

    class Watched(real):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            processes.append(self)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parsing.subprocess, "Popen", Watched)
        with pytest.raises(KeyboardInterrupt):
            read_document("-", io.BytesIO(write_pdf(["x"] * 50)), on_progress=stop)
    assert processes[0].returncode is not None


@pytest.mark.skipif(os.name == "nt", reason="reads /proc")
def test_the_worker_ends_with_its_parent():
    """Its parent may be killed, and then nobody stops a worker that is busy with a hostile file."""
    header = b'{"format": "epub", "size": 10, "pages": null, "memory_bytes": 2147483648}\n'
    script = "import time; from ebbtide.offload.documents import epub, worker\n"
    script += "epub.extract = lambda *args: time.sleep(1000)\nworker.main()"
    process = parsing.subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=parsing.subprocess.PIPE,
        stdout=parsing.subprocess.PIPE,
    )
    process.stdin.write(header + b"x" * 10)
    process.stdin.close()  # as the system does for a parent that is gone
    assert process.wait(timeout=50) == 1
    process.stdout.close()


# --- page ranges


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 20)), min_size=1, max_size=5))
def test_page_ranges_mean_what_they_say(pairs):
    text = ",".join(f"{a}-{a + b}" if b else str(a) for a, b in pairs)
    ranges = PageRanges.parse(text)
    assert PageRanges.parse(str(ranges)) == ranges
    assert ranges.chosen(100) == sorted({p for a, b in pairs for p in range(a, a + b + 1)})


@pytest.mark.parametrize(
    "text", ["", "0", "0-3", "5-4", "a", "1--2", "1,,2", "-3", "1.5", "99999999"]
)
def test_page_ranges_that_are_none(text):
    with pytest.raises(ValueError, match=r"not a choice of pages|holds no page"):
        PageRanges.parse(text)


def test_lists_of_pages_are_short():
    assert show_pages([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10"
    assert show_pages(list(range(1, 100, 2))).endswith("23, ...")

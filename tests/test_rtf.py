"""RTF: what a page shows is read, and nothing that a file hides or damages leads astray."""

from __future__ import annotations

import io

import pytest
from damage import damaged
from documents_under_test import extract, refused, starts
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbtide.offload.documents.reading import read_document
from ebbtide.offload.documents.rtf_tokens import tokens
from ebbtide.offload.documents.sniff import sniff
from ebbtide.offload.errors import InputError


def text_of(content):
    if isinstance(content, str):
        content = content.encode("latin-1")
    found = extract("rtf", b"{\\rtf1\\ansi\\ansicpg1252\\deff0 " + content + b"}")
    assert not found.warnings
    return found.text


LETTER = r"""{\rtf1\ansi\ansicpg1252\uc1\deff0{\fonttbl{\f0\fnil\fcharset0 Arial;}{\f3 Symbol;}}
{\colortbl;\red0\green0\blue0;}{\stylesheet{\s0 Normal;}{\s1\outlinelevel0 heading 1;}{\s2 Title;}
{\*\cs9 heading 1;}{\s8 toc 1;}{\s9{\*\keycode x}\outlinelevel1 Mine;}}{\info{\title no}}
{\*\generator no;}{\header\pard Running head\par 12\par}{\headerf\pard Running head\par}
{\footer\pard no\par}\pard\s2 The title\par\pard\s8 One\tab 3\par\pard\s1 One\par\pard\s9 Sub\par
\pard\plain Words{\super\chftn{\footnote\pard\s1 a {\b note}\par second}} go on.\line
next{\annotation no}\par{\listtext\f3\'b7\tab}\pard bullet\par{\pntext (b)\tab}second\par
\pard\trowd\cellx1\cellx2\pard\intbl a\par b\cell{c}\cell\row\trowd\pard\intbl x\cell\cell\row
\pard Before {\shp{\*\shpinst{\sp{\sn a}{\sv 1}}{\shptxt\pard in a\par box
\par}}{\shprslt no}}after.\par
{\field{\*\fldinst HYPERLINK "no"}{\fldrslt link}} {\pict\pngblip 0123456789abcdef} end}"""


def test_rtf():
    data = LETTER.encode()
    assert sniff("x", data, "x") == "rtf"
    found = extract("rtf", data)
    assert found.text == (
        "Running head\n\n# The title\n\n# One\n\n## Sub\n\nWords [a note second] go on.\nnext\n\n"
        "- bullet\n\n(b) second\n\na b | c\n\nx\n\nBefore after.\n\nin a\n\nbox\n\nlink  end\n"
    )
    titles = ["# The title", "# One", "## Sub"]
    assert starts(found) == [(f"sec. {number}", title) for number, title in enumerate(titles, 1)]
    assert read_document("-", io.BytesIO(data)).format == "rtf"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (r"caf\u233?\'e9 \'93a\'94", "caféé “a”"),
        (r"\u-10179?\u-8704?\u55357 ?\u56832 ?", "\U0001f600\U0001f600"),  # both halves
        (r"a\u-10179?b", "a�b"),
        (r"\uc2 x\u8212\'97\'97y{\uc0 \u8212z}\u8212--w", "x—y—z—w"),
        (r"\u8212\emdash a\u8212\par b\u8212{c}", "—a—\n\nb—c"),  # a word of another kind stays
        (r"\u8212\bin2 xy z", "— z"),
        ("a\\u999999999?b\\u0x\0\x01", "ab"),
        (r"\'81", "�"),
        (r"\~\_\-\{\}\\ \lquote\rquote\ldblquote\rdblquote\bullet", "-{}\\ ‘’“”•"),
        ("a\\\nb\\\r\nc", "a\n\nb\n\nc"),
    ],
)
def test_letters(content, text):
    assert text_of(content) == text + "\n"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (r"{\fonttbl{\f0\fcharset128 A;}}\f0 \'83A\'83\'41", "アア"),  # a second byte is a letter
        (r"{\fonttbl{\f0\fcharset204 A;}{\f1\fcharset0 B;}}\f0 \'ef{\f1 \'e9}\'f0", "пéр"),
        (r"\ansicpg1251 \'ef\ansicpg65001 \'c3\'a9\ansicpg99999 \'c3\'a9\mac \'8e", "пééé"),
        (r"{\fonttbl{\f7\fcharset161 A;}}\deff7\plain \'e1{\f0 \'e1\plain \'e1}", "αáα"),
        (
            r"{\fonttbl{\f3\fcharset2{\*\panose 05}Symbol;}}a \'e1{\f3 ab \'b3\u-3993?}c",
            "a áαβ ≥γc",
        ),
        (r"{\fonttbl\f3\fcharset2 Symbol;\f4 A;}{\f4 a}", "a"),  # in one group: no names are known
    ],
)
def test_codings(content, text):
    assert text_of(content) == text + "\n"


@pytest.mark.parametrize(
    "content",
    [
        r"a{\v no}b{\deleted no}\v no\v0 c\v no\plain d",
        r"a{\*\unknown no {no}}b{\*\bkmkstart no}c{\object{\*\objdata 00}{\result d}}",
        r"ab{\mmath{\*\moMath{\mr no}}}{\upr{no}{\*\ud{c}}}d{\*\no{\upr{no}{\*\ud no}}}",
        "ab{\\pict{\\*\\blipuid 12}\\bin4 }{}}cc}cd",
        "a{\\*\\no\\bin3 }}}}b{\\object{\\*\\objdata\\bin3 {{{}{\\result c}}d",
        r"a{\pict{\*\footnote no}}{\*\annotation{\footnote no}}bcd",
        r"a{\field{\fldinst no}{\fldrslt b}}c{\*\do{\shptxt}}d",
    ],
)
def test_what_is_not_shown_is_left_out(content):
    assert text_of(content) == "abcd\n"


def test_notes_of_other_programs_are_read():
    assert text_of(r"a{\super\chftn}{\*\footnote\chftn\~\plain note}b") == "a [note]b\n"


def test_boxes_of_old_files_are_read():
    assert text_of(r"a{\*\do\dobxpage{\dptxbxtext\pard boxed\par}}b") == "ab\n\nboxed\n"


def test_tables():
    nested = r"\pard\intbl\itap2 x\nestcell y\nestcell{\*\nesttableprops\nestrow}{\nonesttables no}"
    assert text_of(nested + r"\pard\intbl z\cell w\cell\row after") == "x y z | w\n\nafter\n"
    assert text_of(r"\pard\intbl a\cell b\cell\pard after\par") == "a | b\n\nafter\n"  # no \row
    assert text_of(r"\intbl a\cell b") == "a | b\n"
    footnote = r"\intbl a{\footnote note}\cell{\shp{\shptxt boxed}}b\cell\row\pard c"
    assert text_of(footnote) == "a [note] | b\n\nboxed\n\nc\n"


def test_what_follows_the_document_is_no_part_of_it():
    assert extract("rtf", b"\n {\\rtf1 a} b {c}\0\0").text == "a\n"


@pytest.mark.parametrize(
    "data", [LETTER.encode()[:-300], b"{\\rtf1 a\\", b"{\\rtf1 a\\bin9999999 b}"]
)
def test_a_file_that_is_cut_short_says_so(data):
    assert extract("rtf", data).warnings == ["The file is cut short: its end is missing."]


def test_hostile_files():
    deep = b"{" * 100_000 + b"a" + b"}" * 100_000
    assert "nested too deeply" in refused("rtf", b"{\\rtf1 " + deep + b"}")
    assert "holds no text" in refused("rtf", b"{\\rtf1 {\\v a}}")
    assert text_of("{\\b" * 9000 + " a" + "}" * 9000) == "a\n"
    assert text_of(r"\uc999999999 \u8212" + "a" * 1000 + r"\par b") == "—\n\nb\n"


def test_each_byte_is_looked_at_once():
    """What is begun and never ended costs no search for its end."""
    parts = (
        rb"{\field{\*\fldinst HYPERLINK ",
        rb"{\footnote a",
        rb"\'8",
        rb"\bin",
        rb"\u1",
        b"{\\*",
    )
    for part in parts:
        data = b"{\\rtf1 " + part * 3000 + b"}"
        ends = [token.end for token in tokens(data)]
        assert ends == sorted(ends) and len(ends) <= len(data)
    many = b"{\\rtf1 " + b"a{\\footnote b}{\\shp{\\shptxt c}}" * 10_000 + b"}"
    assert extract("rtf", many).text.startswith("a [b]a [b]")


WORDS = [
    *(r"\par ", r"\cell ", r"\row ", r"\intbl ", r"\pard ", r"\u8212 ?", r"\'e9", r"\v ", r"\*"),
    *("{", "}", "a", " ", "\n", r"\bin2 ", r"\uc0 ", r"\f1", r"\footnote ", r"\shptxt ", r"\upr "),
    *(
        r"\ud ",
        r"\header ",
        r"\listtext ",
        r"\stylesheet ",
        r"\s1 ",
        r"\fonttbl ",
        r"\fcharset128 ",
    ),
    *(r"\ansicpg-1 ", r"\outlinelevel0 ", r"\u-10179 ", "\\", r"\deff", r"\plain ", "é"),
]


@given(st.lists(st.sampled_from(WORDS), max_size=40))
@settings(max_examples=300)
def test_any_words_are_read_or_refused(words):
    try:
        found = extract("rtf", ("{\\rtf1 " + "".join(words)).encode("latin-1"))
    except InputError:
        return
    found.text.encode()  # no half of a letter is left
    assert found.text.strip()


@given(st.data())
def test_a_damaged_file_is_read_or_refused(data):
    try:
        assert extract("rtf", damaged(data, LETTER.encode())).text.strip()
    except InputError:
        pass

"""OpenDocument files: what is kept of texts, sheets and slides, and how bad files are refused."""

from __future__ import annotations

import io
from unittest import mock

import pytest
from documents_under_test import extract, refused, starts
from hypothesis import given, settings
from hypothesis import strategies as st
from office_samples import cell, row, shape, sheet, write_odp, write_ods, write_odt
from office_writer import open_document, write_open_document

from ebbtide.offload.documents import limits, ods, parsing, sheets
from ebbtide.offload.documents.reading import read_document
from ebbtide.offload.documents.sniff import sniff
from ebbtide.offload.errors import InputError


def test_odt(monkeypatch):
    data = write_odt()
    assert sniff("x", data, "x") == "odt"
    found = extract("odt", data)
    assert found.text == (
        "# Part one\n\na   b\tc\nd e [see below]\n\n## Inner\n\n"
        "- x\n\ny\n\n- z\n\n1 2 | 3\n\nboxed\n"
    )
    assert starts(found) == [("sec. 1", "# Part one"), ("sec. 2", "## Inner")]
    monkeypatch.setattr(parsing.importlib.util, "find_spec", lambda name: None)
    assert read_document("-", io.BytesIO(data)).format == "odt"
    locked = {"META-INF/manifest.xml": "<manifest><encryption-data/></manifest>"}
    assert "encrypted with a password" in refused("odt", write_odt(**locked))
    assert "no text body" in refused("odt", write_odt(**{"content.xml": "<a/>"}))


@pytest.mark.parametrize("number", ["²", "9" * 5000, "-1", ""])
def test_numbers_in_an_odt_that_are_none(number):
    text = f'<text:h text:outline-level="{number}">a<text:s text:c="{number}"/>b</text:h>'
    assert extract("odt", write_odt(text)).text == "# a b\n"


def level(number, kind="1", suffix=".", **more):
    named = "".join(f' {k.replace("_", ":", 1).replace("_", "-")}="{v}"' for k, v in more.items())
    return (
        f'<text:list-level-style-number text:level="{number}" style:num-format="{kind}" '
        f'style:num-suffix="{suffix}"{named}/>'
    )


def numbered(body, *levels, outline=""):
    """An ODT file whose list style L has these levels."""
    automatic = f'<text:list-style style:name="L">{"".join(levels)}</text:list-style>'
    content = f"<office:automatic-styles>{automatic}</office:automatic-styles><office:body>"
    content += f"<office:text>{body}</office:text></office:body>"
    styles = f"<office:styles><text:outline-style>{outline}</text:outline-style></office:styles>"
    parts = {"content": content, "styles": styles}
    made = {f"{n}.xml": open_document(f"document-{n}", part) for n, part in parts.items()}
    return extract("odt", write_odt("", **made)).text.split("\n\n")


def items(*texts, inner="", **attributes):
    named = "".join(
        f' {k.replace("_", ":", 1).replace("_", "-")}="{v}"' for k, v in attributes.items()
    )
    told = "".join(f"<text:list-item><text:p>{text}</text:p></text:list-item>" for text in texts)
    return f'<text:list text:style-name="L"{named}>{told}{inner}</text:list>'


def test_items_have_the_numbers_that_are_counted():
    clauses = [level(1), level(2, "a", ")", text_start_value=3), level(3, text_display_levels=3)]
    deep = items("c").replace(' text:style-name="L"', "")
    second = items("x", "y", inner=f"<text:list-item>{deep}</text:list-item>")
    deep = f"<text:list-item><text:p>two</text:p>{second}</text:list-item>"
    found = numbered(
        items("one", inner=deep) + items("again") + items("on", text_continue_numbering="true"),
        *clauses,
    )
    assert found == ["1. one", "2. two", "c) x", "d) y", "2.d.1. c", "1. again", "2. on\n"]


def test_lists_go_on_where_they_say_so():
    one = items("a", "b", xml_id="first")
    other = items("c", text_continue_list="first")
    seven = '<text:list-item text:start-value="7"><text:p>d</text:p></text:list-item>'
    found = numbered(one + items("x") + other + items(inner=seven), level(1, "I"))
    assert found == ["I. a", "II. b", "I. x", "III. c", "VII. d\n"]
    header = "<text:list-header><text:p>head</text:p></text:list-header>"
    empty = "<text:list-item><text:p/></text:list-item>"
    assert numbered(items(inner=header + empty) + one, level(1)) == ["head", "1. a", "2. b\n"]
    assert (
        numbered(items("a", inner=empty + seven.replace(' text:start-value="7"', "")), level(1))[-1]
        == "3. d\n"
    )
    assert numbered(items("a"), level(1, "")) == ["- a\n"]
    assert numbered(items("a"), level(1, "i", "", loext_num_list_format="(%1%)")) == ["(i) a\n"]
    inner = f"<text:list-item>{items('b')}</text:list-item>"
    assert numbered(items("a", inner=inner), level(1, "a")) == ["a. a", "a. b\n"]
    assert numbered("<text:list-item><text:p>a</text:p></text:list-item>") == ["a\n"]


def test_headings_have_the_numbers_of_their_outline():
    outline = (
        '<text:outline-level-style text:level="1" style:num-format="1"/>'
        '<text:outline-level-style text:level="2" style:num-format="1" text:display-levels="2"/>'
    )
    h = '<text:h text:outline-level="{}"{}>{}</text:h>'
    body = h.format(1, "", "A") + h.format(2, "", "B") + h.format(2, "", "C") + h.format(1, "", "D")
    body += (
        h.format(1, ' text:is-list-header="true"', "E")
        + h.format(2, "", "F")
        + h.format(3, "", "G")
    )
    body += h.format(1, ' text:restart-numbering="true" text:start-value="9"', "H")
    found = numbered(body, outline=outline)
    assert found == [
        *("# 1 A", "## 1.1 B", "## 1.2 C", "# 2 D", "# E", "## 2.1 F", "### G", "# 9 H\n"),
    ]
    item = f"<text:list-item>{h.format(1, '', 'In')}</text:list-item>"
    assert numbered(items(inner=item), level(1), outline=outline) == ["# 1. In\n"]
    assert numbered(items(inner=item)) == ["# In\n"]


def test_a_table_in_a_table_is_told_once():
    inner = "<table:table><table:table-row><table:table-cell><text:p>in</text:p>"
    inner += "</table:table-cell></table:table-row></table:table>"
    table = f"<table:table><table:table-row-group><table:table-row><table:table-cell>{inner}"
    table += "</table:table-cell><table:table-cell><text:p>out</text:p></table:table-cell>"
    table += "</table:table-row></table:table-row-group></table:table>"
    assert extract("odt", write_odt(table)).text == "in | out\n"


def test_a_frame_stands_behind_its_paragraph():
    frame = "<draw:frame><draw:text-box><text:h>Box</text:h><table:table><table:table-row>"
    frame += "<table:table-cell><text:p>a</text:p></table:table-cell></table:table-row>"
    frame += "</table:table><text:p>b</text:p></draw:text-box></draw:frame>"
    linked = f"<draw:a>{frame}</draw:a>"
    for drawing in (frame, linked, f"<text:span>{frame}</text:span>"):
        found = extract("odt", write_odt(f"<text:p>Words {drawing}go on.</text:p>"))
        assert found.text == "Words go on.\n\n# Box\n\na\n\nb\n"


def test_what_stands_at_the_head_of_pages_comes_first():
    page = "<style:master-page><style:header><text:p>Running</text:p><text:p>12</text:p>"
    page += "</style:header><style:header-first><text:p>The title</text:p></style:header-first>"
    page += "<style:footer><text:p>no</text:p></style:footer></style:master-page>"
    styles = open_document(
        "document-styles", f"<office:master-styles>{page}{page}</office:master-styles>"
    )
    found = extract("odt", write_odt("<text:p>words</text:p>", **{"styles.xml": styles}))
    assert found.text == "The title\n\nRunning\n\nwords\n"


def test_hidden_text_and_readings_are_left_out():
    text = "<text:p>a<text:hidden-text>no</text:hidden-text><text:ruby><text:ruby-base>b"
    text += "</text:ruby-base><text:ruby-text>no</text:ruby-text></text:ruby></text:p>"
    assert extract("odt", write_odt(text)).text == "ab\n"


def test_sheets_are_tables_under_their_names():
    data = write_ods()
    assert sniff("x", data, "x") == "ods"
    found = extract("ods", data)
    assert found.text == (
        "# Costs\n\nwhat | when | how much | paid\nmill | 2020-01-02 | 3.3 | TRUE\n"
        " | two lines | 7 | 2020-01-02 03:04:00\n0.12 | 1:30 | a | a\n\n"
        "# Far\n\n | ... | the last cell of all\n"
    )
    assert starts(found) == [("sheet 1", "# Costs"), ("sheet 3", "# Far")]
    assert found.warnings == ["No text on 1 of 3 sheets: Empty."]


def test_integers_of_many_digits_are_whole():
    given = row(cell("x", "float", value="9007199254740993"), cell("y", "float", value="1e300"))
    assert extract("ods", write_ods(sheet("A", given))).text == "# A\n\n9007199254740992 | 1e+300\n"


def test_rows_that_repeat_are_told_as_often():
    found = extract("ods", write_ods(sheet("A", row(cell("a"), cell("b"), repeated=3))))
    assert found.text == "# A\n\n" + "a | b\n" * 3


def test_a_table_in_a_cell_is_a_part_of_its_text():
    inner = sheet("In", row(cell("x"), cell("y")))
    held = row(f"<table:table-cell>{inner}</table:table-cell>", cell("z"))
    assert extract("ods", write_ods(sheet("A", held, held))).text == "# A\n\nx y | z\nx y | z\n"


@pytest.fixture(scope="module")
def small_limit():
    """A million characters at most, which are reached sooner."""
    most = 2**20
    with mock.patch.object(limits, "MAX_TEXT_CHARS", most):
        with mock.patch.object(ods, "MAX_TEXT_CHARS", most):
            with mock.patch.object(sheets, "MAX_TEXT_CHARS", most):
                yield most


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(cell("a", repeated=16385))], "a column beyond 16,384"),
        ([row(cell(repeated=16384), cell("a"))], "a column beyond 16,384"),
        ([row(repeated=1048576), row(cell("a"))], "a row beyond 1,048,576"),
        ([row(cell("a"), repeated=999999999)], "a row beyond 1,048,576"),
        ([row(cell("a" * 100, repeated=16384))], "more text than a document may"),
        ([row(cell("ab", repeated=16384), repeated=1000000)], "million characters, the most"),
        ([row(cell("a" * 200, repeated=100))] * 60, "million characters, the most"),
    ],
)
def test_sheets_made_to_fill_memory_are_refused(rows, message, small_limit):
    assert message in refused("ods", write_ods(sheet("A", *rows)))


def test_formulas_without_values_are_told():
    formula = '<table:table-cell table:formula="of:=1+1"{}/>'
    rows = row(formula.format(""), formula.format(' office:value-type="float" office:value="2"'))
    found = extract("ods", write_ods(sheet("A", rows)))
    assert found.text == "# A\n\n | 2\n"
    assert found.warnings[0].startswith("1 formula was never computed, and left out")
    alone = write_ods(sheet("A", row(formula.format(""))))
    assert "holds no text: 1 formula was never" in refused("ods", alone)
    error = row(formula.format(' office:value-type="float" office:value=""'), cell("#DIV/0!"))
    assert extract("ods", write_ods(sheet("A", error))).text == "# A\n\n | #DIV/0!\n"


def test_slides_are_cited_by_their_numbers():
    data = write_odp()
    assert sniff("x", data, "x") == "odp"
    found = extract("odp", data)
    assert found.text == (
        "# A talk\n\nby Ann\n\n"
        "# Why\n\nfirst\n  deeper\n\na | b\n | d\n\nNotes: Say it\nslowly.\n\n"
        "# Numbers\n\nChart: Sales\n | North\n2019 | 3\n\nin a group\n"
    )
    assert starts(found) == [
        ("slide 1", "# A talk"),
        ("slide 2", "# Why"),
        ("slide 4", "# Numbers"),
        ("slide 5", "in a group"),
    ]
    assert found.num_pages == 5 and found.warnings[0].endswith("(pictures or nothing): 3.")
    assert read_document("-", io.BytesIO(data), pages="4-").text.startswith("# Numbers\n\nChart")
    assert "has 5 slides, and --pages 6 begins behind" in refused("odp", data, "6")
    assert "has no slides" in refused("odp", write_open_document("odp", ""))


@pytest.mark.parametrize("kind", ["chart", "graphics", "text-master.x"])
def test_other_open_documents_are_refused(kind):
    data = write_odt(mimetype=f"application/vnd.oasis.opendocument.{kind}")
    if kind.startswith("text"):  # and templates: they are read as the texts that they are
        assert sniff("x", data, "x") == "odt"
        return
    with pytest.raises(InputError, match="OpenDocument file of another kind; save it as odt, odp,"):
        sniff("x", data, "x")


@pytest.mark.parametrize(
    ("format", "before", "nested", "after"),
    [
        ("odt", "", "text:section", ""),
        ("odt", "<text:p>", "text:span", "</text:p>"),
        ("odt", "<text:p>", "draw:frame", "</text:p>"),
        ("ods", "<table:table><table:table-row><table:table-cell>", "text:p", ""),
        ("odp", "<draw:page>", "draw:g", "</draw:page>"),
    ],
)
def test_what_is_nested_too_deeply_is_refused(format, before, nested, after):
    deep = f"{before}{f'<{nested}>' * 100_000}a{f'</{nested}>' * 100_000}{after}"
    deep += "</table:table-cell></table:table-row></table:table>" if format == "ods" else ""
    with pytest.raises(RecursionError):  # the worker has a sentence for it
        extract(format, write_open_document(format, deep))


@given(st.data())
@settings(max_examples=50)
def test_any_repeats_are_read_within_the_limits_or_refused(small_limit, data):
    repeats = st.sampled_from([0, 1, 2, 100, 16384, 2**20, 999999999])
    texts = st.sampled_from(["", "a", "words"])
    rows = []
    for _ in range(data.draw(st.integers(1, 4))):
        cells = [
            cell(data.draw(texts), repeated=data.draw(repeats))
            for _ in range(data.draw(st.integers(0, 4)))
        ]
        rows.append(row(*cells, repeated=data.draw(repeats)))
    try:
        found = extract("ods", write_ods(sheet("A", *rows)))
    except InputError:
        return
    assert found.text.strip() and len(found.text) <= small_limit


def style(name, family, font="", parent=""):
    """font: an attribute that names one."""
    return (
        f'<style:style style:name="{name}" style:family="{family}" '
        f'style:parent-style-name="{parent}"><style:text-properties {font}/></style:style>'
    )


FACES = """<office:font-face-decls><style:font-face style:name="S" svg:font-family="Symbol"/>
<style:font-face style:name="W" svg:font-family="'Wingdings 2', serif"/></office:font-face-decls>"""
SIGNS = [
    style("T1", "text", 'style:font-name="S"'),
    style("T2", "text", 'svg:font-family="Wingdings"'),
    style("T3", "text", 'svg:font-family="Arial"'),
    style("T4", "text", "", "Box"),
    style("P1", "paragraph", 'style:font-name="S"'),
    style("T1", "table-cell", 'style:font-name="S"'),
    style("gr1", "graphic", 'style:font-name="S"'),
    style("T5", "text", "", "T6") + style("T6", "text", "", "T5"),  # come from each other
]
BOX = style("Box", "text", 'style:font-name="W"')
COMMON = f"<office:styles>{BOX}</office:styles>"
HEADER = (
    f"<office:automatic-styles>{style('P1', 'paragraph')}{style('T2', 'text')}"
    + style("P9", "paragraph", 'style:font-name="S"')
    + "</office:automatic-styles><office:master-styles><style:master-page><style:header>"
    '<text:p text:style-name="P1">head</text:p><text:p text:style-name="P9">p</text:p>'
    "</style:header></style:master-page></office:master-styles>"
)


def with_signs(format, body, *automatic):
    kind = {"odt": "text", "ods": "spreadsheet", "odp": "presentation"}[format]
    content = f"{FACES}<office:automatic-styles>{''.join([*SIGNS, *automatic])}"
    content += f"</office:automatic-styles><office:body><office:{kind}>{body}</office:{kind}>"
    content = open_document("document-content", f"{content}</office:body>")
    styles = open_document("document-styles", FACES + COMMON + HEADER)
    parts = {"content.xml": content, "styles.xml": styles}
    return extract(format, write_open_document(format, "", **parts)).text


WORDS = """<text:p>a<text:span text:style-name="T1">a<text:s/>b</text:span>a
<text:span text:style-name="T2">&#xf0fe;&#xfc;<text:span
text:style-name="T3">a</text:span></text:span>
<text:span text:style-name="T4">P</text:span><text:span text:style-name="T5">a</text:span></text:p>
<text:p text:style-name="P1">m<text:span text:style-name="T3">m</text:span>m</text:p>"""


def test_signs_of_fonts_that_styles_name_are_what_they_show():
    text = "aα βa ☑✓a ✓a\n\nμmμ\n"
    # The header's own styles are those of its part; others of these names are the text's.
    assert with_signs("odt", WORDS) == f"head\n\nπ\n\n{text}"
    frame = '<draw:frame draw:style-name="gr1"><draw:text-box>{}</draw:text-box></draw:frame>'
    slide = frame.replace(' draw:style-name="gr1"', "").format(WORDS)
    slide += frame.format("<text:p>D</text:p>")
    found = with_signs("odp", f"<draw:page>{slide}</draw:page>")
    assert found == text.replace("\n\n", "\n") + "\nΔ\n"
    signed = (
        cell("s")
        .replace("table-cell ", "table-cell")
        .replace("<table:table-cell", '<table:table-cell table:style-name="T1"', 1)
    )
    span = cell('<text:span text:style-name="T2">&#xe8;</text:span> on')
    assert "σ | s | → on" in with_signs("ods", sheet("S", row(signed, cell("s"), span)))


def test_boxes_and_ticks_before_items_are_kept():
    def bullets(*levels):
        made = "".join(
            f'<text:list-level-style-bullet text:level="{at}" text:bullet-char="{char}">'
            f'<style:text-properties style:font-name="{font}"/></text:list-level-style-bullet>'
            for at, char, font in levels
        )
        return f'<text:list-style style:name="L">{made}</text:list-style>'

    inner = "<text:list-item><text:p>to do</text:p><text:p>more</text:p></text:list-item>"
    inner = f"<text:list-item><text:list>{inner}</text:list></text:list-item>"
    body = items("done", inner=inner)
    marks = bullets((1, "R", "W"), (2, "&#x2610;", "OpenSymbol"))
    expected = "- ☑ done\n\n- ☐ to do\n\nmore\n"
    assert with_signs("odt", body, marks).endswith(expected)
    slide = f"<draw:page>{shape(body)}</draw:page>"
    assert with_signs("odp", slide, marks) == "☑ done\n  ☐ to do\n  more\n"
    plain = bullets((1, "R", "Arial"), (2, "&#xf0a7;", "Wingdings"))
    assert with_signs("odt", body, plain).endswith("- done\n\n- to do\n\nmore\n")
    assert with_signs("odp", slide, plain) == "done\n  to do\n  more\n"

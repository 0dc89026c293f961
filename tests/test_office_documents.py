"""Office files: what is kept of texts, slides and sheets, and how bad files are refused."""

from __future__ import annotations

import io
import re
import zipfile

import pytest
from book_writer import write_zip
from damage import damaged
from documents_under_test import ENTITIES, extract, refused, starts
from hypothesis import given, settings
from hypothesis import strategies as st
from office_samples import OFFICE, write_sheets, write_slides
from office_writer import members_of

from ebbtide.offload.documents.sniff import sniff
from ebbtide.offload.errors import InputError


def test_text_of_slides_that_a_library_passes_over():
    """A shape with a formula comes in two forms, and a copied one may have the title's id."""
    pptx = pytest.importorskip("pptx")
    from lxml import etree

    deck = pptx.Presentation()
    slide = deck.slides.add_slide(deck.slide_layouts[5])
    slide.shapes.title.text = "Energy"
    copied, formula, old = (slide.shapes.add_textbox(0, 0, 9, 9) for _ in range(3))
    copied.text_frame.text, formula.text_frame.text = "copied", "mass is E = mc2"
    copied._element.nvSpPr.cNvPr.set("id", str(slide.shapes.title.shape_id))
    names = "http://schemas.openxmlformats.org/markup-compatibility/2006"
    both = etree.SubElement(slide.shapes._spTree, f"{{{names}}}AlternateContent")
    for kind, shape in (("Choice", formula), ("Fallback", old)):
        shape.text_frame.text = shape.text_frame.text or "a picture of it"
        etree.SubElement(both, f"{{{names}}}{kind}").append(shape._element)
    out = io.BytesIO()
    deck.save(out)
    assert extract("pptx", out.getvalue()).text == "# Energy\n\ncopied\n\nmass is E = mc2\n"
    assert refused("pptx", out.getvalue(), "2-").startswith("has 1 slides, and --pages 2-")


def test_slides_are_cited_by_their_numbers():
    data = write_slides()
    assert sniff("x", data, "x") == "pptx"
    found = extract("pptx", data)
    assert found.text == (
        "# A talk\n\nby Ann\n\n"
        "# Why\n\nfirst\n  deeper\n\na | b\n | d\n\nNotes: Say it\nslowly.\n\n"
        "# Hidden\n\nin a group\n"
    )
    assert starts(found) == [
        ("slide 1", "# A talk"),
        ("slide 2", "# Why"),
        ("slide 4", "# Hidden"),
        ("slide 5", "in a group"),
    ]
    assert [place.title for place in found.places] == ["A talk", "Why", "Hidden", ""]
    assert found.num_pages == 5 and found.warnings[0].endswith("(pictures or nothing): 3.")
    chosen = extract("pptx", data, "4-")
    assert chosen.text == "# Hidden\n\nin a group\n" and chosen.num_pages == 5
    assert "has 5 slides, and --pages 6 begins behind" in refused("pptx", data, "6")


def test_a_chart_is_the_table_of_its_numbers():
    pptx = pytest.importorskip("pptx")
    from pptx.chart.data import CategoryChartData
    from pptx.enum.chart import XL_CHART_TYPE

    data = CategoryChartData()
    data.categories = ["2019", "2020"]
    data.add_series("North\nsea", (3, 0.1 + 0.2))
    data.add_series("South", (None, 7))
    deck = pptx.Presentation()
    slide = deck.slides.add_slide(deck.slide_layouts[6])
    chart = slide.shapes.add_chart(XL_CHART_TYPE.COLUMN_CLUSTERED, 0, 0, 9, 9, data).chart
    chart.chart_title.text_frame.text = "Sales"
    out = io.BytesIO()
    deck.save(out)
    rows = "Chart: Sales\n | 2019 | 2020\nNorth sea | 3 | 0.3\nSouth |  | 7\n"
    assert extract("pptx", out.getvalue()).text == rows
    parts = members_of(out.getvalue())
    (name,) = (name for name in parts if name.startswith("ppt/charts/chart"))
    parts[name] = parts[name].replace(b"barChart", b"surfaceChart")  # which the library knows not
    assert "no text" in refused("pptx", write_zip(parts))


def test_slide_shows_are_slides_and_footers_are_no_text():
    data = write_zip(
        {
            name: part.replace(
                b"presentationml.presentation.main", b"presentationml.slideshow.main"
            )
            for name, part in members_of(write_slides()).items()
        }
    )
    assert extract("pptx", data).text.startswith("# A talk")
    footer = b'<p:ph type="sldNum" idx="12"/>'
    parts = members_of(write_slides())
    parts["ppt/slides/slide2.xml"] = parts["ppt/slides/slide2.xml"].replace(
        b'<p:ph idx="1"/>', footer
    )
    assert "first" not in extract("pptx", write_zip(parts)).text


def test_sheets_are_tables_under_their_names():
    data = write_sheets()
    assert sniff("x", data, "x") == "xlsx"
    found = extract("xlsx", data)
    begins = (
        "# Costs\n\nwhat | when | how much | paid\nmill | 2020-01-02 | 3.3 | TRUE\n"
        " | two lines | 7 | 2020-01-02 03:04:00\n\n# Far\n\n"
    )
    assert found.text.startswith(begins)
    assert found.text[len(begins) :] == " | ... | the last cell of all\n"
    assert starts(found) == [("sheet 1", "# Costs"), ("sheet 3", "# Far")]
    assert found.warnings == ["No text on 1 of 3 sheets: Empty."]


def test_durations_and_large_numbers_are_shown_as_spreadsheets_do():
    openpyxl = pytest.importorskip("openpyxl")
    from datetime import timedelta

    book = openpyxl.Workbook()
    book.active.append([timedelta(hours=30), timedelta(hours=-1, minutes=-5), 0.25])
    for cell in book.active[1][:2]:
        cell.number_format = "[h]:mm:ss"
    book.active.append([12345678901234567, 1e300])
    out = io.BytesIO()
    book.save(out)
    lines = extract("xlsx", out.getvalue()).text.splitlines()
    # The library writes 16 digits; spreadsheets have 15.
    assert lines[2:] == ["30:00:00 | -1:05:00 | 0.25", "12345678901234570 | 1e+300"]


def test_formulas_without_values_are_told():
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in ([1, 2, "=A1+B1"], ["=SUM(A1:B1)", "x"]):
        book.active.append(row)
    out = io.BytesIO()
    book.save(out)
    found = extract("xlsx", out.getvalue())
    assert found.text == "# Sheet\n\n1 | 2\n | x\n"
    assert found.warnings[0].startswith("2 formulas were never computed, and left out")
    for cell in ("A1", "B1", "B2"):
        book.active[cell] = None
    alone = io.BytesIO()
    book.save(alone)
    assert "holds no text: 2 formulas were never" in refused("xlsx", alone.getvalue())
    parts = members_of(out.getvalue())
    sheet = parts["xl/worksheets/sheet1.xml"]
    for value, text in ((b"<v>3</v>", "1 | 2 | 3\n3 | x\n"), (b"", "1 | 2\n | x\n")):
        computed = re.sub(rb"<v\s*/>|<v></v>", value, sheet)
        found = extract("xlsx", write_zip({**parts, "xl/worksheets/sheet1.xml": computed}))
        assert found.text == f"# Sheet\n\n{text}" and bool(found.warnings) != bool(value)


def test_a_formula_may_have_been_computed_to_an_empty_text():
    parts = members_of(write_sheets())
    name = "xl/worksheets/sheet1.xml"
    start, end = b"<sheetData>", b"</sheetData>"
    before, rest = parts[name].split(start)
    after = rest.split(end)[1]
    for value in (b"<v></v>", b"<v/>"):
        cells = b'<c r="A1"><v>3</v></c><c r="B1" t="str"><f>IF(A1=3,"",1)</f>%b</c>' % value
        row = b'<row r="1">%b<c r="C1" s="1"><f>A1</f></c></row>' % cells
        parts[name] = before + start + row + end + after
        found = extract("xlsx", write_zip(parts))
        assert found.text.startswith("# Costs\n\n3\n\n")
        assert found.warnings[-1].startswith("1 formula was never computed")


def test_a_row_that_no_sheet_has_is_refused():
    parts = members_of(write_sheets())
    name = "xl/worksheets/sheet3.xml"
    assert b'r="1048576"' in parts[name]  # the last one is read
    parts[name] = parts[name].replace(b"1048576", b"999999999")
    assert "has a row beyond 1,048,576" in refused("xlsx", write_zip(parts))


def test_sheets_count_as_their_tabs_do():
    openpyxl = pytest.importorskip("openpyxl")
    from openpyxl.chart import BarChart, Reference

    book = openpyxl.Workbook()
    book.active.append([1, 2])
    chart = BarChart()
    chart.add_data(Reference(book.active, min_col=1, max_col=2, min_row=1))
    book.create_chartsheet("Chart").add_chart(chart)
    hidden = book.create_sheet("Hidden")
    hidden.sheet_state, hidden["A1"] = "hidden", "x"
    book.create_chartsheet("No chart yet")  # the library fails on it
    out = io.BytesIO()
    book.save(out)
    found = extract("xlsx", out.getvalue())
    assert starts(found) == [("sheet 1", "# Sheet"), ("sheet 3", "# Hidden")]
    assert not found.warnings


def test_a_sheet_that_lies_about_its_size_is_read_by_its_cells():
    parts = members_of(write_sheets())
    sheet = parts["xl/worksheets/sheet1.xml"]
    assert b'<dimension ref="A1:D4"' in sheet
    parts["xl/worksheets/sheet1.xml"] = sheet.replace(b"A1:D4", b"A1:XFD1048576")
    assert extract("xlsx", write_zip(parts)).text == extract("xlsx", write_sheets()).text


def test_what_is_embedded_does_not_say_what_a_file_is():
    """A chart on a slide brings its workbook along, packed or not."""
    inner = write_zip({"word/document.xml": "x", "xl/workbook.xml": "x"})
    out = io.BytesIO(write_slides())
    with zipfile.ZipFile(out, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr("ppt/embeddings/book.xlsx", inner)
    assert sniff("x", out.getvalue(), "x") == "pptx"


def test_what_no_library_reads_is_named():
    for name in ("ppt/presentation.xml", "xl/workbook.xml"):
        types = '<Relationships><Relationship Type="http://purl.oclc.org/ooxml/x"/></Relationships>'
        data = write_zip({name: "<a/>", "[Content_Types].xml": "<a/>", "_rels/.rels": types})
        assert "is a strict Open XML file; save it as" in refused(sniff("x", data, "x"), data)
    locked = b"\xd0\xcf\x11\xe0" + "EncryptedPackage".encode("utf-16-le")
    with pytest.raises(InputError, match=r"a\.docx is encrypted with a password"):
        sniff("a.docx", locked, "a.docx")
    with pytest.raises(InputError, match="an old Office file"):
        sniff("a.doc", locked[:12], "a.doc")


@pytest.mark.parametrize("format", OFFICE)
def test_bad_office_files(format):
    data = OFFICE[format]()
    assert "is a damaged archive" in refused(format, data[: len(data) // 2])
    good = members_of(data)
    for name in good:  # each part missing, cut short, or with entities of its own
        for part in (None, good[name][: len(good[name]) // 2]):
            parts = {**good, name: part} if part is not None else {**good}
            if part is None:
                del parts[name]
            try:
                assert extract(format, write_zip(parts)).text.strip()
            except InputError as error:
                assert "damaged" in str(error) or "holds no text" in str(error)
        if name.endswith((".xml", ".rels")):
            for coding in ("utf-8", "utf-16"):
                declared = ENTITIES.encode(coding)
                parts = {**good, name: declared}
                assert "declares entities" in refused(format, write_zip(parts))
                parts = {**good, "part.other": declared}  # any name may be that of a part
                assert "declares entities" in refused(format, write_zip(parts))
    assert extract(format, write_zip({**good, "media/a.svg": ENTITIES})).text.strip()
    flagged = bytearray(data)
    flagged[flagged.find(b"PK\x01\x02") + 8] |= 1
    assert "encrypted with a password" in refused(format, bytes(flagged))
    bomb = write_zip({**good, "bomb.xml": b"<a>" + b" " * 50_000_000 + b"</a>"})
    assert "times its size" in refused(format, bomb)


@pytest.mark.parametrize("format", OFFICE)
@given(st.data())
@settings(max_examples=25)
def test_a_damaged_office_file_is_read_or_refused(format, data):
    """Packed without compression, so that changes reach the parts' XML."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, part in members_of(OFFICE[format]()).items():
            archive.writestr(name, part)
    try:
        assert extract(format, damaged(data, out.getvalue())).text.strip()
    except InputError:
        pass


def test_signs_of_fonts_on_slides_are_what_they_show():
    pptx = pytest.importorskip("pptx")
    from pptx.oxml import parse_xml
    from pptx.oxml.ns import nsdecls

    def body(paragraphs, levels=""):
        return parse_xml(
            f"<p:txBody {nsdecls('a', 'p')}><a:bodyPr/><a:lstStyle>{levels}</a:lstStyle>"
            f"{paragraphs}</p:txBody>"
        )

    def run(text, font="", kind="latin"):
        named = f'<a:rPr><a:{kind} typeface="{font}"/></a:rPr>' if font else ""
        return f"<a:r>{named}<a:t>{text}</a:t></a:r>"

    def p(*runs, properties=""):
        return f"<a:p>{properties}{''.join(runs)}</a:p>"

    def bullet(char, font, level=0):
        return (
            f'<a:pPr lvl="{level}"><a:buFont typeface="{font}"/><a:buChar char="{char}"/></a:pPr>'
        )

    def put(shape, element):
        shape._element.replace(shape._element.txBody, element)

    deck = pptx.Presentation()
    layout = deck.slide_layouts[1]
    slide = deck.slides.add_slide(layout)
    put(slide.shapes.title, body(p(run("a"), run("D", "Symbol"), run("-"))))
    symbol = '<a:lvl1pPr><a:defRPr><a:latin typeface="Symbol"/></a:defRPr></a:lvl1pPr>'
    ticks = (
        bullet("o", "Wingdings")
        .replace('a:pPr lvl="0"', "a:lvl2pPr")
        .replace("/a:pPr", "/a:lvl2pPr")
    )
    put(layout.placeholders[1], body(p(run("x")), symbol + ticks))  # which the slide's comes from
    text = p(run("m"), run("m", "Arial"))
    text += p(run("open"), properties='<a:pPr lvl="1"/>')
    text += p(run("closed"), properties=bullet("&#xfe;", "Wingdings", 1))
    text += p(run("none"), properties='<a:pPr lvl="1"><a:buNone/></a:pPr>')
    text += p(properties='<a:pPr lvl="1"/>')
    put(slide.placeholders[1], body(text))
    box = slide.shapes.add_textbox(0, 0, 9, 9)
    after = run(" a à &#xf0e0;", "Wingdings", "sym")  # typed behind an arrow
    put(box, body(p(run("on "), run("à", "Wingdings", "sym"), after)))
    table = slide.shapes.add_table(1, 1, 0, 0, 9, 9).table
    table.cell(0, 0).text = "p"
    table.cell(0, 0).text_frame.paragraphs[0].runs[0].font.name = "Symbol"
    slide.notes_slide.notes_text_frame.text = "b"
    slide.notes_slide.notes_text_frame.paragraphs[0].runs[0].font.name = "Symbol"
    out = io.BytesIO()
    deck.save(out)
    assert extract("pptx", out.getvalue()).text == (
        "# aΔ-\n\nμm\n  ☐ open\n  ☑ closed\n  none\n\non → a à →\n\nπ\n\nNotes: β\n"
    )

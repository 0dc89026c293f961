"""An Office file of each format, with what may be in one. Not tests."""

from __future__ import annotations

import datetime
import io

import pytest
from office_writer import open_document, write_docx, write_open_document

ODT = """
<text:tracked-changes><text:p>deleted</text:p></text:tracked-changes>
<text:table-of-content><text:index-body><text:p>Contents</text:p></text:index-body></text:table-of-content>
<text:h text:outline-level="1">Part <text:span>one</text:span></text:h>
<text:p>a<text:s text:c="3"/>b<text:tab/>c<text:line-break/>d
  e<text:note><text:note-citation>1</text:note-citation><text:note-body><text:p>see
  below</text:p></text:note-body></text:note><office:annotation><text:p>no</text:p></office:annotation></text:p>
<text:p/>
<text:section><text:h text:outline-level="2">Inner</text:h></text:section>
<text:list><text:list-item><text:p>x</text:p><text:p>y</text:p>
<text:list><text:list-item><text:p>z</text:p></text:list-item></text:list></text:list-item></text:list>
<table:table><table:table-header-rows><table:table-row><table:table-cell><text:p>1</text:p>
<text:p>2</text:p></table:table-cell><table:table-cell><text:p>3</text:p></table:table-cell>
<table:covered-table-cell/></table:table-row></table:table-header-rows></table:table>
<text:p><draw:frame><svg:title>alt</svg:title><draw:text-box><text:p>boxed</text:p></draw:text-box>
</draw:frame></text:p>"""


def write_odt(text=ODT, **replaced):
    return write_open_document("odt", text, **replaced)


def cell(text="", kind="", repeated=0, **attributes):
    named = "".join(f' office:{name.replace("_", "-")}="{v}"' for name, v in attributes.items())
    named += f' office:value-type="{kind}"' if kind else ""
    named += f' table:number-columns-repeated="{repeated}"' if repeated else ""
    return (
        f"<table:table-cell{named}>{f'<text:p>{text}</text:p>' if text else ''}</table:table-cell>"
    )


def row(*cells, repeated=0):
    named = f' table:number-rows-repeated="{repeated}"' if repeated else ""
    return f"<table:table-row{named}>{''.join(cells)}</table:table-row>"


def sheet(name, *rows):
    return f'<table:table table:name="{name}">{"".join(rows)}</table:table>'


def write_ods(*sheets):
    far = row(cell(repeated=16383), cell("the last cell of all"))
    costs = (
        row(cell("what"), cell("when"), cell("how much"), cell("paid")),
        "<table:table-header-rows>"
        + row(
            cell("mill"),
            cell("2. Jan", "date", date_value="2020-01-02"),
            cell("3,30 EUR", "currency", value=1.1 + 2.2),
            cell("ja", "boolean", boolean_value="true"),
        )
        + "</table:table-header-rows>",
        row(cell(repeated=16384), repeated=3),
        row(
            "<table:covered-table-cell/>",
            cell("two</text:p><text:p>lines<office:annotation>no</office:annotation>"),
            cell("7", "float", value="7"),
            cell("x", "date", date_value="2020-01-02T03:04:00"),
            cell(repeated=16380),
        ),
        row(cell("12 %", "percentage", value="0.12"), cell("1:30", "time"), cell("a", repeated=2)),
        row(cell(), repeated=1048571),
    )
    sheets = sheets or (
        sheet("Costs", "<table:table-source/>", *costs),
        sheet("'file:///other.ods'#Sheet1", row(cell("kept of another file"))),
        sheet("Empty", row(cell(repeated=16384), repeated=1048576)),
        sheet("Far", row(repeated=1048575), far),
    )
    return write_open_document("ods", "".join(sheets))


def shape(text, kind="", name="frame"):
    named = f' presentation:class="{kind}"' if kind else ""
    box = f"<draw:text-box>{text}</draw:text-box>" if name == "frame" else text
    return f"<draw:{name}{named}>{box}</draw:{name}>"


def write_odp(**replaced):
    """Five slides: one says nothing, and the last has a group."""
    deeper = "<text:list><text:list-item><text:p>deeper</text:p></text:list-item></text:list>"
    outline = (
        f"<text:list><text:list-item><text:p>first</text:p>{deeper}</text:list-item></text:list>"
    )
    cells = [f"<table:table-row>{cell(a)}{cell(b)}</table:table-row>" for a, b in ("ab", " d")]
    table = f"<draw:frame><table:table>{''.join(cells)}</table:table><draw:image/></draw:frame>"
    notes = shape("<text:p>12</text:p>", "page-number")
    notes += shape("<text:p>Say it</text:p><text:p>slowly.</text:p>", "notes")
    chart = '<draw:frame><draw:object xlink:href="./Object 1"/><draw:image/></draw:frame>'
    formula = '<draw:frame><draw:object xlink:href="./Object 2"/></draw:frame>'
    group = shape(
        shape(shape("<text:p>in a group</text:p>", name="custom-shape"), name="g"), name="g"
    )
    slides = (
        shape("<text:p>by Ann</text:p>", "subtitle")
        + shape("<text:p>A<text:line-break/>talk</text:p>", "title")
        + shape("<text:p>footer</text:p>", "footer"),
        shape("<text:p>Why</text:p>", "title")
        + shape(outline, "outline")
        + table
        + f"<presentation:notes>{notes}</presentation:notes>",
        "<draw:frame><svg:title>alt</svg:title><draw:image/></draw:frame>",
        shape("<text:p>Numbers</text:p>", "title") + chart + formula,
        group,
    )
    rows = [row(cell(a), cell(b)) for a, b in (("", "North"), ("2019", "3"))]
    inner = f"<chart:chart><chart:title><text:p>Sales</text:p></chart:title>{sheet('t', *rows)}"
    inner = f"<office:body><office:chart>{inner}</chart:chart></office:chart></office:body>"
    objects = {
        "Object 1/content.xml": open_document("document-content", inner),
        "Object 2/content.xml": "<math/>",
    }
    body = "".join(f"<draw:page>{slide}</draw:page>" for slide in slides)
    footer = "<presentation:footer-decl>furniture</presentation:footer-decl>"
    return write_open_document("odp", footer + body, **{**objects, **replaced})


def write_letter():
    """With a head, a heading, a table and a note."""
    note = '<w:r><w:footnoteReference w:id="1"/></w:r>'
    words = "<w:p><w:pPr><w:pStyle w:val='H'/></w:pPr><w:r><w:t>Words</w:t></w:r></w:p>"
    table = f"<w:tbl><w:tr><w:tc>{words}</w:tc></w:tr></w:tbl>"
    head = '<w:sectPr><w:headerReference w:type="default" r:id="header1"/></w:sectPr>'
    return write_docx(
        words + f"<w:p><w:r><w:t>more</w:t></w:r>{note}</w:p>" + table + head,
        styles='<w:style w:styleId="H"><w:name w:val="heading 1"/></w:style>',
        footnotes=f'<w:footnote w:id="1">{words}</w:footnote>',
        header1=words,
    )


def write_slides():
    """Five slides: one says nothing, one is hidden, and the last has a group."""
    pptx = pytest.importorskip("pptx")
    deck = pptx.Presentation()
    title, body, _, _, _, _, blank = list(deck.slide_layouts)[:7]
    slide = deck.slides.add_slide(title)
    slide.placeholders[1].text = "by Ann"
    slide.shapes.title.text = "A\vtalk"
    slide = deck.slides.add_slide(body)
    slide.shapes.title.text = "Why"
    frame = slide.placeholders[1].text_frame
    frame.text = "first\n \ndeeper"
    frame.paragraphs[2].level = 1
    table = slide.shapes.add_table(3, 2, 0, 0, 9, 9).table
    for row, column, text in ((0, 0, "a"), (0, 1, "b"), (2, 1, "d")):
        table.cell(row, column).text = text
    slide.notes_slide.notes_text_frame.text = "Say it\nslowly."
    deck.slides.add_slide(blank)
    slide = deck.slides.add_slide(body)
    slide._element.set("show", "0")
    slide.shapes.title.text = "Hidden"
    group = deck.slides.add_slide(blank).shapes.add_group_shape().shapes.add_group_shape()
    group.shapes.add_textbox(0, 0, 9, 9).text_frame.text = "in a group"
    out = io.BytesIO()
    deck.save(out)
    return out.getvalue()


def write_sheets():
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    costs = book.active
    costs.title = "Costs"
    costs.append(["what", "when", "how much", "paid"])
    costs.append(["mill", datetime.datetime(2020, 1, 2), 1.1 + 2.2, True])
    costs.append([])
    costs.append([None, "two\nlines", 7, datetime.datetime(2020, 1, 2, 3, 4)])
    book.create_sheet("Empty")
    book.create_sheet("Far")["XFD1048576"] = "the last cell of all"
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


OFFICE = {
    **{"docx": write_letter, "pptx": write_slides, "xlsx": write_sheets},
    **{"odt": write_odt, "odp": write_odp, "ods": write_ods},
}

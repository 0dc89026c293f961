"""DOCX: all that a page shows is read, in the order in which it is seen."""

from __future__ import annotations

import io

import pytest
from book_writer import write_zip
from documents_under_test import extract, refused, starts
from office_writer import members_of, word_part, write_docx

from ebbtide.offload.documents.sniff import sniff


def p(text, properties=""):
    return f"<w:p><w:pPr>{properties}</w:pPr>{text}</w:p>"


def t(text, properties=""):
    return f"<w:r><w:rPr>{properties}</w:rPr><w:t>{text}</w:t></w:r>"


def text_of(body, **parts):
    return extract("docx", write_docx(body, **parts)).text


def test_docx_of_another_writer():
    docx = pytest.importorskip("docx")
    document = docx.Document()
    document.add_heading("A title", 0)
    document.add_heading("Part one", 1)
    document.add_paragraph("Some words.\tAnd\nmore.")
    document.add_paragraph("an item", style="List Bullet")
    table = document.add_table(2, 2)
    for row, column, text in ((0, 0, "a"), (0, 1, "b"), (1, 0, "both")):
        table.cell(row, column).text = text
    table.cell(1, 0).merge(table.cell(1, 1))
    document.sections[0].header.paragraphs[0].text = "A head"
    out = io.BytesIO()
    document.save(out)
    assert sniff("x", out.getvalue(), "x") == "docx"
    found = extract("docx", out.getvalue())
    assert found.text == (
        "A head\n\n# A title\n\n# Part one\n\nSome words.\tAnd\nmore.\n\n- an item\n\n"
        "a | b\n\nboth\n"
    )
    assert starts(found) == [("sec. 1", "# A title"), ("sec. 2", "# Part one")]


def test_notes_stand_where_their_marks_are():
    mark = '<w:r><w:{}noteReference w:id="2"/></w:r>'
    body = p(t("One") + mark.format("foot") + t(", two") + mark.format("end") + t("."))
    separator = f'<w:footnote w:id="0" w:type="separator">{p("<w:r><w:separator/></w:r>")}'
    notes = f'{separator}</w:footnote><w:footnote w:id="2">{p(t("a"))}{p(t("b"))}</w:footnote>'
    ends = f'<w:endnote w:id="2">{p("<w:r><w:endnoteRef/></w:r>" + t("the end"))}</w:endnote>'
    told = "One [a b], two [the end].\n"
    assert text_of(body, footnotes=notes, endnotes=ends) == told
    assert text_of(body * 3, footnotes=notes, endnotes=ends).count("[") == 2  # each is told once
    assert text_of(body) == "One, two.\n"


def test_a_note_in_itself_ends():
    again = p(t("a") + '<w:r><w:footnoteReference w:id="1"/></w:r>')
    notes = f'<w:footnote w:id="1">{again}</w:footnote>'
    assert text_of(again, footnotes=notes) == "a [a]\n"


def test_text_boxes_stand_behind_their_paragraph():
    inner = f"<w:txbxContent>{p(t('in'))}</w:txbxContent>"
    content = p(t("boxed") + f"<w:r><w:drawing><a>{inner}</a></w:drawing></w:r>") + p(t("more"))
    box = f"<w:txbxContent>{content}</w:txbxContent>"
    new, old = (
        f"<w:drawing><a>{box}</a></w:drawing>",
        f"<w:pict><v:textbox>{box}</v:textbox></w:pict>",
    )
    both = (
        f"<mc:AlternateContent><mc:Choice>{new}</mc:Choice>"
        f"<mc:Fallback>{old}</mc:Fallback></mc:AlternateContent>"
    )
    for drawing in (new, old, both):
        body = p(t("Words ") + f"<w:r>{drawing}</w:r>" + t("go on."))
        assert text_of(body) == "Words go on.\n\nboxed\n\nin\n\nmore\n"


def test_what_stands_at_the_head_of_pages_comes_before_their_section():
    def section(*heads):
        refs = "".join(f'<w:headerReference w:type="{a}" r:id="{b}"/>' for a, b in heads)
        return f"<w:sectPr>{refs}</w:sectPr>"

    body = p(t("one"), section(("default", "header2"), ("first", "header1")))
    body += p(t("two"), section(("default", "header2"))) + p(t("three"))
    body += section(("default", "header3"), ("even", "missing"))
    heads = {"header1": "The title", "header2": "Running", "header3": "Chapter"}
    parts = {name: p(t(text)) + p(t("12")) for name, text in heads.items()}
    assert text_of(body, **parts) == "The title\n\nRunning\n\none\n\ntwo\n\nChapter\n\nthree\n"


def test_what_was_deleted_or_is_hidden_is_left_out():
    body = p(
        t("a")
        + f"<w:ins>{t('b')}</w:ins><w:del><w:r><w:delText>no</w:delText></w:r></w:del>"
        + f"<w:moveFrom>{t('no')}</w:moveFrom><w:moveTo>{t('c')}</w:moveTo>"
        + t("no", "<w:vanish/>")
        + t("d", '<w:vanish w:val="0"/>')
        + f"<w:fldSimple>{t('e')}</w:fldSimple>"
        + "<w:r><w:instrText>PAGE</w:instrText><w:noBreakHyphen/><w:softHyphen/></w:r>"
        + f"<w:hyperlink><w:smartTag>{t('f')}</w:smartTag></w:hyperlink>"
    )
    assert text_of(body) == "abcde-f\n"


def test_fields_are_read_as_their_results():
    def field(instruction, result):
        begin, separate, end = (
            f'<w:r><w:fldChar w:fldCharType="{kind}"/></w:r>'
            for kind in ("begin", "separate", "end")
        )
        return begin + instruction + separate + result + end

    def told(text):
        return f"<w:r><w:instrText>{text}</w:instrText></w:r>"

    inner = field(told("MERGEFIELD sex"), t("male"))
    instruction = f"{told('IF')}{inner}{told('= male Mr Ms')}"
    body = p(field(instruction, t("Mr")) + t(" Smith"))
    # One that ends in another paragraph, or nowhere, takes nothing of the next.
    body += p(t("a") + '<w:r><w:fldChar w:fldCharType="begin"/></w:r>' + t("no")) + p(t("b"))
    assert text_of(body) == "Mr Smith\n\na\n\nb\n"


def m(name, *inner):
    return f"<m:{name}>{''.join(inner)}</m:{name}>"


def r(text):
    return m("r", m("t", text))


def test_formulas_are_written_on_one_line():
    power = m("sSup", m("e", r("x")), m("sup", r("n"), r("+1")))
    sum_ = m("nary", '<m:naryPr><m:chr m:val="∑"/></m:naryPr>', m("sub", r("i")), m("e", r("i")))
    fraction = m("f", m("fPr"), m("num", r("ab")), m("den", r("c")))
    formula = power + r("=") + m("d", m("e", r("y"))) + fraction + sum_
    assert text_of(p(t("if ") + m("oMath", formula))) == "if x^(n+1)=(y)(ab)/c∑_ii\n"


def test_items_and_headings_have_their_numbers():
    def level(number, kind, text, start=1, more=""):
        return (
            f'<w:lvl w:ilvl="{number}"><w:start w:val="{start}"/><w:numFmt w:val="{kind}"/>'
            f'<w:lvlText w:val="{text}"/>{more}</w:lvl>'
        )

    def item(text, list_id, number=0):
        ilvl = f'<w:ilvl w:val="{number}"/>' if number else ""
        return p(t(text) if text else "", f'<w:numPr>{ilvl}<w:numId w:val="{list_id}"/></w:numPr>')

    clauses = level(0, "decimal", "%1.") + level(1, "lowerLetter", "(%2)", 26)
    clauses += level(2, "upperRoman", "%1.%3")
    parts = level(0, "decimalZero", "Part %1:") + level(1, "bullet", "x")
    boxes = '<w:rPr><w:rFonts w:ascii="Wingdings"/></w:rPr>'
    parts += level(2, "bullet", "&#xf0a8;", more=boxes) + level(3, "bullet", "v", more=boxes)
    numbering = "".join(
        f'<w:abstractNum w:abstractNumId="{key}">{levels}</w:abstractNum>'
        for key, levels in (("a", clauses), ("b", parts))
    )
    again = '<w:lvlOverride w:ilvl="0"><w:startOverride w:val="7"/></w:lvlOverride>'
    for key, make, more in ((1, "a", ""), (2, "a", again), (3, "b", "")):
        numbering += f'<w:num w:numId="{key}"><w:abstractNumId w:val="{make}"/>{more}</w:num>'
    style = '<w:style w:styleId="H"><w:name w:val="heading 1"/><w:pPr><w:numPr>'
    style += '<w:numId w:val="3"/></w:numPr></w:pPr></w:style>'
    body = p(t("Terms"), '<w:pStyle w:val="H"/>') + item("first", 1) + item("", 1)
    body += item("inner", 1, 1) + item("inner", 1, 1) + item("deep", 1, 2) + item("third", 1)
    body += item("inner", 1, 1) + item("seventh", 2) + item("dot", 3, 1)
    body += item("box", 3, 2) + item("sign", 3, 3) + item("odd", 9)
    assert text_of(body, numbering=numbering, styles=style).split("\n\n") == [
        *("# Part 01: Terms", "1. first", "(z) inner", "(aa) inner", "2.I deep", "3. third"),
        *("(z) inner", "7. seventh", "- dot", "- ☐ box", "- sign", "- odd\n"),
    ]


def _settings(of, **values):
    return m(f"{of}Pr", *(f'<m:{name} m:val="{value}"/>' for name, value in values.items()))


_A, _B = m("e", r("a")), m("e", r("b"))


@pytest.mark.parametrize(
    ("formula", "written"),
    [
        (m("rad", _settings("rad", degHide="1"), m("deg"), _A), "√(a)"),
        (m("rad", m("deg", r("3")), m("e", r("a+b"))), "√[3](a+b)"),
        (m("d", _settings("d", begChr="|", endChr="|"), _A), "|a|"),
        (m("d", _settings("d", endChr="]", sepChr=","), _A, _B), "(a,b]"),
        (m("d", _settings("d", begChr="{", endChr=""), m("e", m("eqArr", _A, _B))), "{a; b"),
        (m("m", m("mr", _A, _B), m("mr", _B, _A)), "a, b; b, a"),
        (m("f", _settings("f", type="noBar"), m("num", r("n")), m("den", r("k"))), "n over k"),
        (m("acc", _A) + m("acc", _settings("acc", chr="\u0303"), _A), "a\u0302a\u0303"),
        (m("bar", _A) + m("bar", _settings("bar", pos="top"), _A), "a\u0332a\u0305"),
    ],
)
def test_parts_of_formulas_keep_their_meaning(formula, written):
    assert text_of(p(m("oMath", formula))) == f"{written}\n"


def test_content_controls_are_read():
    row = f"<w:sdt><w:sdtContent><w:tr><w:tc>{p(t('a'))}{p(t('b'))}</w:tc>"
    row += f"<w:sdt><w:sdtContent><w:tc>{p(t('c'))}</w:tc></w:sdtContent></w:sdt></w:tr>"
    table = f"<w:tbl><w:tblPr/>{row}</w:sdtContent></w:sdt></w:tbl>"
    inline = (
        f"<w:sdt><w:sdtPr><w:t>no</w:t></w:sdtPr><w:sdtContent>{t('in')}</w:sdtContent></w:sdt>"
    )
    body = f"<w:sdt><w:sdtContent>{p(inline)}{table}</w:sdtContent></w:sdt>"
    assert text_of(body) == "in\n\na b | c\n"
    nested = f"<w:tbl><w:tr><w:tc>{table}</w:tc><w:tc>{p(t('d'))}</w:tc></w:tr></w:tbl>"
    assert text_of(nested) == "a b | c | d\n"


def test_headings_are_known_by_their_styles_and_levels():
    styles = "".join(
        f'<w:style w:styleId="{key}"><w:name w:val="{name}"/>{rest}</w:style>'
        for key, name, rest in (
            ("berschrift2", "heading 2", ""),
            ("Mine", "Mine", '<w:basedOn w:val="berschrift2"/>'),
            ("Deep", "Deep", '<w:pPr><w:outlineLvl w:val="2"/></w:pPr>'),
            ("Loop", "Loop", '<w:basedOn w:val="Loop"/>'),
            ("T", "Title", ""),
            ("Author", "Author", '<w:basedOn w:val="T"/>'),
            ("V1", "toc 1", ""),
        )
    )
    body = "".join(
        p(t(key), f'<w:pStyle w:val="{key}"/>') for key in ("berschrift2", "Mine", "Deep", "Loop")
    )
    body += p(t("Contents"), '<w:pStyle w:val="V1"/>') + p(t("own"), '<w:outlineLvl w:val="0"/>')
    body += p(t("The title"), '<w:pStyle w:val="T"/>') + p(t("Ann"), '<w:pStyle w:val="Author"/>')
    body += p(t("none"), '<w:outlineLvl w:val="9"/>')
    body += p(t("item"), '<w:numPr><w:numId w:val="3"/></w:numPr>')
    body += p(t("no item"), '<w:numPr><w:numId w:val="0"/></w:numPr>')
    assert text_of(body, styles=styles) == (
        "## berschrift2\n\n## Mine\n\n### Deep\n\nLoop\n\n# own\n\n"
        "# The title\n\nAnn\n\nnone\n\n- item\n\nno item\n"
    )


def test_parts_may_have_other_names():
    parts = members_of(write_docx(p(t("words"))))
    parts["word/document2.xml"] = parts.pop("word/document.xml")
    parts["_rels/.rels"] = parts["_rels/.rels"].replace(
        b"/word/document.xml", b"word/document2.xml"
    )
    data = write_zip(parts)
    assert sniff("x", data, "x") == "docx" and extract("docx", data).text == "words\n"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>", "declares entities"),
        ("<a/>", "damaged DOCX file: it has no body"),
        ("<a", "damaged DOCX file: unclosed token"),
        (word_part("document", "<w:body/>"), "holds no text"),
    ],
)
def test_bad_docx(document, message):
    data = write_zip({"word/document.xml": document, "[Content_Types].xml": "<Types/>"})
    assert message in refused("docx", data)


@pytest.mark.parametrize("element", ["w:sdt", "w:tbl", "w:p", "w:txbxContent"])
def test_what_is_nested_too_deeply_is_refused(element):
    deep = f"<{element}>" * 100_000 + f"</{element}>" * 100_000
    with pytest.raises(RecursionError):  # the worker has a sentence for it
        extract("docx", write_docx(f"<w:p><w:r>{deep}</w:r></w:p>"))


def test_fonts_of_signs_show_signs():
    greek = '<w:rFonts w:ascii="Symbol" w:hAnsi="Symbol"/>'
    sym = '<w:r><w:sym w:font="{}" w:char="{}"/></w:r>'
    body = p(
        t("b = ")
        + t("2", greek)
        + t("b ", greek)
        + t("\uf0b3 ", greek)
        + sym.format("Symbol", "F061")
    )
    assert text_of(body) == "b = 2β ≥ α\n"
    assert text_of(p(sym.format("Wingdings", "F0FE") + t(" yes"))) == "☑ yes\n"
    assert text_of(p(sym.format("Wingdings", "00A8") + t(" no"))) == "☐ no\n"
    unknown = [("Mine", "F061"), ("Symbol", "nonsense"), ("Symbol", ""), ("Wingdings", "F020")]
    for font, char in unknown:
        assert text_of(p(t("a") + sym.format(font, char) + t("b"))).replace(" ", "") == "ab\n"
    noted = '<w:r><w:rPr><w:rFonts w:ascii="Symbol"/></w:rPr><w:footnoteReference w:id="1"/></w:r>'
    notes = f'<w:footnote w:id="1">{p(t("note"))}</w:footnote>'
    assert text_of(p(t("a") + noted), footnotes=notes) == "a [note]\n"


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ('<w:checkBox><w:default w:val="0"/><w:checked/></w:checkBox>', "☒"),
        ('<w:checkBox><w:default w:val="1"/></w:checkBox>', "☒"),
        ('<w:checkBox><w:default w:val="1"/><w:checked w:val="0"/></w:checkBox>', "☐"),
        ("<w:checkBox/>", "☐"),
        (
            '<w:ddList><w:result w:val="1"/><w:listEntry w:val="a"/>'
            '<w:listEntry w:val="b"/></w:ddList>',
            "b",
        ),
        ('<w:ddList><w:listEntry w:val="a"/><w:listEntry w:val="b"/></w:ddList>', "a"),
        ('<w:ddList><w:result w:val="7"/><w:listEntry w:val="a"/></w:ddList>', ""),
        ("<w:textInput/>", ""),
    ],
)
def test_what_is_filled_into_a_form_is_shown(form, text):
    mark = '<w:r><w:fldChar w:fldCharType="{}"/></w:r>'
    begin = f'<w:r><w:fldChar w:fldCharType="begin"><w:ffData>{form}</w:ffData></w:fldChar></w:r>'
    instruction = "<w:r><w:instrText>FORM</w:instrText></w:r>"
    field = begin + instruction + mark.format("separate") + mark.format("end")
    assert text_of(p(t("Paid: ") + field + t("."))) == f"Paid: {text}.\n"
    hidden = (
        mark.format("begin") + field + mark.format("separate") + t("shown") + mark.format("end")
    )
    assert text_of(p(hidden)) == "shown\n"  # a form in another field's instruction

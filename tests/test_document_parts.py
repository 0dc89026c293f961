"""Parts of long documents, and citations: nothing is lost, and nothing vouched for in vain."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.offload.documents.citations import CitationChecker, Verdict
from ebbtide.offload.documents.document import Document, Place, join_documents
from ebbtide.offload.documents.split import split_document
from ebbtide.offload.errors import ContextOverflow


def count(text):
    return len(text.split())


def paged(*pages, kind="page"):
    places, text = [], ""
    for number, page in enumerate(pages, 1):
        places.append(Place(len(text), kind, number))
        text += page + "\n\n"
    return Document("d.pdf", text, "pdf", tuple(places), len(pages))


PAGES = st.lists(
    st.lists(st.sampled_from(["a", "bb", "c.", "\n\n", "dddd"]), min_size=1, max_size=30).map(
        " ".join
    ),
    min_size=1,
    max_size=20,
)


# --- documents


def test_marks_begin_places_and_pieces():
    document = paged("One.", "Two.")
    assert document.piece(marked=True) == "[p. 1]\nOne.\n\n[p. 2]\nTwo.\n\n"
    assert document.piece(2, 6, marked=True) == "[p. 1]\ne.\n\n"
    assert document.piece(2, 8) == document.text[2:8]


@given(PAGES, st.data())
def test_marks_are_all_that_is_added(pages, data):
    document = paged(*pages)
    end = data.draw(st.integers(0, len(document.text)))
    start = data.draw(st.integers(0, end))
    marked = document.piece(start, end, marked=True)
    for place in document.places:
        marked = marked.replace(f"[{place.label}]\n", "", 1)
    assert marked == document.text[start:end]


def test_several_documents_are_one_whose_places_name_their_file():
    joined = join_documents([Document("a.txt", "\nText.\n"), paged("One.", "Two.")])
    assert joined.text == "# a.txt\n\nText.\n\n# d.pdf\n\nOne.\n\nTwo."
    labels = [(place.label, joined.text[place.start :][:4]) for place in joined.places]
    assert labels == [
        ("a.txt", "# a."),
        ("d.pdf", "# d."),
        ("d.pdf p. 1", "One."),
        ("d.pdf p. 2", "Two."),
    ]
    assert joined.piece(marked=True).count("[d.pdf p. 1]\nOne.") == 1


# --- parts


@given(PAGES, st.integers(1, 60))
def test_parts_cover_the_document_and_fit(pages, most):
    document = paged(*pages)
    parts = split_document(document, most, count)
    assert "".join(document.piece(p.start, p.end) for p in parts) == document.text
    assert all(p.num_tokens == count(document.piece(p.start, p.end)) <= most for p in parts)
    assert split_document(document, most, count) == parts


@given(PAGES, st.integers(40, 200))
def test_pages_that_fit_are_not_cut(pages, most):
    document = paged(*pages)
    starts = {place.start for place in document.places}
    assert all(part.start in starts for part in split_document(document, most, count))


def test_no_more_parts_than_needed_and_even_ones():
    document = paged(*["word " * 10] * 30)
    parts = split_document(document, 120, count)
    # Full parts would be 120, 120 and 60; 100 each is as even as can be, and a tenth more allowed.
    assert [part.num_tokens for part in parts] == [110, 110, 80]
    assert [part.label for part in parts] == ["p. 1 - p. 11", "p. 12 - p. 22", "p. 23 - p. 30"]


def test_a_chapter_that_begins_is_the_better_cut():
    document = paged(*["word " * 10] * 20)
    places = list(document.places)
    places[8] = Place(places[8].start, "page", 9, "Chapter two")
    document = Document("d", document.text, "pdf", tuple(places), 20)
    first = split_document(document, 110, count)[0]
    assert first.label == "p. 1 - p. 8"


def test_marks_count():
    document = paged(*["word"] * 10)
    parts = split_document(document, 6, count, marked=True)  # three words a page, marks included
    assert [part.num_tokens for part in parts] == [6] * 5


def test_a_text_without_places_is_cut_at_paragraphs_and_sentences():
    text = "One two three. " * 20 + "\n\n" + "Four five six. " * 20
    document = Document("d", text)
    parts = split_document(document, 35, count)
    assert "".join(document.piece(p.start, p.end) for p in parts) == text
    assert all(document.piece(p.start, p.end).strip().endswith(".") for p in parts)
    assert parts[0].label == "part 1"


def test_a_text_without_any_break_is_cut_all_the_same():
    document = Document("d", "x" * 1000)
    parts = split_document(document, 64, len)
    assert sum(part.num_tokens for part in parts) == 1000
    with pytest.raises(ContextOverflow, match="a single character"):
        split_document(document, 1, lambda text: 2 * len(text))


# --- citations


SOURCE = paged(
    "The harbour of Lisbon was painted in 1820. It cost 300 crowns, they say.",
    "A well-\nknown quar-\nrel began on the first day of spring - in Porto.",
    "The Mayor’s “grand plan” was never built. It cost 300 crowns, they say.",
)


def checked(text, document=SOURCE, **options):
    checker = CitationChecker(document, **options)
    shown = checker.push(text) + checker.finish()
    return shown, [citation.verdict for citation in checker.citations]


@pytest.mark.parametrize(
    "line",
    [
        'It "was painted in 1820" [p. 1].',
        'It "WAS  painted, in 1820" [p. 1].',
        "“A well-known quarrel began on the first day” [p. 2]",
        '"The Mayor\'s grand plan" [p. 3]',
        '"The harbour of Lisbon ... in 1820" [p. 1]',
        '"It cost 300 crowns" [p. 3]',
        '"it cost 300 crowns, they say. A well-known quarrel" [p. 1]',
        '"it cost 300 crowns" [pp. 1-3] and "in Porto" [p. 2]',
    ],
)
def test_words_that_stand_there(line):
    shown, verdicts = checked(line)
    assert shown == line and set(verdicts) == {Verdict.VERIFIED}


@pytest.mark.parametrize(
    ("line", "shown", "verdict"),
    [
        ('"was painted in 1821" [p. 1]', "[p. 1: words not found]", Verdict.NOT_FOUND),
        ('"was painted in 182" [p. 1]', "[p. 1: words not found]", Verdict.NOT_FOUND),
        ('"Lisbon was never painted" [p. 1]', "[p. 1: words not found]", Verdict.NOT_FOUND),
        ('"painted ... for nothing" [p. 1]', "[p. 1: words not found]", Verdict.NOT_FOUND),
        ('"was painted in 1820" [p. 2]', "[p. 2: the words stand at p. 1]", Verdict.ELSEWHERE),
        ('"was painted" [p. 77]', "[p. 77: there is no such place]", Verdict.NO_SUCH_PLACE),
        ("As told before [p. 77].", "[p. 77: there is no such place]", Verdict.NO_SUCH_PLACE),
        ('He said "words that are nowhere".', '" [words not found]', Verdict.NOT_FOUND),
    ],
)
def test_words_that_do_not(line, shown, verdict):
    found, verdicts = checked(line)
    assert shown in found and verdicts == [verdict]
    assert found.replace(" [words not found]", "").startswith(line.split("[")[0])


def test_what_stands_there_word_for_word_is_marked():
    shown, verdicts = checked(
        "1. The harbour of Lisbon was painted in 1820. It rained a lot there."
    )
    assert shown == "1. The harbour of Lisbon was painted in 1820. [p. 1] It rained a lot there."
    assert verdicts == [Verdict.ADDED]
    shown, _ = checked('They speak of "the first day of spring" there.')
    assert shown == 'They speak of "the first day of spring" [p. 2] there.'
    plain = "The harbour of Lisbon was painted in 1820."
    assert checked(plain, adds_marks=False) == (plain, [])
    assert checked(plain, Document("d", SOURCE.text)) == (plain, [])


def test_what_is_no_citation_is_left_alone():
    line = 'A "nice" list[0] of [p] and [see page] [1], "a b" [x. 3] and [ ].'
    assert checked(line) == (line, [])


def test_a_mark_without_words_is_not_vouched_for():
    assert checked("It was painted [p. 1, p. 2].")[1] == [Verdict.UNQUOTED]


@pytest.mark.parametrize("kind", ["slide", "sheet"])
def test_slides_and_sheets_are_cited_by_their_names(kind):
    deck = paged("It cost 300 crowns.", "It rained.", "It snowed.", kind=kind)
    for mark in (f"{kind} 1", f"{kind.capitalize()} 1", f"{kind}s 1-2", f"{kind}s 2, 1"):
        line = f'"it cost 300 crowns" [{mark}]'
        assert checked(line, deck) == (line, [Verdict.VERIFIED])
    shown, _ = checked(f'"it cost 300 crowns" [{kind}s 2, 3]', deck)
    assert f"[{kind}s 2, 3: the words stand at {kind} 1]" in shown
    assert f"[{kind} 7: there is no such place]" in checked(f"Rain [{kind} 7].", deck)[0]
    assert checked("It rained in all of it.", deck)[1] == []
    joined = join_documents([Document("a.txt", "Nothing of note here."), deck])
    line = f'"it cost 300 crowns" [d.pdf {kind} 1]'
    assert checked(line, joined) == (line, [Verdict.VERIFIED])


def test_citations_of_several_documents_name_them():
    joined = join_documents([Document("a.txt", "Nothing of note here."), SOURCE])
    line = '"was painted in 1820" [d.pdf p. 1] and "nothing of note" [a.txt]'
    assert checked(line, joined) == (line, [Verdict.VERIFIED] * 2)
    assert "stand at d.pdf p. 1" in checked('"was painted in 1820" [a.txt]', joined)[0]
    twice = join_documents([paged("Nothing of note here."), SOURCE])
    line = '"was painted in 1820" [d.pdf (2) p. 1] and "nothing of note" [d.pdf p. 1]'
    assert checked(line, twice) == (line, [Verdict.VERIFIED] * 2)


@given(st.text(alphabet='ab ."[]p1\n“”-', max_size=80), st.lists(st.integers(0, 80), max_size=6))
def test_pieces_make_no_difference_and_nothing_is_lost(text, cuts):
    whole, _ = checked(text)
    checker = CitationChecker(SOURCE)
    cuts = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(cuts)]
    assert "".join(map(checker.push, pieces)) + checker.finish() == whole
    # Only brackets are added: without what they say, it is the text.
    kept = iter(whole)
    assert all(char in kept for char in text)

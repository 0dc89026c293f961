"""Sentences written into a text: all of them, in order, between sentences, and nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ebbtide.cli.planted import plant

texts = st.text(st.sampled_from('ab .!?"\n'), max_size=200)
facts = st.lists(st.text(st.sampled_from("xyz"), min_size=1, max_size=8), max_size=6)


@given(texts, facts)
def test_nothing_is_lost_and_everything_is_in_order(text, sentences):
    found = plant(text, sentences)
    assert "".join(c for c in found if c in "xyz") == "".join(sentences)
    assert "".join(found.split()).replace("x", "").replace("y", "").replace("z", "") == "".join(
        text.split()
    )


def test_each_stands_between_two_sentences_in_the_middle_of_its_part():
    text = "Aa bb. " * 40
    found = plant(text, ["It is so.", "It is not."])
    assert found == "Aa bb. " * 10 + "It is so. " + "Aa bb. " * 20 + "It is not. " + "Aa bb. " * 10


def test_a_text_without_a_sentence_gets_them_at_its_end():
    assert plant("no end", ["One.", "Two."]) == "no end One. Two. "

"""Ids to text: streams show whole characters, and end where a stop string does."""

from __future__ import annotations

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from tokenizers_under_test import USER, id_of, write

from ebbtide.offload.errors import UnsupportedModel
from ebbtide.offload.text.text import StopStrings, Tokenizer


@settings(max_examples=200)
@given(data=st.data())
def test_a_stream_shows_what_decode_does(small, data):
    """For any tokens at all, valid text or not."""
    ids = data.draw(st.lists(st.integers(0, small.num_ids - 1), max_size=40))
    for skip in (True, False):
        stream = small.stream(skip)
        pieces = [stream.push(token_id) for token_id in ids]
        assert "".join(pieces) + stream.finish() == small.decode(ids, skip)


EMOJI = "👩‍👩‍👧🇩🇪e\u0301ß中\u200d😀"


@settings(max_examples=200)
@given(text=st.text(max_size=30) | st.text(st.sampled_from(EMOJI), max_size=20))
@example(text=EMOJI)
@example(text=" \ufffd ")
def test_a_stream_never_shows_half_a_character(small, text):
    ids = small.encode("x" + text, add_bos=False)
    stream, shown = small.stream(), ""
    for token_id in ids:
        shown += stream.push(token_id)
        assert ("x" + text).startswith(shown)
    assert shown + stream.finish() == "x" + text


@settings(max_examples=60)
@given(text=st.text(max_size=40))
def test_streams_of_real_tokenizers(real, text):
    ours, theirs = real
    ids = ours.encode(text, add_bos=False)
    stream, shown = ours.stream(), ""
    expected = theirs.decode(ids, skip_special_tokens=True)
    # SmolLM2 has no tokens for some bytes, and then the ids are no text.
    assume("\ufffd" not in expected or "\ufffd" in text)
    for token_id in ids:
        shown += stream.push(token_id)
        assert expected.startswith(shown)
    assert shown + stream.finish() == ours.decode(ids) == expected


@settings(max_examples=60)
@given(data=st.data())
def test_decoding_any_valid_tokens_is_that_of_transformers(real, data):
    ours, theirs = real
    ids = data.draw(st.lists(st.integers(0, ours.num_ids - 1), max_size=30))
    expected = theirs.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    # Bytes that are no text: theirs replaces whole runs of them, ours the bad ones.
    if "\ufffd" not in expected:
        assert ours.decode(ids, skip_special=False) == expected


def test_incomplete_and_wrong_bytes(llama):
    def byte(value):
        return 3 + value

    stream = llama.stream()
    assert [stream.push(byte(b)) for b in "é".encode()] == ["", "é"]
    assert stream.push(byte(0xF0)) == ""
    assert stream.push(id_of(llama, "hi")) == "\ufffdhi"
    assert stream.push(byte(0xE2)) == stream.push(byte(0x82)) == ""
    assert stream.finish() == "\ufffd"
    # A later byte never changes what has been shown.
    assert llama.decode([*map(byte, "é".encode()), byte(0xFF)]) == "é\ufffd"


def test_unknown_ids_are_nothing(chatml):
    assert chatml.decode([-1, 10**9, chatml.num_ids, chatml.num_ids + 1]) == ""
    # The ids behind the vocabulary stand for control tokens while encoding, and are not for show.
    assert chatml.decode(range(chatml.num_ids, chatml.num_ids + 50), skip_special=False) == ""


def test_special_tokens_are_shown_when_asked_for(chatml):
    ids = chatml.chat_ids([USER])
    assert chatml.decode(ids, skip_special=False) == chatml.chat_text([USER])
    assert chatml.decode(ids) == "user\nhi\nassistant\n"


@pytest.mark.parametrize(
    ("decoder", "tokens", "text"),
    [
        (None, ["a", "b"], "a b"),
        (decoders.Metaspace(), ["▁a", "b", "▁c"], "ab c"),
        (decoders.Metaspace(prepend_scheme="never"), ["▁a", "b"], " ab"),
        (decoders.Fuse(), ["a", "b"], "ab"),
        (decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]), ["Ġa", "b"], " ab"),
        (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 0)]), [" ", "  a"], " a"),
    ],
)
def test_other_decoders(tmp_path, decoder, tokens, text):
    backend = Backend(models.WordLevel({t: i for i, t in enumerate([*tokens, "?"])}, "?"))
    if decoder is not None:
        backend.decoder = decoder
    ids = list(range(len(tokens)))
    assert backend.decode(ids) == text
    assert Tokenizer.load(write(tmp_path, backend)).decode(ids) == text


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), decoders.BPEDecoder(), decoders.CTC()])
def test_decoders_that_have_no_bytes_are_named(tmp_path, decoder):
    backend = Backend(models.WordLevel({"a": 0}, "a"))
    backend.decoder = decoder
    with pytest.raises(UnsupportedModel, match=type(decoder).__name__):
        Tokenizer.load(write(tmp_path, backend))


# Stop strings


def run_stops(stops, pieces):
    stream = StopStrings(stops)
    shown = [stream.push(piece) for piece in pieces]
    return stream, shown, "".join(shown) + stream.finish()


@pytest.mark.parametrize(
    ("stops", "text", "shown", "matched"),
    [
        ([], "abc", "abc", None),
        (["X"], "abc", "abc", None),
        (["b"], "abc", "a", "b"),
        (["\nUser:"], "hi\nUser: x", "hi", "\nUser:"),
        (["\nUser:"], "hi\nUse", "hi\nUse", None),
        (["aab"], "aaab", "a", "aab"),
        (["abab"], "abaabab", "aba", "abab"),
        (["abc", "bc"], "xabc", "x", "abc"),
        (["abcd", "b"], "abcd", "a", "b"),
        (["ab", "abc"], "abc", "", "ab"),
        (["😀b"], "a😀bc", "a", "😀b"),
    ],
)
def test_stop_strings(stops, text, shown, matched):
    for size in (1, 2, 3, 100):
        stream, _, result = run_stops(
            stops, [text[i : i + size] for i in range(0, len(text), size)]
        )
        assert (result, stream.matched) == (shown, matched)


AB = st.text("ab", min_size=1, max_size=5)


@settings(max_examples=300)
@given(st.lists(AB, max_size=3), st.lists(st.text("abc", max_size=4), max_size=12))
def test_stop_strings_do_not_depend_on_the_pieces(stops, pieces):
    stream, shown, result = run_stops(stops, pieces)
    text = "".join(pieces)
    whole, _, expected = run_stops(stops, list(text))
    assert (result, stream.matched) == (expected, whole.matched)
    if stream.matched is None:
        assert result == text and not any(stop in text for stop in stops)
    else:
        assert text.startswith(result + stream.matched)
        assert not any(stop in result for stop in stops)
    # What is shown early is never part of a stop string, and nothing else is held back.
    so_far = ""
    for _, part in zip(pieces, shown, strict=True):
        so_far += part
        assert result.startswith(so_far)


def test_only_what_may_become_a_stop_string_is_held_back():
    stream = StopStrings(["<end>"])
    assert stream.push("hello <e") == "hello "
    assert stream.push("gg") == "<egg"
    assert stream.push("<") == ""
    assert stream.push("end>more") == ""
    assert stream.matched == "<end>"
    assert stream.push("x") == stream.finish() == ""

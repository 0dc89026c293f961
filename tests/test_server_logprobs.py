"""Which tokens an answer's text is made of, and how the server tells their log-probabilities."""

from __future__ import annotations

import codecs
import json
import tracemalloc
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted_harmony import FINAL, THINKS, ids_of

from ebbtide import Piece, TokenLogprob, ToolCall
from ebbtide.cli.server.logprobs import AnswerLogprobs, TextTokens
from ebbtide.cli.server.request import chat_request, completion_request
from ebbtide.cli.server.response import CompletionAnswer
from ebbtide.offload.answer_reader import MarkedReader
from ebbtide.offload.logprobs import Logprobs
from ebbtide.offload.stop_strings import StopStrings
from ebbtide.offload.thinking import Thoughts

MARKS = ("<think>", "</think>")


class Decoded:
    """A TextStream for tokens that are bytes."""

    def __init__(self):
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: bytes) -> str:
        return self._utf8.decode(token)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


def token_of(index: int, spelled: bytes) -> TokenLogprob:
    top = (TokenLogprob(7, b"best", -0.25), TokenLogprob(8, "é".encode()[:1], -float("inf")))
    return TokenLogprob(index, spelled, -1.5 - index, top)


def pieces_of(tokens: list[bytes], stops=(), marks=None) -> list[Piece]:
    """As a Stream makes them."""
    reader = MarkedReader(Decoded(), Thoughts(marks), StopStrings(stops))
    pieces = []
    for index, token in enumerate(tokens):
        thought, text = reader.push(token)
        is_last = reader.is_over or index == len(tokens) - 1
        if is_last:
            last_thought, last = reader.finish()
            thought, text = thought + last_thought, text + last
        reason = "stop" if is_last else None
        pieces.append(Piece(text, [index], reason, thought, (), [token_of(index, token)]))
        if is_last:
            break
    return pieces


def told(pieces: list[Piece]) -> list[int]:
    found, places = TextTokens(), []
    for piece in pieces:
        tokens = found.add(piece)
        assert [t.place for t in tokens] == [t.told[0].token_id for t in tokens]
        places += [token.place for token in tokens]
    return places


@given(
    st.lists(st.text("abé☕", max_size=4).map(str.encode), max_size=9),
    st.lists(st.text("abé", min_size=1, max_size=3), max_size=3),
    st.booleans(),
)
def test_they_are_those_that_overlap_the_text(tokens, stops, splits):
    if splits:  # in the middle of characters, too
        tokens = [part for t in tokens for part in (t[:1], t[1:])]
    pieces = pieces_of(tokens, stops)
    num_bytes, at, expected = len("".join(p.text for p in pieces).encode()), 0, []
    for index, token in enumerate(tokens):
        if token and at < num_bytes:
            expected.append(index)
        at += len(token)
    assert told(pieces) == expected


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["<think>", "hm", "</think>", "\n\n", "Yes", "."], [4, 5]),
        (["<think>", "\n\n", "</think>", "\n\n", "<b>", "x"], [4, 5]),
        (["<thi", "nk>", "h", "m</thin", "k>Y", "es"], [4, 5]),
        (["<think>", "x", "</think>", "<", "b>"], [3, 4]),
        (["<think>", "never", " ends"], []),
        (["no", " thought"], [0, 1]),
        (["<thi", "s>"], [0, 1]),  # what looked like a mark
    ],
)
def test_thoughts_and_their_marks_are_left_out(tokens, expected):
    assert told(pieces_of([t.encode() for t in tokens], marks=MARKS)) == expected


def piece(index: int, spelled: bytes, text: str = "", *, calls=()) -> Piece:
    return Piece(text, [index], None, "", calls, [token_of(index, spelled)])


def test_calls_are_left_out_and_what_only_looked_like_one_is_not():
    call = (ToolCall("c", "f", "{}"),)
    said = [piece(0, b"Well", "Well"), piece(1, b"<call>"), piece(2, b"{}")]
    called = [*said, piece(3, b"</call>", calls=call), piece(4, b" on", "on")]
    assert told(called) == [0, 4]
    assert told([*said, piece(3, b"!", "<call>{}!")]) == [0, 1, 2, 3]


def test_what_answers_in_channels_do_not_say_is_left_out():
    """Control tokens of messages, their headers, and the empty line between two of them."""
    said = [piece(0, b"<|channel|>"), piece(1, b"final"), piece(2, b"<|message|>")]
    said += [piece(3, b"One", "One"), piece(4, b"<|end|>"), piece(5, b"final")]
    said += [piece(6, b"<|message|>"), piece(7, b"Two", "\n\nTwo"), piece(8, b"<|return|>")]
    assert told(said) == [3, 7]


@pytest.mark.parametrize("stop", [(), ("Two.",)])
def test_a_real_answer_in_channels(scripted_llm, scripted_tokenizer, script, stop):
    """What control tokens, a header and a thought hold is left out, whatever pieces are made of."""
    said = ids_of(scripted_tokenizer, f"{THINKS}{FINAL}One. Two. Three.<|return|>")
    script[:] = said
    messages = [{"role": "user", "content": "Hello"}]
    pieces = [*scripted_llm.stream(messages, logprobs=1, stop_strings=stop)]
    assert [t.token_id for piece in pieces for t in piece.logprobs] == said[: len(pieces)]
    found = TextTokens()
    text = b"".join(token.told[0].bytes for p in pieces for token in found.add(p)).decode()
    whole = "One. " if stop else "One. Two. Three."
    assert "".join(piece.text for piece in pieces) == whole
    assert text.startswith(whole) and len(text) < len(whole) + 8  # a token is told whole


def answered(request, tokens: list[bytes], **options) -> tuple[dict, list[dict]]:
    """The object of a whole answer, and the log-probabilities in the events of a stream."""
    pieces = pieces_of(tokens, **options)
    whole, stream = CompletionAnswer(request, "m"), CompletionAnswer(request, "m")
    events = b"".join(map(stream.piece, pieces)).split(b"\n\n")
    choices = [json.loads(e.removeprefix(b"data: "))["choices"][0] for e in events if e]
    for one in pieces:
        whole.note(one)
    output = SimpleNamespace(
        text="".join(p.text for p in pieces),
        thought="",
        tool_calls=[],
        finish_reason="stop",
        usage={"total_tokens": 1},
        logprobs=[p.logprobs[0] for p in pieces],
    )
    body = json.loads(b"".join(whole.parts(output)))
    assert body["usage"] == output.usage and body["choices"][0]["finish_reason"] == "stop"
    return body["choices"][0]["logprobs"], [c["logprobs"] for c in choices if c["logprobs"]]


def test_chats_have_their_shape():
    request = chat_request({"messages": [{"role": "user", "content": "x"}], "logprobs": True})
    tokens = [b"<think>", b"h", b"</think>", b"\xc3", b"\xa9 ", b"b"]
    whole, chunks = answered(request, tokens, marks=MARKS)
    assert whole["refusal"] is None and len(whole["content"]) == 3
    first = whole["content"][0]
    assert (first["token"], first["bytes"], first["logprob"]) == ("\ufffd", [0xC3], -4.5)
    assert first["top_logprobs"] == [
        {"token": "best", "logprob": -0.25, "bytes": [*b"best"]},
        {"token": "\ufffd", "logprob": -9999.0, "bytes": [0xC3]},
    ]
    assert [len(chunk["content"]) for chunk in chunks] == [2, 1]
    assert [token for chunk in chunks for token in chunk["content"]] == whole["content"]


def test_plain_texts_have_theirs():
    request = completion_request({"prompt": "x", "logprobs": 2})
    tokens = [b"caf", b"\xc3", b"\xa9", b" a", b"b", b"c"]
    whole, chunks = answered(request, tokens, stops=["bc"])
    assert whole["tokens"] == ["caf", "\ufffd", "\ufffd", " a"]
    assert whole["token_logprobs"] == [-1.5, -2.5, -3.5, -4.5]
    assert whole["text_offset"] == [0, 3, 4, 4]
    assert whole["top_logprobs"][0] == {"best": -0.25, "\ufffd": -9999.0, "caf": -1.5}
    joined = {name: [item for chunk in chunks for item in chunk[name]] for name in whole}
    assert joined == whole and len(chunks) > 1


def test_an_answer_that_says_nothing_has_none():
    request = completion_request({"prompt": "x", "logprobs": 0})
    whole, chunks = answered(request, [b"stop"], stops=["stop"])
    assert whole == {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    assert chunks == []


def test_a_long_answer_takes_no_memory_for_its_json():
    kept = Logprobs(20, lambda token: b" word%d" % token)
    for index in range(1000):
        kept.add(torch.arange(40.0), index % 40)
    told = AnswerLogprobs(is_chat=True)
    for index in range(1000):
        token = kept[index : index + 1]
        told.note(Piece(token[0].token, [0], logprobs=token))
    tracemalloc.start()
    try:
        num_bytes = sum(map(len, told.whole(kept)))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_bytes > 2_000_000 > 5 * peak_bytes  # the encoder leaves cycles to collect


def test_a_first_blank_that_is_dropped_is_no_part_of_the_text():
    """As tokenizers of SentencePiece drop it: offsets count what is shown."""
    found = TextTokens()
    said = [piece(0, b" One", "One"), piece(1, b" two", " two"), piece(2, b".", ".")]
    assert [token.offset for one in said for token in found.add(one)] == [0, 3, 7]


def test_offsets_count_lines_between_messages():
    found = TextTokens()
    said = [piece(0, b"One", "One"), piece(1, b"Two", "\n\nTwo"), piece(2, b".", ".")]
    assert [token.offset for one in said for token in found.add(one)] == [0, 5, 8]


@given(
    st.lists(st.text("abé☕", min_size=1, max_size=4).map(str.encode), max_size=9),
    st.lists(st.text("abé", min_size=1, max_size=3), max_size=3),
)
def test_offsets_are_where_tokens_begin_in_the_text(tokens, stops):
    pieces, found, at = pieces_of(tokens, stops), TextTokens(), 0
    offsets = {token.place: token.offset for one in pieces for token in found.add(one)}
    for place, token in enumerate(tokens):
        if place in offsets:
            assert offsets[place] == at
        at += len(token.decode())

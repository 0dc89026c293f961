"""Which tokens an answer's text is made of, and how the server tells their log-probabilities."""

from __future__ import annotations

import codecs
import json
import tracemalloc
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scripted_harmony import FINAL, THINKS, ids_of

from ebbtide import Piece, TextToken, TokenLogprob
from ebbtide.cli.server.logprobs import AnswerLogprobs
from ebbtide.cli.server.request import chat_request, completion_request
from ebbtide.cli.server.response import CompletionAnswer
from ebbtide.offload.answers.call_reader import CallReader
from ebbtide.offload.answers.reader import MarkedReader
from ebbtide.offload.answers.stop_strings import StopStrings
from ebbtide.offload.answers.text_trace import TextTrace
from ebbtide.offload.answers.thinking import Thoughts
from ebbtide.offload.answers.tool_formats import _HERMES as HERMES
from ebbtide.offload.answers.tools import Calls
from ebbtide.offload.running.logprobs import Logprobs
from ebbtide.offload.text.detokenizer import TextStream

MARKS = ("<think>", "</think>")
HELLO = {"role": "user", "content": "Hello"}


class Bytes:
    """A Detokenizer for tokens that are bytes."""

    separator, num_stripped, first_without_spaces = b"", 0, False

    def piece(self, token: bytes) -> bytes:
        return token


def token_of(index: int, spelled: bytes) -> TokenLogprob:
    top = (TokenLogprob(7, b"best", -0.25), TokenLogprob(8, "é".encode()[:1], -float("inf")))
    return TokenLogprob(index, spelled, -1.5 - index, top)


def pieces_of(tokens: list[bytes], stops=(), marks=None, calls=None) -> list[Piece]:
    """As a Stream makes them."""
    reader = MarkedReader(TextStream(Bytes()), Thoughts(marks), StopStrings(stops), calls)
    pieces, trace = [], TextTrace()
    reader.trace(trace)
    for index, token in enumerate(tokens):
        trace.place = index
        thought, text = reader.push(token)
        is_last = reader.is_over or index == len(tokens) - 1
        if is_last:
            last_thought, last = reader.finish()
            thought, text = thought + last_thought, text + last
        reason = "stop" if is_last else None
        spelled = [TextToken(at, offset, [token_of(at, tokens[at])]) for at, offset in trace.take()]
        told = [token_of(index, token)]
        pieces.append(Piece(text, [index], reason, thought, (), told, tuple(spelled)))
        if is_last:
            break
    return pieces


def told(pieces: list[Piece]) -> list[int]:
    return [token.place for piece in pieces for token in piece.text_tokens]


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


@given(st.data())
def test_they_are_those_of_which_text_is_told_whatever_repeats_it(data):
    """Thoughts, calls and stop strings, all of few letters, cut into tokens at random."""
    letters = st.text("ab<é", min_size=1, max_size=4)
    parts = (
        [("<think>" + data.draw(letters) + "</think>", False)] if data.draw(st.booleans()) else []
    )
    for is_call in data.draw(st.lists(st.booleans(), max_size=4)):
        call = '<tool_call>{"name": "clock", "arguments": {"a": "ab"}}</tool_call>'
        parts.append((call, False) if is_call else (data.draw(letters), True))
    whole = "".join(text for text, _ in parts)
    assume("<think>" not in "".join(text for text, is_said in parts if is_said))
    said = [is_said for text, is_said in parts for _ in text]
    shown = "".join(char for char, is_said in zip(whole, said, strict=True) if is_said)
    stops = data.draw(st.lists(st.text("ab<é", min_size=1, max_size=3), max_size=2))
    ends = [(shown.find(stop) + len(stop), shown.find(stop)) for stop in stops if stop in shown]
    shown = shown[: min(ends)[1]] if ends else shown
    cuts = data.draw(st.lists(st.integers(0, len(whole.encode())), max_size=30).map(sorted))
    bounds = [*pairwise([0, *cuts, len(whole.encode())])]
    of_byte = [at for at, char in enumerate(whole) for _ in char.encode()]
    told_chars = [at for at, is_said in enumerate(said) if is_said][: len(shown)]
    expected = [
        index for index, (a, b) in enumerate(bounds) if not {*of_byte[a:b]}.isdisjoint(told_chars)
    ]
    calls = CallReader(HERMES, Calls({"clock": {"type": "object", "properties": {}}}))
    pieces = pieces_of([whole.encode()[a:b] for a, b in bounds], stops, MARKS, calls)
    assert "".join(piece.text for piece in pieces) == shown
    assert told(pieces) == expected


@given(st.lists(st.binary(max_size=3), max_size=6))
def test_bytes_that_are_no_characters_are_told_as_what_they_became(tokens):
    """Offsets say where, so that each U+FFFD is of the tokens whose bytes it stands for."""
    whole, places = b"".join(tokens), [at for at, token in enumerate(tokens) for _ in token]
    found = {at: offset for p in pieces_of(tokens) for at, offset, _ in p.text_tokens}
    assert sorted(found) == sorted({*places})
    for at, offset in found.items():  # as many characters as begin before the token
        before = whole[: places.index(at)]
        begun = codecs.getincrementaldecoder("utf-8")("replace")
        assert offset == len(begun.decode(before)) + bool(begun.getstate()[0])


@pytest.mark.parametrize(
    ("messages", "stops"),
    [
        (["final"], ()),
        (["f", "fi", "nal"], ()),
        (["final", "analysis", "xfinal"], ("xf",)),
        (["One", "Two"], ("neT",)),
    ],
)
def test_a_header_that_reads_like_the_text_is_none_of_it(
    scripted_llm, scripted_tokenizer, script, messages, stops
):
    said, text_at = [], []
    for index, message in enumerate(messages):
        start = "<|start|>assistant" if index else ""
        said += ids_of(scripted_tokenizer, f"{start}<|channel|>analysis<|message|>{message}<|end|>")
        said += ids_of(scripted_tokenizer, "<|start|>assistant<|channel|>final<|message|>")
        content = ids_of(scripted_tokenizer, message)
        text_at += range(len(said), len(said) + len(content))
        said += [*content, *ids_of(scripted_tokenizer, "<|end|>")]
    script[:] = [*said[:-1], *ids_of(scripted_tokenizer, "<|return|>")]
    pieces = [*scripted_llm.stream([HELLO], logprobs=0, stop_strings=stops)]
    text = "".join(piece.text for piece in pieces)
    found = told(pieces)
    if not stops or stops[0] not in "".join(messages[-1:]):
        assert text == "\n\n".join(messages) and found == text_at
        assert [t.logprobs[0].token_id for p in pieces for t in p.text_tokens] == [
            said[at] for at in text_at
        ]
    else:
        assert text == "final\n\nanalysis\n\n" and found == text_at[: len(found)]
        spelled = scripted_tokenizer.decode([said[at] for at in found])
        assert spelled == "finalanalysis"


@pytest.mark.parametrize("stop", [(), ("Two.",)])
def test_a_real_answer_in_channels(scripted_llm, scripted_tokenizer, script, stop):
    """What control tokens, a header and a thought hold is left out, whatever pieces are made of."""
    said = ids_of(scripted_tokenizer, f"{THINKS}{FINAL}One. Two. Three.<|return|>")
    script[:] = said
    pieces = [*scripted_llm.stream([HELLO], logprobs=1, stop_strings=stop)]
    assert [t.token_id for piece in pieces for t in piece.logprobs] == said[: len(pieces)]
    text = b"".join(t.logprobs[0].bytes for p in pieces for t in p.text_tokens).decode()
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
        spelled = (TextToken(index, index, token),)
        told.note(Piece(token[0].token, [0], logprobs=token, text_tokens=spelled))
    tracemalloc.start()
    try:
        num_bytes = sum(map(len, told.whole(kept)))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_bytes > 2_000_000 > 5 * peak_bytes  # the encoder leaves cycles to collect


def test_a_first_blank_that_is_dropped_is_no_part_of_the_text(monkeypatch):
    """As tokenizers of SentencePiece drop it: offsets count what is shown."""
    monkeypatch.setattr(Bytes, "num_stripped", 1)
    pieces = pieces_of([b" ", b" One", b" two", b"."])
    assert "".join(piece.text for piece in pieces) == " One two."
    found = [(token.place, token.offset) for one in pieces for token in one.text_tokens]
    assert found == [(1, 0), (2, 4), (3, 8)]


def test_offsets_count_lines_between_messages(scripted_llm, scripted_tokenizer, script):
    said = f"{FINAL}One<|end|><|start|>assistant{FINAL}Two<|return|>"
    script[:] = ids_of(scripted_tokenizer, said)
    pieces = [*scripted_llm.stream([HELLO], logprobs=0)]
    text = "".join(piece.text for piece in pieces)
    assert text == "One\n\nTwo"
    spelled = [(t.offset, t.logprobs[0].token) for p in pieces for t in p.text_tokens]
    assert spelled and all(text.startswith(token, offset) for offset, token in spelled)
    assert any(offset == 5 for offset, _ in spelled)


@given(
    st.lists(st.text("abé☕", min_size=1, max_size=4).map(str.encode), max_size=9),
    st.lists(st.text("abé", min_size=1, max_size=3), max_size=3),
)
def test_offsets_are_where_tokens_begin_in_the_text(tokens, stops):
    pieces, at = pieces_of(tokens, stops), 0
    offsets = {token.place: token.offset for one in pieces for token in one.text_tokens}
    for place, token in enumerate(tokens):
        if place in offsets:
            assert offsets[place] == at
        at += len(token.decode())

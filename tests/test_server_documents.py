"""Documents and files within messages: text under its title, and all else refused with a reason."""

from __future__ import annotations

import base64
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.cli.server import bodies
from ebbtide.cli.server.anthropic_request import anthropic_request
from ebbtide.cli.server.bad_request import BadRequest
from ebbtide.cli.server.documents import file_text
from ebbtide.cli.server.request import chat_request
from ebbtide.cli.server.responses_request import responses_request

ASK = {"type": "text", "text": "Who signed it?"}
PLAIN = {"type": "text", "media_type": "text/plain", "data": "Ann signed."}
IMAGE = {"type": "image", "source": {"type": "url", "url": "x"}}


def in_base64(data: bytes | str) -> str:
    return base64.b64encode(data.encode() if isinstance(data, str) else data).decode()


def anthropic(*blocks) -> str:
    (message,) = anthropic_request({"messages": [{"role": "user", "content": [*blocks]}]}).prompt
    return message["content"]


def document(source, **more):
    return {"type": "document", "source": source, **more}


@pytest.mark.parametrize(
    ("block", "told"),
    [
        (document(PLAIN), "Ann signed."),
        (document({"type": "text", "data": "Ann signed."}, title=None), "Ann signed."),
        (document(PLAIN, title=" A\ncontract "), "# A contract\n\nAnn signed."),
        (
            document(PLAIN, title="Contract", context="Of 1901.", citations={"enabled": False}),
            "# Contract\n\nOf 1901.\n\nAnn signed.",
        ),
        (document({"type": "content", "content": "Ann signed."}), "Ann signed."),
        (
            document({"type": "content", "content": [ASK, {"type": "text", "text": "Ann."}]}),
            "Who signed it?\nAnn.",
        ),
    ],
)
def test_documents_are_texts_under_their_titles(block, told):
    cached = {"cache_control": {"type": "ephemeral"}}
    assert anthropic({**block, **cached}, ASK) == f"{told}\n\nWho signed it?"


def test_a_result_may_hold_documents():
    call = {"type": "tool_use", "id": "c1", "name": "read", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "c1"}
    result["content"] = [{"type": "text", "text": "Read."}, document(PLAIN, title="Contract")]
    asked = [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    found = anthropic_request({"messages": asked}).prompt[-1]
    assert found["content"] == "Read.\n# Contract\n\nAnn signed."


WHERE = "messages[0].content[0]"


@pytest.mark.parametrize(
    ("block", "param", "says"),
    [
        (document({"type": "base64", "media_type": "application/pdf", "data": ""}), "", "'ebbtide"),
        (document({"type": "url", "url": "http://x"}), "", "not fetched and not kept"),
        (document({"type": "file", "file_id": "f"}), "", "not fetched and not kept"),
        (document({"type": "content", "content": [IMAGE]}), ".content", "of type 'image' cannot"),
        (document({"type": "content"}), ".content", "must be a text or a list of parts, not null"),
        (document({**PLAIN, "media_type": "text/html"}), "", "of the media type text/plain"),
        (document({**PLAIN, "data": [ASK]}), "", "'data' must be a text"),
        (document({"type": ["text"]}), "", 'Allowed are {"type": "text", "media_type": "text/pla'),
        (document({}), "", "of the type None cannot be read"),
    ],
)
def test_other_sources_are_refused(block, param, says):
    with pytest.raises(BadRequest) as refused:
        anthropic(block)
    assert refused.value.param == f"{WHERE}.source{param}" and says in str(refused.value)


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"type": "document"}, "'source' of a document must be an object, not null"),
        (document("x"), "'source' of a document must be an object, not a text"),
        (document(PLAIN, title=3), "'title' must be a text, not a number"),
        (document(PLAIN, context=[]), "'context' must be a text, not a list"),
        (document(PLAIN, citations={"enabled": True}), "citations.enabled' may only be false"),
    ],
)
def test_what_is_no_document_is_refused(block, says):
    with pytest.raises(BadRequest) as refused:
        anthropic(block)
    assert says in str(refused.value)


@pytest.mark.parametrize("role", ["assistant", "system"])
def test_documents_are_the_users(role):
    with pytest.raises(BadRequest, match="a block of the type 'document' cannot be read here"):
        anthropic_request({"messages": [{"role": role, "content": [document(PLAIN)]}]})


# --- OpenAI's files


def chat_file(file):
    content = [{"type": "file", "file": file}, ASK]
    (message,) = chat_request({"messages": [{"role": "user", "content": content}]}).prompt
    return message["content"]


def input_file(file):
    content = [{"type": "input_file", **file}, {"type": "input_text", "text": "Who signed it?"}]
    (message,) = responses_request({"input": [{"role": "user", "content": content}]}).prompt
    return message["content"]


BOTH = pytest.mark.parametrize("read", [chat_file, input_file])


@BOTH
@pytest.mark.parametrize(
    ("file", "told"),
    [
        ({"file_data": in_base64("Ann signed.")}, "Ann signed."),
        ({"file_data": in_base64(b"\xef\xbb\xbfAnn.")}, "Ann."),
        ({"file_data": ""}, ""),
        (
            {
                "file_data": f"data:text/plain;base64,{in_base64('Änn signed.')}",
                "filename": "deed.txt",
            },
            "# deed.txt\n\nÄnn signed.",
        ),
    ],
)
def test_files_of_text_are_read(read, file, told):
    assert read(file) == f"{told}\nWho signed it?"


@BOTH
@pytest.mark.parametrize(
    ("file", "says"),
    [
        ({"file_id": "file-1"}, "'file_data', a text in base64, not null: files are not fetched"),
        ({"file_url": "http://x"}, "files are not fetched and not kept here; send the text itself"),
        ({"file_data": in_base64("%PDF-1.7 x")}, "the file is a PDF. PDFs are not read here"),
        ({"file_data": in_base64(b"PK\x03\x04\xff")}, "the file is not text in UTF-8"),
        ({"file_data": in_base64("a\0b")}, "the file is not text in UTF-8"),
        ({"file_data": "Ann signed."}, "'file_data' is not base64"),
        ({"file_data": "é"}, "'file_data' is not base64"),
        ({"file_data": in_base64("Ann."), "filename": 3}, "'filename' must be a text, not a numb"),
    ],
)
def test_other_files_are_refused(read, file, says):
    with pytest.raises(BadRequest) as refused:
        read(file)
    assert says in str(refused.value) and refused.value.status == 400


def test_a_file_must_be_an_object():
    with pytest.raises(BadRequest, match="a file must be an object, not null"):
        chat_file(None)


@given(st.text(), st.text())
def test_whatever_a_file_says_is_what_is_read(text, title):
    asked = {"file_data": in_base64(text.encode("utf-8", "surrogatepass")), "filename": title}
    try:
        found = file_text(asked, "file")
    except BadRequest:
        assert "\0" in text or text.startswith("%PDF")
    else:
        assert found.endswith(text.removeprefix("\ufeff"))


def test_reading_a_file_takes_no_more_than_reading_its_body():
    """Of which 13 bytes are set aside for each of its own; the file is most of one here. One letter
    that takes four bytes makes all of them do so."""
    most_bytes = 1 << 20
    data = in_base64("x" * (most_bytes * 3 // 4 - 9) + "😀")
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    assert len(file_text({"file_data": data}, "file")) > most_bytes * 3 // 4 - 9
    taken = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    of_reading = bodies.reserved_bytes(most_bytes, 0) - bodies.reserved_bytes(0, 0)
    assert len(data) + taken < (of_reading - 4 * most_bytes) * 0.9  # another body is held

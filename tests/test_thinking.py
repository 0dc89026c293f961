"""Thoughts and answers are told apart whatever the pieces, and no text is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_checkpoints import make
from tokenizers_under_test import byte_level_backend, write

from ebbtide import LLM
from ebbtide.offload.answers.thinking import MARKS, Thoughts, is_open
from ebbtide.offload.text.text import Tokenizer

TEMPLATES = Path(__file__).resolve().parents[2] / "shared" / "data" / "templates"
THINK = MARKS[0]


def split(pieces, marks=THINK, inside=False) -> tuple[str, str]:
    thoughts, thought, answer = Thoughts(marks, inside), "", ""
    for part in (*map(thoughts.push, pieces), thoughts.finish()):
        thought, answer = thought + part[0], answer + part[1]
    return thought, answer


@pytest.mark.parametrize(
    ("text", "inside", "thought", "answer"),
    [
        ("<think>\nhm\n</think>\n\nYes.", False, "hm\n", "Yes."),
        ("\n<think>hm</think>Yes.\n", False, "hm", "Yes.\n"),
        ("hm\n</think>\n\nYes.", True, "hm\n", "Yes."),
        ("\n\n</think>\n\nYes.", True, "", "Yes."),
        ("Yes.", False, "", "Yes."),
        ("<thin air>", False, "", "<thin air>"),
        ("<thi", False, "", "<thi"),
        ("Yes, <think>no</think>.", False, "", "Yes, <think>no</think>."),
        ("<think>a</think>b</think>c", False, "a", "b</think>c"),
        ("<think>never ends </thi", False, "never ends </thi", ""),
        ("", True, "", ""),
        (" \n", False, "", " \n"),
    ],
)
def test_a_thought_stands_at_the_beginning(text, inside, thought, answer):
    assert split([text], inside=inside) == (thought, answer)
    assert split(list(text), inside=inside) == (thought, answer)
    assert split([text], marks=None) == ("", text)


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "think", ">", "/", "\n", " ", "a", "é"])),
    st.booleans(),
    st.data(),
)
def test_the_pieces_do_not_matter_and_nothing_else_is_lost(parts, inside, data):
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    thought, answer = split(pieces, inside=inside)
    assert (thought, answer) == split([text], inside=inside)
    for sign in "aé/":
        marks_hold = sum(mark.count(sign) for mark in THINK) if sign == "/" else 0
        kept = (thought + answer).count(sign)
        assert text.count(sign) - marks_hold <= kept <= text.count(sign)


@pytest.mark.parametrize(
    ("name", "marks", "opens"),
    [
        ("Qwen-Qwen3-0.6B", THINK, False),
        ("Qwen-QwQ-32B", THINK, False),
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", THINK, True),
        ("mistralai-Ministral-3-14B-Reasoning-2512", MARKS[1], False),
        ("ByteDance-Seed-OSS", MARKS[2], False),
        ("google-gemma-4-31B-it", ("<|channel>thought", "<channel|>"), False),
        ("Cohere2MoE", ("<|START_THINKING|>", "<|END_THINKING|>"), True),
        ("Qwen-Qwen2.5-7B-Instruct", None, False),
        ("meta-llama-Llama-3.1-8B-Instruct", None, False),
    ],
)
def test_marks_of_real_templates(tmp_path, name, marks, opens):
    path = TEMPLATES / f"{name}.jinja"
    if not path.is_file():
        pytest.skip("../shared/data/templates is not here")
    folder = make("llama2", tmp_path / "model")
    (folder / "chat_template.jinja").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.thought_marks == marks
    text = tokenizer.chat_text([{"role": "user", "content": "hi"}])
    assert (marks is not None and is_open(text, marks)) == opens


def test_marks_that_are_control_tokens_or_begin_with_one(tmp_path):
    """As Gemma 4 has them: a token, and a word that says what its channel is for."""
    backend = byte_level_backend()
    backend.add_special_tokens(["<|bos|>", "<|channel>", "<channel|>", "<turn|>"])
    template = "{% for m in messages %}{{ m.content.split('<channel|>')[-1] }}{% endfor %}"
    folder = write(tmp_path, backend, template=template, eos_token="<turn|>")
    tokenizer = Tokenizer.load(folder)
    opening, closing, end = (
        backend.token_to_id(t) for t in ("<|channel>", "<channel|>", "<turn|>")
    )
    thought = [opening, *tokenizer.encode("thought\nhm\n", False), closing]
    for ids, expected in (
        ([*thought, *tokenizer.encode("Yes.", False), end], ("hm\n", "Yes.")),
        ([*tokenizer.encode("Yes.", False), end], ("", "Yes.")),
        ([opening, *tokenizer.encode("other", False)], ("", "<|channel>other")),
    ):
        reader = tokenizer.answer_reader(tokenizer.encode("hi", False))
        pieces = [*map(reader.push, ids), reader.finish()]
        assert tuple("".join(part) for part in zip(*pieces, strict=True)) == expected


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if enable_thinking %}<think>\n"
    "{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    folder = make("llama2", tmp_path_factory.mktemp("thinker"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with LLM.open(folder) as llm:
        yield llm


def test_answers_to_messages_are_split_and_raw_text_is_not(thinker, monkeypatch):
    """A random model never closes a mark by itself: what it samples is scripted."""
    script = thinker.encode("hm ü</think>\n\nYes.")
    tokens = iter(())

    class Scripted:
        def __init__(self, config, constraint=None, *_):
            self.constraint = constraint

        def choose(self, logits, seen):
            return next(tokens)

    monkeypatch.setattr("ebbtide.offload.sessions.stream.Sampler", Scripted)
    question, length = [{"role": "user", "content": "hi"}], len(script)
    results = []
    for prompt, think in ((question, True), (question, False), ("raw", None)):
        tokens = iter(script)
        stream = thinker.stream(prompt, max_new_tokens=length, think=think)
        pieces = list(stream)
        assert "".join(p.text for p in pieces) == stream.output.text
        assert "".join(p.thought for p in pieces) == stream.output.thought
        details = stream.output.usage["completion_tokens_details"]
        results.append((stream.output.thought, stream.output.text, details["reasoning_tokens"]))
    whole, thought_tokens = "hm ü</think>\n\nYes.", len(thinker.encode("hm ü"))
    assert results == [("hm ü", "Yes.", thought_tokens), ("", whole, 0), ("", whole, 0)]

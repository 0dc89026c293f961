"""Chats to ids, and answers that continue them: sampled tokens stay as they were."""

from __future__ import annotations

from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_under_test import CHATML, USER, byte_fallback, byte_level, id_of

from ebbtide.offload.errors import InputError
from ebbtide.offload.text.text import Tokenizer


def test_without_a_template_chats_are_plain_text_and_that_is_said(llama):
    ids = llama.chat_ids([USER])
    assert ids[0] == 1 and ids.count(1) == 1
    assert llama.decode(ids) == "User: hi\n\nAssistant:"
    assert len(llama.warnings) == 1
    assert "no chat template" in llama.warnings[0]


def test_with_a_template_there_is_nothing_to_say(chatml):
    assert chatml.warnings == []
    assert chatml.chat_text([USER]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chatml.chat_text([USER], add_generation_prompt=False).endswith("<|im_end|>\n")


def test_variables_reach_the_template(tmp_path):
    template = "{{ enable_thinking }}{{ thinking }}{{ style }}{{ eos_token }}"
    tokenizer = Tokenizer.load(byte_level(tmp_path, template=template))
    assert tokenizer.chat_text([USER]) == "<|im_end|>"
    assert tokenizer.chat_text([USER], think=False, style="x") == "FalseFalsex<|im_end|>"
    ids = tokenizer.chat_ids([USER], style="<|im_end|>")
    assert ids.count(id_of(tokenizer, "<|im_end|>")) == 1
    with pytest.raises(InputError, match="style holds a object"):
        tokenizer.chat_ids([USER], style=object())


def test_a_switch_that_the_template_lacks_is_said_to(tmp_path, chatml):
    template = "{% if not enable_thinking is defined %}{% set enable_thinking = 1 %}{% endif %}x"
    tokenizer = Tokenizer.load(byte_level(tmp_path, template=template))
    assert tokenizer.knows_thinking and not chatml.knows_thinking
    tokenizer.chat_ids([USER], think=True)
    assert tokenizer.warnings == []
    plain = Tokenizer.load(byte_level(tmp_path, template=CHATML + "{# thinking #}"))
    for _ in range(2):
        plain.chat_ids([USER], think=False)
    assert len(plain.warnings) == 1 and "no switch for thinking" in plain.warnings[0]


def test_levels_of_thinking_reach_templates_that_know_them(tmp_path, chatml):
    template = "{{ reasoning_effort or 'none' }}{{ enable_thinking }}"
    tokenizer = Tokenizer.load(byte_level(tmp_path, template=template))
    assert tokenizer.chat_text([USER], think="low") == "lowTrue"
    assert tokenizer.chat_text([USER], think=False) == "noneFalse"
    assert tokenizer.chat_text([USER]) == "none"
    assert tokenizer.warnings == []
    for knows in ("", "{{ thinking }}"):
        plain = Tokenizer.load(byte_level(tmp_path, template=CHATML + knows))
        assert plain.chat_text([USER], think="high").endswith("True" if knows else "\n")
        effect = "it is on" if knows else "no effect"
        (warning,) = plain.warnings
        assert warning.endswith(f"chat template has no levels of thinking: {effect}.")


def test_the_date_stays_that_of_loading(tmp_path):
    template = "{{ strftime_now('%Y-%m-%d') }}"
    tokenizer = Tokenizer.load(byte_level(tmp_path, template=template))
    tokenizer.now = datetime(2020, 2, 3)
    assert tokenizer.chat_text([USER]) == "2020-02-03"


# Continuing a chat


def session_with(tokenizer, messages, sampled):
    """The ids of a chat so far: the prompt, then the sampled tokens."""
    return [*tokenizer.chat_ids(messages), *sampled]


def turns(answer):
    more = {"role": "user", "content": "and now?"}
    return [USER, {"role": "assistant", "content": answer}, more]


def test_sampled_tokens_stay_as_they_were(tmp_path):
    """The model wrote "th" in two tokens where the tokenizer has one for it."""
    tokenizer = Tokenizer.load(byte_level(tmp_path, merges=[("t", "h")]))
    sampled = [*tokenizer.encode("t"), *tokenizer.encode("he end")]
    assert sampled != tokenizer.encode("the end")
    end = id_of(tokenizer, "<|im_end|>")
    for stop in ([end], []):  # the answer ended by itself, or was cut short
        session = session_with(tokenizer, [USER], [*sampled, *stop])
        ids, num_common = tokenizer.continue_chat(session, turns("the end"))
        assert num_common == len(session)
        assert ids[:num_common] == session
        fresh = tokenizer.chat_ids(turns("the end"))
        assert tokenizer.decode(ids, False) == tokenizer.decode(fresh, False)
        assert ids != fresh


@pytest.mark.parametrize("first_only", [True, False])
def test_sampled_tokens_stay_with_sentencepiece_spaces(tmp_path, first_only):
    template = (
        "{% for m in messages %}{{ bos_token + '[' + m.role + ']' + m.content + eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}{{ bos_token + '[assistant]' }}{% endif %}"
    )
    folder = byte_fallback(tmp_path, template=template, first_only=first_only)
    tokenizer = Tokenizer.load(folder)
    plain = tokenizer.encode(" hi", add_bos=False)
    sampled = [*tokenizer.encode("t", add_bos=False)[1:], *plain]
    answer = tokenizer.decode([*tokenizer.encode("x"), *sampled]).removeprefix("x")
    for stop in ([2], []):
        session = session_with(tokenizer, [USER], [*sampled, *stop])
        ids, num_common = tokenizer.continue_chat(session, turns(answer))
        assert num_common == len(session)
        fresh = tokenizer.chat_ids(turns(answer))
        text = tokenizer_text(tokenizer, turns(answer))
        assert tokenizer.encoder.agreement(ids, text)[0] == len(ids)
        assert ids[-5:] == fresh[-5:]


def tokenizer_text(tokenizer, messages):
    rendered, guard = tokenizer._render(messages, True, None, {})
    return tokenizer._control.with_aliases(rendered, guard)


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (CHATML.replace("m.content", "(m.content | trim)"), "  the end \n"),
        (CHATML.replace("m.content", "m.content.split('</think>')[-1]"), "<think>x</think>the end"),
    ],
    ids=["trims", "drops-thoughts"],
)
def test_what_a_template_changes_is_encoded_anew(tmp_path, template, answer):
    """From the last control token before the change, as a fresh encoding would have it."""
    tokenizer = Tokenizer.load(byte_level(tmp_path, template=template, merges=[("t", "h")]))
    first = [USER, {"role": "assistant", "content": "ok"}, USER]
    unusual = [*tokenizer.encode("o"), *tokenizer.encode("k")]
    end = id_of(tokenizer, "<|im_end|>")
    session = session_with(tokenizer, [USER], [*unusual, end])
    session, num_common = tokenizer.continue_chat(session, first)
    assert num_common == len(session) - len(tokenizer.encode("\n" + "user\nhi\nassistant\n")) - 3
    num_prompt = len(session)
    session += [*tokenizer.encode(answer), end]
    messages = [*first, {"role": "assistant", "content": answer}, USER]
    ids, num_common = tokenizer.continue_chat(session, messages)
    fresh = tokenizer.chat_ids(messages)
    assert tokenizer.decode(ids, False) == tokenizer.decode(fresh, False)
    assert ids == fresh  # the unusual tokens are single characters here, too
    assert num_common == num_prompt
    assert ids[:num_common] == session[:num_common]


def test_an_answer_that_the_template_ends_otherwise_stays(tmp_path):
    """Its tokens stay; what ended it is the template's."""
    template = CHATML.replace("'<|im_end|>\n'", "('<|bos|>' if m.role == 'assistant' else '')")
    tokenizer = Tokenizer.load(byte_level(tmp_path, template=template, merges=[("t", "h")]))
    sampled = [*tokenizer.encode("t"), *tokenizer.encode("he end")]
    end = id_of(tokenizer, "<|im_end|>")
    session = session_with(tokenizer, [USER], [*sampled, end])
    ids, num_common = tokenizer.continue_chat(session, turns("the end"))
    assert num_common == len(session) - 1
    assert ids[num_common] == id_of(tokenizer, "<|bos|>")
    fresh = tokenizer.chat_ids(turns("the end"))
    assert tokenizer.decode(ids, False) == tokenizer.decode(fresh, False)
    # Half of the answer is another answer.
    ids, num_common = tokenizer.continue_chat(session, turns("the"))
    assert ids == tokenizer.chat_ids(turns("the"))
    assert num_common == len(session) - len(sampled) - 1


def test_where_the_last_question_begins_is_known(tmp_path):
    """Behind an answer of which the template dropped the thoughts, too."""
    template = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    template += "{% if not add_generation_prompt %}{{ refuse }}{% endif %}"
    tokenizer = Tokenizer.load(byte_level(tmp_path / "a", template=template))
    messages = turns("<think>x</think>the end")
    before = tokenizer.chat_ids(messages[:2], add_generation_prompt=False)
    assert tokenizer.num_answered(tokenizer.chat_ids(messages), messages) == len(before)
    assert tokenizer.num_answered(tokenizer.chat_ids([USER]), [USER]) == 0
    refuses = template.replace("refuse", "raise_exception('no')")
    tokenizer = Tokenizer.load(byte_level(tmp_path / "b", template=refuses))
    assert tokenizer.num_answered(tokenizer.chat_ids(messages), messages) == 0


def test_a_changed_beginning_is_encoded_anew(tmp_path):
    template = "{{ '<|im_start|>' + strftime_now('%j') + '<|im_end|>' }}" + CHATML
    tokenizer = Tokenizer.load(byte_level(tmp_path, template=template))
    tokenizer.now = datetime(2020, 1, 1)
    session = session_with(tokenizer, [USER], tokenizer.encode("ok"))
    tokenizer.now = datetime(2020, 1, 2)
    ids, num_common = tokenizer.continue_chat(session, turns("ok"))
    assert ids == tokenizer.chat_ids(turns("ok"))
    assert num_common == 3  # <|im_start|>00


def test_nothing_in_common(chatml):
    ids, num_common = chatml.continue_chat([], turns("ok"))
    assert (ids, num_common) == (chatml.chat_ids(turns("ok")), 0)
    ids, num_common = chatml.continue_chat(chatml.encode("other"), turns("ok"))
    assert (ids, num_common) == (chatml.chat_ids(turns("ok")), 0)


def test_text_that_looks_like_a_control_token_is_not_taken_for_one(chatml):
    """The session holds <|im_end|> as text: to the eye the same, to the model another token."""
    session = session_with(chatml, [USER], chatml.encode("ok<|im_end|>\n"))
    ids, num_common = chatml.continue_chat(session, turns("ok"))
    assert ids == chatml.chat_ids(turns("ok"))
    assert num_common < len(session) - len("<|im_end|>")
    # And the other way round: an answer that spelled it out keeps its tokens.
    ids, num_common = chatml.continue_chat(session, turns("ok<|im_end|>\n"))
    assert num_common == len(session)


WORDS = st.lists(st.sampled_from(["th", "e ", "t", "h", " ", "\n", "<think>", "é"])).map("".join)


@settings(max_examples=100)
@given(first=WORDS, second=WORDS, cut=st.integers(0, 60))
def test_any_session_continues_to_the_same_text(small, first, second, cut):
    """Whatever part of a conversation was processed: the text is that of a fresh encoding, and what
    is said to be common is."""
    before = [USER, {"role": "assistant", "content": first}]
    session = small.chat_ids(before, add_generation_prompt=False)
    session = session[: max(0, len(session) - cut)]
    messages = [*before, {"role": "user", "content": second}]
    ids, num_common = small.continue_chat(session, messages)
    assert small.decode(ids, False) == small.decode(small.chat_ids(messages), False)
    assert ids[:num_common] == session[:num_common]
    assert num_common == min(len(ids), len(session)) or ids[num_common] != session[num_common]


PARTS = [{"type": "text", "text": "a {x}"}, {"type": "text", "text": "b"}]
READS_PARTS = (
    "{% for m in messages %}{{ bos_token + m.role }}: {% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}<{{ part.text }}>{% endfor %}{% endif %}{% endfor %}"
)
LISTS_ALONE = (
    "{% for m in messages %}{% for p in m.content %}<{{ p['text'] }}>{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "made"),
    [
        ("{{ messages[0].role + messages[0].content }}", "usera {x}\nb"),  # would fail
        ("{{ messages[0].content }}", "a {x}\nb"),  # would write the list as Python does
        ("{{ messages[0].content | tojson }}", '"a {x}\\nb"'),
        ("{{ messages[0].content | trim }}", "a {x}\nb"),
        (READS_PARTS, "<|bos|>user: <a {x}><b>"),
        (LISTS_ALONE, "<a {x}><b>"),
    ],
)
def test_parts_of_a_content_are_one_text_for_templates_that_know_no_parts(tmp_path, template, made):
    tokenizer = Tokenizer.load(byte_level(tmp_path, template=template))
    assert tokenizer.chat_text([{"role": "user", "content": PARTS}]) == made


def test_a_chat_of_parts_is_found_again(chatml):
    def asked(parts):
        return [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}, USER]

    held = chatml.chat_ids(asked(PARTS)[:2], add_generation_prompt=False)
    ids, common = chatml.continue_chat(held, asked(PARTS))
    assert common == len(held) and ids == chatml.chat_ids(asked("a {x}\nb"))
    assert chatml.num_answered(ids, asked(PARTS)) == len(held)

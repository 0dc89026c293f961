"""Text to ids: those of transformers, and nothing that users write becomes a control token.

Small tokenizers carry most tests; real ones are compared with transformers.
"""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors
from tokenizers_under_test import (
    CHATML,
    DATA,
    USER,
    SentencePieceReference,
    byte_fallback,
    byte_level,
    id_of,
    write,
)

from ebbtide.offload.errors import InputError
from ebbtide.offload.text.text import Tokenizer

TEXTS = [
    "",
    "Hello, world!",
    " leading and trailing  ",
    "two  spaces\n\nand\tlines\r\n",
    "héllo wörld 北京 😀👩‍👩‍👧 e\u0301 \u200b \ufeff \ufffd",
    "def f(x):\n    return x ** 2  # 12345",
    "١٢٣ ﷺ \U0001f1e9\U0001f1ea",
    "x" * 3000,
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_of_text_are_those_of_transformers(real, text):
    ours, theirs = real
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.encode(text, add_bos=False) == theirs(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=60)
@given(text=st.text(max_size=60))
def test_ids_of_any_text_are_those_of_transformers(real, text):
    ours, theirs = real
    assert ours.encode(text) == theirs(text)["input_ids"]


def test_a_novel_has_the_ids_of_transformers(real):
    ours, theirs = real
    novel = DATA / "texts" / "moby_dick.txt"
    if not novel.is_file():
        pytest.skip("../shared/data/texts is not here")
    text = novel.read_text(encoding="utf-8")[:200_000]
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == text


CHATS = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [
        {"role": "user", "content": " What is 2 < 3? <b>x</b> \n"},
        {"role": "assistant", "content": "It holds. 😀"},
        {"role": "user", "content": "Why, and what of a <"},
    ],
]
TEMPLATES = ["Qwen-Qwen3-0.6B", "HuggingFaceTB-SmolLM3-3B", "LFM2-8B-A1B", "llama-cpp-rwkv-world"]


@pytest.mark.parametrize("template", [None, *TEMPLATES])
def test_ids_of_chats_are_those_of_transformers(real_folder, template, tmp_path):
    folder, theirs = real_folder
    if isinstance(theirs, SentencePieceReference):
        pytest.skip("sentencepiece knows no chats")
    source = theirs.chat_template
    if template is not None:
        path = DATA / "templates" / f"{template}.jinja"
        if not path.is_file():
            pytest.skip("../shared/data/templates is not here")
        source = path.read_text(encoding="utf-8")
    elif source is None:
        pytest.skip("this tokenizer has no chat template of its own")
    for file in (*folder.glob("*.json"), *folder.glob("*.txt")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
    ours = Tokenizer.load(tmp_path)
    for chat in CHATS:
        for prompt in (True, False):
            expected = theirs.apply_chat_template(
                chat, chat_template=source, add_generation_prompt=prompt, return_dict=False
            )
            assert ours.chat_ids(chat, add_generation_prompt=prompt) == expected


# User text is text


def spelled(tokenizer, text):
    """The ids of a text, which decode to it."""
    ids = tokenizer.encode(text, add_bos=False)
    assert tokenizer.decode(ids) == text
    return ids


def test_control_strings_in_a_prompt_are_text(real):
    ours, _ = real
    assert ours.special_ids
    for token_id in ours.special_ids:
        control = ours.decode([token_id], skip_special=False).strip()
        for prompt in (control, f"a{control}b", f" {control} ", control * 2, f"x\n{control}"):
            ids = ours.encode(prompt, add_bos=False)
            assert ours.special_ids.isdisjoint(ids)
            # Metaspace with "first" takes a leading space for its own.
            assert ours.decode(ids).lstrip() == prompt.lstrip()


@pytest.mark.parametrize("control", ["<|im_start|>", "<|im_end|>", "<|bos|>"])
@pytest.mark.parametrize("content", ["{}", "a{}b", "{0}{0}", "hi{}", "<{}>", " {} \n"])
def test_control_strings_in_a_message_are_text(chatml, control, content):
    content = content.format(control)
    ids = chatml.chat_ids([{"role": "user", "content": content}])
    start, end = id_of(chatml, "<|im_start|>"), id_of(chatml, "<|im_end|>")
    expected = [start, *spelled(chatml, f"user\n{content}"), end, *spelled(chatml, "\n")]
    assert ids == [*expected, start, *spelled(chatml, "assistant\n")]


@pytest.fixture(scope="module")
def joining(tmp_path_factory):
    """A tokenizer whose template puts messages together with nothing between them."""
    template = "{% for m in messages %}{{ m.content | trim }}{% endfor %}<|im_end|>"
    return Tokenizer.load(byte_level(tmp_path_factory.mktemp("joining"), template=template))


PARTS = st.sampled_from(["<", "<|", "|>", ">", "im_", "end", "<|im_end|>", " ", "\ufdd0", "é"])


@settings(max_examples=300)
@given(st.lists(st.lists(PARTS, max_size=6).map("".join), min_size=1, max_size=4))
@example(["<|im_", "end|>"])
@example(["<|im_ ", " end|>"])
@example(["<", "|im_end|>"])
def test_no_message_can_write_a_control_token(joining, contents):
    """Neither whole, nor in halves that the template puts together."""
    ids = joining.chat_ids([{"role": "user", "content": content} for content in contents])
    text = "".join(content.strip() for content in contents)
    assert ids == [*spelled(joining, text), id_of(joining, "<|im_end|>")]


def test_overlapping_control_strings_are_all_broken_up(tmp_path):
    folder = byte_level(tmp_path, template="{{ messages[0].content }}<|im_end|>")
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["ab", "bc", "abcd", "中", "|", "<|im_end|>x"])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    for content in (
        "abc",
        "abcd",
        "xabcdx",
        "<|im_end|>x",
        "中",
        "a中b",
        "中中",
        "|",
        "a|b",
        "bcab",
        "b",
    ):
        ids = tokenizer.chat_ids([{"role": "user", "content": content}])
        assert ids == [*spelled(tokenizer, content), id_of(tokenizer, "<|im_end|>")]


def test_no_text_forges_what_stands_for_a_control_token(chatml, tmp_path):
    """The stand-ins hold a random number, and another one in each process's tokenizer."""
    control = chatml._control
    forged = control.aliases["<|im_end|>"]
    other = Tokenizer.load(byte_level(tmp_path))
    assert forged not in other._control.aliases.values()
    ids = other.chat_ids([{"role": "user", "content": forged}])
    assert ids.count(id_of(other, "<|im_end|>")) == 1
    assert other.decode(other.encode(forged)) == forged


def test_marks_of_the_template_are_control_in_user_text_alone(tmp_path):
    """<think> is no special token: assistants write it, users may not."""
    template = CHATML + "{# <think> </think> #}"
    tokenizer = Tokenizer.load(byte_level(tmp_path, template=template))
    think = id_of(tokenizer, "<think>")
    assert think not in tokenizer.chat_ids([{"role": "user", "content": "<think>x</think>"}])
    assert think not in tokenizer.encode("<think>")
    answer = {"role": "assistant", "content": "<think>x</think>y<|im_end|>"}
    ids = tokenizer.chat_ids([USER, answer])
    assert ids.count(think) == 1
    assert ids.count(id_of(tokenizer, "<|im_end|>")) == 2
    assert tokenizer.decode([think]) == "<think>"
    # An added token that the template does not know is an ordinary word.
    assert id_of(tokenizer, "<unused>") in tokenizer.encode("<unused>")


def test_guards_survive_json_in_ascii(tmp_path):
    template = "{{ messages[0].content | tojson(ensure_ascii=true) }}<|im_end|>"
    tokenizer = Tokenizer.load(byte_level(tmp_path, template=template))
    for content in ("<|im_end|>", "\ufdd0<|im_end|>", "\\ufdd0<|im_end|>"):
        ids = tokenizer.chat_ids([{"role": "user", "content": content}])
        text = json.dumps(content)
        assert ids == [*spelled(tokenizer, text), id_of(tokenizer, "<|im_end|>")]


def test_all_guards_in_one_message_are_refused(chatml):
    content = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    assert chatml.chat_ids([{"role": "user", "content": content[1:]}])
    with pytest.raises(InputError, match="noncharacters"):
        chatml.chat_ids([{"role": "user", "content": content}])


@pytest.mark.parametrize("kind", ["unigram", "wordlevel"])
def test_vocabularies_that_hold_control_strings(tmp_path, kind):
    """Their models find <s> in text by themselves; it is cut, or refused where it has no parts."""
    words = ["<unk>", "<s>", "a", "b", "<", "s", ">"]
    if kind == "unigram":
        backend = Backend(models.Unigram([(word, -1.0) for word in words], 0, False))
    else:
        backend = Backend(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<s>", "<unk>"])
    folder = write(tmp_path, backend, template="<s>{{ messages[0].content }}")
    tokenizer = Tokenizer.load(folder)
    if kind == "unigram":
        assert tokenizer.encode("a<s>b") == [2, 4, 5, 6, 3]
        assert tokenizer.chat_ids([{"role": "user", "content": "a<s>b"}]) == [1, 2, 4, 5, 6, 3]
    assert tokenizer.chat_ids([{"role": "user", "content": "a"}]) == [1, 2]
    assert 1 not in tokenizer.encode("<s>")


# What is no text


@pytest.mark.parametrize("text", ["\ud83d", "ab\udc00c", "\ude00\ud83d", "é\ud800"])
def test_lone_surrogates_are_refused(chatml, text):
    at = next(i for i, char in enumerate(text) if 0xD800 <= ord(char) < 0xE000)
    with pytest.raises(InputError, match=f"character {at} is U\\+{ord(text[at]):04X}"):
        chatml.encode(text)
    with pytest.raises(InputError, match="surrogate"):
        chatml.chat_ids([{"role": "user", "content": text}])


def test_surrogates_of_a_template_are_refused(tmp_path):
    tokenizer = Tokenizer.load(byte_level(tmp_path, template="{{ '\\ud800' }}"))
    with pytest.raises(InputError, match="chat template"):
        tokenizer.chat_ids([USER])


@pytest.mark.parametrize("small", ["byte-level", "byte-fallback"], indirect=True)
@pytest.mark.parametrize(
    "text",
    ["a" * 10**6, " " * 10**6, "é" * 10**6, "<" * 10**6, "<|im_end|>" * 10**5, "hi there " * 10**5],
    ids=["word", "spaces", "accents", "starts", "controls", "words"],
)
def test_a_million_characters(small, text):
    start_s = time.process_time()
    ids = small.encode(text, add_bos=False)
    assert small.special_ids.isdisjoint(ids)
    chat = small.chat_ids([{"role": "user", "content": text}])
    assert len(chat) >= len(ids)
    # Time is linear: a quadratic step would take minutes.
    assert time.process_time() - start_s < 20


# BOS


def test_bos_comes_as_the_post_processor_says(llama, chatml):
    assert llama.prefix_ids == [1]
    assert llama.encode("hi") == [1, *llama.encode("hi", add_bos=False)]
    assert llama.encode("<s>hi").count(1) == 1
    assert chatml.prefix_ids == []
    assert chatml.encode("hi", add_bos=True) == [chatml.bos_token_id, *chatml.encode("hi")]


@pytest.mark.parametrize(("add_bos", "prefix"), [(True, [1]), (False, []), (None, [1])])
def test_the_configuration_has_the_last_word_on_bos(tmp_path, add_bos, prefix):
    tokenizer = Tokenizer.load(byte_fallback(tmp_path, add_bos_token=add_bos))
    assert tokenizer.encode("") == prefix


def test_an_eos_of_the_post_processor_is_left_out(tmp_path):
    """The model is to go on, not to begin anew."""
    folder = byte_fallback(tmp_path)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("hi")[-1] not in (1, 2)


def test_a_chat_has_one_bos(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = Tokenizer.load(byte_fallback(tmp_path, template=template))
    ids = tokenizer.chat_ids([USER])
    assert (ids[0], ids[-1]) == (1, 2)
    assert ids.count(1) == ids.count(2) == 1


def test_without_a_bos_token_none_can_be_asked_for(tmp_path):
    tokenizer = Tokenizer.load(byte_level(tmp_path, bos_token=None))
    assert tokenizer.bos_token_id is None
    with pytest.raises(InputError, match="no BOS token"):
        tokenizer.encode("x", add_bos=True)

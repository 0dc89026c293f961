"""Text to ids and back: transformers' ids, nothing that users write as a control token, and streams
that show whole characters.

Small tokenizers made here carry most tests; real ones are compared with transformers.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from ebbtide.offload.errors import BadCheckpoint, InputError, UnsupportedModel
from ebbtide.offload.text import StopStrings, Tokenizer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER = {"role": "user", "content": "hi"}


# Small tokenizers


def byte_level(folder, *, added=(), template=CHATML, merges=(), **config):
    """A byte-level BPE like Qwen's: 256 bytes, a few merges, control tokens behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: at for at, char in enumerate(alphabet)}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = Backend(models.BPE(vocab, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|bos|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens(["<think>", "</think>", "<unused>", *added])
    config = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", **config}
    return write(folder, backend, template=template, **config)


def byte_fallback(folder, *, template=None, first_only=False, **config):
    """A SentencePiece-like BPE as Llama 2's: ▁ for spaces, bytes for what the vocabulary lacks."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for text in ["▁", *"abcdehilost.:", "▁h", "hi", "▁hi", "▁t", "th"]:
        vocab[text] = len(vocab)
    merges = [("▁", "h"), ("h", "i"), ("▁h", "i"), ("▁", "t"), ("t", "h")]
    backend = Backend(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if first_only:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, **config}
    return write(folder, backend, template=template, **config)


def write(folder, backend, *, template=None, **config):
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return Tokenizer.load(byte_level(tmp_path_factory.mktemp("chatml")))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Tokenizer.load(byte_fallback(tmp_path_factory.mktemp("llama")))


SMALL = {
    "byte-level": byte_level,
    "byte-fallback": byte_fallback,
    "byte-fallback-first": lambda folder: byte_fallback(folder, first_only=True),
}


@pytest.fixture(scope="module", params=SMALL)
def small(request, tmp_path_factory):
    return Tokenizer.load(SMALL[request.param](tmp_path_factory.mktemp(request.param)))


# Real tokenizers, beside transformers

REAL = {
    "llama2": "tokenizers/llama2",
    "smollm2": "tokenizers/smollm2",
    "qwen2.5": "tokenizers/qwen2.5",  # vocab.json and merges.txt
    "mistral": "tokenizers/mistral",  # tokenizer.model
    "ebb-nano": "models/ebb-nano-0",
    "stories": "models/stories260K",
}
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


class SentencePieceReference:
    """What the sentencepiece library makes of a tokenizer.model, called as transformers' are."""

    def __init__(self, path):
        sentencepiece = pytest.importorskip("sentencepiece")
        self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.chat_template = None

    def __call__(self, text, add_special_tokens=True):
        bos = [self._processor.bos_id()] * add_special_tokens
        return {"input_ids": bos + self._processor.encode(text)}

    def decode(self, ids, skip_special_tokens=True, **_):
        if not skip_special_tokens:
            # It has words of its own for these.
            assume(not any(map(self._processor.is_control, ids)))
            assume(self._processor.unk_id() not in ids)
        ids = [i for i in ids if not self._processor.is_control(i)]
        # The library shows bytes that are no text one by one as U+FFFD, as we do.
        return self._processor.decode(ids)


@pytest.fixture(scope="module", params=REAL)
def real_folder(request, tmp_path_factory):
    """(folder, its reference) of one real model: transformers' tokenizer, or sentencepiece."""
    transformers = pytest.importorskip("transformers")
    folder = DATA / REAL[request.param]
    if not folder.is_dir():
        pytest.skip("../shared/data is not here")
    if request.param == "smollm2":  # its folder has tokenizer.json alone
        file = str(folder / "tokenizer.json")
        return folder, transformers.PreTrainedTokenizerFast(tokenizer_file=file)
    if request.param == "mistral":
        return folder, SentencePieceReference(folder / "tokenizer.model")
    return folder, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def real(real_folder):
    """(ours, what the reference makes of the same files).

    transformers' LlamaTokenizer puts a normaliser of its own in place of the file's, and so drops a
    leading space that Llama 2 was trained with; the plain class keeps to the file.
    """
    transformers = pytest.importorskip("transformers")
    folder, theirs = real_folder
    if (folder / "tokenizer.json").is_file():
        file = str(folder / "tokenizer.json")
        names = {n: getattr(theirs, n) for n in ("bos_token", "eos_token", "unk_token")}
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=file, **names)
    return Tokenizer.load(folder), theirs


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


def id_of(tokenizer, text):
    token_id = tokenizer._backend.token_to_id(text)
    assert token_id is not None
    return token_id


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


# Chats


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
        assert tokenizer._agreement(ids, tokenizer_text(tokenizer, turns(answer)))[0] == len(ids)
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


# Decoding


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


# Loading


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path):
    (tmp_path / "vocab.json").write_bytes(b"{}")
    with pytest.raises(BadCheckpoint) as caught:
        Tokenizer.load(tmp_path)
    message = str(caught.value)
    assert "no tokenizer that Ebbtide reads: tokenizer.json" in message
    assert "It has vocab.json." in message and "save_pretrained" in message
    with pytest.raises(BadCheckpoint, match="is not a folder"):
        Tokenizer.load(tmp_path / "nowhere")


def older_files(folder, **config):
    """vocab.json and merges.txt of a byte-level tokenizer that joins " t" and "he"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate([*alphabet, "\u0120t", "he", "\u0120the"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = "#version: 0.2\n\u0120 t\nh e\n\u0120t he\n"
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2TokenizerFast"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=30) | st.text(st.sampled_from("the 12\n'sé\u0301\t"), max_size=30))
def test_older_files_cut_text_as_their_class_does(tmp_path, kind, text):
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.load(older_files(tmp_path, tokenizer_class=kind))
    theirs = getattr(transformers, kind.removesuffix("Fast"))
    theirs = theirs(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


def test_the_class_of_older_files_may_follow_from_the_model(tmp_path):
    older_files(tmp_path)
    with pytest.raises(UnsupportedModel, match="not given; known are GPT2Tokenizer, Qwen2"):
        Tokenizer.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    one = Tokenizer.load(tmp_path)
    assert one.decode(one.encode("in the e\u0301")) == "in the \u00e9"  # Qwen composes
    older_files(tmp_path, tokenizer_class="BartTokenizer")
    with pytest.raises(UnsupportedModel, match="BartTokenizer; known are"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("vocabulary", "merges"),
    [("{", "a b"), ("[]", ""), ('{"a": -1}', ""), ('{"a": 0}', "a b"), ('{"a": 0}', "a"), ("", "")],
)
def test_damaged_older_files_are_named(tmp_path, vocabulary, merges):
    older_files(tmp_path, tokenizer_class="GPT2Tokenizer")
    (tmp_path / "vocab.json").write_text(vocabulary)
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(BadCheckpoint, match=r"vocab\.json and merges\.txt cannot be read"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"x", b"\x00" * 100, b"\x0a\xff\xff\xff\xff\x0f"])
def test_a_damaged_tokenizer_model_is_named(tmp_path, content):
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(BadCheckpoint, match=r"tokenizer\.model cannot be"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_model_without_its_libraries_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UnsupportedModel, match=r"pip install 'ebbtide\[hf\]'"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
def test_tokenizer_models_of_every_kind_agree_with_sentencepiece(tmp_path, kind, rule):
    """Small ones, trained here: with and without a normaliser of their own."""
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [f"the {a} house of {b}, and then {a}{b} ﬃ é" for a in "abcdef" for b in "ghijkl"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type=kind,
        vocab_size=310,
        byte_fallback=True,
        normalization_rule_name=rule,
        remove_extra_whitespaces=rule != "identity",
        user_defined_symbols=["<|user|>"],
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    ours = Tokenizer.load(tmp_path)
    theirs = SentencePieceReference(tmp_path / "tokenizer.model")
    for text in ("the house", "thea house  of\tg ﬃ 北京 e\u0301", "😀 then", "  x ", "kl" * 50, ""):
        assert ours.encode(text) == theirs(text)["input_ids"], text
    assert ours.eos_token_id == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}', "\x00" * 100])
def test_a_damaged_tokenizer_json_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BadCheckpoint, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_damaged_companions_are_named(tmp_path, name, content):
    byte_level(tmp_path)
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadCheckpoint, match=name):
        Tokenizer.load(tmp_path)


def test_tokens_are_named_in_either_file_and_form(tmp_path):
    folder = byte_level(tmp_path, bos_token={"content": "<|bos|>", "lstrip": False}, eos_token=None)
    names = {"eos_token": "<|im_end|>", "pad_token": None, "unk_token": "<nowhere>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.bos_token_id == id_of(tokenizer, "<|bos|>")
    assert tokenizer.eos_token_id == id_of(tokenizer, "<|im_end|>")
    assert tokenizer.named_tokens["unk_token"] == "<nowhere>"


def test_an_ordinary_token_named_for_padding_stays_ordinary(tmp_path):
    tokenizer = Tokenizer.load(byte_level(tmp_path, pad_token="!"))
    assert tokenizer.decode(tokenizer.encode("hi!")) == "hi!"
    assert tokenizer.chat_ids([{"role": "user", "content": "hi!"}])


def test_a_named_token_becomes_special(tmp_path):
    """Some files add their end-of-turn token as an ordinary one."""
    folder = byte_level(tmp_path, added=["<|eot|>"], eos_token="<|eot|>")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos_token_id in tokenizer.special_ids
    assert tokenizer.eos_token_id not in tokenizer.encode("<|eot|>")
    assert tokenizer.decode([tokenizer.eos_token_id]) == ""


def test_tokens_of_the_configuration_are_added(tmp_path):
    folder = byte_level(tmp_path)
    num_ids = Tokenizer.load(folder).num_ids
    token = {"content": "<|late|>", "special": True, "lstrip": False, "rstrip": False}
    byte_level(tmp_path, added_tokens_decoder={str(num_ids): token}, template="<|late|>")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.chat_ids([USER]) == [num_ids]
    assert num_ids not in tokenizer.encode("<|late|>")
    byte_level(tmp_path, added_tokens_decoder={str(num_ids + 7): token})
    with pytest.raises(BadCheckpoint, match="do not belong together"):
        Tokenizer.load(folder)


def test_truncation_padding_and_dropout_are_switched_off(tmp_path):
    folder = byte_level(tmp_path, merges=[("t", "h")])
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=30)
    backend.model.dropout = 0.5
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode("th" * 50)
    assert len(ids) == 50 and len(set(ids)) == 1


@pytest.mark.parametrize(
    ("config", "jinja", "processor", "expected"),
    [
        ("from config", None, None, "from config"),
        ("from config", "from jinja", "from processor", "from jinja"),
        (None, None, "from processor", "from processor"),
        ([{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}], *3 * ["d"]),
        ([{"name": "rag", "template": "r"}], None, None, "r"),
    ],
)
def test_where_templates_are_kept(tmp_path, config, jinja, processor, expected):
    folder = byte_level(tmp_path, template=config)
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    if processor is not None:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": processor}))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.chat_text([USER]) == expected
    assert tokenizer.warnings == []


def test_a_broken_template_fails_only_chats(tmp_path):
    tokenizer = Tokenizer.load(byte_level(tmp_path, template="{% for %}"))
    assert tokenizer.encode("hi")
    with pytest.raises(InputError, match=tmp_path.name):
        tokenizer.chat_ids([USER])


def test_control_tokens_eat_white_space_as_their_flags_say(tmp_path):
    """Phi-3's do, so that a line break behind them is no token of its own."""
    folder = byte_level(tmp_path, template="<|im_start|>\nuser \n <|u|>\n{{ messages[0].content }}")
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([AddedToken("<|u|>", lstrip=True, rstrip=True)])
    backend.save(str(folder / "tokenizer.json"))
    expected = backend.encode("<|im_start|>\nuser \n <|u|>\nhi").ids
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.chat_ids([USER]) == expected
    ids, num_common = tokenizer.continue_chat(expected, [USER])
    assert (ids, num_common) == (expected, len(expected))


def test_nothing_of_the_folder_is_run(tmp_path):
    """auto_map names code; it is not even looked at."""
    touched = tmp_path / "touched"
    config = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "trust_remote_code": True}
    folder = byte_level(tmp_path / "model", **config)
    (folder / "evil.py").write_text(f"open({str(touched)!r}, 'w')")
    Tokenizer.load(folder).chat_ids([USER])
    assert not touched.exists()

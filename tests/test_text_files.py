"""Tokenizers of every kind of file, damaged ones included."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers_under_test import USER, SentencePieceReference, byte_level, id_of

from ebbtide.offload.errors import BadCheckpoint, InputError, UnsupportedModel
from ebbtide.offload.text.text import Tokenizer


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


@pytest.mark.parametrize("named", [{}, {"additional_special_tokens": ["<|u|>"]}])
def test_control_tokens_eat_white_space_as_their_flags_say(tmp_path, named):
    """Phi-3's do, so that a line break behind them is no token of its own."""
    template = "<|im_start|>\nuser \n <|u|>\n{{ messages[0].content }}"
    folder = byte_level(tmp_path, template=template, **named)
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

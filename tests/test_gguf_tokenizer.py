"""A GGUF file's vocabulary gives the ids of the original tokenizer, or is refused."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from gguf_tokens import CONTROL, NORMAL, UNUSED, USER_DEFINED, tokens_of, write_keys
from hypothesis import given, settings
from hypothesis import strategies as st
from sampled_answers import PLACE, sampled, value_of
from tokenizers_under_test import DATA, byte_level

from ebbtide.offload.errors import BadCheckpoint, InputError, UnsupportedModel
from ebbtide.offload.gguf.file import GgufHeader, read_header
from ebbtide.offload.gguf.tokenizer import end_ids, read_gguf_tokenizer, tokens_digest
from ebbtide.offload.text import vocabulary
from ebbtide.offload.text.text import Tokenizer

# The folder, and what a file names its pre-tokenizer.
REAL = {
    "llama2": ("tokenizers/llama2", ""),
    "mistral": ("tokenizers/mistral", ""),
    "qwen2.5": ("tokenizers/qwen2.5", "qwen2"),
    "smollm2": ("tokenizers/smollm2", "smollm"),
    "ebb-nano": ("models/ebb-nano-0", "smollm"),
}
TEXTS = (
    "Hello, world! It's 1234.5 times  two   spaces.",
    " leading, trailing  ",
    "line\nline\r\n\n\ttab x\u00a0y\u3000z",
    "h\u00e9llo w\u00f6rld e\u0301 \u5317\u4eac \u65e5\u672c\u8a9e \U0001f600 \u0661\u0662 \ufb03",
    "\u2581 \u200b \ufeff \U0001f469\u200d\U0001f467",
    "def f(x):\n    return x ** 2  # <s> [INST] </s> <|im_start|>user <|endoftext|>",
    "DON'T we'Ve I'm 1234567890 12 345",
    "",
    "  ",
    "\n\n\n",
    "\x00\x01",
)


@pytest.fixture(scope="module", params=REAL)
def both(request, tmp_path_factory):
    """(of a GGUF file, of the original files)"""
    name, pre = REAL[request.param]
    if not (DATA / name).is_dir():
        pytest.skip("../shared/data is not here")
    path = tmp_path_factory.mktemp("tokens") / "tokens.gguf"
    header = write_keys(path, tokens_of(DATA / name, pre))
    return Tokenizer(read_gguf_tokenizer(header, "m")), Tokenizer.load(DATA / name)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_texts_are_the_originals(both, text):
    ours, original = both
    ids = original.encode(text, False)
    assert ours.encode(text, False) == ids
    assert ours.decode(ids) == original.decode(ids)


def test_ids_of_real_texts_are_the_originals(both):
    ours, original = both
    for path in sorted((DATA / "texts").iterdir()):
        text = path.read_text(encoding="utf-8", errors="replace")[:8_000]
        assert ours.encode(text, False) == original.encode(text, False), path.name


def test_answers_keep_to_schemas_as_with_the_originals(both):
    ours, original = both
    ids = sampled(ours, PLACE, seed=2)
    value_of(ours.decode(ids), PLACE)
    if ours.end_ids == original.end_ids and ours.num_ids == original.num_ids:
        assert sampled(original, PLACE, seed=2) == ids


@given(st.text(max_size=60))
@settings(deadline=None, max_examples=200)
def test_ids_of_any_text_are_the_originals(both, text):
    ours, original = both
    try:
        ids = original.encode(text, False)
    except InputError:  # control strings that a tokenizer cannot spell as text
        return
    assert ours.encode(text, False) == ids


def test_control_tokens_are_the_originals(both):
    ours, original = both
    assert ours.num_ids == original.num_ids
    assert ours.special_ids == original.special_ids


@pytest.fixture
def said(tmp_path):
    """Of a small byte-level tokenizer."""
    folder = byte_level(tmp_path / "small", merges=[("a", "b")])
    said = tokens_of(folder, "gpt-2")
    ids = {text: i for i, text in enumerate(said["tokenizer.ggml.tokens"])}
    return {
        **said,
        "tokenizer.ggml.bos_token_id": ids["<|bos|>"],
        "tokenizer.ggml.eos_token_id": ids["<|im_end|>"],
        "tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}"
        "{% endfor %}",
    }


def read(tmp_path, said) -> GgufHeader:
    return write_keys(tmp_path / "m.gguf", said)


def refusal(tmp_path, said, kind=BadCheckpoint) -> str:
    with pytest.raises(kind) as caught:
        read_gguf_tokenizer(read(tmp_path, said), "m")
    return str(caught.value)


def test_what_the_file_says_besides(tmp_path, said):
    tokenizer = Tokenizer(read_gguf_tokenizer(read(tmp_path, said), "m"))
    bos = said["tokenizer.ggml.bos_token_id"]
    assert (tokenizer.bos_token_id, tokenizer.prefix_ids) == (bos, [])
    assert tokenizer.chat_ids([{"role": "user", "content": "ab"}])[0] == bos
    told = {**said, "tokenizer.ggml.add_bos_token": True}
    assert Tokenizer(read_gguf_tokenizer(read(tmp_path, told), "m")).prefix_ids == [bos]
    plain = {k: v for k, v in said.items() if "chat_template" not in k}
    tokenizer = Tokenizer(read_gguf_tokenizer(read(tmp_path, plain), "m"))
    assert any("no chat template" in warning for warning in tokenizer.warnings)


def test_bos_where_the_file_does_not_say(tmp_path, said):
    for pre, adds in (("llama-bpe", True), ("tekken", True), ("qwen2", False)):
        header = read(tmp_path, {**said, "tokenizer.ggml.pre": pre})
        assert read_gguf_tokenizer(header, "m").add_bos is adds


def test_kimis_words_are_cut_before_capitals_and_around_chinese(tmp_path, said):
    """As the pattern of its own tokenizer says; llama.cpp's takes HelloWorld for one word."""
    backend = read_gguf_tokenizer(read(tmp_path, {**said, "tokenizer.ggml.pre": "kimi-k2"}), "m")
    text = "HelloWorld DON'T I'll 中文字abc 12345 x=y;\n\n  end"
    found = backend.backend.pre_tokenizer.pre_tokenize_str(text)
    words = ["Hello", "World", " DON'T", " I'll", " ", "中文字", "abc", " ", "123", "45"]
    assert [text[slice(*place)] for _, place in found] == [
        *words,
        *(" x", "=y", ";\n\n", " ", " end"),
    ]


def test_what_ends_an_answer(tmp_path, said):
    tokens = said["tokenizer.ggml.tokens"]
    im_end = tokens.index("<|im_end|>")
    other = {**said, "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.eot_token_id": 5}
    assert end_ids(read(tmp_path, other)) == [0, 5, im_end]
    # Of answers in channels one end is a channel's alone.
    names = ["<|end|>", "<|return|>", "<|call|>"]
    harmony = {
        **said,
        "tokenizer.ggml.tokens": [*tokens, *names],
        "tokenizer.ggml.token_type": [*said["tokenizer.ggml.token_type"], 3, 3, 3],
    }
    found = end_ids(read(tmp_path, harmony))
    assert len(tokens) not in found and len(tokens) + 1 in found
    del harmony["tokenizer.ggml.tokens"]
    assert end_ids(read(tmp_path, harmony)) == []


def test_the_same_tokens_have_the_same_digest(tmp_path, said):
    digest = tokens_digest(read(tmp_path, said))
    assert tokens_digest(read(tmp_path, {**said, "general.name": "x"})) == digest
    assert tokens_digest(read(tmp_path, {**said, "tokenizer.ggml.pre": "qwen2"})) != digest
    changed = [*said["tokenizer.ggml.tokens"][:-1], "other"]
    assert tokens_digest(read(tmp_path, {**said, "tokenizer.ggml.tokens": changed})) != digest


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"pre": "of-mars"}, UnsupportedModel, "'of-mars' cuts text"),
        ({"pre": "default"}, UnsupportedModel, "'default' cuts text"),
        ({"pre": None}, UnsupportedModel, "'default' cuts text"),
        ({"model": "bert"}, UnsupportedModel, "the kind 'bert' is not supported"),
        ({"model": "llama"}, BadCheckpoint, "no score for each token"),
        ({"eos_token_id": True}, BadCheckpoint, "has a bool as tokenizer.ggml.eos_token_id"),
        ({"model": 5}, BadCheckpoint, "has a int as tokenizer.ggml.model"),
        ({"tokens": None}, BadCheckpoint, "holds no tokenizer"),
        ({"tokens": [1, 2]}, BadCheckpoint, "has a ndarray as tokenizer.ggml.tokens"),
        ({"token_type": [1]}, BadCheckpoint, "1 types of"),
        ({"merges": ["zzz yyy"]}, BadCheckpoint, "cannot be used"),
        ({"merges": [""]}, BadCheckpoint, "cannot be used"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, said, change, kind, says):
    changed = {**said, **{f"tokenizer.ggml.{key}": value for key, value in change.items()}}
    message = refusal(tmp_path, {k: v for k, v in changed.items() if v is not None}, kind)
    assert says in message


@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED])
def test_tokens_of_one_text_are_refused(tmp_path, said, kind):
    said["tokenizer.ggml.tokens"][1] = said["tokenizer.ggml.tokens"][0]
    said["tokenizer.ggml.token_type"][1] = kind
    assert "two tokens of the same text" in refusal(tmp_path, said)


def test_tokens_that_are_never_used_may_have_one_text(tmp_path, said):
    tokens, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    more = {"": NORMAL, "dup": UNUSED, tokens[40]: UNUSED}
    added = [*more, *more, ""]
    told = {
        **said,
        "tokenizer.ggml.tokens": [*tokens, *added],
        "tokenizer.ggml.token_type": [*kinds, *[more[text] for text in added[:-1]], CONTROL],
    }
    tokenizer = Tokenizer(read_gguf_tokenizer(read(tmp_path, told), "m"))
    assert tokenizer.num_ids == len(tokens) + len(added)
    plain = Tokenizer(read_gguf_tokenizer(read(tmp_path, said), "m"))
    for text in ("abab dup", tokens[40], "  dup 5 ", " 96 "):
        assert tokenizer.encode(text) == plain.encode(text)
    assert tokenizer.special_ids == plain.special_ids


@pytest.mark.parametrize("number", [2**32 - 1, 10**6])
def test_ids_of_no_token_name_none(tmp_path, said, number):
    said["tokenizer.ggml.eos_token_id"] = number
    header = read(tmp_path, said)
    assert Tokenizer(read_gguf_tokenizer(header, "m")).eos_token_id is None
    assert number not in end_ids(header)


def test_negative_ids_name_none(tmp_path, said):
    header = read(tmp_path, said)
    header.metadata["tokenizer.ggml.eos_token_id"] = -1
    assert Tokenizer(read_gguf_tokenizer(header, "m")).eos_token_id is None
    assert -1 not in end_ids(header)


PIECES = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "a", "b"],
    "tokenizer.ggml.scores": [0.0, -1.0, -2.0],
    "tokenizer.ggml.token_type": [2, NORMAL, NORMAL],
}


def with_pieces(pieces: list[str], kind: int = NORMAL) -> dict:
    more = {"tokens": pieces, "scores": [-3.0] * len(pieces), "token_type": [kind] * len(pieces)}
    return PIECES | {
        f"tokenizer.ggml.{key}": PIECES[f"tokenizer.ggml.{key}"] + values
        for key, values in more.items()
    }


def test_pieces_that_are_too_long_are_refused(tmp_path):
    """All ways to cut one would take the square of its length."""
    header = read(tmp_path, with_pieces(["a" * 8_000]))
    tracemalloc.start()
    with pytest.raises(BadCheckpoint, match="a piece of 8000 characters"):
        read_gguf_tokenizer(header, "m")
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_long_pieces_are_cut_in_little_memory(tmp_path):
    header = read(tmp_path, with_pieces(["ab" * 250 + str(i) for i in range(50)]))
    tracemalloc.start()
    read_gguf_tokenizer(header, "m")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_ways_to_join_pieces_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "_MOST_MERGES", 1000)
    pieces = ["a" * length for length in range(2, 60)]
    assert "joined in more ways" in refusal(tmp_path, with_pieces(pieces))
    read_gguf_tokenizer(read(tmp_path, with_pieces(pieces[:30])), "m")


def test_control_tokens_of_phi_3_take_the_space_behind_them(tmp_path):
    said = with_pieces(["<s>", "</s>", "<|user|>", "<|end|>", "<|endoftext|>"], CONTROL)
    said = {
        **said,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": "{% for m in messages %}<|user|>\n{{ m.content }}"
        "<|end|>\n<|endoftext|>\n{% endfor %}",
    }
    found = {}
    for architecture in ("phi3", "llama"):
        header = write_keys(tmp_path / "m.gguf", said, architecture)
        files = read_gguf_tokenizer(header, "m")
        added = files.backend.get_added_tokens_decoder().values()
        found[architecture] = [token.content for token in added if token.rstrip]
        ids = Tokenizer(files).chat_ids([{"role": "user", "content": "a"}])
        found[architecture, "ids"] = [said["tokenizer.ggml.tokens"][i] for i in ids]
    assert found["phi3"] == ["</s>", "<|user|>", "<|end|>"] and found["llama"] == []
    space = "<unk>"
    assert found["phi3", "ids"] == ["<|user|>", "a", "<|end|>", "<|endoftext|>", space]
    assert found["llama", "ids"].count(space) == 3


def test_tokens_that_are_no_text_are_refused(tmp_path, said):
    read(tmp_path, said)
    path = tmp_path / "m.gguf"
    path.write_bytes(path.read_bytes().replace(b"<unused>", b"<unu\xffed>"))
    with pytest.raises(BadCheckpoint, match="is not text"):
        read_gguf_tokenizer(read_header(path), "m")


@pytest.mark.parametrize("prefix", [False, True])
def test_pieces_that_users_defined_are_found_as_sentencepiece_finds_them(tmp_path, prefix):
    """Gemma's runs of spaces and lines: pieces, whatever may be merged."""
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog ran to the cat\n" * 50)
    defined = ["<tag>", "\n\n", "\n", "\u2581\u2581", "\u2581\u2581\u2581"]
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=defined,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    file = str(tmp_path / "tokenizer.model")
    theirs = sentencepiece.SentencePieceProcessor(model_file=file)
    tokenizer = Tokenizer(read_gguf_tokenizer(read(tmp_path, tokens_of(tmp_path)), "m"))
    # With a prefix llama.cpp and transformers begin anew behind such pieces, with a space.
    texts = ("a  b   c    d", "the<tag>cat", "one\n\ntwo", "  two", "x  ")
    for text in ("the cat", *texts) if not prefix else ("the cat", "x  ", "x   "):
        assert tokenizer.encode(text, False) == theirs.encode(text), text
    assert theirs.piece_to_id("\u2581\u2581") in tokenizer.encode("x  y", False)


@pytest.mark.parametrize("mark", [" ", "\u2581"])
@pytest.mark.parametrize("prefix", [False, True])
def test_runs_of_spaces_that_users_defined_keep_their_ids(tmp_path, prefix, mark):
    """As converters write them, with spaces or with SentencePiece's own mark."""
    said = with_pieces([mark * 2, mark * 4, f"{mark}<tag>"], USER_DEFINED)
    said = {**said, "tokenizer.ggml.add_space_prefix": prefix}
    tokenizer = Tokenizer(read_gguf_tokenizer(read(tmp_path, said), "m"))
    assert tokenizer.num_ids == 6
    for text, wanted in (("a  ", 3), ("a    ", 4), ("a <tag>", 5)):
        ids = tokenizer.encode(text, False)
        assert ids[-1] == wanted
        assert tokenizer.decode(ids).endswith(text[1:])


@pytest.fixture(scope="module")
def of_merges(tmp_path_factory):
    """(of a GGUF file, of the original files): Llama 2's pieces, cut and joined as Gemma 4 does."""
    if not (DATA / "tokenizers/llama2").is_dir():
        pytest.skip("../shared/data is not here")
    folder = tmp_path_factory.mktemp("merges")
    said = json.loads((DATA / "tokenizers/llama2/tokenizer.json").read_text(encoding="utf-8"))
    said["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    said["decoder"]["decoders"] = said["decoder"]["decoders"][:3]  # no space is stripped
    said["post_processor"] = None
    added = [{**said["added_tokens"][0], "id": 32000, "content": "<|turn>"}]
    added.append({**added[0], "id": 32001, "content": "<turn|>"})
    said["added_tokens"] += added
    (folder / "tokenizer.json").write_text(json.dumps(said))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<turn|>"}')
    keys = tokens_of(DATA / "tokenizers/llama2")
    merges = [m if isinstance(m, str) else " ".join(m) for m in said["model"]["merges"]]
    keys |= {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": [*keys["tokenizer.ggml.tokens"], "<|turn>", "<turn|>"],
        "tokenizer.ggml.token_type": [*keys["tokenizer.ggml.token_type"], CONTROL, CONTROL],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 32001,
    }
    keys.pop("tokenizer.ggml.scores")
    header = write_keys(folder / "tokens.gguf", keys, "gemma4")
    return Tokenizer(read_gguf_tokenizer(header, "m")), Tokenizer.load(folder), header


@pytest.mark.parametrize("text", TEXTS)
def test_merges_of_pieces_give_the_ids_of_the_originals(of_merges, text):
    ours, original, _ = of_merges
    ids = original.encode(text, False)
    assert ours.encode(text, False) == ids
    assert ours.decode(ids) == original.decode(ids)


def test_control_tokens_of_gemma_4(of_merges):
    ours, original, header = of_merges
    assert end_ids(header) == [32001]
    for text in ("<|turn>user", "a <turn|> b"):  # what users write is never a control token
        assert ours.encode(text, False) == original.encode(text, False)
        assert not {32000, 32001} & set(ours.encode(text, False))

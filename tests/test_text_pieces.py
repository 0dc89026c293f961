"""Long texts are encoded piece by piece, between words, to the same ids."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from tokenizers_under_test import DATA, SMALL, byte_level, byte_level_backend, write

from ebbtide.offload import builtin
from ebbtide.offload.text import encoder
from ebbtide.offload.text.text import Tokenizer

MERGES = [("t", "h"), ("Ġ", "th"), ("th", "e"), ("Ġth", "e"), ("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ã", "Ł")]
PARTS = [
    *("the", "then", "hi", "x", "é", "e\u0301", "字", "straße", "ΟΔΟΣ", "ﷺ", "12", ".", "'s", "_"),
    *(" ", " ", " ", "  ", "\n", "\n\n", "\t", "\xa0", "<|im_end|>", "<think>", "😀"),
    *("中文", "かな", "，", "。", "、", "。\n"),
]
MADE = {**SMALL, "merges": lambda folder: byte_level(folder, merges=MERGES)}


@pytest.fixture(scope="module", params=[*MADE, "built in"])
def made(request, tmp_path_factory):
    if request.param == "built in":
        return Tokenizer.load(builtin.model_folder())
    return Tokenizer.load(MADE[request.param](tmp_path_factory.mktemp("tokenizer")))


@given(st.lists(st.sampled_from(PARTS), max_size=60).map("".join), st.integers(1, 9))
def test_pieces_have_the_ids_of_the_whole(made, text, piece_chars):
    whole = made.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "_PIECE_CHARS", piece_chars)
        assert made.encode(text) == whole


@pytest.mark.parametrize("text", ["hi the hi ", "the hi，x。hi、x字"])
def test_a_long_text_is_cut(made, text, monkeypatch):
    asked = []
    monkeypatch.setattr(encoder, "_PIECE_CHARS", 50)
    at_once = made.encoder._ids_at_once
    monkeypatch.setattr(
        made.encoder, "_ids_at_once", lambda text: asked.append(text) or at_once(text)
    )
    made.encode(text * 40)
    assert len(asked) > 8 and max(map(len, asked)) < 70


COMMA = ["ï", "¼", "Į"]  # the bytes of "，", as byte-level tokenizers write them
SPANNING = {
    "a space": ([("h", "e"), ("he", "Ġ"), ("heĠ", "h")], "the hi ", b"he h"),
    "a mark": ([*pairwise(COMMA), ("ï¼", "Į"), ("e", "ï¼Į")], "the，", "e，".encode()),
    "bytes of a mark": ([("e", "ï"), ("eï", "¼")], "the，", "e，".encode()[:3]),
}


@pytest.mark.parametrize("merges, text, spanning", SPANNING.values(), ids=SPANNING)
def test_tokens_that_span_words_are_found(tmp_path, merges, text, spanning, monkeypatch):
    """Where a vocabulary has such a token these places behind words are not safe."""
    backend = byte_level_backend(merges)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer.load(write(tmp_path, backend))
    assert text[-1] not in tokenizer.encoder._word_ends
    text *= 30
    whole = tokenizer.encode(text)
    assert spanning in map(tokenizer.encoder.detokenizer.piece, whole)
    monkeypatch.setattr(encoder, "_PIECE_CHARS", 10)
    assert tokenizer.encode(text) == whole


@pytest.mark.parametrize("name", ["llama2", "mistral", "qwen2.5", "smollm2"])
def test_real_tokenizers_and_novels(name, monkeypatch):
    folder, novel = DATA / "tokenizers" / name, DATA / "texts" / "moby_dick.txt"
    if not folder.is_dir() or not novel.is_file():
        pytest.skip(f"needs {folder} and {novel}")
    text = novel.read_text(encoding="utf-8")[:300_000]
    tokenizer = Tokenizer.load(folder)
    assert " " in tokenizer.encoder._word_ends
    whole = tokenizer.encoder._ids_at_once(text)
    for piece_chars in (777, 30_000):
        monkeypatch.setattr(encoder, "_PIECE_CHARS", piece_chars)
        assert tokenizer.encoder._ids_by_pieces(text) == whole


@pytest.mark.parametrize("name", ["llama2", "mistral", "qwen2.5", "smollm2"])
def test_real_tokenizers_and_text_without_spaces(name, monkeypatch):
    folder = DATA / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    chance = random.Random(1)
    letters = [chr(start + i) for start in (0x4E00, 0x5200, 0x3041) for i in range(80)]
    ends = ["，", "。", "、", "！", "」", "。\n", "，\n\n", " ", "12", " hello", "ﾊﾝｶｸ"]
    words = ("".join(chance.choices(letters, k=chance.randrange(1, 12))) for _ in range(4000))
    text = "".join(word + chance.choice(ends) for word in words)
    tokenizer = Tokenizer.load(folder)
    whole = tokenizer.encoder._ids_at_once(text)
    for piece_chars in (97, 5000):
        monkeypatch.setattr(encoder, "_PIECE_CHARS", piece_chars)
        assert tokenizer.encoder._ids_by_pieces(text) == whole


# 2.8 million characters: 778,000 tokens, whose ids alone take 31 MB; at once they take 330 MB.
GROWTH = """
import pathlib, re, sys
from ebbtide.offload.text.text import Tokenizer

def peak_kib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

tokenizer = Tokenizer.load(sys.argv[1])
text = pathlib.Path(sys.argv[2]).read_text(encoding="utf-8") * 60
tokenizer.encode(text[:1000])
before = peak_kib()
ids = tokenizer.encode(text)
print(len(text), len(ids), peak_kib() - before)
"""


def test_a_long_text_takes_memory_for_its_ids_and_one_piece():
    if not Path("/proc/self/status").is_file():
        pytest.skip("reads the peak from /proc")
    model, story = builtin.model_folder(), builtin.demo_material()["story"]
    command = [sys.executable, "-c", GROWTH, str(model), str(story)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    num_chars, num_ids, grown_kib = map(int, re.findall(r"\d+", run.stdout))
    assert num_chars > 2_000_000
    # An id in a list is an object of 32 bytes and a pointer; a piece's tokens take 500 bytes each.
    of_piece = encoder._PIECE_CHARS * num_ids / num_chars * 500
    assert grown_kib << 10 < 1.5 * (40 * num_ids + of_piece)

"""Answers in channels for tests: what a model samples, spelled, and models that sample a script."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest
from random_checkpoints import make
from small_llm import open_small
from tokenizers_under_test import HARMONY_TOKENS, harmony, id_of

from ebbtide.cli import main, settings_file
from ebbtide.offload.text.text import Tokenizer

MARKS = re.compile("(" + "|".join(map(re.escape, HARMONY_TOKENS)) + ")")
THINKS = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"


def ids_of(tokenizer, sampled: str) -> list[int]:
    """What a model samples: control tokens where they are spelled, and text."""
    ids = []
    for part in MARKS.split(sampled):
        ids += [id_of(tokenizer, part)] if part in HARMONY_TOKENS else tokenizer.encode(part)
    return ids


@pytest.fixture(scope="module")
def scripted_folder(tmp_path_factory):
    """A random model: what it samples is scripted."""
    folder = harmony(make("llama2", tmp_path_factory.mktemp("speaking")))
    ends = [id_of(Tokenizer.load(folder), token) for token in ("<|return|>", "<|endoftext|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


@pytest.fixture(scope="module")
def scripted_tokenizer(scripted_folder):
    """The scripted model's."""
    return Tokenizer.load(scripted_folder)


@pytest.fixture
def script(monkeypatch):
    """A list: the tokens that the next answers sample; what is raised in place of one."""
    tokens = []

    class Scripted:
        def __init__(self, config, constraint=None, *_):
            self.constraint = constraint

        def choose(self, logits, seen):
            token = tokens.pop(0)
            if isinstance(token, BaseException):
                raise token
            return token

    monkeypatch.setattr("ebbtide.offload.sessions.stream.Sampler", Scripted)
    return tokens


@pytest.fixture
def scripted_llm(scripted_folder, tmp_path):
    with open_small(scripted_folder, tmp_path, draft=False) as opened:
        opened._context = 1024
        yield opened


@pytest.fixture
def scripted(scripted_folder, tmp_path, monkeypatch):
    """`scripted(*words)`: what `ebbtide` returns for them, with the scripted model."""
    monkeypatch.setattr(main, "_install_signals", lambda process: None)
    monkeypatch.setattr(settings_file, "settings_path", lambda: tmp_path / "config.toml")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    monkeypatch.chdir(tmp_path)
    limits = ["--spill-dir", str(tmp_path), "--prefix-cache", "off", "--host-memory", "4GiB"]
    return lambda *words: main.main([*words, "-m", str(scripted_folder), "--draft", "off", *limits])

"""Tokenizers for tests: small ones that are made here, and real ones beside a reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import assume
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from ebbtide.offload.text.text import Tokenizer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As gpt-oss answers: its template, without tools.
HARMONY = (
    "{{ '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') + '<|end|>' }}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if '<|channel|>final<|message|>' in m.content %}{{ raise_exception('tags') }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
HARMONY_TOKENS = (
    *("<|return|>", "<|constrain|>", "<|channel|>", "<|start|>"),
    *("<|end|>", "<|message|>", "<|call|>", "<|endoftext|>"),
)
USER = {"role": "user", "content": "hi"}


def byte_level(folder, *, added=(), template=CHATML, merges=(), **config):
    """A byte-level BPE like Qwen's: 256 bytes, a few merges, control tokens behind them."""
    backend = byte_level_backend(merges)
    backend.add_special_tokens(["<|bos|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens(["<think>", "</think>", "<unused>", *added])
    config = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", **config}
    return write(folder, backend, template=template, **config)


def harmony(folder, *, template=HARMONY, merges=()):
    """The same with the control tokens of gpt-oss, whose answers come in channels."""
    backend = byte_level_backend(merges)
    backend.add_special_tokens(list(HARMONY_TOKENS))
    config = {"eos_token": "<|return|>", "pad_token": "<|endoftext|>"}
    return write(folder, backend, template=template, **config)


def byte_level_backend(merges=()):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: at for at, char in enumerate(alphabet)}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = Backend(models.BPE(vocab, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


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


def id_of(tokenizer, text):
    token_id = tokenizer._backend.token_to_id(text)
    assert token_id is not None
    return token_id


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


REAL = {
    "llama2": "tokenizers/llama2",
    "smollm2": "tokenizers/smollm2",
    "qwen2.5": "tokenizers/qwen2.5",  # vocab.json and merges.txt
    "mistral": "tokenizers/mistral",  # tokenizer.model
    "ebb-nano": "models/ebb-nano-0",
    "stories": "models/stories260K",
}


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
        # At the beginning it keeps a space that comes as a byte; transformers and we do not.
        assume(not ids or self._processor.id_to_piece(ids[0]) != "<0x20>")
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

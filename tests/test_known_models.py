"""Which changes make an open model another one: in weights, in headers, in the texts beside."""

from __future__ import annotations

import json
import os
import shutil
import struct

import gguf
import pytest
import torch
from gguf_writer import write
from small_llm import TINY, open_small
from test_gguf_file import split
from tool_templates import with_tools

from ebbtide.offload.errors import BadCheckpoint
from ebbtide.offload.gguf import file as gguf_file
from ebbtide.offload.models import safetensors_files
from ebbtide.offload.models.safetensors_files import open_folder

IDS = [1, 2, 3, 4, 5]


@pytest.fixture
def model(checkpoint, tmp_path):
    """A folder with a tokenizer, a day old."""
    folder = with_tools(shutil.copytree(checkpoint("llama2"), tmp_path / "model"), "hermes")
    for path in folder.iterdir():
        age(path)
    return folder


def age(path) -> None:
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns - 86_400 * 10**9))


def change(path, place: int) -> None:
    with open(path, "r+b") as out:
        out.seek(place)
        byte = out.read(1)[0]
        out.seek(place)
        out.write(bytes([byte ^ 1]))


# ---- weights ------------------------------------------------------------------------------------


def test_one_vector_that_was_trained_makes_another(tmp_path):
    """As where norms alone are: a hundredth of a thousandth of what they stand among."""
    entries, shapes, reached = {}, {}, 0
    for number in range(12):
        for name, count in ((f"big.{number}", 1 << 20), (f"norm.{number}", 1024)):
            entries[name] = {
                "dtype": "F32",
                "shape": [count],
                "data_offsets": [reached, reached + 4 * count],
            }
            shapes[name], reached = (count,), reached + 4 * count
    header, path = json.dumps(entries).encode(), tmp_path / "model.safetensors"
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        out.truncate(8 + len(header) + reached)
    age(path)
    checkpoint = open_folder(tmp_path, shapes)
    for name, shape in shapes.items():
        if shape == (1024,):
            place = checkpoint.refs[name].offset
            with open(path, "r+b") as out:
                out.seek(place)
                out.write(torch.ones(1024).numpy().tobytes())
            assert checkpoint.is_replaced(), name
            with pytest.raises(BadCheckpoint, match="changed while it was open"):
                checkpoint.read("big.0")
            with open(path, "r+b") as out:
                out.seek(place)
                out.write(bytes(4096))
            assert not checkpoint.is_replaced()
    checkpoint.close()


@pytest.mark.parametrize("reader", ["safetensors", "gguf"])
def test_files_that_are_replaced_while_their_headers_are_read_are_refused(
    model, tmp_path, monkeypatch, reader
):
    """Else tensors of the new file are read where the old one had them."""
    if reader == "gguf":
        model = path = write(model, tmp_path / "m.gguf", "Q8_0")
        module, name = gguf_file, "_read_one"
    else:
        path = model / "model.safetensors"
        module, name = safetensors_files, "_read_header"
    original = getattr(module, name)

    def read(given):
        found = original(given)
        change(path, path.stat().st_size - 1)
        return found

    monkeypatch.setattr(module, name, read)
    with pytest.raises(BadCheckpoint, match=r"changed while the model was opened\. Open it again"):
        open_small(model, tmp_path, **TINY)
    monkeypatch.undo()
    open_small(model, tmp_path, **TINY).close()


def test_a_file_of_several_that_has_no_tensors_is_the_model_too(checkpoint, tmp_path):
    """It says how the others' are to be used."""
    path = write(checkpoint("llama2"), tmp_path / "m.gguf", "Q8_0")
    first = split(path, tmp_path / "split")[0]
    with open_small(first, tmp_path, **TINY) as llm:
        before = llm.logits(IDS)
        eps = gguf.GGUFReader(first).fields["llama.attention.layer_norm_rms_epsilon"]
        data = bytearray(first.read_bytes())
        at = int(eps.offset) + sum(len(bytes(part)) for part in eps.parts[:-1])
        data[at : at + 4] = struct.pack("<f", 0.3)
        first.write_bytes(data)
        assert llm.files_changed()
        llm.unload()
        assert llm.config.norm_eps == pytest.approx(0.3)
        assert not torch.equal(llm.logits(IDS), before)


# ---- texts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_a_template_that_comes_later_is_the_models(model, tmp_path, name):
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    template = "{{ messages[0].content }}!"
    with open_small(model, tmp_path, **TINY) as llm:
        llm.encode("Hello")
        text = template if name.endswith("jinja") else json.dumps({"chat_template": template})
        (model / name).write_text(text)
        assert llm.files_changed()
        llm.unload()
        assert not llm.files_changed()
        assert llm.tokenizer.chat_text([{"role": "user", "content": "Hello"}]) == "Hello!"
        (model / name).write_text(text.replace("!", "?"))
        assert llm.files_changed()


def test_a_word_of_a_tokenizer_makes_another(model, tmp_path):
    """However long the file is, and wherever the word stands in it."""
    path = model / "tokenizer.json"
    path.write_text(path.read_text() + " " * (2 << 20))
    age(path)
    with open_small(model, tmp_path, **TINY) as llm:
        for place in range(1 << 19, 2 << 20, 123_457):
            data = bytearray(path.read_bytes())
            data[place] = ord("\n")
            path.write_bytes(data)
            assert llm.files_changed()
            data[place] = ord(" ")
            path.write_bytes(data)
            assert not llm.files_changed()


@pytest.mark.parametrize("wanted", ["tokenizer", "tokens_fingerprint"])
def test_a_tokenizer_that_is_read_later_is_the_opened_models_or_refused(model, tmp_path, wanted):
    """Its tokens would be another's than the weights'."""
    with open_small(model, tmp_path, **TINY) as llm:
        path = model / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()), indent=3))
        for _ in range(2):
            with pytest.raises(BadCheckpoint, match=r"tokenizer\.json changed .* unload\(\)"):
                getattr(llm, wanted)
        llm.unload()
        assert getattr(llm, wanted)


def test_a_folder_that_cannot_be_listed_is_said(model, tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied")

    with open_small(model, tmp_path, **TINY) as llm:
        expected = llm.logits(IDS)
        monkeypatch.setattr("pathlib.Path.iterdir", refused)
        assert not llm.files_changed() and torch.equal(llm.logits(IDS), expected)
        with pytest.raises(BadCheckpoint, match="cannot be listed: Permission denied"):
            open_small(model, tmp_path, **TINY)

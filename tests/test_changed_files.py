"""Weight files that change while a model is open: tensors of two models are never mixed."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from gguf_writer import write
from small_llm import TINY, hold, hold_few_experts, open_small

from ebbtide.offload.errors import BadCheckpoint
from ebbtide.offload.plan import Loaded

IDS = [1, 2, 3, 4, 5]


def in_memory(llm):
    """Of an untied model the rows of the embedding still come from the file."""
    hold(llm, Loaded(0, True))


def streamed(llm):
    hold(llm, Loaded(llm.config.num_layers, False))


WAYS = {
    "in memory": ("llama2", in_memory),
    "layers streamed": ("llama2", streamed),
    "experts on demand": ("mixtral", hold_few_experts),
}


@pytest.fixture(params=["folder", "gguf"])
def kind(request):
    return request.param


@pytest.fixture
def copied(checkpoint, tmp_path, kind):
    """Makes (model, weight file), the file a day old: a clock that ticks slowly proves nothing."""

    def copy(name):
        model = tmp_path / "model"
        if kind == "folder":
            shutil.copytree(checkpoint(name), model)
            file = model / "model.safetensors"
        else:
            model.mkdir()
            model = file = write(checkpoint(name), model / "m.gguf", "Q8_0")
        found = file.stat()
        os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns - 86_400 * 10**9))
        return model, file

    return copy


def rotate_end(file):
    """Other bytes of the same number in the same file, as rsync --inplace leaves them."""
    size = file.stat().st_size // 2
    with open(file, "r+b") as out:
        out.seek(-size, os.SEEK_END)
        end = out.read()
        out.seek(-size, os.SEEK_END)
        out.write(end[64:] + end[:64])


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_is_written_to_is_told_at_the_next_request(copied, tmp_path, way):
    name, hold_so = WAYS[way]
    model, file = copied(name)
    with open_small(model, tmp_path, **TINY) as llm:
        hold_so(llm)
        expected = llm.logits(IDS)
        assert torch.equal(llm.logits(IDS), expected)
        rotate_end(file)
        for _ in range(2):  # and stays told
            with pytest.raises(BadCheckpoint, match="changed while it was open") as told:
                llm.logits(IDS)
            assert str(file) in str(told.value)


def test_a_decoded_token_tells_too(copied, tmp_path):
    model, file = copied("llama2")
    with open_small(model, tmp_path, **TINY) as llm:
        in_memory(llm)
        with llm.session() as session:
            session.append(IDS)
            session.last_logits()
            rotate_end(file)
            with pytest.raises(BadCheckpoint, match="changed while it was open"):
                session.generate([6], max_new_tokens=2)


def test_a_file_that_is_replaced_goes_on_as_it_was(copied, tmp_path):
    """Nobody writes to the file that is open: its name belongs to another one now."""
    model, file = copied("llama2")
    with open_small(model, tmp_path, **TINY) as llm:
        streamed(llm)
        expected = llm.logits(IDS)
        other = file.with_name("other")
        shutil.copy(file, other)
        rotate_end(other)
        other.replace(file)
        assert torch.equal(llm.logits(IDS), expected)


def test_a_file_that_is_replaced_before_it_is_read_is_told(copied, tmp_path):
    """Its header said where tensors lie in the file before it."""
    model, file = copied("llama2")
    with open_small(model, tmp_path, **TINY) as llm:
        other = file.with_name("other")
        shutil.copy2(file, other)  # its time too
        other.replace(file)
        with pytest.raises(BadCheckpoint, match="changed while it was open"):
            llm.logits(IDS)

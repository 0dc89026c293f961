"""Weight files that change while a model is open: tensors of two models are never mixed, a file of
the same bytes is the same, and another one is taken when the model is unloaded.
"""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from gguf_writer import write
from prefixes_under_test import TEXT, last_logits, opened, short_texts_count  # noqa: F401
from random_checkpoints import make
from small_llm import TINY, hold, hold_few_experts, open_small

from ebbtide.offload.errors import BadCheckpoint
from ebbtide.offload.models import checkpoint as checkpoint_module
from ebbtide.offload.planning.plan import Loaded

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
        shutil.copy2(file, other)
        rotate_end(other)
        shutil.copystat(file, other)  # its time too
        other.replace(file)
        with pytest.raises(BadCheckpoint, match=r"changed while it was open.* unload\(\)"):
            llm.logits(IDS)


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_is_touched_goes_on(copied, tmp_path, way):
    name, hold_so = WAYS[way]
    model, file = copied(name)
    with open_small(model, tmp_path, **TINY) as llm:
        hold_so(llm)
        os.utime(file)  # before it is read, too
        expected = llm.logits(IDS)
        for _ in range(20):
            found = file.stat()
            os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns - 10**9))
            assert torch.equal(llm.logits(IDS), expected)
            assert not llm.files_changed()


@pytest.mark.parametrize("copy", [shutil.copy, shutil.copy2])
def test_a_copy_in_its_place_is_the_same(copied, tmp_path, copy):
    """As after a synchronisation, or on a mount that numbers its files anew."""
    model, file = copied("llama2")
    with open_small(model, tmp_path, **TINY) as llm:
        streamed(llm)
        for _ in range(2):  # before it is read, and while it is open
            copy(file, file.with_name("other"))
            file.with_name("other").replace(file)
            assert not llm.files_changed()
            logits = llm.logits(IDS)
        llm.unload()
        assert torch.equal(llm.logits(IDS), logits)


def replaced(file, other):
    other.replace(file)


def overwritten(file, other):
    file.write_bytes(other.read_bytes())


@pytest.fixture
def others(checkpoint, tmp_path, kind):
    """Makes another model of a variant: (its own place, its weight file)."""

    def make_other(name, **config):
        folder = make(name, tmp_path / "another", seed=1, **config)
        if kind == "folder":
            return folder, folder / "model.safetensors"
        file = write(folder, tmp_path / "another.gguf", "Q8_0")
        return file, file

    return make_other


def logits_of(model, tmp_path):
    with open_small(model, tmp_path, **TINY) as llm:
        return llm.logits(IDS), llm.fingerprint


@pytest.mark.parametrize("how", [replaced, overwritten])
@pytest.mark.parametrize("way", WAYS)
def test_unloading_takes_what_the_files_hold_now(copied, others, tmp_path, way, how):
    name, hold_so = WAYS[way]
    model, file = copied(name)
    other, other_file = others(name)
    expected, _ = logits_of(other, tmp_path)
    with open_small(model, tmp_path, **TINY) as llm:
        hold_so(llm)
        before, fingerprint = llm.logits(IDS), llm.fingerprint
        assert not llm.files_changed() and not torch.equal(before, expected)
        how(file, other_file)
        assert llm.files_changed()
        llm.unload()
        assert not llm.files_changed()
        assert torch.equal(llm.logits(IDS), expected)
        assert llm.fingerprint != fingerprint  # pages that are kept are the first one's


def test_unloading_takes_another_configuration_too(copied, others, tmp_path, kind):
    model, file = copied("llama2")
    other, other_file = others("llama2", num_hidden_layers=5, rms_norm_eps=0.1)
    expected, _ = logits_of(other, tmp_path)
    with open_small(model, tmp_path, **TINY) as llm:
        llm.logits(IDS)
        num_layers = llm.config.num_layers
        if kind == "folder":
            shutil.copy(other / "config.json", model / "config.json")
            assert llm.files_changed()
        other_file.replace(file)
        llm.unload()
        assert llm.config.num_layers == 5 != num_layers
        assert torch.equal(llm.logits(IDS), expected)


def test_what_cannot_be_opened_is_said_until_it_can(copied, tmp_path):
    """A copy that is not whole yet."""
    model, file = copied("llama2")
    with open_small(model, tmp_path, **TINY) as llm:
        expected, whole = llm.logits(IDS), file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        for _ in range(2):
            with pytest.raises(BadCheckpoint, match=r"incomplete|ends before|not lie within"):
                llm.unload()
            assert not llm.is_loaded and llm.files_changed()
            with pytest.raises(BadCheckpoint, match="changed while it was open"):
                llm.logits(IDS)
        file.write_bytes(whole)
        assert torch.equal(llm.logits(IDS), expected)  # the file it was


def test_a_file_whose_name_is_gone_goes_on(copied, tmp_path):
    model, file = copied("llama2")
    with open_small(model, tmp_path, **TINY) as llm:
        streamed(llm)
        expected = llm.logits(IDS)
        file.rename(tmp_path / "elsewhere")
        assert not llm.files_changed()
        assert torch.equal(llm.logits(IDS), expected)


def test_no_pages_of_the_model_before_serve_the_one_after_it(copied, others, tmp_path):
    model, file = copied("llama2")
    other, other_file = others("llama2")
    with opened(other, tmp_path, cap=None) as llm:
        expected, _ = last_logits(llm, TEXT)
    with opened(model, tmp_path) as llm:
        last_logits(llm, TEXT)
        assert last_logits(llm, TEXT)[1] > 0
        other_file.replace(file)
        llm.unload()
        logits, num_restored = last_logits(llm, TEXT)
        assert torch.equal(logits, expected) and num_restored == 0


def half_overwritten(file, other):
    """Its second half, and its time as it was."""
    found, whole = file.stat(), other.read_bytes()
    with open(file, "r+b") as out:
        out.seek(len(whole) // 2)
        out.write(whole[len(whole) // 2 :])
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


def cut(file, other):
    os.truncate(file, file.stat().st_size // 2)


def linked(file, other):
    """As a hub's cache and a folder of versions exchange them."""
    link = file.with_name("link")
    link.symlink_to(other)
    link.replace(file)


@pytest.mark.parametrize("how", [replaced, overwritten, half_overwritten, cut, linked])
@pytest.mark.parametrize("way", WAYS)
def test_models_are_never_mixed_whenever_a_file_changes(
    copied, others, tmp_path, monkeypatch, way, how
):
    """Before any of the reads of loading, of a prompt and of the next: logits are those of the
    model that was opened, or there are none."""
    name, hold_so = WAYS[way]
    model, file = copied(name)
    other_file, kept = others(name)[1], tmp_path / "kept"
    shutil.copy2(file, kept)
    changes_at, num_reads, read_at = [0], [0], checkpoint_module.read_at

    def read(descriptor, view, path, offset):
        num_reads[0] += 1
        if num_reads[0] == changes_at[0]:
            how(file, other_file)
        return read_at(descriptor, view, path, offset)

    def run():
        num_reads[0] = 0
        with open_small(model, tmp_path, **TINY) as llm:
            hold_so(llm)
            return [llm.logits(IDS) for _ in range(2)]

    monkeypatch.setattr(checkpoint_module, "read_at", read)
    expected, most = run()[0], num_reads[0]
    whole, num_refused = other_file.read_bytes(), 0
    for changes_at[0] in range(1, most + 1, 1 + most // 8):
        try:
            for found in run():
                assert torch.equal(found, expected)
        except BadCheckpoint as error:
            num_refused += 1
            assert file.name in str(error)
        file.unlink()
        shutil.copy2(kept, file)
        other_file.write_bytes(whole)
    assert num_refused or how in (replaced, linked)

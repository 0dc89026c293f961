"""Groups of tensors come back from the scratch file as they were, and one without room is refused
before anything is converted.
"""

from __future__ import annotations

import errno
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from ebbtide.kernels.quantised import QuantisedWeight, quantise_weight
from ebbtide.offload.disk import spill_dir
from ebbtide.offload.errors import DoesNotFit, EbbtideError, InputError, StorageError
from ebbtide.offload.models.model_config import read_model_config
from ebbtide.offload.models.past_cache import BLOCK_BYTES
from ebbtide.offload.models.safetensors_files import open_folder
from ebbtide.offload.pages.tier import aligned_bytes
from ebbtide.offload.weights import tensor_scratch, weights
from ebbtide.offload.weights.kept_tensors import Arena
from ebbtide.offload.weights.skeleton import expected_shapes
from ebbtide.offload.weights.tensor_scratch import TensorScratch
from ebbtide.offload.weights.weights import WeightStore

GROUP_BYTES = 5 * BLOCK_BYTES


def group(buffer: torch.Tensor, seed: int) -> dict:
    """Tensors of all kinds, in a buffer."""
    arena, random = Arena(buffer), torch.Generator().manual_seed(seed)
    numbers = torch.randn(40, 64, generator=random)
    return {
        "raw": arena.keep(numbers.to(torch.bfloat16)),
        "norm": arena.keep(numbers[0]),
        "one": arena.keep(torch.tensor(float(seed))),
        **{f"w{bits}": quantise_weight(numbers, bits, arena.empty) for bits in (8, 4)},
    }


def parts(tensor) -> tuple[torch.Tensor, ...]:
    is_quantised = isinstance(tensor, QuantisedWeight)
    return (tensor.codes, tensor.scales) if is_quantised else (tensor,)


def test_groups_come_back_whatever_their_buffer_holds_by_then(tmp_path):
    buffer, other = aligned_bytes(GROUP_BYTES), aligned_bytes(GROUP_BYTES)
    scratch, kept = TensorScratch(tmp_path, 3 * GROUP_BYTES), {}
    for seed in range(3):
        tensors = group(buffer, seed)
        kept[seed] = [p.clone() for t in tensors.values() for p in parts(t)]
        scratch.add(("group", seed), tensors, buffer)
    buffer.fill_(7)
    for seed in (2, 0, 1, 1):
        key = "group", seed
        assert scratch.has(key) and scratch.num_bytes(key) <= GROUP_BYTES
        scratch.read(key, other)
        back = scratch.views(key, other)
        assert list(back) == ["raw", "norm", "one", "w8", "w4"]
        found = [p for t in back.values() for p in parts(t)]
        assert all(torch.equal(a, b) for a, b in zip(found, kept[seed], strict=True))
    assert not scratch.has(("group", 3))
    scratch.close()
    scratch.close()
    assert list(tmp_path.iterdir()) == []


def test_what_lies_elsewhere_is_no_part_of_a_group(tmp_path):
    scratch, buffer = TensorScratch(tmp_path, GROUP_BYTES), aligned_bytes(GROUP_BYTES)
    with pytest.raises(AssertionError, match="stray does not lie in the buffer"):
        scratch.add("group", {"stray": torch.zeros(4)}, buffer)
    scratch.close()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room cannot be reserved here")
def test_the_file_has_its_room_from_the_beginning(tmp_path):
    scratch = TensorScratch(tmp_path, 3 * GROUP_BYTES)
    found = os.fstat(scratch._file.descriptor)
    assert found.st_size == 3 * GROUP_BYTES <= 512 * found.st_blocks
    scratch.close()


def store(folder, spill, on_load=None):
    """With two streamed layers, which are converted."""
    config = read_model_config(folder)
    opened = open_folder(folder, expected_shapes(config), quantisation=config.quantisation)
    how = dict(bits=8, num_streamed=2, spill_dir=spill, on_load=on_load)
    return WeightStore(config, opened, torch.device("cpu"), **how)


def no_room(monkeypatch, folder):
    """The volume is nearly full, whatever was allowed."""
    free = spill_dir.KEPT_FREE_BYTES + BLOCK_BYTES
    usage = SimpleNamespace(total=1 << 40, free=free)
    monkeypatch.setattr(spill_dir.shutil, "disk_usage", lambda _: usage)


def full(monkeypatch, folder):
    """Others were quicker: the room that was there is gone."""

    def fails(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensor_scratch.ScratchFile, "_allocate", fails)


def gone(monkeypatch, folder):
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        (no_room, DoesNotFit, "has room for 4.0 KiB of scratch .* are needed"),
        (full, StorageError, "could not write .* No space left on device .* --spill-dir"),
        (gone, InputError, "--spill-dir"),
    ],
)
def test_a_disk_without_room_is_refused_before_anything_is_converted(
    checkpoint, tmp_path, monkeypatch, fault, kind, says
):
    folder, spill = checkpoint("llama2"), tmp_path / "spill"
    spill.mkdir()
    monkeypatch.setattr(weights.TensorLoader, "begin", lambda *_: pytest.fail("it was begun"))
    fault(monkeypatch, spill)
    with pytest.raises(EbbtideError, match=says) as caught:
        store(folder, spill)
    assert isinstance(caught.value, kind)
    assert not spill.exists() or list(spill.iterdir()) == []
    if kind is not InputError:
        assert str(spill) in str(caught.value)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="Linux lists open files there")
def test_what_ends_converting_leaves_nothing_open(checkpoint, tmp_path, monkeypatch):
    folder, before = checkpoint("llama2"), len(os.listdir("/proc/self/fd"))

    def fails(self, view, offset):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(tensor_scratch.ScratchFile, "_write_some", fails)
    with pytest.raises(StorageError, match=r"could not write .*; check the volume"):
        store(folder, tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before

    def interrupted(done, total):
        if done == total:
            raise KeyboardInterrupt

    monkeypatch.undo()
    with pytest.raises(KeyboardInterrupt):
        store(folder, tmp_path, interrupted)
    assert len(os.listdir("/proc/self/fd")) == before and list(tmp_path.iterdir()) == []

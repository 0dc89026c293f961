"""Which changes of a model's files make it another one, for the pages that are kept of it."""

from __future__ import annotations

import os

import pytest

from ebbtide.offload.models import fingerprint
from ebbtide.offload.models.fingerprint import files_digest, model_fingerprint

SIZE = 8 << 20
TIME_NS = 1_700_000_000 * 10**9


def make(folder, num_files=1, size=SIZE):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for number in range(num_files):
        path = folder / f"model-{number}.safetensors"
        path.write_bytes(bytes(range(256)) * (size // 256) + b"end")
        os.utime(path, ns=(TIME_NS, TIME_NS))
    return folder


def change(path, start, stop):
    """Bytes of a file, which keeps its size and its time, as in an archive of equal times."""
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(b"\xee" * (stop - start))
    os.utime(path, ns=(TIME_NS, TIME_NS))


def test_a_copy_is_the_same_model(tmp_path):
    assert model_fingerprint(make(tmp_path / "a")) == model_fingerprint(make(tmp_path / "b"))


@pytest.mark.parametrize("num_files", [1, 5, 40])
def test_training_that_changed_some_layers_alone_makes_another(tmp_path, num_files):
    """A sixteenth of one file, wherever it is, though nothing else says that it changed."""
    folder = make(tmp_path / "a", num_files, 1 << 20)
    before, path = model_fingerprint(folder), folder / f"model-{num_files // 2}.safetensors"
    original, size = path.read_bytes(), 1 << 20
    for part in range(16):
        # A block lies somewhere in each part, so one of two neighbours has a whole one.
        change(path, part * size // 16, min(size, (part + 2) * size // 16))
        assert model_fingerprint(folder) != before
        path.write_bytes(original)
        os.utime(path, ns=(TIME_NS, TIME_NS))
        assert model_fingerprint(folder) == before


@pytest.mark.parametrize("what", ["name", "size", "time", "first byte", "last byte"])
def test_what_tells_files_apart_at_once(tmp_path, what):
    folder = make(tmp_path / "a")
    before, path = model_fingerprint(folder), folder / "model-0.safetensors"
    if what == "name":
        path.rename(folder / "other.safetensors")
    elif what == "size":
        change(path, SIZE + 3, SIZE + 4)
    elif what == "time":
        os.utime(path, ns=(TIME_NS, TIME_NS + 1))
    else:
        place = 0 if what == "first byte" else SIZE + 2
        change(path, place, place + 1)
    assert model_fingerprint(folder) != before


@pytest.mark.parametrize("size", [0, 1, 4095, 4097, 1 << 20, 3 << 40])
def test_little_is_read_of_files_of_any_size(size):
    places = list(fingerprint.spread(size, 256))
    assert sum(num_bytes for _, num_bytes in places) <= 1.2 * 2**20
    assert all(0 <= place <= size for place, _ in places)
    between = [place for place, _ in places[1:-1]]
    assert between == sorted(between)
    gaps = [b - a for a, b in zip([0, *between], [*between, size], strict=True)]
    assert max(gaps) <= 2 * size / 256 + fingerprint._BLOCK_BYTES


def test_a_file_in_several_says_which(tmp_path):
    """Bytes that go from one file to the next are others."""
    one, two = make(tmp_path / "a", 2, 1 << 20), make(tmp_path / "b", 2, 1 << 20)
    change(one / "model-0.safetensors", 0, 4096)
    change(two / "model-1.safetensors", 0, 4096)
    assert len({files_digest(sorted(folder.glob("*.safetensors"))) for folder in (one, two)}) == 2

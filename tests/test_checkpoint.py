"""Safetensors folders: whatever is wrong with one is named; nothing crashes or is unpickled."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_checkpoints import reference_logits
from safetensors.torch import load_file, save_file
from small_llm import hold, open_small

from ebbtide.offload.errors import BadCheckpoint, ModelError, StorageError
from ebbtide.offload.gguf.file import read_header
from ebbtide.offload.models.checkpoint import TensorRef
from ebbtide.offload.models.config_fields import load_json
from ebbtide.offload.models.layer_config import Joined, Stacked
from ebbtide.offload.models.model_config import read_model_config
from ebbtide.offload.models.safetensors_files import _unstacked, open_folder
from ebbtide.offload.planning.plan import Loaded
from ebbtide.offload.weights.packing import Plain
from ebbtide.offload.weights.skeleton import expected_shapes

SHAPES = {"a": (2, 3), "b": (4,)}


def header_and_data(**changes) -> tuple[dict, bytes]:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    for name, change in changes.items():
        header[name] = {**header[name], **change}
    return header, bytes(range(32))


def write(folder, header, data: bytes, name="model.safetensors", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    stated = len(text) if length is None else length
    (folder / name).write_bytes(struct.pack("<Q", stated) + text + data)
    return folder


def open_checkpoint(folder, shapes=None):
    checkpoint = open_folder(folder, SHAPES if shapes is None else shapes)
    tensors = {name: checkpoint.read(name) for name in checkpoint.refs}
    checkpoint.close()
    return tensors


def test_tensors_come_back_as_they_lie(tmp_path):
    header, data = header_and_data()
    tensors = open_checkpoint(write(tmp_path, header, data))
    assert torch.equal(
        tensors["a"], torch.frombuffer(bytearray(data[:24]), dtype=torch.float32).view(2, 3)
    )
    assert torch.equal(tensors["b"], torch.frombuffer(bytearray(data[24:]), dtype=torch.bfloat16))


def test_rows_are_read_alone(tmp_path):
    checkpoint = open_folder(write(tmp_path, *header_and_data()), SHAPES)
    whole = checkpoint.read("a")
    assert torch.equal(checkpoint.read_rows("a", [1, 0, 1]), whole[[1, 0, 1]])
    ref = checkpoint.row_range("a", 1, 2)
    assert (ref.shape, ref.num_bytes) == ((1, 3), 12)
    checkpoint.close()


STACKED = (Stacked("all", ("{}.x", "{}.y")),)  # (experts, rows, columns): of x, then of y


def stacked(folder, shape, shapes, num_bytes=48):
    header = {"m.all": {"dtype": "F32", "shape": shape, "data_offsets": [0, num_bytes]}}
    data = torch.arange(num_bytes // 4, dtype=torch.float32).numpy().tobytes()
    write(folder, header, data)
    checkpoint = open_folder(folder, shapes, (("m.", "model."),), STACKED)
    tensors = {name: checkpoint.read(name) for name in checkpoint.refs}
    checkpoint.close()
    return tensors


def joined(folder, shapes: list[list[int]], whole=(6, 1, 2), dtypes=("F32",) * 3):
    """A tensor of which the files hold the rows in x, y and z, as it comes back."""
    header, data = {}, b""
    for name, shape, dtype in zip("xyz", shapes, dtypes, strict=False):
        size = math.prod(shape) * (4 if dtype == "F32" else 2)
        place = [len(data), len(data) + size]
        header[f"m.{name}"] = {"dtype": dtype, "shape": shape, "data_offsets": place}
        data += torch.randn(size // 4).numpy().tobytes()
    parts = (Joined("all", ("x", "y", "z")),)
    checkpoint = open_folder(write(folder, header, data), {"m.all": whole}, in_parts=parts)
    tensor = checkpoint.read("m.all")
    checkpoint.close()
    return tensor, torch.frombuffer(bytearray(data), dtype=tensor.dtype).view(whole)


@pytest.mark.parametrize("shapes", [[[1, 1, 2], [2, 1, 2], [3, 1, 2]], [[2, 1, 2]] * 3])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_rows_that_lie_in_several_tensors_are_joined(tmp_path, shapes, dtype):
    tensor, lying = joined(tmp_path, shapes, dtypes=(dtype,) * 3)
    assert torch.equal(tensor, lying)


@pytest.mark.parametrize(
    ("shapes", "dtypes", "says"),
    [
        ([[2, 1, 2], [4, 1, 2]], ("F32", "F32"), "lacks 1 of 1"),
        ([[2, 1, 2], [2, 2, 1], [2, 1, 2]], ("F32",) * 3, "lacks 1 of 1"),
        ([[2, 1, 2]] * 3, ("F32", "BF16", "F32"), "lacks 1 of 1"),
        ([[], [], []], ("F32",) * 3, "lacks 1 of 1"),
        ([[2, 1, 2], [2, 1, 2], [4, 1, 2]], ("F32",) * 3, r"the shape \[8, 1, 2\]"),
    ],
)
def test_rows_that_do_not_fit_are_not_joined(tmp_path, shapes, dtypes, says):
    with pytest.raises(BadCheckpoint, match=says):
        joined(tmp_path, shapes, dtypes=dtypes)


def test_what_is_announced_is_all_of_a_tensor(tmp_path, monkeypatch):
    """Every byte once, in pieces that are read whole; a system that takes no advice is let be."""
    header = {"w": {"dtype": "F32", "shape": [1000, 301], "data_offsets": [0, 1204000]}}
    opened = open_folder(write(tmp_path, header, bytes(1204000)), {"w": (1000, 301)})
    asked = []

    def advise(descriptor, start, size, advice):
        assert advice == os.POSIX_FADV_WILLNEED and 0 < size <= 256 << 10
        asked.append((start, size))
        raise OSError("not here")

    monkeypatch.setattr(os, "posix_fadvise", advise, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    opened.announce(opened.refs["w"])
    ref = opened.refs["w"]
    assert asked[0][0] == ref.offset and sum(size for _, size in asked) == ref.num_bytes
    assert all(a + size == b for (a, size), (b, _) in itertools.pairwise(asked))
    monkeypatch.delattr(os, "posix_fadvise")
    opened.announce(opened.refs["w"])
    assert torch.equal(opened.read("w"), torch.zeros(1000, 301))
    opened.close()


def test_the_systems_cache_is_told_to_forget_what_is_on_disk(tmp_path, monkeypatch):
    header = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    opened = open_folder(write(tmp_path, header, bytes(8)), {"w": (2,)})
    opened.read("w")
    told = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: told.append("on disk"))
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    monkeypatch.setattr(os, "posix_fadvise", lambda *what: told.append(what[1:]), raising=False)
    assert opened.forget() and told == ["on disk", (0, 0, 4)]  # 0: to its end
    monkeypatch.delattr(os, "posix_fadvise")
    assert not opened.forget()
    assert torch.equal(opened.read("w"), torch.zeros(2))
    opened.close()


def rows_apart(folder, **changed):
    """A matrix "w.norm.weight" (3, 4) that two files hold row by row, in an order of their own."""
    rows = {f"w.norm.{n}.weight": torch.arange(4.0) + 4 * n for n in (2, 0, 1)} | changed
    rows = {name: row for name, row in rows.items() if row is not None}
    first, *others = rows
    save_file({first: rows[first]}, folder / "a.safetensors")
    save_file({name: rows[name] for name in others}, folder / "b.safetensors")
    files = dict.fromkeys(rows, "b.safetensors") | {first: "a.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    rows_of = Joined("norm.weight", tuple(f"norm.{n}.weight" for n in range(3)))
    checkpoint = open_folder(folder, {"w.norm.weight": (3, 4)}, in_parts=[rows_of])
    tensor = checkpoint.read("w.norm.weight")
    checkpoint.close()
    return tensor


def test_a_matrix_may_lie_row_by_row(tmp_path):
    assert torch.equal(rows_apart(tmp_path), torch.arange(12.0).view(3, 4))


@pytest.mark.parametrize("row", [None, torch.zeros(5), torch.zeros(4, dtype=torch.bfloat16)])
@pytest.mark.parametrize("number", [0, 1])
def test_rows_of_which_one_is_another_or_missing_are_no_matrix(tmp_path, number, row):
    with pytest.raises(BadCheckpoint, match=r"lacks 1 of 1 tensors, 'w\.norm\.weight'"):
        rows_apart(tmp_path, **{f"w.norm.{number}.weight": row})


def test_experts_in_one_tensor_are_each_ones_rows(tmp_path):
    shapes = {f"model.{e}.{part}": (2, 1) for e in range(3) for part in "xy"}
    tensors = stacked(tmp_path, [3, 4, 1], shapes)
    numbers = torch.cat([tensors[name].flatten() for name in shapes])
    assert numbers.tolist() == list(range(12))


@pytest.mark.parametrize(
    ("shape", "num_bytes"),
    [([1, 0, 5], 0), ([3_000_000, 2, 0], 0), ([0, 2, 2], 0), ([4, 3, 1], 48), ([1 << 61, 2, 0], 0)],
)
def test_what_no_experts_are_is_none_of_theirs(tmp_path, shape, num_bytes):
    """A number of experts that nobody checked would be as many names."""
    with pytest.raises(BadCheckpoint, match="lacks 1 of 1"):
        stacked(tmp_path, shape, {"model.0.x": (2, 1)}, num_bytes)
    ref = TensorRef(tmp_path, 0, num_bytes, Plain(torch.float32), tuple(shape))
    assert _unstacked("m.all", {"m.all": ref}, STACKED, {}) == {}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"a": {"shape": [3, 2]}}, r"a has the shape \[3, 2\].*asks for \[2, 3\]"),
        ({"a": {"shape": [2, 4]}}, "a of shape .* cannot take 24 bytes"),
        ({"a": {"shape": [2, -3]}}, "a does not lie within"),
        ({"a": {"shape": [2, 3.0]}}, "a does not lie within"),
        ({"a": {"shape": [1 << 40, 1 << 40]}}, "cannot take"),
        ({"a": {"dtype": "F64"}}, "lacks 1 of 2 tensors, 'a' first"),
        ({"a": {"dtype": ["F32"]}}, "lacks 1 of 2"),
        ({"a": {"data_offsets": [24, 0]}}, "a does not lie within"),
        ({"a": {"data_offsets": [16, 40]}}, "a does not lie within"),
        ({"a": {"data_offsets": [0]}}, "a does not lie within"),
        ({"a": {"data_offsets": [0, True]}}, "a does not lie within"),
        ({"b": {"data_offsets": [20, 28]}}, "b overlaps a"),
        ({"b": {"data_offsets": [0, 8]}}, "a overlaps b"),
        ({"b": {"data_offsets": None}}, "b does not lie within"),
    ],
)
def test_a_header_that_cannot_be_true_is_named(tmp_path, changes, says):
    with pytest.raises(BadCheckpoint, match=says):
        open_checkpoint(write(tmp_path, *header_and_data(**changes)))


@pytest.mark.parametrize("keep", [0, 7, 8, 40, -33, -32, -1])
def test_a_file_that_was_cut_is_named(tmp_path, keep):
    path = write(tmp_path, *header_and_data()) / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    with pytest.raises(BadCheckpoint, match=r"damaged or incomplete|no safetensors file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 50, 1 << 32, (1 << 64) - 1])
def test_a_header_length_that_lies_is_named(tmp_path, length):
    with pytest.raises(BadCheckpoint):
        open_checkpoint(write(tmp_path, *header_and_data(), length=length))


@pytest.mark.parametrize("text", [b"[]", b"7", b"\xff", b"[" * 50_000, b'{"a": ' + b"1" * 5000])
def test_a_header_that_is_no_object_is_named(tmp_path, text):
    with pytest.raises(BadCheckpoint):
        open_checkpoint(write(tmp_path, text, b""))


def index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path, *header_and_data(), name="one.safetensors")
    index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(BadCheckpoint, match=r"lacks 1 of 2 shards: two.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        ".",
        "",
        "\0",
        "a" * 9999,
    ],
)
def test_an_index_reaches_nothing_outside_its_folder(tmp_path, name):
    inner = tmp_path / "inner"
    inner.mkdir()
    write(tmp_path, *header_and_data())
    with pytest.raises(BadCheckpoint):
        open_checkpoint(index(inner, {"a": name, "b": name}))


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": None}, "one", {}])
def test_an_index_without_a_map_is_named(tmp_path, weight_map):
    with pytest.raises(BadCheckpoint, match=r"weight_map|lacks"):
        open_checkpoint(index(tmp_path, weight_map))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_a_pickle_is_never_opened(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(BadCheckpoint, match=rf"{name}.*safetensors only"):
        open_checkpoint(tmp_path)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(BadCheckpoint, match=r"no model.safetensors"):
        open_checkpoint(tmp_path)


_HEADER, _DATA = header_and_data()
_FILE = struct.pack("<Q", len(json.dumps(_HEADER))) + json.dumps(_HEADER).encode() + _DATA
_EDITS = st.lists(
    st.tuples(
        st.integers(0, len(_FILE) - 1),
        st.integers(0, 3),
        st.binary(max_size=3) | st.sampled_from([b"-", b"9", b"[", b"]", b"{}", b'"', b"null"]),
    ),
    min_size=1,
    max_size=3,
)


@given(edits=_EDITS)
def test_a_header_damaged_anywhere_gives_a_model_error_or_tensors(tmp_path_factory, edits):
    """Damage may leave a header that is true; then what is read lies within the file."""
    content = bytearray(_FILE)
    for at, removed, added in edits:
        content[at : at + removed] = added
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "model.safetensors").write_bytes(content)
    try:
        tensors = open_checkpoint(folder)
        assert {name: tuple(t.shape) for name, t in tensors.items()} == SHAPES
    except ModelError:
        pass
    finally:
        shutil.rmtree(folder)


def copy_of(folder, to):
    shutil.copytree(folder, to)
    return to


@pytest.mark.parametrize("streamed", [(0, True), (3, False)], ids=["loading", "streaming"])
def test_a_file_cut_after_it_was_opened_is_an_error_and_not_a_crash(checkpoint, tmp_path, streamed):
    folder = copy_of(checkpoint("llama2"), tmp_path / "model")
    path = folder / "model.safetensors"
    with open_small(folder, tmp_path) as llm:
        hold(llm, Loaded(*streamed))
        if streamed[0]:
            with llm.session() as session:
                session.append([1, 2, 3])
                session.last_logits()
                os.truncate(path, path.stat().st_size // 3)
                with pytest.raises(BadCheckpoint, match="changed while it was open"):
                    session.generate([4] * 40, max_new_tokens=40)
        else:
            os.truncate(path, path.stat().st_size // 3)
        with pytest.raises(BadCheckpoint, match="changed while it was open"):
            llm.logits([1, 2, 3])


def test_a_file_that_is_gone_is_named(tmp_path):
    checkpoint = open_folder(write(tmp_path, *header_and_data()), SHAPES)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match=r"cannot be opened: "):
        checkpoint.read("a")


def test_a_disk_that_fails_is_a_storage_error(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(5, "Input/output error")

    checkpoint = open_folder(write(tmp_path, *header_and_data()), SHAPES)
    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(StorageError, match=r"could not be read: Input/output error"):
        checkpoint.read("a")
    checkpoint.close()


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.EIO, "could not be read: Input/output error"), (errno.EMFILE, "ulimit -n")],
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.gguf"])
def test_a_header_on_a_disk_that_fails_is_a_storage_error(
    tmp_path, monkeypatch, name, number, message
):
    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    write(tmp_path, *header_and_data())
    (tmp_path / name).touch()
    monkeypatch.setattr(Path, "open", fails)
    monkeypatch.setattr(Path, "read_text", fails)
    read = {
        "model.safetensors": lambda: open_folder(tmp_path, SHAPES),
        "config.json": lambda: load_json(tmp_path / name),
        "model.gguf": lambda: read_header(tmp_path / name),
    }
    with pytest.raises(StorageError, match=f"{name} .*{message}"):
        read[name]()


def test_every_tensor_of_the_model_is_asked_for(checkpoint):
    """A model of 3 layers does not open as one of 4; the first name that lacks is said."""
    folder = checkpoint("llama2")
    config = read_model_config(folder)
    shapes = expected_shapes(config)
    extra = {**shapes, "model.layers.3.input_layernorm.weight": (64,)}
    with pytest.raises(BadCheckpoint, match=r"'model.layers.3.input_layernorm.weight' first"):
        open_folder(folder, extra)


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("holds", ["both", "one twice", "the head alone"])
def test_a_head_of_its_own_in_the_files_is_used(checkpoint, tmp_path, holds):
    """Whatever config.json says of it: one that was trained apart is not the embedding. One that is
    the same is not held twice, and under either name."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("qwen3"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING].clone()
    if holds == "both":
        tensors[HEAD][-1, -1] += 1.0
    if holds == "the head alone":
        del tensors[EMBEDDING]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ids = list(range(40))
    expected = reference_logits(folder, ids)
    with open_small(folder, tmp_path, "full") as llm:
        assert llm.config.tied_embeddings == (holds != "both")
        assert (llm.logits(ids) - expected).abs().max() < 1e-3

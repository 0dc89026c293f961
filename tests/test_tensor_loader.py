"""Threads that load pieces of tensors give what one gives, and their errors are the caller's."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind

from ebbtide.kernels import dispatch
from ebbtide.offload.errors import BadCheckpoint, StorageError
from ebbtide.offload.gguf.packings import Swapped, packing_of
from ebbtide.offload.models.checkpoint import Checkpoint, TensorRef
from ebbtide.offload.models.known_file import KnownFile
from ebbtide.offload.weights import tensor_loader
from ebbtide.offload.weights.kept_tensors import Arena, most_staging, stored_bytes
from ebbtide.offload.weights.packing import Packing, Plain
from ebbtide.offload.weights.tensor_loader import TensorLoader

NAME = "model.layers.0.mlp.up_proj.weight"
SHAPES = [(1, 256), (64, 512), (203, 768)]

pytestmark = pytest.mark.skipif(
    dispatch._cpu is None, reason=f"no compiled kernels here: {dispatch._missing}"
)


def gguf(kind: str) -> Packing:
    return packing_of(kind, *GGML_QUANT_SIZES[Kind[kind]], Path("m.gguf"), NAME)


PACKINGS = {
    **{kind: gguf(kind) for kind in ("Q8_0", "Q4_0", "MXFP4", "Q4_1", "Q4_K", "Q5_K", "Q6_K")},
    **{kind: gguf(kind) for kind in ("Q5_0", "Q3_K", "IQ4_XS")},
    "IQ2_S, by its package": gguf("IQ2_S"),
    "bfloat16": Plain(torch.bfloat16),
    "float32": Plain(torch.float32),
}


def raw(packing: Packing, shape, seed: int = 0) -> bytes:
    """Bytes of a matrix whose numbers can be kept."""
    data = np.random.default_rng(seed).integers(0, 256, sum(packing.sizes(shape)), np.uint8)
    inner = getattr(packing, "inner", packing)
    if isinstance(inner, Plain):
        numbers = torch.from_numpy(data).view(torch.int8)[: shape[0] * shape[1]]
        return numbers.to(inner.kind).view(torch.uint8).numpy().tobytes()
    blocks = data.reshape(-1, inner.block_bytes)
    if inner.kind == "MXFP4":
        blocks[:, 0] = 120
    else:
        at_start = [0, 2] if inner.kind in ("Q4_1", "Q4_K", "Q5_K") else [0]
        for at in {"Q6_K": [208], "Q3_K": [108]}.get(inner.kind, at_start):
            blocks[:, at + 1] &= 0x3B  # of float16's two bytes the higher: below 1
    return data.tobytes()


def opened(folder: Path, packing: Packing, shape, data: bytes | None = None) -> Checkpoint:
    path = folder / "m.bin"
    path.write_bytes(b"head" * 16 + (raw(packing, shape) if data is None else data))
    os.utime(path, (1, 1))  # settled: its bytes are not compared at each read
    known = KnownFile(path)
    ref = TensorRef(path, 64, sum(packing.sizes(shape)), packing, shape)
    return Checkpoint({NAME: ref}, {NAME: shape}, {path: known}, path)


def kept(checkpoint: Checkpoint, bits, threads: int) -> list[torch.Tensor]:
    ref = checkpoint.refs[NAME]
    arena = Arena.of(stored_bytes(NAME, ref.shape, ref.packing, bits))
    with TensorLoader(checkpoint, bits, most_staging([ref], bits), threads) as loader:
        tensor = loader.begin(NAME, arena)
        loader.finish()
    return [tensor] if isinstance(tensor, torch.Tensor) else [tensor.codes, tensor.scales]


def same(some, others) -> bool:
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(some, others, strict=True)
    )


@pytest.fixture
def small_pieces(monkeypatch):
    """A strip or little more each."""
    monkeypatch.setattr(tensor_loader, "_PIECE_BYTES", 1)


def threads_left() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("ebbtide-loading")]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [8, 4, None])
@pytest.mark.parametrize("name", PACKINGS)
def test_pieces_are_the_whole(tmp_path, monkeypatch, name, bits, shape):
    checkpoint = opened(tmp_path, PACKINGS[name], shape)
    with monkeypatch.context() as patch:  # all at once, by the torch reference
        patch.setattr(TensorLoader, "_rows_at_once", lambda *_: None)
        patch.setenv("EBBTIDE_KERNELS", "reference")
        whole = kept(checkpoint, bits, 1)
    monkeypatch.setattr(tensor_loader, "_PIECE_BYTES", 1)
    for threads in (1, 3):
        assert same(kept(checkpoint, bits, threads), whole)
    assert not threads_left()


@pytest.mark.parametrize(("shape", "parts"), [((96, 512), 3), ((96, 512), 96 * 2), ((80, 256), 5)])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "Q6_K", "bfloat16"])
def test_rows_that_change_places_do_so_within_pieces(
    tmp_path, monkeypatch, small_pieces, name, shape, parts
):
    """Parts are rows of a head, or columns that are whole blocks."""
    if parts > shape[0] and name.endswith("K"):
        pytest.skip("a part is less than a block")
    packing = Swapped(PACKINGS[name], parts, 4, 2)
    checkpoint = opened(tmp_path, packing, shape)
    pieces = kept(checkpoint, 8, 3)
    monkeypatch.setattr(TensorLoader, "_rows_at_once", lambda *_: None)
    assert same(pieces, kept(checkpoint, 8, 1))


def test_the_staging_of_one_tensor_is_shared_out(tmp_path, small_pieces):
    checkpoint = opened(tmp_path, PACKINGS["Q8_0"], (203, 768))
    ref = checkpoint.refs[NAME]
    staging = most_staging([ref], 8)
    with TensorLoader(checkpoint, 8, staging, 3) as loader:
        lanes = [loader._lanes.get() for _ in range(3)]
    assert sum(map(len, lanes)) <= staging == len(loader._staging)
    assert len({lane.data_ptr() for lane in lanes}) == 3


@pytest.mark.parametrize("threads", [1, 3])
def test_damage_in_any_piece_is_the_callers_once(tmp_path, small_pieces, threads):
    shape, packing = (203, 768), PACKINGS["Q8_0"]
    data = bytearray(raw(packing, shape))
    for row in (20, 90, 200):
        data[row * 24 * 34 + 1] = 0x7C  # of a scale: infinite
    checkpoint = opened(tmp_path, packing, shape, bytes(data))
    with pytest.raises(BadCheckpoint, match=r"up_proj.*scales of Q8_0 .*download it again"):
        kept(checkpoint, 8, threads)
    assert not threads_left()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_file_that_was_cut_is_named(tmp_path, small_pieces, threads):
    checkpoint = opened(tmp_path, PACKINGS["Q4_0"], (203, 768))
    path = tmp_path / "m.bin"
    os.truncate(path, path.stat().st_size - 30_000)
    with pytest.raises(BadCheckpoint, match=r"truncated|changed while it was open"):
        kept(checkpoint, 4, threads)
    assert not threads_left()


@pytest.mark.parametrize("error", [StorageError("gone"), MemoryError(), KeyboardInterrupt()])
def test_what_a_thread_raises_ends_the_loading(tmp_path, monkeypatch, small_pieces, error):
    """The first error is raised, what was not begun is not read any more, and nothing hangs."""
    checkpoint = opened(tmp_path, PACKINGS["Q8_0"], (1600, 256))
    read, calls = Checkpoint.read_raw, []

    def failing(self, *args):
        calls.append(args)
        if len(calls) == 5:
            raise error
        return read(self, *args)

    monkeypatch.setattr(Checkpoint, "read_raw", failing)
    with pytest.raises(type(error)):
        kept(checkpoint, 8, 3)
    assert len(calls) < 1600 // 16 // 2 and not threads_left()


def test_ctrl_c_while_pieces_are_awaited_leaves_no_thread(tmp_path, monkeypatch, small_pieces):
    checkpoint = opened(tmp_path, PACKINGS["Q8_0"], (1600, 256))
    read, begun, waited = Checkpoint.read_raw, [], threading.Event()

    def slow(self, *args):
        begun.append(args)
        assert waited.wait(30)  # until Ctrl-C has come
        return read(self, *args)

    def interrupted(self):
        waited.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "read_raw", slow)
    monkeypatch.setattr(tensor_loader.Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kept(checkpoint, 8, 3)
    assert len(begun) <= 6 and not threads_left()


def test_the_reference_loads_with_one_thread(tmp_path, monkeypatch):
    """Several of torch's own would wait for each other."""
    monkeypatch.setenv("EBBTIDE_KERNELS", "reference")
    checkpoint = opened(tmp_path, PACKINGS["Q4_0"], (64, 512))
    with TensorLoader(checkpoint, 4, 1 << 20, 3) as loader:
        assert loader._pool is None

"""Layers of GGUF files that are streamed are read as the plan says: on the way, or from a scratch
file.
"""

from __future__ import annotations

import pytest
import torch
from gguf_writer import write

from ebbtide.offload.footprint import Facts
from ebbtide.offload.model_files import open_model_files
from ebbtide.offload.skeleton import decides, expected_shapes
from ebbtide.offload.weights import WeightStore


def planned_and_opened(path, tmp_path, bits, num_streamed):
    """The plan's facts, and a store whose streamed layers have all been read once."""
    files = open_model_files(path)
    config = files.config()
    shapes = expected_shapes(config)
    checkpoint = files.checkpoint(config, shapes)
    packings = {name: ref.packing for name, ref in checkpoint.refs.items()}
    store = WeightStore(
        config,
        checkpoint,
        torch.device("cpu"),
        bits=bits,
        num_streamed=num_streamed,
        spill_dir=tmp_path,
    )
    for layer in range(config.num_layers):
        store.layer(layer)
    return Facts("a-model", config, shapes, bits, packings), store


def staging_bytes(store) -> int:
    """Of the thread that reads streamed layers."""
    loader = store._reader.submit(lambda: getattr(store._of_thread, "loader", None)).result()
    return 0 if loader is None else loader._staging.numel()


@pytest.mark.parametrize("others", [{}, {"blk.0.": "Q5_0"}, {"blk.2.": "Q5_0"}])
@pytest.mark.parametrize("num_streamed", [1, 2, 3])
def test_what_reading_takes_was_planned_whichever_layers_are_streamed(
    checkpoint, tmp_path, others, num_streamed
):
    """Also where those that are streamed would need no scratch file, and others would."""
    path = write(checkpoint("llama2"), tmp_path / "m.gguf", "Q4_0", others=others)
    facts, store = planned_and_opened(path, tmp_path, 8, num_streamed)
    assert facts.keeps_layers == (store._scratch is not None) == bool(others)
    assert staging_bytes(store) <= facts.layer_staging_bytes
    store.close()


def test_resident_layers_need_no_scratch(checkpoint, tmp_path):
    path = write(checkpoint("llama2"), tmp_path / "m.gguf", "Q5_0")
    facts, store = planned_and_opened(path, tmp_path, 8, 0)
    assert facts.keeps_layers and store._scratch is None
    store.close()


def test_what_stays_as_it_is_needs_no_scratch(checkpoint, tmp_path):
    """Routers lie in the file as numbers, and stay so whatever bits are asked for."""
    folder = checkpoint("qwen3-moe", moe_intermediate_size=64, intermediate_size=128)
    path = write(folder, tmp_path / "m.gguf", "Q4_0")
    facts, store = planned_and_opened(path, tmp_path, 8, 1)
    shapes = {n: s for n, s in facts.shapes.items() if n.startswith("model.layers") and len(s) == 2}
    slow = [n for n in shapes if not facts._packing(n).is_quick(8)]
    assert slow and all(map(decides, slow))
    assert not facts.keeps_layers and store._scratch is None
    assert staging_bytes(store) <= facts.layer_staging_bytes
    store.close()

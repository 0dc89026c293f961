"""Layers of GGUF files that are streamed are read as the plan says: on the way, or from a scratch
file.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from gguf_writer import write
from small_llm import open_small

from ebbtide.kernels.quantised import QuantisedWeight
from ebbtide.offload.models.model_files import open_model_files
from ebbtide.offload.models.past_cache import whole_blocks
from ebbtide.offload.planning.footprint import Facts
from ebbtide.offload.planning.plan import Loaded, Request
from ebbtide.offload.planning.planner import make_plan
from ebbtide.offload.weights.skeleton import decides, expected_shapes
from ebbtide.offload.weights.weights import WeightStore


def planned_and_opened(path, tmp_path, bits, num_streamed, **more):
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
        **more,
    )
    for layer in range(config.num_layers):
        store.layer(layer)
    return Facts("a-model", config, shapes, bits, packings), store


def same(some, others) -> bool:
    def parts(weight):
        is_quantised = isinstance(weight, QuantisedWeight)
        return (weight.codes, weight.scales) if is_quantised else (weight,)

    return some.keys() == others.keys() and all(
        torch.equal(a, b)
        for name in some
        for a, b in zip(parts(some[name]), parts(others[name]), strict=True)
    )


def staging_bytes(store) -> int:
    """Of the thread that reads streamed layers."""
    loader = store._stream._thread.submit(
        lambda: getattr(store._of_thread, "loader", None)
    ).result()
    return 0 if loader is None else loader._staging.numel()


@pytest.mark.parametrize("others", [{}, {"blk.0.": "Q5_0"}, {"blk.2.": "Q5_0"}])
@pytest.mark.parametrize("num_streamed", [1, 2, 3])
def test_what_reading_takes_was_planned_whichever_layers_are_streamed(
    checkpoint, tmp_path, others, num_streamed
):
    """Also where those that are streamed would need no scratch file, and others would."""
    path = write(checkpoint("llama2"), tmp_path / "m.gguf", "Q4_0", others=others)
    facts, store = planned_and_opened(path, tmp_path, 8, num_streamed)
    assert facts.keeps_layers(quick_too=False) == (store._scratch is not None) == bool(others)
    assert staging_bytes(store) <= facts.layer_staging_bytes
    store.close()


def test_resident_layers_need_no_scratch(checkpoint, tmp_path):
    path = write(checkpoint("llama2"), tmp_path / "m.gguf", "Q5_0")
    facts, store = planned_and_opened(path, tmp_path, 8, 0)
    assert facts.keeps_layers(quick_too=False) and store._scratch is None
    store.close()


def test_what_stays_as_it_is_needs_no_scratch(checkpoint, tmp_path):
    """Routers lie in the file as numbers, and stay so whatever bits are asked for."""
    folder = checkpoint("qwen3-moe", moe_intermediate_size=64, intermediate_size=128)
    path = write(folder, tmp_path / "m.gguf", "Q4_0")
    facts, store = planned_and_opened(path, tmp_path, 8, 1)
    shapes = {n: s for n, s in facts.shapes.items() if n.startswith("model.layers") and len(s) == 2}
    slow = [n for n in shapes if not facts._packing(n).is_quick(8)]
    assert slow and all(map(decides, slow))
    assert not facts.keeps_layers(quick_too=False) and store._scratch is None
    assert staging_bytes(store) <= facts.layer_staging_bytes
    store.close()


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("head_resident", [True, False])
def test_what_is_quick_is_converted_once_where_that_is_asked_for(
    checkpoint, tmp_path, kind, head_resident
):
    folder = checkpoint("llama2", hidden_size=256, intermediate_size=256)
    path = write(folder, tmp_path / "m.gguf", kind)
    held = dict(head_resident=head_resident, quick_too=True)
    facts, store = planned_and_opened(path, tmp_path, "auto", 2, **held)
    _, plain = planned_and_opened(path, tmp_path, "auto", 0)
    hidden = torch.randn(32, 256)
    for _ in range(2):
        for layer in range(store.config.num_layers):
            assert same(store.layer(layer), plain.layer(layer))
        assert torch.equal(store.logits(hidden), plain.logits(hidden))
    assert staging_bytes(store) == 0
    assert facts.keeps_layers(quick_too=True) and not facts.keeps_layers(quick_too=False)
    scratch = facts.head_scratch_bytes() * (not head_resident)
    scratch += sum(map(whole_blocks, facts.layer_sizes[-2:]))
    assert os.fstat(store._scratch._file.descriptor).st_size == scratch
    store.close()
    plain.close()


def test_a_head_on_its_way_to_a_device_is_counted_on_both_sides(checkpoint, tmp_path):
    path = write(checkpoint("llama2"), tmp_path / "m.gguf", "Q4_0")
    with open_small(path, tmp_path) as llm:
        room = replace(llm.admission.limits, device_bytes=1 << 30)
        for loaded in (Loaded(0, False), Loaded(2, True), Loaded(0, True)):
            plan = make_plan(llm.admission.facts, llm.geometry, room, Request(300, loaded=loaded))
            assert plan.host["weights in flight"] == plan.device["weights being streamed"]
            assert bool(plan.host["weights in flight"]) == plan.reads_weights


def test_what_is_quick_is_converted_once_where_the_disk_has_room_for_it_twice(checkpoint, tmp_path):
    path = write(checkpoint("llama2"), tmp_path / "m.gguf", "Q4_0")
    with open_small(path, tmp_path) as llm:
        facts, limits = llm.admission.facts, llm.admission.limits
        plan = llm.admission.plan(300)
        assert plan.loaded == Loaded(0, True)
        without = sum(plan.host.values()) - plan.host["weights"]
        room = replace(limits, host_bytes=without + plan.host["weights"] * 3 // 4)
        plan = make_plan(facts, llm.geometry, room, Request(300))
        assert plan.fits and plan.layers_streamed and plan.quick_too
        least = plan.disk["weights"]
        head = 0 if plan.head_resident else facts.head_scratch_bytes()
        layers = facts.layer_sizes[-plan.layers_streamed :]
        assert least == head + sum(map(whole_blocks, layers))
        assert plan.loaded.quick_too
        for disk_bytes, quick_too in ((2 * least, True), (2 * least - 1, False), (0, False)):
            few = replace(room, disk_bytes=disk_bytes)
            plan = make_plan(facts, llm.geometry, few, Request(300))
            assert plan.fits and plan.quick_too == quick_too
            assert bool(plan.disk["weights"]) == quick_too == ("converted once" in str(plan))

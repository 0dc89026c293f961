"""Weights: the plan's bytes are the real ones; a streamed tensor is the tensor, in any order."""

from __future__ import annotations

import os
import random
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_llm import hold, hold_few_experts, open_small

from ebbtide.kernels.quantised import QuantisedWeight, quantise_weight
from ebbtide.offload.errors import StorageError
from ebbtide.offload.models.checkpoint import Checkpoint
from ebbtide.offload.models.model_config import read_model_config
from ebbtide.offload.models.safetensors_files import open_folder
from ebbtide.offload.planning.plan import Loaded
from ebbtide.offload.weights import packing
from ebbtide.offload.weights.expert_cache import fewest_slots
from ebbtide.offload.weights.kept_tensors import stored_bytes
from ebbtide.offload.weights.packing import Plain
from ebbtide.offload.weights.skeleton import expected_shapes
from ebbtide.offload.weights.weights import WeightStore, streamed_layers

_ALIGNMENT = 64


@contextmanager
def loaded(folder, tmp_path, **options):
    config = read_model_config(folder)
    checkpoint = open_folder(folder, expected_shapes(config))
    store = WeightStore(config, checkpoint, torch.device("cpu"), spill_dir=tmp_path, **options)
    try:
        yield store
    finally:
        store.close()


def parts(tensor) -> list[torch.Tensor]:
    return [tensor.codes, tensor.scales] if isinstance(tensor, QuantisedWeight) else [tensor]


def num_bytes(tensor) -> int:
    return sum(part.numel() * part.itemsize for part in parts(tensor))


def same(tensors, others) -> bool:
    return tensors.keys() == others.keys() and all(
        torch.equal(a, b)
        for name in tensors
        for a, b in zip(parts(tensors[name]), parts(others[name]), strict=True)
    )


@given(st.integers(1, 200), st.data())
def test_streamed_layers_are_as_many_as_asked_and_evenly_spread(num_layers, data):
    count = data.draw(st.integers(0, num_layers))
    layers = streamed_layers(num_layers, count)
    assert len(layers) == len(set(layers)) == count
    assert layers == sorted(layers) and all(0 <= layer < num_layers for layer in layers)
    if count:
        rounds = [*layers, layers[0] + num_layers]
        gaps = [b - a for a, b in pairwise(rounds)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("shape", [(8, 64), (3, 100), (264, 96)])
@pytest.mark.parametrize("bits", [8, 4])
def test_stored_bytes_are_those_of_a_quantised_matrix(shape, bits):
    real = quantise_weight(torch.randn(shape), bits)
    assert (
        0
        <= stored_bytes("a.weight", shape, Plain(torch.bfloat16), bits) - num_bytes(real)
        < 2 * _ALIGNMENT
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", ["full", "8", "4"])
@pytest.mark.parametrize(
    "name",
    [
        *(
            "llama-biases",
            "gemma2",
            "phi3",
            "glm4",
            "qwen3-moe-dense",
            "mixtral",
            "phi",
            "nanochat",
        ),
        *("cohere-qk-norm", "laguna-moe", "nemotron-h-moe-latent", "lfm3", "stablelm-qk-norm"),
    ],
)
def test_the_plan_counts_the_bytes_that_are_loaded(checkpoint, tmp_path, name, bits, dtype):
    folder = checkpoint(name, dtype=dtype)
    with open_small(folder, tmp_path, weight_bits=bits) as llm:
        llm.logits([1, 2, 3])
        store = llm.admission.weights
        kept = [t for layer in store._resident.values() for t in layer.values()] + store.head.blocks
        real = sum(map(num_bytes, kept))
        slack = 2 * _ALIGNMENT * len(kept)
        assert real <= llm.plan.host["weights"] <= real + slack


@pytest.mark.parametrize("bits", ["full", "8"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe-dense", "gpt-oss", "nemotron-h-moe-latent"])
def test_the_plan_counts_experts_that_are_brought(checkpoint, tmp_path, name, bits):
    with open_small(checkpoint(name), tmp_path, weight_bits=bits) as llm:
        hold_few_experts(llm)
        llm.logits([1, 2, 3])
        store, plan = llm.admission.weights, llm.plan
        kept = [t for layer in store._resident.values() for t in layer.values()] + store.head.blocks
        real = sum(map(num_bytes, kept))
        assert real <= plan.host["weights"] <= real + 2 * _ALIGNMENT * len(kept)
        slots = store._experts._slots + store._experts._passing
        assert sum(slot.buffer.nbytes for slot in slots) == plan.host["routed experts"]
        scratch = 0 if store._scratch is None else os.fstat(store._scratch._file.descriptor).st_size
        assert scratch == plan.disk["weights"]


@pytest.mark.parametrize("held", [(2, True), (2, False), (0, False), "experts"])
@pytest.mark.parametrize("bits", ["full", "8", "4"])
def test_the_plan_counts_what_is_streamed(checkpoint, tmp_path, monkeypatch, bits, held):
    monkeypatch.setattr("ebbtide.offload.weights.output_head.HEAD_BLOCK_ROWS", 100)
    monkeypatch.setattr("ebbtide.offload.planning.footprint.HEAD_BLOCK_ROWS", 100)
    name = "mixtral" if held == "experts" else "llama2"
    with open_small(checkpoint(name), tmp_path, weight_bits=bits) as llm:
        held = Loaded(0, False, fewest_slots(2)) if held == "experts" else Loaded(*held)
        hold(llm, held)
        llm.logits([1, 2, 3])
        store, plan = llm.admission.weights, llm.plan
        buffers = sum(buffer.nbytes for buffer in store._stream._buffers)
        assert buffers == plan.host["weights being streamed"]
        scratch = 0 if store._scratch is None else os.fstat(store._scratch._file.descriptor).st_size
        assert scratch == plan.disk["weights"] and bool(scratch) == (bits != "full")
        assert store.bytes_streamed > 0


@pytest.mark.parametrize("name", ["apertus", "nemotron-h-moe-latent", "nanochat"])
def test_bits_are_chosen_for_tensors_of_any_shape(checkpoint, tmp_path, name):
    """Apertus has numbers of no dimension."""
    with open_small(checkpoint(name), tmp_path, weight_bits="auto") as llm:
        llm.logits([1, 2, 3])
        assert llm.admission.weights._bits is None


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("name", ["phi3", "glm"])
def test_parts_of_a_fused_tensor_are_views_of_it(checkpoint, tmp_path, name, bits):
    with loaded(checkpoint(name), tmp_path, bits=bits) as store:
        layer, c = store.layer(0), store.config
        assert not any("qkv_proj" in n or "gate_up_proj" in n for n in layer)
        gate, up = layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]
        assert gate.shape == up.shape == (c.intermediate_size, c.hidden_size)
        assert all(
            a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
            for a, b in zip(parts(gate), parts(up), strict=True)
        )
        fused = store.checkpoint.read("model.layers.0.mlp.gate_up_proj.weight")
        whole = quantise_weight(fused, bits) if bits else fused
        if bits:
            up, whole = up.rows(0, up.out_features), whole.rows(0, whole.out_features)
        assert torch.equal(up, whole[c.intermediate_size :])


def test_routers_stay_as_they_are(checkpoint, tmp_path):
    with loaded(checkpoint("mixtral", dtype="bfloat16"), tmp_path, bits=4) as store:
        router = store.layer(0)["block_sparse_moe.gate.weight"]
        assert isinstance(router, torch.Tensor) and router.dtype == torch.bfloat16
        assert isinstance(store.layer(0)["block_sparse_moe.experts.5.w2.weight"], QuantisedWeight)


def test_a_token_is_multiplied_with_the_chosen_experts_alone(checkpoint, tmp_path):
    """The speed that a plan promises counts those; the memory counts all."""
    with open_small(checkpoint("qwen3-moe-dense"), tmp_path) as llm:
        facts, c = llm.admission.facts, llm.config
        dense = [layer for layer in range(3) if c.experts_of(layer) is None]
        assert dense == [1]
        expert_bytes = 3 * c.experts[0].intermediate_size * c.hidden_size * 4
        kept, multiplied = sum(facts.layer_sizes), facts.multiplied_bytes(3)
        assert kept - multiplied == 2 * (8 - 3) * expert_bytes
        plan = llm.admission.plan(100)
        assert plan.decode_bytes["host"] - plan.host["near planes"] - plan.kv_far_bytes == (
            multiplied + facts.head_bytes()
        )


def test_the_files_dtype_counts_and_not_what_the_config_says(checkpoint, tmp_path):
    """Some repositories hold float32 tensors under a config.json that says bfloat16."""
    import shutil

    folder = shutil.copytree(checkpoint("llama2"), tmp_path / "model")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"float32"', '"bfloat16"'))
    assert read_model_config(folder).dtype == "bfloat16"
    with open_small(folder, tmp_path) as llm:
        llm.logits([1, 2, 3])
        weights = llm.admission.weights
        kept = [t for layer in weights._resident.values() for t in layer.values()]
        assert llm.plan.host["weights"] >= sum(map(num_bytes, kept + weights.head.blocks))


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("num_streamed", [1, 2, 3])
def test_layers_come_right_in_any_order(checkpoint, tmp_path, bits, num_streamed):
    folder = checkpoint("llama-biases", dtype="bfloat16")
    chance = random.Random(num_streamed)
    order = [0, 1, 2] * 2 + [chance.randrange(3) for _ in range(20)]
    with loaded(folder, tmp_path, bits=bits) as resident:
        with loaded(folder, tmp_path, bits=bits, num_streamed=num_streamed) as streamed:
            assert len(streamed._resident) == 3 - num_streamed
            for layer in order:
                assert same(streamed.layer(layer), resident.layer(layer)), layer
            assert streamed.bytes_streamed > 0
        assert resident.bytes_streamed == 0


@pytest.mark.parametrize("bits", [None, 4])  # from the files, and from a scratch file as well
@pytest.mark.parametrize("options", [{}, {"num_streamed": 2}, {"head_resident": False}])
def test_files_are_forgotten_where_tokens_read_them(
    checkpoint, tmp_path, monkeypatch, bits, options
):
    with loaded(checkpoint("llama3"), tmp_path, bits=bits, **options) as store:
        before = parts_of_layers(store)
        told = []
        monkeypatch.setattr("ebbtide.offload.models.checkpoint.forget", told.append)
        monkeypatch.setattr("ebbtide.offload.weights.tensor_scratch.forget", told.append)
        says = store.forget_files()
        assert bool(told) == bool(options) and says == (not options)
        assert len(told) == len(set(told)) >= 2 * bool(bits and options)
        monkeypatch.undo()
        assert store.forget_files() == hasattr(os, "posix_fadvise") or not options
        after = parts_of_layers(store)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def parts_of_layers(store) -> list[torch.Tensor]:
    """Copies, in the order of layers and names."""
    layers = (store.layer(layer) for layer in range(store.config.num_layers))
    return [p.clone() for tensors in layers for t in tensors.values() for p in parts(t)]


def test_a_layer_stays_while_the_next_one_is_read(checkpoint, tmp_path):
    folder = checkpoint("llama2")
    with loaded(folder, tmp_path) as resident, loaded(folder, tmp_path, num_streamed=3) as store:
        for layer in [0, 1, 2, 0, 1, 2]:
            tensors = store.layer(layer)
            key, reading = store._stream._ahead
            assert key == (layer + 1) % 3 and reading.result()  # the successor is there
            assert same(tensors, resident.layer(layer))


@pytest.mark.parametrize("bits", [None, 8])
def test_a_streamed_head_gives_the_same_logits(checkpoint, tmp_path, monkeypatch, bits):
    monkeypatch.setattr("ebbtide.offload.weights.output_head.HEAD_BLOCK_ROWS", 100)
    folder = checkpoint("qwen2")  # its head is the embedding table
    hidden = torch.randn(32, 64)
    with loaded(folder, tmp_path, bits=bits) as resident:
        with loaded(folder, tmp_path, bits=bits, head_resident=False) as streamed:
            assert torch.equal(streamed.logits(hidden), resident.logits(hidden))
            ids = [0, 99, 100, 263, 5]
            assert torch.equal(streamed.embed(ids), resident.embed(ids))
            table = resident.checkpoint.read("model.embed_tokens.weight")
            assert torch.equal(resident.embed(ids), table[ids].float())
            each = [streamed.embed([token]) for token in ids]  # none is another's memory
            assert torch.equal(torch.cat(each), table[ids].float())


def test_one_tensor_at_a_time_is_read_while_quantising(checkpoint, tmp_path, monkeypatch):
    """Loading peaks at a tensor above what is kept: its rows, or some of them, are quantised before
    the next are read."""
    events = []
    read, quantise = Checkpoint.read_raw, packing.quantise_weight
    monkeypatch.setattr(Checkpoint, "read_raw", lambda s, *a: events.append("read") or read(s, *a))
    monkeypatch.setattr(
        packing,
        "quantise_weight",
        lambda *args: events.append("quantise") or quantise(*args),
    )
    with loaded(checkpoint("llama2"), tmp_path, bits=8) as store:
        config = store.config
    per_layer = 7  # matrices
    assert events.count("quantise") >= per_layer * config.num_layers + 1  # and the head
    at = [i for i, event in enumerate(events) if event == "quantise"][:-1]
    assert all(events[i - 1] == "read" for i in at)


def test_the_scratch_file_has_no_name(checkpoint, tmp_path):
    with loaded(checkpoint("llama2"), tmp_path, bits=8, num_streamed=2) as store:
        assert list(tmp_path.iterdir()) == []
        file = store._scratch._file
        assert os.fstat(file.descriptor).st_size >= 2 * store._layer_bytes(store._streamed[0])
    assert file._file.closed and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_in_the_scratch_file_is_not_in_memory(checkpoint, tmp_path, bits):
    with loaded(checkpoint("llama2"), tmp_path, bits=bits, num_streamed=3) as store:
        groups = store._scratch._groups.values()
        made = [rebuild for group in groups for *_, rebuild in group.tensors if rebuild.__closure__]
        kept = [cell.cell_contents for rebuild in made for cell in rebuild.__closure__]
        assert len(kept) == 3 * 7  # matrices
        assert all(w.codes.untyped_storage().nbytes() == 0 for w in kept)
        assert all(w.scales.untyped_storage().nbytes() == 0 for w in kept)


def test_a_scratch_file_that_shrank_is_a_storage_error(checkpoint, tmp_path):
    with loaded(checkpoint("llama2"), tmp_path, bits=8, num_streamed=2) as store:
        os.truncate(store._scratch._file.descriptor, 1000)
        with pytest.raises(StorageError, match="shorter than what was written"):
            for _ in range(3):
                for layer in store._streamed:
                    store.layer(layer)


@pytest.mark.parametrize("name", ["llama2", "gemma2"])
@pytest.mark.parametrize("num_streamed", [0, 2])
def test_loading_is_reported_to_its_end(checkpoint, tmp_path, name, num_streamed):
    """The output head counts too: a bar that is full is the end."""
    seen = []
    options = {"on_load": lambda *p: seen.append(p), "num_streamed": num_streamed, "bits": 8}
    with loaded(checkpoint(name), tmp_path, **options) as store:
        refs = store.checkpoint.refs
        total = sum(r.num_bytes for n, r in refs.items() if n.startswith("model.layers."))
        total += refs[store.head._name].num_bytes
    assert seen[-1] == (total, total) and [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert {t for _, t in seen} == {total} and seen[-2][0] < total

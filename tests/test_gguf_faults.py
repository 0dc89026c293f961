"""GGUF files that hold what nobody reads, or what does not fit: refused by name."""

from __future__ import annotations

from dataclasses import replace

import gguf_writer
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_writer import rewritten, write
from small_llm import open_small

from ebbtide.offload.errors import BadCheckpoint, UnsupportedModel
from ebbtide.offload.models.model_files import open_model_files
from ebbtide.offload.weights.skeleton import expected_shapes

ONE = np.ones(4, np.float32)


def with_tensor(path, out, added):
    def first_too(name, data, kind):
        beside = [(added, ONE, Kind.F32)] if name == "token_embd.weight" else []
        return [(name, data, kind), *beside]

    return rewritten(path, out, first_too)


def test_llama_4_without_experts_is_refused(checkpoint, tmp_path):
    """What its files mean by what they do not say is not known."""
    path = write(checkpoint("llama4"), tmp_path / "model.gguf")
    with pytest.raises(UnsupportedModel, match="without experts"):
        open_small(path, tmp_path)


@pytest.mark.parametrize(
    ("added", "says"),
    [
        ("blk.1.ffn_down.scale", "has a scale of its own, 'blk.1.ffn_down.scale'"),
        ("blk.0.attn_q.input_scale", "a scale of its own"),
        ("blk.0.ffn_down.bias", "has a tensor, 'blk.0.ffn_down.bias'"),
        ("blk.0.attn_norm.bias", "would be wrong"),
        ("blk.2.attn_post_norm.weight", "Use another quantisation"),
        ("output.scale", "a scale of its own"),
        ("output_norm.bias", "without which"),
        ("token_embd.scale", "a scale of its own"),
        ("position_embd.weight", "a tensor"),
    ],
)
def test_a_tensor_that_nobody_reads_is_refused(checkpoint, tmp_path, added, says):
    path = write(checkpoint("llama2"), tmp_path / "model.gguf")
    path = with_tensor(path, tmp_path / "more.gguf", added)
    with pytest.raises(UnsupportedModel) as caught, open_small(path, tmp_path):
        pass
    assert says in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    "added",
    [
        "blk.0.rope_freqs.weight",
        "blk.0.attn_rot_embd.weight",
        "blk.99.nextn.eh_proj.weight",
        "mm.0.bias",
    ],
)
def test_tensors_that_change_no_number_are_left_alone(checkpoint, tmp_path, added):
    path, found = write(checkpoint("llama2"), tmp_path / "model.gguf"), []
    for file in (path, with_tensor(path, tmp_path / "more.gguf", added)):
        with open_small(file, tmp_path) as llm:
            found.append(llm.logits(list(range(150))))
    assert torch.equal(*found)


def test_nvfp4_is_refused_by_its_name(checkpoint, tmp_path):
    path = write(checkpoint("llama2"), tmp_path / "model.gguf")

    def blocks(name, data, kind):
        if name != "blk.0.ffn_down.weight":
            return [(name, data, kind)]
        return [(name, np.zeros((len(data), data.shape[1] // 64 * 36), np.uint8), Kind.NVFP4)]

    path = rewritten(path, tmp_path / "nvfp4.gguf", blocks)
    with pytest.raises(UnsupportedModel, match=r"down_proj\.weight is in NVFP4"):
        open_small(path, tmp_path)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("qwen3.5", "ssm_conv1d.weight"),
        ("granite4-h", "ssm_conv1d.weight"),
        ("lfm2", "shortconv.conv.weight"),
    ],
)
def test_convolutions_in_blocks_are_a_damaged_file(checkpoint, tmp_path, monkeypatch, name, part):
    """Theirs are of 32 numbers, and a channel's are four."""
    plain = gguf_writer.packed

    def packed(numbers, kind):
        return plain(numbers.reshape(-1, 32), "Q8_0") if kind == part else plain(numbers, kind)

    monkeypatch.setattr(gguf_writer, "packed", packed)
    monkeypatch.setattr(gguf_writer, "_is_quantised", lambda name, tensor, kind: kind == part)
    path = write(checkpoint(name), tmp_path / "m.gguf", others={part: part})
    with pytest.raises(BadCheckpoint, match="in blocks of 32 numbers, which do not fit it"):
        open_small(path, tmp_path)


def test_quantised_vectors_of_heads_apart_are_a_damaged_file(checkpoint, tmp_path, monkeypatch):
    """A block holds what belongs to several heads, whose order would change."""
    folder = checkpoint("qwen3.5")
    path = write(folder, tmp_path / "m.gguf")
    files = open_model_files(path)
    config = files.config()
    tensors, name = files.header.tensors, "blk.0.ssm_dt.bias"
    tensors[name] = replace(tensors[name], kind="Q8_0", block=32, block_bytes=34)
    with pytest.raises(BadCheckpoint, match="in blocks of 32 numbers, which do not fit it"):
        files.checkpoint(config, expected_shapes(config))


def test_a_tensor_of_another_shape_is_the_metadata_s_word_against_it(checkpoint, tmp_path):
    folder = checkpoint("llama2")
    path = write(folder, tmp_path / "m.gguf", arch__vocab_size=None)
    files = open_model_files(path)
    config = files.config()
    shapes = {**expected_shapes(config), "model.norm.weight": (7,)}
    with pytest.raises(BadCheckpoint, match=r"but the file's metadata asks for \[7\]"):
        files.checkpoint(config, shapes)

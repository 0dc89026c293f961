"""Loading a sharded checkpoint peaks at one tensor above the resident weights, and one layer where
some go to a scratch file: measured in a process of its own, by the kernel's count.
"""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys

import pytest

HIDDEN, INNER, LAYERS, MiB = 1024, 6144, 4, 1 << 20
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 4096,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
}
LARGEST_BYTES = HIDDEN * INNER * 2  # of a tensor in the files: 12 MiB

PROGRAM = """
import re, sys
from pathlib import Path
import torch
from ebbtide.offload.models.model_config import read_model_config
from ebbtide.offload.models.safetensors_files import open_folder
from ebbtide.offload.weights.skeleton import expected_shapes
from ebbtide.offload.weights.weights import WeightStore

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

torch.set_num_threads(4)
folder, bits = Path(sys.argv[1]), None if sys.argv[2] == "full" else int(sys.argv[2])
streams = dict(num_streamed=int(sys.argv[3]), spill_dir=Path(sys.argv[4]))
config = read_model_config(folder)
def load():
    checkpoint = open_folder(folder, expected_shapes(config), quantisation=config.quantisation)
    return WeightStore(config, checkpoint, torch.device("cpu"), bits=bits, **streams)
load().close()  # what only the first time takes: pages of libraries, the allocator's own
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
store = load()
print(status("VmHWM") - before, status("VmRSS") - before)
"""


def plain(name: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: ("BF16", shape)}


def packed(method: str):
    """A matrix of a layer as a format has it, its groups of 128 inputs."""

    def parts(name: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        if len(shape) != 2 or "layers" not in name:
            return plain(name, shape)
        (rows, columns), module = shape, name.removesuffix(".weight")
        groups = columns // 128
        if method == "fp8":
            scales = -(-rows // 128), groups
            return {name: ("F8_E4M3", shape), module + ".weight_scale_inv": ("F32", scales)}
        awq = method == "awq"
        made = {
            ".qweight": ("I32", (columns, rows // 8) if awq else (columns // 8, rows)),
            ".qzeros": ("I32", (groups, rows // 8)),
            ".scales": ("F16", (groups, rows)),
        }
        made |= {} if awq else {".g_idx": ("I32", (columns,))}
        return {module + end: of for end, of in made.items()}

    return parts


def write(folder, parts, **more):
    """Weights of zeros in sparse files: 144 MiB that no disk holds."""
    from ebbtide.offload.models.model_config import read_model_config
    from ebbtide.offload.weights.skeleton import expected_shapes

    (folder / "config.json").write_text(json.dumps({**CONFIG, **more}))
    shards, places = {}, {}
    for number, (name, shape) in enumerate(expected_shapes(read_model_config(folder)).items()):
        shards.setdefault(f"model-{number % 5}.safetensors", {}).update(parts(name, shape))
    sizes = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "F8_E4M3": 1}
    for file, tensors in shards.items():
        header, offset = {}, 0
        for name, (dtype, shape) in tensors.items():
            end = offset + sizes[dtype] * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            offset, places[name] = end, file
        text = json.dumps(header).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(folder / file, 8 + len(text) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def measured(folder, bits: str, num_streamed: int = 0) -> tuple[int, int]:
    """The most that loading took, and what stays, bytes."""
    program = [sys.executable, "-c", PROGRAM, str(folder), bits, str(num_streamed), str(folder)]
    # What is live is counted, not what glibc's allocator keeps for next time (up to 15 MiB).
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(program, capture_output=True, text=True, check=True, env=environment)
    peak_bytes, stays_bytes = map(int, done.stdout.split())
    return peak_bytes, stays_bytes


needs_proc = pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc"
)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False}
MATRICES = LAYERS * (3 * INNER + 4 * HIDDEN) * HIDDEN


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sharded"), plain)


@needs_proc
@pytest.mark.parametrize(("bits", "kept"), [("full", 1.0), ("8", 17 / 32), ("4", 9 / 32)])
def test_loading_peaks_at_one_tensor_above_what_stays(folder, bits, kept):
    peak_bytes, stays_bytes = measured(folder, bits)
    head = 4096 * HIDDEN * 2 * (1.0 if bits == "full" else 17 / 32)
    kept_bytes = MATRICES * 2 * kept + head
    # The kernel counts resident pages in batches for each processor: /proc may be some 64 behind.
    assert kept_bytes - MiB <= stays_bytes <= peak_bytes + MiB
    # Beside the tensor: a few copies of a mebibyte of rows, and vectors.
    assert peak_bytes < kept_bytes + LARGEST_BYTES + 6 * MiB


@needs_proc
@pytest.mark.parametrize(("bits", "kept"), [("8", 17 / 32), ("4", 9 / 32)])
def test_what_is_converted_once_passes_through_the_memory_of_one_layer(folder, bits, kept):
    peak_bytes, _ = measured(folder, bits, num_streamed=LAYERS)
    head = 4096 * HIDDEN * 2 * 17 / 32
    assert peak_bytes < MATRICES // LAYERS * 2 * kept + head + LARGEST_BYTES + 6 * MiB


@needs_proc
@pytest.mark.parametrize(
    ("said", "bits_in_file", "kept_bits"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4.16, 5),
        ({**GPTQ, "desc_act": False}, 4.16, 5),
        ({**GPTQ, "desc_act": True}, 4.16, 8.5),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8.01, 8.5),
    ],
)
def test_what_is_packed_already_peaks_no_higher(tmp_path, said, bits_in_file, kept_bits):
    folder = write(tmp_path, packed(said["quant_method"]), quantization_config=said)
    if said["quant_method"] == "gptq" and not said["desc_act"]:
        name_groups(folder)
    peak_bytes, stays_bytes = measured(folder, "8")
    kept_bytes = MATRICES * kept_bits / 8 + 4096 * HIDDEN * 2 * 17 / 32
    assert kept_bytes - MiB <= stays_bytes <= peak_bytes + MiB
    # The head's block is the largest tensor that is converted: 8 MiB. Scales and zeros in float32
    # are a part of a tensor's.
    largest = max(HIDDEN * INNER * bits_in_file / 8 * 1.5, 4096 * HIDDEN * 2)
    assert peak_bytes < kept_bytes + largest + 6 * MiB


def name_groups(folder) -> None:
    """Write the group of each input, where groups are 128 neighbours."""
    for file in folder.glob("*.safetensors"):
        with open(file, "r+b") as out:
            (length,) = struct.unpack("<Q", out.read(8))
            for name, entry in json.loads(out.read(length)).items():
                if name.endswith(".g_idx"):
                    index = (i // 128 for i in range(entry["shape"][0]))
                    out.seek(8 + length + entry["data_offsets"][0])
                    out.write(struct.pack(f"<{entry['shape'][0]}i", *index))

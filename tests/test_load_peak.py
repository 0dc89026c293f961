"""Loading a sharded checkpoint peaks at one tensor above the resident weights: measured in a
process of its own, by the kernel's count.
"""

from __future__ import annotations

import json
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
from ebbtide.offload.model_config import read_model_config
from ebbtide.offload.safetensors_files import open_folder
from ebbtide.offload.skeleton import expected_shapes
from ebbtide.offload.weights import WeightStore

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

torch.set_num_threads(1)
folder, bits = Path(sys.argv[1]), None if sys.argv[2] == "full" else int(sys.argv[2])
config = read_model_config(folder)
def load():
    checkpoint = open_folder(folder, expected_shapes(config))
    return WeightStore(config, checkpoint, torch.device("cpu"), bits=bits)
load().close()  # what only the first time takes: pages of libraries, the allocator's own
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
store = load()
print(status("VmHWM") - before, status("VmRSS") - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of zeros in sparse files: 144 MiB that no disk holds."""
    from ebbtide.offload.model_config import read_model_config
    from ebbtide.offload.skeleton import expected_shapes

    folder = tmp_path_factory.mktemp("sharded")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shards, places = {}, {}
    for number, (name, shape) in enumerate(expected_shapes(read_model_config(folder)).items()):
        shards.setdefault(f"model-{number % 5}.safetensors", {})[name] = shape
    for file, shapes in shards.items():
        header, offset = {}, 0
        for name, shape in shapes.items():
            size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": [offset, offset + size],
            }
            offset, places[name] = offset + size, file
        text = json.dumps(header).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(folder / file, 8 + len(text) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
@pytest.mark.parametrize(("bits", "kept"), [("full", 1.0), ("8", 17 / 32), ("4", 9 / 32)])
def test_loading_peaks_at_one_tensor_above_what_stays(folder, bits, kept):
    program = [sys.executable, "-c", PROGRAM, str(folder), bits]
    # What is live is counted, not what glibc's allocator keeps for next time (up to 15 MiB).
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(program, capture_output=True, text=True, check=True, env=environment)
    peak_bytes, stays_bytes = map(int, done.stdout.split())
    matrices = LAYERS * (3 * INNER + 4 * HIDDEN) * HIDDEN * 2
    kept_bytes = matrices * kept + 4096 * HIDDEN * 2 * (1.0 if bits == "full" else 17 / 32)
    # The kernel counts resident pages in batches for each processor: /proc may be some 64 behind.
    assert kept_bytes - MiB <= stays_bytes <= peak_bytes + MiB
    # Beside the tensor: a few copies of a mebibyte of rows, and vectors.
    assert peak_bytes < kept_bytes + LARGEST_BYTES + 6 * MiB

"""Loading a GGUF file peaks at one tensor above the resident weights, however they are packed:
measured in a process of its own, by the kernel's count.
"""

from __future__ import annotations

import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

HIDDEN, INNER, LAYERS, VOCABULARY, MiB = 1024, 6144, 4, 4096, 1 << 20
# Bytes of a number as it is kept, by the file's type and the bits that are asked for.
KEPT = {
    ("F16", None): 2,
    ("Q8_0", None): 17 / 16,
    ("Q8_0", 4): 9 / 16,
    ("Q4_0", 8): 9 / 16,
    ("Q4_K", 8): 10 / 16,
    ("Q6_K", 8): 17 / 16,
    ("Q6_K", 4): 9 / 16,
}

PROGRAM = """
import re, sys
from pathlib import Path
import torch
from ebbtide.offload.models.model_files import open_model_files
from ebbtide.offload.weights.skeleton import expected_shapes
from ebbtide.offload.weights.weights import WeightStore

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

torch.set_num_threads(4)
path, bits = Path(sys.argv[1]), None if sys.argv[2] == "None" else int(sys.argv[2])
files = open_model_files(path)
config = files.config()
def load():
    checkpoint = files.checkpoint(config, expected_shapes(config))
    return WeightStore(config, checkpoint, torch.device("cpu"), bits=bits)
load().close()  # what only the first time takes: pages of libraries, the allocator's own
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
store = load()
print(status("VmHWM") - before, status("VmRSS") - before)
"""


def write(path, kind: str) -> int:
    """A Llama of zeros in a sparse file; the bytes of its largest tensor."""
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(8)
    writer.add_head_count_kv(8)
    writer.add_layer_norm_rms_eps(1e-5)
    block, block_bytes = gguf.GGML_QUANT_SIZES[Kind[kind]]
    shapes = {"token_embd": (VOCABULARY, HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        square = ("attn_q", "attn_k", "attn_v", "attn_output")
        shapes |= {f"blk.{layer}.{name}": (HIDDEN, HIDDEN) for name in square}
        shapes |= {f"blk.{layer}.{name}": (INNER, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{layer}.ffn_down"] = (HIDDEN, INNER)
        shapes |= {f"blk.{layer}.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
    size = 0
    for name, shape in shapes.items():
        if len(shape) == 1:
            stored, dtype, num_bytes, raw = shape, np.float32, 4 * shape[0], Kind.F32
        elif kind == "F16":
            stored, dtype, num_bytes, raw = shape, np.float16, 2 * shape[0] * shape[1], Kind.F16
        else:
            row_bytes = shape[1] // block * block_bytes
            stored, dtype, raw = (shape[0], row_bytes), np.uint8, Kind[kind]
            num_bytes = shape[0] * row_bytes
        writer.add_tensor_info(f"{name}.weight", stored, np.dtype(dtype), num_bytes, raw)
        size += -(-num_bytes // 32) * 32
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, -(-path.stat().st_size // 32) * 32 + size)
    return INNER * HIDDEN // block * block_bytes


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
@pytest.mark.parametrize(("kind", "bits"), KEPT)
def test_loading_peaks_at_one_tensor_above_what_stays(tmp_path, kind, bits):
    largest_bytes = write(tmp_path / "m.gguf", kind)
    program = [sys.executable, "-c", PROGRAM, str(tmp_path / "m.gguf"), str(bits)]
    # What is live is counted, not what glibc's allocator keeps for next time (up to 15 MiB).
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(program, capture_output=True, text=True, check=True, env=environment)
    peak_bytes, stays_bytes = map(int, done.stdout.split())
    numbers = (LAYERS * (3 * INNER + 4 * HIDDEN) + VOCABULARY) * HIDDEN
    head = 17 / 16 if bits == 4 else KEPT[kind, bits]  # which has 8 bits where others have 4
    kept_bytes = numbers * KEPT[kind, bits] + VOCABULARY * HIDDEN * (head - KEPT[kind, bits])
    # The kernel counts resident pages in batches for each processor: /proc may be some 64 behind.
    assert kept_bytes - MiB <= stays_bytes <= peak_bytes + MiB
    # Beside the tensor: some copies of a few rows, decoded.
    assert peak_bytes < kept_bytes + largest_bytes + 10 * MiB

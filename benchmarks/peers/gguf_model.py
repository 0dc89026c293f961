"""A GGUF file of the same shape as a checkpoint folder, with random weights, for llama.cpp.

    python benchmarks/peers/gguf_model.py FOLDER OUT [--bits 4|8|16]

Matrices are Q4_0, Q8_0 or F16; embedding and head (one tensor: they are tied) are Q8_0 where the
matrices have fewer bits than that, as Ebbtide keeps its own. Codes are drawn at random in the
format itself: speed depends on shapes alone. Reads config.json of FOLDER and nothing else of it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

GROUP = 32  # weights that share a scale in Q4_0 and Q8_0


def write(folder: Path, out: Path, bits: int) -> Path:
    """Write the file, and return its path. bits: of the matrices; 4, 8 or 16."""
    c = json.loads((folder / "config.json").read_text())
    draw = _Draw(np.random.default_rng(0))
    writer = GGUFWriter(str(out), "llama")
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_key_length(c["head_dim"])
    writer.add_value_length(c["head_dim"])
    writer.add_rope_dimension_count(c["head_dim"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_vocab_size(c["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, rows: int, columns: int, bits: int = bits) -> None:
        kind, data = draw.matrix(rows, columns, bits)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)

    hidden, wide = c["hidden_size"], c["intermediate_size"]
    q, kv = (c[f"num_{n}_heads"] * c["head_dim"] for n in ("attention", "key_value"))
    add("token_embd", c["vocab_size"], hidden, max(bits, 8))
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(c["num_hidden_layers"]):
        prefix = f"blk.{layer}."
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{prefix}{norm}.weight", np.ones(hidden, np.float32))
        for name, rows, columns in (
            ("attn_q", q, hidden),
            ("attn_k", kv, hidden),
            ("attn_v", kv, hidden),
            ("attn_output", hidden, q),
            ("ffn_gate", wide, hidden),
            ("ffn_up", wide, hidden),
            ("ffn_down", hidden, wide),
        ):
            add(prefix + name, rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


class _Draw:
    """Random matrices, already in GGUF's formats."""

    def __init__(self, generator: np.random.Generator):
        self._generator = generator

    def matrix(self, rows: int, columns: int, bits: int):
        """Its type and its data; elements have a standard deviation of about columns ** -0.5."""
        if bits == 16:
            values = self._generator.standard_normal((rows, columns), np.float32)
            return GGMLQuantizationType.F16, (values * columns**-0.5).astype(np.float16)
        # Q4_0 and Q8_0: a float16 scale, then the codes of 32 weights.
        spread = 4.6 if bits == 4 else 73.9  # the standard deviation of codes drawn evenly
        blocks = np.empty((rows, columns // GROUP, 2 + GROUP * bits // 8), np.uint8)
        blocks[..., 2:] = self._generator.integers(0, 256, blocks[..., 2:].shape, np.uint8)
        scale = np.array([columns**-0.5 / spread], np.float16)
        blocks[..., :2] = scale.view(np.uint8)
        kind = GGMLQuantizationType.Q4_0 if bits == 4 else GGMLQuantizationType.Q8_0
        return kind, blocks.reshape(rows, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, choices=(4, 8, 16), default=4)
    given = parser.parse_args()
    print(f"{write(given.folder, given.out, given.bits)}: {given.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

"""A GGUF file of the same shape as a checkpoint folder, with random weights, for llama.cpp.

    python benchmarks/peers/gguf_model.py FOLDER OUT [--bits 4|8|16] [--kind Q4_K|IQ4_XS|...]

Matrices are Q4_0, Q8_0 or F16, or of the type that is named; embedding and head (one tensor: they
are tied) are Q8_0 where the matrices have fewer bits than that, as Ebbtide keeps its own. Codes are
drawn at random in the format itself: speed depends on shapes alone. Reads config.json of FOLDER and
nothing else of it: of Llama, Qwen3.5, Granite 4 H, LFM2 or gpt-oss, whose experts are MXFP4.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, RopeScalingType

from ebbtide.offload.models.layer_config import ScanShape
from ebbtide.offload.models.model_config import read_model_config

GROUP = 32  # weights that share a scale in Q4_0 and Q8_0
# Where the float16 numbers of a block lie, if not at its start alone.
HALVES = {
    **{"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)},
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)},
}

ARCHITECTURES = {
    "llama": "llama",
    "qwen3_5_text": "qwen35",
    "granitemoehybrid": "granitehybrid",
    "lfm2": "lfm2",
    "jamba": "jamba",
    "gpt_oss": "gpt-oss",
}


def write(folder: Path, out: Path, bits: int, named: str | None = None) -> Path:
    """Write the file, and return its path. bits: of the matrices; 4, 8 or 16. named: their type,
    but for embedding and head."""
    c = json.loads((folder / "config.json").read_text())
    draw = _Draw(np.random.default_rng(0))
    architecture = ARCHITECTURES[c["model_type"]]
    writer = GGUFWriter(str(out), architecture)
    config = read_model_config(folder)
    hidden, wide, layers = config.hidden_size, config.intermediate_size, config.num_layers
    attends = [layer in config.kv_layers for layer in range(layers)]
    kv_heads = [config.num_kv_heads * here for here in attends]
    has_positions = config.ropes[config.kv_layers[0]] is not None
    writer.add_block_count(layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(config.num_heads)
    uniform = architecture in ("llama", "qwen35", "gpt-oss")
    writer.add_head_count_kv(config.num_kv_heads if uniform else kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    share = config.ropes[config.kv_layers[0]].share if has_positions else 1.0
    writer.add_rope_dimension_count(int(config.head_dim * share))
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    experts = config.experts_of(0)
    if experts is not None:
        writer.add_expert_count(experts.count)
        writer.add_expert_used_count(experts.chosen)
        writer.add_expert_feed_forward_length(experts.intermediate_size)
        writer.add_sliding_window(config.windows[0])
        scaling = config.ropes[0].parameters
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if config.recurrent:
        _add_recurrent_keys(writer, architecture, c, config.recurrent[0])

    def add(name: str, rows: int, columns: int, bits: int = bits, named: str | None = None) -> None:
        if named is None:
            kind, data = draw.matrix(rows, columns, bits)
        else:
            kind, data = GGMLQuantizationType[named], draw.blocks(rows, columns, named)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)

    def add_floats(name: str, *shape: int) -> None:
        number = 0.1 if "conv" in name else -1.0 if name.endswith(".ssm_a") else 1.0
        writer.add_tensor(name, np.full(shape, number, np.float32))

    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    add("token_embd", config.vocab_size, hidden, max(bits, 8))
    if not config.tied_embeddings:
        add("output", config.vocab_size, hidden, max(bits, 8))
    add_floats(f"{'token_embd' if architecture == 'lfm2' else 'output'}_norm.weight", hidden)
    with_post_norm = ("qwen35", "gpt-oss")
    after = "post_attention_norm" if architecture in with_post_norm else "ffn_norm"
    for layer in range(layers):
        prefix, recurrence = f"blk.{layer}.", config.recurrence_of(layer)
        for norm in ("attn_norm", after):
            add_floats(f"{prefix}{norm}.weight", hidden)
        matrices = []
        if experts is None:
            matrices += [
                ("ffn_gate", wide, hidden),
                ("ffn_up", wide, hidden),
                ("ffn_down", hidden, wide),
            ]
        else:
            _add_experts(writer, draw, prefix, config, experts)
        if recurrence is None:
            matrices += [
                ("attn_q", q * (1 + config.output_gate), hidden),
                ("attn_k", kv, hidden),
                ("attn_v", kv, hidden),
                ("attn_output", hidden, q),
            ]
            if config.qk_norm:
                add_floats(f"{prefix}attn_q_norm.weight", config.head_dim)
                add_floats(f"{prefix}attn_k_norm.weight", config.head_dim)
        else:
            matrices += _recurrent_matrices(recurrence, hidden)
            for name, shape in _recurrent_floats(recurrence):
                add_floats(prefix + name, *shape)
        for name, rows, columns in matrices:
            add(prefix + name, rows, columns, named=named)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _add_recurrent_keys(writer: GGUFWriter, architecture: str, c: dict, r) -> None:
    """What a hybrid's file says besides. r: of its recurrent layers, which are alike."""
    shape = r.shape
    if shape is None:
        writer.add_shortconv_l_cache(r.conv_width)
        return
    writer.add_ssm_conv_kernel(r.conv_width)
    writer.add_ssm_inner_size(shape.values)
    if isinstance(shape, ScanShape):
        writer.add_ssm_state_size(shape.dim)
        writer.add_ssm_time_step_rank(shape.rank)
        return
    writer.add_ssm_state_size(shape.key_dim)
    writer.add_ssm_time_step_rank(shape.heads)
    writer.add_ssm_group_count(shape.key_heads)
    if architecture == "qwen35":
        writer.add_full_attention_interval(c["full_attention_interval"])
        writer.add_rope_dimension_sections([11, 11, 10, 0])
    else:
        for add in (writer.add_logit_scale, writer.add_residual_scale, writer.add_embedding_scale):
            add(1.0)
        writer.add_attention_scale(c["head_dim"] ** -0.5)


def _recurrent_matrices(r, hidden: int) -> list[tuple[str, int, int]]:
    shape = r.shape
    if shape is None:
        return [
            ("shortconv.in_proj", 3 * r.channels, hidden),
            ("shortconv.out_proj", hidden, r.channels),
        ]
    out = ("ssm_out", hidden, shape.values)
    if isinstance(shape, ScanShape):
        few = shape.rank + 2 * shape.dim
        small = [("ssm_x", few, shape.channels), ("ssm_dt", shape.channels, shape.rank)]
        return [("ssm_in", 2 * shape.channels, hidden), *small, out]
    if not shape.is_delta:
        return [("ssm_in", shape.values + shape.channels + shape.heads, hidden), out]
    small = [(f"ssm_{name}", shape.heads, hidden) for name in ("alpha", "beta")]
    return [("attn_qkv", shape.channels, hidden), ("attn_gate", shape.values, hidden), *small, out]


def _recurrent_floats(r) -> list[tuple[str, tuple[int, ...]]]:
    shape = r.shape
    if shape is None:
        return [("shortconv.conv.weight", (r.channels, r.conv_width))]
    if isinstance(shape, ScanShape):
        channels, sizes = shape.channels, {"dt": shape.rank, "b": shape.dim, "c": shape.dim}
        return [
            ("ssm_conv1d.weight", (channels, r.conv_width)),
            ("ssm_conv1d.bias", (channels,)),
            ("ssm_dt.bias", (channels,)),
            ("ssm_a", (channels, shape.dim)),
            ("ssm_d", (channels,)),
            *((f"ssm_{name}_norm.weight", (size,)) for name, size in sizes.items()),
        ]
    floats = [("ssm_conv1d.weight", (r.channels, r.conv_width)), ("ssm_dt.bias", (shape.heads,))]
    if shape.is_delta:
        return [*floats, ("ssm_a", (shape.heads,)), ("ssm_norm.weight", (shape.value_dim,))]
    norm = (shape.key_heads, shape.values // shape.key_heads)
    of_heads = [("ssm_a", (shape.heads, 1)), ("ssm_d", (shape.heads, 1))]
    return [*floats, *of_heads, ("ssm_norm.weight", norm), ("ssm_conv1d.bias", (r.channels,))]


def _add_experts(writer: GGUFWriter, draw: _Draw, prefix: str, config, experts) -> None:
    """gpt-oss's: everything of a layer that has biases, and experts in MXFP4."""
    hidden, inner, count = config.hidden_size, experts.intermediate_size, experts.count
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    router = draw.matrix(count, hidden, 16)[1].astype(np.float32)
    writer.add_tensor(f"{prefix}ffn_gate_inp.weight", router)
    biases = {"attn_q": q, "attn_k": kv, "attn_v": kv, "attn_output": hidden, "ffn_gate_inp": count}
    for name, size in biases.items():
        writer.add_tensor(f"{prefix}{name}.bias", np.zeros(size, np.float32))
    writer.add_tensor(f"{prefix}attn_sinks.weight", np.ones(config.num_heads, np.float32))
    for name, rows, columns in (
        ("ffn_gate_exps", inner, hidden),
        ("ffn_up_exps", inner, hidden),
        ("ffn_down_exps", hidden, inner),
    ):
        data = draw.mxfp4(count, rows, columns)
        writer.add_tensor(f"{prefix}{name}.weight", data, raw_dtype=GGMLQuantizationType.MXFP4)
        writer.add_tensor(f"{prefix}{name}.bias", np.zeros((count, rows), np.float32))


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

    def blocks(self, rows: int, columns: int, named: str) -> np.ndarray:
        """Of any other type: for what loading takes; its numbers are of no use."""
        size, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[named]]
        shape = (rows, columns // size, num_bytes)
        blocks = self._generator.integers(0, 256, shape, np.uint8)
        for at in HALVES.get(named, (0,)):
            blocks[..., at : at + 2] = np.array([1e-4], np.float16).view(np.uint8)
        return blocks.reshape(rows, -1)

    def mxfp4(self, count: int, rows: int, columns: int) -> np.ndarray:
        """A byte for the exponent, then the codes of 32 weights."""
        blocks = np.empty((count, rows, columns // GROUP, 1 + GROUP // 2), np.uint8)
        blocks[..., 1:] = self._generator.integers(0, 256, blocks[..., 1:].shape, np.uint8)
        blocks[..., 0] = 127 - 7
        return blocks.reshape(count, rows, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, choices=(4, 8, 16), default=4)
    parser.add_argument("--kind", choices=[kind.name for kind in GGML_QUANT_SIZES], metavar="TYPE")
    given = parser.parse_args()
    path = write(given.folder, given.out, given.bits, given.kind)
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

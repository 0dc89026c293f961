"""Writes checkpoints of a real model's shape with random weights, for benchmarks without a hub.

    python benchmarks/checkpoints.py smollm2-135m OUT [--positions N] [--layers N] [--seed N]

Speed and memory depend on shapes alone, so random weights measure as real ones do; what such a
model says is noise. Needs no transformers. The tokenizer of SmolLM2 is copied from
../shared/data/tokenizers where that exists; else the built-in one serves, whose ids are valid too.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

REPO = Path(__file__).resolve().parent.parent
SMOLLM2_TOKENIZER = REPO.parent / "shared" / "data" / "tokenizers" / "smollm2" / "tokenizer.json"
BUILTIN_TOKENIZER = REPO / "offload" / "builtin" / "model" / "tokenizer.json"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """A model's shape, by the names of its config.json. model_type: llama, or qwen2, which has
    biases."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float
    max_position_embeddings: int
    model_type: str = "llama"


SHAPES = {
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 64, 49152, 100000.0, 8192),
    "smollm2-360m": Shape(32, 960, 2560, 15, 5, 64, 49152, 100000.0, 8192),
    # Little arithmetic for its keys: documents of 64k tokens in minutes, to measure memory with.
    "narrow": Shape(16, 192, 256, 3, 3, 64, 49152, 500000.0, 131072),
    "llama-3.2-1b": Shape(16, 2048, 8192, 32, 8, 64, 128256, 500000.0, 131072),
    "llama-3.2-3b": Shape(28, 3072, 8192, 24, 8, 128, 128256, 500000.0, 131072),
    "qwen2.5-1.5b": Shape(28, 1536, 8960, 12, 2, 128, 151936, 1e6, 131072, "qwen2"),
}


@dataclass(frozen=True)
class Other:
    """A model of another family. fields: of its config.json, besides `shape`'s or in place of
    them."""

    shape: Shape
    architecture: str
    fields: dict


_GRANITE_H_KINDS = ["attention" if layer % 10 == 5 else "mamba" for layer in range(40)]
OTHERS = {
    "qwen3.5-0.8b": Other(
        Shape(24, 1024, 3584, 8, 2, 256, 248320, 1e7, 262144),
        "Qwen3_5ForCausalLM",
        {
            "model_type": "qwen3_5_text",
            "linear_num_value_heads": 16,
            "full_attention_interval": 4,
            "partial_rotary_factor": 0.25,
        },
    ),
    "granite-4-h-1b": Other(
        Shape(40, 1536, 4096, 12, 4, 128, 100352, 10000.0, 131072),
        "GraniteMoeHybridForCausalLM",
        {
            "model_type": "granitemoehybrid",
            "layer_types": _GRANITE_H_KINDS,
            "shared_intermediate_size": 4096,
            "num_local_experts": 0,
            "mamba_n_heads": 48,
            "mamba_d_state": 128,
        },
    ),
    "jamba-3b": Other(
        Shape(28, 2560, 8192, 20, 1, 128, 65536, 10000.0, 262144),
        "JambaForCausalLM",
        {
            "model_type": "jamba",
            "num_experts": 1,
            "attn_layer_period": 14,
            "attn_layer_offset": 7,
        },
    ),
    "lfm2-1.2b": Other(
        Shape(16, 2048, 12288, 32, 8, 64, 65536, 1e6, 128000),
        "Lfm2ForCausalLM",
        {"model_type": "lfm2", "full_attn_idxs": [2, 5, 8, 10, 12, 14]},
    ),
    "gemma-3-1b": Other(  # five of six layers have a window
        Shape(26, 1152, 6912, 4, 1, 256, 262144, 1e6, 32768),
        "Gemma3ForCausalLM",
        {
            "model_type": "gemma3_text",
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "rope_local_base_freq": 10000.0,
            "query_pre_attn_scalar": 256,
            "hidden_activation": "gelu_pytorch_tanh",
        },
    ),
    "gemma-4-e2b": Other(  # 20 of 35 layers attend the pages of layers before them
        Shape(35, 1536, 6144, 8, 1, 256, 262144, 1e6, 131072),
        "Gemma4ForCausalLM",
        {
            "model_type": "gemma4_text",
            "layer_types": [
                "full_attention" if layer % 5 == 4 else "sliding_attention" for layer in range(35)
            ],
            "global_head_dim": 512,
            "sliding_window": 512,
            "num_kv_shared_layers": 20,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 256,
            "vocab_size_per_layer_input": 262144,
            "final_logit_softcapping": 30.0,
            "hidden_activation": "gelu_pytorch_tanh",
        },
    ),
    "gemma-4-26b-a4b": Other(
        Shape(30, 2816, 2112, 16, 8, 256, 262144, 1e6, 262144),
        "Gemma4ForCausalLM",
        {
            "model_type": "gemma4_text",
            "global_head_dim": 512,
            "num_global_key_value_heads": 2,
            "attention_k_eq_v": True,
            "sliding_window": 1024,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 128,
            "top_k_experts": 8,
            "moe_intermediate_size": 704,
            "hidden_activation": "gelu_pytorch_tanh",
        },
    ),
    "gemma-3n-e2b": Other(  # 10 of 30 layers attend the pages of layers before them
        Shape(30, 2048, 8192, 8, 2, 256, 262400, 1e6, 32768),
        "Gemma3nForCausalLM",
        {
            "model_type": "gemma3n_text",
            "sliding_window": 512,
            "num_kv_shared_layers": 10,
            "vocab_size_per_layer_input": 262144,
            "hidden_activation": "gelu_pytorch_tanh",
        },
    ),
    "deepseek-v2-lite": Other(
        Shape(27, 2048, 10944, 16, 16, 64, 102400, 10000.0, 163840),
        "DeepseekV2ForCausalLM",
        {
            "model_type": "deepseek_v2",
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1408,
            "first_k_dense_replace": 1,
            "rope_scaling": {
                "type": "yarn",
                "factor": 40,
                "original_max_position_embeddings": 4096,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
            },
            "tie_word_embeddings": False,
        },
    ),
    "glm-4.7-flash": Other(
        Shape(47, 2048, 10240, 20, 20, 64, 154880, 1e6, 202752),
        "Glm4MoeLiteForCausalLM",
        {
            "model_type": "glm4_moe_lite",
            "kv_lora_rank": 512,
            "q_lora_rank": 768,
            "qk_nope_head_dim": 192,
            "qk_rope_head_dim": 64,
            "v_head_dim": 256,
            "n_routed_experts": 64,
            "n_shared_experts": 1,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1536,
            "routed_scaling_factor": 1.8,
            "norm_topk_prob": True,
            "first_k_dense_replace": 1,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3-30b-a3b": Other(
        Shape(48, 2048, 6144, 32, 4, 128, 151936, 1e6, 40960),
        "Qwen3MoeForCausalLM",
        {
            "model_type": "qwen3_moe",
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
        },
    ),
    "gpt-oss-20b": Other(
        Shape(24, 2880, 2880, 64, 8, 64, 201088, 150000.0, 131072),
        "GptOssForCausalLM",
        {
            "model_type": "gpt_oss",
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "attention_bias": True,
            "sliding_window": 128,
            "tie_word_embeddings": False,
            "quantization_config": {"quant_method": "mxfp4"},
        },
    ),
    "phi-2": Other(
        Shape(32, 2560, 10240, 32, 32, 80, 51200, 10000.0, 2048),
        "PhiForCausalLM",
        {
            "model_type": "phi",
            "partial_rotary_factor": 0.4,
            "hidden_act": "gelu_new",
            "tie_word_embeddings": False,
        },
    ),
    "starcoder2-3b": Other(
        Shape(30, 3072, 12288, 24, 2, 128, 49152, 999999.4420358813, 16384),
        "Starcoder2ForCausalLM",
        {
            "model_type": "starcoder2",
            "hidden_act": "gelu_pytorch_tanh",
            "sliding_window": 4096,
            "use_bias": True,
        },
    ),
}


def write(
    shape: Shape | Other,
    folder: str | Path,
    *,
    positions: int | None = None,
    layers: int | None = None,
    seed: int = 0,
) -> Path:
    """Write a bfloat16 checkpoint to `folder` and return the folder. Embeddings are tied unless
    the family's are not, and gpt-oss's experts in MXFP4.

    `positions` and `layers` replace what config.json states of them. Holds the weights of a file in
    memory once; families other than Llama and Qwen2 have a file for each layer.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    other = shape if isinstance(shape, Other) else None
    shape = shape if other is None else other.shape
    if layers is not None:
        shape = replace(shape, num_hidden_layers=layers)
    if other is None:
        architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[shape.model_type]
    else:
        architecture = other.architecture
    config = {
        "architectures": [architecture],
        **vars(shape),
        "max_position_embeddings": positions or shape.max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        **(other.fields if other is not None else {}),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if other is None:
        _save(folder / "model.safetensors", _tensors(shape, seed))
    else:
        _write_expected(folder, seed)
    _write_tokenizer(shape, folder)
    return folder


def _tensors(shape: Shape, seed: int) -> dict[str, torch.Tensor]:
    """Every tensor by its Hugging Face name; matrices are (outputs, inputs)."""
    generator = torch.Generator().manual_seed(seed)
    hidden, wide = shape.hidden_size, shape.intermediate_size
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim

    def normal(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        values = torch.randn((rows, columns), generator=generator)
        return values.mul_(gain * columns**-0.5).to(torch.bfloat16)

    tensors = {
        "model.embed_tokens.weight": normal(shape.vocab_size, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            # 1.6 for both: scores with a standard deviation of 2.5, so that attention is peaked.
            prefix + "self_attn.q_proj.weight": normal(queries, hidden, 1.6),
            prefix + "self_attn.k_proj.weight": normal(keys, hidden, 1.6),
            prefix + "self_attn.v_proj.weight": normal(keys, hidden),
            prefix + "self_attn.o_proj.weight": normal(hidden, queries),
            prefix + "mlp.gate_proj.weight": normal(wide, hidden),
            prefix + "mlp.up_proj.weight": normal(wide, hidden),
            prefix + "mlp.down_proj.weight": normal(hidden, wide),
            prefix + "input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            prefix + "post_attention_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        }
        if shape.model_type == "qwen2":
            for name, count in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
                tensors[f"{prefix}self_attn.{name}.bias"] = normal(count, 1)[:, 0].contiguous()
    return tensors


def _write_expected(folder: Path, seed: int) -> None:
    """Every tensor that Ebbtide asks for, by its name in the files."""
    from ebbtide.offload.models.model_config import read_model_config
    from ebbtide.offload.weights.skeleton import expected_shapes, layer_of

    generator = torch.Generator().manual_seed(seed)
    config, files, places = read_model_config(folder), {}, {}
    for name, shape in expected_shapes(config).items():
        files.setdefault(layer_of(name), {})[name] = shape
    for number, shapes in enumerate(files.values()):
        tensors = {}
        if config.stacked and config.stacked[0].by_columns:
            tensors, shapes = _experts_in_mxfp4(shapes, generator)
        for name, shape in shapes.items():
            for theirs, ours in config.renamed:
                name = name.replace(ours, theirs)
            for split in config.head_rows:  # of which one tensor is written for all
                if name.endswith(split.name):
                    name, shape = name.removesuffix(split.name) + split.end, split.shape
            if name in tensors:
                continue
            if len(shape) > 1:
                tensor = torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5)
            elif name.endswith("A_log"):  # states are halved within tokens, or hundreds of them
                tensor = torch.linspace(-5.0, 1.0, shape[0])
            else:
                tensor = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
            tensors[name] = tensor.to(torch.bfloat16)
        file = f"model-{number:05}.safetensors"
        _save(folder / file, tensors)
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def _experts_in_mxfp4(
    shapes: dict[str, tuple[int, ...]], generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], dict[str, tuple[int, ...]]]:
    """gpt-oss's experts of a layer, all in one tensor of each kind; and the other shapes."""
    experts, rest = {}, {}
    for name, shape in shapes.items():
        before, _, number_and_kind = name.partition(".experts.")
        if not number_and_kind:
            rest[name] = shape
            continue
        number, projection, kind = number_and_kind.split(".")
        stacked = f"{before}.experts.{projection}"
        count = int(number) + 1
        if kind == "bias":
            experts[f"{stacked}_bias"] = (count, *shape)
        else:
            experts[f"{stacked}_blocks"] = (count, shape[0], shape[1] // 32, 16)
            experts[f"{stacked}_scales"] = (count, shape[0], shape[1] // 32)
    tensors = {}
    for name, shape in experts.items():
        if name.endswith("_bias"):
            tensors[name] = torch.zeros(shape, dtype=torch.bfloat16)
        elif name.endswith("_scales"):  # numbers of some 3: a deviation of 1 / sqrt(2880)
            tensors[name] = torch.full(shape, 127 - 7, dtype=torch.uint8)
        else:
            tensors[name] = torch.empty(shape, dtype=torch.uint8).random_(generator=generator)
    return tensors, rest


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, str(path), metadata={"format": "pt"})


def _write_tokenizer(shape: Shape, folder: Path) -> None:
    """SmolLM2's tokenizer where it is at hand and its ids fit, else the built-in one."""
    if SMOLLM2_TOKENIZER.exists() and shape.vocab_size >= SHAPES["smollm2-135m"].vocab_size:
        shutil.copyfile(SMOLLM2_TOKENIZER, folder / "tokenizer.json")
        settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
        settings["chat_template"] = CHAT_TEMPLATE
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(BUILTIN_TOKENIZER.with_name(name), folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES | OTHERS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--positions", type=int, help="the most tokens, in place of the model's")
    parser.add_argument("--layers", type=int, help="how many, in place of the model's")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    shape = (SHAPES | OTHERS)[given.shape]
    folder = write(
        shape, given.out, positions=given.positions, layers=given.layers, seed=given.seed
    )
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{folder}: {size:,} bytes of weights")


if __name__ == "__main__":
    main()

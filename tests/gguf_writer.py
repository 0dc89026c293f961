"""GGUF files of small checkpoints in Hugging Face's layout, as converters write them; what
becomes of tensors stands in gguf_tensors.py.

The `gguf` package knows the names and the format; what happens to numbers is written here once
more, not taken from what reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH
from gguf import GGMLQuantizationType as Kind
from gguf_metadata import metadata
from gguf_tensors import tensors_of, xielu_of
from gguf_tokens import UNUSED, add_key, tokens_of

from ebbtide.offload.models.model_config import read_model_config

ARCHITECTURES = {
    "LlamaForCausalLM": MODEL_ARCH.LLAMA,
    "MistralForCausalLM": MODEL_ARCH.LLAMA,
    "MixtralForCausalLM": MODEL_ARCH.LLAMA,
    "Ministral3ForCausalLM": MODEL_ARCH.MISTRAL3,
    "Qwen2ForCausalLM": MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": MODEL_ARCH.QWEN3,
    "Qwen3MoeForCausalLM": MODEL_ARCH.QWEN3MOE,
    "Phi3ForCausalLM": MODEL_ARCH.PHI3,
    "GemmaForCausalLM": MODEL_ARCH.GEMMA,
    "Gemma2ForCausalLM": MODEL_ARCH.GEMMA2,
    "Gemma3ForCausalLM": MODEL_ARCH.GEMMA3,
    "Llama4ForCausalLM": MODEL_ARCH.LLAMA4,
    "Gemma3nForCausalLM": MODEL_ARCH.GEMMA3N,
    "Gemma4ForCausalLM": MODEL_ARCH.GEMMA4,
    "SmolLM3ForCausalLM": MODEL_ARCH.SMOLLM3,
    "OlmoForCausalLM": MODEL_ARCH.OLMO,
    "Olmo2ForCausalLM": MODEL_ARCH.OLMO2,
    "Olmo3ForCausalLM": MODEL_ARCH.OLMO2,
    "OlmoeForCausalLM": MODEL_ARCH.OLMOE,
    "GraniteForCausalLM": MODEL_ARCH.GRANITE,
    "Glm4ForCausalLM": MODEL_ARCH.GLM4,
    "Exaone4ForCausalLM": MODEL_ARCH.EXAONE4,
    "SeedOssForCausalLM": MODEL_ARCH.SEED_OSS,
    "GptOssForCausalLM": MODEL_ARCH.GPT_OSS,
    "Glm4MoeForCausalLM": MODEL_ARCH.GLM4_MOE,
    "DeepseekV2ForCausalLM": MODEL_ARCH.DEEPSEEK2,
    "DeepseekV3ForCausalLM": MODEL_ARCH.DEEPSEEK2,
    "Glm4MoeLiteForCausalLM": MODEL_ARCH.DEEPSEEK2,
    "Qwen3NextForCausalLM": MODEL_ARCH.QWEN3NEXT,
    "Qwen3_5ForCausalLM": MODEL_ARCH.QWEN35,
    "Qwen3_5MoeForCausalLM": MODEL_ARCH.QWEN35MOE,
    "Lfm2ForCausalLM": MODEL_ARCH.LFM2,
    "Lfm2MoeForCausalLM": MODEL_ARCH.LFM2MOE,
    "GraniteMoeHybridForCausalLM": MODEL_ARCH.GRANITE_HYBRID,
    "GraniteMoeForCausalLM": MODEL_ARCH.GRANITE_MOE,
    "GraniteMoeSharedForCausalLM": MODEL_ARCH.GRANITE_MOE,
    "FalconH1ForCausalLM": MODEL_ARCH.FALCON_H1,
    "NemotronHForCausalLM": MODEL_ARCH.NEMOTRON_H,
    "JambaForCausalLM": MODEL_ARCH.JAMBA,
    "KimiLinearForCausalLM": MODEL_ARCH.KIMI_LINEAR,
    "BailingHybridForCausalLM": MODEL_ARCH.KIMI_LINEAR,  # whose own the package does not know yet
    "CohereForCausalLM": MODEL_ARCH.COMMAND_R,
    "Cohere2ForCausalLM": MODEL_ARCH.COHERE2,
    "Ernie4_5ForCausalLM": MODEL_ARCH.ERNIE4_5,
    "Ernie4_5_MoeForCausalLM": MODEL_ARCH.ERNIE4_5_MOE,
    "HunYuanDenseV1ForCausalLM": MODEL_ARCH.HUNYUAN_DENSE,
    "HunYuanMoEV1ForCausalLM": MODEL_ARCH.HUNYUAN_MOE,
    "ArceeForCausalLM": MODEL_ARCH.ARCEE,
    "ApertusForCausalLM": MODEL_ARCH.APERTUS,
    "Starcoder2ForCausalLM": MODEL_ARCH.STARCODER2,
    "NemotronForCausalLM": MODEL_ARCH.NEMOTRON,
    "StableLmForCausalLM": MODEL_ARCH.STABLELM,
    "PhiForCausalLM": MODEL_ARCH.PHI2,
    "Jais2ForCausalLM": MODEL_ARCH.JAIS2,
    "Qwen2MoeForCausalLM": MODEL_ARCH.QWEN2MOE,
    "Dots1ForCausalLM": MODEL_ARCH.DOTS1,
    "AfmoeForCausalLM": MODEL_ARCH.AFMOE,
    "MiniMaxM2ForCausalLM": MODEL_ARCH.MINIMAXM2,
    "MiniCPM3ForCausalLM": MODEL_ARCH.MINICPM3,
}


def write(
    folder: Path,
    out: Path,
    kind: str = "F32",
    *,
    pre: str = "gpt-2",
    experts: str = "",
    others: dict[str, str] | None = None,
    by_heads: bool = True,
    heads_apart: bool = True,
    **keys: Any,
) -> Path:
    """Write the model of a folder to a file, and return its path.

    kind: of matrices whose rows are whole blocks; others, and all else, are F32. experts: of
    experts, where that is another. others: of tensors by a part of their names. pre: how text is
    cut. by_heads, heads_apart: see tensors_of. keys: further metadata, or, None, what is left out;
    with __ in place of a dot, and arch for the architecture's name.
    """
    config = json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURES[config["architectures"][0]]
    if arch == MODEL_ARCH.NEMOTRON_H and "E" in config.get("hybrid_override_pattern", ""):
        arch = MODEL_ARCH.NEMOTRON_H_MOE
    read = read_model_config(folder)
    inner, config = read.intermediate_size, {"num_hidden_layers": read.num_layers, **config}
    arch_name = gguf.MODEL_ARCH_NAMES[arch]
    if config["model_type"] == "bailing_hybrid":
        arch_name = "bailingmoe3"
    writer = gguf.GGUFWriter(None, arch_name)
    tensors = tensors_of(folder, config, arch, by_heads, heads_apart)
    said = {**metadata(config, arch, inner), **tokens(folder, config, pre)}
    said |= xielu_of(folder, config["num_hidden_layers"]) if arch == MODEL_ARCH.APERTUS else {}
    said |= {
        name.replace("arch__", "{arch}.").replace("__", "."): value for name, value in keys.items()
    }
    for name, value in said.items():
        if value is not None:
            add_key(writer, name.format(arch=arch_name), value)
    for name, tensor in tensors.items():
        own = experts if experts and "_exps." in name else kind
        own = next((k for part, k in (others or {}).items() if part in name), own)
        data, stored = packed(tensor.numpy(), own if _is_quantised(name, tensor, own) else "F32")
        writer.add_tensor(name, data, raw_dtype=stored)
    return _stored(writer, out)


def packed(numbers: np.ndarray, kind: str) -> tuple[np.ndarray, Kind]:
    """Numbers in a type, and the type."""
    if kind == "F32":
        return np.ascontiguousarray(numbers, np.float32), Kind.F32
    return gguf.quants.quantize(np.ascontiguousarray(numbers, np.float32), Kind[kind]), Kind[kind]


def _is_quantised(name: str, tensor: torch.Tensor, kind: str) -> bool:
    block = gguf.GGML_QUANT_SIZES[Kind[kind]][0]
    plain = tensor.dim() < 2 or name.endswith((".bias", "ffn_gate_inp.weight", "conv.weight"))
    return not plain and tensor.shape[-1] % block == 0


def tokens(folder: Path, c: dict[str, Any], pre: str) -> dict[str, Any]:
    """The tokenizer of a folder, with tokens for rows of the embedding that have none."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    said = tokens_of(folder, pre)
    texts = said["tokenizer.ggml.tokens"]
    missing = c["vocab_size"] - len(texts)
    ids = {text: i for i, text in enumerate(texts)}
    return {
        **said,
        "tokenizer.ggml.tokens": texts + [f"[PAD{len(texts) + i}]" for i in range(missing)],
        "tokenizer.ggml.token_type": said["tokenizer.ggml.token_type"] + [UNUSED] * missing,
        "tokenizer.ggml.merges": said.get("tokenizer.ggml.merges") or None,
        "tokenizer.ggml.bos_token_id": ids.get(settings.get("bos_token")),
        "tokenizer.ggml.eos_token_id": ids.get(settings.get("eos_token")),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": settings.get("chat_template"),
    }


def rewritten(path: Path, out: Path, change: Callable[..., list[tuple]]) -> Path:
    """The same file with other tensors. change: of a tensor's name, numbers and type, a list of
    those that take its place."""
    reader, writer = gguf.GGUFReader(path), None
    for field in reader.fields.values():
        if field.name == "general.architecture":
            writer = gguf.GGUFWriter(None, field.contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        for name, data, kind in change(tensor.name, tensor.data, tensor.tensor_type):
            writer.add_tensor(name, data, raw_dtype=kind)
    return _stored(writer, out)


def _stored(writer: gguf.GGUFWriter, out: Path) -> Path:
    writer.write_header_to_file(out)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out

"""What converters make of the tensors of a folder in Hugging Face's layout for a GGUF file: names,
rows of queries and keys in pairs, experts of a layer in one tensor, norms of 1 + w.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import MODEL_ARCH
from safetensors.torch import load_file

_IN_PAIRS = (
    *(MODEL_ARCH.LLAMA, MODEL_ARCH.MISTRAL3, MODEL_ARCH.SMOLLM3, MODEL_ARCH.GRANITE),
    *(MODEL_ARCH.GRANITE_HYBRID, MODEL_ARCH.GRANITE_MOE, MODEL_ARCH.ARCEE, MODEL_ARCH.OLMO),
)
_MAMBA2 = (
    *(MODEL_ARCH.GRANITE_HYBRID, MODEL_ARCH.FALCON_H1, MODEL_ARCH.NEMOTRON_H),
    MODEL_ARCH.NEMOTRON_H_MOE,
)
DELTA = (MODEL_ARCH.QWEN35, MODEL_ARCH.QWEN35MOE)
_OF_ONE_PLUS = (
    *(MODEL_ARCH.GEMMA, MODEL_ARCH.GEMMA2, MODEL_ARCH.GEMMA3, *DELTA),
    *(MODEL_ARCH.QWEN3NEXT, MODEL_ARCH.NEMOTRON),
)


def tensors_of(
    folder: Path,
    c: dict[str, Any],
    arch: MODEL_ARCH,
    by_heads: bool = True,
    heads_apart: bool = True,
) -> dict[str, torch.Tensor]:
    """The tensors by GGUF's names, in float32, as a file has them. by_heads: Qwen3-Next's
    projections in one tensor, as first files had them. heads_apart: latent attention's keys and
    values of each head as matrices of their own, as first files had not."""
    names = gguf.get_tensor_name_map(arch, c["num_hidden_layers"])
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    made: dict[str, torch.Tensor] = {}
    if c["model_type"] == "bailing_hybrid":
        found = {_ling_name(name, found): tensor for name, tensor in found.items()}
    if not by_heads:
        found = _taken_apart(found, c)
    if heads_apart and arch != MODEL_ARCH.MINICPM3:
        found = _heads_apart(found, c)
    for name, tensor in _stacked(found, c).items():
        if name == "lm_head.weight" and (c.get("tie_word_embeddings") or arch == MODEL_ARCH.GEMMA):
            continue
        if ".act_fn." in name:  # numbers of the metadata
            continue
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if name.endswith("altup.correct_output_scale"):
            theirs = f"{theirs}.weight"
        if arch == MODEL_ARCH.GEMMA4:
            theirs = _gemma4_name(name) or theirs
        if name.endswith("self_attn.gate_proj.weight") and c["model_type"] == "bailing_hybrid":
            theirs = f"blk.{name.split('.')[2]}.attn_gate.weight"
        assert theirs is not None, name
        numbers = tensor.float()
        plain = name.endswith("linear_attn.norm.weight")
        if name.endswith("norm.weight") and arch in _OF_ONE_PLUS and not plain:
            numbers = numbers + 1
        if arch in DELTA:
            numbers = by_number(name, numbers, c)
        if name.endswith("A_log"):
            numbers = -numbers.exp()
        if name.endswith("A_log") and c["model_type"] == "bailing_hybrid":
            numbers = -numbers.unsqueeze(1)
        if arch == MODEL_ARCH.KIMI_LINEAR and name.endswith("conv1d.weight"):
            numbers = numbers.unsqueeze(0)
        elif name.endswith(("conv1d.weight", "conv.conv.weight")):
            numbers = numbers.squeeze(1)
        if arch in _MAMBA2 and name.endswith((".D", "A_log")):
            numbers = numbers.unsqueeze(1)
        if name.endswith(("mamba.norm.weight", "mixer.norm.weight")):
            numbers = numbers.view(c.get("mamba_n_groups", c.get("n_groups")), -1)
        if name.endswith("e_score_correction.bias"):
            numbers = numbers.flatten()
        if arch == MODEL_ARCH.FALCON_H1:
            numbers = multiplied(name, numbers, c)
        if arch in _IN_PAIRS and ".q_proj." in name:
            numbers = in_pairs(numbers, c["num_attention_heads"])
        if arch in _IN_PAIRS and ".k_proj." in name:
            numbers = in_pairs(numbers, c["num_key_value_heads"])
        made[theirs] = numbers
    if arch == MODEL_ARCH.GEMMA3N:  # of layers that share, the files hold what nobody reads
        first = c["num_hidden_layers"] - c["num_kv_shared_layers"]
        for layer in range(first, c["num_hidden_layers"]):
            for part in ("attn_k", "attn_k_norm", "attn_v"):
                unread = torch.full_like(made[f"blk.0.{part}.weight"], torch.nan)
                made[f"blk.{layer}.{part}.weight"] = unread
    if arch == MODEL_ARCH.GEMMA4:
        pairs = c["global_head_dim"] // 2
        turning = int(c["rope_parameters"]["full_attention"]["partial_rotary_factor"] * pairs)
        factors = [1.0] * turning + [1e30] * (pairs - turning)
        made["rope_freqs.weight"] = torch.tensor(factors)
    scaling = c.get("rope_scaling") or {}
    if scaling.get("rope_type") == "llama3":
        made["rope_freqs.weight"] = llama3_factors(c, scaling)
    for length in ("long", "short"):
        if f"{length}_factor" in scaling:
            made[f"rope_factors_{length}.weight"] = torch.tensor(scaling[f"{length}_factor"])
    return made


def xielu_of(folder: Path, num_layers: int) -> dict[str, list[float]]:
    """The numbers of Apertus' activations, of each layer."""
    tensors = load_file(folder / "model.safetensors")
    return {
        f"xielu.{name}": [
            float(tensors[f"model.layers.{layer}.mlp.act_fn.{name}"]) for layer in range(num_layers)
        ]
        for name in ("alpha_p", "alpha_n", "beta", "eps")
    }


def multiplied(name: str, numbers: torch.Tensor, c: dict[str, Any]) -> torch.Tensor:
    """A weight of Falcon-H1 times its multipliers."""
    if name.endswith("in_proj.weight"):
        values, keys = c["mamba_d_ssm"], c["mamba_n_groups"] * c["mamba_d_state"]
        sizes = torch.tensor((values, values, keys, keys, c["mamba_n_heads"]))
        rows = torch.tensor(c["ssm_multipliers"]).repeat_interleave(sizes)
        return numbers * (c["ssm_in_multiplier"] * rows)[:, None]
    into = c["attention_in_multiplier"]
    times = {
        "down_proj": c["mlp_multipliers"][1],
        "gate_proj": c["mlp_multipliers"][0],
        "k_proj": into * c["key_multiplier"],
        "q_proj": into,
        "v_proj": into,
        "o_proj": c["attention_out_multiplier"],
        "out_proj": c["ssm_out_multiplier"],
        "lm_head": c["lm_head_multiplier"],
        "embed_tokens": c["embedding_multiplier"],
    }
    return numbers * times.get(name.split(".")[-2], 1.0)


def _heads_apart(found: dict[str, torch.Tensor], c: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Of latent attention, a matrix for each head's keys, turned around, and for its values."""
    made = {}
    for name, tensor in found.items():
        if not name.endswith("kv_b_proj.weight"):
            made[name] = tensor
            continue
        heads = tensor.unflatten(0, (c["num_attention_heads"], -1))
        keys, values = heads.split((c["qk_nope_head_dim"], c["v_head_dim"]), 1)
        made[name.replace("kv_b_proj", "k_b_proj")] = keys.transpose(1, 2).contiguous()
        made[name.replace("kv_b_proj", "v_b_proj")] = values.contiguous()
    return made


def _ling_name(name: str, found: dict[str, torch.Tensor]) -> str:
    """A name as Kimi Linear has it."""
    layer = name.split(".attention.")[0]
    keeps_state = f"{layer}.attention.A_log" in found
    ours = {
        ".attention.dense.": ".self_attn.o_proj.",
        ".attention.f_proj.": ".self_attn.f_a_proj.",
        ".attention.g_proj.": ".self_attn.g_a_proj." if keeps_state else ".self_attn.gate_proj.",
        ".attention.": ".self_attn.",
        "model.word_embeddings.": "model.embed_tokens.",
        ".mlp.gate.expert_bias": ".mlp.gate.e_score_correction_bias",
    }
    for part, other in ours.items():
        name = name.replace(part, other)
    return name


def _gemma4_name(name: str) -> str | None:
    """Of what the package's table has no name for."""
    layer = name.split(".")[2]
    vectors = {
        "layer_scalar": "layer_output_scale.weight",
        "router.scale": "ffn_gate_inp.scale",
        "router.per_expert_scale": "ffn_down_exps.scale",
        "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    }
    ends = (theirs for ours, theirs in vectors.items() if name.endswith(f".{ours}"))
    found = next(ends, None)
    return None if found is None else f"blk.{layer}.{found}"


def _taken_apart(found: dict[str, torch.Tensor], c: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Queries, keys and values of all heads, and gates: head by head in the folder."""
    made = {}
    for name, tensor in found.items():
        if not name.endswith("in_proj_qkvz.weight"):
            made[name] = tensor
            continue
        keys, dim = c["linear_num_key_heads"], c["linear_key_head_dim"]
        values = c["linear_num_value_heads"] // keys * c["linear_value_head_dim"]
        parts = tensor.unflatten(0, (keys, -1)).split((dim, dim, values, values), 1)
        q, k, v, z = (part.flatten(0, 1) for part in parts)
        made[name.replace("qkvz", "qkv")] = torch.cat((q, k, v))
        made[name.replace("qkvz", "z")] = z
    return made


def by_number(name: str, numbers: torch.Tensor, c: dict[str, Any]) -> torch.Tensor:
    """Value heads that share a key apart: the first of every key, then the second of every key."""
    keys, heads = c["linear_num_key_heads"], c["linear_num_value_heads"]
    each, first = heads // keys, 2 * keys * c["linear_key_head_dim"]

    def rows(part: torch.Tensor) -> torch.Tensor:
        return part.unflatten(0, (keys, each, -1)).transpose(0, 1).flatten(0, 2)

    if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        return torch.cat((numbers[:first], rows(numbers[first:])))
    ends = ("in_proj_z.weight", "in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_proj.bias")
    if name.endswith(ends):
        return rows(numbers)
    if name.endswith("linear_attn.out_proj.weight"):
        return numbers.unflatten(1, (keys, each, -1)).transpose(1, 2).flatten(1)
    return numbers


def in_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """A head's elements i and i + half side by side."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def llama3_factors(c: dict[str, Any], scaling: dict[str, Any]) -> torch.Tensor:
    """What each frequency is divided by. Source: the Llama 3.1 reference implementation."""
    dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    base = c["rope_theta"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    factors = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * base ** (i / dim)
        smooth = (original / wavelength - low) / (high - low)
        smooth = min(1.0, max(0.0, smooth))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)


def _stacked(found: dict[str, torch.Tensor], c: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors with the experts of a layer in one, and norms of heads, by names that the package
    knows."""
    made: dict[str, torch.Tensor] = {}
    gathered: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in found.items():
        parts = name.split(".")
        if "experts" in parts and parts[parts.index("experts") + 1].isdigit():
            at = parts.index("experts") + 1
            whole = ".".join([*parts[:at], *parts[at + 1 :]])
            if c["model_type"] == "lfm2_moe":
                for ours, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
                    whole = whole.replace(f".{ours}.", f".{theirs}.")
            if c["model_type"] == "nemotron_h":
                whole = whole.replace("backbone.", "model.").replace(".mixer.", ".mlp.")
            gathered.setdefault(whole, {})[int(parts[at])] = tensor
        elif "_layernorm.norms." in name:
            whole = name.replace(f".norms.{parts[-2]}.", ".")
            gathered.setdefault(whole, {})[int(parts[-2])] = tensor
        elif name.endswith("experts.gate_up_proj") and "gemma4" in c["model_type"]:
            made[name] = tensor
        elif c["model_type"] == "llama4_text" and name.endswith("experts.gate_up_proj"):
            gate, up = tensor.transpose(1, 2).contiguous().chunk(2, 1)
            base = name.removesuffix("gate_up_proj")
            made |= {f"{base}gate_proj.weight": gate, f"{base}up_proj.weight": up}
        elif c["model_type"] == "llama4_text" and name.endswith("experts.down_proj"):
            made[name + ".weight"] = tensor.transpose(1, 2).contiguous()
        elif name.endswith("experts.gate_up_proj") and "gpt" not in c["model_type"]:
            gate, up = tensor.chunk(2, 1)
            base = name.removesuffix("gate_up_proj")
            made |= {f"{base}gate_proj.weight": gate, f"{base}up_proj.weight": up}
        elif name.endswith("experts.down_proj") and "gpt" not in c["model_type"]:
            made[name + ".weight"] = tensor
        elif name.endswith(("experts.gate_up_proj", "experts.gate_up_proj_bias")):
            # gpt-oss: gate and up take turns; matrices are inputs by outputs.
            gate, up = tensor[..., 0::2], tensor[..., 1::2]
            kind = "bias" if name.endswith("_bias") else "weight"
            base = name.split("gate_up_proj")[0]
            for part, numbers in (("gate_proj", gate), ("up_proj", up)):
                turned = numbers if kind == "bias" else numbers.transpose(1, 2)
                made[f"{base}{part}.{kind}"] = turned.contiguous()
        elif name.endswith("experts.down_proj"):
            made[name + ".weight"] = tensor.transpose(1, 2).contiguous()
        elif name.endswith("experts.down_proj_bias"):
            made[name.replace("_bias", ".bias")] = tensor
        elif name.endswith("block_sparse_moe.input_linear.weight"):
            base = name.split("block_sparse_moe.")[0] + "mlp.experts."
            gate, up = tensor.chunk(2, 1)
            made |= {f"{base}gate_proj.weight": gate, f"{base}up_proj.weight": up}
        elif name.endswith("block_sparse_moe.output_linear.weight"):
            made[name.replace("block_sparse_moe.output_linear", "mlp.experts.down_proj")] = tensor
        elif ".shared_mlp.input_linear" in name or ".shared_mlp.output_linear" in name:
            routed = bool(c.get("num_local_experts"))
            base = name.split("shared_mlp.")[0] + ("mlp.shared_expert." if routed else "mlp.")
            if "input_linear" in name:
                gate, up = tensor.chunk(2, 0)
                made |= {f"{base}gate_proj.weight": gate, f"{base}up_proj.weight": up}
            else:
                made[f"{base}down_proj.weight"] = tensor
        elif (
            c["model_type"] == "kimi_linear"
            and ".block_sparse_moe." in name
            and parts[-2] != "gate"
        ):
            dense = "shared_experts" not in parts and parts[-1] == "weight"
            made[name.replace("block_sparse_moe", "mlp") if dense else name] = tensor
        elif name.endswith("dt_bias"):
            made[name.replace("dt_bias", "dt_proj.bias")] = tensor
        elif name.endswith("e_score_correction_bias"):
            made[name.replace("_bias", ".bias")] = tensor
        elif name.endswith("expert_bias"):
            made[name + ".bias"] = tensor
        elif name.endswith(".sinks"):
            made[name + ".weight"] = tensor
        else:
            made[name] = tensor
        for kind in ("altup_projections", "altup_unembed_projections"):
            if f".{kind}." in name:
                whole = name.split(kind)[0] + f"{kind}.weight"
                gathered.setdefault(whole, {})[int(parts[-2])] = made.pop(name)
    for name, by_number in gathered.items():
        made[name] = torch.stack([by_number[number] for number in sorted(by_number)])
    return made

"""Writes the trained network as a checkpoint folder that Ebbtide and transformers open.

    python benchmarks/train/export.py --work WORK --out FOLDER [--mean-with CHECKPOINT...]
        [--query-scale 1.15]
    python benchmarks/train/export.py --look-near EXPORTED --out FOLDER

The mean of the last weights and earlier ones keeps what a last leg of other lengths forgets. Query
projections are multiplied by --query-scale: attention becomes sharper, which helps in long
documents. Matrices are rounded to 8 bits: every 32 neighbouring inputs of an output share a scale
that is a power of two. So bfloat16, in which they are written, holds them exactly: what stands in
the file is the 8-bit model, and every program that reads Llama checkpoints reads it. --look-near
writes an exported model again, with layer 0 turned away from far tokens, as new ones are born.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from birth import TRAINED_NEARNESS, look_near
from model import NORM_EPS, SHAPES, Model, Shape
from safetensors.torch import load_file, save_file
from tokenizer import BOS_ID, END_ID, PAD_ID

GROUP = 32
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + m['content'] + '<|end|>' }}{% else %}{{ '<|user|>' + m['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def architecture(shape: Shape) -> dict:
    """Llama; or Mistral, which computes the same without a window, where the heads are wider than
    their share of the hidden size: transformers refuses that of a Llama."""
    if shape.hidden % shape.heads:
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "sliding_window": None,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
    }


def config(shape: Shape) -> dict:
    return {
        **architecture(shape),
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": shape.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        **_token_ids(),
        "torch_dtype": "bfloat16",
    }


def generation_config() -> dict:
    return {**_token_ids(), "do_sample": False, "max_new_tokens": 300}


def tokenizer_config(shape: Shape) -> dict:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "model_max_length": shape.max_positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _token_ids() -> dict:
    return {"bos_token_id": BOS_ID, "eos_token_id": END_ID, "pad_token_id": PAD_ID}


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """A matrix on an 8-bit grid per GROUP inputs, its steps powers of two; exact in bfloat16."""
    groups = weight.float().reshape(-1, GROUP)
    step = torch.exp2(step_exponents(groups))
    return ((groups / step).round().clamp(-127, 127) * step).reshape(weight.shape)


def step_exponents(groups: torch.Tensor) -> torch.Tensor:
    """(n, 1): the power of two that is each group's step, of groups (n, GROUP); of those that are
    rounded the same."""
    largest = groups.abs().amax(1, keepdim=True).clamp_min(2.0**-60)
    return torch.ceil(torch.log2(largest / 127))


def averaged(checkpoints: list[Path]) -> tuple[str, dict[str, torch.Tensor]]:
    """The size and the mean weights of checkpoints of one run, or of runs that began as one."""
    states = [torch.load(path, map_location="cpu", weights_only=True) for path in checkpoints]
    sizes = {state["size"] for state in states}
    if len(sizes) > 1:
        raise SystemExit(f"checkpoints are of sizes {', '.join(sorted(sizes))}: no mean of these.")
    weights = [state["model"] for state in states]
    means = {name: torch.stack([w[name] for w in weights]).mean(0) for name in weights[0]}
    return sizes.pop(), means


def export(work: Path, out: Path, query_scale: float, others: list[Path] | None = None) -> None:
    """others: checkpoints that the mean is taken with."""
    size, weights = averaged([work / "checkpoint.pt", *(others or [])])
    _write(SHAPES[size], weights, query_scale, work / "tokenizer.json", out)


def export_near(folder: Path, out: Path) -> None:
    """An exported model again, after `look_near`."""
    model = load(folder)
    look_near(model, TRAINED_NEARNESS)
    _write(model.shape, model.state_dict(), 1.0, folder / "tokenizer.json", out)


def _write(
    shape: Shape, weights: dict[str, torch.Tensor], query_scale: float, tokenizer: Path, out: Path
) -> None:
    tensors = {}
    for name, tensor in weights.items():
        if name.endswith("q_proj.weight"):
            tensor = tensor * query_scale
        if tensor.dim() == 2:
            tensor = rounded(tensor)
        tensors[f"model.{name}"] = tensor.to(torch.bfloat16).contiguous()
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})
    shutil.copyfile(tokenizer, out / "tokenizer.json")
    for name, content in (
        ("config.json", config(shape)),
        ("generation_config.json", generation_config()),
        ("tokenizer_config.json", tokenizer_config(shape)),
    ):
        (out / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load(folder: Path) -> Model:
    """The network of an exported folder, computing in float32."""
    read = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = Shape(
        vocab=read["vocab_size"],
        hidden=read["hidden_size"],
        layers=read["num_hidden_layers"],
        heads=read["num_attention_heads"],
        kv_heads=read["num_key_value_heads"],
        head_dim=read["head_dim"],
        intermediate=read["intermediate_size"],
        rope_theta=read["rope_theta"],
        max_positions=read["max_position_embeddings"],
    )
    model = Model(shape)
    tensors = load_file(str(folder / "model.safetensors"))
    model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items()})
    return model.float().eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--work", type=Path)
    source.add_argument("--look-near", type=Path, help="an exported model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--query-scale", type=float, default=1.0)
    parser.add_argument("--mean-with", type=Path, nargs="*", default=[], help="checkpoints")
    given = parser.parse_args()
    if given.look_near:
        export_near(given.look_near, given.out)
    else:
        export(given.work, given.out, given.query_scale, given.mean_with)
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()

"""Small checkpoints with random weights, one for each entry of model_matrix.py, and what
transformers computes with them.

Not tests: test files import `make`, `FAMILIES` and `reference_logits` from here, or ask for the
fixture `checkpoint`, which makes each variant once per test session.

The weights are scaled so that errors show: a head's scores have a standard deviation of about 2.5,
so that attention is peaked; norms are not ones; biases are not zeros; RoPE scalings and windows
begin well within a test's length. Every folder has a byte-level tokenizer and a chat template, so
that it can be opened like a model from a hub.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from model_matrix import VARIANTS
from variants import rope

SMALL = {
    "vocab_size": 264,  # 256 bytes and 8 control tokens
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 261,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
FAMILIES = list(VARIANTS)
_TEXT_PARTS = ("Gemma3", "Gemma3n", "Gemma4", "Gemma4Unified", "Llama4", "Qwen3_5", "Qwen3_5Moe")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CONTROL_TOKENS = (
    *("<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"),
    *("<|system|>", "<|pad|>", "<|unused-0|>", "<|unused-1|>"),
)


def make(
    name: str,
    folder: str | Path,
    *,
    dtype: str = "float32",
    layout: str = "hub",
    sharded: bool = False,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write the variant `name` (one of FAMILIES) to `folder` and return the folder.

    dtype: float32, bfloat16 or float16, of the file. layout: of config.json, "hub" (rope_theta,
    rope_scaling, torch_dtype) or "transformers5" (rope_parameters, dtype). sharded: several files
    and an index. `config` changes fields of the configuration, by transformers' names.
    """
    import torch
    import transformers

    assert layout in ("hub", "transformers5"), layout
    transformers.utils.logging.disable_progress_bar()
    folder = Path(folder)
    variant = VARIANTS[name]
    architecture = variant.architecture
    fields = {**SMALL, "rope_parameters": rope(), **variant.config, **config}
    text = "Text" if architecture in _TEXT_PARTS else ""
    configuration = getattr(transformers, f"{architecture}{text}Config")(**fields)
    configuration.head_dim = fields["head_dim"]  # not an argument of each, but respected
    own = getattr(transformers, f"{architecture}ForCausalLM", None)  # some are another's
    model = (own or transformers.AutoModelForCausalLM.from_config)(configuration)
    fill(model, torch.Generator().manual_seed(seed), large_key_biases=name == "qwen2-key-biases")
    model = model.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    model.save_pretrained(folder, max_shard_size="100KB" if sharded else "1GB")
    config_json = folder / "config.json"
    if own is None:
        saved = {
            **json.loads(config_json.read_text()),
            "architectures": [f"{architecture}ForCausalLM"],
        }
        config_json.write_text(json.dumps(saved))
    if layout == "hub":
        _to_hub_layout(config_json, variant.hub)
    write_tokenizer(folder, fields["vocab_size"])
    return folder


def fill(model: Any, generator: Any, large_key_biases: bool = False) -> None:
    """Random weights at the scales that the module's docstring promises."""
    import torch

    # Norms of Gemma 1 to 3 multiply by 1 + w, Nemotron's and Qwen's since 3-Next, but for those
    # behind a state.
    kind = model.config.model_type
    kinds = ("gemma", "vaultgemma", "qwen3_next", "qwen3_5")
    is_unscaled = kind.startswith(("gemma3n", "gemma4"))
    is_offset = kind == "nemotron" or (kind.startswith(kinds) and not is_unscaled)
    offset = 1.0 if is_offset else 0.0

    def normal(parameter: Any, std: float, mean: float = 0.0) -> None:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + mean)

    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(("expert_bias", "e_score_correction_bias")):
                normal(buffer, 0.3)
            elif name.endswith("layer_scalar"):
                normal(buffer, 0.2, mean=1.0)
        for name, parameter in model.named_parameters():
            fan_in = parameter.shape[-1]
            if name.endswith(("linear_attn.norm.weight", "mamba.norm.weight", ".D")):
                normal(parameter, 0.3, mean=1.0)
            elif name.endswith("A_log"):  # states are halved within tokens, or hundreds of them
                parameter.copy_(torch.linspace(-5.0, 1.0, parameter.numel()).view_as(parameter))
            elif name.endswith(
                (
                    *("q_norm.weight", "k_norm.weight", "q_layernorm.weight"),
                    *("k_layernorm.weight", "query_layernorm.weight", "key_layernorm.weight"),
                )
            ) or ("_layernorm.norms." in name):
                # 1.6^2: the scores' standard deviation, which Gemma 3n and 4 divide by nothing.
                share = fan_in**-0.25 if is_unscaled else 1.0
                normal(parameter, 0.3 * share, mean=1.6 * share - offset)
            elif "norm" in name or name.endswith("scale"):
                normal(parameter, 0.3, mean=1.0 - offset)
            elif name.endswith("k_proj.bias") and large_key_biases:
                normal(parameter, 1.0)
                parameter[::5] *= 20.0  # a few channels carry most of it, as in Qwen2
            elif name.endswith("modality_router.weight"):  # whose inputs are that much smaller
                normal(parameter, fan_in**0.5)
            elif name.endswith("sinks"):
                normal(parameter, 1.0, mean=2.0)
            elif name.endswith("bias"):
                normal(parameter, 0.3)
            elif name.endswith(tuple(f"{part}_proj.weight" for part in ("q", "k", "q_b", "kv_b"))):
                normal(parameter, 1.6 * fan_in**-0.5)
            elif "embed" in name or "lm_head" in name:
                normal(parameter, 0.3)
            else:
                normal(parameter, fan_in**-0.5)


def _to_hub_layout(path: Path, more: dict[str, Any]) -> None:
    """Rewrite config.json as hubs carry it, fields that old releases did not know left out."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config.pop("layer_types", None)
    new = "full_attention" in rope
    if new:
        local = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        if local != rope["rope_theta"]:
            config["rope_local_base_freq"] = local
    kind = rope.pop("rope_type")
    config["rope_theta"] = rope.pop("rope_theta")
    for name in ("partial_rotary_factor", "original_max_position_embeddings"):
        if name in rope and kind in ("default", "longrope"):
            config[name] = rope.pop(name)
    # Llama 3.1 and what came after it says rope_type; what came before it says type.
    key = "rope_type" if new or kind == "llama3" else "type"
    config["rope_scaling"] = None if kind == "default" else {key: kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    config = {k: v for k, v in {**config, **more}.items() if v is not ...}
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """One token per byte (their ids follow the byte-level alphabet), control tokens from 256 on."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if vocab_size >= 264:
        tokenizer.add_special_tokens([AddedToken(token) for token in _CONTROL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def reference_logits(folder: str | Path, ids: list[int]) -> Any:
    """(len(ids), vocab) float32 logits: transformers in float32 with eager attention, one pass."""
    import torch

    with torch.no_grad():
        return reference_model(folder)(torch.tensor([ids])).logits[0]


@functools.lru_cache(maxsize=8)
def reference_model(folder: str | Path, attention: str = "eager") -> Any:
    """transformers' model of a folder, in float32. Kept for the next call."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # By its own class, which "Auto" may not know, or that alone.
    config = json.loads((Path(folder) / "config.json").read_text())
    automatic = transformers.AutoModelForCausalLM
    model = getattr(transformers, config["architectures"][0], automatic).from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, local_files_only=True
    )
    return model.eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`checkpoint(name, **options)`: the folder of a variant, made once. Do not write into it."""
    made: dict[str, Path] = {}

    def get(name: str, **options: Any) -> Path:
        key = f"{name} {sorted(options.items())}"
        if key not in made:
            made[key] = make(name, tmp_path_factory.mktemp(name), **options)
            # Bytes of files that were written just now are compared at each read, for two seconds.
            earlier_s = time.time() - 60
            for path in made[key].iterdir():
                os.utime(path, (earlier_s, earlier_s))
        return made[key]

    yield get
    for folder in made.values():
        shutil.rmtree(folder, ignore_errors=True)

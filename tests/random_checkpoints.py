"""Small checkpoints with random weights, one per family, and what transformers computes with them.

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
import shutil
from pathlib import Path
from typing import Any

import pytest

_SMALL = {
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
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
_WINDOW = 48  # tokens; below every test's length, and no multiple of a usual page
_THETA = 10000.0


def _rope(theta: float = _THETA, **scaling: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **scaling}


# Name: (architecture, what differs from _SMALL). Names say what a failing test is about.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": _rope(
                500000.0,
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        },
    ),
    "llama-linear": ("Llama", {"rope_parameters": _rope(rope_type="linear", factor=2.0)}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head80": ("Llama", {"head_dim": 80, "num_key_value_heads": 4}),
    "llama-one-kv-head": ("Llama", {"num_key_value_heads": 1}),
    "mistral": ("Mistral", {"sliding_window": _WINDOW}),
    "mistral-no-window": ("Mistral", {"sliding_window": None, "rope_parameters": _rope(1e6)}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": _rope(1e6)}),
    "qwen2-key-biases": ("Qwen2", {"rope_parameters": _rope(1e6)}),
    "qwen2-yarn": (
        "Qwen2",
        {
            "max_position_embeddings": 512,
            "rope_parameters": _rope(
                1e6, rope_type="yarn", factor=4.0, original_max_position_embeddings=512
            ),
        },
    ),
    "qwen2-window": (
        "Qwen2",
        # The first layer sees everything, the others a window.
        {"use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 1},
    ),
    "qwen3": (
        "Qwen3",
        {"head_dim": 32, "tie_word_embeddings": True, "rope_parameters": _rope(1e6)},
    ),
}
FAMILIES = list(VARIANTS)

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
    architecture, own = VARIANTS[name]
    fields = {**_SMALL, "rope_parameters": _rope(), **own, **config}
    configuration = getattr(transformers, f"{architecture}Config")(**fields)
    if architecture == "Qwen2":
        configuration.head_dim = fields["head_dim"]  # not one of its arguments, but respected
    model = getattr(transformers, f"{architecture}ForCausalLM")(configuration)
    _fill(model, torch.Generator().manual_seed(seed), large_key_biases=name == "qwen2-key-biases")
    model = model.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    model.save_pretrained(folder, max_shard_size="100KB" if sharded else "1GB")
    if layout == "hub":
        _to_hub_layout(folder / "config.json")
    _write_tokenizer(folder, fields["vocab_size"])
    return folder


def _fill(model: Any, generator: Any, large_key_biases: bool) -> None:
    """Random weights at the scales that the module's docstring promises."""
    import torch

    def normal(parameter: Any, std: float, mean: float = 0.0) -> None:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + mean)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter.shape[-1]
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                normal(parameter, 0.3, mean=1.6)  # 1.6^2: the scores' standard deviation
            elif "norm" in name:
                normal(parameter, 0.3, mean=1.0)
            elif name.endswith("k_proj.bias") and large_key_biases:
                normal(parameter, 1.0)
                parameter[::5] *= 20.0  # a few channels carry most of it, as in Qwen2
            elif name.endswith("bias"):
                normal(parameter, 0.3)
            elif name.endswith(("q_proj.weight", "k_proj.weight")):
                normal(parameter, 1.6 * fan_in**-0.5)
            elif "embed" in name or "lm_head" in name:
                normal(parameter, 0.3)
            else:
                normal(parameter, fan_in**-0.5)


def _to_hub_layout(path: Path) -> None:
    """Rewrite config.json as hubs carry it, fields that old releases did not know left out."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config.pop("layer_types", None)
    kind = rope.pop("rope_type")
    config["rope_theta"] = rope.pop("rope_theta")
    # Llama 3.1 says rope_type; what came before it says type.
    key = "rope_type" if kind == "llama3" else "type"
    config["rope_scaling"] = None if kind == "default" else {key: kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
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
    model = transformers.AutoModelForCausalLM.from_pretrained(
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
        return made[key]

    yield get
    for folder in made.values():
        shutil.rmtree(folder, ignore_errors=True)

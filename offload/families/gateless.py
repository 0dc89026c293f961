"""The architectures whose MLPs have no gates: what each is made of, from config.json. As
dense.py, which has those that have."""

from __future__ import annotations

from dataclasses import replace

from ..errors import UnsupportedModel
from ..models.config_fields import Fields
from ..models.layer_config import Norms
from ..models.rope_config import read_rope
from .dense import llama, mistral, softcap
from .family import Family


def arcee(get: Fields, head_dim: int) -> dict:
    return {**llama(get, head_dim), "gated_mlp": False}


def apertus(get: Fields, head_dim: int) -> dict:
    return {
        **llama(get, head_dim),
        "mlp_bias": False,
        "gated_mlp": False,
        "qk_norm": "head",
        "norms": Norms(before_attention="attention_layernorm", before_mlp="feedforward_layernorm"),
    }


def jais2(get: Fields, head_dim: int) -> dict:
    bias = get.flag("attention_bias", True)
    return {
        **llama(get, head_dim),
        **layer_norms(get, "layer_norm_eps", bias=True),
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": get.flag("mlp_bias", True),
        "gated_mlp": False,
    }


def starcoder2(get: Fields, head_dim: int) -> dict:
    bias = get.flag("use_bias", True)
    return {
        **mistral(get, head_dim),
        **layer_norms(get, "norm_epsilon", bias=True),
        "windows": get.windows(lambda layer: True, default=None),
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": bias,
        "gated_mlp": False,
        "renamed": ((".mlp.c_fc.", ".mlp.up_proj."), (".mlp.c_proj.", ".mlp.down_proj.")),
    }


def nemotron(get: Fields, head_dim: int) -> dict:
    bias = get.flag("attention_bias", False)
    return {
        **layer_norms(get, "norm_eps", bias=True),
        "ropes": (read_rope(get, head_dim, share=0.5),) * get.num_layers,
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": get.flag("mlp_bias", False),
        "norm_offset": 1.0,
        "gated_mlp": False,
    }


def phi(get: Fields, head_dim: int) -> dict:
    """Attention and MLP side by side behind one norm."""
    if get.flag("qk_layernorm", False):
        raise UnsupportedModel(f"{get.path}: qk_layernorm is not supported by this family.")
    return {
        **layer_norms(get, "layer_norm_eps", bias=True),
        "ropes": (read_rope(get, head_dim, share=0.5),) * get.num_layers,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "head_bias": True,
        "gated_mlp": False,
        "parallel_mlp": True,
        "norms": Norms(before_mlp=None),
        "renamed": (
            (".self_attn.dense.", ".self_attn.o_proj."),
            (".mlp.fc1.", ".mlp.up_proj."),
            (".mlp.fc2.", ".mlp.down_proj."),
            ("model.final_layernorm.", "model.norm."),
        ),
    }


def nanochat(get: Fields, head_dim: int) -> dict:
    """No norm has weights; embeddings are normed too."""
    rope = replace(read_rope(get, head_dim), backwards=True)
    bias = get.flag("attention_bias", False)
    return {
        "ropes": (rope,) * get.num_layers,
        "qkv_bias": bias,
        "output_bias": bias,
        "qk_norm": "turned",
        "unit_norms": ("norm.",),
        "embedding_norm": True,
        "logits_softcap": softcap(get, "final_logit_softcapping", 15.0),
        "gated_mlp": False,
        "renamed": ((".mlp.fc1.", ".mlp.up_proj."), (".mlp.fc2.", ".mlp.down_proj.")),
    }


def layer_norms(get: Fields, name: str, *, bias: bool) -> dict:
    """Norms that take the mean away, whose epsilon the field `name` says."""
    eps = get.number(name, 1e-5, kind=float, low=0.0, high=1.0)
    return {"layer_norm": True, "norm_bias": bias, "norm_eps": eps}


_APERTUS = {
    "hidden_act": "xielu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 65536,
    "rope_theta": 12e6,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}
_ARCEE = {"hidden_act": "relu2", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
_JAIS2 = {"hidden_act": "relu2", "max_position_embeddings": 8192}
_STARCODER2 = {
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}

GATELESS_FAMILIES: dict[str, Family] = {
    "ArceeForCausalLM": Family("Arcee AFM 4.5B", "MLPs with squared ReLU", arcee, _ARCEE),
    "ApertusForCausalLM": Family(
        "Apertus 8B, 70B",
        "MLPs with xIELU, whose numbers are learnt; a norm on every query and key head",
        apertus,
        _APERTUS,
    ),
    "Jais2ForCausalLM": Family(
        "Jais 2", "MLPs with squared ReLU; layer norms; biases everywhere", jais2, _JAIS2
    ),
    "Starcoder2ForCausalLM": Family(
        "StarCoder2 3B, 7B, 15B",
        "MLPs with GELU; layer norms; biases everywhere; windows",
        starcoder2,
        _STARCODER2,
    ),
    "NemotronForCausalLM": Family(
        "Nemotron 3 8B, Nemotron 4, Minitron 4B, 8B",
        "MLPs with squared ReLU; layer norms of 1 + w; RoPE on half of each head",
        nemotron,
        {"hidden_act": "relu2", "max_position_embeddings": 4096},
    ),
    "NanoChatForCausalLM": Family(
        "nanochat",
        "MLPs with squared ReLU; norms without weights, of embeddings and behind RoPE too; "
        "RoPE the other way round; soft-capped logits",
        nanochat,
        {"hidden_act": "relu2"},
    ),
    "PhiForCausalLM": Family(
        "Phi-1, Phi-1.5, Phi-2",
        "attention and MLP side by side behind one layer norm; MLPs with GELU; biases everywhere",
        phi,
        {"hidden_act": "gelu_new"},
    ),
}

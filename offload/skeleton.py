"""The decoder's module tree without weights: which tensors a checkpoint must hold, by name and shape.

Built on accelerate's meta device, so a 70B model costs nothing here. Computes nothing: decoder.py does, from the
tensors that weights.py brings.
"""

from __future__ import annotations

import torch
from torch import nn

from .model_config import ModelConfig


class _Norm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))


class _Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv, bias=c.qkv_bias)
        self.o_proj = nn.Linear(q, c.hidden_size, bias=c.output_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = _Norm(c.head_dim), _Norm(c.head_dim)


class _Mlp(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)


class _Layer(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.input_layernorm = _Norm(c.hidden_size)
        self.self_attn = _Attention(c)
        self.post_attention_layernorm = _Norm(c.hidden_size)
        self.mlp = _Mlp(c)


class _Body(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(_Layer(c) for _ in range(c.num_layers))
        self.norm = _Norm(c.hidden_size)


class Skeleton(nn.Module):
    """The whole model, named as Hugging Face names it."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.model = _Body(c)
        if not c.tied_embeddings:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the checkpoint must hold: Hugging Face name -> shape."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        skeleton = Skeleton(config)
    return {name: tuple(p.shape) for name, p in skeleton.named_parameters()}


def layer_prefix(layer: int) -> str:
    """What the names of one layer's tensors begin with."""
    return f"model.layers.{layer}."

"""The decoder's module tree without weights: which tensors a checkpoint must hold, by name and
shape.

Built on accelerate's meta device, so a 70B model costs nothing here. Computes nothing: decoder.py
does, from the tensors that weights.py brings.
"""

from __future__ import annotations

import torch
from torch import nn

from .model_config import ModelConfig


class _Weight(nn.Module):
    """A leaf with a weight and perhaps a bias. torch's own layers initialise theirs, and doing that
    on the meta device imports 75 MiB of torch that nothing else needs.
    """

    def __init__(self, *shape: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        if bias:
            self.bias = nn.Parameter(torch.empty(shape[0]))


class _Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.q_proj = _Weight(q, c.hidden_size, bias=c.qkv_bias)
        self.k_proj = _Weight(kv, c.hidden_size, bias=c.qkv_bias)
        self.v_proj = _Weight(kv, c.hidden_size, bias=c.qkv_bias)
        self.o_proj = _Weight(c.hidden_size, q, bias=c.output_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = _Weight(c.head_dim), _Weight(c.head_dim)


class _Mlp(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = _Weight(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)
        self.up_proj = _Weight(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)
        self.down_proj = _Weight(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)


class _Layer(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.input_layernorm = _Weight(c.hidden_size)
        self.self_attn = _Attention(c)
        self.post_attention_layernorm = _Weight(c.hidden_size)
        self.mlp = _Mlp(c)


class _Body(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed_tokens = _Weight(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(_Layer(c) for _ in range(c.num_layers))
        self.norm = _Weight(c.hidden_size)


class Skeleton(nn.Module):
    """The whole model, named as Hugging Face names it."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.model = _Body(c)
        if not c.tied_embeddings:
            self.lm_head = _Weight(c.vocab_size, c.hidden_size)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the checkpoint must hold: Hugging Face name -> shape."""
    from accelerate import init_empty_weights

    # With buffers included every constructor works on the meta device: otherwise each tensor is
    # allocated first, and sizes that the machine does not have fail.
    with init_empty_weights(include_buffers=True):
        skeleton = Skeleton(config)
    return {name: tuple(p.shape) for name, p in skeleton.named_parameters()}


def layer_prefix(layer: int) -> str:
    """What the names of one layer's tensors begin with."""
    return f"model.layers.{layer}."


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to; None for embeddings, the final norm and the head."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else None

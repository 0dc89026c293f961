"""The decoder's module tree without weights: which tensors a checkpoint must hold, by name and
shape, and which of them are several in one.

Built on accelerate's meta device, so a 70B model costs nothing here. Computes nothing: decoder.py
does, from the tensors that weights.py brings.
"""

from __future__ import annotations

import torch
from torch import nn

from .model_config import Experts, ModelConfig


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
        if c.fused_qkv:
            self.qkv_proj = _Weight(q + 2 * kv, c.hidden_size, bias=c.qkv_bias)
        else:
            self.q_proj = _Weight(q, c.hidden_size, bias=c.qkv_bias)
            self.k_proj = _Weight(kv, c.hidden_size, bias=c.qkv_bias)
            self.v_proj = _Weight(kv, c.hidden_size, bias=c.qkv_bias)
        self.o_proj = _Weight(c.hidden_size, q, bias=c.output_bias)
        if c.qk_norm:
            each = c.qk_norm == "head"
            self.q_norm = _Weight(c.head_dim if each else q)
            self.k_norm = _Weight(c.head_dim if each else kv)


class _Mlp(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        inner = c.intermediate_size
        if c.fused_gate_up:
            self.gate_up_proj = _Weight(2 * inner, c.hidden_size, bias=c.mlp_bias)
        else:
            self.gate_proj = _Weight(inner, c.hidden_size, bias=c.mlp_bias)
            self.up_proj = _Weight(inner, c.hidden_size, bias=c.mlp_bias)
        self.down_proj = _Weight(c.hidden_size, inner, bias=c.mlp_bias)


class _Layer(nn.Module):
    def __init__(self, c: ModelConfig, experts: Experts | None):
        super().__init__()
        names = (c.norms.before_attention, c.norms.after_attention)
        for name in (*names, c.norms.before_mlp, c.norms.after_mlp):
            if name is not None:
                self.add_module(name, _Weight(c.hidden_size))
        self.self_attn = _Attention(c)
        if experts is None:
            self.mlp = _Mlp(c)
        else:
            _add_experts(self, experts, c.hidden_size)


def _add_experts(layer: nn.Module, e: Experts, hidden_size: int) -> None:
    _add(layer, e.router, _Weight(e.count, hidden_size))
    for number in range(e.count):
        _add(layer, e.gate.format(number), _Weight(e.intermediate_size, hidden_size))
        _add(layer, e.up.format(number), _Weight(e.intermediate_size, hidden_size))
        _add(layer, e.down.format(number), _Weight(hidden_size, e.intermediate_size))


def _add(module: nn.Module, path: str, leaf: nn.Module) -> None:
    """Put `leaf` at a dotted path, with the modules on the way."""
    *way, last = path.split(".")
    for name in way:
        if not hasattr(module, name):
            module.add_module(name, nn.Module())
        module = getattr(module, name)
    module.add_module(last, leaf)


class _Body(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed_tokens = _Weight(c.vocab_size, c.hidden_size)
        self.norm = _Weight(c.hidden_size)


class Skeleton(nn.Module):
    """The whole model but for its layers, named as Hugging Face names it."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.model = _Body(c)
        if not c.tied_embeddings:
            self.lm_head = _Weight(c.vocab_size, c.hidden_size)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the checkpoint must hold: Hugging Face name -> shape."""
    from accelerate import init_empty_weights

    kinds = [config.experts_of(layer) for layer in range(config.num_layers)]
    # With buffers included every constructor works on the meta device: otherwise each tensor is
    # allocated first, and sizes that the machine does not have fail.
    with init_empty_weights(include_buffers=True):
        shapes = _shapes(Skeleton(config))
        # One layer of each kind: thousands of experts would take a second.
        made = {kind: _shapes(_Layer(config, kind)) for kind in dict.fromkeys(kinds)}
    for layer, kind in enumerate(kinds):
        prefix = layer_prefix(layer)
        shapes |= {prefix + name: shape for name, shape in made[kind].items()}
    return shapes


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def fused_parts(config: ModelConfig) -> dict[str, list[tuple[str, int, int]]]:
    """Tensors of a layer that are several in one: name -> (name of a part, its rows from .. to)."""
    parts = {}
    if config.fused_qkv:
        q = config.num_heads * config.head_dim
        kv = config.num_kv_heads * config.head_dim
        ends = {"q_proj": (0, q), "k_proj": (q, q + kv), "v_proj": (q + kv, q + 2 * kv)}
        parts["self_attn.qkv_proj"] = [(f"self_attn.{n}", *rows) for n, rows in ends.items()]
    if config.fused_gate_up:
        inner = config.intermediate_size
        ends = {"gate_proj": (0, inner), "up_proj": (inner, 2 * inner)}
        parts["mlp.gate_up_proj"] = [(f"mlp.{n}", *rows) for n, rows in ends.items()]
    return {
        f"{fused}.{kind}": [(f"{name}.{kind}", start, stop) for name, start, stop in pieces]
        for fused, pieces in parts.items()
        for kind in ("weight", "bias")
    }


def layer_prefix(layer: int) -> str:
    """What the names of one layer's tensors begin with."""
    return f"model.layers.{layer}."


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to; None for embeddings, the final norm and the head."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else None


def is_router(name: str) -> bool:
    """Whether a tensor chooses among experts. Routers stay as they are when matrices are quantised:
    they are small, and another choice of experts is another model.
    """
    return name.endswith(".gate.weight")

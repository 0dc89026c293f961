"""The decoder's module tree without weights: which tensors a checkpoint must hold, by name and
shape, and which of them are several in one.

Built on accelerate's meta device, so a 70B model costs nothing here. Computes nothing: decoder.py
does, from the tensors that weights.py brings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ...kernels.recurrence import RecurrentShape
from ..models.layer_config import (
    XIELU_PARAMETERS,
    AltUp,
    AttentionShape,
    Experts,
    Latent,
    Norms,
    Recurrence,
    ScanShape,
)
from ..models.model_config import ModelConfig


class _Weight(nn.Module):
    """A leaf with a weight and perhaps a bias. torch's own layers initialise theirs, and doing that
    on the meta device imports 75 MiB of torch that nothing else needs.
    """

    def __init__(self, *shape: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        if bias:
            self.bias = nn.Parameter(torch.empty(shape[0]))


class _LatentAttention(nn.Module):
    """kv_b_proj of the files is k_b_proj, each head's turned around, and v_b_proj."""

    def __init__(self, c: ModelConfig, latent: Latent):
        super().__init__()
        q, few = c.num_heads * latent.query_dim, latent.query_rank
        if few is None:
            self.q_proj = _Weight(q, c.hidden_size)
        else:
            self.q_a_proj = _Weight(few, c.hidden_size, bias=latent.bias)
            self.q_a_layernorm = _Weight(few)
            self.q_b_proj = _Weight(q, few)
        self.kv_a_proj_with_mqa = _Weight(latent.head_dim, c.hidden_size, bias=latent.bias)
        self.kv_a_layernorm = _Weight(latent.rank)
        self.k_b_proj = _Weight(c.num_heads * latent.rank, latent.nope_dim)
        self.v_b_proj = _Weight(c.num_heads * latent.value_dim, latent.rank)
        self.o_proj = _Weight(c.hidden_size, c.mixed_size, bias=latent.bias)
        if c.gate_projection:
            self.gate_proj = _Weight(c.num_heads, c.hidden_size)


class _Attention(nn.Module):
    def __init__(self, c: ModelConfig, kind: _Kind):
        super().__init__()
        shape = kind.shape
        heads = shape.num_heads or c.num_heads
        q, kv = heads * shape.head_dim, shape.kv_heads * shape.head_dim
        if c.fused_qkv:
            self.qkv_proj = _Weight(q + 2 * kv, c.hidden_size, bias=c.qkv_bias)
        else:
            self.q_proj = _Weight(q * (1 + c.output_gate), c.hidden_size, bias=c.qkv_bias)
            if not kind.shares_kv:
                self.k_proj = _Weight(kv, c.hidden_size, bias=c.qkv_bias)
            if not (kind.shares_kv or shape.keys_are_values):
                self.v_proj = _Weight(kv, c.hidden_size, bias=c.qkv_bias)
        self.o_proj = _Weight(c.hidden_size, q, bias=c.output_bias)
        if c.gate_projection:
            gates = heads if c.gate_projection == "head" else q
            self.gate_proj = _Weight(gates, c.hidden_size)
        if c.null_scores:
            self.sinks = nn.Parameter(torch.empty(heads))
        if c.qk_norm == "each":
            self.q_norm = _Weight(heads, shape.head_dim)
            self.k_norm = _Weight(shape.kv_heads, shape.head_dim)
        elif c.qk_norm and (c.qk_norm != "turned" or kind.turns):
            each = c.qk_norm != "all"
            self.q_norm = _Weight(shape.head_dim if each else q)
            if not kind.shares_kv:
                self.k_norm = _Weight(shape.head_dim if each else kv)


class _Recurrent(nn.Module):
    def __init__(self, r: Recurrence, hidden_size: int):
        super().__init__()
        shape = r.shape
        conv = _Weight(r.channels, 1, r.conv_width, bias=r.conv_bias)
        values = r.channels if shape is None else shape.values
        self.out_proj = _Weight(hidden_size, values, bias=r.output_bias)
        if shape is None:
            self.conv = conv
            self.in_proj = _Weight(3 * r.channels, hidden_size, bias=r.projection_bias)
            return
        self.conv1d = conv
        if isinstance(shape, ScanShape):
            _add_scan(self, shape, r.projection_bias, hidden_size)
            return
        # Kimi Linear's files hold rates in another shape.
        rates = (1, 1, shape.heads, 1) if r.few else (shape.heads,)
        self.A_log = nn.Parameter(torch.empty(rates))
        self.dt_bias = nn.Parameter(torch.empty(shape.steps))
        if not shape.is_delta:
            self.D = nn.Parameter(torch.empty(shape.heads))
        if r.has_norm:
            self.norm = _Weight(shape.value_dim if shape.is_delta else values)
        for name, rows in _projections(r, shape):
            is_of_few = r.few > 0 and name in ("in_proj_z", "in_proj_a")
            if is_of_few:
                self.add_module(f"{name}_few", _Weight(r.few, hidden_size))
            inputs = r.few if is_of_few else hidden_size
            self.add_module(name, _Weight(rows, inputs, bias=r.projection_bias))


def _add_scan(module: nn.Module, shape: ScanShape, bias: bool, hidden_size: int) -> None:
    channels, sizes = shape.channels, (shape.rank, shape.dim, shape.dim)
    module.in_proj = _Weight(2 * channels, hidden_size, bias=bias)
    module.x_proj = _Weight(sum(sizes), channels)
    module.dt_proj = _Weight(channels, shape.rank, bias=True)
    module.A_log = nn.Parameter(torch.empty(channels, shape.dim))
    module.D = nn.Parameter(torch.empty(channels))
    for name, size in zip(shape.norms, sizes, strict=False):
        _add(module, name, _Weight(size))


def _projections(r: Recurrence, shape: RecurrentShape) -> list[tuple[str, int]]:
    """What a layer's input is multiplied with, and how many outputs each has."""
    if not shape.is_delta:
        return [("in_proj", shape.values + shape.channels + shape.heads)]
    if r.by_heads:
        qkvz = shape.channels + shape.values
        return [("in_proj_qkvz", qkvz), ("in_proj_ba", 2 * shape.heads)]
    mixed = {"qkv": shape.channels}
    if r.apart:
        mixed = {"q": shape.keys, "k": shape.keys, "v": shape.values}
    sizes = {**mixed, "z": shape.values, "b": shape.heads, "a": shape.steps}
    return [(f"in_proj_{name}", rows) for name, rows in sizes.items()]


class _Mlp(nn.Module):
    def __init__(self, c: ModelConfig, inner: int):
        super().__init__()
        if c.fused_gate_up:
            self.gate_up_proj = _Weight(2 * inner, c.hidden_size, bias=c.mlp_bias)
        else:
            if c.gated_mlp:
                self.gate_proj = _Weight(inner, c.hidden_size, bias=c.mlp_bias)
            self.up_proj = _Weight(inner, c.hidden_size, bias=c.mlp_bias)
        self.down_proj = _Weight(c.hidden_size, inner, bias=c.mlp_bias)
        if c.activation == "xielu":
            for name, shape in zip(XIELU_PARAMETERS, ((1,), (1,), (), ()), strict=True):
                _add(self, f"act_fn.{name}", nn.Parameter(torch.empty(shape)))


@dataclass(frozen=True)
class _Kind:
    """What a layer consists of."""

    attends: bool
    recurrence: Recurrence | None
    has_mlp: bool
    experts: Experts | None
    shape: AttentionShape
    shares_kv: bool
    inner_size: int
    turns: bool
    norms: Norms


class _Layer(nn.Module):
    def __init__(self, c: ModelConfig, kind: _Kind):
        super().__init__()
        names: list[str | None] = []
        if kind.attends or kind.recurrence is not None:
            names += (kind.norms.before_attention, kind.norms.after_attention)
        if kind.has_mlp:
            names += (kind.norms.before_mlp, kind.norms.after_mlp)
        if c.per_layer_inputs is not None:
            size = c.per_layer_inputs.size
            self.per_layer_input_gate = _Weight(size, c.hidden_size)
            self.per_layer_projection = _Weight(c.hidden_size, size)
            names.append("post_per_layer_input_norm")
        if c.altup is not None:
            _add_altup(self, c, c.altup)
        if c.laurel_rank:
            _add(self, "laurel.linear_left", _Weight(c.laurel_rank, c.hidden_size))
            _add(self, "laurel.linear_right", _Weight(c.hidden_size, c.laurel_rank))
            _add(self, "laurel.post_laurel_norm", _Weight(c.hidden_size))
        if c.layer_scalars:
            self.layer_scalar = nn.Parameter(torch.empty(1))
        if kind.attends:
            latent = c.latent
            self.self_attn = _Attention(c, kind) if latent is None else _LatentAttention(c, latent)
        if kind.recurrence is not None:
            self.add_module(kind.recurrence.module, _Recurrent(kind.recurrence, c.hidden_size))
        if kind.experts is not None:
            beside = kind.experts.beside
            names += () if beside is None else vars(beside).values()
            _add_experts(self, kind.experts, c)
        if kind.has_mlp and (kind.experts is None or kind.experts.beside is not None):
            self.mlp = _Mlp(c, kind.inner_size)
        for name in filter(None, names):
            self.add_module(name, _Weight(c.hidden_size, bias=c.norm_bias))


def _add_altup(layer: nn.Module, c: ModelConfig, altup: AltUp) -> None:
    count = altup.streams
    _add(layer, "altup.router_norm", _Weight(c.hidden_size))
    _add(layer, "altup.modality_router", _Weight(count, c.hidden_size))
    _add(layer, "altup.prediction_coefs", _Weight(count * count, count))
    _add(layer, "altup.correction_coefs", _Weight(count, count))
    if altup.scales_active:
        _add(layer, "altup.correct_output_scale", nn.Parameter(torch.empty(c.hidden_size)))


def _add_experts(layer: nn.Module, e: Experts, c: ModelConfig) -> None:
    hidden_size = c.hidden_size
    _add(layer, e.router, _Weight(e.count, hidden_size, bias=e.biases))
    if e.bias is not None:
        shape = (1, e.count) if e.bias_is_row else (e.count,)
        _add(layer, e.bias, nn.Parameter(torch.empty(shape)))
    for path, size in ((e.router_scale, hidden_size), (e.expert_scale, e.count)):
        if path is not None:
            _add(layer, path, nn.Parameter(torch.empty(size)))
    if e.shared_size:
        _add(layer, e.shared, _Mlp(c, e.shared_size))
        if e.shared_gate is not None:
            _add(layer, e.shared_gate, _Weight(1, hidden_size))
    outer = hidden_size
    if e.latent is not None:
        outer = e.latent.size
        _add(layer, e.latent.into, _Weight(outer, hidden_size, bias=c.mlp_bias))
        _add(layer, e.latent.out, _Weight(hidden_size, outer, bias=c.mlp_bias))
    for number in range(e.count):
        for name, inner in e.inward.items():
            _add(layer, name.format(number), _Weight(inner, outer, bias=e.biases))
        down = _Weight(outer, e.intermediate_size, bias=e.biases)
        _add(layer, e.down.format(number), down)


def _add(module: nn.Module, path: str, leaf: nn.Module | nn.Parameter) -> None:
    """Put `leaf` at a dotted path, with the modules on the way."""
    *way, last = path.split(".")
    for name in way:
        if not hasattr(module, name):
            module.add_module(name, nn.Module())
        module = getattr(module, name)
    setattr(module, last, leaf)


class _Body(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed_tokens = _Weight(c.vocab_size, c.hidden_size)
        self.norm = _Weight(c.hidden_size, bias=c.norm_bias)
        if c.per_layer_inputs is not None:
            rows, size = c.per_layer_inputs.rows, c.per_layer_inputs.size
            self.embed_tokens_per_layer = _Weight(rows, c.num_layers * size)
            self.per_layer_model_projection = _Weight(c.num_layers * size, c.hidden_size)
            self.per_layer_projection_norm = _Weight(size)
        for number in range(0 if c.altup is None else c.altup.streams - 1):
            for name in ("altup_projections", "altup_unembed_projections"):
                _add(self, f"{name}.{number}", _Weight(c.hidden_size, c.hidden_size))


class Skeleton(nn.Module):
    """The whole model but for its layers, named as Hugging Face names it."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.model = _Body(c)
        if not c.tied_embeddings:
            self.lm_head = _Weight(c.vocab_size, c.hidden_size, bias=c.head_bias)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the checkpoint must hold: Hugging Face name -> shape."""
    from accelerate import init_empty_weights

    c = config
    kinds = [
        _Kind(
            c.attends(layer),
            c.recurrence_of(layer),
            c.has_mlp(layer),
            c.experts_of(layer),
            c.shape_of(layer),
            c.shares_kv(layer),
            c.inner_size(layer),
            c.ropes[layer] is not None,
            c.norms_of(layer),
        )
        for layer in range(c.num_layers)
    ]
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
    shared = {e.shared: e.shared_size for e in config.experts if e is not None and e.shared_size}
    for mlp, inner in (
        {"mlp": config.intermediate_size, **shared}.items() if config.fused_gate_up else ()
    ):
        ends = {"gate_proj": (0, inner), "up_proj": (inner, 2 * inner)}
        parts[f"{mlp}.gate_up_proj"] = [(f"{mlp}.{n}", *rows) for n, rows in ends.items()]
    return {
        f"{fused}.{kind}": [(f"{name}.{kind}", start, stop) for name, start, stop in pieces]
        for fused, pieces in parts.items()
        for kind in ("weight", "bias")
    }


def expert_names(config: ModelConfig) -> dict[tuple[int, int], list[str]]:
    """The tensors of each routed expert, (layer, number): names in the checkpoint."""
    found = {}
    for layer in range(config.num_layers):
        experts = config.experts_of(layer)
        if experts is None:
            continue
        for number in range(experts.count):
            paths = [path.format(number) for path in (*experts.inward, experts.down)]
            kinds = ("weight", "bias") if experts.biases else ("weight",)
            names = [f"{layer_prefix(layer)}{path}.{kind}" for path in paths for kind in kinds]
            found[layer, number] = names
    return found


def layer_prefix(layer: int) -> str:
    """What the names of one layer's tensors begin with."""
    return f"model.layers.{layer}."


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to; None for embeddings, the final norm and the head."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else None


# What chooses among experts, what says how much a token changes or counts, what mixes residual
# streams, and norms of many heads.
_DECIDING = (
    ".gate.weight",
    ".router.weight",
    ".router.proj.weight",
    ".router.layer.weight",
    ".gate.wg.weight",
    ".e_score_correction_bias",
    "_expert_gate.weight",
    ".modality_router.weight",
    "_coefs.weight",
    "_norm.weight",
    "_a.weight",
    "_a_few.weight",
    "_b.weight",
    "_ba.weight",
    ".A_log",
    ".x_proj.weight",
    ".dt_proj.weight",
)


def decides(name: str) -> bool:
    """Whether a matrix stays as it is when others are quantised: it is small, and another choice of
    experts, or another pace at which a state forgets, is another model.
    """
    return name.endswith(_DECIDING)

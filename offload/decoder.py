"""The transformer's arithmetic for one layer: norms, projections, RoPE, the gated MLP. One decoder
for all families.

Works on the rows of one cell (prefill) or on a single row (decode), in float32. A cell is always
handled as a whole buffer of cell_tokens rows, of which only the tiles that hold asked-for rows are
multiplied, so a row's bits depend on its place in the cell and on nothing else. Knows no pages and
no tiers.
"""

from __future__ import annotations

import torch

from ..kernels.matmul import ROW_TILE, linear
from .model_config import ModelConfig
from .rope import Rope, apply_rope
from .weights import LayerTensors


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension (1910.07467)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def tiled(x: torch.Tensor, rows: slice, weight, bias=None) -> torch.Tensor:
    """`linear` on the tiles of x (n, in) that hold `rows`; other rows of the result are zero."""
    if x.shape[0] == 1:
        return linear(x, weight, bias)
    first = rows.start // ROW_TILE * ROW_TILE
    last = -(-rows.stop // ROW_TILE) * ROW_TILE
    if first == 0 and last == x.shape[0]:
        return linear(x, weight, bias)
    out = x.new_zeros(x.shape[0], weight.shape[0])
    out[first:last] = linear(x[first:last], weight, bias)
    return out


class Decoder:
    """Layer arithmetic of one model. `rows` says which rows of a cell are asked for."""

    def __init__(self, config: ModelConfig, device: torch.device):
        self.config = config
        self.rope = Rope(config.rope, config.head_dim, device)
        self.scale = config.head_dim**-0.5

    def project(self, w: LayerTensors, x: torch.Tensor, rows: slice, position: int):
        """Queries, keys and values of residual rows x (n, hidden_size), the first of which is at
        `position`.

        Returns q (kv_heads, groups * n, head_dim), scaled, row = group * n + i; k and v (n,
        kv_heads, head_dim).
        """
        c, n = self.config, x.shape[0]
        h = rms_norm(x, w["input_layernorm.weight"], c.norm_eps)

        def heads(name: str, count: int) -> torch.Tensor:
            out = tiled(h, rows, w[f"self_attn.{name}.weight"], w.get(f"self_attn.{name}.bias"))
            return out.view(n, count, c.head_dim)

        q, k = heads("q_proj", c.num_heads), heads("k_proj", c.num_kv_heads)
        v = heads("v_proj", c.num_kv_heads)
        if c.qk_norm:
            q = rms_norm(q, w["self_attn.q_norm.weight"], c.norm_eps)
            k = rms_norm(k, w["self_attn.k_norm.weight"], c.norm_eps)
        cos, sin = self.rope.angles(position, n)
        q, k = apply_rope(q, cos, sin) * self.scale, apply_rope(k, cos, sin)
        q = q.view(n, c.num_kv_heads, c.groups, c.head_dim).permute(1, 2, 0, 3)
        return q.reshape(c.num_kv_heads, c.groups * n, c.head_dim), k, v

    def key_bias(self, w: LayerTensors) -> torch.Tensor | None:
        """The key projection's bias, (kv_heads, head_dim), or None. With a key norm it is not
        additive: None.
        """
        bias = w.get("self_attn.k_proj.bias")
        if bias is None or self.config.qk_norm:
            return None
        return bias.view(self.config.num_kv_heads, self.config.head_dim)

    def mix(self, w: LayerTensors, x: torch.Tensor, attended: torch.Tensor, rows: slice):
        """Residual rows after the layer: x plus the attention's output, then plus the MLP's."""
        o = tiled(attended, rows, w["self_attn.o_proj.weight"], w.get("self_attn.o_proj.bias"))
        x = x + o
        h = rms_norm(x, w["post_attention_layernorm.weight"], self.config.norm_eps)
        gate = tiled(h, rows, w["mlp.gate_proj.weight"], w.get("mlp.gate_proj.bias"))
        up = tiled(h, rows, w["mlp.up_proj.weight"], w.get("mlp.up_proj.bias"))
        inner = torch.nn.functional.silu(gate).mul_(up)
        return x + tiled(inner, rows, w["mlp.down_proj.weight"], w.get("mlp.down_proj.bias"))

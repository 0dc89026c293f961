"""A Llama-type network in plain torch whose attention is somebody else's: for looking inside.

Reads a checkpoint of the Llama, Qwen2 or Qwen3 type in float32. Keys and values are (kv_heads,
num_tokens, head_dim), with RoPE applied; queries are scaled. Knows no pages.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

CHUNK = 512  # tokens that are read at once


@dataclass
class Reading:
    """What reading a text left behind: per layer, keys and values (kv_heads, num_tokens, d)."""

    ids: torch.Tensor  # (num_tokens,)
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


class Network:
    """The weights of one checkpoint folder and the steps of its layers."""

    def __init__(self, folder: Path):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.num_layers = config["num_hidden_layers"]
        self.num_heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads", self.num_heads)
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.num_heads
        self.theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
        self.eps = config["rms_norm_eps"]
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(str(file))
        self.weights = {name.removeprefix("model."): w.float() for name, w in tensors.items()}

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weights["embed_tokens.weight"][ids]

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        head = self.weights.get("lm_head.weight", self.weights["embed_tokens.weight"])
        return self._norm(x, "norm.weight") @ head.T

    def query(self, layer: int, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(num_rows, kv_heads, group, d) of the residual x (num_rows, hidden), scaled, rotated."""
        q = self._heads(layer, "q", x)
        q = self._rope(q, positions) * self.head_dim**-0.5
        return q.unflatten(1, (self.kv_heads, -1))

    def key_value(self, layer: int, x: torch.Tensor, positions: torch.Tensor):
        """Keys and values, each (num_rows, kv_heads, d)."""
        return self._rope(self._heads(layer, "k", x), positions), self._heads(layer, "v", x)

    def after_attention(self, layer: int, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The residual with attention's output (num_rows, kv_heads, group, d) added."""
        return x + out.flatten(1) @ self.weights[f"layers.{layer}.self_attn.o_proj.weight"].T

    def after_mlp(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        name = f"layers.{layer}"
        h = self._norm(x, f"{name}.post_attention_layernorm.weight")
        gate, up, down = (
            self.weights[f"{name}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down")
        )
        return x + (F.silu(h @ gate.T) * (h @ up.T)) @ down.T

    @torch.no_grad()
    def read(self, ids: torch.Tensor) -> Reading:
        """Reads a text exactly."""
        shape = (self.num_layers, self.kv_heads, len(ids), self.head_dim)
        keys, values = torch.empty(shape), torch.empty(shape)
        group = self.num_heads // self.kv_heads
        for start in range(0, len(ids), CHUNK):
            end = min(start + CHUNK, len(ids))
            positions = torch.arange(start, end)
            x = self.embed(ids[start:end])
            mask = torch.ones(end - start, end, dtype=torch.bool).tril(start)
            for layer in range(self.num_layers):
                k, v = self.key_value(layer, x, positions)
                keys[layer, :, start:end] = k.transpose(0, 1)
                values[layer, :, start:end] = v.transpose(0, 1)
                q = self.query(layer, x, positions).permute(1, 2, 0, 3)  # (kv, group, rows, d)
                out = F.scaled_dot_product_attention(
                    q,
                    keys[layer, :, None, :end].expand(-1, group, -1, -1),
                    values[layer, :, None, :end].expand(-1, group, -1, -1),
                    attn_mask=mask,
                    scale=1.0,
                )
                x = self.after_attention(layer, x, out.permute(2, 0, 1, 3))
                x = self.after_mlp(layer, x)
        return Reading(ids, list(keys), list(values))

    def _heads(self, layer: int, part: str, x: torch.Tensor) -> torch.Tensor:
        name = f"layers.{layer}.self_attn.{part}"
        h = self._norm(x, f"layers.{layer}.input_layernorm.weight")
        y = h @ self.weights[f"{name}_proj.weight"].T
        if f"{name}_proj.bias" in self.weights:
            y = y + self.weights[f"{name}_proj.bias"]
        y = y.unflatten(-1, (-1, self.head_dim))
        return self._norm(y, f"{name}_norm.weight") if f"{name}_norm.weight" in self.weights else y

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weights[name], self.eps)

    def _rope(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        half = self.head_dim // 2
        frequencies = self.theta ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = positions[:, None, None].float() * frequencies
        left, right = x[..., :half], x[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

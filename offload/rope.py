"""Rotary position embedding: rotation angles for any position, with the scalings that the families
use.

Frequencies and angles are float32, as `transformers` computes them. Scalings that depend on the
length of the text (dynamic, longrope) are not here: every angle is a function of the position
alone. Sources: RoFormer (2104.09864), position interpolation (2306.15595), YaRN (2309.00071,
section 3), Llama 3.1's released inference code.
"""

from __future__ import annotations

import math

import torch

from .model_config import RopeConfig


class Rope:
    """Turns queries and keys by their positions. Half-split layout: element i pairs with i +
    head_dim / 2.
    """

    def __init__(self, config: RopeConfig, head_dim: int, device: torch.device):
        self.frequencies, self.amplitude = _frequencies(config, head_dim)
        self.frequencies = self.frequencies.to(device)

    def angles(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines for positions [start, start + count): each (count, 1, head_dim)
        float32.
        """
        positions = torch.arange(start, start + count, device=self.frequencies.device)
        angle = positions.float()[:, None] * self.frequencies
        angle = torch.cat((angle, angle), dim=-1)[:, None, :]
        return angle.cos() * self.amplitude, angle.sin() * self.amplitude


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotated copy of x (tokens, heads, head_dim); cos and sin are (tokens, 1, head_dim)."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


def _frequencies(config: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / (config.theta**exponents)
    p = config.parameters
    if config.kind == "linear":
        return plain / p["factor"], 1.0
    if config.kind == "llama3":
        return _llama3(plain, p), 1.0
    if config.kind == "yarn":
        return _yarn(plain, config.theta, head_dim, p)
    return plain, 1.0


def _llama3(plain: torch.Tensor, p: dict) -> torch.Tensor:
    """Long waves are stretched by `factor`, short ones kept, and those between blended."""
    original = p["original_max_position_embeddings"]
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    waves = 2 * math.pi / plain
    blend = (original / waves - low) / (high - low)
    middle = (1 - blend) * plain / p["factor"] + blend * plain
    stretched = torch.where(waves > original / low, plain / p["factor"], middle)
    return torch.where(waves < original / high, plain, stretched)


def _yarn(plain: torch.Tensor, theta: float, head_dim: int, p: dict) -> tuple[torch.Tensor, float]:
    """Dimensions that turn often within the original length are kept, slow ones stretched, a ramp
    between.
    """
    factor, original = p["factor"], p["original_max_position_embeddings"]

    def dimension_turning(times: float) -> float:
        return head_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension_turning(p.get("beta_fast") or 32)
    high = dimension_turning(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2).float() - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    frequencies = plain / factor * (1 - keep) + plain * keep

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    amplitude = p.get("attention_factor")
    if amplitude is None:
        over, under = p.get("mscale"), p.get("mscale_all_dim")
        amplitude = magnitude(over) / magnitude(under) if over and under else magnitude(1.0)
    return frequencies, float(amplitude)

"""Rotary position embedding: rotation angles for any position, with the scalings that the families
use.

Frequencies and angles are float32, as `transformers` computes them. Every angle is a function of
the position alone (rope_config.py fixes what depends on a length). Sources: RoFormer (2104.09864),
position interpolation (2306.15595), YaRN (2309.00071, section 3), Llama 3.1's released inference
code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ...kernels.matmul import dot_heads
from ...kernels.rope_scores import Turns, block_turns, cos_sin
from ...kernels.turn import turn
from ..models.rope_config import RopeConfig

_ROWS_AT_ONCE = 64
# Cosines, sines, constant and turns, as kernels.rope_scores takes them.
Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Turns]


class Rope:
    """Turns queries and keys by their positions. config: a fixed one, or None for a layer without
    positions, which turns nothing.
    """

    def __init__(self, config: RopeConfig | None, head_dim: int, device: torch.device):
        self.config = config
        self._nothing = torch.empty(0, device=device)
        self._latest: tuple[int, int, torch.Tensor, torch.Tensor] | None = None
        self._rows: tuple[int, list[tuple[torch.Tensor, torch.Tensor]]] = -1, []
        self.frequencies, self.width, self.amplitude = self._nothing, 0, 1.0
        if config is not None:
            self.width = config.width(head_dim)
            frequencies, self.amplitude = _frequencies(config, self.width)
            self.frequencies = (-frequencies if config.backwards else frequencies).to(device)
        self.turns = block_turns(self.frequencies)

    def turn(
        self, x: torch.Tensor, start: int, scale: float = 1.0, *, heads_first: bool = False
    ) -> torch.Tensor:
        """x (tokens, heads, head_dim), the first token of which is at `start`, turned and times
        scale: in that order of dimensions, or (heads, tokens, head_dim). x stays as it is.
        """
        (cosines, sines), is_interleaved = self.angles(start, x.shape[0]), False
        if self.config is None:
            cosines = sines = x.new_empty((x.shape[0], 1, 0))
        else:
            is_interleaved = self.config.interleaved
        return turn(x, cosines, sines, is_interleaved, scale, heads_first)

    def turn_bias(self, b: torch.Tensor, start: int, count: int) -> torch.Tensor:
        """A key bias b (heads, head_dim), turned as kernels.rope_scores has it: (count, heads,
        head_dim), the first at position `start`."""
        b = b[None].expand(count, -1, -1)
        if self.config is None:
            return b
        cosines, sines = map(self._of_elements, cos_sin(self.turns, start, count))
        return turn(b, cosines, sines, self.config.interleaved, 1.0, False)

    def factors(self, q: torch.Tensor, b: torch.Tensor) -> Factors:
        """Of products of q (heads, rows, head_dim), turned already, with b (heads, head_dim),
        turned by `turn_bias`."""
        constant = dot_heads(q[..., self.width :], b[..., self.width :])
        if self.config is None:
            none = q.new_empty((*q.shape[:2], 0))
            return none, none, constant, self.turns
        q, b = q[..., : self.width], b[:, None, : self.width]
        if self.config.interleaved:
            q1, q2, b1, b2 = q[..., ::2], q[..., 1::2], b[..., ::2], b[..., 1::2]
        else:
            (q1, q2), (b1, b2) = q.chunk(2, -1), b.chunk(2, -1)
        cosines, sines = q1 * b1 + q2 * b2, q2 * b1 - q1 * b2
        return cosines * self.amplitude, sines * self.amplitude, constant, self.turns

    def angles(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines for positions [start, start + count): each (count, 1, width) float32;
        width is 0 for a layer without positions. The latest are kept: the layers of a model ask for
        the same.
        """
        if self.config is None:
            return self._nothing, self._nothing
        if count == 1:
            return self._row(start)
        latest = self._latest  # read once: a second thread may replace it
        if latest is None or latest[:2] != (start, count):
            latest = self._latest = (start, count, *self._turns(start, count))
        return latest[2:]

    def _row(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one position, as a decoded token asks for it: many are found together, since eight
        small operations take 0.1 ms where no cache holds their code."""
        block, row = divmod(position, _ROWS_AT_ONCE)
        rows = self._rows
        if rows[0] != block:
            cos, sin = self._turns(block * _ROWS_AT_ONCE, _ROWS_AT_ONCE)
            rows = self._rows = block, list(zip(cos.split(1), sin.split(1), strict=True))
        return rows[1][row]

    def _turns(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(start, start + count, device=self.frequencies.device)
        angles = positions.float()[:, None] * self.frequencies
        return self._of_elements(angles.cos()), self._of_elements(angles.sin())

    def _of_elements(self, of_pairs: torch.Tensor) -> torch.Tensor:
        """What `turn` multiplies elements with, (count, 1, width), of what pairs have, (count,
        width / 2)."""
        assert self.config is not None  # which a layer without positions lacks
        if self.config.interleaved:
            of_all = of_pairs.repeat_interleave(2, dim=-1)
        else:
            of_all = torch.cat((of_pairs, of_pairs), dim=-1)
        return of_all[:, None, :] * self.amplitude


def layer_ropes(
    configs: Sequence[RopeConfig | None], head_dims: Sequence[int], device
) -> list[Rope]:
    """One Rope for each layer; layers with equal embeddings and heads share theirs."""
    made: list[tuple[int, Rope]] = []
    ropes = []
    for config, dim in zip(configs, head_dims, strict=True):
        rope = next((r for of, r in made if of == dim and r.config == config), None)
        if rope is None:
            rope = Rope(config, dim, device)
            made.append((dim, rope))
        ropes.append(rope)
    return ropes


def _frequencies(config: RopeConfig, width: int) -> tuple[torch.Tensor, float]:
    """Angles per position of each pair, (width / 2,), and what turned elements are scaled by."""
    exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    p = config.parameters
    if config.kind == "factors":
        factors = torch.tensor(p["factors"], dtype=torch.float32)
        return 1.0 / (factors * config.theta**exponents), p["attention_factor"]
    plain = 1.0 / (config.theta**exponents)
    if config.kind == "proportional":
        plain[int(p["partial_rotary_factor"] * width // 2) :] = 0.0
        return plain / p.get("factor", 1.0), 1.0
    if config.kind == "linear":
        return plain / p["factor"], 1.0
    if config.kind == "llama3":
        return _llama3(plain, p), 1.0
    if config.kind == "yarn":
        return _yarn(plain, config.theta, width, p)
    assert config.kind == "default", f"{config.kind} was not fixed for a context"
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


def _yarn(plain: torch.Tensor, theta: float, width: int, p: dict) -> tuple[torch.Tensor, float]:
    """Dimensions that turn often within the original length are kept, slow ones stretched, a ramp
    between.
    """
    factor, original = p["factor"], p["original_max_position_embeddings"]

    def dimension_turning(times: float) -> float:
        return width * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension_turning(p.get("beta_fast") or 32)
    high = dimension_turning(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(width // 2).float() - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    frequencies = plain / factor * (1 - keep) + plain * keep

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    amplitude = p.get("attention_factor")
    if amplitude is None:
        over, under = p.get("mscale"), p.get("mscale_all_dim")
        amplitude = magnitude(over) / magnitude(under) if over and under else magnitude(1.0)
    return frequencies, float(amplitude)

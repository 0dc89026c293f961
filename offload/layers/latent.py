"""Multi-head latent attention (DeepSeek-V2, 2405.04434) as attention of many query heads over one
head of keys and values: what pages hold of a token is its latent and the part that turns.

A head's key is a product of the latent, and so is its value. Both products are moved to where there
are few rows: the query is multiplied with the first one (`k_b_proj`), what was attended to with the
second (`v_b_proj`). Sources: section 2.1 there; the tensors' names are Hugging Face's, and the
files' kv_b_proj is these two.
"""

from __future__ import annotations

import torch

from ...kernels.norm import rms_norm
from ..models.layer_config import Latent
from ..models.model_config import ModelConfig
from ..weights.weights import LayerTensors
from .rowwise import tiled, tiled_heads


class LatentAttention:
    """The projections of one model's layers around the attention itself. `h`: normed residual rows
    (n, hidden_size); `rows`: those that are asked for."""

    def __init__(self, config: ModelConfig, latent: Latent):
        self._heads, self._latent = config.num_heads, latent

    def queries(self, w: LayerTensors, h: torch.Tensor, rows: slice) -> torch.Tensor:
        """(n, num_heads, head_dim) before RoPE: what turns comes first."""
        latent = self._latent
        if latent.query_rank is None:
            q = _project(w, "q_proj", h, rows)
        else:
            few = self._normed(w, "q_a_layernorm", _project(w, "q_a_proj", h, rows))
            q = _project(w, "q_b_proj", few, rows)
        q = q.view(len(h), self._heads, latent.query_dim)
        plain, turning = q.split((latent.nope_dim, latent.rope_dim), -1)
        return torch.cat((turning, tiled_heads(plain, rows, w["self_attn.k_b_proj.weight"])), -1)

    def keys(self, w: LayerTensors, h: torch.Tensor, rows: slice) -> torch.Tensor:
        """(n, 1, head_dim) before RoPE: what turns, then the latent, which is the value too."""
        both = _project(w, "kv_a_proj_with_mqa", h, rows)
        latent, turning = both.split((self._latent.rank, self._latent.rope_dim), -1)
        return torch.cat((turning, self._normed(w, "kv_a_layernorm", latent)), -1).unsqueeze(1)

    def mixed(self, w: LayerTensors, attended: torch.Tensor, rows: slice) -> torch.Tensor:
        """What attention gave, (n, num_heads * head_dim), of which the latents count, as the output
        projection takes it: (n, num_heads * value_dim)."""
        latents = attended.view(len(attended), self._heads, -1)[..., self._latent.rope_dim :]
        return tiled_heads(latents, rows, w["self_attn.v_b_proj.weight"]).flatten(1)

    def _normed(self, w: LayerTensors, name: str, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, w.vector(f"self_attn.{name}.weight"), 0.0, self._latent.norm_eps)


def _project(w: LayerTensors, name: str, x: torch.Tensor, rows: slice) -> torch.Tensor:
    name = f"self_attn.{name}"
    return tiled(x, rows, w[f"{name}.weight"], w.get(f"{name}.bias"))

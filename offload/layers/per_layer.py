"""What every layer is given of a token besides the residual: some numbers of a table, and as many
of the token's embedding, through a projection and a norm.

The table has a row for each token and is as large as all layers' weights: of it the rows that are
needed are read, as of the embeddings, and nothing stays. The projection stays. What a layer does
with its inputs is decoder.py's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...kernels.norm import rms_norm
from ..models.checkpoint import Checkpoint, RowReader
from ..models.model_config import ModelConfig
from ..weights.packing import Kept, unquantised
from .rowwise import tiled

_TABLE = "model.embed_tokens_per_layer.weight"
_PROJECTION = "model.per_layer_model_projection.weight"
_NORM = "model.per_layer_projection_norm.weight"
PROJECTIONS = (_PROJECTION, _NORM)  # what stays in memory


class PerLayer:
    """Of one model that has some (ModelConfig.per_layer_inputs). kept: the tensors of PROJECTIONS,
    by name."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        kept: dict[str, Kept],
        device: torch.device,
    ):
        self._config, self._checkpoint, self._device = config, checkpoint, device
        self._projection, self._norm = kept[_PROJECTION], unquantised(kept[_NORM])
        assert config.per_layer_inputs is not None
        self._shape = config.per_layer_inputs
        self._rows = RowReader(checkpoint, _TABLE)

    def inputs(self, token_ids: Sequence[int], x: torch.Tensor, rows: slice) -> torch.Tensor:
        """(num_layers, n, size) float32 of the tokens whose embeddings, as the first layer takes
        them, are `rows` of x (n, hidden_size); others are zero or anything."""
        config, size = self._config, self._shape.size
        projected = tiled(x, rows, self._projection) * config.hidden_size**-0.5
        projected = projected.view(len(x), config.num_layers, size)
        out = rms_norm(projected, self._norm, config.norm_offset, config.norm_eps)
        read = self._read(token_ids).view(len(token_ids), config.num_layers, size)
        out[rows] += read * size**0.5
        return (out * 0.5**0.5).transpose(0, 1).contiguous()

    def _read(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Rows of the table, float32."""
        num_rows = self._shape.rows
        token_ids = [token if token < num_rows else 0 for token in token_ids]
        if len(token_ids) == 1:
            rows = self._rows.read(token_ids[0])
        else:
            rows = self._checkpoint.read_rows(_TABLE, token_ids)
        return rows.to(self._device, torch.float32)

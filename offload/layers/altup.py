"""What a layer does with residual streams beside each other (AltUp, 2301.13310): it predicts all of
them from all, works on the first, and corrects them by what became of that.

A token's residual is its streams one after the other. Sums over streams are made number by number
in their order, so that a row has its bits in any company.
"""

from __future__ import annotations

import torch

from ...kernels.altup_step import AltUpStep
from ...kernels.gate import gate
from ...kernels.norm import rms_norm
from ...kernels.step import native_for
from ..models.layer_config import AltUp
from ..models.model_config import ModelConfig
from ..weights.weights import LayerTensors
from .rowwise import tiled


class AltUpLayers:
    """Of one model. x is (n, streams * hidden_size) in all methods, of which `rows` are asked for;
    what is called active is (n, hidden_size)."""

    def __init__(self, config: ModelConfig, altup: AltUp):
        self._count, self._size, self._eps = altup.streams, config.hidden_size, config.norm_eps
        self._scales = altup.scales_active

    def predicted(self, w: LayerTensors, x: torch.Tensor, rows: slice) -> torch.Tensor:
        """What a layer expects the streams x to be behind it; it works on the first."""
        n, count = len(x), self._count
        modalities = self._modalities(w, self.first(x), rows)
        shares = tiled(modalities, rows, w["altup.prediction_coefs.weight"]).view(n, count, count)
        streams = x.view(n, count, -1)
        out = streams.clone()
        for number in range(count):
            out += streams[:, number : number + 1] * shares[:, :, number].unsqueeze(2)
        return out.view(n, -1)

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """The first stream of x."""
        return x[:, : self._size].contiguous()

    def with_first(self, x: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """x with another first stream."""
        return torch.cat((active, x[:, self._size :]), 1)

    def corrected(
        self, w: LayerTensors, predicted: torch.Tensor, active: torch.Tensor, rows: slice
    ) -> torch.Tensor:
        """The streams behind a layer that made `active` of the first of what it predicted."""
        shares = tiled(self._modalities(w, active, rows), rows, w["altup.correction_coefs.weight"])
        streams = predicted.view(len(active), self._count, -1)
        change = (active - streams[:, 0]).unsqueeze(1) * (shares + 1.0).unsqueeze(2)
        return change.add_(streams).view(len(active), -1)

    def gated(self, w: LayerTensors, x: torch.Tensor) -> torch.Tensor:
        """Of corrected streams, what gates the layer's own inputs."""
        first = self.first(x)
        return first * w.vector("altup.correct_output_scale") if self._scales else first

    def added(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x with y (n, hidden_size) added to all streams but the first."""
        streams = x.view(len(x), self._count, -1)
        return torch.cat((streams[:, :1], streams[:, 1:] + y.unsqueeze(1)), 1).view(x.shape)

    def step(self, w: LayerTensors) -> AltUpStep:
        """The same by compiled kernels, as a part of a token's step."""
        return AltUpStep(
            native_for(),
            (w.vector("altup.router_norm.weight"), self._eps),
            w["altup.modality_router.weight"],
            w["altup.prediction_coefs.weight"],
            w["altup.correction_coefs.weight"],
            w.vector("altup.correct_output_scale") if self._scales else None,
        )

    def _modalities(self, w: LayerTensors, x: torch.Tensor, rows: slice) -> torch.Tensor:
        """(n, streams) of rows x (n, hidden_size), each from -1 to 1."""
        normed = rms_norm(x, w.vector("altup.router_norm.weight"), 0.0, self._eps) / self._size
        scores = tiled(normed, rows, w["altup.modality_router.weight"])
        # The hyperbolic tangent, by a kernel whose bits of a row are its own.
        return gate(scores * 2, torch.ones_like(scores), "sigmoid") * 2 - 1

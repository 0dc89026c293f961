"""What a layer does with residual streams beside each other (AltUp, 2301.13310), for one decoded
token as a part of `TokenStep`: it predicts them, works on the first, and corrects them all.
Compiled kernels alone.

Knows no checkpoint: tensors come as arguments.
"""

from __future__ import annotations

import torch

from .matmul import Weight
from .norm import vector_address
from .step import product_numbers


class AltUpStep:
    """One layer's tensors. Keeps them alive.

    native: of `step.native_for`. norm: weight (hidden_size,) float32 and eps of what streams are
    routed by. router: weight (streams, hidden_size); prediction, correction: weights of (streams *
    streams) and of (streams) rows, of as many inputs as there are streams. scale: (hidden_size,)
    float32, of the first stream before it gates the layer's own inputs, or None.
    """

    def __init__(
        self,
        native,
        norm: tuple[torch.Tensor, float],
        router: Weight,
        prediction: Weight,
        correction: Weight,
        scale: torch.Tensor | None,
    ):
        self._kept = norm, router, prediction, correction, scale
        numbers = [vector_address(norm[0]), vector_address(scale)]
        for weight in (router, prediction, correction):
            numbers += product_numbers(weight, None)
        self.native = native.AltUpStep(numbers, norm[1])

"""What a layer that keeps a state makes of one decoded token, for its output projection, in one
call: norm, projections and `recur` or `short_conv`, to the bit what they give one after the other.
Compiled kernels alone.

Knows no checkpoint and no sequences: tensors and states come as arguments.
"""

from __future__ import annotations

import torch

from .matmul import Weight
from .norm import Norm
from .recurrence import (
    Described,
    RecurrentShape,
    RecurrentWeights,
    convolution_numbers,
    state_numbers,
)
from .step import block_product
from .threads import num_threads


class RecurrentStep:
    """One layer's tensors, ready for one row at a time. Keeps them alive.

    native: of `step.native_for`. products: weights and biases (out,) float32 or None of the
    projections; norm: as BlockProduct has it. order: (outputs,) int64, which of the outputs of all
    projections stands at each place, None: they stand in order; factors: (outputs,) float32, of
    what stands there, or None. What stands there is convolution input, gate, gains and steps
    (DeltaNet), gate, convolution input and steps (Mamba-2), or b, c and x: see `recur` and
    `short_conv`. recurrence: shape and weights, or of a short convolution its weights (conv_width,
    channels) and biases.
    """

    def __init__(
        self,
        native,
        products: list[tuple[Weight, torch.Tensor | None]],
        norm: Norm,
        recurrence: tuple[RecurrentShape, RecurrentWeights]
        | tuple[torch.Tensor, torch.Tensor | None],
        order: torch.Tensor | None = None,
        factors: torch.Tensor | None = None,
    ):
        first, second = recurrence
        described, floats = None, []
        if isinstance(first, RecurrentShape):
            assert isinstance(second, RecurrentWeights)
            described = Described.of(first, second)
            numbers, floats = described.numbers, described.floats
            self.num_outputs = first.values
        else:
            assert not isinstance(second, RecurrentWeights)
            numbers = convolution_numbers(first, second)
            self.num_outputs = first.shape[1]
        self._kept = products, norm, recurrence, described, order, factors
        at = [0 if part is None else part.data_ptr() for part in (order, factors)]
        weights, biases = map(list, zip(*products, strict=True))
        self.native = native.RecurrentStep(
            block_product(native, weights, norm, biases),
            [*at, int(described is not None), *numbers],
            floats,
        )

    def run(self, x: torch.Tensor, before, after) -> torch.Tensor:
        """(1, num_outputs) float32 of the residual row x (1, hidden_size) float32. before, after:
        states as `recur` has them."""
        x, out = x.contiguous(), torch.empty((1, self.num_outputs))
        self.native.run(x.data_ptr(), state_numbers(before, after), out.data_ptr(), num_threads())
        return out

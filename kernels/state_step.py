"""What a layer that keeps a state makes of one decoded token, for its output projection, in one
call: norm, projections and `recur`, `short_conv` or `scan`, to the bit what they give one after the
other. Compiled kernels alone.

Knows no checkpoint and no sequences: tensors and states come as arguments.
"""

from __future__ import annotations

import torch

from .matmul import Weight
from .norm import Norm, norm_numbers
from .recurrence import (
    Described,
    RecurrentShape,
    RecurrentWeights,
    convolution_numbers,
    state_numbers,
)
from .scan import scan_numbers
from .step import block_product
from .threads import num_threads

Product = tuple[Weight, torch.Tensor | None]  # a weight and its bias (out,) float32


class StateStep:
    """One layer's tensors, ready for one row at a time. Keeps them alive.

    compiled: what runs it; kept: whatever that has addresses of.
    """

    def __init__(self, compiled, num_outputs: int, kept: tuple):
        self.native, self.num_outputs, self._kept = compiled, num_outputs, kept

    def run(self, x: torch.Tensor, before, after) -> torch.Tensor:
        """(1, num_outputs) float32 of the residual row x (1, hidden_size) float32. before, after:
        states as `recur` has them."""
        x, out = x.contiguous(), torch.empty((1, self.num_outputs))
        self.native.run(x.data_ptr(), state_numbers(before, after), out.data_ptr(), num_threads())
        return out


def recurrent_step(
    native,
    products: list[Product],
    norm: Norm,
    recurrence: tuple[RecurrentShape, RecurrentWeights] | tuple[torch.Tensor, torch.Tensor | None],
    order: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
    gate: Product | None = None,
    steps: Product | None = None,
) -> StateStep:
    """Of a layer with matrices, or with a short convolution alone.

    native: of `step.native_for`. products: the projections of a residual row, normed. order:
    (outputs,) int64, which of the outputs of all projections stands at each place, None: they stand
    in order; factors: (outputs,) float32, of what stands there, or None. What stands there is
    convolution input, gate, gains and steps (DeltaNet), gate, convolution input and steps
    (Mamba-2), or b, c and x: see `recur` and `short_conv`. recurrence: shape and weights, or of a
    short convolution its weights (conv_width, channels) and biases. gate, steps: of a DeltaNet,
    what makes these of the few numbers that stand in their place.
    """
    first, second = recurrence
    described, floats = None, []
    if isinstance(first, RecurrentShape):
        assert isinstance(second, RecurrentWeights)
        described = Described.of(first, second)
        numbers, floats, num_outputs = described.numbers, described.floats, first.values
    else:
        assert not isinstance(second, RecurrentWeights)
        numbers, num_outputs = convolution_numbers(first, second), first.shape[1]
    at = [0 if part is None else part.data_ptr() for part in (order, factors)]
    compiled = native.RecurrentStep(
        _product(native, products, norm),
        *(None if part is None else _product(native, [part]) for part in (gate, steps)),
        [*at, int(described is not None), *numbers],
        floats,
    )
    kept = products, norm, recurrence, described, order, factors, gate, steps
    return StateStep(compiled, num_outputs, kept)


def scan_step(
    native,
    products: tuple[Product, Product, Product],
    norm: Norm,
    conv: tuple[torch.Tensor, torch.Tensor | None],
    rate: torch.Tensor,
    skip: torch.Tensor,
    norms: list[Norm],
) -> StateStep:
    """Of a layer with a selective scan.

    native: of `step.native_for`. products: of a residual row, normed, convolution inputs and gate;
    of what the convolution gives, numbers for steps, keys and queries; of the first of these,
    steps. conv: as `silu_conv` has it; rate, skip: as `scan` has them. norms: of the numbers for
    steps, of keys and of queries, or none.
    """
    inputs, few, steps = products
    of_steps, *of_others = norms or (None, None, None)
    numbers, floats = convolution_numbers(*conv) + scan_numbers(rate, skip), []
    for of_other in of_others:
        of_norm, of_floats = norm_numbers(of_other)
        numbers, floats = numbers + of_norm, floats + of_floats
    compiled = native.ScanStep(
        _product(native, [inputs], norm),
        _product(native, [few]),
        _product(native, [steps], of_steps),
        numbers,
        floats,
    )
    return StateStep(compiled, len(skip), (products, norm, conv, rate, skip, norms))


def _product(native, products: list[Product], norm: Norm | None = None):
    weights, biases = map(list, zip(*products, strict=True))
    return block_product(native, weights, norm, biases)

"""Routed experts in the place of an MLP, or beside one, for one decoded token and as a part of
`TokenStep`: to the bit what the router's product, `route` and `add_expert` give one after the
other. Compiled kernels alone.

Knows no checkpoint: tensors come as arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .gate import ACTIVATIONS
from .matmul import Weight
from .norm import Norm, norm_numbers
from .routing import Routing, routing_numbers
from .step import product_numbers

Product = tuple[Weight, torch.Tensor | None]  # a weight and a bias (out,) float32


@dataclass(frozen=True)
class SharedExpert:
    """The expert that every token goes through. numbers: of `step.expert_numbers`; gate: a weight
    of one row, the sigmoid of whose product says how much of it counts, None: all of it; scaling:
    of that."""

    numbers: list[int]
    gate: Weight | None
    scaling: float


class RoutedStep:
    """One layer's experts, all of them in memory.

    native: of `step.native_for`. router: its weight (count, hidden_size) and bias (count,) float32
    or None; router_norm: of the residual, which experts are chosen by then, None: by what they are
    given. latent: weights and biases of the two products that routed experts stand between, None:
    they are given the residual. weighs_input: shares are of what experts are given, not of what
    they give. bias, scale: as `route` has them;
    experts: of each `step.expert_numbers`. tensors: all that these name, which are kept alive.
    """

    def __init__(
        self,
        native,
        router: Product,
        router_norm: Norm | None,
        latent: list[Product] | None,
        routing: Routing,
        bias: torch.Tensor | None,
        scale: torch.Tensor | None,
        experts: list[list[int]],
        shared: SharedExpert | None,
        activation: str,
        weighs_input: bool,
        tensors: object,
    ):
        numbers, floats = routing_numbers(routing, len(experts), bias, scale)
        of_norm, norm_floats = norm_numbers(router_norm)
        numbers += [ACTIVATIONS.index(activation), int(weighs_input), *of_norm]
        numbers += product_numbers(*router)
        numbers += product_numbers(None if shared is None else shared.gate, None)
        for product in latent or [(None, None)] * 2:
            numbers += product_numbers(*product)
        numbers.append(int(shared is not None))
        for expert in ([] if shared is None else [shared.numbers]) + experts:
            numbers += expert
        floats += [1.0 if shared is None else shared.scaling, *norm_floats]
        self.native = native.RoutedStep(numbers, floats)
        self._kept = router, router_norm, latent, bias, scale, shared, tensors

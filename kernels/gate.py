"""Gates: one product of a row, activated, times another (2002.05202), or times what attention
gave. With `clamped_swiglu` both are bounded first, and the other is one more; its source is the
code of OpenAI's gpt-oss model (`swiglu_limit` 7, `alpha` 1.702)."""

from __future__ import annotations

from math import exp, log1p

import torch

from . import dispatch
from .threads import num_threads

# In the order of Activation in cpu/kernels.h.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "sigmoid", "clamped_swiglu", "relu2", "relu")
ACTIVATIONS += ("softplus",)
# Of `clamped_swiglu`; the compiled kernel has them too.
BOUND, STEEPNESS = 7.0, 1.702


def gate(x: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(x) * up, or what `clamped_swiglu` stands for, in x's place.

    x, up: (rows, n) float32, contiguous.

    In the compiled kernel a row's bits depend on neither the other rows nor their number.
    """
    native = dispatch.compiled_for_floats(x, up)
    if native is None:
        gpu = dispatch.gpu_for(x, up)
        if gpu is not None:
            return gpu.rows.gate(x, up, activation)
        return torch.mul(*factors(x, up, activation), out=x)
    assert x.is_contiguous() and up.is_contiguous() and x.shape == up.shape
    native.gate_with(
        ACTIVATIONS.index(activation),
        x.data_ptr(),
        up.data_ptr(),
        x.shape[-1],
        len(x),
        num_threads(),
    )
    return x


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(x) for MLPs without gates, in x's place: (rows, n) float32, contiguous."""
    assert activation != "xielu", "it has parameters: see below"
    return gate(x, torch.ones_like(x), activation)


def xielu(x: torch.Tensor, of_positive, of_negative, beta, eps) -> torch.Tensor:
    """xIELU (2411.13010) of x (rows, n) float32, in its place: a parabola above zero, an
    exponential below. The parameters are learnt, one number each, the first two before softplus.
    """
    of_positive, of_negative, beta, eps = (float(y) for y in (of_positive, of_negative, beta, eps))
    above = _softplus(of_positive)
    below = beta + _softplus(of_negative)
    for row in x:  # torch's exponential of a row among others may have other bits than alone
        curved = (row.clamp(max=eps).expm1() - row) * below
        row.copy_(torch.where(row > 0, above * row * row, curved) + beta * row)
    return x


def _softplus(x: float) -> float:
    """log(1 + exp(x)), also where exp(x) is more than a float holds."""
    return log1p(exp(-abs(x))) + max(0.0, x)


def factors(
    x: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `gate` multiplies, by torch."""
    if activation != "clamped_swiglu":
        return _activate(x, activation), up
    x = x.clamp(max=BOUND)
    return x * (STEEPNESS * x).sigmoid(), up.clamp(-BOUND, BOUND) + 1


def _activate(x: torch.Tensor, name: str) -> torch.Tensor:
    if name == "silu":
        return torch.nn.functional.silu(x)
    if name in ("sigmoid", "softplus"):
        return x.sigmoid() if name == "sigmoid" else torch.nn.functional.softplus(x)
    if name in ("relu", "relu2"):  # what is above zero, or its square
        return x.relu() if name == "relu" else x.relu().square()
    return torch.nn.functional.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")

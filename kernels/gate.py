"""Gates: one product of a row, activated, times another (2002.05202), or times what attention
gave."""

from __future__ import annotations

import torch

from . import dispatch

# In the order of Activation in cpu/kernels.h.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "sigmoid")


def gate(x: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(x) * up, in x's place. x, up: (rows, n) float32, contiguous.

    In the compiled kernel a row's bits depend on neither the other rows nor their number.
    """
    native = dispatch.compiled_for_floats(x, up)
    if native is None:
        return torch.mul(activate(x, activation), up, out=x)
    assert x.is_contiguous() and up.is_contiguous() and x.shape == up.shape
    native.gate_with(
        ACTIVATIONS.index(activation),
        x.data_ptr(),
        up.data_ptr(),
        x.shape[-1],
        len(x),
        torch.get_num_threads(),
    )
    return x


def activate(x: torch.Tensor, name: str) -> torch.Tensor:
    """One of ACTIVATIONS, by torch."""
    if name == "silu":
        return torch.nn.functional.silu(x)
    if name == "sigmoid":
        return x.sigmoid()
    return torch.nn.functional.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")

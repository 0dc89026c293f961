"""A layer's decode step but for its attention, in two calls: compiled kernels alone.

Everything that a call needs and that does not change from token to token is prepared once: where
each tensor lies, its kind and its sizes. The arithmetic is that of norms, `linear` and RoPE one
after the other; sums inside a norm have another order than torch's. The bits depend on neither the
number of threads nor on where a weight came from.

Knows no checkpoint: tensors come by their roles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import dispatch
from .gate import ACTIVATIONS
from .matmul import Weight, weight_numbers
from .quantised import QuantisedWeight

QK_NORMS = ("", "head", "all")
# In the order of cpu/bind_step.cpp.
NORMS = ("before_attention", "q", "k", "after_attention", "before_mlp", "after_mlp")
PRODUCTS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class StepShape:
    """What the layers of a model have in common.

    qk_norm: "", "head" or "all", as of `QK_NORMS`; norm_offset is added to the weights of norms;
    residual_multiplier: of what attention and MLP add.
    """

    hidden_size: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    activation: str
    qk_norm: str = ""
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    residual_multiplier: float = 1.0


class LayerStep:
    """One layer's tensors, ready for one row at a time. Keeps them alive.

    norms: weights (n,) float32 by the names of NORMS, None where there is none; products: weights
    and biases (out,) float32 or None by the names of PRODUCTS; without the MLP's, `add_mlp` and
    `mix` must not be called, without the queries', neither `project` nor `project_into`.
    rope_width, interleaved: of the rotation; a width of 0 turns nothing. native: of `native_for`.
    """

    def __init__(
        self,
        native,
        shape: StepShape,
        norms: dict[str, torch.Tensor | None],
        products: dict[str, tuple[Weight, torch.Tensor | None]],
        rope_width: int,
        interleaved: bool,
    ):
        self._shape, self._kept = shape, (norms, products)
        self._q = (shape.num_kv_heads, shape.num_heads // shape.num_kv_heads, shape.head_dim)
        self._kv = (1, shape.num_kv_heads, shape.head_dim)
        numbers = [
            shape.hidden_size,
            shape.head_dim,
            QK_NORMS.index(shape.qk_norm),
            rope_width,
            int(interleaved),
            ACTIVATIONS.index(shape.activation),
        ]
        numbers += [_address(norms.get(name)) for name in NORMS]
        for name in PRODUCTS:
            numbers += product_numbers(*products.get(name, (None, None)))
        self.native = native.LayerStep(
            numbers, shape.norm_eps, shape.norm_offset, shape.residual_multiplier
        )

    def project(
        self, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (kv_heads, groups, head_dim) times scale, keys and values (1, kv_heads,
        head_dim) of the residual row x (1, hidden_size) float32. cosines, sines: (rope_width,)
        float32 of the row's position.
        """
        q, k, v = torch.empty(self._q), torch.empty(self._kv), torch.empty(self._kv)
        self.native.project(
            x.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            scale,
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            torch.get_num_threads(),
        )
        return q, k, v

    def project_into(
        self,
        x: torch.Tensor,
        cosines: torch.Tensor,
        sines: torch.Tensor,
        scale: float,
        places: list[int],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Queries as `project` gives them. Keys and values go to `places`, each of them four
        numbers: the addresses of the first head's keys and values, bytes from head to head, and
        bytes from layer to layer, which one layer does not need. Elements become `dtype`.
        """
        q = torch.empty(self._q)
        self.native.project_into(
            x.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            scale,
            q.data_ptr(),
            places,
            dispatch.raw_kind(dtype),
            torch.get_num_threads(),
        )
        return q

    def add_attention(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """x (1, hidden_size) plus the output projection of attended (1, heads * head_dim)."""
        attended, out = attended.contiguous(), torch.empty_like(x)
        threads = torch.get_num_threads()
        self.native.add_attention(x.data_ptr(), attended.data_ptr(), out.data_ptr(), threads)
        return out

    def add_mlp(self, x: torch.Tensor) -> torch.Tensor:
        """x (1, hidden_size) plus the MLP's output."""
        out = torch.empty_like(x)
        self.native.add_mlp(x.data_ptr(), out.data_ptr(), torch.get_num_threads())
        return out

    def mix(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """`add_attention`, then `add_mlp`."""
        attended, out = attended.contiguous(), torch.empty_like(x)
        threads = torch.get_num_threads()
        self.native.mix(x.data_ptr(), attended.data_ptr(), out.data_ptr(), threads)
        return out


class BlockProduct:
    """Weights of one row, such as blocks of an output head, ready for one row at a time. `linear`
    of the blocks one after the other gives the same bits.

    norm: weight (in,) float32, offset and eps of a `norm.rms_norm` before them, or None. biases: of
    each block, (out,) float32 or None.
    """

    def __init__(
        self,
        native,
        blocks: list[Weight],
        norm: tuple[torch.Tensor, float, float] | None = None,
        biases: list[torch.Tensor | None] | None = None,
    ):
        biases = [None] * len(blocks) if biases is None else biases
        self._kept = blocks, norm, biases
        self.num_outputs = [block.shape[0] for block in blocks]
        numbers = []
        for block, bias in zip(blocks, biases, strict=True):
            numbers += product_numbers(block, bias)
        weight, offset, eps = norm or (None, 0.0, 0.0)
        self._native = native.BlockProduct(numbers, _address(weight), offset, eps)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """x (1, in) float32 times the weights, transposed: (1, out) float32, of all blocks side by
        side."""
        x, out = x.contiguous(), torch.empty(1, sum(self.num_outputs))
        self._native.run(x.data_ptr(), out.data_ptr(), torch.get_num_threads())
        return out


def expert_numbers(
    products: list[tuple[Weight, torch.Tensor | None]],
) -> list[int]:
    """A gated MLP as `add_expert` takes it: weights and biases, (out,) float32 or None, of gate and
    up, or of both in one, their rows in turn; and of down. They must be kept alive."""
    return [number for product in products for number in product_numbers(*product)]


def add_expert(
    native, numbers: list[int], x: torch.Tensor, share: float, activation: str, out: torch.Tensor
) -> None:
    """Adds share times the output of a gated MLP for the row x (1, in) float32 to out (1, hidden)
    float32, both contiguous: to the bit what products of several rows, `gate` and a sum of products
    give one of them."""
    assert x.is_contiguous() and out.is_contiguous()
    native.add_expert(
        numbers,
        x.data_ptr(),
        share,
        ACTIVATIONS.index(activation),
        out.data_ptr(),
        torch.get_num_threads(),
    )


def native_for(*tensors: Weight | None):
    """The compiled kernels, where they serve all these tensors; else None."""
    flat: list[torch.Tensor] = []
    for tensor in tensors:
        if isinstance(tensor, QuantisedWeight):
            flat += (tensor.codes, tensor.scales)
        elif tensor is not None:
            flat.append(tensor)
    return dispatch.compiled_for(*flat)


def product_numbers(weight: Weight | None, bias: torch.Tensor | None) -> list[int]:
    """A product as cpu/bind_step.cpp reads it: kind, addresses, place, sizes, bias."""
    if weight is None:
        return [0] * 7
    kind, codes, scales, first = weight_numbers(weight)
    return [kind, codes, scales, first, weight.shape[1], weight.shape[0], _address(bias)]


def _address(vector: torch.Tensor | None) -> int:
    """Of a float32 vector; 0 for None."""
    if vector is None:
        return 0
    assert vector.dtype == torch.float32 and vector.is_contiguous(), "vectors are float32"
    return vector.data_ptr()

"""A layer's decode step but for its attention and its state, in two calls: compiled kernels alone.

Everything that a call needs and that does not change from token to token is prepared once: where
each tensor lies, its kind and its sizes. The arithmetic is that of norms, `linear` and RoPE one
after the other; sums inside a norm have another order than torch's. The bits depend on neither the
number of threads nor on where a weight came from.

Knows no checkpoint: tensors come by their roles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import dispatch
from .gate import ACTIVATIONS
from .layout import padded_head_dim
from .matmul import Weight, weight_numbers
from .norm import Norm, norm_numbers, vector_address
from .quantised import QuantisedWeight
from .threads import num_threads

# Of queries and keys: none; head by head; all heads as one; head by head, each with weights of its
# own; head by head behind the rotation.
QK_NORMS = ("", "head", "all", "each", "turned")
# In the order of cpu/layer_step.h.
NORMS = ("before_attention", "q", "k", "v", "after_attention", "before_mlp", "after_mlp")
NORMS += ("before_experts", "after_experts", "after_dense", "after_inputs", "after_laurel")
NORMS += ("few_queries", "latent")
PRODUCTS = ("q", "k", "v", "o", "gate", "up", "down", "attention_gate", "beside")
PRODUCTS += ("input_gate", "input_output", "laurel_left", "laurel_right", "mean")
PRODUCTS += ("few_queries", "head_keys", "head_values")
# Of what was attended, before the output projection: none; head by head beside the queries, by the
# same weight; or by one of its own, for each number or for each head.
OUTPUT_GATES = ("", "beside", "number", "head")


@dataclass(frozen=True)
class StepShape:
    """What the layers of a model have in common.

    activation: of the MLP, its gate's if it has one; qk_norm, output_gate: of `QK_NORMS` and
    `OUTPUT_GATES`. residual_multiplier, beside_multiplier, mlp_multiplier: of what the products
    "o" and "beside" and the MLP add; gate_multiplier: of the MLP's gate before it is activated;
    layer_multiplier: of all that the layer makes of the residual. gate_cutoff: how many deviations
    above its mean a number of the MLP's gate counts, by what it is above that; with one the product
    "mean" is ones. parallel_mlp: whether the MLP, or experts in its place, read what attention
    does. rank: of latent attention, 0 without it: see LayerStep. qkv_clip: the bound of each number
    of queries, keys and values before the rotation, behind norms but those that come after it; 0:
    none. output_activation: of the output's gate.
    """

    hidden_size: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    activation: str
    qk_norm: str = ""
    residual_multiplier: float = 1.0
    output_gate: str = ""
    beside_multiplier: float = 1.0
    gate_multiplier: float = 1.0
    mlp_multiplier: float = 1.0
    layer_multiplier: float = 1.0
    gate_cutoff: float = 0.0
    parallel_mlp: bool = False
    rank: int = 0
    qkv_clip: float = 0.0
    output_activation: str = "sigmoid"


class LayerStep:
    """One layer's tensors, ready for one row at a time. Keeps them alive.

    norms: by the names of NORMS, those that there are; products: weights and biases (out,) float32
    or None by the names of PRODUCTS. "o" takes what was attended, or what
    the layer's state gave where it does not attend; "beside" what the state gave beside attention.
    Without the MLP's, `add_mlp` must not be called, without the queries', neither `project` nor
    `project_into`; an MLP without "gate" activates what "up" gives. Without "k" a layer has no keys
    and values of its own; without "v" alone those are the keys before norm and rotation.
    "input_gate" and "input_output": of the layer's own inputs, see `end`. "laurel_left" and
    "laurel_right": what the layer reads, and what these make of it, joins the residual beside
    attention, and all is divided by the root of two (LAuReL, 2411.07501). The norms of
    experts are those of a layer that has an MLP beside them.
    rope_width, interleaved: of the rotation; a width of 0 turns nothing. native: of `native_for`.

    Latent attention (rank > 0): the one head of keys, which are the values too, is what turns,
    then `rank` numbers, normed by "latent"; "k" gives both the other way round. Queries are
    made by "q" of the layer's input, or of what "few_queries" makes of it, normed by the same name;
    of each head what does not turn comes first and is multiplied with "head_keys" (num_heads *
    rank, inputs), head by head. What was attended is multiplied with "head_values" (num_heads *
    outputs, rank) before "o": not in `add_attention` and `mix`, which are given the product.
    """

    def __init__(
        self,
        native,
        shape: StepShape,
        norms: dict[str, Norm],
        products: dict[str, tuple[Weight, torch.Tensor | None]],
        rope_width: int,
        interleaved: bool,
    ):
        self._shape, self._kept = shape, (norms, products)
        dim = padded_head_dim(shape.head_dim)
        self._q = (shape.num_kv_heads, shape.num_heads // shape.num_kv_heads, dim)
        self._kv = (1, shape.num_kv_heads, dim) if "k" in products else None
        numbers = [
            shape.hidden_size,
            shape.head_dim,
            shape.num_heads,
            shape.rank,
            QK_NORMS.index(shape.qk_norm),
            rope_width,
            int(interleaved),
            ACTIVATIONS.index(shape.activation),
            OUTPUT_GATES.index(shape.output_gate),
            ACTIVATIONS.index(shape.output_activation),
            int(shape.parallel_mlp),
        ]
        floats = [
            shape.gate_cutoff,
            shape.qkv_clip,
            shape.residual_multiplier,
            shape.beside_multiplier,
            shape.gate_multiplier,
            shape.mlp_multiplier,
            shape.layer_multiplier,
        ]
        for name in NORMS:
            of_norm, of_floats = norm_numbers(norms.get(name))
            numbers, floats = numbers + of_norm, floats + of_floats
        for name in PRODUCTS:
            numbers += product_numbers(*products.get(name, (None, None)))
        self.native = native.LayerStep(numbers, floats)

    def project(
        self, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None, torch.Tensor | None]:
        """Queries (kv_heads, groups, padded head_dim) times scale, keys and values (1, kv_heads,
        padded head_dim), None without some, of the residual row x (1, hidden_size) float32, and the
        gate of what is attended (1, num_heads * head_dim), not yet activated, None without one.
        cosines, sines: (rope_width,) float32 of the row's position. See layout.padded_head_dim.
        """
        q, gate = torch.empty(self._q), self._empty_gate()
        kv = None if self._kv is None else (torch.empty(self._kv), torch.empty(self._kv))
        self.native.project(
            x.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            scale,
            q.data_ptr(),
            *((0, 0) if kv is None else (part.data_ptr() for part in kv)),
            vector_address(gate),
            num_threads(),
        )
        return q, kv, gate

    def project_into(
        self,
        x: torch.Tensor,
        cosines: torch.Tensor,
        sines: torch.Tensor,
        scale: float,
        places: list[int],
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries and gate as `project` gives them. Keys and values go to `places`, each of them
        three numbers: the addresses of the first head's keys and values, and bytes from head to
        head. Elements become `dtype`.
        """
        q, gate = torch.empty(self._q), self._empty_gate()
        self.native.project_into(
            x.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            scale,
            q.data_ptr(),
            vector_address(gate),
            places,
            dispatch.raw_kind(dtype),
            num_threads(),
        )
        return q, gate

    def add_attention(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """x (1, hidden_size) plus the product "o" of attended (1, heads * head_dim)."""
        attended, out = attended.contiguous(), torch.empty_like(x)
        threads = num_threads()
        self.native.add_attention(x.data_ptr(), attended.data_ptr(), out.data_ptr(), threads)
        return out

    def add_mlp(self, x: torch.Tensor, entered: torch.Tensor) -> torch.Tensor:
        """x (1, hidden_size) plus the MLP's output. entered: likewise, the row that entered the
        layer, which is what a parallel MLP reads."""
        entered, out = entered.contiguous(), torch.empty_like(x)
        threads = num_threads()
        self.native.add_mlp(x.data_ptr(), entered.data_ptr(), out.data_ptr(), threads)
        return out

    def mix(self, x: torch.Tensor, *mixed: torch.Tensor) -> torch.Tensor:
        """All that there is of it: x plus the products "o" and "beside" of `mixed`, each (1,
        inputs), in turn, then the MLP's output."""
        out, rows = torch.empty_like(x), [part.contiguous() for part in mixed]
        places = [row.data_ptr() for row in rows] + [0] * (2 - len(rows))
        self.native.mix(x.data_ptr(), *places, out.data_ptr(), num_threads())
        return out

    def end(self, x: torch.Tensor, inputs: torch.Tensor | None) -> torch.Tensor:
        """x (1, hidden_size) plus what the layer makes of its own inputs (1, size), where it has
        some, all times layer_multiplier."""
        out = torch.empty_like(x)
        threads = num_threads()
        self.native.end(x.data_ptr(), vector_address(inputs), out.data_ptr(), threads)
        return out

    def _empty_gate(self) -> torch.Tensor | None:
        size = self._shape.num_heads * self._shape.head_dim
        return torch.empty((1, size)) if self._shape.output_gate else None


class BlockProduct:
    """Weights of one row, such as blocks of an output head, ready for one row at a time. `linear`
    of the blocks one after the other gives the same bits.

    norm: of a row before them, or None. biases: of each block, (out,) float32 or None.
    """

    def __init__(
        self,
        native,
        blocks: list[Weight],
        norm: Norm | None = None,
        biases: Sequence[torch.Tensor | None] | None = None,
    ):
        biases = (None,) * len(blocks) if biases is None else biases
        self._kept = blocks, norm, biases
        self.num_outputs = [block.shape[0] for block in blocks]
        self._native = block_product(native, blocks, norm, biases)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """x (1, in) float32 times the weights, transposed: (1, out) float32, of all blocks side by
        side."""
        x, out = x.contiguous(), torch.empty(1, sum(self.num_outputs))
        self._native.run(x.data_ptr(), out.data_ptr(), num_threads())
        return out


def block_product(
    native,
    blocks: list[Weight],
    norm: Norm | None,
    biases: Sequence[torch.Tensor | None],
):
    """The compiled part of a BlockProduct, whose tensors must be kept alive."""
    numbers, floats = norm_numbers(norm)
    for block, bias in zip(blocks, biases, strict=True):
        numbers += product_numbers(block, bias)
    return native.BlockProduct(numbers, *floats)


def expert_numbers(
    products: list[tuple[Weight, torch.Tensor | None]],
) -> list[int]:
    """An MLP as `add_expert` takes it: weights and biases, (out,) float32 or None, of gate and up,
    or of both in one, their rows in turn, or of up alone; and of down. They must be kept alive."""
    return [len(products), *(n for product in products for n in product_numbers(*product))]


def add_expert(
    native, numbers: list[int], x: torch.Tensor, share: float, activation: str, out: torch.Tensor
) -> None:
    """Adds share times the output of an MLP for the row x (1, in) float32 to out (1, hidden)
    float32, both contiguous: to the bit what products of several rows, `gate` and a sum of products
    give one of them."""
    assert x.is_contiguous() and out.is_contiguous()
    native.add_expert(
        numbers,
        x.data_ptr(),
        share,
        ACTIVATIONS.index(activation),
        out.data_ptr(),
        num_threads(),
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
    return [kind, codes, scales, first, weight.shape[1], weight.shape[0], vector_address(bias)]

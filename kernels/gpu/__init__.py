"""The kernels for GPUs, in Triton: what a decoded token reads from end to end (weights, pages) and
the small steps between, each in one launch.

`products` weights, `spans` attention over pages and raw tokens, `rows` norms, rotations and gates;
`check` compares all of them with the torch reference on the machine at hand. `dispatch.gpu_for`
says whether they serve. They are imported where they do: Triton is no requirement of Ebbtide's, but
comes with torch's CUDA builds on Linux.

Sums have an order that shapes alone fix, so that equal calls give equal bits.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what `dispatch` imports where they serve
    from . import products, rows, spans  # noqa: F401

"""Random weights and a deep cache without computing either: for measuring speed, which depends on
shapes alone.
"""

from __future__ import annotations

import torch

from ebbtide.kernels.pages import seal
from ebbtide.kernels.quantised import QuantisedWeight, quantised_shapes
from ebbtide.offload.running.engine import Engine
from ebbtide.offload.running.sequence import Sequence


def random_weight(w: torch.Tensor, bits: int, empty=torch.empty) -> QuantisedWeight:
    """In place of quantise_weight: elements have a standard deviation of about in ** -0.5."""
    of_codes, of_scales = quantised_shapes(tuple(w.shape), bits)
    codes = empty(of_codes, dtype=torch.int32).random_(-(1 << 31), (1 << 31) - 1)
    scales = empty(of_scales, dtype=torch.float16)
    scales.fill_(w.shape[1] ** -0.5 / {4: 4.6, 8: 73.9}[bits])
    return QuantisedWeight(bits, w.shape[1], w.shape[0], codes, scales)


def fill(engine: Engine, sequence: Sequence, depth: int) -> None:
    """Make an empty sequence one of `depth` tokens, of which each layer's keys and values, or its
    state, are random. Far planes repeat a span's; near codes are drawn for every page, so that
    pages differ to whoever chooses among them.
    """
    raw = sequence.raw
    for layer in (*raw.keys, *raw.values, *raw.sink_keys, *raw.sink_values):
        layer.normal_()
    geometry, layout = engine.geometry, engine.geometry.layout
    shape = (geometry.span_tokens, layout.kv_heads, layout.head_dim)
    k, v = torch.randn((2, *shape))
    wanted = geometry.sealed_tokens(depth) // layout.record_tokens
    for layer, layout in enumerate(geometry.layouts(range(engine.config.num_page_layers))):
        near, records = seal(k, v, layout)
        codes = near.unflatten(1, (-1, layout.near_head_bytes))[..., : layout.near_codes_bytes]
        for first in range(0, wanted, len(records)):
            count = min(len(records), wanted - first)
            codes.copy_(torch.randint(0, 256, codes.shape, dtype=torch.uint8))
            engine.store.write(sequence.table, layer, first, near[:count], records[:count])
    sequence.tokens.extend([1] * depth)
    if sequence.states is not None:
        sequence.states.name(sequence.states.room().normal_(std=0.1), depth)
    sequence.prefilled(depth)
    sequence.will_write((depth - 1) // geometry.cell_tokens)

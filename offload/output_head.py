"""The output head: the final norm, and a product with each block of the vocabulary's rows, which
stay in memory or are read for every product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels.matmul import linear
from ..kernels.norm import Norm, normed
from ..kernels.step import BlockProduct, native_for
from .checkpoint import Checkpoint
from .kept_tensors import Arena, TensorLoader, kept_form, most_staging, stored_bytes
from .model_config import ModelConfig
from .packing import Bits, Kept

HEAD_BLOCK_ROWS = 8192  # vocabulary rows multiplied at once, resident or streamed


class OutputHead:
    """Of one checkpoint; `load` it before use. name: of its tensor. bits: as it is kept. blocks: of
    rows, in memory; None where they are streamed. bytes_streamed: read since it was loaded."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        device: torch.device,
        name: str,
        bits: Bits,
    ):
        self._config, self._checkpoint, self._device = config, checkpoint, device
        self._name, self._bits = name, bits
        self.blocks: list[Kept] | None = None
        self._product: BlockProduct | None = None
        self.bytes_streamed = 0

    @property
    def staging_bytes(self) -> int:
        """What loading a block takes besides."""
        ref = self._checkpoint.row_range(self._name, *self._ranges()[0])
        return most_staging([ref], self._bits)

    def load(self, loader: TensorLoader, *, resident: bool) -> None:
        """Read the final norm and biases, and all blocks that stay."""
        norm, norm_bias, bias = (
            self._checkpoint.read(name).float().to(self._device)
            if name in self._checkpoint.refs
            else None
            for name in ("model.norm.weight", "model.norm.bias", "lm_head.bias")
        )
        config = self._config
        own = config.final_norm_offset
        offset = config.norm_offset if own is None else own
        self._norm = Norm(norm, offset, config.norm_eps, norm_bias, config.layer_norm)
        self._biases = [bias if bias is None else bias[i:j] for i, j in self._ranges()]
        if resident:
            self.blocks = [
                self._block(loader, *rows, self._arena(*rows)).to(self._device)
                for rows in self._ranges()
            ]
            native = native_for(*self.blocks)
            if native is not None:
                self._product = BlockProduct(native, self.blocks, self._norm, self._biases)

    def close(self) -> None:
        """Let go of memory."""
        self.blocks = self._product = None

    def rows(self, numbers: Sequence[int]) -> torch.Tensor | None:
        """Rows of the head (n, hidden_size) float32; None where they are not in memory as the files
        have them."""
        if self.blocks is None or not isinstance(self.blocks[0], torch.Tensor):
            return None
        table = [self.blocks[i // HEAD_BLOCK_ROWS][i % HEAD_BLOCK_ROWS] for i in numbers]
        return torch.stack(table).float()

    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        """Residual rows (rows, hidden_size) float32, rows as `linear` wants them ->
        (rows, vocab_size)."""
        if residual.shape[0] == 1 and self._product is not None:
            return self._product.run(residual)
        hidden = normed(residual, self._norm)
        out = torch.empty(hidden.shape[0], self._config.vocab_size, device=self._device)
        for i, rows in enumerate(self._ranges()):
            if self.blocks is not None:
                block = self.blocks[i]
            else:
                loader = TensorLoader(self._checkpoint, self._bits, self.staging_bytes)
                block = self._block(loader, *rows).to(self._device)
                self.bytes_streamed += self._checkpoint.row_range(self._name, *rows).num_bytes
            out[:, rows[0] : rows[1]] = linear(hidden, block, self._biases[i])
        return out

    def _ranges(self) -> list[tuple[int, int]]:
        size = self._config.vocab_size
        return [(i, min(i + HEAD_BLOCK_ROWS, size)) for i in range(0, size, HEAD_BLOCK_ROWS)]

    def _arena(self, start: int, stop: int) -> Arena:
        """Room for a block that stays."""
        ref = self._checkpoint.row_range(self._name, start, stop)
        return Arena.of(stored_bytes(self._name, ref.shape, ref.packing, self._bits))

    def _block(
        self, loader: TensorLoader, start: int, stop: int, arena: Arena | None = None
    ) -> Kept:
        """Rows of the head, in the arena if there is one."""
        ref = self._checkpoint.row_range(self._name, start, stop)
        form = kept_form(self._name, ref.packing, self._bits)
        empty = torch.empty if arena is None else arena.empty
        return loader.load_ref(self._name, ref, form, empty)

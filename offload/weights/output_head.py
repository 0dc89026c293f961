"""The output head: the final norm, and a product with each block of the vocabulary's rows, which
stay in memory or are streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...kernels.matmul import linear
from ...kernels.norm import Norm, normed
from ...kernels.step import BlockProduct, native_for
from ..models.checkpoint import Checkpoint, TensorRef
from ..models.model_config import ModelConfig
from .kept_tensors import Arena, converted_once, kept_form, most_staging, stored_bytes
from .packing import Bits, Kept, unquantised
from .tensor_loader import TensorLoader

HEAD_BLOCK_ROWS = 8192  # vocabulary rows multiplied at once, resident or streamed

HeadBlock = tuple[str, int]  # what a streamed block goes by: "head", and its number


class OutputHead:
    """Of one checkpoint; `load` it before use. name: of its tensor. bits: as it is kept. blocks: of
    rows, in memory; None where they are streamed."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        device: torch.device,
        name: str,
        bits: Bits,
    ):
        self._config, self._checkpoint, self._device = config, checkpoint, device
        self._name = name
        self._bits: Bits = bits
        self.blocks: list[Kept] | None = None
        self._product: BlockProduct | None = None

    @property
    def staging_bytes(self) -> int:
        """What loading a block takes besides."""
        return most_staging([self._ref(0)], self._bits)

    @property
    def block_bytes(self) -> int:
        """Of the largest block as it is kept."""
        return self.kept_bytes(self.keys[0])

    @property
    def keys(self) -> list[HeadBlock]:
        """Of all blocks, in the order in which they are multiplied."""
        return [("head", number) for number in range(len(self._ranges()))]

    @property
    def refs(self) -> list[TensorRef]:
        """Of all blocks, in the files."""
        return [self._ref(number) for _, number in self.keys]

    def is_converted_once(self, *, quick_too: bool) -> bool:
        """Whether blocks that are streamed are; see converted_once."""
        packing = self._checkpoint.refs[self._name].packing
        return converted_once([(self._name, packing)], self._bits, quick_too=quick_too)

    def load(self, loader: TensorLoader, *, resident: bool, on_load: Callable[[int], None]) -> None:
        """Read the final norm and biases, and all blocks that stay. on_load(num_bytes): of each,
        once it is there."""
        norm, norm_bias, bias = (
            self._checkpoint.read(name).float().to(self._device)
            if name in self._checkpoint.refs
            else None
            for name in ("model.norm.weight", "model.norm.bias", "lm_head.bias")
        )
        assert norm is not None, "a checkpoint without a final norm"
        config = self._config
        own = config.final_norm_offset
        offset = config.norm_offset if own is None else own
        self._norm = Norm(norm, offset, config.norm_eps, norm_bias, config.layer_norm)
        self._biases = [bias if bias is None else bias[i:j] for i, j in self._ranges()]
        if resident:
            self.blocks = []
            for key in self.keys:
                block = self._block(key, loader, self._fresh(key))
                self.blocks.append(block.to(self._device))
                on_load(self.num_bytes(key))
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
        blocks = [unquantised(block) for block in self.blocks]
        table = [blocks[i // HEAD_BLOCK_ROWS][i % HEAD_BLOCK_ROWS] for i in numbers]
        return torch.stack(table).float()

    def read(self, key: HeadBlock, loader: TensorLoader, buffer: torch.Tensor) -> Kept:
        """A block from the files, in a buffer."""
        self._checkpoint.announce(self._ref(key[1]))
        return self._block(key, loader, Arena(buffer))

    def num_bytes(self, key: HeadBlock) -> int:
        """Of a block in the files."""
        return self._ref(key[1]).num_bytes

    def kept_bytes(self, key: HeadBlock) -> int:
        """Of a block as it is kept."""
        ref = self._ref(key[1])
        return stored_bytes(self._name, ref.shape, ref.packing, self._bits)

    def logits(self, residual: torch.Tensor, streamed: Callable[[HeadBlock], Kept]) -> torch.Tensor:
        """Residual rows (rows, hidden_size) float32, rows as `linear` wants them ->
        (rows, vocab_size). streamed: gives a block that is not in memory."""
        if residual.shape[0] == 1 and self._product is not None:
            return self._product.run(residual)
        hidden = normed(residual, self._norm)
        out = torch.empty(hidden.shape[0], self._config.vocab_size, device=self._device)
        for key, (start, stop) in zip(self.keys, self._ranges(), strict=True):
            number = key[1]
            block = streamed(key) if self.blocks is None else self.blocks[number]
            out[:, start:stop] = linear(hidden, block, self._biases[number])
        return out

    def _ranges(self) -> list[tuple[int, int]]:
        size = self._config.vocab_size
        return [(i, min(i + HEAD_BLOCK_ROWS, size)) for i in range(0, size, HEAD_BLOCK_ROWS)]

    def _ref(self, number: int) -> TensorRef:
        return self._checkpoint.row_range(self._name, *self._ranges()[number])

    def _fresh(self, key: HeadBlock) -> Arena:
        return Arena.of(self.kept_bytes(key))

    def _block(self, key: HeadBlock, loader: TensorLoader, arena: Arena) -> Kept:
        ref = self._ref(key[1])
        form = kept_form(self._name, ref.packing, self._bits)
        block = loader.begin_ref(self._name, ref, form, arena.empty)
        loader.finish()
        return block

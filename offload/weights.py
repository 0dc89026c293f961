"""The model's weights: resident where they fit, otherwise streamed layer by layer under the same
budget.

    resident layer    tensors that stay
    streamed layer    read by pread into one of two buffers while the layer before it computes

Streamed layers are spread evenly among resident ones, so that reading hides behind computing.
Group-quantised weights are quantised once: into memory, or into a scratch file that streaming then
reads. A product does not depend on where its weight came from. Does not know what the tensors are
multiplied with.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from ..kernels.matmul import linear
from ..kernels.norm import rms_norm
from ..kernels.quantised import QuantisedWeight, quantise_weight, quantised_shapes
from ..kernels.step import BlockProduct, native_for
from .checkpoint import Checkpoint, RowReader
from .errors import BadCheckpoint, StorageError
from .model_config import ModelConfig
from .skeleton import decides, fused_parts, layer_of, layer_prefix
from .tier import aligned_bytes

HEAD_BLOCK_ROWS = 8192  # vocabulary rows multiplied at once, resident or streamed
_ALIGNMENT = 64
_EMBEDDINGS = "model.embed_tokens.weight"
Kept = torch.Tensor | QuantisedWeight
LayerTensors = dict[str, Kept]


def streamed_layers(num_layers: int, num_streamed: int) -> list[int]:
    """Which layers are streamed when `num_streamed` are: evenly spread."""
    return [
        layer
        for layer in range(num_layers)
        if (layer + 1) * num_streamed // num_layers > layer * num_streamed // num_layers
    ]


def kept_bits(name: str, bits: int | None) -> int | None:
    """How many bits the matrix `name` is kept in where weights have `bits`; None: as it is."""
    return None if decides(name) else bits


def stored_bytes(name: str, shape: tuple[int, ...], item_bytes: int, bits: int | None) -> int:
    """Bytes of a tensor as kept: matrices as they are or group-quantised, all else in float32."""
    if len(shape) != 2:
        return _aligned(math.prod(shape) * 4)
    bits = kept_bits(name, bits)
    if bits is None:
        return _aligned(shape[0] * shape[1] * item_bytes)
    codes, scales = quantised_shapes(shape, bits)
    return _aligned(math.prod(codes) * 4) + _aligned(math.prod(scales) * 2)


class WeightStore:
    """Loads, keeps and streams the tensors of one checkpoint.

    bits: 8, 4 or None (as they are). num_streamed: layers that are not resident. head_resident:
    whether the output head stays in memory. on_load(done_bytes, total_bytes) reports loading.
    Raises BadCheckpoint, StorageError.
    """

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        device: torch.device,
        *,
        bits: int | None = None,
        num_streamed: int = 0,
        head_resident: bool = True,
        spill_dir: Path | None = None,
        on_load: Callable[[int, int], None] | None = None,
    ):
        self.config, self.checkpoint, self.device = config, checkpoint, device
        self._bits = bits
        self._head_bits = None if bits is None else 8
        self._head_name = _EMBEDDINGS if config.tied_embeddings else "lm_head.weight"
        self._embeddings = RowReader(checkpoint, _EMBEDDINGS)
        self._streamed = streamed_layers(config.num_layers, num_streamed)
        self._fused = fused_parts(config)
        self._names: list[list[str]] = [[] for _ in range(config.num_layers)]
        for name in checkpoint.refs:
            layer = layer_of(name)
            if layer is not None:
                self._names[layer].append(name)
        self.bytes_streamed = 0
        self._scratch: _Scratch | None = None
        self._staging: torch.Tensor | None = None  # while loading
        self._reader = ThreadPoolExecutor(1, "ebbtide-weights") if self._streamed else None
        self._buffers: list[torch.Tensor] = []
        self._reading: dict[int, Future] = {}
        self._resident: dict[int, LayerTensors] = {}
        # By layer, see kernels.effect: found by whoever selects pages, and good for all requests.
        self.output_norms: dict[int, torch.Tensor] = {}
        try:
            self._load(on_load or (lambda done, total: None), head_resident, spill_dir)
        except BaseException:
            self.close()
            raise

    def _load(self, on_load, head_resident: bool, spill_dir: Path | None) -> None:
        names = [name for layer in self._names for name in layer]
        total = sum(self.checkpoint.refs[name].num_bytes for name in names)
        done = 0
        # What is quantised is read here, one after the other, and a layer is kept in one piece.
        # Memory taken and freed between tensors that stay does not go back to the system: at 4 bits
        # loading took three times the weights.
        self._staging = aligned_bytes(self._staging_bytes(names, head_resident))
        if self._streamed and self._bits is not None:
            self._scratch = _Scratch(spill_dir)
        for layer in range(self.config.num_layers):
            streamed = layer in self._streamed
            if not streamed or self._scratch is not None:
                arena = _Arena(sum(map(self._kept_bytes, self._names[layer])))
                tensors = {n: self._prepare(n, arena) for n in self._names[layer]}
                if streamed:
                    self._scratch.add(layer, _flat(tensors))
                else:
                    self._resident[layer] = self._named(layer, self._to_device(tensors))
            done += sum(self.checkpoint.refs[n].num_bytes for n in self._names[layer])
            on_load(done, total)
        if self._streamed:
            size = max(self._layer_bytes(layer) for layer in self._streamed)
            self._buffers = [aligned_bytes(size) for _ in range(2)]
            self._start_reading(self._streamed[0])
        self._final_norm = self.checkpoint.read("model.norm.weight").float().to(self.device)
        self._head = self._head_product = None
        if head_resident:
            self._head = [
                self._head_block(*rows, arena=self._head_arena(*rows)).to(self.device)
                for rows in self._head_ranges()
            ]
            native, config = native_for(*self._head), self.config
            if native is not None:
                norm = self._final_norm, config.norm_offset, config.norm_eps
                self._head_product = BlockProduct(native, self._head, norm)
        self._staging = None

    # ---- what the decoder asks for -----------------------------------------------------------

    def layer(self, layer: int) -> LayerTensors:
        """A layer's tensors by their names within the layer. A streamed layer's are overwritten
        when the streamed layer after the next is asked for; its successor is being read when this
        returns.
        """
        if layer in self._resident:
            return self._resident[layer]
        if layer not in self._reading:  # out of turn: after an interruption
            self._finish_reading()
            self._start_reading(layer)
        buffer = self._reading.pop(layer).result()
        tensors = self._views(layer, buffer)
        if self.device.type != "cpu":
            tensors = self._to_device(tensors)
        position = self._streamed.index(layer)
        self._start_reading(self._streamed[(position + 1) % len(self._streamed)])
        return self._named(layer, tensors)

    def is_resident(self, layer: int) -> bool:
        """Whether a layer's tensors are in memory for good."""
        return layer in self._resident

    def resident_layer(self, layer: int) -> LayerTensors | None:
        """A layer's tensors, if they are in memory for good; None for a streamed one."""
        return self._resident.get(layer)

    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Embedding rows (n, hidden_size) float32, times the model's multiplier, as the first layer
        takes them.
        """
        rows = self._embedding_rows(token_ids)
        multiplier = self.config.embedding_multiplier
        return rows if multiplier == 1 else rows * multiplier

    def _embedding_rows(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Read one by one: the table is never resident for its own sake."""
        if self._head is not None and self.config.tied_embeddings and self._head_bits is None:
            table = [self._head[i // HEAD_BLOCK_ROWS][i % HEAD_BLOCK_ROWS] for i in token_ids]
            return torch.stack(table).float()
        if len(token_ids) == 1:
            rows = self._embeddings.read(token_ids[0])
        else:
            rows = self.checkpoint.read_rows(_EMBEDDINGS, token_ids)
        return rows.to(self.device, torch.float32, copy=True)

    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        """The final norm and the output head: residual rows (rows, hidden_size) float32, rows as
        `linear` wants them -> (rows, vocab_size).
        """
        if residual.shape[0] == 1 and self._head_product is not None:
            return self._head_product.run(residual)
        config, ranges = self.config, self._head_ranges()
        hidden = rms_norm(residual, self._final_norm, config.norm_offset, config.norm_eps)
        out = torch.empty(hidden.shape[0], config.vocab_size, device=self.device)
        for i, rows in enumerate(ranges):
            if self._head is not None:
                block = self._head[i]
            else:
                block = self._head_block(*rows).to(self.device)
                self.bytes_streamed += self.checkpoint.row_range(self._head_name, *rows).num_bytes
            out[:, rows[0] : rows[1]] = linear(hidden, block)
        return out

    def close(self) -> None:
        """Stop reading and let go of memory and scratch. May be called again."""
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)
        self._resident.clear()
        self._buffers.clear()
        self._head = self._head_product = None
        if self._scratch is not None:
            self._scratch.close()
        self.checkpoint.close()

    # ---- loading -----------------------------------------------------------------------------

    def _named(self, layer: int, tensors: LayerTensors) -> LayerTensors:
        """Tensors by their names within the layer; of several in one, each under its own name."""
        prefix, named = len(layer_prefix(layer)), {}
        for name, tensor in tensors.items():
            name = name[prefix:]
            for part, start, stop in self._fused.get(name, [(name, 0, tensor.shape[0])]):
                named[part] = _rows_of(tensor, start, stop)
        return named

    def _kept_bytes(self, name: str) -> int:
        ref = self.checkpoint.refs[name]
        return stored_bytes(name, ref.shape, ref.dtype.itemsize, self._bits)

    def _prepare(self, name: str, arena: _Arena) -> Kept:
        """A tensor as it is kept, in the arena; see stored_bytes."""
        ref, bits = self.checkpoint.refs[name], kept_bits(name, self._bits)
        if len(ref.shape) != 2:
            return arena.keep(self.checkpoint.read(name).float())
        if bits is None:
            return self.checkpoint.read(name, arena.take(ref.num_bytes))
        return self._quantise(name, self.checkpoint.read(name, self._staging), bits, arena.empty)

    def _staging_bytes(self, names: list[str], head_resident: bool) -> int:
        """Of the largest tensor, or block of the head, that will be quantised."""
        if self._bits is None:
            return 0
        sizes = [self.checkpoint.refs[name].num_bytes for name in names]
        if head_resident:
            ranges = self._head_ranges()
            sizes.append(self.checkpoint.row_range(self._head_name, *ranges[0]).num_bytes)
        return max(sizes)

    @staticmethod
    def _quantise(name: str, tensor: torch.Tensor, bits: int, empty=torch.empty) -> QuantisedWeight:
        try:
            return quantise_weight(tensor, bits, empty)
        except FloatingPointError as error:
            raise BadCheckpoint(f"{name}: {error}. Use --weight-bits full.") from error

    def _to_device(self, tensors: LayerTensors) -> LayerTensors:
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def _head_ranges(self) -> list[tuple[int, int]]:
        size = self.config.vocab_size
        return [(i, min(i + HEAD_BLOCK_ROWS, size)) for i in range(0, size, HEAD_BLOCK_ROWS)]

    def _head_arena(self, start: int, stop: int) -> _Arena:
        """Room for a block of the head that stays."""
        ref = self.checkpoint.row_range(self._head_name, start, stop)
        return _Arena(stored_bytes(self._head_name, ref.shape, ref.dtype.itemsize, self._head_bits))

    def _head_block(self, start: int, stop: int, arena: _Arena | None = None) -> Kept:
        """Rows of the head, in the arena if there is one."""
        ref = self.checkpoint.row_range(self._head_name, start, stop)
        if self._head_bits is None:
            return self.checkpoint.read_ref(ref, arena and arena.take(ref.num_bytes))
        block = self.checkpoint.read_ref(ref, self._staging)
        empty = torch.empty if arena is None else arena.empty
        return self._quantise(self._head_name, block, self._head_bits, empty)

    # ---- streaming ---------------------------------------------------------------------------

    def _start_reading(self, layer: int) -> None:
        if layer in self._reading:
            return
        # The caller may still use the buffer that was read last, never the one before it.
        self._buffers.reverse()
        self._reading[layer] = self._reader.submit(self._read_layer, layer, self._buffers[0])

    def _finish_reading(self) -> None:
        while self._reading:
            self._reading.popitem()[1].result()

    def _read_layer(self, layer: int, buffer: torch.Tensor) -> torch.Tensor:
        if self._scratch is not None:
            self._scratch.read(layer, buffer)
            self.bytes_streamed += self._layer_bytes(layer)
            return buffer
        for name, offset, size in self._places(layer):
            self.checkpoint.read_into(self.checkpoint.refs[name], buffer[offset : offset + size])
            self.bytes_streamed += size
        return buffer

    def _places(self, layer: int) -> Iterator[tuple[str, int, int]]:
        """Where a kept layer's tensors lie in a buffer: name, offset, bytes."""
        offset = 0
        for name in self._names[layer]:
            size = self.checkpoint.refs[name].num_bytes
            yield name, offset, size
            offset += _aligned(size)

    def _layer_bytes(self, layer: int) -> int:
        if self._scratch is not None:
            return self._scratch.num_bytes(layer)
        return max(offset + _aligned(size) for _, offset, size in self._places(layer))

    def _views(self, layer: int, buffer: torch.Tensor) -> LayerTensors:
        if self._scratch is not None:
            return self._scratch.views(layer, buffer)
        tensors: LayerTensors = {}
        for name, offset, size in self._places(layer):
            ref = self.checkpoint.refs[name]
            tensor = buffer[offset : offset + size].view(ref.dtype).view(ref.shape)
            tensors[name] = tensor if tensor.dim() == 2 else tensor.float()
        return tensors


class _Arena:
    """Memory for the tensors of one layer, in one piece."""

    def __init__(self, num_bytes: int):
        self._buffer, self._used = aligned_bytes(num_bytes), 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """The next bytes, uint8."""
        start, self._used = self._used, self._used + _aligned(num_bytes)
        return self._buffer[start : start + num_bytes]

    def empty(self, shape: tuple[int, ...], *, dtype: torch.dtype, device=None) -> torch.Tensor:
        """As torch.empty, here."""
        num_bytes = math.prod(shape) * dtype.itemsize
        return self.take(num_bytes).view(dtype).view(shape)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor, here."""
        return self.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


class _Scratch:
    """Quantised layers in an unlinked temporary file, as they lie in memory."""

    def __init__(self, folder: Path | None):
        self._file = tempfile.TemporaryFile(dir=folder)
        self._layers: dict[int, tuple[int, list]] = {}

    def add(self, layer: int, tensors: list[tuple[str, object, list[torch.Tensor]]]) -> None:
        start, places, offset = self._file.seek(0, os.SEEK_END), [], 0
        try:
            for name, rebuild, parts in tensors:
                described = []
                for part in parts:
                    data = part.contiguous().reshape(-1).view(torch.uint8)
                    self._file.write(data.numpy())
                    self._file.write(bytes(_aligned(len(data)) - len(data)))
                    described.append((offset, len(data), part.dtype, part.shape))
                    offset += _aligned(len(data))
                places.append((name, rebuild, described))
            self._file.flush()
        except OSError as error:
            raise StorageError(
                f"the weights' scratch file could not be written: {error}"
            ) from error
        self._layers[layer] = (start, places)

    def num_bytes(self, layer: int) -> int:
        offset, size, _, _ = self._layers[layer][1][-1][2][-1]
        return offset + _aligned(size)

    def read(self, layer: int, buffer: torch.Tensor) -> None:
        view = memoryview(buffer.numpy())[: self.num_bytes(layer)]
        try:
            self._file.seek(self._layers[layer][0])
            done = self._file.readinto(view)
        except OSError as error:
            raise StorageError(f"the weights' scratch file could not be read: {error}") from error
        if done != len(view):
            raise StorageError("the weights' scratch file is shorter than what was written")

    def views(self, layer: int, buffer: torch.Tensor) -> LayerTensors:
        tensors: LayerTensors = {}
        for name, rebuild, described in self._layers[layer][1]:
            parts = [
                buffer[offset : offset + size].view(dtype).view(shape)
                for offset, size, dtype, shape in described
            ]
            tensors[name] = rebuild(parts)
        return tensors

    def close(self) -> None:
        self._file.close()


def _flat(tensors: LayerTensors) -> list[tuple[str, object, list[torch.Tensor]]]:
    """Each tensor as plain ones and the function that puts them together again."""
    flat = []
    for name, tensor in tensors.items():
        if isinstance(tensor, QuantisedWeight):
            flat.append((name, _rebuilder(tensor), [tensor.codes, tensor.scales]))
        else:
            flat.append((name, lambda parts: parts[0], [tensor]))
    return flat


def _rows_of(tensor: Kept, start: int, stop: int) -> Kept:
    """Rows start..stop of a tensor, sharing its memory."""
    if stop - start == tensor.shape[0]:
        return tensor
    return tensor.part(start, stop) if isinstance(tensor, QuantisedWeight) else tensor[start:stop]


def _rebuilder(tensor: QuantisedWeight):
    bits, shape, first = tensor.bits, tensor.shape, tensor.first
    return lambda parts: QuantisedWeight(bits, shape[1], shape[0], parts[0], parts[1], first)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT

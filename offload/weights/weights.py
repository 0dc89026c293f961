"""The model's weights: resident where they fit, otherwise streamed layer by layer under the same
budget.

    resident layer    tensors that stay
    streamed layer    read by pread into one of two buffers while the layer before it computes
    expert            where not all fit: read once a router has chosen it, see expert_cache

Streamed layers are spread evenly among resident ones, so that reading hides behind computing.
Weights that are not kept as the files have them are converted once: into memory, or into a scratch
file that streaming then reads; where that is quick, each time that they are read. A product does
not depend on where its weight came from. Does not know what the tensors are multiplied with.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path

import torch

from ...kernels.matmul import rows_of
from ...kernels.norm import rms_norm
from ...kernels.routed_step import RoutedStep
from ..layers.per_layer import PerLayer
from ..layers.residual_streams import Streams, kept_names
from ..models.checkpoint import Checkpoint, RowReader, TensorRef
from ..models.model_config import ModelConfig
from ..models.past_cache import whole_blocks
from ..pages.tier import aligned_bytes
from .expert_cache import Expert, ExpertCache
from .kept_tensors import Arena, converted_once, head_bits, most_staging, stored_bytes
from .output_head import HeadBlock, OutputHead
from .packing import Bits, Kept, unquantised
from .skeleton import expert_names, fused_parts, layer_of, layer_prefix
from .tensor_loader import TensorLoader
from .tensor_scratch import TensorScratch
from .weight_stream import WeightStream

_AHEAD_BYTES = 32 << 20  # that the system is asked to read before they are needed
_EMBEDDINGS, _BLOCK = "model.embed_tokens.weight", "block"


class LayerTensors(dict[str, Kept]):
    """A layer's tensors by their names within it.

    apart: what has those of its routed experts, and the layer's number there, where they are not
    among these. Found once, for all requests: expert_numbers, of experts that were used, by names,
    see kernels.step; and routed_step, of all of them.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.expert_numbers: dict[str, list[int]] = {}
        self.routed_step: RoutedStep | None = None
        self.apart: tuple[ExpertCache, int] | None = None

    def vector(self, name: str) -> torch.Tensor:
        """One that is kept as numbers, such as a norm's; KeyError where there is none."""
        return unquantised(self[name])

    def vector_or_none(self, name: str) -> torch.Tensor | None:
        """The same, such as a bias; None where there is none."""
        return self.vector(name) if name in self else None

    def experts(
        self, numbers: Sequence[int], *, keeps: bool, at_hand_first: bool = False
    ) -> Iterator[tuple[int, LayerTensors]]:
        """The tensors of some experts, wherever they are; see ExpertCache.bring."""
        if self.apart is not None:
            cache, layer = self.apart
            return cache.bring(layer, numbers, keeps=keeps, at_hand_first=at_hand_first)
        return ((number, self) for number in numbers)

    def expect_experts(self, numbers: Sequence[int]) -> None:
        """See ExpertCache.expect; nothing where all experts are here."""
        if self.apart is not None:
            cache, layer = self.apart
            cache.expect(layer, numbers)


def streamed_layers(num_layers: int, num_streamed: int) -> list[int]:
    """Which layers are streamed when `num_streamed` are: evenly spread."""
    return [
        layer
        for layer in range(num_layers)
        if (layer + 1) * num_streamed // num_layers > layer * num_streamed // num_layers
    ]


class WeightStore:
    """Loads, keeps and streams the tensors of one checkpoint.

    bits: 8, 4, None (as they are) or auto (as suits each). num_streamed: layers that are not
    resident. expert_slots: room for routed experts, where not all of them are resident; then every
    layer is but for them, and the device is the CPU. 0: all are. head_resident: whether the output
    head stays in memory. quick_too: see Loaded.
    on_load(done_bytes, total_bytes) reports loading. Raises BadCheckpoint, StorageError.
    """

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        device: torch.device,
        *,
        bits: Bits = None,
        num_streamed: int = 0,
        expert_slots: int = 0,
        head_resident: bool = True,
        quick_too: bool = False,
        spill_dir: Path | None = None,
        on_load: Callable[[int, int], None] | None = None,
    ):
        self.config, self.checkpoint, self.device = config, checkpoint, device
        self._bits: Bits = bits
        self._quick_too = quick_too
        head = _EMBEDDINGS if config.tied_embeddings else "lm_head.weight"
        self.head = OutputHead(config, checkpoint, device, head, head_bits(bits))
        self._embeddings = RowReader(checkpoint, _EMBEDDINGS)
        self._streamed = streamed_layers(config.num_layers, num_streamed)
        self._fused = fused_parts(config)
        self._expert_names = expert_names(config) if expert_slots else {}
        apart = {name for names in self._expert_names.values() for name in names}
        self._names: list[list[str]] = [[] for _ in range(config.num_layers)]
        for name in checkpoint.refs:
            layer = layer_of(name)
            if layer is not None and name not in apart:
                self._names[layer].append(name)
        self._bytes_streamed = 0
        self._scratch: TensorScratch | None = None
        self._experts: ExpertCache | None = None
        self._of_thread = threading.local()  # a loader of its own for each that reads experts
        self._stream: WeightStream | None = None
        self._resident: dict[int, LayerTensors] = {}
        self._per_layer: PerLayer | None = None
        self._streams: Streams | None = None
        # By layer, see kernels.effect: found by whoever selects pages, and good for all requests.
        self.output_norms: dict[int, torch.Tensor] = {}
        try:
            # Of each layer that attends, if it has some: (num_heads,) float32.
            self.null_scores = [self._read_null_scores(layer) for layer in config.kv_layers]
            on_load = on_load or (lambda done, total: None)
            self._load(on_load, expert_slots, head_resident, spill_dir)
            self.checkpoint.reread(self._reread(head_resident))
            self._open_stream(head_resident)
        except BaseException:
            self.close()
            raise

    def _load(
        self, on_load, expert_slots: int, head_resident: bool, spill_dir: Path | None
    ) -> None:
        refs = self.checkpoint.refs
        keeps_experts = self._keeps_experts()
        unlayered = kept_names(self.config)
        groups = [*self._names, *(self._expert_names.values() if keeps_experts else ()), unlayered]
        to_convert = [refs[name] for group in groups for name in group]
        staging = most_staging(to_convert, self._bits)
        keeps_head = not head_resident and self._keeps_head()
        if head_resident or keeps_head:
            staging = max(staging, self.head.staging_bytes)
        head_keys = self.head.keys if head_resident or keeps_head else []
        sizes = [ref.num_bytes for ref in to_convert] + [*map(self.head.num_bytes, head_keys)]
        total, done = sum(sizes), 0

        def loaded(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            on_load(done, total)

        def loaded_names(names: list[str]) -> None:
            loaded(sum(refs[name].num_bytes for name in names))

        keeps_layers = self._keeps_layers()
        kept_sizes = [self._layer_bytes(layer) for layer in self._streamed if keeps_layers]
        kept_sizes += [self._expert_bytes(e) for e in self._expert_names if keeps_experts]
        kept_sizes += [self.head.kept_bytes(key) for key in self.head.keys if keeps_head]
        if kept_sizes:
            self._scratch = TensorScratch(spill_dir, sum(map(whole_blocks, kept_sizes)))
        # What goes to the scratch file is converted here.
        passing = aligned_bytes(whole_blocks(max(kept_sizes, default=0)))

        def keep(key: Hashable, tensors: dict[str, Kept]) -> None:
            assert self._scratch is not None
            self._scratch.add(key, tensors, passing)

        with TensorLoader(self.checkpoint, self._bits, staging) as loader:
            for layer, names in enumerate(self._names):
                if layer not in self._streamed:
                    fresh = self._to_device(self._loaded(loader, names, self._arena(names)))
                    self._resident[layer] = self._named(layer, fresh)
                elif keeps_layers:
                    keep(layer, self._loaded(loader, names, Arena(passing)))
                loaded_names(names)
            if self._expert_names:
                for expert, names in self._expert_names.items() if keeps_experts else ():
                    keep(expert, self._loaded(loader, names, Arena(passing)))
                    loaded_names(names)
                self._open_cache(expert_slots)
            kept = self._to_device(self._loaded(loader, unlayered, self._arena(unlayered)))
            loaded_names(unlayered)
            if self.config.per_layer_inputs is not None:
                self._per_layer = PerLayer(self.config, self.checkpoint, kept, self.device)
            if self.config.altup is not None:
                self._streams = Streams(self.config, kept)
            self.head.load(loader, resident=head_resident, on_load=loaded)
            for key in head_keys if keeps_head else ():
                keep(key, {_BLOCK: self.head.read(key, loader, passing)})
                loaded(self.head.num_bytes(key))

    def _reread(self, head_resident: bool) -> list[TensorRef]:
        """What is read from the model's files again and again, in the order of layers."""
        groups = [] if self._keeps_layers() else [self._names[layer] for layer in self._streamed]
        groups += [] if self._keeps_experts() else self._expert_names.values()
        refs = [self.checkpoint.refs[name] for names in groups for name in names]
        return refs if head_resident or self._keeps_head() else [*refs, *self.head.refs]

    def _open_stream(self, head_resident: bool) -> None:
        sizes = [self._layer_bytes(layer) for layer in self._streamed]
        keys = [*self._streamed]
        if not head_resident:
            sizes.append(self.head.block_bytes)
            keys += self.head.keys
        if keys:
            self._stream = WeightStream(keys, self._read_group, whole_blocks(max(sizes)))

    # ---- what the decoder asks for -----------------------------------------------------------

    def layer(self, layer: int) -> LayerTensors:
        """A layer's tensors by their names within the layer. For how long those of a streamed one
        stay: see WeightStream.next.
        """
        if layer in self._resident:
            return self._resident[layer]
        assert self._stream is not None
        tensors = self._stream.next(layer)
        if self.device.type != "cpu":
            tensors = self._to_device(tensors)
        return self._named(layer, tensors)

    def is_resident(self, layer: int) -> bool:
        """Whether a layer's tensors are in memory for good."""
        return layer in self._resident

    def resident_layer(self, layer: int) -> LayerTensors | None:
        """A layer's tensors, if they are in memory for good; None for a streamed one."""
        return self._resident.get(layer)

    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Embedding rows (n, hidden_size) float32, normed where the model norms them, times its
        multiplier; see `entering`.
        """
        rows = self._embedding_rows(token_ids)
        if self.config.embedding_norm:  # one by one: by torch the bits of a row among others vary
            unit, eps = rows.new_ones(rows.shape[1]), self.config.norm_eps
            rows = torch.cat([rms_norm(row, unit, 0.0, eps) for row in rows.split(1)])
        multiplier = self.config.embedding_multiplier
        return rows if multiplier == 1 else rows * multiplier

    def entering(
        self, token_ids: Sequence[int], x: torch.Tensor, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The residual (n, residual_size) of tokens whose embeddings are `rows` of x
        (n, hidden_size), as the first layer takes it, and what the layers of some models are given
        besides: see PerLayer.inputs."""
        given = None if self._per_layer is None else self._per_layer.inputs(token_ids, x, rows)
        return (x if self._streams is None else self._streams.opened(x, rows)), given

    def _embedding_rows(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Read one by one: the table is never resident for its own sake."""
        rows = self.head.rows(token_ids) if self.config.tied_embeddings else None
        if rows is not None:
            return rows
        if len(token_ids) == 1:
            rows = self._embeddings.read(token_ids[0])
        else:
            rows = self.checkpoint.read_rows(_EMBEDDINGS, token_ids)
        return rows.to(self.device, torch.float32, copy=True)

    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        """The final norm and the output head: residual rows (rows, residual_size) float32, rows as
        `linear` wants them -> (rows, vocab_size).
        """
        residual = residual if self._streams is None else self._streams.joined(residual)
        return self.head.logits(residual, self._streamed_block)

    @property
    def bytes_streamed(self) -> int:
        """Read since the weights were loaded."""
        of_experts = 0 if self._experts is None else self._experts.reads
        return self._bytes_streamed + of_experts * self._largest_expert_bytes

    @property
    def reads_experts(self) -> bool:
        """Whether some routed experts are read when they are chosen."""
        return self._experts is not None

    def forget_files(self) -> bool:
        """See LLM.forget_files."""
        if self._stream is None and not self.reads_experts:
            return True  # but for a row of the embedding
        scratch = self._scratch is None or self._scratch.forget()
        return self.checkpoint.forget() and scratch

    def close(self) -> None:
        """Stop reading and let go of memory and scratch. May be called again."""
        if self._experts is not None:
            self._bytes_streamed += self._experts.reads * self._largest_expert_bytes
            self._experts.close()
            self._experts = None
        if self._stream is not None:
            self._stream.close()
        self._resident.clear()
        self.head.close()
        self._per_layer = self._streams = None
        if self._scratch is not None:
            self._scratch.close()
        self.checkpoint.close()

    # ---- loading -----------------------------------------------------------------------------

    def _read_null_scores(self, layer: int) -> torch.Tensor | None:
        name = f"{layer_prefix(layer)}self_attn.sinks"
        if name not in self.checkpoint.refs:
            return None
        return self.checkpoint.read(name).float().to(self.device)

    def _named(self, layer: int, tensors: dict[str, Kept]) -> LayerTensors:
        """Tensors by their names within the layer; of several in one, each under its own name."""
        prefix, named = len(layer_prefix(layer)), LayerTensors()
        for name, tensor in tensors.items():
            name = name[prefix:]
            if name not in self._fused:
                named[name] = tensor
            for part, start, stop in self._fused.get(name, ()):
                named[part] = rows_of(tensor, start, stop)
        return named

    def _arena(self, names: list[str]) -> Arena:
        """One piece of fresh memory for tensors."""
        return Arena.of(sum(map(self._kept_bytes, names)))

    def _loaded(self, loader: TensorLoader, names: list[str], arena: Arena) -> dict[str, Kept]:
        """Tensors from the files."""
        tensors, refs = {}, self.checkpoint.refs
        announced = ahead = 0
        for at, name in enumerate(names):
            while announced < len(names) and (announced == at or ahead < _AHEAD_BYTES):
                self.checkpoint.announce(refs[names[announced]])
                ahead += refs[names[announced]].num_bytes
                announced += 1
            tensors[name] = loader.begin(name, arena)
            ahead -= refs[name].num_bytes
        loader.finish()
        return tensors

    def _kept_bytes(self, name: str) -> int:
        ref = self.checkpoint.refs[name]
        return stored_bytes(name, ref.shape, ref.packing, self._bits)

    def _keeps_layers(self) -> bool:
        """Whether streamed layers are converted once, to a scratch file: all of them where any
        layer's tensors would be, whichever are streamed. So the plan says."""
        names = [name for names in self._names for name in names]
        return bool(self._streamed) and self._are_kept(names, quick_too=self._quick_too)

    def _keeps_head(self) -> bool:
        return self.head.is_converted_once(quick_too=self._quick_too)

    def _are_kept(self, names: list[str], *, quick_too: bool = False) -> bool:
        refs = {name: self.checkpoint.refs[name] for name in names}
        matrices = ((name, ref.packing) for name, ref in refs.items() if len(ref.shape) == 2)
        return converted_once(matrices, self._bits, quick_too=quick_too)

    def _to_device(self, tensors: dict[str, Kept]) -> dict[str, Kept]:
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    # ---- experts -----------------------------------------------------------------------------

    def _keeps_experts(self) -> bool:
        return self._are_kept([name for names in self._expert_names.values() for name in names])

    def _expert_bytes(self, expert: Expert) -> int:
        """As it is kept."""
        return sum(map(self._kept_bytes, self._expert_names[expert]))

    @property
    def _largest_expert_bytes(self) -> int:
        return max(map(self._expert_bytes, self._expert_names), default=0)

    def shrink_experts(self, num_slots: int) -> None:
        """Give the memory of some slots for routed experts back; so many stay."""
        assert self._experts is not None
        self._experts.shrink(num_slots)

    def _open_cache(self, num_slots: int) -> None:
        routed = {layer for layer, _ in self._expert_names}
        slot = whole_blocks(self._largest_expert_bytes)
        self._experts = ExpertCache(self._read_expert, slot, num_slots, len(routed))
        for layer in routed:
            self._resident[layer].apart = self._experts, layer

    def _read_expert(self, expert: Expert, buffer: torch.Tensor) -> LayerTensors:
        """An expert's tensors, in a buffer."""
        if self._scratch is not None and self._scratch.has(expert):
            self._scratch.read(expert, buffer)
            return self._named(expert[0], self._scratch.views(expert, buffer))
        names = self._expert_names[expert]
        return self._named(expert[0], self._loaded(self._loader_of_thread(), names, Arena(buffer)))

    # ---- streaming ---------------------------------------------------------------------------

    def _loader_of_thread(self) -> TensorLoader:
        """One for what this thread reads from the files."""
        loader = getattr(self._of_thread, "loader", None)
        if loader is None:
            groups = self._expert_names.values() or [self._names[at] for at in self._streamed]
            staging = most_staging((self.checkpoint.refs[n] for g in groups for n in g), self._bits)
            if self.head.blocks is None and not self._keeps_head():
                staging = max(staging, self.head.staging_bytes)
            # Alone: the kernels' other threads belong to whoever multiplies meanwhile.
            loader = TensorLoader(self.checkpoint, self._bits, staging, threads=1)
            self._of_thread.loader = loader
        return loader

    def _read_group(self, key: int | HeadBlock, buffer: torch.Tensor) -> dict[str, Kept]:
        """A layer's tensors, or a block of the head, in a buffer."""
        if self._scratch is not None and self._scratch.has(key):
            self._scratch.read(key, buffer)
            self._bytes_streamed += self._scratch.num_bytes(key)
            return self._scratch.views(key, buffer)
        if not isinstance(key, int):
            self._bytes_streamed += self.head.num_bytes(key)
            return {_BLOCK: self.head.read(key, self._loader_of_thread(), buffer)}
        names = self._names[key]
        tensors = self._loaded(self._loader_of_thread(), names, Arena(buffer))
        self._bytes_streamed += sum(self.checkpoint.refs[name].num_bytes for name in names)
        return tensors

    def _streamed_block(self, key: HeadBlock) -> Kept:
        assert self._stream is not None
        return self._stream.next(key)[_BLOCK].to(self.device)

    def _layer_bytes(self, layer: int) -> int:
        return sum(map(self._kept_bytes, self._names[layer]))

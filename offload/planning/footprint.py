"""What a model's parts weigh: weights by layer, and the workspace of a run. Sizes only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from ...kernels.layout import PageLayout
from ..layers.residual_streams import kept_names
from ..models.layer_config import Recurrence, ScanShape
from ..models.model_config import ModelConfig
from ..models.past_cache import whole_blocks
from ..pages.geometry import Geometry
from ..weights.expert_cache import READERS, fewest_slots
from ..weights.kept_tensors import converted_once, head_bits, kept_form, staging_bytes, stored_bytes
from ..weights.output_head import HEAD_BLOCK_ROWS
from ..weights.packing import Bits, Packing, Plain
from ..weights.rereading import bounce_bytes
from ..weights.skeleton import expert_names, layer_of

# Memory that torch, BLAS and the allocator take for themselves while they work, measured on the
# 135M shape.
SLACK_BYTES = 40 << 20
MOST_VERIFIED = 16  # tokens that are verified at once
BIASED_SPANS = 8  # whose key biases' part of their scores is computed at once
_EXPERT_NUMBERS_BYTES = 5 << 8  # of each expert: where its tensors lie, as kernels are told
_ATTENTION_SCRATCH_ROWS = 512  # of scores: 48 for each of ten threads
_SCORE_COPIES = 12  # of a number per page and query head, while pages are chosen


@dataclass(frozen=True)
class Facts:
    """The model as the planner sees it: sizes by tensor name, nothing else.

    packings: of tensors in the files; what is not named there is plain numbers of config.json's
    dtype.
    """

    name: str
    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    weight_bits: Bits
    packings: dict[str, Packing] = field(default_factory=dict)

    def _packing(self, name: str) -> Packing:
        return self.packings.get(name) or Plain(getattr(torch, self.config.dtype))

    @property
    def _head_packing(self) -> Packing:
        tied = self.config.tied_embeddings
        return self._packing("model.embed_tokens.weight" if tied else "lm_head.weight")

    @cached_property
    def _unlayered(self) -> dict[str, tuple[int, ...]]:
        """What belongs to no layer and stays, but for the final norm and the head, by name."""
        return {name: self.shapes[name] for name in kept_names(self.config)}

    @property
    def _unlayered_matrices(self) -> list[tuple[tuple[int, ...], Packing]]:
        unlayered = self._unlayered.items()
        return [(shape, self._packing(name)) for name, shape in unlayered if len(shape) == 2]

    @property
    def unlayered_bytes(self) -> int:
        """Of what belongs to no layer and stays beside the head."""
        bits = self.weight_bits
        return 4 * self.config.vocab_size * self.config.head_bias + sum(
            stored_bytes(name, shape, self._packing(name), bits)
            for name, shape in self._unlayered.items()
        )

    @property
    def _head_bits(self) -> Bits:
        return head_bits(self.weight_bits)

    @cached_property
    def _layer_matrices(self) -> set[tuple[tuple[int, ...], Packing]]:
        return {
            (shape, self._packing(name))
            for name, shape in self.shapes.items()
            if len(shape) == 2 and layer_of(name) is not None
        }

    @cached_property
    def _keeps_layers(self) -> dict[bool, bool]:
        names = [name for name in self.shapes if layer_of(name) is not None]
        return {quick: self._are_kept(names, quick_too=quick) for quick in (False, True)}

    def keeps_layers(self, *, quick_too: bool) -> bool:
        """Whether layers that are streamed are converted once, to a scratch file; see
        converted_once."""
        return self._keeps_layers[quick_too]

    def _are_kept(self, names: Iterable[str], *, quick_too: bool = False) -> bool:
        matrices = [(n, self._packing(n)) for n in names if len(self.shapes[n]) == 2]
        return converted_once(matrices, self.weight_bits, quick_too=quick_too)

    @cached_property
    def layer_staging_bytes(self) -> int:
        """What reading a layer from the files takes besides its buffer."""
        bits = self.weight_bits
        return max((staging_bytes(*of, bits) for of in self._layer_matrices), default=0)

    @cached_property
    def layer_read_bytes(self) -> int:
        """The most of a layer that is read from the files in one go."""
        return _most_read(self._layer_matrices)

    @cached_property
    def said_bits(self) -> str:
        """For people: 8, 4 or full (as numbers); where the files have weights quantised, what most
        numbers of layers are kept in.
        """
        if self.config.quantisation is None and self.weight_bits != "auto":
            return "full" if self.weight_bits is None else str(self.weight_bits)
        counts: dict[int | None, int] = {}
        for name, shape in self.shapes.items():
            if layer_of(name) is not None and len(shape) == 2:
                bits = kept_form(name, self._packing(name), self.weight_bits).bits
                counts[bits] = counts.get(bits, 0) + shape[0] * shape[1]
        bits = max(counts, key=lambda bits: counts[bits])
        return "full" if bits is None else str(bits)

    @cached_property
    def _layers(self) -> list[tuple[int, int]]:
        """(bytes kept, bytes multiplied for one token) of every layer, smallest first."""
        sizes = [[0, 0] for _ in range(self.config.num_layers)]
        for name, shape in self.shapes.items():
            layer = layer_of(name)
            if layer is not None:
                size = stored_bytes(name, shape, self._packing(name), self.weight_bits)
                sizes[layer][0] += size
                experts = self.config.experts_of(layer)
                if experts is not None and ".experts." in name:
                    size = size * experts.chosen // experts.count
                sizes[layer][1] += size
        return sorted((kept, multiplied) for kept, multiplied in sizes)

    @cached_property
    def layer_sizes(self) -> list[int]:
        """Bytes of every layer's tensors as they are kept, smallest first."""
        return [kept for kept, _ in self._layers]

    @cached_property
    def _experts(self) -> dict[tuple[int, int], int]:
        """Bytes of every routed expert, (layer, number), as it is kept."""

        def size(name: str) -> int:
            return stored_bytes(name, self.shapes[name], self._packing(name), self.weight_bits)

        return {e: sum(map(size, names)) for e, names in expert_names(self.config).items()}

    @cached_property
    def prefill_numbers(self) -> int:
        """Of matrices that a prefill multiplies every token with: of experts, those that are
        chosen. Not of the last layer that later tokens need something of, which does not all of its
        work for all of them."""
        found = 0
        for name, shape in self.shapes.items():
            layer = layer_of(name)
            if layer is None or layer >= self.config.last_keeper or len(shape) != 2:
                continue
            experts, numbers = self.config.experts_of(layer), shape[0] * shape[1]
            if experts is not None and ".experts." in name:
                numbers = numbers * experts.chosen // experts.count
            found += numbers
        return found

    @property
    def num_experts(self) -> int:
        """Of all layers."""
        return len(self._experts)

    @property
    def fewest_expert_slots(self) -> int:
        """That the model runs with; 0 where no layer has routed experts."""
        chosen = max((e.chosen for e in self.config.experts if e is not None), default=0)
        return fewest_slots(chosen) if chosen else 0

    @property
    def experts_bytes(self) -> int:
        """Of all of them."""
        return sum(self._experts.values())

    def experts_scratch_bytes(self) -> int:
        """Of the scratch file that experts are converted to, in whole blocks."""
        return sum(map(whole_blocks, self._experts.values())) if self.keeps_experts else 0

    @property
    def expert_bytes(self) -> int:
        """Room for the largest one."""
        return whole_blocks(max(self._experts.values(), default=0))

    @property
    def chosen_bytes(self) -> int:
        """Of those that a token goes through."""
        return sum(
            size * experts.chosen // experts.count
            for (layer, _), size in self._experts.items()
            if (experts := self.config.experts_of(layer)) is not None
        )

    @cached_property
    def _expert_matrices(self) -> list[tuple[tuple[int, ...], Packing]]:
        names = [name for names in expert_names(self.config).values() for name in names]
        found = [(self.shapes[name], self._packing(name)) for name in names]
        return [of for of in found if len(of[0]) == 2]

    @cached_property
    def keeps_experts(self) -> bool:
        """Whether experts are converted once, to a scratch file."""
        return self._are_kept(n for names in expert_names(self.config).values() for n in names)

    @property
    def expert_staging_bytes(self) -> int:
        """What reading several experts at once takes besides their slots."""
        if self.keeps_experts:
            return 0
        bits, matrices = self.weight_bits, set(self._expert_matrices)
        staging = READERS * max(staging_bytes(*of, bits) for of in matrices)
        return staging + bounce_bytes(_most_read(matrices))

    def multiplied_bytes(self, num_layers: int) -> int:
        """Bytes of the `num_layers` smallest layers that one token is multiplied with: of experts,
        those that a router chooses.
        """
        return sum(multiplied for _, multiplied in self._layers[:num_layers])

    def head_bytes(self) -> int:
        return self._head_rows_bytes(self.config.vocab_size)

    def _head_rows_bytes(self, rows: int) -> int:
        shape = (rows, self.config.hidden_size)
        return stored_bytes("lm_head.weight", shape, self._head_packing, self._head_bits)

    def head_block_bytes(self) -> int:
        """Of the largest block of the head, as it is kept."""
        return self._head_rows_bytes(min(HEAD_BLOCK_ROWS, self.config.vocab_size))

    def keeps_head(self, *, quick_too: bool) -> bool:
        """As `keeps_layers`, of the output head."""
        matrix = "lm_head.weight", self._head_packing
        return converted_once([matrix], self._head_bits, quick_too=quick_too)

    def head_scratch_bytes(self) -> int:
        """In a scratch file, in whole blocks."""
        whole, rest = divmod(self.config.vocab_size, HEAD_BLOCK_ROWS)
        sizes = (self._head_rows_bytes(rows) for rows in (HEAD_BLOCK_ROWS,) * whole + (rest,))
        return sum(map(whole_blocks, sizes))

    @property
    def head_staging_bytes(self) -> int:
        """What reading a block of the head from the files takes besides its buffer."""
        shape = min(HEAD_BLOCK_ROWS, self.config.vocab_size), self.config.hidden_size
        return staging_bytes(shape, self._head_packing, self._head_bits)

    @property
    def head_read_bytes(self) -> int:
        """The most of the head that is read from the files in one go."""
        shape = min(HEAD_BLOCK_ROWS, self.config.vocab_size), self.config.hidden_size
        return _most_read([(shape, self._head_packing)])

    @cached_property
    def load_bytes(self) -> int:
        """The most that loading takes above what stays: the largest tensor as it lies in the file,
        twice where its numbers change places, and what quantising a few of its rows takes.
        """
        bits = self.weight_bits
        staged = (
            packing.staging_bytes(shape, packing.own_bits(bits))
            for shape, packing in (*self._layer_matrices, *self._unlayered_matrices)
        )
        block = min(HEAD_BLOCK_ROWS, self.config.vocab_size), self.config.hidden_size
        in_file = sum(self._head_packing.sizes(block))
        return max(in_file, self.head_block_bytes(), *staged) + SLACK_BYTES


def _most_read(matrices: Iterable[tuple[tuple[int, ...], Packing]]) -> int:
    """Of the matrices' bytes in the files the most that lie in one place."""
    return max((size for shape, packing in matrices for size in packing.sizes(shape)), default=0)


def selection_bytes(config: ModelConfig, geometry: Geometry, context: int) -> int:
    """The most that choosing among the pages of one layer takes; 0 where all are attended."""
    if not geometry.layout.value_means:
        return 0
    tokens = geometry.sealed_tokens(context)

    def of_layer(layout: PageLayout) -> int:
        pages, records = tokens // layout.page_tokens, tokens // layout.record_tokens
        scores = _SCORE_COPIES * pages * config.num_heads
        means = 2 * pages * layout.kv_heads * layout.head_dim
        partials = 2 * records * config.num_heads * (layout.head_dim + 2)
        return scores + means + partials

    bias = 4 * tokens * config.num_heads * config.qkv_bias  # in parts, joined, and of those chosen
    return 4 * (max(map(of_layer, geometry.shapes)) + bias)


def _around_latents(config: ModelConfig) -> int:
    """Numbers of a token that its queries and its output take besides, where it has a latent."""
    if config.latent is None:
        return 0
    of_queries = 2 * config.num_heads * config.latent.query_dim
    return of_queries + 2 * (config.latent.query_rank or 0) + config.mixed_size


def _packed(head_dim: int) -> int:
    """What a prefill kernel holds of one head's token: its key, and its value in whole lanes of
    sixteen where it has no such number of channels."""
    return head_dim if head_dim % 16 == 0 else head_dim + -(-head_dim // 16) * 16


def _widest(config: ModelConfig) -> int:
    """The most numbers that an MLP or an expert has between its projections."""
    experts = [e for e in config.experts if e is not None]
    sizes = (size for e in experts for size in (e.intermediate_size, e.shared_size))
    dense = config.inner_sizes or (config.intermediate_size,)
    return max([*dense, *sizes])


def workspace_bytes(config: ModelConfig, geometry: Geometry, sweep_cells: int) -> int:
    """The most that activations, tiles and scores of prefill take at once."""
    cell, layouts = geometry.cell_tokens, geometry.shapes
    heads = config.num_heads * max(of.head_dim for of in layouts)
    kv = max(of.kv_heads * of.head_dim for of in layouts)
    raw_tokens = 2 * cell + geometry.layout.page_tokens
    spans = [geometry.span_tokens_of(of) for of in layouts]
    longest = max(*spans, raw_tokens)
    merges = 2 + max(1, (config.max_positions // min(spans)).bit_length())
    # Key biases' factors are as many as a query's elements.
    per_cell = config.residual_size + heads * (2 + merges + config.qkv_bias)
    per_cell += _per_layer_numbers(config)  # are kept for the sweep
    # Routed rows are gathered, multiplied and put back beside the residual's: all cells at once.
    experts = [e for e in config.experts if e is not None]
    if experts:
        per_cell += (3 + config.parallel_mlp) * config.hidden_size + 4 * max(
            e.count for e in experts
        )
        per_cell += 3 * max(0 if e.latent is None else e.latent.size for e in experts)
    inner = _widest(config)
    between = inner * (4 if any(c is not None for c in config.gate_cutoffs) else 3)
    own = _per_layer_numbers(config)
    chosen = max((e.chosen + 1 for e in experts), default=0)  # and the shared one
    gathered = (3 + any(e.weighs_input for e in experts)) * config.hidden_size if experts else 0
    # A row attends, or goes through a state: projections, and what comes of them.
    mixing = 0
    for attends, r in config.mixers:
        here = (4 * heads + 8 * kv + 2 * longest + _around_latents(config)) * attends
        if r is not None:
            here += _around_state(r)
        mixing = max(mixing, here)
    once = (
        cell * (4 * config.residual_size + mixing + between + gathered + 4 * own)
        + 2 * max(of.kv_heads * of.head_dim * geometry.span_tokens_of(of) for of in layouts)
        + 2 * kv * raw_tokens
        + cell * max(spans) * config.num_heads * config.qkv_bias  # of key biases' scores
        + max(_packed(of.head_dim) * of.kv_heads for of in layouts) * (longest + 64)
        + _ATTENTION_SCRATCH_ROWS * longest
        + 256 * max(config.hidden_size, inner)
        + chosen * (5 * inner + config.hidden_size)  # of one row, which all experts take at once
        + 4 * config.vocab_size
    )
    told = _EXPERT_NUMBERS_BYTES * sum(e.count for e in experts)
    return 4 * (sweep_cells * cell * per_cell + once) + told + SLACK_BYTES


def _around_state(r: Recurrence) -> int:
    """What a token's row is projected to, and what comes of it."""
    s, count = r.shape, 3 * r.channels
    if isinstance(s, ScanShape):
        return count + 4 * s.channels + 3 * (s.rank + 2 * s.dim)
    return count + 4 * (r.channels if s is None else s.values)


def _numbers_of_state(r: Recurrence) -> int:
    """What a layer with a state has besides matrices: its convolution, biases, rates, norms."""
    s, convolution = r.shape, (r.conv_width + 1) * r.channels
    if isinstance(s, ScanShape):
        return convolution + s.channels
    return convolution + (0 if s is None else s.steps + 2 * s.heads + s.values)


def _per_layer_numbers(config: ModelConfig) -> int:
    """What a token has besides the residual, of all layers."""
    given = config.per_layer_inputs
    return 0 if given is None else config.num_layers * given.size


def verify_bytes(config: ModelConfig, geometry: Geometry, context: int) -> int:
    """The most that verifying a few tokens takes: their logits beside those of the ones before,
    activations, the partial of each span, and what key biases add to the scores of some spans."""
    count, layouts = MOST_VERIFIED, geometry.shapes
    head_dim = max(of.head_dim for of in layouts)
    heads, inner = config.num_heads * head_dim, _widest(config)
    a_token = 2 * config.vocab_size + 8 * (config.residual_size + heads) + 4 * inner
    a_token += _around_latents(config)
    a_token += 4 * _per_layer_numbers(config)
    shortest = min(map(geometry.span_tokens_of, layouts))
    most = geometry.num_spans(context) * geometry.most_span_tokens // shortest
    partials = (most + 1) * config.num_heads * (head_dim + 2)
    bias = BIASED_SPANS * geometry.most_span_tokens * config.num_heads * config.qkv_bias
    a_token += sum(map(_around_state, config.recurrent))  # until it is taken in
    numbers = sum(map(_numbers_of_state, config.recurrent))
    return 4 * (count * (a_token + partials + 2 * bias) + partials + numbers) + SLACK_BYTES

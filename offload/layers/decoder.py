"""The transformer's arithmetic for one layer: norms, projections, RoPE, and what joins the
residual. One decoder for all families: whatever sets one apart is a field of ModelConfig.

Works on the rows of one cell (prefill) or on a single row (decode), in float32. A single row takes
one call of the compiled kernels for all that comes before a layer's attention and one for all that
follows, where they serve. Knows no pages and no tiers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ...kernels.add import add_scaled
from ...kernels.altup_step import AltUpStep
from ...kernels.attention import cap
from ...kernels.gate import gate as gate_with
from ...kernels.layout import padded_head_dim
from ...kernels.norm import layer_norm, rms_norm
from ...kernels.routed_step import RoutedStep
from ...kernels.state_step import StateStep
from ...kernels.step import LayerStep
from ..models.config_fields import MOST_POSITIONS
from ..models.layer_config import Experts, QueryGrowth, ScanShape
from ..models.model_config import ModelConfig
from ..running.sequence import RawPages
from ..weights.weights import LayerTensors
from .altup import AltUpLayers
from .latent import LatentAttention
from .layer_steps import LayerSteps, Prepared
from .mlp import Cell, chosen_experts, dense_mlp, routed_mlps, routed_step, router_norm
from .recurrent import RecurrentLayer
from .rope import layer_ropes
from .rowwise import tiled
from .scan_layer import ScanLayer
from .state_layer import Replay, StateLayer
from .states import LayerState

# What goes into a layer's output projections, each (n, inputs): what was attended to, what `recur`
# gave; one of them, both, or neither.
Mixed = Sequence[torch.Tensor]


class Projected(NamedTuple):
    """q: as `Decoder.queries` gives them. kv: keys and values, each (n, kv_heads, page_dim), None
    where a layer attends those of another. gate: of the output, (n, num_heads * head_dim), where
    there is one: see `attention_output`."""

    q: torch.Tensor
    kv: tuple[torch.Tensor, torch.Tensor] | None
    gate: torch.Tensor | None


def _padded(heads: torch.Tensor) -> torch.Tensor:
    """Heads (..., head_dim) as they are attended, (..., page_dim)."""
    more = padded_head_dim(heads.shape[-1]) - heads.shape[-1]
    return torch.nn.functional.pad(heads, (0, more)) if more else heads


class Decoder:
    """Layer arithmetic of one model. `rows` says which rows of a cell are asked for.

    config: its RoPE scalings are fixed. is_resident: whether a layer's tensors stay where they are.
    ropes: one for each layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        is_resident: Callable[[int], bool] = lambda layer: True,
    ):
        self.config, self._is_resident = config, is_resident
        self._shapes = [config.shape_of(layer) for layer in range(config.num_layers)]
        self.ropes = layer_ropes(config.ropes, [of.head_dim for of in self._shapes], device)
        scale = config.attention_scale
        self.scale = config.head_dim**-0.5 if scale is None else scale
        self._altup = config.altup and AltUpLayers(config, config.altup)
        self._latent = config.latent and LatentAttention(config, config.latent)
        self._steps = LayerSteps(config, self.ropes, is_resident)

        def with_state(layer: int, w: LayerTensors) -> StateLayer:
            recurrence = config.recurrence_of(layer)
            assert recurrence is not None
            kind = ScanLayer if isinstance(recurrence.shape, ScanShape) else RecurrentLayer
            return kind(config, layer, w)

        self._with_state = Prepared(with_state, is_resident)

    def close(self) -> None:
        """Let go of what was prepared of layers' tensors, and so of these."""
        self._steps.clear()
        self._with_state.clear()

    def queries(
        self, layer: int, w: LayerTensors, x: torch.Tensor, rows: slice, position: int
    ) -> torch.Tensor:
        """A layer's queries from its residual input x (n, residual_size), the first row of which is
        at `position`: (kv_heads, groups * n, page_dim), scaled, row = group * n + i.

        `w`: the layer's tensors; of them only the norm's and the query's are read, and AltUp's.
        """
        h = self._mixer_input(layer, w, self.predicted(w, x, rows))
        return self._queries(layer, w, h, rows, position)[0]

    def predicted(self, w: LayerTensors, x: torch.Tensor, rows: slice) -> torch.Tensor:
        """Residual rows x (n, residual_size) as all that a layer does takes them: streams as it
        expects them to be behind it, of which it works on the first."""
        return x if self._altup is None else self._altup.predicted(w, x, rows)

    def project(
        self, layer: int, w: LayerTensors, x: torch.Tensor, rows: slice, position: int
    ) -> Projected:
        """Of rows x (n, residual_size) as `predicted` gives them, the first at `position`."""
        step = self._projecting_step(layer, w, x)
        if step is not None:
            angles = self.ropes[layer].angles(position, 1)
            return Projected(*step.project(x, *angles, self.query_scale(layer, position)))
        h = self._mixer_input(layer, w, x)
        q, gate = self._queries(layer, w, h, rows, position)
        if self.config.gate_projection:
            gate = self._own_gate(layer, w, h, rows)
        if self.config.shares_kv(layer):
            return Projected(q, None, gate)
        if self._latent is not None:
            k, v = self._latent.keys(w, h, rows), None
        else:
            k = self._project(w, h, rows, "k")
            v = k if self._shapes[layer].keys_are_values else self._project(w, h, rows, "v")
            k, v = (self._normed(layer, w, out, which) for out, which in ((k, "k"), (v, "v")))
        k = self._normed_behind(layer, w, self.ropes[layer].turn(k, position), "k")
        k = _padded(k)
        return Projected(q, (k, k if v is None else _padded(v)), gate)

    def project_row(
        self,
        layer: int,
        w: LayerTensors,
        x: torch.Tensor,
        position: int,
        raw: RawPages,
        kv: int,
        cell: int,
        row: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries and gate of the row x (1, residual_size) at `position`, as `predicted` gives it.
        Its keys and values, if it has some, go to a row of a raw cell. kv: the layer's number
        there.
        """
        step = self._projecting_step(layer, w, x)
        if step is None:
            projected = self.project(layer, w, x, slice(0, 1), position)
            if projected.kv is not None:
                raw.write(kv, cell, row, *projected.kv)
            return projected.q, projected.gate
        places = [n for rows in raw.places(cell, row) for n in raw.at(kv, rows)]
        angles, scale = self.ropes[layer].angles(position, 1), self.query_scale(layer, position)
        return step.project_into(x, *angles, scale, places, raw.dtype)

    def recur(
        self,
        layer: int,
        w: LayerTensors,
        x: torch.Tensor,
        rows: slice,
        before: LayerState,
        after: LayerState,
    ) -> torch.Tensor:
        """What a layer that keeps a state makes of `rows` of the residual x (n, hidden_size), for
        its output projection; other rows are zero. `after` becomes the state behind the last row.
        """
        return self._with_state.of(layer, w).run(x, rows, before, after)

    def recur_several(
        self,
        layer: int,
        w: LayerTensors,
        x: torch.Tensor,
        before: LayerState,
        after: LayerState,
    ) -> tuple[torch.Tensor, Replay]:
        """`recur` of all rows, and what makes the state behind some of them once more."""
        keeps = self._is_resident(layer)
        return self._with_state.of(layer, w).run_several(x, before, after, keeps=keeps)

    def key_bias(self, w: LayerTensors) -> torch.Tensor | None:
        """The key projection's bias, (kv_heads, page_dim), or None, as where keys are normed or
        bounded, which then are not so far from zero as it.
        """
        bias = w.vector_or_none("self_attn.k_proj.bias")
        if bias is None or self.config.qk_norm or self.config.qkv_clip:
            return None
        return _padded(bias.view(self.config.num_kv_heads, self.config.head_dim))

    def attention_output(
        self,
        layer: int,
        w: LayerTensors,
        attended: torch.Tensor,
        gate: torch.Tensor | None,
        rows: slice,
    ) -> torch.Tensor:
        """What a layer attended to, (n, num_heads * page_dim), as its output projection takes it,
        with the gate that `project` gave; both are used up."""
        shape = self._shapes[layer]
        if shape.page_dim != shape.head_dim:
            heads = attended.view(len(attended), -1, shape.page_dim)
            attended = heads[..., : shape.head_dim].flatten(1)
        if gate is not None:
            attended = gate_with(gate, attended, self.config.gate_activation)
        return attended if self._latent is None else self._latent.mixed(w, attended, rows)

    def end(
        self, layer: int, w: LayerTensors, x: torch.Tensor, rows: slice, given: torch.Tensor | None
    ) -> torch.Tensor:
        """Residual rows after all of the layer, of those behind its MLP. given: the inputs of all
        layers (num_layers, n, size), see PerLayer, where the model has some."""
        step = self._step(layer, w, x) if given is not None or self.config.layer_scalars else None
        if step is not None and self._altup is None:
            return step.end(x, None if given is None else given[layer])
        if given is not None:
            by = x if self._altup is None else self._altup.gated(w, x)
            gate = tiled(by, rows, w["per_layer_input_gate.weight"])
            inner = gate_with(gate, given[layer], self.config.activation)
            out = tiled(inner, rows, w["per_layer_projection.weight"])
            out = self._norm(w, "post_per_layer_input_norm", out)
            x = add_scaled(x, out, 1.0) if self._altup is None else self._altup.added(x, out)
        return x * w.vector("layer_scalar") if self.config.layer_scalars else x

    def mix(
        self, layer: int, w: LayerTensors, x: torch.Tensor, mixed: Mixed, rows: slice
    ) -> torch.Tensor:
        """Residual rows after the layer: x plus the output projections of `mixed`, then plus the
        MLP's."""
        step = self._step(layer, w, x)
        if step is not None and self._altup is None and self._steps.has_end(layer):
            return step.mix(x, *mixed)
        return self.add_mlp(layer, w, self.add_mixed(layer, w, x, mixed, rows), rows, x)

    def add_mixed(
        self, layer: int, w: LayerTensors, x: torch.Tensor, mixed: Mixed, rows: slice
    ) -> torch.Tensor:
        """Residual rows x plus the output projections; of streams, the first plus those."""
        if self._altup is None:
            return self._add_outputs(layer, w, x, mixed, rows)
        active = self._altup.first(x)
        return self._altup.with_first(x, self._add_outputs(layer, w, active, mixed, rows))

    def _add_outputs(
        self, layer: int, w: LayerTensors, x: torch.Tensor, mixed: Mixed, rows: slice
    ) -> torch.Tensor:
        step, entered = self._step(layer, w, x), x
        norm = self.config.norms_of(layer).after_attention
        for (name, times), part in zip(self.config.output_projections(layer), mixed, strict=True):
            if step is not None:
                x, step = step.add_attention(x, part), None  # it has the first
                continue
            o = tiled(part, rows, w[f"{name}.weight"], w.get(f"{name}.bias"))
            x = add_scaled(x, self._norm_after(w, norm, o), times)
        return self._add_laurel(layer, w, x, entered, rows) if self.config.laurel_rank else x

    def _add_laurel(
        self, layer: int, w: LayerTensors, x: torch.Tensor, entered: torch.Tensor, rows: slice
    ) -> torch.Tensor:
        """x plus what attention read and what a matrix of low rank makes of that, all smaller by
        the root of two."""
        h = self._norm(w, self.config.norms_of(layer).before_attention, entered)
        inner = tiled(h, rows, w["laurel.linear_left.weight"])
        learnt = tiled(inner, rows, w["laurel.linear_right.weight"])
        return (x + h + self._norm(w, "laurel.post_laurel_norm", learnt)) * 0.5**0.5

    def add_mlp(
        self, layer: int, w: LayerTensors, x: torch.Tensor, rows: slice, entered: torch.Tensor
    ) -> torch.Tensor:
        """Residual rows x plus the MLP's output, if the layer has one; streams are corrected by
        that. entered: the rows that entered the layer, which are what a parallel MLP reads, and
        the streams as they were predicted."""
        if self._altup is None:
            return self._add_mlp_output(layer, w, x, rows, entered)
        first = self._altup.first
        active = self._add_mlp_output(layer, w, first(x), rows, first(entered))
        return self._altup.corrected(w, entered, active, rows)

    def _add_mlp_output(
        self, layer: int, w: LayerTensors, x: torch.Tensor, rows: slice, entered: torch.Tensor
    ) -> torch.Tensor:
        c, step = self.config, self._step(layer, w, x)
        if not c.has_mlp(layer):
            return x
        if step is not None and self._steps.has_mlp(layer):
            return step.add_mlp(x, entered)
        if c.experts_of(layer) is not None:
            return self.add_routed(layer, w, [(x, rows, entered)])[0]
        h = self._mlp_input(layer, w, x, entered)
        how = {"gate_multiplier": c.gate_multiplier, "gate_cutoff": c.gate_cutoff(layer)}
        out = dense_mlp(w, h, rows, c.activation, **how)
        return self._add_mlp(x, self._norm_after(w, c.norms_of(layer).after_mlp, out))

    def likely_experts(self, layer: int, w: LayerTensors, x: torch.Tensor) -> list[int]:
        """The experts that a layer would choose for the residual row x (1, hidden_size) if nothing
        were added to it first."""
        experts = self._experts_of(layer)
        by = self._chosen_by(w, experts, x)
        return chosen_experts(w, self._mlp_input(layer, w, x, x) if by is None else by, experts)

    def add_routed(
        self,
        layer: int,
        w: LayerTensors,
        cells: list[tuple[torch.Tensor, slice, torch.Tensor]],
    ) -> list[torch.Tensor]:
        """`add_mlp` of several cells of a layer with routed experts, to the bit: each expert is
        brought once."""
        c, experts = self.config, self._experts_of(layer)
        inputs = [
            Cell(self._expert_input(layer, w, x, entered), rows, self._chosen_by(w, experts, x))
            for x, rows, entered in cells
        ]
        outs = routed_mlps(w, inputs, c.activation, experts)
        beside = experts.beside
        if beside is not None:
            for (x, rows, entered), out in zip(cells, outs, strict=True):
                dense = dense_mlp(w, self._mlp_input(layer, w, x, entered), rows, c.activation)
                out.copy_(self._norm(w, beside.after_mlp, dense) + self._norm(w, beside.after, out))
        after = (self._norm_after(w, c.norms_of(layer).after_mlp, out) for out in outs)
        return [self._add_mlp(x, out) for (x, *_), out in zip(cells, after, strict=True)]

    def _experts_of(self, layer: int) -> Experts:
        """Of a layer that has some."""
        experts = self.config.experts_of(layer)
        assert experts is not None
        return experts

    def _chosen_by(self, w: LayerTensors, experts: Experts, x: torch.Tensor) -> torch.Tensor | None:
        """What experts are chosen by, if not by what they are given."""
        if experts.router_scale is None:
            return None
        return rms_norm(x, router_norm(w, experts), 0.0, self.config.norm_eps)

    def head_output(self, logits: torch.Tensor) -> torch.Tensor:
        """What the output head gives to logits, in place."""
        if self.config.logits_divisor != 1:
            logits.div_(self.config.logits_divisor)
        return cap(logits, self.config.logits_softcap)

    def layer_step(self, layer: int, w: LayerTensors) -> LayerStep | None:
        """The compiled step that does all of a layer's arithmetic but for its attention, its state
        and its experts, of one row; or None."""
        return self._steps.of(layer, w) if self._steps.is_whole(layer) else None

    def altup_step(self, w: LayerTensors) -> AltUpStep | None:
        """The compiled step of a layer's residual streams, of one row; None where there is one."""
        return self._altup and self._altup.step(w)

    def state_step(self, layer: int, w: LayerTensors) -> StateStep | None:
        """The compiled step of what a layer keeps a state for, of one row; or None."""
        return self._with_state.of(layer, w).step

    def routed_step(self, layer: int, w: LayerTensors) -> RoutedStep | None:
        """The compiled step of a layer's experts, of one row; or None."""
        config = self.config
        return routed_step(w, config.activation, self._experts_of(layer), config.norm_eps)

    def query_scale(self, layer: int, position: int) -> float:
        """What a layer's query at a position is multiplied by."""
        growth = self._growth(layer)
        if growth is None:
            return self.scale
        steps = (position + growth.ahead) // growth.every
        return self.scale * (1 + growth.beta * math.log1p(steps))

    def _growth(self, layer: int) -> QueryGrowth | None:
        growth = self.config.query_growth
        is_other = growth is not None and growth.unturned and self.config.ropes[layer] is not None
        return None if is_other else growth

    def _step(self, layer: int, w: LayerTensors, x: torch.Tensor) -> LayerStep | None:
        """The compiled step that serves x, or None."""
        return self._steps.of(layer, w) if x.shape[0] == 1 else None

    def _projecting_step(self, layer: int, w: LayerTensors, x: torch.Tensor) -> LayerStep | None:
        return self._step(layer, w, x) if self._steps.has_projections(layer) else None

    def _mixer_input(self, layer: int, w: LayerTensors, x: torch.Tensor) -> torch.Tensor:
        """What attention reads of rows as `predicted` gives them."""
        x = x if self._altup is None else self._altup.first(x)
        return self._norm(w, self.config.norms_of(layer).before_attention, x)

    def _mlp_input(
        self, layer: int, w: LayerTensors, x: torch.Tensor, entered: torch.Tensor
    ) -> torch.Tensor:
        norms = self.config.norms_of(layer)
        if self.config.parallel_mlp:
            return self._norm(w, norms.before_attention, entered)
        return self._norm(w, norms.before_mlp, x)

    def _expert_input(
        self, layer: int, w: LayerTensors, x: torch.Tensor, entered: torch.Tensor
    ) -> torch.Tensor:
        beside = self._experts_of(layer).beside
        if beside is not None:
            return self._norm(w, beside.before, x)
        return self._mlp_input(layer, w, x, entered)

    def _norm_after(self, w: LayerTensors, name: str | None, x: torch.Tensor) -> torch.Tensor:
        """As `_norm`, of what attention or an MLP gave."""
        return self._norm(w, name, x, self.config.after_norm_eps)

    def _norm(
        self, w: LayerTensors, name: str | None, x: torch.Tensor, eps: float | None = None
    ) -> torch.Tensor:
        """x normed by the tensor of that name; x itself where the layer has no norm there. eps:
        None: the model's."""
        if name is None:
            return x
        eps = self.config.norm_eps if eps is None else eps
        weight, how = w.vector(f"{name}.weight"), (self.config.norm_offset, eps)
        if self.config.layer_norm:
            return layer_norm(x, weight, w.vector_or_none(f"{name}.bias"), *how)
        return rms_norm(x, weight, *how)

    def _add_mlp(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        times = self.config.mlp_multiplier
        return add_scaled(x, y, self.config.residual_multiplier if times is None else times)

    def _project(self, w: LayerTensors, h: torch.Tensor, rows: slice, which: str) -> torch.Tensor:
        name = f"self_attn.{which}_proj"
        return tiled(h, rows, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def _normed(self, layer: int, w: LayerTensors, out: torch.Tensor, which: str) -> torch.Tensor:
        """Queries (which = "q"), keys ("k") or values ("v") before RoPE, of what they are projected
        to: (n, heads, head_dim)."""
        heads, most = self._normed_heads(layer, w, out, which), self.config.qkv_clip
        return heads.clamp_(-most, most) if most else heads

    def _normed_heads(
        self, layer: int, w: LayerTensors, out: torch.Tensor, which: str
    ) -> torch.Tensor:
        c, head_dim = self.config, self._shapes[layer].head_dim
        how = c.qk_norm if which != "v" else ""
        if how == "all":
            out = self._norm(w, f"self_attn.{which}_norm", out)
        out = out.view(len(out), -1, head_dim)
        if which == "v" and c.value_norm:
            return rms_norm(out, out.new_ones(head_dim), 0.0, c.norm_eps)
        if how == "each":
            normed = layer_norm(out, out.new_ones(head_dim), None, 0.0, c.norm_eps)
            return normed * w.vector(f"self_attn.{which}_norm.weight").float()
        return self._norm(w, f"self_attn.{which}_norm", out) if how == "head" else out

    def _normed_behind(
        self, layer: int, w: LayerTensors, heads: torch.Tensor, which: str
    ) -> torch.Tensor:
        """Turned heads, normed if that is what is normed."""
        is_normed = self.config.norms_turned(layer)
        return self._norm(w, f"self_attn.{which}_norm", heads) if is_normed else heads

    def _queries(self, layer: int, w, h: torch.Tensor, rows: slice, position: int):
        """As `queries` has them, and the gate of the output, if there is one."""
        c, shape, n = self.config, self._shapes[layer], h.shape[0]
        gate, turned, start = None, [], 0
        if self._latent is not None:
            heads = self._latent.queries(w, h, rows)
        else:
            heads = self._project(w, h, rows, "q")
            if c.output_gate:
                both = heads.view(n, c.heads_of(layer), 2, shape.head_dim)
                gate, heads = both[:, :, 1].reshape(n, -1), both[:, :, 0].reshape(n, -1)
            heads = self._normed(layer, w, heads, "q")
        while start < n:  # rows of one scale at a time: it is what a row alone is multiplied by
            at = position + start
            stop = min(n, start + self._same_scale(layer, at))
            some, scale = heads[start:stop], self.query_scale(layer, at)
            if c.norms_turned(layer):
                some = self.ropes[layer].turn(some, at, heads_first=True)
                turned.append(self._normed_behind(layer, w, some, "q").mul_(scale))
            else:
                turned.append(self.ropes[layer].turn(some, at, scale, heads_first=True))
            start = stop
        q = turned[0] if len(turned) == 1 else torch.cat(turned, 1)
        return _padded(q).view(shape.kv_heads, -1, shape.page_dim), gate

    def _own_gate(self, layer: int, w: LayerTensors, h: torch.Tensor, rows: slice) -> torch.Tensor:
        """The gate of the output by a matrix of its own."""
        gate = self._project(w, h, rows, "gate")
        if self.config.gate_projection == "head":
            gate = gate.repeat_interleave(self._shapes[layer].head_dim, -1)
        return gate

    def _same_scale(self, layer: int, position: int) -> int:
        """How many positions from this one on have a layer's `query_scale`, at least."""
        growth = self._growth(layer)
        if growth is None:
            return MOST_POSITIONS
        return growth.every - (position + growth.ahead) % growth.every

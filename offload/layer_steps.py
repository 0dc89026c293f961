"""What is prepared once for a layer's tensors, such as the compiled decode step where it serves.

What the step cannot do (another device, the reference kernels) is the decoder's to do operation by
operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from ..kernels.gate import ACTIVATIONS
from ..kernels.step import QK_NORMS, LayerStep, StepShape, native_for
from .model_config import ModelConfig
from .rope import Rope
from .weights import LayerTensors

_QKV = ("q", "k", "v")
_LAUREL = {"laurel_left": "laurel.linear_left", "laurel_right": "laurel.linear_right"}
_INPUTS = {"input_gate": "per_layer_input_gate", "input_output": "per_layer_projection"}
_MLP = ("gate", "up", "down")
_OUTPUTS = ("o", "beside")


Made = TypeVar("Made")


class Prepared(Generic[Made]):
    """What `make(layer, tensors)` gives for each layer: a resident one's is made once, a streamed
    one's whenever it has been read again, and let go of with the next."""

    def __init__(
        self, make: Callable[[int, LayerTensors], Made], is_resident: Callable[[int], bool]
    ):
        self._make, self._is_resident = make, is_resident
        # The tensors are kept beside it: the same object is the same layer as before.
        self._made: dict[int, tuple[LayerTensors, Made]] = {}
        self._streamed: int | None = None

    def of(self, layer: int, w: LayerTensors) -> Made:
        made = self._made.get(layer)
        if made is None or made[0] is not w:
            if self._streamed is not None:
                self._made.pop(self._streamed, None)
            self._streamed = None if self._is_resident(layer) else layer
            made = self._made[layer] = w, self._make(layer, w)
        return made[1]

    def clear(self) -> None:
        """Let go of all of it, and of the tensors."""
        self._made.clear()
        self._streamed = None


class LayerSteps:
    """Of one model. ropes: one for each layer. is_resident: see Prepared."""

    def __init__(self, config: ModelConfig, ropes: list[Rope], is_resident: Callable[[int], bool]):
        self._config, self._ropes = config, ropes
        sizes = map(config.inner_size, range(config.num_layers)) if config.gate_cutoffs else ()
        self._ones = torch.ones(1, max(sizes, default=0))
        self._steps: Prepared[LayerStep | None] = Prepared(self._make, is_resident)

    def of(self, layer: int, w: LayerTensors) -> LayerStep | None:
        """The step of a layer with tensors w, or None where none serves."""
        return self._steps.of(layer, w)

    def clear(self) -> None:
        """See Prepared."""
        self._steps.clear()

    def has_mlp(self, layer: int) -> bool:
        """Whether a layer's step includes its MLP: experts are chosen elsewhere."""
        return self._config.experts_of(layer) is None and self._has_dense(layer)

    def _has_dense(self, layer: int) -> bool:
        """Whether it has the tensors of an MLP, alone or with experts beside it."""
        c, experts = self._config, self._config.experts_of(layer)
        is_other = c.parallel_mlp or (experts is not None and experts.beside is None)
        return c.has_mlp(layer) and not is_other and c.activation in ACTIVATIONS

    def has_end(self, layer: int) -> bool:
        """Whether it includes all that follows what was attended or the state gave."""
        return self.has_mlp(layer) or not self._config.has_mlp(layer)

    def has_projections(self, layer: int) -> bool:
        """Whether it includes queries, keys and values, and the output's gate."""
        c = self._config
        is_other = c.latent or c.qk_norm not in QK_NORMS or c.gate_activation != "sigmoid"
        return c.attends(layer) and not is_other

    def is_whole(self, layer: int) -> bool:
        """Whether it is all that a layer does but for its attention, its state and its experts."""
        config = self._config
        if config.altup is not None and config.layer_scalars:
            return False
        has_start = self.has_projections(layer) or not config.attends(layer)
        is_routed = config.experts_of(layer) is not None and not config.parallel_mlp
        return has_start and (self.has_end(layer) or is_routed)

    def _shape(self, layer: int, w: LayerTensors) -> StepShape:
        config, shape = self._config, self._config.shape_of(layer)
        projects, times = self.has_projections(layer), config.residual_multiplier
        is_normed = projects and (config.qk_norm != "turned" or config.norms_turned(layer))
        outputs = [times for _, times in config.output_projections(layer)]
        gate = "beside" if config.output_gate else config.gate_projection
        return StepShape(
            config.hidden_size,
            shape.head_dim,
            config.heads_of(layer),
            shape.kv_heads,
            config.activation
            if config.activation in ACTIVATIONS
            else "silu",  # which nobody asks for
            config.qk_norm if is_normed else "",
            config.norm_eps,
            config.norm_offset,
            outputs[0] if outputs else times,
            gate if projects else "",
            outputs[1] if len(outputs) > 1 else times,
            config.gate_multiplier,
            times if config.mlp_multiplier is None else config.mlp_multiplier,
            w["layer_scalar"].item() if config.layer_scalars else 1.0,
            config.gate_cutoff(layer) or 0.0,
        )

    def _projections(self, layer: int) -> tuple[str, ...]:
        """Of queries, keys and values, those that a layer has a tensor for."""
        if self._config.shares_kv(layer):
            return _QKV[:1]
        return _QKV[:2] if self._config.shape_of(layer).keys_are_values else _QKV

    def _norm_names(self, layer: int) -> dict[str, str]:
        """The names of what a layer may have norms by, by the names of NORMS."""
        config, experts = self._config, self._config.experts_of(layer)
        names = dict(vars(config.norms), after_inputs="post_per_layer_input_norm")
        names["after_laurel"] = "laurel.post_laurel_norm"
        if config.qk_norm and self.has_projections(layer):
            names |= {name: f"self_attn.{name}_norm" for name in ("q", "k")}
        if experts is not None and experts.beside is not None:
            beside = experts.beside
            names |= {"before_experts": beside.before, "after_experts": beside.after}
            names["after_dense"] = beside.after_mlp
        return names

    def _make(self, layer: int, w: LayerTensors) -> LayerStep | None:
        native, outputs = native_for(*w.values()), self._config.output_projections(layer)
        has_others = self._config.layer_norm or self._config.after_norm_eps is not None
        if native is None or has_others:
            return None
        config, norms = self._config, {}
        names = {role: name for role, (name, _) in zip(_OUTPUTS, outputs, strict=False)}
        if self.has_projections(layer):
            names |= {name: f"self_attn.{name}_proj" for name in self._projections(layer)}
            if config.gate_projection:
                names["attention_gate"] = "self_attn.gate_proj"
        if config.per_layer_inputs is not None:
            names |= _INPUTS
        if config.laurel_rank:
            names |= _LAUREL
        if self._has_dense(layer):
            names |= {name: f"mlp.{name}_proj" for name in _MLP[not config.gated_mlp :]}
        products = {n: (w[f"{path}.weight"], w.get(f"{path}.bias")) for n, path in names.items()}
        if self._has_dense(layer) and config.gate_cutoff(layer) is not None:
            products["mean"] = self._ones[:, : config.inner_size(layer)], None
        for role, name in self._norm_names(layer).items():
            if f"{name}.weight" in w:
                norms[role] = w[f"{name}.weight"]
        if config.value_norm and self.has_projections(layer):  # without weights
            norms["v"] = torch.full((config.shape_of(layer).head_dim,), 1.0 - config.norm_offset)
        rope = self._ropes[layer]
        turns = rope.config is not None
        return LayerStep(
            native,
            self._shape(layer, w),
            norms,
            products,
            rope.width if turns else 0,
            turns and rope.config.interleaved,
        )

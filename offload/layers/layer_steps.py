"""What is prepared once for a layer's tensors, such as the compiled decode step where it serves.

What the step cannot do (another device, the reference kernels) is the decoder's to do operation by
operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from ...kernels.gate import ACTIVATIONS
from ...kernels.norm import Norm
from ...kernels.routed_step import Product
from ...kernels.step import LayerStep, StepShape, native_for
from ..models.model_config import ModelConfig
from ..weights.weights import LayerTensors
from .rope import Rope

_QKV = ("q", "k", "v")
_LAUREL = {"laurel_left": "laurel.linear_left", "laurel_right": "laurel.linear_right"}
_INPUTS = {"input_gate": "per_layer_input_gate", "input_output": "per_layer_projection"}
_MLP = ("gate", "up", "down")
_OUTPUTS = ("o", "beside")
_LATENT_NORMS = {"few_queries": "q_a_layernorm", "latent": "kv_a_layernorm"}


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
        is_other = experts is not None and experts.beside is None
        return c.has_mlp(layer) and not is_other and c.activation in ACTIVATIONS

    def has_end(self, layer: int) -> bool:
        """Whether it includes all that follows what was attended or the state gave."""
        return self.has_mlp(layer) or not self._config.has_mlp(layer)

    def has_projections(self, layer: int) -> bool:
        """Whether it includes queries, keys and values, and the output's gate."""
        return self._config.attends(layer)

    def is_whole(self, layer: int) -> bool:
        """Whether it is all that a layer does but for its attention, its state and its experts."""
        config = self._config
        if config.altup is not None and config.layer_scalars:
            return False
        has_start = self.has_projections(layer) or not config.attends(layer)
        is_routed = config.experts_of(layer) is not None
        return has_start and (self.has_end(layer) or is_routed)

    def _shape(self, layer: int, w: LayerTensors) -> StepShape:
        config, shape = self._config, self._config.shape_of(layer)
        projects, times = self.has_projections(layer), config.residual_multiplier
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
            self._qk_norm(layer),
            outputs[0] if outputs else times,
            gate if projects else "",
            outputs[1] if len(outputs) > 1 else times,
            config.gate_multiplier,
            times if config.mlp_multiplier is None else config.mlp_multiplier,
            w.vector("layer_scalar").item() if config.layer_scalars else 1.0,
            config.gate_cutoff(layer) or 0.0,
            config.parallel_mlp,
            config.latent.rank if projects and config.latent is not None else 0,
            config.qkv_clip if projects else 0.0,
            config.gate_activation,
        )

    def _qk_norm(self, layer: int) -> str:
        """Of StepShape."""
        how, is_turned = self._config.qk_norm, self._config.norms_turned(layer)
        return how if self.has_projections(layer) and (how != "turned" or is_turned) else ""

    def _attention_paths(self, layer: int) -> dict[str, str]:
        """What a layer's input is multiplied with, and what stands around latents, by the names of
        kernels.step.PRODUCTS: those that it has a tensor for."""
        config = self._config
        if config.latent is not None:
            names = {"q": "q_proj", "k": "kv_a_proj_with_mqa"}
            names |= {"head_keys": "k_b_proj", "head_values": "v_b_proj"}
            if config.latent.query_rank is not None:
                names |= {"few_queries": "q_a_proj", "q": "q_b_proj"}
        else:
            count = 1 if config.shares_kv(layer) else 3
            count -= count == 3 and config.shape_of(layer).keys_are_values
            names = {name: f"{name}_proj" for name in _QKV[:count]}
        if config.gate_projection:
            names["attention_gate"] = "gate_proj"
        return {role: f"self_attn.{name}" for role, name in names.items()}

    def _make(self, layer: int, w: LayerTensors) -> LayerStep | None:
        native, config = native_for(*w.values()), self._config
        if native is None:
            return None
        outputs = config.output_projections(layer)
        paths = {role: name for role, (name, _) in zip(_OUTPUTS, outputs, strict=False)}
        if self.has_projections(layer):
            paths |= self._attention_paths(layer)
        if config.per_layer_inputs is not None:
            paths |= _INPUTS
        if config.laurel_rank:
            paths |= _LAUREL
        if self._has_dense(layer):
            paths |= {name: f"mlp.{name}_proj" for name in _MLP[not config.gated_mlp :]}
        products: dict[str, Product] = {
            n: (w[f"{path}.weight"], w.vector_or_none(f"{path}.bias")) for n, path in paths.items()
        }
        if self._has_dense(layer) and config.gate_cutoff(layer) is not None:
            products["mean"] = self._ones[:, : config.inner_size(layer)], None
        rope = self._ropes[layer]
        return LayerStep(
            native,
            self._shape(layer, w),
            self._norms(layer, w),
            products,
            rope.width,
            rope.config is not None and rope.config.interleaved,
        )

    def _norm_paths(self, layer: int) -> dict[str, str | None]:
        """The names of what a layer may have norms of the usual kind by, by those of
        kernels.step.NORMS."""
        config, experts = self._config, self._config.experts_of(layer)
        paths = dict(vars(config.norms_of(layer)), after_inputs="post_per_layer_input_norm")
        paths["after_laurel"] = "laurel.post_laurel_norm"
        if self._qk_norm(layer) not in ("", "each"):
            paths |= {role: f"self_attn.{role}_norm" for role in "qk"}
        if experts is not None and experts.beside is not None:
            beside = experts.beside
            paths |= {"before_experts": beside.before, "after_experts": beside.after}
            paths["after_dense"] = beside.after_mlp
        return paths

    def _norms(self, layer: int, w: LayerTensors) -> dict[str, Norm]:
        """A layer's norms by the names of kernels.step.NORMS."""
        config, norms = self._config, {}
        for role, path in self._norm_paths(layer).items():
            if f"{path}.weight" in w:
                is_after = role in ("after_attention", "after_mlp")
                eps = config.after_norm_eps if is_after else None
                eps = config.norm_eps if eps is None else eps
                how = config.norm_offset, eps, w.vector_or_none(f"{path}.bias"), config.layer_norm
                norms[role] = Norm(w.vector(f"{path}.weight"), *how)
        if not self.has_projections(layer):
            return norms
        if config.value_norm:  # without weights
            ones = torch.ones(config.shape_of(layer).head_dim)
            norms["v"] = Norm(ones, 0.0, config.norm_eps)
        for role in "qk" if config.qk_norm == "each" else ():
            weight = w.vector(f"self_attn.{role}_norm.weight").float()
            norms[role] = Norm(weight, 0.0, config.norm_eps, takes_mean=True)
        if config.latent is not None:
            for role, name in _LATENT_NORMS.items():
                if f"self_attn.{name}.weight" in w:
                    weight = w.vector(f"self_attn.{name}.weight")
                    norms[role] = Norm(weight, 0.0, config.latent.norm_eps)
        return norms

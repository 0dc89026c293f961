"""Which tensor of a GGUF file is which of Ebbtide's, and where the bytes of each lie.

Ebbtide's names follow Hugging Face's; a GGUF file has the experts of a layer in one tensor. Knows
no numbers: how they lie is a packing's business.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from ...kernels.recurrence import RecurrentShape
from ..errors import BadCheckpoint, UnsupportedModel
from ..models.checkpoint import Checkpoint, TensorRef, joined, share
from ..models.layer_config import Experts, HeadRows, Recurrence
from ..models.model_config import ModelConfig
from ..weights.head_rows import rows_of_heads
from ..weights.packing import Constant, Packing
from ..weights.skeleton import layer_of, layer_prefix
from .config import IN_PAIRS
from .file import GgufHeader
from .packings import Half, LogOf, Swapped, SwappedNumbers, packing_of

_WHOLE = {
    "model.embed_tokens.weight": ("token_embd.weight",),
    "model.norm.weight": ("output_norm.weight", "token_embd_norm.weight"),
    "model.norm.bias": ("output_norm.bias",),
    "lm_head.weight": ("output.weight",),
    "lm_head.bias": ("output.bias",),
    "model.embed_tokens_per_layer.weight": ("per_layer_token_embd.weight",),
    "model.per_layer_model_projection.weight": ("per_layer_model_proj.weight",),
    "model.per_layer_projection_norm.weight": ("per_layer_proj_norm.weight",),
}
# Matrices of one kind that lie in one tensor.
_STACKED = {
    "model.altup_projections.": "altup_proj.weight",
    "model.altup_unembed_projections.": "altup_unembd_proj.weight",
}
_MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.k_b_proj": "attn_k_b",
    "self_attn.v_b_proj": "attn_v_b",
    "self_attn.gate_proj": "attn_gate",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
    "altup.router_norm": "altup_router_norm",
    "altup.modality_router": "altup_router",
    "altup.prediction_coefs": "altup_predict_coef",
    "altup.correction_coefs": "altup_correct_coef",
    "laurel.linear_left": "laurel_l",
    "laurel.linear_right": "laurel_r",
    "laurel.post_laurel_norm": "laurel_post_norm",
}
_PAIRED = ("self_attn.q_proj", "self_attn.k_proj")
# Of what a layer has in place of attention.
_RECURRENT = {
    "in_proj": "ssm_in",
    "in_proj_qkv": "attn_qkv",
    "in_proj_q": "attn_q",
    "in_proj_k": "attn_k",
    "in_proj_v": "attn_v",
    "in_proj_qkvz": "ssm_in",
    "in_proj_ba": "ssm_ba",
    "in_proj_z": "attn_gate",
    "in_proj_b": "ssm_beta",
    "in_proj_a": "ssm_alpha",
    "out_proj": "ssm_out",
    "conv1d": "ssm_conv1d",
    "norm": "ssm_norm",
    "x_proj": "ssm_x",
    "dt_proj": "ssm_dt",
    "dt_layernorm": "ssm_dt_norm",
    "b_layernorm": "ssm_b_norm",
    "c_layernorm": "ssm_c_norm",
}
# The same, of Ling 3.0 and of Kimi Linear.
_LING = {
    **_RECURRENT,
    "in_proj_z": "ssm_g_a",
    "in_proj_a": "ssm_f_a",
    "out_proj": "attn_output",
}
_KIMI = {
    **_LING,
    "in_proj_z": "ssm_g_b",
    "in_proj_z_few": "ssm_g_a",
    "in_proj_a": "ssm_f_b",
    "in_proj_a_few": "ssm_f_a",
}
_RECURRENT_VECTORS = {"A_log": "ssm_a", "dt_bias": "ssm_dt.bias", "D": "ssm_d"}
_GAINS_AND_DECAYS = ("in_proj_b.weight", "in_proj_a.weight")
_SHORT_CONV = {
    "conv": "shortconv.conv",
    "in_proj": "shortconv.in_proj",
    "out_proj": "shortconv.out_proj",
}
# Whose value heads that share a key lie apart.
_VALUES_APART = ("qwen35", "qwen35moe")
# Of tensors that the model does not need, those that change none of its numbers: frequencies of
# RoPE that old converters wrote down.
_HARMLESS = ("attn_rot_embd.weight", "rope_freqs.weight")
# Of layers that attend another's keys and values: files may hold what would make their own.
_SHARED = ("attn_k.", "attn_k_norm.", "attn_v.")
_OF_LAYER = re.compile(r"blk\.(\d{1,9})\.(.+)", re.DOTALL)
_OF_WHOLE = ("token_embd", "output", "position_embd", "altup_")

Sources = tuple[tuple[str, ...], int | None]  # names in the file; of which expert a share is meant


def open_gguf(
    header: GgufHeader, config: ModelConfig, shapes: dict[str, tuple[int, ...]]
) -> Checkpoint:
    """The tensors of a file, by Ebbtide's names. shapes: of those that are needed. Raises
    BadCheckpoint, UnsupportedModel."""
    names = _Names(header, config)
    found = {}
    for name, shape in shapes.items():
        ref = names.ref(name, shape)
        if ref is not None:
            found[name] = ref
    checkpoint = Checkpoint(found, shapes, header.known, header.path, "the file's metadata")
    names.check_all_used()
    return checkpoint


class _Names:
    def __init__(self, header: GgufHeader, config: ModelConfig):
        self._header, self._config = header, config
        architecture = header.metadata.get("general.architecture")
        self._in_pairs = architecture in IN_PAIRS
        self._values_apart = architecture in _VALUES_APART
        self._of_layer: dict[int, dict[str, Sources]] = {}
        self._used: set[str] = set()

    def check_all_used(self) -> None:
        """UnsupportedModel where a tensor is left over that belongs to the model: its numbers would
        be others without it. Vision, and layers that draft, are not the model's."""
        for name, tensor in self._header.tensors.items():
            if name not in self._used and self._is_part(name):
                what = "a scale of its own" if name.endswith("scale") else "a tensor"
                raise UnsupportedModel(
                    f"{tensor.path} has {what}, {name!r}, that Ebbtide does not know in a model "
                    "of this architecture, and without which its numbers would be wrong. Use "
                    "another quantisation of the model (Q8_0, Q6_K, Q4_K_M), or the original."
                )

    def _is_part(self, name: str) -> bool:
        """Whether a tensor seems to be one of the language model's."""
        found = _OF_LAYER.fullmatch(name)
        if found is None:
            return name.startswith(_OF_WHOLE)
        layer = int(found[1])
        if layer >= self._config.num_layers or found[2] in _HARMLESS:
            return False
        return not (self._config.shares_kv(layer) and found[2].startswith(_SHARED))

    def ref(self, name: str, shape: tuple[int, ...]) -> TensorRef | None:
        """Where a tensor of ours lies; None: nowhere."""
        if any(part in name for part in self._config.unit_norms):
            return TensorRef(self._header.path, 0, 0, Constant(1.0), shape)
        layer = layer_of(name)
        if layer is None:
            stacked = next((start for start in _STACKED if name.startswith(start)), None)
            if stacked is not None:
                return self._of_stack(name, shape, stacked)
            return self._placed(name, _WHOLE.get(name, ()))
        inner = name[len(layer_prefix(layer)) :]
        module, _, kind = inner.rpartition(".")
        recurrence = self._config.recurrence_of(layer)
        if recurrence is not None and inner.startswith(f"{recurrence.module}."):
            return self._recurrent_ref(name, shape, layer, recurrence)
        if module == "mlp.act_fn":
            return self._said(name, f"xielu.{kind}", layer, shape)
        if inner == "self_attn.sinks":
            return self._placed(name, (f"blk.{layer}.attn_sinks.weight",))
        experts = self._config.experts_of(layer)
        vectors = {
            "layer_scalar": "layer_output_scale.weight",
            "altup.correct_output_scale": "altup_correct_scale.weight",
        }
        if experts is not None:
            vectors |= {
                experts.bias: "exp_probs_b.bias",
                experts.router_scale: "ffn_gate_inp.scale",
                experts.expert_scale: "ffn_down_exps.scale",
            }
        if inner in vectors:
            return self._placed(name, (f"blk.{layer}.{vectors[inner]}",))
        theirs, expert = self._modules(layer).get(module, ((), None))
        sources = [f"blk.{layer}.{their}.{kind}" for their in theirs]
        if kind == "weight":  # Falcon-H1's second norm is written without it
            sources += [f"blk.{layer}.{their}" for their in theirs]
        ref = self._placed(name, sources)
        split = next((s for s in self._config.head_rows if inner == s.name), None)
        if split is not None:
            return self._of_heads(name, shape, layer, ref, split)
        if expert is not None:
            return self._expert(name, layer, ref, theirs[0], expert, kind)
        if ref is not None and self._in_pairs and module in _PAIRED and ref.shape == shape:
            dim = self._config.head_dim
            swapped = Swapped(ref.packing, shape[0] // dim, dim // 2, 2)
            return replace(ref, packing=swapped)
        return ref

    def _of_stack(self, name: str, shape: tuple[int, ...], start: str) -> TensorRef | None:
        """One of the matrices of a tensor, which its name ends with the number of."""
        ref = self._placed(name, (_STACKED[start],))
        number = int(name.removeprefix(start).removesuffix(".weight"))
        if ref is None or ref.shape[1:] != shape or number >= ref.shape[0]:
            return ref
        return share(ref, number, ref.shape[0], shape)

    def _said(self, name: str, key: str, layer: int, shape: tuple[int, ...]) -> TensorRef | None:
        """A number that stands in the metadata, once for each layer."""
        values = self._header.metadata.get(key)
        if values is None:
            return None
        values = np.broadcast_to(np.atleast_1d(values), (self._config.num_layers,))
        return TensorRef(self._header.path, 0, 0, Constant(float(values[layer])), shape)

    def _of_heads(
        self, name: str, shape: tuple[int, ...], layer: int, ref: TensorRef | None, split: HeadRows
    ) -> TensorRef | None:
        """A matrix of all heads: one for each head in the file, or, in older ones, rows of
        another."""
        if ref is None:
            source = f"blk.{layer}.attn_kv_b.weight"
            whole = self._placed(name, (source,))
            return whole and rows_of_heads(source, whole, split)
        heads = split.heads
        if ref.shape == (heads, shape[0] // heads, shape[1]):
            return replace(ref, shape=shape)
        return ref

    def _expert(
        self, name: str, layer: int, ref: TensorRef | None, their: str, number: int, kind: str
    ) -> TensorRef | None:
        """One expert's share of a tensor of all; of one that holds gates and ups, where that is
        what there is."""
        experts = self._config.experts_of(layer)
        assert experts is not None
        count = experts.count
        shares, index, together = count, number, False
        if ref is None and their in ("ffn_gate_exps", "ffn_up_exps"):
            ref = self._placed(name, (f"blk.{layer}.ffn_gate_up_exps.{kind}",))
            shares, index, together = 2 * count, 2 * number + (their == "ffn_up_exps"), True
        if ref is None or len(ref.shape) < 2:
            return None
        own = ref.shape[1:]
        if together:
            own = (own[0] // 2, *own[1:])
        if ref.shape[0] != count or math.prod(own) * shares != math.prod(ref.shape):
            raise BadCheckpoint(
                f"{ref.path}: {name} is a share of {list(ref.shape)}, not of {count} experts."
            )
        return share(ref, index, shares, own)

    def _recurrent_ref(
        self, name: str, shape: tuple[int, ...], layer: int, r: Recurrence
    ) -> TensorRef | None:
        """Of a layer that keeps a state."""
        inner = name[len(layer_prefix(layer)) + len(r.module) + 1 :]
        module, _, kind = inner.rpartition(".")
        if inner in _RECURRENT_VECTORS:
            theirs = _RECURRENT_VECTORS[inner]
        else:
            theirs = f"{_state_names(r).get(module, module)}.{kind}"
        ref = self._placed(name, (f"blk.{layer}.{theirs}",))
        if ref is None and inner == "conv1d.weight":
            parts = [
                self._placed(name, (f"blk.{layer}.ssm_conv1d_{part}.weight",)) for part in "qkv"
            ]
            return None if None in parts else joined([ref for ref in parts if ref], shape)
        if ref is None and inner in _GAINS_AND_DECAYS:
            return self._half(name, shape, layer, r, _GAINS_AND_DECAYS.index(inner))
        if ref is None:
            return None
        if len(shape) != 2 and math.prod(ref.shape) == math.prod(shape):
            ref = replace(ref, shape=shape)
        packing = ref.packing
        block = getattr(packing, "block", 1)
        if block > 1 and len(shape) != 2 and (shape[-1] % block or self._values_apart):
            raise BadCheckpoint(
                f"{ref.path}: {name} of shape {list(shape)} is in blocks of {block} numbers, which "
                "do not fit it. The file is damaged; download it again."
            )
        if inner == "A_log":
            packing = LogOf(packing)
        if self._values_apart and ref.shape == shape and isinstance(r.shape, RecurrentShape):
            packing = _values_together(inner, packing, shape, r.shape)
        return replace(ref, packing=packing)

    def _half(
        self, name: str, shape: tuple[int, ...], layer: int, r: Recurrence, which: int
    ) -> TensorRef | None:
        """What makes gains or decays, of heads that share a key in turn."""
        ref = self._placed(name, (f"blk.{layer}.ssm_ba.weight",))
        if (
            ref is None
            or not isinstance(r.shape, RecurrentShape)
            or ref.shape != (2 * shape[0], shape[1])
        ):
            return None
        packing = Half(ref.packing, r.shape.heads // r.shape.key_heads, which)
        return replace(ref, packing=packing, shape=shape)

    def _modules(self, layer: int) -> dict[str, Sources]:
        """The modules of a layer."""
        if layer not in self._of_layer:
            norms = self._config.norms_of(layer)
            made: dict[str, Sources] = {o: ((t,), None) for o, t in _MODULES.items()}
            # What comes before the MLP has two names, of which the second is another's too.
            second = () if norms.after_attention else ("post_attention_norm",)
            for ours, theirs in (
                (norms.before_attention, ("attn_norm",)),
                (norms.after_attention, ("post_attention_norm",)),
                (norms.before_mlp, ("ffn_norm", *second)),
                (norms.after_mlp, ("post_ffw_norm",)),
            ):
                if ours is not None:  # one name may be that of two places
                    made[ours] = (*made.get(ours, ((), None))[0], *theirs), None
            experts = self._config.experts_of(layer)
            if experts is not None:
                made |= _expert_modules(experts)
            if experts is not None and experts.beside is not None:
                beside = experts.beside
                made[beside.before] = ("pre_ffw_norm_2",), None
                made[beside.after] = ("post_ffw_norm_2",), None
                made[beside.after_mlp] = ("post_ffw_norm_1",), None
            self._of_layer[layer] = made
        return self._of_layer[layer]

    def _placed(self, name: str, sources: Iterable[str]) -> TensorRef | None:
        """The first of these tensors that is there."""
        source = next((s for s in sources if s in self._header.tensors), None)
        if source is None:
            return None
        tensor = self._header.tensors[source]
        self._used.add(source)
        if tensor.kind == "NVFP4":
            raise UnsupportedModel(
                f"{tensor.path}: {name} is in NVFP4, whose scales lie apart, and which Ebbtide "
                "cannot read. Use another quantisation of the model: Q8_0, Q6_K, Q4_K_M and Q4_0 "
                "are read."
            )
        packing = packing_of(tensor.kind, tensor.block, tensor.block_bytes, tensor.path, name)
        return TensorRef(tensor.path, tensor.offset, tensor.num_bytes, packing, tensor.shape)


def _state_names(r: Recurrence) -> dict[str, str]:
    """Of a layer that keeps a state: modules."""
    if r.shape is None:
        return _SHORT_CONV
    if isinstance(r.shape, RecurrentShape) and r.shape.by_channel:
        return _KIMI if r.few else _LING
    return _RECURRENT


def _values_together(
    inner: str, packing: Packing, shape: tuple[int, ...], s: RecurrentShape
) -> Packing:
    """The packing of a tensor whose value heads lie by their number among those that share a key,
    and not by the key."""
    a, b = s.heads // s.key_heads, s.key_heads
    if a == 1 or inner == "norm.weight":
        return packing
    if inner == "out_proj.weight":
        block = getattr(packing, "block", 1)
        if s.value_dim % block:
            return SwappedNumbers(packing, a, b)
        return Swapped(packing, shape[0], a, b)
    first = 2 * s.key_heads * s.key_dim if inner.startswith(("in_proj_qkv.", "conv1d.")) else 0
    return Swapped(packing, 1, a, b, first)


def _expert_modules(e: Experts) -> dict[str, Sources]:
    made: dict[str, Sources] = {e.router: (("ffn_gate_inp",), None)}
    for ours, theirs in ((e.gate, "ffn_gate"), (e.up, "ffn_up"), (e.down, "ffn_down")):
        if ours is None:
            continue
        for number in range(e.count):
            made[ours.format(number)] = (f"{theirs}_exps",), number
        made[f"{e.shared}.{theirs.removeprefix('ffn_')}_proj"] = (f"{theirs}_shexp",), None
    if e.latent is not None:
        made[e.latent.into] = ("ffn_latent_down",), None
        made[e.latent.out] = ("ffn_latent_up",), None
    if e.shared_gate is not None:
        made[e.shared_gate] = ("ffn_gate_inp_shexp",), None
    return made

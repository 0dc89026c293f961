"""Which tensor of a GGUF file is which of Ebbtide's, and where the bytes of each lie.

Ebbtide's names follow Hugging Face's; a GGUF file has the experts of a layer in one tensor. Knows
no numbers: how they lie is a packing's business.
"""

from __future__ import annotations

from dataclasses import replace

from .checkpoint import Checkpoint, TensorRef, share
from .errors import BadCheckpoint
from .gguf_config import IN_PAIRS
from .gguf_file import GgufHeader, GgufTensor
from .gguf_packings import FromPairs, packing_of
from .model_config import Experts, ModelConfig
from .skeleton import layer_of, layer_prefix

_WHOLE = {
    "model.embed_tokens.weight": ("token_embd.weight",),
    "model.norm.weight": ("output_norm.weight", "token_embd_norm.weight"),
    "lm_head.weight": ("output.weight",),
}
_MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_PAIRED = ("self_attn.q_proj", "self_attn.k_proj")


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
    return Checkpoint(found, shapes, header.path)


class _Names:
    def __init__(self, header: GgufHeader, config: ModelConfig):
        self._header, self._config = header, config
        self._in_pairs = header.metadata.get("general.architecture") in IN_PAIRS
        self._of_layer: dict[int, dict[str, tuple[str, int | None]]] = {}

    def ref(self, name: str, shape: tuple[int, ...]) -> TensorRef | None:
        """Where a tensor of ours lies; None: nowhere."""
        layer = layer_of(name)
        if layer is None:
            sources, module, expert = _WHOLE.get(name, ()), "", None
        else:
            inner = name[len(layer_prefix(layer)) :]
            module, _, kind = inner.rpartition(".")
            sources, expert = self._sources(layer, module, kind)
            sources = tuple(f"blk.{layer}.{source}" for source in sources)
        tensor = next((t for s in sources if (t := self._header.tensors.get(s))), None)
        if tensor is None:
            return None
        ref = self._placed(name, tensor)
        if expert is not None:
            count = self._config.experts_of(layer).count
            if tensor.shape[:1] != (count,):
                raise BadCheckpoint(
                    f"{tensor.path}: {name} is one of {tensor.shape[:1]} experts, not of {count}."
                )
            ref = share(ref, expert, count, tensor.shape[1:])
        if self._in_pairs and module in _PAIRED and ref.shape == shape:
            ref = replace(ref, packing=FromPairs(ref.packing, self._config.head_dim))
        return ref

    def _sources(self, layer: int, module: str, kind: str) -> tuple[tuple[str, ...], int | None]:
        """Names within the layer that a tensor may have in the file; and the number of the expert
        that is a share of it."""
        if module == "self_attn" and kind == "sinks":
            return ("attn_sinks.weight",), None
        if module in _MODULES:
            return (f"{_MODULES[module]}.{kind}",), None
        if module not in self._modules(layer):
            return (), None
        *theirs, expert = self._modules(layer)[module]
        return tuple(f"{name}.{kind}" for name in theirs), expert

    def _modules(self, layer: int) -> dict[str, tuple]:
        """Further modules of a layer, by what its norms and experts are called."""
        if layer not in self._of_layer:
            norms, made = self._config.norms, {}
            # What comes before the MLP has two names, of which the second is another's too.
            second = () if norms.after_attention else ("post_attention_norm",)
            for ours, theirs in (
                (norms.before_attention, ("attn_norm",)),
                (norms.after_attention, ("post_attention_norm",)),
                (norms.before_mlp, ("ffn_norm", *second)),
                (norms.after_mlp, ("post_ffw_norm",)),
            ):
                if ours is not None:
                    made[ours] = (*theirs, None)
            experts = self._config.experts_of(layer)
            if experts is not None:
                made |= _expert_modules(experts)
            self._of_layer[layer] = made
        return self._of_layer[layer]

    def _placed(self, name: str, tensor: GgufTensor) -> TensorRef:
        packing = packing_of(tensor.kind, tensor.block, tensor.block_bytes, tensor.path, name)
        return TensorRef(tensor.path, tensor.offset, tensor.num_bytes, packing, tensor.shape)


def _expert_modules(e: Experts) -> dict[str, tuple]:
    made = {e.router: ("ffn_gate_inp", None)}
    for ours, theirs in ((e.gate, "ffn_gate"), (e.up, "ffn_up"), (e.down, "ffn_down")):
        for number in range(e.count):
            made[ours.format(number)] = (f"{theirs}_exps", number)
        made[f"{e.shared}.{theirs.removeprefix('ffn_')}_proj"] = (f"{theirs}_shexp", None)
    if e.shared_gate is not None:
        made[e.shared_gate] = ("ffn_gate_inp_shexp", None)
    return made

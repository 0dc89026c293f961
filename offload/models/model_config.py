"""What a model is made of, read from its config.json.

Understands the layout that hubs carry (`rope_scaling`, `rope_theta`, `torch_dtype`) and the one
transformers 5 writes (`rope_parameters`, `dtype`). Which architectures there are stands in
families/architectures.py, what sets each apart beside it. Knows no weights and allocates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ...kernels.layout import HEAD_ALIGN, padded_head_dim
from ..errors import BadCheckpoint, UnsupportedModel
from .config_fields import MOST_POSITIONS, Fields, check_heads, load_json
from .layer_config import (
    PLAIN_NORMS,
    AltUp,
    AttentionShape,
    Experts,
    HeadRows,
    Joined,
    Latent,
    Norms,
    PerLayerInputs,
    QueryGrowth,
    Recurrence,
    Stacked,
)
from .quantisation import Quantisation, read_quantisation, with_modelopt
from .rope_config import RopeConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
# Of MLPs without gates, which have those above as well.
_GATELESS = {"xielu": "xielu"}


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer, as the one configurable decoder needs it. Tuples have one entry
    for each layer. num_kv_heads and head_dim are of what is attended (see `latent`), without what
    pads heads in pages (`page_dim`).
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int  # the most that a layer has
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int  # the most tokens the model was made for, RoPE scaling included
    norm_eps: float
    ropes: tuple[RopeConfig | None, ...]  # None: a layer without positions
    dtype: str  # of the checkpoint: float32, bfloat16 or float16
    tied_embeddings: bool
    activation: str = (
        "silu"  # of the MLP's gate: silu, gelu, gelu_tanh, relu, relu2; without one also xielu
    )
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    fused_qkv: bool = False  # one tensor, self_attn.qkv_proj
    fused_gate_up: bool = False  # one tensor, mlp.gate_up_proj
    norms: Norms = PLAIN_NORMS
    norms_by_layer: tuple[Norms, ...] = ()  # empty: `norms` in all
    norm_offset: float = 0.0  # added to the weights of norms
    final_norm_offset: float | None = None  # of the last one, if not the same
    after_norm_eps: float | None = None  # of norms after attention and MLP, if not norm_eps
    unit_norms: tuple[str, ...] = ()  # parts of names of norms without weights
    layer_norm: bool = False  # norms take the mean away first
    norm_bias: bool = False  # of layer norms
    # Norms of queries and keys before RoPE: RMSNorm of each "head", or of "all" at once; or of each
    # "turned" head, behind it, in layers with positions; or a layer norm of "each" head with
    # weights of its own
    qk_norm: str = ""
    qkv_clip: float = 0.0  # the bound of queries, keys and values behind these norms; 0 = none
    parallel_mlp: bool = False  # MLPs read what attention reads, and have no norm of their own
    attention_scale: float | None = None  # of scores; None: 1 / sqrt(head_dim)
    attention_softcap: float = 0.0  # the bound of attention scores; 0 = none
    query_growth: QueryGrowth | None = None
    embedding_multiplier: float = 1.0
    embedding_norm: bool = False  # RMSNorm of embeddings, without weights
    residual_multiplier: float = 1.0  # of what attention and MLP add
    mlp_multiplier: float | None = None  # of what the MLP adds, if not the same
    gate_multiplier: float = 1.0  # of the MLP's gate, before it is activated
    head_bias: bool = False  # of the output head
    logits_divisor: float = 1.0
    logits_softcap: float = 0.0
    windows: tuple[int | None, ...] = ()  # tokens a query sees, itself included; None = all
    # Windows are chunks of the text, each from a multiple of its size on: a query sees its own
    chunked: bool = False
    experts: tuple[Experts | None, ...] = ()  # None: a dense MLP; empty: dense in all layers
    output_gate: bool = False  # of attention, beside each head's query in q_proj
    # The same, by a matrix of its own, self_attn.gate_proj: of each "number" of a head, or of each
    # "head"; "" for none
    gate_projection: str = ""
    gate_activation: str = "sigmoid"  # of that matrix's outputs: or softplus
    latent: Latent | None = None  # what all layers attend to in place of keys and values
    recurrences: tuple[Recurrence | None, ...] = ()  # None: a layer keeps no state; empty: none do
    attention: tuple[bool, ...] = ()  # whether a layer attends; empty: those that keep no state do
    mlps: tuple[bool, ...] = ()  # whether a layer has an MLP, or experts; empty: all have
    gated_mlp: bool = True  # else down(activation(up(x)))
    renamed: tuple[tuple[str, str], ...] = ()  # parts of tensors' names: in the files, and here
    stacked: tuple[Stacked, ...] = ()
    head_rows: tuple[HeadRows, ...] = ()
    joined: tuple[Joined, ...] = ()
    null_scores: bool = False  # of each head, self_attn.sinks: see kernels.layer_attention
    attention_shapes: tuple[AttentionShape, ...] = ()  # empty: num_kv_heads of head_dim in all
    kv_sources: tuple[int, ...] = ()  # whose keys and values a layer attends; empty: its own
    value_norm: bool = False  # RMSNorm of each value head, without weights
    inner_sizes: tuple[int, ...] = ()  # of MLPs; empty: intermediate_size in all
    per_layer_inputs: PerLayerInputs | None = None
    altup: AltUp | None = None  # None: one residual stream
    laurel_rank: int = 0  # of a learnt residual beside attention (LAuReL, 2411.07501); 0: none
    # Of each MLP's gate: how many deviations above its mean a number counts, by what it is above
    # that (statistical top-k, 2506.06644); None: all count. Empty: in all layers
    gate_cutoffs: tuple[float | None, ...] = ()
    layer_scalars: bool = False  # what a layer makes of the residual is multiplied by a number
    quantisation: Quantisation | None = None  # in the files; None also for the family's own

    @property
    def groups(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def page_dim(self) -> int:
        """What a head takes where it is attended: see padded_head_dim."""
        return padded_head_dim(self.head_dim)

    @property
    def mixed_size(self) -> int:
        """Numbers of a token that go into attention's output projection."""
        return self.num_heads * (self.head_dim if self.latent is None else self.latent.value_dim)

    @property
    def values_from(self) -> int | None:
        """Where values are the keys' elements, the first of them; None: values are others."""
        return None if self.latent is None else self.latent.rope_dim

    def shape_of(self, layer: int) -> AttentionShape:
        """Of the keys and values that a layer attends."""
        if self.attention_shapes:
            return self.attention_shapes[layer]
        return AttentionShape(self.num_kv_heads, self.head_dim)

    def heads_of(self, layer: int) -> int:
        """Of a layer's queries."""
        return self.shape_of(layer).num_heads or self.num_heads

    def norms_of(self, layer: int) -> Norms:
        """Where a layer has norms."""
        return self.norms_by_layer[layer] if self.norms_by_layer else self.norms

    def inner_size(self, layer: int) -> int:
        """Of a layer's dense MLP."""
        return self.inner_sizes[layer] if self.inner_sizes else self.intermediate_size

    def shares_kv(self, layer: int) -> bool:
        """Whether a layer attends the keys and values of an earlier one, and has none."""
        return bool(self.kv_sources) and self.kv_sources[layer] != layer

    def norms_turned(self, layer: int) -> bool:
        """Whether a layer has norms of queries and keys behind RoPE."""
        return self.qk_norm == "turned" and self.ropes[layer] is not None

    def gate_cutoff(self, layer: int) -> float | None:
        """See gate_cutoffs; None: every number of a gate counts."""
        return self.gate_cutoffs[layer] if self.gate_cutoffs else None

    @property
    def residual_size(self) -> int:
        """Numbers of a token between layers."""
        return self.hidden_size * (1 if self.altup is None else self.altup.streams)

    def experts_of(self, layer: int) -> Experts | None:
        """The routed experts of a layer, if it has some."""
        return self.experts[layer] if self.experts else None

    def recurrence_of(self, layer: int) -> Recurrence | None:
        """The state that a layer keeps, if it keeps one."""
        return self.recurrences[layer] if self.recurrences else None

    def attends(self, layer: int) -> bool:
        """Whether a layer has attention."""
        return self.attention[layer] if self.attention else self.recurrence_of(layer) is None

    def has_mlp(self, layer: int) -> bool:
        """Whether a layer has a second half: an MLP, or experts."""
        return self.mlps[layer] if self.mlps else True

    def output_projections(self, layer: int) -> list[tuple[str, float]]:
        """What joins a layer's first half to the residual, attention's first: names, and what their
        outputs are multiplied with. None where a layer is an MLP alone."""
        found, times = [], self.residual_multiplier
        if self.attends(layer):
            found.append(("self_attn.o_proj", times))
        recurrence = self.recurrence_of(layer)
        if recurrence is not None:
            own = recurrence.output_multiplier
            found.append((f"{recurrence.module}.out_proj", times if own is None else own))
        return found

    @cached_property
    def kv_layers(self) -> tuple[int, ...]:
        """The layers that attend. Keys, values and whatever belongs to them are numbered by the
        places here."""
        return tuple(layer for layer in range(self.num_layers) if self.attends(layer))

    @cached_property
    def state_layers(self) -> tuple[int, ...]:
        """The layers that keep a state; states are numbered by the places here."""
        layers = range(self.num_layers)
        return tuple(layer for layer in layers if self.recurrence_of(layer) is not None)

    @cached_property
    def kv_places(self) -> tuple[int | None, ...]:
        """Of each layer its place among `kv_layers`; None where it does not attend."""
        return self._places(self.kv_layers)

    @cached_property
    def state_places(self) -> tuple[int | None, ...]:
        """Of each layer its place among `state_layers`; None where it keeps no state."""
        return self._places(self.state_layers)

    def _places(self, among: tuple[int, ...]) -> tuple[int | None, ...]:
        layers = range(self.num_layers)
        return tuple(among.index(layer) if layer in among else None for layer in layers)

    @cached_property
    def mixers(self) -> set[tuple[bool, Recurrence | None]]:
        """Whether a layer attends, and what state it keeps: the pairs that there are."""
        return {(self.attends(n), self.recurrence_of(n)) for n in range(self.num_layers)}

    @cached_property
    def kv_pages(self) -> tuple[int, ...]:
        """Of each layer that attends, by its place among `kv_layers`, the place of the layer whose
        pages it reads. Those that keep pages come first, so that their places count them."""
        layers = self.kv_layers
        if not self.kv_sources:
            return tuple(range(len(layers)))
        return tuple(layers.index(self.kv_sources[layer]) for layer in layers)

    @cached_property
    def num_page_layers(self) -> int:
        """How many layers keep pages."""
        return len(set(self.kv_pages))

    @cached_property
    def last_keeper(self) -> int:
        """The last layer of which later tokens need something: keys and values, or a state."""
        own = (layer for layer in self.kv_layers if not self.shares_kv(layer))
        return max((*own, *self.state_layers))

    @cached_property
    def kv_windows(self) -> tuple[int | None, ...]:
        """`windows` of the layers that attend."""
        windows = self.windows or (None,) * self.num_layers
        return tuple(windows[layer] for layer in self.kv_layers)

    @cached_property
    def page_windows(self) -> tuple[int | None, ...]:
        """Of each layer that keeps pages, the widest window of those that attend to them."""
        widest: list[int | None] = list(self.kv_windows[: self.num_page_layers])
        for window, pages in zip(self.kv_windows, self.kv_pages, strict=True):
            known = widest[pages]
            widest[pages] = None if window is None or known is None else max(window, known)
        return tuple(widest)

    @cached_property
    def recurrent(self) -> tuple[Recurrence, ...]:
        """Of the layers that have one, in their order."""
        return tuple(r for r in self.recurrences if r is not None)

    def fixed_for(self, context: int) -> ModelConfig:
        """The same with RoPE scalings that depend on the length of the text fixed for `context`
        tokens. Unchanged where there are none.
        """
        ropes = tuple(r and r.fixed_for(context, self.head_dim) for r in self.ropes)
        return self if ropes == self.ropes else replace(self, ropes=ropes)


def read_model_config(folder: Path) -> ModelConfig:
    """The model's configuration. Raises UnsupportedModel or BadCheckpoint, saying what and what to
    do.
    """
    path = folder / "config.json"
    return config_of(with_modelopt(load_json(path), path), path)


def config_of(raw: dict, path: Path) -> ModelConfig:
    """The configuration that an object as config.json holds it describes. path: for messages; no
    file is read."""
    from ..families.architectures import FAMILIES, REFUSED

    names = raw.get("architectures") or []
    architecture = names[0] if isinstance(names, list) and names else None
    if isinstance(architecture, str) and architecture in REFUSED:
        raise UnsupportedModel(
            f"{path}: {architecture} has {REFUSED[architecture]}, "
            f"which Ebbtide does not run yet. Supported: {', '.join(sorted(FAMILIES))}."
        )
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise UnsupportedModel(
            f"{path}: the architecture {architecture or raw.get('model_type')!r} is not supported. "
            f"Supported: {', '.join(sorted(FAMILIES))}."
        )
    family = FAMILIES[architecture]
    if family.text_config:
        raw = _text_part(raw, path)
    quantisation = read_quantisation(raw, path, family.quantised)
    said, defaults = _said(raw), family.defaults
    named = {ours: said[theirs] for theirs, ours in family.names.items() if theirs in said}
    said = {**named, **said}
    if said.get("rope_parameters") is not None:
        defaults = {k: v for k, v in defaults.items() if k != "rope_scaling"}
    get = Fields({**defaults, **said}, path)
    common = _common(get, architecture)
    fields = {**common, **family.fields(get, common["head_dim"])}
    check_heads(path, *(fields[name] for name in ("num_heads", "num_kv_heads", "head_dim")))
    config = ModelConfig(**fields, quantisation=quantisation)
    if config.latent is not None and config.head_dim % HEAD_ALIGN:
        raise UnsupportedModel(
            f"{path}: a latent and what turns have {config.head_dim} numbers, which is not a "
            f"multiple of {HEAD_ALIGN}."
        )
    if config.gated_mlp and config.activation in _GATELESS.values():
        raise UnsupportedModel(
            f"{path}: hidden_act {config.activation!r} is not supported beside a gate. Supported: "
            f"{', '.join(_ACTIVATIONS)}."
        )
    if config.head_bias and config.tied_embeddings:
        raise UnsupportedModel(
            f"{path}: an output head that is tied and has a bias is unsupported."
        )
    if len(set(get.numbers("intermediate_size"))) > 1 and not config.inner_sizes:
        raise UnsupportedModel(
            f"{path}: intermediate_size differs from layer to layer, which Ebbtide does not run in "
            "models of this family."
        )
    if not config.kv_layers:
        raise UnsupportedModel(f"{path}: no layer attends; Ebbtide runs models of which some do.")
    positions = _max_positions(get, config)
    # What no text is longer than bounds nothing, and is not kept in memory for it.
    windows = tuple(None if w is None or w >= positions else w for w in config.windows)
    return replace(config, max_positions=positions, windows=windows)


# Fields whose null is an answer, and not an absence.
_NULLS = (
    *("sliding_window", "final_logit_softcapping", "attn_logit_softcapping"),
    *("block_ffn_dim_multiplier", "mamba_d_ssm", "q_lora_rank", "attention_chunk_size"),
    *("scale_depth", "dim_model_base", "rope_parameters"),
)


def _text_part(raw: dict, path: Path) -> dict:
    """The text model's fields of a configuration that has other parts beside it; early files have
    them beside the others' names."""
    text = raw.get("text_config")
    if text is None and "hidden_size" in raw:
        return _said(raw)
    if not isinstance(text, dict):
        raise BadCheckpoint(f"{path} has no text_config.")
    outer = ("dtype", "torch_dtype", "tie_word_embeddings")
    outer = (*outer, "quantization_config", "compression_config")
    beside = {name: raw[name] for name in outer if raw.get(name) is not None}
    # Either may say no by a default of its class; the files know (FolderFiles.config).
    if raw.get("tie_word_embeddings") is True and text.get("tie_word_embeddings") is False:
        text = {**text, "tie_word_embeddings": True}
    return {**beside, **_said(text)}


def _said(raw: dict) -> dict:
    """The fields that say something: a null mostly stands for nothing."""
    return {k: v for k, v in raw.items() if v is not None or k in _NULLS}


def _common(get: Fields, architecture: str) -> dict:
    """What every family reads alike."""
    path, num_layers = get.path, get.num_layers
    num_heads = get.number("num_attention_heads")
    hidden = get.number("hidden_size")
    head_dim = get.number("head_dim", hidden // num_heads or None)
    return {
        "architecture": architecture,
        "num_layers": num_layers,
        "hidden_size": hidden,
        "intermediate_size": max(get.numbers("intermediate_size")),
        "num_heads": num_heads,
        "num_kv_heads": get.number("num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "vocab_size": get.number("vocab_size"),
        "max_positions": get.number("max_position_embeddings", 2048, high=MOST_POSITIONS),
        "norm_eps": get.number("rms_norm_eps", 1e-6, kind=float, low=0.0, high=1.0),
        "dtype": _read_dtype(get.raw, path),
        "tied_embeddings": get.flag("tie_word_embeddings", False),
        "activation": _read_activation(get.raw, path),
        "windows": (None,) * num_layers,
    }


def _read_activation(raw: dict, path: Path) -> str:
    name = raw.get("hidden_activation") or raw.get("hidden_act") or "silu"
    known = {**_ACTIVATIONS, **_GATELESS}
    if not isinstance(name, str) or name not in known:
        raise UnsupportedModel(
            f"{path}: hidden_act {name!r} is not supported. Supported: {', '.join(known)}."
        )
    return known[name]


def _read_dtype(raw: dict, path: Path) -> str:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    name = str(name).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise UnsupportedModel(
            f"{path}: dtype {name!r} is not supported. Supported: {', '.join(DTYPE_BYTES)}."
        )
    return name


def _max_positions(get: Fields, config: ModelConfig) -> int:
    """The configuration's word; where a scaling stretches what it keeps as the original, that."""
    positions = config.max_positions
    for rope in filter(None, config.ropes):
        p = rope.parameters
        if rope.kind == "yarn":  # hub configs keep the original length and state the factor
            stretched = p["original_max_position_embeddings"] * p["factor"]
        elif rope.kind == "dynamic":
            stretched = p["max_position_embeddings"] * p["factor"]
        else:
            continue
        positions = max(positions, int(min(stretched, MOST_POSITIONS)))
    return positions

"""The architectures with Mamba and Mamba-2 layers: what each is made of, from config.json. As
families/hybrid.py, which has those whose states are of other kinds."""

from __future__ import annotations

from dataclasses import replace

from ...kernels.recurrence import RecurrentShape
from ..errors import BadCheckpoint, UnsupportedModel
from ..models.config_fields import Fields, is_number
from ..models.layer_config import ExpertLatent, Experts, Norms, Recurrence, ScanShape
from ..models.rope_config import read_rope
from .family import Family
from .granite import GRANITE_STACKED, granite, granite_experts, granite_names
from .hybrid import (
    MOST_CONV,
    MOST_DIM,
    MOST_HEADS,
    check_convolution,
    checked_recurrence,
    which_attend,
)
from .mixture import expert_groups
from .routed import STACKED, checked_experts, num_experts


def granite_hybrid(get: Fields, head_dim: int) -> dict:
    """Mamba-2 in most layers. Every layer's MLP goes by the name of shared experts."""
    kind = get.raw.get("position_embedding_type")
    fields = granite(get, head_dim)
    layers, inner = get.num_layers, get.number("shared_intermediate_size", 1024)
    experts: tuple[Experts, ...] = ()
    mlp = "mlp"
    if get.number("num_local_experts", 8, low=0):
        routed = granite_experts(get, inner)
        experts, mlp = (routed,) * layers, routed.shared
    return {
        **fields,
        "ropes": fields["ropes"] if kind == "rope" else (None,) * layers,
        "intermediate_size": inner,
        "fused_gate_up": True,
        "experts": experts,
        "recurrences": _unless(which_attend(get, lambda layer: False), _mamba2(get)),
        "renamed": granite_names(mlp),
        "stacked": GRANITE_STACKED,
    }


def bamba(get: Fields, head_dim: int) -> dict:
    listed = get.raw.get("attn_layer_indices") or []
    if not isinstance(listed, list):
        raise BadCheckpoint(f"{get.path}: attn_layer_indices is {listed!r}; expected a list.")
    bias = get.flag("attention_bias", False)
    # Half of a head turns, whatever the file says beside rope_parameters.
    get = Fields({**get.raw, "partial_rotary_factor": None}, get.path)
    return {
        "ropes": (read_rope(get, head_dim, share=0.5),) * get.num_layers,
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": get.flag("mlp_bias", False),
        "recurrences": _unless(which_attend(get, lambda layer: layer in listed), _mamba2(get)),
        "renamed": _FEED_FORWARD,
    }


def _unless(attends: list[bool], recurrence: Recurrence) -> tuple[Recurrence | None, ...]:
    return tuple(None if here else recurrence for here in attends)


def falcon_h1(get: Fields, head_dim: int) -> dict:
    """Attention and Mamba-2 beside each other in every layer, and multipliers almost everywhere.
    That of attention's input goes into the scale of scores, twice, and into what it adds; that of
    keys into the scale."""
    times = {name: get.positive(f"{name}_multiplier", 1.0) for name in _FALCON_MULTIPLIERS}
    gate, down = _positives(get, "mlp_multipliers", 2)
    bias, into = get.flag("attention_bias", False), times["attention_in"]
    if bias and into != 1:
        raise UnsupportedModel(
            f"{get.path}: attention_bias beside an attention_in_multiplier of {into} is not "
            "supported."
        )
    if get.flag("mamba_rms_norm", False) and get.flag("mamba_norm_before_gate", True):
        raise UnsupportedModel(f"{get.path}: mamba_norm_before_gate is not supported.")
    beside = _mamba2(
        get,
        get.number("mamba_d_ssm", 1024) if get.raw.get("mamba_d_ssm", 0) is not None else None,
        output_bias=get.flag("projectors_bias", False),
        has_norm=get.flag("mamba_rms_norm", False),
        input_multiplier=times["ssm_in"],
        multipliers=_positives(get, "ssm_multipliers", 5),
        output_multiplier=times["ssm_out"],
    )
    return {
        "ropes": (read_rope(get, head_dim),) * get.num_layers,
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": get.flag("mlp_bias", False),
        "attention": (True,) * get.num_layers,
        "recurrences": (beside,) * get.num_layers,
        "attention_scale": into * into * times["key"] * head_dim**-0.5,
        "embedding_multiplier": times["embedding"],
        "residual_multiplier": into * times["attention_out"],
        "gate_multiplier": gate,
        "mlp_multiplier": down,
        "logits_divisor": 1 / times["lm_head"],
        "renamed": _FEED_FORWARD,
    }


def jamba(get: Fields, head_dim: int) -> dict:
    """Mamba, whose steps, keys and queries are normed, in seven of eight layers; in the eighth
    attention without positions; experts in every other one."""
    hidden, rank = get.number("hidden_size"), get.raw.get("mamba_dt_rank", "auto")
    channels = get.number("mamba_expand", 2, high=64) * hidden
    shape = ScanShape(
        channels,
        get.number("mamba_d_state", 16, high=MOST_DIM),
        -(-hidden // 16) if rank == "auto" else get.number("mamba_dt_rank"),
        ("dt_layernorm", "b_layernorm", "c_layernorm"),
    )
    check_convolution(get)
    bias = get.flag("mamba_proj_bias", False)
    width = get.number("mamba_d_conv", 4, low=2, high=MOST_CONV)
    conv_bias = get.flag("mamba_conv_bias", True)
    recurrence = Recurrence(
        "mamba",
        channels,
        width,
        shape,
        conv_bias=conv_bias,
        projection_bias=bias,
        output_bias=bias,
    )
    attends = _every(get, "attn_layer", 8, 4)
    count = num_experts(get, 16)
    experts = Experts(
        count,
        get.number("num_experts_per_tok", 2),
        get.number("intermediate_size"),
        normalised=False,
        router="mlp.router",
    )
    routed = [count > 1 and here for here in _every(get, "expert_layer", 2, 1)]
    if any(routed):
        checked_experts(get, experts)
    return {
        "ropes": (None,) * get.num_layers,
        "recurrences": _unless(attends, recurrence),
        "experts": tuple(experts if here else None for here in routed) if any(routed) else (),
        "stacked": STACKED,
        "renamed": _FEED_FORWARD,
    }


def _every(get: Fields, name: str, period: int, offset: int) -> list[bool]:
    """Of each layer, whether it is the one of a period that the file, or these numbers, say."""
    period = get.number(f"{name}_period", period)
    offset = get.number(f"{name}_offset", offset, low=0)
    if offset >= period:
        raise BadCheckpoint(
            f"{get.path}: {name}_offset is {offset}; expected less than {name}_period, {period}."
        )
    return [layer % period == offset for layer in range(get.num_layers)]


def _positives(get: Fields, name: str, count: int) -> tuple[float, ...]:
    given = get.raw.get(name) or [1.0] * count
    if not isinstance(given, list) or len(given) != count:
        raise BadCheckpoint(f"{get.path}: {name} is {given!r}; expected {count} numbers.")
    return tuple(Fields({name: value}, get.path).positive(name) for value in given)


def nemotron_h(get: Fields, head_dim: int) -> dict:
    """Each layer is one thing: Mamba-2, attention without positions, an MLP, or routed experts."""
    kinds = _nemotron_kinds(get)
    eps = get.number("layer_norm_epsilon", 1e-5, kind=float, low=0.0, high=1.0)
    if get.flag("attention_bias", False):
        raise UnsupportedModel(f"{get.path}: attention_bias is not supported by this family.")
    experts = _nemotron_experts(get) if "moe" in kinds else None
    heads = get.number("mamba_num_heads", 128, high=MOST_HEADS)
    key_heads = get.number("n_groups", 8, high=MOST_HEADS)
    shape = RecurrentShape(
        heads,
        key_heads,
        get.number("ssm_state_size", 128, high=MOST_DIM),
        get.number("mamba_head_dim", 64, high=MOST_DIM),
        get.number("conv_kernel", 4, low=2, high=MOST_CONV),
        is_delta=False,
        norm_heads=max(1, heads // key_heads),
        norm_eps=eps,
        step_limits=_step_limits(get),
    )
    around = get.flag("use_bias", False)
    recurrence = checked_recurrence(
        get,
        "mixer",
        shape,
        act="mamba_hidden_act",
        conv_bias=get.flag("use_conv_bias", True),
        projection_bias=around,
        output_bias=around,
    )
    activation = get.raw.get("mlp_hidden_act") or "relu2"
    if activation != "relu2":
        raise UnsupportedModel(
            f"{get.path}: mlp_hidden_act {activation!r} is not supported by this family, whose "
            "MLPs have relu2."
        )
    return {
        "ropes": (None,) * get.num_layers,
        "norm_eps": eps,
        "norms": Norms(before_attention="norm", before_mlp="norm"),
        "mlp_bias": get.flag("mlp_bias", False),
        "activation": activation,
        "gated_mlp": False,
        "attention": tuple(kind == "full_attention" for kind in kinds),
        "recurrences": tuple(recurrence if k == "linear_attention" else None for k in kinds),
        "mlps": tuple(kind in ("mlp", "moe") for kind in kinds),
        "experts": tuple(experts if kind == "moe" else None for kind in kinds),
        "renamed": _NEMOTRON_NAMES,
    }


def _nemotron_kinds(get: Fields) -> list[str]:
    """What each layer is, by the names of transformers 5."""
    letters = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
    older = {"mamba": "linear_attention", "attention": "full_attention"}
    kinds = get.raw.get("layers_block_type") or get.raw.get("layer_types")
    if kinds is None:
        given = get.raw.get("hybrid_override_pattern")
        kinds = [letters.get(x, x) for x in given] if isinstance(given, str) else given
    if not isinstance(kinds, list) or len(kinds) != get.num_layers:
        raise BadCheckpoint(
            f"{get.path}: hybrid_override_pattern or layers_block_type must name "
            f"{get.num_layers} layers, got {kinds!r}."
        )
    kinds = [older.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    for kind in kinds:
        if kind not in letters.values():
            raise UnsupportedModel(f"{get.path}: a layer of the type {kind!r} is not supported.")
    return kinds


def _nemotron_experts(get: Fields) -> Experts:
    latent = None
    if get.raw.get("moe_latent_size") is not None:
        size = get.number("moe_latent_size")
        latent = ExpertLatent(size, "mixer.fc1_latent_proj", "mixer.fc2_latent_proj")
    experts = Experts(
        get.number("n_routed_experts", get.number("num_local_experts", 8)),
        get.number("num_experts_per_tok", 2),
        get.number("moe_intermediate_size", 7688),
        get.flag("norm_topk_prob", True),
        router="mixer.gate",
        gate=None,
        up="mixer.experts.{}.up_proj",
        down="mixer.experts.{}.down_proj",
        by_sigmoid=True,
        bias="mixer.gate.e_score_correction_bias",
        scaling=get.positive("routed_scaling_factor", 1.0),
        shared_size=get.number("moe_shared_expert_intermediate_size", 7688),
        shared="mixer.shared_experts",
        shared_gate=None,
        least_sum=1e-20,
        latent=latent,
    )
    return replace(checked_experts(get, experts), groups=expert_groups(get, experts))


def _mamba2(get: Fields, inner: int | None = None, **more) -> Recurrence:
    """inner: of all heads, None: what mamba_expand says. more: fields of the Recurrence."""
    heads = get.number("mamba_n_heads", 128, high=MOST_HEADS)
    groups = get.number("mamba_n_groups", 1, high=MOST_HEADS)
    if inner is None:
        inner = get.number("mamba_expand", 2, high=64) * get.number("hidden_size")
    dim = get.raw.get("mamba_d_head", "auto")
    dim = inner // heads if dim == "auto" else get.number("mamba_d_head", high=MOST_DIM)
    if dim * heads != inner or dim > MOST_DIM:
        raise BadCheckpoint(f"{get.path}: {heads} heads of {dim} do not make {inner} numbers.")
    shape = RecurrentShape(
        heads,
        groups,
        get.number("mamba_d_state", 256, high=MOST_DIM),
        dim,
        get.number("mamba_d_conv", 4, low=2, high=MOST_CONV),
        is_delta=False,
        norm_heads=max(1, heads // groups),
        norm_eps=get.number("rms_norm_eps", 1e-6, kind=float, low=0.0, high=1.0),
        step_limits=_step_limits(get),
    )
    bias = get.flag("mamba_proj_bias", False)
    biases = {"conv_bias": get.flag("mamba_conv_bias", True), "projection_bias": bias}
    return checked_recurrence(get, "mamba", shape, **{**biases, "output_bias": bias, **more})


def _step_limits(get: Fields) -> tuple[float, float]:
    given = get.raw.get("time_step_limit") or [0.0, float("inf")]
    if isinstance(given, list) and len(given) == 2:
        # transformers 5 spells what JSON has no number for.
        low, high = (x.get("__float__") if isinstance(x, dict) else x for x in given)
        is_open = high in ("Infinity", float("inf"))
        if is_number(low) and low >= 0 and (is_open or (is_number(high) and high >= low)):
            return float(low), float("inf") if is_open else float(high)
    raise BadCheckpoint(
        f"{get.path}: time_step_limit is {given!r}; expected two numbers, ascending."
    )


_FEED_FORWARD = (
    (".feed_forward.", ".mlp."),
    (".pre_ff_layernorm.", ".post_attention_layernorm."),
    ("model.final_layernorm.", "model.norm."),
)
_NEMOTRON_NAMES = (
    ("backbone.", "model."),
    ("model.embeddings.", "model.embed_tokens."),
    ("model.norm_f.", "model.norm."),
    *((f".mixer.{name}_proj.", f".self_attn.{name}_proj.") for name in "qkvo"),
    *((f".mixer.{name}_proj.", f".mlp.{name}_proj.") for name in ("up", "down")),
)
_FALCON_MULTIPLIERS = (
    *("attention_in", "attention_out", "key", "ssm_in", "ssm_out", "embedding", "lm_head"),
)
_FALCON = {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "max_position_embeddings": 8192}
_NEMOTRON = {
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "intermediate_size": 21504,
}
_JAMBA = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 262144,
    "intermediate_size": 14336,
}
_BAMBA = {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "max_position_embeddings": 262144}

MAMBA_FAMILIES: dict[str, Family] = {
    "GraniteMoeHybridForCausalLM": Family(
        "Granite 4 H",
        "Mamba-2 in most layers, and no positions; multipliers; in some routed experts",
        granite_hybrid,
    ),
    "BambaForCausalLM": Family(
        "Bamba", "Mamba-2 in most layers; RoPE on half of each head", bamba, _BAMBA
    ),
    "FalconH1ForCausalLM": Family(
        "Falcon-H1 0.5B to 34B",
        "attention and Mamba-2 beside each other in every layer; multipliers",
        falcon_h1,
        _FALCON,
    ),
    "JambaForCausalLM": Family(
        "Jamba 1.5, 1.6, 1.7, Jamba Reasoning 3B",
        "Mamba in seven of eight layers, and no positions; in some routed experts",
        jamba,
        _JAMBA,
    ),
    "NemotronHForCausalLM": Family(
        "Nemotron-H, Nemotron Nano 2, Nemotron 3 Nano and Super",
        "layers that are Mamba-2, attention without positions, an MLP without gates, or routed "
        "experts alone",
        nemotron_h,
        _NEMOTRON,
    ),
}

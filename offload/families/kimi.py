"""The architectures with Kimi Delta Attention in most layers and latent attention in the others:
what each is made of, from config.json. As families/hybrid.py."""

from __future__ import annotations

from collections.abc import Callable

from ...kernels.recurrence import RecurrentShape
from ..errors import BadCheckpoint, UnsupportedModel
from ..models.config_fields import Fields, is_number
from ..models.layer_config import Recurrence
from .family import Family
from .hybrid import MOST_CONV, MOST_DIM, MOST_HEADS, checked_recurrence, taken_apart, which_attend
from .latent import latent_attention
from .mixture import deepseek_experts, from_first_routed_on
from .routed import STACKED

_MODULE = "kda"  # the files call it self_attn, as the attention of the other layers


def kimi_linear(get: Fields, head_dim: int) -> dict:
    """Latent attention without positions in every fourth layer."""
    said = get.raw.get("linear_attn_config") or {}
    if not isinstance(said, dict):
        raise BadCheckpoint(f"{get.path}: linear_attn_config is {said!r}; expected an object.")
    inner = {f"linear_attn_config.{name}": value for name, value in said.items()}
    of_linear = Fields({**get.raw, **inner}, get.path)

    def size(name: str, inner: str, default: int, high: int, low: int = 1) -> int:
        """Of a layer with a state, by either of two names, of which the second is said first."""
        default = get.number(name, default, low=low, high=high)
        return of_linear.number(f"linear_attn_config.{inner}", default, low=low, high=high)

    activation = get.raw.get("moe_router_activation_func", "sigmoid")
    if activation != "sigmoid":
        raise UnsupportedModel(
            f"{get.path}: moe_router_activation_func {activation!r} is not supported by this "
            "family, whose experts are chosen by sigmoids."
        )
    heads = size("linear_num_heads", "num_heads", 32, MOST_HEADS)
    dim = size("linear_head_dim", "head_dim", 128, MOST_DIM)
    width = size("linear_conv_kernel_dim", "short_conv_kernel_size", 4, MOST_CONV, low=2)
    attends = which_attend(get, _listed(get, said) or (lambda layer: layer > 0 and layer % 4 == 0))
    recurrence = _delta(get, heads, dim, width, few=dim)
    return {
        **latent_attention(get),
        **_in_most(attends, recurrence),
        "ropes": (None,) * get.num_layers,
        "experts": from_first_routed_on(get, deepseek_experts(get), 1),
        "stacked": STACKED,
    }


def _listed(get: Fields, said: dict) -> Callable[[int], bool] | None:
    """What tells, where the file lists both kinds of layers by their numbers, whether one of them,
    counted from 0, attends."""
    names = ("full_attn_layers", "kda_layers")
    if not all(name in said for name in names):
        return None
    lists = [said[name] for name in names]
    numbers = [n for listed in lists if isinstance(listed, list) for n in listed]
    known = all(isinstance(listed, list) for listed in lists)
    known = known and all(type(n) is int for n in numbers)
    if not known or sorted(numbers) != list(range(1, get.num_layers + 1)):
        raise BadCheckpoint(
            f"{get.path}: full_attn_layers and kda_layers of linear_attn_config must list each of "
            f"the {get.num_layers} layers once, counted from 1, got {lists!r}."
        )
    return lambda layer: layer + 1 in lists[0]


def bailing_hybrid(get: Fields, head_dim: int) -> dict:
    """Latent attention whose heads are gated in the last layer of each group."""
    every = get.number("layer_group_size", 6)
    width = get.number("short_conv_kernel_size", 4, low=2, high=MOST_CONV)
    bound = get.raw.get("kda_lower_bound", -5.0) if get.flag("kda_safe_gate", True) else None
    if bound is not None and not (is_number(bound) and -1e4 < bound < 0):
        raise BadCheckpoint(f"{get.path}: kda_lower_bound is {bound!r}; expected a number below 0.")
    for name in ("expert_swiglu_limit_list", "share_expert_swiglu_limit_list"):
        limits = get.raw.get(name)
        if limits and (not isinstance(limits, list) or any(limits)):
            raise UnsupportedModel(f"{get.path}: {name}, which bounds experts, is not supported.")
    get = Fields({**get.raw, "rope_interleave": True}, get.path)
    attends = which_attend(get, lambda layer: (layer + 1) % every == 0)
    heads = get.number("num_attention_heads", high=MOST_HEADS)
    # What transformers writes has the part of a head that turns for head_dim, and this besides.
    dim = get.number("linear_head_dim", head_dim, high=MOST_DIM)
    recurrence = _delta(get, heads, dim, width, least_log_decay=float(bound or 0))
    fields = _in_most(attends, recurrence)
    return {
        **latent_attention(get),
        **fields,
        "gate_projection": "head",
        "renamed": (
            ("model.word_embeddings.", "model.embed_tokens."),
            (".attention.dense.", ".self_attn.o_proj."),
            (".attention.", ".self_attn."),
            *fields["renamed"],
            (".self_attn.g_proj.", ".self_attn.gate_proj."),
            (".mlp.gate.expert_bias", ".mlp.gate.e_score_correction_bias"),
        ),
        "experts": from_first_routed_on(get, deepseek_experts(get), 2),
        "stacked": STACKED,
    }


def _delta(
    get: Fields, heads: int, dim: int, width: int, *, few: int = 0, least_log_decay: float = 0.0
) -> Recurrence:
    shape = RecurrentShape(
        heads,
        heads,
        dim,
        dim,
        width,
        is_delta=True,
        norm_heads=1,
        norm_eps=get.number("rms_norm_eps", 1e-6, kind=float, low=0.0, high=1.0),
        by_channel=True,
        least_log_decay=least_log_decay,
    )
    return checked_recurrence(get, _MODULE, shape, apart=True, few=few)


def _in_most(attends: list[bool], recurrence: Recurrence) -> dict:
    """ModelConfig fields of layers of which those that do not attend have this state."""
    numbers = [layer for layer, here in enumerate(attends) if not here]
    own = {f"model.layers.{n}.self_attn.": f"model.layers.{n}.{_MODULE}." for n in numbers}
    names = {
        **own,
        **{f".{_MODULE}.{theirs}": f".{_MODULE}.{ours}" for theirs, ours in _DECAYS.items()},
        ".block_sparse_moe.": ".mlp.",
        **{f".{theirs}.weight": f".{ours}.weight" for theirs, ours in _EXPERTS.items()},
    }
    return {
        **taken_apart(_MODULE, names),
        "recurrences": tuple(None if here else recurrence for here in attends),
    }


_DECAYS = {
    "f_a_proj": "in_proj_a_few",
    "f_b_proj": "in_proj_a",
    "f_proj": "in_proj_a",
    "g_a_proj": "in_proj_z_few",
    "g_b_proj": "in_proj_z",
}
_EXPERTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_NAMES = {
    "model_max_length": "max_position_embeddings",
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
    "num_experts_per_token": "num_experts_per_tok",
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
}
_SIZES = {
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
}

_LING = Family(
    "Ling 3.0 Flash, tiny",
    "Kimi Delta Attention with bounded decays in five of six layers, gated latent attention in "
    "the sixth; DeepSeek-V3's experts",
    bailing_hybrid,
    {
        **_SIZES,
        "head_dim": 128,
        "rope_theta": 6e6,
        "max_position_embeddings": 262144,
        "moe_intermediate_size": 768,
        "n_routed_experts": 512,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
    },
    names={**_NAMES, "num_nextn_predict_layers": "num_mtp_layers"},
)

KIMI_FAMILIES: dict[str, Family] = {
    "KimiLinearForCausalLM": Family(
        "Kimi Linear 48B-A3B (with a tokenizer.json, or as a GGUF file)",
        "Kimi Delta Attention in three of four layers, latent attention without positions in the "
        "fourth; DeepSeek-V3's experts",
        kimi_linear,
        {
            **_SIZES,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 1048576,
            "moe_intermediate_size": 1024,
            "n_routed_experts": 256,
            "routed_scaling_factor": 2.446,
        },
        names=_NAMES,
    ),
    "BailingHybridForCausalLM": _LING,
    "BailingMoeV3ForCausalLM": _LING,
}

"""Granite's architectures, dense and with routed experts, and one that is made like them: what each
is made of, from config.json. As dense.py; those with Mamba-2 stand in mamba.py."""

from __future__ import annotations

from dataclasses import replace

from ..models.config_fields import Fields
from ..models.layer_config import Experts, Norms, Stacked
from ..models.rope_config import read_rope, ropes_by_theta
from .dense import llama
from .family import Family
from .routed import checked_experts


def granite(get: Fields, head_dim: int) -> dict:
    return {
        **llama(get, head_dim),
        "attention_scale": get.positive("attention_multiplier", 1.0),
        "embedding_multiplier": get.positive("embedding_multiplier", 1.0),
        "residual_multiplier": get.positive("residual_multiplier", 1.0),
        "logits_divisor": get.positive("logits_scaling", 1.0),
    }


def hyperclovax(get: Fields, head_dim: int) -> dict:
    """Logits are multiplied by what Granite's are divided by."""
    norms = Norms(after_attention="post_norm1", after_mlp="post_norm2")
    return {
        **granite(get, head_dim),
        "attention_scale": get.positive("attention_multiplier", head_dim**-0.5),
        "logits_divisor": 1 / get.positive("logits_scaling", 1.0),
        "norms": norms if get.flag("use_post_norm", True) else Norms(),
    }


def granite_moe(get: Fields, head_dim: int) -> dict:
    shared = get.number("shared_intermediate_size", 0, low=0)
    return {
        **granite(get, head_dim),
        "mlp_bias": False,
        "fused_gate_up": True,  # of the shared expert
        "experts": (granite_experts(get, shared),) * get.num_layers,
        "renamed": granite_names("mlp.shared_expert"),
        "stacked": GRANITE_STACKED,
    }


def granite_experts(get: Fields, shared_size: int) -> Experts:
    block = "block_sparse_moe"
    experts = Experts(
        get.number("num_local_experts", 8),
        get.number("num_experts_per_tok", 2),
        get.number("intermediate_size"),
        router=f"{block}.router.layer",
        gate=f"{block}.experts.{{}}.gate_proj",
        up=f"{block}.experts.{{}}.up_proj",
        down=f"{block}.experts.{{}}.down_proj",
        shared_size=shared_size,
        shared_gate=None,
    )
    return checked_experts(get, experts)


def granite_stacked(gate_up: str, down: str) -> tuple[Stacked, ...]:
    """gate_up, down: what the files name the tensors of all experts, within the block."""
    block = "block_sparse_moe"
    own = [f"{block}.experts.{{}}.{name}_proj.weight" for name in ("gate", "up", "down")]
    return (
        Stacked(f"{block}.{gate_up}", (own[0], own[1])),
        Stacked(f"{block}.{down}", (own[2],)),
    )


GRANITE_STACKED = granite_stacked("input_linear.weight", "output_linear.weight")


def granite_names(mlp: str) -> tuple[tuple[str, str], ...]:
    """Of the MLP that goes by the name of a shared one in the files."""
    return (
        (".shared_mlp.input_linear.", f".{mlp}.gate_up_proj."),
        (".shared_mlp.output_linear.", f".{mlp}.down_proj."),
    )


def granite_swa(get: Fields, head_dim: int) -> dict:
    return {**granite(get, head_dim), **_local_layers(get, head_dim)}


def granite_moe_swa(get: Fields, head_dim: int) -> dict:
    fields = granite_moe(get, head_dim)
    return {
        **fields,
        **_local_layers(get, head_dim),
        "experts": tuple(replace(e, router="block_sparse_moe.router") for e in fields["experts"]),
        "stacked": granite_stacked("experts.gate_up_proj", "experts.down_proj"),
    }


def _local_layers(get: Fields, head_dim: int) -> dict:
    """Windows in three of four layers, scores for nothing in all, and a base of RoPE for each."""
    rope = read_rope(get, head_dim)
    return {
        "ropes": ropes_by_theta(get, rope, lambda layer: True),
        "null_scores": True,
        "windows": get.windows(lambda layer: layer % 4 != 0, default=128),
    }


_SWA = {
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}

GRANITE_FAMILIES: dict[str, Family] = {
    "GraniteForCausalLM": Family(
        "Granite 3.x", "multipliers of embeddings, scores, residuals and logits", granite
    ),
    "GraniteMoeForCausalLM": Family(
        "Granite 3 MoE 1B-A400M, 3B-A800M", "Granite 3 with routed experts", granite_moe
    ),
    "GraniteMoeSharedForCausalLM": Family(
        "Granite MoE with a shared expert", "as Granite MoE, with a shared expert", granite_moe
    ),
    "GraniteSWAForCausalLM": Family(
        "Granite with windows 2B",
        "Granite 3 with windows in three of four layers, a RoPE of its own or none in each, and "
        "heads that may attend to nothing",
        granite_swa,
        _SWA,
    ),
    "GraniteMoeSWAForCausalLM": Family(
        "Granite MoE with windows 3B-A600M",
        "Granite with windows, with routed experts",
        granite_moe_swa,
    ),
    "HyperCLOVAXForCausalLM": Family(
        "HyperCLOVA X SEED Think 14B",
        "Granite 3 with norms after attention and MLP",
        hyperclovax,
    ),
}

"""What the tests of plans share: models of which the sizes alone are known."""

from __future__ import annotations

from dataclasses import replace

from ebbtide.offload.models.layer_config import Experts
from ebbtide.offload.models.model_config import ModelConfig
from ebbtide.offload.models.rope_config import RopeConfig
from ebbtide.offload.planning.footprint import Facts
from ebbtide.offload.weights.skeleton import expected_shapes

MiB = 1 << 20


def model(layers=4, hidden=256, heads=4, kv_heads=2, head_dim=64, vocab=1000, **more):
    return ModelConfig(
        "LlamaForCausalLM",
        layers,
        hidden,
        2 * hidden,
        heads,
        kv_heads,
        head_dim,
        vocab,
        max_positions=more.pop("max_positions", 65536),
        norm_eps=1e-5,
        ropes=(RopeConfig("default", 1e4),) * layers,
        dtype="bfloat16",
        tied_embeddings=more.pop("tied", False),
        windows=(None,) * layers,
    )


def facts_of(config, bits=None):
    return Facts("a-model", config, expected_shapes(config), bits)


MODELS = {
    "small": model(),
    "one KV head": model(kv_heads=1, heads=2, head_dim=80, hidden=160),
    "deep": model(layers=24, tied=True),
}


def routed_model():
    experts = Experts(count=16, chosen=2, intermediate_size=512)
    return replace(MODELS["small"], experts=(experts,) * 4)

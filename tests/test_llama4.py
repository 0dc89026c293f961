"""Llama 4: what it sees in chunks, its configuration, and what it takes at the sizes of the models
that there are. That logits are those of transformers is test_families.py's, what chunks keep of
pages test_windows.py's.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_checkpoints import reference_logits
from small_llm import TINY, open_small

from ebbtide.offload.errors import BadCheckpoint, UnsupportedModel
from ebbtide.offload.models.model_config import config_of, read_model_config
from ebbtide.offload.pages.geometry import choose_geometry
from ebbtide.offload.pages.windows import first_seen
from ebbtide.offload.planning.budget import Limits
from ebbtide.offload.planning.footprint import Facts
from ebbtide.offload.planning.plan import Request
from ebbtide.offload.planning.planner import make_plan
from ebbtide.offload.weights.skeleton import expected_shapes

IDS = torch.randint(0, 256, (400,), generator=torch.Generator().manual_seed(6)).tolist()
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 16.0,
    "high_freq_factor": 1.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
# As hubs have them.
SIZES = {
    "Scout": {
        "max_position_embeddings": 10485760,
        "no_rope_layers": [],
        "rope_scaling": _LLAMA3,
        "attn_temperature_tuning": 4,
    },
    "Maverick": {
        "max_position_embeddings": 1048576,
        "num_local_experts": 128,
        "interleave_moe_layer_step": 2,
        "use_qk_norm": False,
        "attn_temperature_tuning": 4,
    },
}


def sized(name: str, **changes):
    raw = {"architectures": ["Llama4ForCausalLM"], "dtype": "bfloat16", **SIZES[name], **changes}
    return config_of(raw, Path("config.json"))


@pytest.mark.parametrize("size", [34, 64, 96, 100, 130])
def test_chunks_are_those_of_transformers(checkpoint, tmp_path, size):
    """Of cells of 32 tokens and spans of 64: their ends are in any place."""
    folder = checkpoint("llama4-moe", attention_chunk_size=size)
    expected = reference_logits(folder, IDS)
    with open_small(folder, tmp_path, "full", **TINY) as llm:
        found = llm.logits(IDS, prefill_tokens=300)
    assert (found - expected).abs().max() <= 2e-4 * max(1.0, expected.abs().max().item())


def test_a_chunk_is_seen_from_its_first_token_on_and_never_more_than_a_window():
    positions = torch.arange(1000)
    seen = first_seen(positions, 96, in_chunks=True)
    assert seen.tolist() == [position // 96 * 96 for position in range(1000)]
    assert (seen >= first_seen(positions, 96, in_chunks=False)).all()
    assert [first_seen(position, 96, True) for position in range(1000)] == seen.tolist()


@pytest.mark.parametrize("name", SIZES)
def test_the_plan_counts_what_is_there(name):
    config = sized(name)
    facts = Facts(name, config, expected_shapes(config), 8)
    limits, geometry = Limits(None, 1 << 41, 0, 0), choose_geometry(config, "8")
    plan = make_plan(facts, geometry, limits, Request(131072, 1))
    assert plan.fits and not plan.layers_streamed
    numbers = sum(torch.Size(shape).numel() for shape in facts.shapes.values())
    assert 0.97 < numbers / {"Scout": 107.8e9, "Maverick": 400.7e9}[name] < 1.03
    assert 1.0 < plan.host["weights"] / numbers < 1.15
    # A quarter of the layers keeps all pages, the others those of a chunk.
    assert plan.window_layers == 36
    whole = 12 * 131072 + 36 * 8192
    per_token = 2 * config.num_kv_heads * config.head_dim
    assert 1.0 < (plan.kv_far_bytes + plan.host["near planes"]) / (whole * per_token) < 1.4


def test_what_the_file_leaves_out():
    scout, maverick = sized("Scout"), sized("Maverick")
    assert [n for n in range(48) if scout.ropes[n] is None] == list(range(3, 48, 4))
    assert scout.windows == (8192, 8192, 8192, None) * 12 and scout.chunked
    assert scout.ropes[0].theta == 5e5 and scout.ropes[0].interleaved
    assert all(e.count == 16 and e.chosen == 1 for e in scout.experts)
    assert maverick.experts[0] is None and maverick.experts[1].count == 128
    assert maverick.qk_norm == "" and scout.norms_turned(0) and not scout.norms_turned(3)
    growth = scout.query_growth
    assert (growth.beta, growth.every, growth.ahead, growth.unturned) == (0.1, 8192, 1, True)
    assert sized("Scout", attn_temperature_tuning=False).query_growth is None
    everywhere = {"layer_types": ["full_attention"] * 48, "attention_chunk_size": None}
    assert sized("Scout", **everywhere).windows == (None,) * 48
    few = sized("Scout", moe_layers=[2], num_hidden_layers=4)
    assert [e is not None for e in few.experts] == [False, False, True, False]


@pytest.mark.parametrize("name", ["llama4-moe", "llama4-moe-plain"])
def test_both_layouts_say_the_same(checkpoint, name):
    hub, new = (read_model_config(checkpoint(name, layout=of)) for of in ("hub", "transformers5"))
    assert hub == new


@pytest.mark.parametrize(
    ("changes", "said", "kind"),
    [
        ({"layer_types": ["sliding_attention"] * 48}, "sliding_attention", UnsupportedModel),
        ({"no_rope_layers": [2] * 48}, "no_rope_layers", BadCheckpoint),
        ({"no_rope_layers": [1] * 3}, "no_rope_layers must name 48 layers", BadCheckpoint),
        ({"attention_chunk_size": 0}, "attention_chunk_size is 0", BadCheckpoint),
        ({"attention_chunk_size": None}, "does not say attention_chunk_size", BadCheckpoint),
        ({"attn_temperature_tuning": "yes"}, "attn_temperature_tuning is 'yes'", BadCheckpoint),
        ({"floor_scale": 0}, "floor_scale is 0", BadCheckpoint),
        ({"moe_layers": "all"}, "moe_layers is 'all'", BadCheckpoint),
        ({"num_experts_per_tok": 17}, "17 of 16 experts", BadCheckpoint),
    ],
)
def test_what_is_wrong_is_named(changes, said, kind):
    with pytest.raises(kind, match=said) as caught:
        sized("Scout", **changes)
    assert str(caught.value).startswith("config.json")

"""Gemma 3n: its configuration, and what it takes at the sizes of the models that there are. That
logits are those of transformers is test_families.py's, that layers share pages test_gemma4.py's.
"""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from small_llm import TINY, open_small

from ebbtide.offload.errors import BadCheckpoint, UnsupportedModel
from ebbtide.offload.models.model_config import config_of, read_model_config
from ebbtide.offload.pages.geometry import choose_geometry
from ebbtide.offload.planning.budget import Limits
from ebbtide.offload.planning.footprint import Facts
from ebbtide.offload.planning.plan import Request
from ebbtide.offload.planning.planner import make_plan
from ebbtide.offload.weights.skeleton import expected_shapes

IDS = torch.randint(0, 256, (90,), generator=torch.Generator().manual_seed(3)).tolist()
# As hubs have them.
SIZES = {
    "E2B": {
        "num_hidden_layers": 30,
        "num_kv_shared_layers": 10,
        "intermediate_size": [8192] * 30,
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 20,
    },
    "E4B": {
        "num_hidden_layers": 35,
        "num_kv_shared_layers": 15,
        "intermediate_size": [16384] * 35,
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 25,
    },
}


def sized(name: str, **changes):
    raw = {"architectures": ["Gemma3nForCausalLM"], "dtype": "bfloat16", **SIZES[name], **changes}
    return config_of(raw, Path("config.json"))


@pytest.mark.parametrize("name", SIZES)
def test_the_plan_counts_what_is_there_and_nothing_that_is_read_by_token(name):
    config = sized(name)
    facts = Facts(name, config, expected_shapes(config), 8)
    plan = make_plan(
        facts, choose_geometry(config, "8"), Limits(None, 1 << 38, 0, 0), Request(8192, 1)
    )
    assert plan.fits and not plan.layers_streamed
    numbers = {
        key: torch.Size(shape).numel() for key, shape in facts.shapes.items() if len(shape) == 2
    }
    table = numbers.pop("model.embed_tokens_per_layer.weight")
    assert table == 262144 * config.num_layers * 256
    streams = [key for key in numbers if key.startswith("model.altup_")]
    assert len(streams) == 6 and facts.unlayered_bytes > 6 * 2048 * 2048
    assert 1.0 < plan.host["weights"] / sum(numbers.values()) < 1.15
    assert config.num_page_layers == 20


def test_streams_take_room_while_layers_are_computed():
    one, four = (choose_geometry(sized("E2B", altup_num_inputs=n), "8") for n in (1, 4))
    assert one == four
    facts = [
        Facts("E2B", config, expected_shapes(config), 8)
        for config in (sized("E2B", altup_num_inputs=n) for n in (1, 4))
    ]
    plans = [make_plan(f, one, Limits(None, 1 << 38, 0, 0), Request(8192, 1)) for f in facts]
    more = plans[1].host["workspace"] - plans[0].host["workspace"]
    # Of each row of a cell three more residuals are kept, and those that are being made.
    assert more >= 2 * 3 * 4 * 2048 * one.cell_tokens


def test_what_the_file_leaves_out():
    config = sized("E4B", activation_sparsity_pattern=None, intermediate_size=16384)
    assert config.gate_cutoffs == (NormalDist().inv_cdf(0.95),) * 10 + (None,) * 25
    assert config.inner_sizes == (16384,) * 35
    assert [n for n in range(35) if config.windows[n] is None] == [4, 9, 14, 19, 24, 29, 34]
    assert config.windows[0] == 512 and config.logits_softcap == 30.0
    assert [config.ropes[layer].theta for layer in (0, 4)] == [1e4, 1e6]
    assert config.kv_sources[20:] == (18, 18, 18, 18, 19) * 3
    assert config.per_layer_inputs.rows == 262144 < config.vocab_size
    few = sized(
        "E4B", num_hidden_layers=5, num_kv_shared_layers=0, activation_sparsity_pattern=None
    )
    assert few.gate_cutoffs == (None,) * 5


@pytest.mark.parametrize("name", ["gemma3n", "gemma3n-two-streams"])
def test_both_layouts_say_the_same(checkpoint, name):
    hub, new = (read_model_config(checkpoint(name, layout=of)) for of in ("hub", "transformers5"))
    assert hub == new


@pytest.mark.parametrize(
    ("changes", "said", "kind"),
    [
        ({"altup_active_idx": 1}, "altup_active_idx is 1", UnsupportedModel),
        ({"altup_num_inputs": 0}, "altup_num_inputs is 0", BadCheckpoint),
        ({"altup_correct_scale": 1}, "altup_correct_scale is 1", BadCheckpoint),
        ({"laurel_rank": -1}, "laurel_rank is -1", BadCheckpoint),
        ({"intermediate_size": [96, 96]}, "intermediate_size must name 35 layers", BadCheckpoint),
        ({"intermediate_size": ["x"] * 35}, "intermediate_size is 'x'", BadCheckpoint),
        (
            {"activation_sparsity_pattern": [1.0] * 35},
            "activation_sparsity_pattern is 1.0",
            BadCheckpoint,
        ),
        ({"activation_sparsity_pattern": 0.95}, "must name 35 layers", BadCheckpoint),
        ({"num_kv_shared_layers": 35}, "num_kv_shared_layers is 35", BadCheckpoint),
        ({"hidden_size_per_layer_input": 0}, "hidden_size_per_layer_input is 0", BadCheckpoint),
    ],
)
def test_what_is_wrong_is_named(changes, said, kind):
    with pytest.raises(kind, match=said) as caught:
        sized("E4B", **changes)
    assert str(caught.value).startswith("config.json")


def test_sizes_that_differ_are_another_familys():
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "intermediate_size": [96, 64],
    }
    with pytest.raises(UnsupportedModel, match="intermediate_size differs"):
        config_of(raw, Path("config.json"))


def test_tokens_behind_the_table_have_its_first_row(checkpoint, tmp_path):
    """Files have rows for text alone, fewer than the vocabulary."""
    with open_small(checkpoint("gemma3n"), tmp_path, **TINY) as llm:
        llm.logits(IDS[:3])
        weights, rows = llm.admission.weights, slice(0, 3)
        x = weights.embed([7, 7, 7])
        same = [weights.entering(tokens, x, rows)[1] for tokens in ([0, 3, 5], [250, 3, 5])]
        other = weights.entering([1, 3, 5], x, rows)[1]
    assert torch.equal(*same) and not torch.equal(same[0], other)

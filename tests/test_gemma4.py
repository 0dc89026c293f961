"""Gemma 4: layers of two shapes, of which some attend the pages of others. That logits are those of
transformers is test_families.py's; here stands what pages of several shapes, and shared ones, must
not change, and what they take.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from prefixes_under_test import TEXT, last_logits, short_texts_count  # noqa: F401
from prefixes_under_test import opened as opened_with_store
from small_llm import TINY, keep_in_memory, open_small

from ebbtide.offload.errors import BadCheckpoint, ModelError, UnsupportedModel
from ebbtide.offload.layers.decoder import Decoder
from ebbtide.offload.mode import Mode
from ebbtide.offload.models.model_config import config_of, read_model_config
from ebbtide.offload.pages.geometry import choose_geometry
from ebbtide.offload.pages.page_table import Tier
from ebbtide.offload.planning.budget import Limits
from ebbtide.offload.planning.footprint import Facts
from ebbtide.offload.planning.plan import Request
from ebbtide.offload.planning.planner import make_plan
from ebbtide.offload.weights.skeleton import expected_shapes
from ebbtide.prefetch import foresight

NUM_TOKENS, PREFILLED = 600, 560
IDS = torch.randint(0, 256, (NUM_TOKENS,), generator=torch.Generator().manual_seed(9)).tolist()
BOUNDED = Mode("bounded", selector_options={"epsilon": 0.05})
TWO_SHAPES = ["gemma4", "gemma4-keys-are-values"]


def _types(pattern: str) -> list[str]:
    return ["sliding_attention" if kind == "L" else "full_attention" for kind in pattern]


# The sizes of the models that there are.
_KEYS_ARE_VALUES = {
    "attention_k_eq_v": True,
    "sliding_window": 1024,
    "hidden_size_per_layer_input": 0,
}
SIZES = {
    "E2B": {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "layer_types": _types("LLLLG" * 7),
    },
    "E4B": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 42,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 18,
    },
    "12B": {
        **_KEYS_ARE_VALUES,
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 1,
    },
    "26B-A4B": {
        **_KEYS_ARE_VALUES,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_hidden_layers": 30,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    "31B": {
        **_KEYS_ARE_VALUES,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 60,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
    },
}


def sized(name: str, **changes):
    raw = {"architectures": ["Gemma4ForCausalLM"], "dtype": "bfloat16", **SIZES[name], **changes}
    return config_of(raw, Path("config.json"))


# ---- what it takes -------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_bits", ["8", "6", "4", "full"])
@pytest.mark.parametrize("name", SIZES)
def test_records_of_all_shapes_have_one_size_and_waste_little(name, kv_bits):
    config = sized(name)
    geometry = choose_geometry(config, kv_bits)
    layers = range(config.num_page_layers)
    for of in (geometry, geometry.with_pages(near_resident=False)):
        layouts = of.layouts(layers)
        assert len({layout.record_bytes for layout in layouts}) == 1
        assert len({(layout.kv_heads, layout.head_dim) for layout in layouts}) == 2
        assert max(layout.padding_share for layout in layouts) < 0.06
        assert {of.span_bytes // layout.record_bytes for layout in layouts} == {of.records_per_span}
        spans = {of.span_tokens_of(layout) for layout in layouts}
        assert max(spans) == 1024 and min(spans) >= of.cell_tokens
    if kv_bits != "full":
        finer = geometry.selecting(config)
        assert len({layout.record_bytes for layout in finer.layouts(layers)}) == 1
        assert finer.finer_layers == tuple(
            [kv for kv in layers if config.kv_windows[kv] is None][:2]
        )


@pytest.mark.parametrize("name", SIZES)
def test_the_plan_counts_what_is_there_and_nothing_that_is_read_by_token(name):
    config, context = sized(name), 32768
    facts = Facts(name, config, expected_shapes(config), 8)
    geometry = choose_geometry(config, "8")
    plan = make_plan(facts, geometry, Limits(None, 1 << 38, 0, 0), Request(context, 1))
    assert plan.fits and not plan.layers_streamed
    numbers = {
        key: torch.Size(shape).numel() for key, shape in facts.shapes.items() if len(shape) == 2
    }
    by_token = numbers.pop("model.embed_tokens_per_layer.weight", 0)
    assert bool(by_token) == (name in ("E2B", "E4B"))
    # The embeddings are the head. 8 bits, and a scale for each group.
    assert 1.0 < plan.host["weights"] / sum(numbers.values()) < 1.15
    # 8 bits and parameters of what the layers that have keys and values have, in whole spans: of
    # those with a window, what it shows.
    elements = {True: 0, False: 0}
    for layer in range(config.num_layers):
        if not config.shares_kv(layer):
            shape, has_window = config.shape_of(layer), config.windows[layer] is not None
            elements[has_window] += 2 * shape.kv_heads * shape.head_dim
    kv_bytes = plan.kv_far_bytes + plan.host["near planes"]
    of_whole = elements[False] * geometry.sealed_tokens(context)
    shown = elements[True] * (max(filter(None, config.windows)) - geometry.cell_tokens)
    assert 1.0 < (kv_bytes - shown) / of_whole and kv_bytes < 1.15 * of_whole + 4 * shown


def test_layers_that_share_keep_no_pages(checkpoint, tmp_path):
    with open_small(checkpoint("gemma4"), tmp_path, **TINY) as llm:
        config = llm.config
        assert config.kv_sources == (0, 1, 2, 1, 2, 1, 2)
        assert config.kv_pages == (0, 1, 2, 1, 2, 1, 2) and config.num_page_layers == 3
        with llm.session() as session:
            session.append(IDS[:300])
            session.last_logits()
            table, raw = session._sequence.table, session._sequence.raw
            assert table.num_layers == 3
            assert len({extent.layer for extent in table.extents()}) == 3
            assert raw.keys[3].data_ptr() == raw.keys[1].data_ptr()
            assert raw.keys[0].data_ptr() != raw.keys[1].data_ptr()
            session._runtime.store.check_integrity(deep=True)
            assert session._runtime.store.near_record_bytes == tuple(
                layout.near_record_bytes for layout in llm.geometry.layouts(range(3))
            )


def test_prefill_passes_layers_by_of_which_no_later_token_needs_anything(
    checkpoint, tmp_path, monkeypatch
):
    asked: list[tuple[int, int]] = []
    project = Decoder.project

    def watched(self, layer, w, x, rows, position):
        asked.append((layer, rows.stop - rows.start))
        return project(self, layer, w, x, rows, position)

    monkeypatch.setattr(Decoder, "project", watched)
    with open_small(checkpoint("gemma4"), tmp_path, **TINY) as llm:
        with llm.open_session(100, sequences=1, text=False) as session:
            session._sequence.tokens.extend(IDS[:100])
            session._engine.prefill(session._sequence)
    for layer in range(7):
        rows = [count for of, count in asked if of == layer]
        assert sum(rows) == (100 if layer < 3 else 1), layer


# ---- what must not change ------------------------------------------------------------------------


def run(folder, spill_dir, mode=None, *, share=1.0, store=None, **options):
    with open_small(folder, spill_dir, mode=mode, store=store, **TINY, **options) as llm:
        keep_in_memory(llm, NUM_TOKENS, share)
        kept, opened = {}, llm.open_session

        def watched(*args, **kwargs):
            session = opened(*args, **kwargs)
            kept["selected"], kept["sequence"] = session._engine.selected, session._sequence
            return session

        llm.open_session = watched
        logits = llm.logits(IDS, prefill_tokens=PREFILLED)
        return logits, llm.last_stats, kept


@pytest.mark.parametrize("name", TWO_SHAPES)
@pytest.mark.parametrize("codec", ["8", "full"])
def test_tiers_change_no_bit(checkpoint, tmp_path, name, codec):
    expected, stats, _ = run(checkpoint(name), tmp_path, codec=codec)
    assert stats.bytes_read["disk"] == 0
    for share, store in ((0.0, {}), (0.3, {}), (0.3, {"overlap": False}), (0.3, {"io_threads": 1})):
        logits, stats, _ = run(checkpoint(name), tmp_path, codec=codec, share=share, store=store)
        assert torch.equal(logits, expected)
        assert stats.bytes_read["disk"] > 0


@pytest.mark.parametrize("name", [*TWO_SHAPES, "gemma3n"])
def test_every_layer_selects_by_its_own_query(checkpoint, tmp_path, monkeypatch, name):
    """Whoever's the pages are; and neither tiers nor rehearsals change a bit."""
    monkeypatch.setattr(foresight, "STEPS_BYTES", 0)  # layers this small are rehearsed too
    # What streams are predicted to be is large beside what attention adds to it here.
    bounded = Mode("bounded", selector_options={"epsilon": 0.01}) if name == "gemma3n" else BOUNDED
    exact, _, _ = run(checkpoint(name), tmp_path)
    expected, _, kept = run(checkpoint(name), tmp_path, bounded)
    selected, trail = kept["selected"], kept["sequence"].trail
    config = read_model_config(checkpoint(name))
    selecting = [kv for kv, window in enumerate(config.kv_windows) if window is None]
    assert sorted(trail.last) == selecting
    chosen = [trail.last[kv].tolist() for kv in selecting]
    if name != "gemma4-keys-are-values":  # three layers over the same pages
        assert len({tuple(records) for records in chosen}) > 1
    figures = selected.fidelity.take()
    assert 0 < figures.selected < figures.offered
    all_of_it = Mode("bounded", selector_options={"epsilon": 1e-6})
    nearly, _, _ = run(checkpoint(name), tmp_path, all_of_it)
    assert (nearly - exact).abs().max() < 1e-3 < (expected - exact).abs().max()
    for share in (0.0, 0.3):
        logits, stats, kept = run(checkpoint(name), tmp_path, bounded, share=share)
        assert torch.equal(logits, expected)
        assert stats.bytes_read["disk"] > 0


def test_a_fork_has_room_in_the_near_planes_of_every_shape(checkpoint, tmp_path):
    """Most layers are of the shape of which fewest spans hold a text: two of their spans are copied
    or begun by the fork, as of the others."""
    layers = {"num_hidden_layers": 8, "layer_types": _types("LGGGGGGG"), "num_kv_shared_layers": 0}
    folder, fork_at = checkpoint("gemma4", layout="transformers5", **layers), 544
    with open_small(folder, tmp_path, mode=BOUNDED, **TINY) as llm:
        with llm.open_session(NUM_TOKENS, sequences=2, text=False) as session:
            session.append(IDS[:fork_at])
            session.last_logits()
            with session.fork() as other:
                for one in (session, other):
                    one.append(IDS[fork_at:])
                assert torch.equal(session.last_logits(), other.last_logits())
                store = session._runtime.store
                spans = max(store._extents.num_used(tier) for tier in Tier)
                assert spans > llm.plan.num_spans + 8  # more than one of each layer
                store.check_integrity(deep=True)


@pytest.mark.parametrize(("codec", "mode"), [("8", Mode()), ("8", BOUNDED), ("full", Mode())])
@pytest.mark.parametrize("name", TWO_SHAPES)
def test_kept_pages_of_several_shapes_are_found(checkpoint, tmp_path, name, codec, mode):
    options = {"codec": codec, "mode": mode}
    with opened_with_store(checkpoint(name), tmp_path, cap=None, **options) as llm:
        expected, restored = last_logits(llm, TEXT)
        assert not restored
    with opened_with_store(checkpoint(name), tmp_path, **options) as llm:
        last_logits(llm, TEXT)
    for share in (0.0, 1.0):
        with opened_with_store(checkpoint(name), tmp_path, share=share, **options) as llm:
            logits, restored = last_logits(llm, TEXT)
        assert restored == len(TEXT) - 1
        assert torch.equal(logits, expected)


# ---- its configuration ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma4", "gemma4-keys-are-values", "gemma4-moe"])
def test_both_layouts_say_the_same(checkpoint, name):
    hub, new = (read_model_config(checkpoint(name, layout=of)) for of in ("hub", "transformers5"))
    assert hub == new


def test_layers_of_a_deep_model_are_found_by_their_numbers(checkpoint):
    """transformers writes "04" where there are ten layers or more."""
    deep = {"num_hidden_layers": 12, "layer_types": _types("LLG" * 4), "num_kv_shared_layers": 6}
    folder = checkpoint("gemma4", layout="transformers5", **deep)
    assert "02" in json.loads((folder / "config.json").read_text())["per_layer_config"]
    heads = [read_model_config(folder).shape_of(layer).head_dim for layer in range(12)]
    assert heads == [16, 16, 32] * 4


def test_what_the_file_leaves_out(tmp_path):
    config = sized("E4B", num_hidden_layers=12, num_kv_shared_layers=0)
    globals_ = [layer for layer in range(12) if config.windows[layer] is None]
    assert globals_ == [5, 11] and config.windows[0] == 512
    assert (config.shape_of(0).head_dim, config.shape_of(5).head_dim) == (256, 512)
    assert config.per_layer_inputs.size == 256 and config.activation == "gelu_tanh"
    assert [config.ropes[layer].kind for layer in (0, 5)] == ["default", "proportional"]
    assert [config.ropes[layer].theta for layer in (0, 5)] == [1e4, 1e6]
    # The last layer sees everything, whatever the file says.
    last = sized("E4B", num_hidden_layers=4, num_kv_shared_layers=0, layer_types=_types("LLLL"))
    assert last.windows[-1] is None and last.shape_of(3).head_dim == 512


@pytest.mark.parametrize(
    ("changes", "said", "kind"),
    [
        ({"use_bidirectional_attention": "all"}, "both directions", UnsupportedModel),
        ({"num_kv_shared_layers": 42}, "num_kv_shared_layers is 42", BadCheckpoint),
        ({"num_kv_shared_layers": 37}, "none is of a kind that they need", BadCheckpoint),
        ({"vocab_size_per_layer_input": 99}, "vocab_size_per_layer_input is 99", BadCheckpoint),
        ({"per_layer_config": [1]}, "per_layer_config", BadCheckpoint),
        ({"per_layer_config": {"x": {}}}, "per_layer_config", BadCheckpoint),
        (
            {"per_layer_config": {"3": {"head_dim": 1200}}},
            "layer 3: head_dim 1200",
            UnsupportedModel,
        ),
        ({"per_layer_config": {"3": {"num_key_value_heads": 3}}}, "3 KV heads", BadCheckpoint),
        ({"global_head_dim": "wide"}, "head_dim is 'wide'", BadCheckpoint),
        ({"enable_moe_block": True}, "num_experts", BadCheckpoint),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "x"}}},
            "rope_parameters",
            ModelError,
        ),
    ],
)
def test_what_is_wrong_is_named(changes, said, kind):
    with pytest.raises(kind, match=said) as caught:
        sized("E4B", **changes)
    assert str(caught.value).startswith("config.json")


def test_tensors_of_layers_that_share_may_be_there_and_are_not_read(checkpoint, tmp_path):
    """Files may hold keys' and values' projections that no layer uses."""
    from safetensors.torch import load_file, save_file

    folder, more = checkpoint("gemma4"), tmp_path / "more"
    more.mkdir()
    tensors = load_file(folder / "model.safetensors")
    for part in ("k_proj", "v_proj", "k_norm"):
        tensors[f"model.layers.5.self_attn.{part}.weight"] = torch.full((4, 4), torch.nan)
    save_file(tensors, more / "model.safetensors")
    (more / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text())))
    with open_small(folder, tmp_path, **TINY) as llm:
        expected = llm.logits(IDS[:80])
    with open_small(more, tmp_path, **TINY) as llm:
        assert torch.equal(llm.logits(IDS[:80]), expected)

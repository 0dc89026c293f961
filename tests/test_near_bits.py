"""Near planes whose bits differ by layer: which layers have more, that the plan counts them, and
that nothing but the estimate depends on them.
"""

from __future__ import annotations

from dataclasses import replace

import platformdirs
import pytest
import torch
from plans_under_test import MODELS, facts_of
from small_llm import keep_in_memory, open_small, small_geometry

from ebbtide.kernels.pages import near_keys, seal
from ebbtide.offload.mode import Mode
from ebbtide.offload.pages.geometry import Geometry, choose_finer_layers, choose_geometry
from ebbtide.offload.pages.page_table import Tier
from ebbtide.offload.planning.budget import Limits
from ebbtide.offload.planning.plan import Request
from ebbtide.offload.planning.planner import make_plan

NUM_TOKENS, PREFILLED = 1000, 950
IDS = torch.randint(0, 256, (NUM_TOKENS,), generator=torch.Generator().manual_seed(9)).tolist()
BOUNDED = Mode("bounded", selector_options={"epsilon": 0.05})
MiB = 1 << 20


# ---- which layers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("windows", "finer"),
    [
        ((), (0, 1)),
        ((None,) * 4, (0, 1)),
        ((512, None, 512, None), (1, 3)),
        ((512, 512, 512, None), (3,)),
        ((512,) * 4, ()),
    ],
)
def test_the_first_two_layers_that_select_are_finer(windows, finer):
    config = replace(MODELS["small"], windows=windows)
    assert choose_finer_layers(config) == finer
    geometry = choose_geometry(config, selects=True)
    bits = [layout.near_bits for layout in geometry.layouts(range(4))]
    assert bits == [3 if layer in finer else 2 for layer in range(4)]


@pytest.mark.parametrize("kv_bits", ["auto", "8", "6", "4", "full"])
def test_exact_mode_has_one_layout(kv_bits):
    geometry = choose_geometry(MODELS["small"], kv_bits)
    assert geometry.layouts(range(4)) == [geometry.layout] * 4
    assert geometry.layout.is_full or geometry.layout.near_bits == 2


@pytest.mark.parametrize("kv_bits", ["8", "6", "4"])
@pytest.mark.parametrize("name", MODELS)
def test_records_of_all_layers_have_one_size(name, kv_bits):
    geometry = choose_geometry(MODELS[name], kv_bits, selects=True)
    finer, usual = geometry.layout_of(1), geometry.layout_of(2)
    assert finer.record_bytes == usual.record_bytes
    assert finer.record_tokens == usual.record_tokens
    assert finer.record_payload_bytes <= usual.record_payload_bytes
    keys = usual.record_tokens * usual.kv_heads * usual.head_dim
    assert finer.near_record_bytes - usual.near_record_bytes == keys // 8


def test_layers_that_select_nothing_need_no_more():
    geometry = choose_geometry(MODELS["small"])
    with pytest.raises(AssertionError):
        Geometry(geometry.cell_tokens, geometry.span_tokens, geometry.layout, (0,))


# ---- what it costs -----------------------------------------------------------------------------


@pytest.mark.parametrize("device", [None, 1024])
def test_the_plan_counts_what_the_first_layers_have_besides(device):
    facts, context = facts_of(MODELS["small"]), 20_000
    limits = Limits(device and device * MiB, 1024 * MiB, 1024 * MiB, 50 * MiB)
    geometry = choose_geometry(facts.config, "8", selects=True)
    plain = replace(geometry, finer_layers=())
    finer, usual = (make_plan(facts, g, limits, Request(context)) for g in (geometry, plain))
    layout = geometry.layout
    more = 2 * layout.kv_heads * layout.head_dim // 8  # a bit of each key in two layers
    assert finer.resident_bytes_per_token == usual.resident_bytes_per_token + more
    assert finer.far_bytes_per_token == usual.far_bytes_per_token
    assert finer.kv_bits_per_element > usual.kv_bits_per_element
    assert finer.padding_share > usual.padding_share
    tier = "host" if device is None else "device"
    in_finer, in_usual = getattr(finer, tier), getattr(usual, tier)
    planned = geometry.num_spans(context) * geometry.span_tokens  # near planes are in whole spans
    assert in_finer["near planes"] == in_usual["near planes"] + planned * more
    assert finer.decode_bytes[tier] == usual.decode_bytes[tier] + planned * more


@pytest.mark.parametrize("sequences", [1, 4])
def test_every_layers_near_planes_have_room_for_their_spans(checkpoint, tmp_path, sequences):
    folder = checkpoint("llama2")
    with open_small(folder, tmp_path, mode=BOUNDED) as llm:
        keep_in_memory(llm, NUM_TOKENS, 0.5, sequences=sequences, text=False)
        with llm.open_session(NUM_TOKENS, sequences=sequences, text=False) as session:
            store, spans = session._runtime.store, llm.geometry.num_spans(NUM_TOKENS)
            spans += 2 * (sequences > 1)  # a fork copies the last one before it writes to it
            per_span = llm.geometry.records_per_span
            frames = [len(store.records._planes.near_frames(layer)) for layer in range(3)]
            assert frames == [2 * spans * per_span, 2 * spans * per_span, spans * per_span]
            sizes = [layout.near_record_bytes for layout in llm.geometry.layouts(range(3))]
            assert store.near_record_bytes == tuple(sizes) and sizes[0] == sizes[1] > sizes[2]
            near = store._planes.overhead_bytes()[Tier.HOST]
            assert near == spans * per_span * sum(sizes)
            session.append(IDS)
            session.last_logits()
            store.check_integrity(deep=True)


# ---- what depends on it ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("qwen2")


@pytest.fixture(scope="module", params=["8", "4"])
def in_memory(request, folder, tmp_path_factory):
    """(codec, rows): what decoding IDS gives with everything in memory, by `rows_of`."""
    with open_small(folder, tmp_path_factory.mktemp("spill"), request.param, mode=BOUNDED) as llm:
        llm._context = NUM_TOKENS
        with llm.session() as session:
            bits = [layout.near_bits for layout in session._engine.attention.layouts]
            assert bits == [3, 3, 2], "both layouts occur"
            session.append(IDS[:PREFILLED])
            return request.param, rows_of(session)


def rows_of(session) -> torch.Tensor:
    rows = [session.last_logits()]
    rows += [session.decode(token) for token in IDS[PREFILLED:]]
    session._runtime.store.check_integrity(deep=True)
    return torch.stack(rows)


@pytest.fixture
def on_disk(folder, in_memory, tmp_path):
    """An LLM with a third of its far planes in memory, and room for forks."""
    with open_small(folder, tmp_path, in_memory[0], mode=BOUNDED) as llm:
        keep_in_memory(llm, NUM_TOKENS, 0.3, sequences=4, text=True)
        llm._context = NUM_TOKENS
        yield llm


def test_forks_change_no_bit(on_disk, in_memory):
    with on_disk.session() as session:
        session.append(IDS[:PREFILLED])
        session.last_logits()
        for _ in range(2):  # each copies the spans that they share, and leaves its own
            with session.fork() as other:
                other.append(IDS[:40])
                other.last_logits()
        with session.fork() as other:
            assert torch.equal(rows_of(other), in_memory[1])
        assert torch.equal(rows_of(session), in_memory[1])


@pytest.mark.parametrize("back_to", [0, 500, PREFILLED])
def test_going_back_changes_no_bit(on_disk, in_memory, back_to):
    with on_disk.session() as session:
        session.append(IDS[:PREFILLED])
        session.last_logits()
        session.take_snapshot()
        for token in IDS[:40]:  # seals pages that the next ones take the place of
            session.decode(token)
        session.truncate(back_to)
        session.append(IDS[back_to:PREFILLED])
        assert torch.equal(rows_of(session), in_memory[1])


def test_a_session_that_is_found_again_has_the_same_bits(folder, in_memory, tmp_path, monkeypatch):
    monkeypatch.setattr(platformdirs, "user_state_dir", lambda name: str(tmp_path / "state"))
    for is_new in (True, False):
        with open_small(folder, tmp_path, in_memory[0], mode=BOUNDED) as llm:
            llm._context = NUM_TOKENS
            with llm.session("book") as session:
                if is_new:
                    session.append(IDS[:PREFILLED])
                    session.last_logits()
                else:
                    assert session.tokens == IDS[:PREFILLED]
                    assert torch.equal(rows_of(session), in_memory[1])


def test_every_page_attended_the_split_of_keys_changes_no_bit(folder, tmp_path):
    """Codes are nested: what of a key lies near and what far is nobody's business in exact mode."""
    rows = []
    for mode in (Mode(), BOUNDED):
        with open_small(folder, tmp_path, mode=mode) as llm:
            llm._context = NUM_TOKENS
            with llm.session() as session:
                session._engine.choose_pages(Mode())
                session.append(IDS[:PREFILLED])
                rows.append(rows_of(session))
    assert torch.equal(*rows)


def test_a_third_bit_makes_better_estimates(folder):
    """Of keys, from near planes alone."""
    geometry = small_geometry(folder, selects=True)
    generator = torch.Generator().manual_seed(1)
    shape = (256, geometry.layout.kv_heads, geometry.layout.head_dim)
    k = torch.randn(shape, generator=generator)
    errors = []
    for layer in (0, 2):
        layout = geometry.layout_of(layer)
        near, _ = seal(k, k, layout)
        errors.append((near_keys(near, layout) - k.transpose(0, 1)).square().mean().item())
    assert errors[0] < errors[1] / 3  # a bin of half the width has a quarter of the error

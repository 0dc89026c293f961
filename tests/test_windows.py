"""Layers with a sliding window keep the pages that it shows, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plans_under_test import MiB, facts_of, model
from prefixes_under_test import (  # noqa: F401 - a fixture among them
    CELL,
    MORE,
    TEXT,
    last_logits,
    opened,
    short_texts_count,
)
from sessions_under_test import IDS
from small_llm import TINY, keep_in_memory, open_small, open_spilling

from ebbtide.kernels.layout import PageLayout
from ebbtide.offload.disk.spill_dir import prefix_dir
from ebbtide.offload.mode import Mode
from ebbtide.offload.pages.geometry import Geometry, choose_geometry
from ebbtide.offload.pages.page_table import Tier
from ebbtide.offload.pages.windows import Windows
from ebbtide.offload.planning.budget import Limits
from ebbtide.offload.planning.plan import Request
from ebbtide.offload.planning.planner import make_plan
from ebbtide.offload.running.sequence import raw_slots

CONTEXT = 1600
# Within the raw cells, within a span, of several spans.
WINDOWS = (20, 48, 150)
BOUNDED = Mode("bounded", selector_options={"epsilon": 0.05})
GREEDY = {"temperature": 0, "max_new_tokens": 40}


@pytest.fixture
def everything_is_kept(monkeypatch):
    """As if no window bounded what is kept; a call of it begins that."""

    def begin():
        monkeypatch.setattr(Windows, "bounds", lambda self, layer: False)
        monkeypatch.setattr(Windows, "keeps_pages", lambda self, layer: True)

    return begin


def geometry_of(cell: int, span: int) -> Geometry:
    page = 16
    return Geometry(cell, span, PageLayout(1, 16, page, cell // page if cell < 64 else 2))


@given(
    window=st.integers(1, 700),
    shape=st.sampled_from([(32, 64), (64, 64), (64, 256)]),
    sweep=st.integers(1, 5),
    newest=st.integers(0, 40),
    ends=st.lists(st.integers(0, 40) | st.floats(0, 40), max_size=2),
    has_begun=st.booleans(),
)
def test_what_a_query_sees_is_kept_and_little_else(window, shape, sweep, newest, ends, has_begun):
    """Wherever one may go on, against the definition of a window, token by token. ends: where
    snapshots were taken, in cells; has_begun: whether the cell behind them had begun, and that was
    interrupted."""
    cells, span_tokens = shape
    config = SimpleNamespace(page_windows=(window,), num_page_layers=1)
    geometry, slots = geometry_of(*shape), raw_slots(sweep)
    windows = Windows(config, geometry)
    snapshots = []
    for length in (int(end * cells) for end in ends if end <= newest):
        last = length // cells if has_begun else max(0, length - 1) // cells
        records = max(0, last - 1) * geometry.cell_records_of(geometry.layout)
        snapshots.append(
            SimpleNamespace(
                oldest_raw_cell=max(0, last - slots + 1), sealed_records=[records], last=last
            )
        )
    oldest = max(0, newest - slots + 1)
    sequence = SimpleNamespace(oldest_raw_cell=oldest, snapshots=snapshots)
    sealed = max(0, newest - 1) * cells
    kept = {
        span
        for spans in windows.spans_seen(0, sequence)
        for span in range(spans.start, min(spans.stop, -(-sealed // span_tokens)))
    }
    places = [(oldest, newest), *((s.oldest_raw_cell, s.last) for s in snapshots)]
    seen = set()
    for raw, last in places:
        for cell in range(raw + 1 if raw else 0, last + 1):
            # Queries of a cell may begin with its first row.
            visible = range(max(0, cell * cells - window + 1), max(0, cell - 1) * cells)
            seen.update(token // span_tokens for token in visible)
    if not windows.keeps_pages(0):
        assert not seen
        return
    assert seen <= kept
    most = windows.most_spans(1 << 20, sweep, 1 + len(snapshots))[0]
    assert len(kept) <= most


def turns(folder, spill_dir, **options) -> tuple[list, dict]:
    """A conversation that goes back and forks; what layers hold of it at the most."""
    most: dict[int, int] = {}
    with open_spilling(folder, spill_dir, context=CONTEXT, **options) as llm:
        with llm.session() as session:
            found, table = [], session._sequence.table
            store, windows = session._runtime.store, session._engine.sequences.windows

            def look():
                store.check_integrity(deep=True)
                for layer in range(table.num_layers):
                    if windows.bounds(layer):
                        spans = sum(e is not None for e in table.entries(layer))
                        most[layer] = max(most.get(layer, 0), spans)

            def answer(session, ids, **more):
                output = session.generate(ids, **{**GREEDY, **more})
                found.append([*output.token_ids, output.usage["recomputed_tokens"]])
                look()

            session.append(IDS)
            look()
            answer(session, IDS[:50])
            answer(session, IDS[50:90], max_new_tokens=300)  # spans go by
            session.undo()
            answer(session, IDS[90:300])
            with session.fork() as branch:
                answer(branch, IDS[300:420])
            answer(session, IDS[5:30])
            session.truncate(len(session.tokens) - 3)
            found.append(session.last_logits().clone())
            session.truncate(100)
            answer(session, IDS[:300])
            planned = windows.most_spans(CONTEXT, llm.plan.sweep_cells, 4)
            assert all(count <= planned[layer] for layer, count in most.items())
    return found, most


def windowed(checkpoint, name: str, window: int):
    """A checkpoint with windows, or chunks, of so many tokens."""
    is_chunked = name.startswith("llama4")
    return checkpoint(name, **{"attention_chunk_size" if is_chunked else "sliding_window": window})


def equal(found, others) -> bool:
    pairs = zip(found, others, strict=True)
    return all(torch.equal(*map(torch.as_tensor, pair)) for pair in pairs)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma4", "llama4-moe"])
def test_answers_are_those_of_who_keeps_everything(
    checkpoint, tmp_path, everything_is_kept, name, window
):
    folder = windowed(checkpoint, name, window)
    few, most = turns(folder, tmp_path, share=1.0)
    spilt, _ = turns(folder, tmp_path, share=0.3)
    selected = turns(folder, tmp_path, share=0.3, mode=BOUNDED)
    assert most and (max(most.values()) == 0) == (window <= TINY["cell_tokens"] + 1)
    everything_is_kept()
    whole, none = turns(folder, tmp_path, share=1.0)
    assert not none and equal(few, whole) and equal(spilt, whole)
    assert equal(selected[0], turns(folder, tmp_path, share=1.0, mode=BOUNDED)[0])


@pytest.mark.parametrize("window", [40, 100, 300])
@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma4", "llama4-moe"])
def test_a_text_that_was_read_is_found(checkpoint, tmp_path, everything_is_kept, name, window):
    """From whatever a session has of it already; the files have what windows show."""
    folder, taken = windowed(checkpoint, name, window), []
    with opened(folder, tmp_path, cap=None) as llm:
        expected, _ = last_logits(llm, TEXT + MORE)
    for place in ("windows", "everything"):
        (tmp_path / place).mkdir()
        with opened(folder, tmp_path / place) as llm:
            last_logits(llm, TEXT)
            for begun in (0, 1, 2, 5, 11, 13):
                with llm.open_session(2048, sequences=4) as session:
                    session.append(TEXT[: begun * CELL], process=False)
                    if begun:
                        session._prefill()
                        session.take_snapshot()
                    session.append(TEXT[begun * CELL :] + MORE, process=False)
                    session.find_kept()
                    assert session.take_restored() >= len(TEXT) - begun * CELL
                    session._runtime.store.check_integrity(deep=True)
                    assert torch.equal(session.last_logits(), expected)
                    session.truncate(begun * CELL + 3)
                    session.append(TEXT[begun * CELL + 3 :] + MORE)
                    assert torch.equal(session.last_logits(), expected)
        files = list(prefix_dir(tmp_path / place).iterdir())
        taken.append(sum(file.stat().st_size for file in files))
        if place == "windows":
            num_windows = sum(file.suffix == ".window" for file in files)
            assert (num_windows > 0) == (window > CELL + 1)
        everything_is_kept()
    assert taken[0] < taken[1] or window == 300  # with ends so near, and all layers windows


def test_a_context_takes_what_windows_show():
    """Of a model with windows in five of six layers, as planned and as it is."""
    limits, plans = Limits(None, 8 << 30, 0, 50 * MiB), []
    for window in (None, 1024):
        windows = ((window,) * 5 + (None,)) * 2
        config = replace(model(layers=12), windows=windows)
        geometry = choose_geometry(config, "8")
        plans.append(make_plan(facts_of(config), geometry, limits, Request(60_000)))
    whole, few = plans
    assert few.window_layers == 10 and "10 layers keep the pages of their windows" in str(few)
    assert few.far_bytes_per_token == pytest.approx(whole.far_bytes_per_token / 6)
    assert few.host["far planes"] < whole.host["far planes"] / 4
    assert few.host["near planes"] < whole.host["near planes"] / 4


@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma2", "gemma4", "llama4-moe"])
def test_what_is_planned_is_what_is_taken(checkpoint, tmp_path, name, sequences):
    """By all that a store reserves, in memory and spilt, of a text of any length."""
    folder = checkpoint(name) if name == "llama2" else windowed(checkpoint, name, 100)
    for share, context in ((1.0, CONTEXT), (0.3, CONTEXT), (1.0, 500), (1.0, TINY["cell_tokens"])):
        with open_spilling(folder, tmp_path, context=context, share=share) as llm:
            with llm.open_session(context, sequences=sequences) as session:
                reserved, plan = session._runtime.store.reserved_bytes(), llm.plan
                names = ("near planes", "far planes", "staging", "hot pages")
                assert reserved[Tier.HOST] == sum(plan.host[name] for name in names)
                assert reserved[Tier.DISK] == plan.disk["far planes"]


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma4"])
def test_what_is_taken_is_used(checkpoint, tmp_path, name):
    folder = checkpoint(name, sliding_window=100)
    with open_spilling(folder, tmp_path, context=CONTEXT, share=1.0) as llm:
        with llm.open_session(CONTEXT, sequences=1) as session:
            for start in range(0, CONTEXT, 300):
                session.append((IDS * 3)[start : min(start + 300, CONTEXT)])
            session.last_logits()
            peaks = sum(usage.peak_bytes for usage in session._runtime.store.usage().values())
            assert 0.7 * llm.plan.kv_far_bytes <= peaks <= llm.plan.kv_far_bytes


@pytest.mark.parametrize("name", ["mistral", "gemma4"])
def test_questions_that_end_with_a_cell_take_no_more_than_is_planned(checkpoint, tmp_path, name):
    """Of the cell before the last a snapshot has the raw tokens, and needs no page."""
    with open_spilling(checkpoint(name), tmp_path, context=CONTEXT, share=1.0) as llm:
        with llm.session() as session:
            table, cell = session._sequence.table, TINY["cell_tokens"]
            windows = session._engine.sequences.windows
            for ids in (IDS[: 4 * cell], IDS[: 9 * cell - 39], IDS):
                session.generate(ids, **GREEDY)
                most = windows.most_spans(CONTEXT, 1, 1 + len(session._sequence.snapshots))
                for layer in filter(windows.bounds, range(table.num_layers)):
                    kept = [extent for extent in table.entries(layer) if extent is not None]
                    assert len(kept) <= most[layer]
            assert len(session.tokens) > 13 * cell and len(session._sequence.snapshots) == 2


@pytest.mark.parametrize("name", ["llama2", "gemma3", "gemma4"])
@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_token_reads_from_each_tier_what_is_planned(checkpoint, tmp_path, name, sequences, share):
    """What windows show is in memory, whatever is on disk; of the layers that keep all, a span each
    may lie elsewhere than the plan has it, since homes are dealt out as the text grows."""
    with open_small(checkpoint(name), tmp_path, store={"overlap": False}, **TINY) as llm:
        llm._context = CONTEXT
        keep_in_memory(llm, CONTEXT, share, sequences=sequences, text=True)
        with llm.open_session(CONTEXT, sequences=sequences) as session:
            session.append((IDS * 3)[: CONTEXT - 1])
            session.last_logits()
            stats, config = session._runtime.store.stats, llm.config
            before = dict(stats.bytes_read)
            session.decode(1)
            read = {tier: count - before[tier] for tier, count in stats.bytes_read.items()}
            windows = session._engine.sequences.windows
            keeping = [n for n in range(config.num_page_layers) if not windows.bounds(n)]
            readers = sum(config.kv_pages.count(layer) for layer in keeping)
            difference = read["disk"] - llm.plan.decode_bytes["disk"]
            assert abs(difference) <= readers * llm.geometry.span_bytes

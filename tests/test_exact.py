"""Exact mode: logits are the same to the bit whatever the tiers, the budget, the timing, the
predictor and the pieces in which text came.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from small_llm import CELL_TOKENS, PAGE_TOKENS, TINY, hold, keep_in_memory, open_small

from ebbtide.offload.planning.plan import Loaded
from ebbtide.offload.running.scoring import output_bytes

NUM_TOKENS = 1000
PREFILLED = 900  # the rest goes through decode, and crosses a cell's border
IDS = torch.randint(0, 256, (NUM_TOKENS,), generator=torch.Generator().manual_seed(9)).tolist()


def run(folder, spill_dir, *, share=1.0, store=None, sweep=None, **options):
    """Logits of IDS, and the store's traffic."""
    with open_small(folder, spill_dir, store=store, **options) as llm:
        if sweep is not None:
            request = llm.admission.request
            llm.admission.request = lambda *a, **k: request(*a, **{**k, "sweep_cells": sweep})
        keep_in_memory(llm, NUM_TOKENS, share)
        logits = llm.logits(IDS, prefill_tokens=PREFILLED)
        return logits, llm.last_stats


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("qwen2")  # biases on keys: the most that sealed pages leave out


@pytest.fixture(scope="module")
def in_memory(folder, tmp_path_factory):
    logits, stats = run(folder, tmp_path_factory.mktemp("spill"))
    assert stats.bytes_read["disk"] == 0 and stats.bytes_read["host"] > 0
    return logits


@pytest.mark.parametrize("share", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlapped", "plain"])
def test_tiers_do_not_matter(folder, in_memory, tmp_path, share, overlap):
    logits, stats = run(folder, tmp_path, share=share, store={"overlap": overlap})
    assert torch.equal(logits, in_memory)
    assert stats.bytes_read["disk"] > 0
    assert (stats.bytes_read["host"] > 0) == (share > 0)


@pytest.mark.parametrize("predictor", ["history", "in_order"])
def test_delays_and_predictors_do_not_matter(folder, in_memory, tmp_path, predictor):
    chance = random.Random(3)
    delayed = {"read_delay": lambda: chance.random() * 2e-3, "predictor": predictor}
    logits, stats = run(folder, tmp_path, share=0.25, store=delayed)
    assert torch.equal(logits, in_memory)
    assert stats.hits + stats.late + stats.misses > 0


class Liar:
    """A predictor that is wrong in every way there is."""

    def predict(self, layer, num_spans):
        return [num_spans + 3, -1, *reversed(range(num_spans)), 0, 0]

    def record(self, layer, spans):
        pass


def test_a_lying_predictor_changes_no_bit(folder, in_memory, tmp_path):
    logits, _ = run(folder, tmp_path, share=0.0, store={"predictor": Liar(), "staging_slots": 2})
    assert torch.equal(logits, in_memory)


@pytest.mark.parametrize("sweep", [2, 5])
def test_sweeps_of_several_cells_do_not_matter(folder, in_memory, tmp_path, sweep):
    logits, _ = run(folder, tmp_path, share=0.25, sweep=sweep)
    assert torch.equal(logits, in_memory)


@pytest.mark.parametrize("streamed", [(1, True), (2, False), (3, False)])
def test_streamed_weights_do_not_matter(folder, in_memory, tmp_path, streamed):
    with open_small(folder, tmp_path) as llm:
        keep_in_memory(llm, NUM_TOKENS, 1.0)
        hold(llm, Loaded(*streamed))
        logits = llm.logits(IDS, prefill_tokens=PREFILLED)
        assert llm.admission.weights.bytes_streamed > 0
    assert torch.equal(logits, in_memory)


@pytest.mark.parametrize("bits", ["8", "4"])
def test_streamed_quantised_weights_do_not_matter(folder, tmp_path, bits):
    results = []
    for streamed in ((0, True), (2, False)):
        with open_small(folder, tmp_path, weight_bits=bits) as llm:
            hold(llm, Loaded(*streamed))
            results.append(llm.logits(IDS[:150], prefill_tokens=100))
    assert torch.equal(*results)


def test_near_planes_that_lie_with_their_far_planes_do_not_matter(folder, in_memory, tmp_path):
    with open_small(folder, tmp_path) as llm:
        keep_in_memory(llm, NUM_TOKENS, 0.0)
        hold(llm, Loaded(0, True))  # weights stay, so that near planes are what gives way
        output = output_bytes(llm.config.vocab_size, NUM_TOKENS)
        while llm.admission.plan(NUM_TOKENS, text=False, output_bytes=output).near_resident:
            limits = llm.admission.limits
            llm.admission.limits = replace(limits, host_bytes=limits.host_bytes - 256)
        logits = llm.logits(IDS, prefill_tokens=PREFILLED)
        assert not llm.plan.near_resident and llm.plan.host["near planes"] == 0
    assert torch.equal(logits, in_memory)


@pytest.mark.parametrize("piece", [1, 7, PAGE_TOKENS - 1, PAGE_TOKENS + 1, CELL_TOKENS])
def test_pieces_do_not_matter(folder, in_memory, tmp_path, piece):
    with open_small(folder, tmp_path) as llm:
        keep_in_memory(llm, NUM_TOKENS, 0.25, sequences=4, text=True)
        llm._context = NUM_TOKENS
        with llm.session() as session:
            for start in range(0, PREFILLED, piece):
                session.append(IDS[start : min(start + piece, PREFILLED)])
                if start % 3 == 0:
                    session.last_logits()  # processes part of a cell
            rows = [session.last_logits()]
            rows += [session.decode(token) for token in IDS[PREFILLED:]]
    assert torch.equal(torch.stack(rows), in_memory[PREFILLED - 1 :])


@pytest.mark.parametrize("codec", ["full", "6", "4"])
def test_every_codec_is_exact(folder, tmp_path, codec):
    one, _ = run(folder, tmp_path, codec=codec)
    other, stats = run(folder, tmp_path, codec=codec, share=0.3)
    assert torch.equal(one, other) and stats.bytes_read["disk"] > 0


@pytest.mark.parametrize("name", ["mistral", "qwen2-window"])
@pytest.mark.parametrize("window", [48, 400], ids=["within a span", "of several spans"])
def test_windows_are_exact_too(checkpoint, tmp_path, name, window):
    folder = checkpoint(name, sliding_window=window)
    one, _ = run(folder, tmp_path, **TINY)
    other, stats = run(folder, tmp_path, share=0.0, sweep=3, **TINY)
    assert torch.equal(one, other)
    # Less than what is staged of pages is not worth staging.
    assert window < 400 or stats.bytes_read["disk"] > 0


def test_a_fork_goes_on_as_its_parent_would(folder, in_memory, tmp_path):
    with open_small(folder, tmp_path) as llm:
        keep_in_memory(llm, NUM_TOKENS, 0.25, sequences=4, text=True)
        llm._context = NUM_TOKENS
        with llm.session() as session:
            session.append(IDS[:200])
            session.last_logits()
            with session.fork() as other:
                other.append(list(reversed(IDS[:180])))
                other.last_logits()
            with session.fork() as other:
                other.append(IDS[200:PREFILLED])
                assert torch.equal(other.last_logits(), in_memory[PREFILLED - 1])
            session.append(IDS[200:PREFILLED])
            assert torch.equal(session.last_logits(), in_memory[PREFILLED - 1])


@pytest.mark.parametrize("back_to", [0, 1, 130, 200, 255, 256, 299])
def test_a_truncated_session_is_as_if_it_had_never_gone_further(
    folder, in_memory, tmp_path, back_to
):
    with open_small(folder, tmp_path) as llm:
        llm._context = NUM_TOKENS
        with llm.session() as session:
            session.append(IDS[:200])
            session.last_logits()
            session.take_snapshot()
            session.append(list(reversed(IDS[:100])))
            session.last_logits()
            session.truncate(back_to)
            kept = session.tokens
            assert kept == (IDS[:200] + list(reversed(IDS[:100])))[:back_to]
            if back_to <= 200:
                session.append(IDS[back_to:PREFILLED])
                assert torch.equal(session.last_logits(), in_memory[PREFILLED - 1])
            else:
                assert session.last_logits() is not None
            recomputed = session.take_recomputed()
            # Within the raw cells and from the snapshot nothing is processed twice but, at most,
            # the last token of what was kept.
            if back_to in (0, 200, 255, 256, 299):
                assert recomputed <= (back_to - 200 if back_to > 200 else 1)

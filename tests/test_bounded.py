"""Bounded mode: what is selected depends on the query and the pages alone, and what is left out is
as small as it says.
"""

from __future__ import annotations

import random

import pytest
import torch
from page_stores import until
from small_llm import TINY, keep_in_memory, open_small

from ebbtide import LLM
from ebbtide.offload.errors import InputError
from ebbtide.offload.layers import selected_attention
from ebbtide.offload.layers.selection_steps import TorchSteps
from ebbtide.offload.mode import Mode
from ebbtide.prefetch import audit, foresight
from ebbtide.prefetch.foresight import FORESIGHTS, make_foresight

NUM_TOKENS, PREFILLED = 1000, 950
IDS = torch.randint(0, 256, (NUM_TOKENS,), generator=torch.Generator().manual_seed(9)).tolist()
EPSILON = 0.05
BOUNDED = Mode("bounded", selector_options={"epsilon": EPSILON})


@pytest.fixture(autouse=True)
def rehearsed(monkeypatch) -> None:
    """Layers this small are rehearsed too."""
    monkeypatch.setattr(foresight, "STEPS_BYTES", 0)


def run(folder, spill_dir, mode=BOUNDED, *, share=1.0, at_home=False, store=None, **options):
    """Logits of IDS, most of them prefilled; the store's traffic; what was left out."""
    with open_small(folder, spill_dir, mode=mode, store=store, **options) as llm:
        keep_in_memory(llm, NUM_TOKENS, share, at_home=at_home)
        kept = {}
        opened = llm.open_session

        def watched(*args, **kwargs):
            session = opened(*args, **kwargs)
            kept["fidelity"] = getattr(session._engine.selected, "fidelity", None)
            kept["trail"] = session._sequence.trail
            kept["audit"] = getattr(session._engine.selected, "audit", None)
            return session

        llm.open_session = watched
        logits = llm.logits(IDS, prefill_tokens=PREFILLED)
        return logits, llm.last_stats, kept


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("qwen2")


@pytest.fixture(scope="module")
def in_memory(folder, tmp_path_factory):
    return run(folder, tmp_path_factory.mktemp("spill"))[0]


@pytest.mark.parametrize("name", FORESIGHTS)
@pytest.mark.parametrize(("share", "at_home"), [(0.0, False), (0.4, False), (0.4, True)])
def test_foresight_and_tiers_change_no_bit(folder, in_memory, tmp_path, name, share, at_home):
    mode = Mode("bounded", selector_options={"epsilon": EPSILON}, foresight=name)
    logits, stats, kept = run(folder, tmp_path, mode, share=share, at_home=at_home)
    assert torch.equal(logits, in_memory)
    assert stats.bytes_read["disk"] > 0
    if not share:  # with more memory layers may lack too little
        assert bool(kept["trail"].rehearsed) == make_foresight(name).needs_query


def test_the_steps_of_any_selector_give_the_bits_of_the_compiled_ones(
    folder, in_memory, tmp_path, monkeypatch
):
    monkeypatch.setattr(selected_attention, "compiled_choice", lambda selector: None)
    for share in (0.0, 1.0):
        assert torch.equal(run(folder, tmp_path, share=share)[0], in_memory)


class Liar:
    """A foresight that is wrong in every way there is."""

    needs_query = True

    def expect(self, rehearsed, last):
        return torch.tensor([10**6, -1, 5, 5, 3, 0, 17])


def test_a_lying_foresight_changes_no_bit(folder, in_memory, tmp_path, monkeypatch):
    monkeypatch.setitem(FORESIGHTS, "liar", Liar)
    mode = Mode("bounded", selector_options={"epsilon": EPSILON}, foresight="liar")
    assert torch.equal(run(folder, tmp_path, mode, share=0.0)[0], in_memory)


@pytest.mark.parametrize(
    "store",
    [
        {"overlap": False},
        {"hot_records": 2},
        {"hot_records": 3, "eviction": "least_recent"},
        {"io_threads": 1},
    ],
    ids=lambda store: "-".join(map(str, store.values())),
)
def test_caches_and_threads_change_no_bit(folder, in_memory, tmp_path, store):
    chance = random.Random(3)
    store = {"read_delay": lambda: chance.random() * 1e-3, **store}
    assert torch.equal(run(folder, tmp_path, share=0.0, store=store)[0], in_memory)


def test_pieces_change_no_bit(folder, in_memory, tmp_path):
    with open_small(folder, tmp_path, mode=BOUNDED) as llm:
        keep_in_memory(llm, NUM_TOKENS, 0.3, sequences=4, text=True)
        llm._context = NUM_TOKENS
        with llm.session() as session:
            for start in range(0, PREFILLED, 90):
                session.append(IDS[start : min(start + 90, PREFILLED)])
            rows = [session.last_logits()]
            with session.fork() as other:  # what a fork does is nobody else's business
                other.append(IDS[:50])
                other.last_logits()
            rows += [session.decode(token) for token in IDS[PREFILLED:]]
    assert torch.equal(torch.stack(rows), in_memory[PREFILLED - 1 :])


@pytest.mark.parametrize(
    "name",
    [
        *("llama3", "mistral", "qwen2-window", "qwen3", "cohere2", "hunyuan", "apertus"),
        *("falcon-h1", "nemotron-h", "lfm3", "granite-swa", "laguna-moe"),
    ],
)
def test_selecting_everything_is_exact_mode_up_to_rounding(checkpoint, tmp_path, name):
    folder = checkpoint(name)
    everything = Mode("bounded", selector="everything")
    selected = run(folder, tmp_path, everything, share=0.0, **TINY)[0]
    exact = run(folder, tmp_path, Mode(), share=0.0, **TINY)[0]
    # The same sums in another order: float32's rounding, some 20 times over; and a key or value on
    # the border between two of its 255 codes may be sealed to the other one.
    assert torch.allclose(selected, exact, atol=1e-4 * exact.abs().max().item(), rtol=0)
    assert torch.equal(selected[:PREFILLED], exact[:PREFILLED]), "prefill is exact"


def test_a_smaller_epsilon_leaves_less_out(folder, tmp_path):
    exact = run(folder, tmp_path, Mode())[0][PREFILLED:]
    errors, shares = [], []
    for epsilon in (0.3, 0.03, 0.003):
        options = {"epsilon": epsilon, "criterion": "misplaced"}
        logits, _, kept = run(folder, tmp_path, Mode("bounded", selector_options=options))
        said = kept["fidelity"].to_dict()
        # The estimate that was chosen by and the one that is reported differ in what they take as
        # all mass: before and after the selected pages were attended. A tenth covers that.
        assert said["misplaced_mass"]["max"] <= epsilon * 1.1
        errors.append((logits[PREFILLED:] - exact).abs().mean().item())
        shares.append(said["selected_share"])
    assert errors == sorted(errors, reverse=True) and shares == sorted(shares)
    assert 0 < shares[0] < 1


def test_only_what_is_selected_is_read(folder, tmp_path):
    few = Mode("bounded", selector_options={"epsilon": 0.5}, foresight="nothing")
    all_ = Mode("bounded", selector="everything", foresight="nothing")
    reads = [run(folder, tmp_path, mode, share=0.0)[1].bytes_read["disk"] for mode in (few, all_)]
    assert reads[0] < reads[1]


def test_pages_that_no_step_selected_are_counted(folder, tmp_path):
    _, _, kept = run(folder, tmp_path, Mode("bounded", selector="window", selector_options={}))
    assert sum(kept["trail"].never_selected().values()) > 0
    _, _, kept = run(folder, tmp_path, Mode("bounded", selector="everything"))
    assert sum(kept["trail"].never_selected().values()) == 0


def test_looking_at_what_was_left_out_changes_no_bit(folder, tmp_path, monkeypatch):
    mode = Mode("bounded", selector="window", selector_options={})
    monkeypatch.setattr(audit, "EVERY_TOKENS", 10**6)
    unseen, _, kept = run(folder, tmp_path, mode, share=0.0)
    assert kept["audit"].num_drawn == 0
    monkeypatch.setattr(audit, "EVERY_TOKENS", 1)
    seen, _, kept = run(folder, tmp_path, mode, share=0.0)
    assert torch.equal(seen, unseen)
    assert kept["audit"].num_drawn == (NUM_TOKENS - PREFILLED) * audit.NUM_DRAWS


def test_a_look_finds_the_mass_that_attending_everything_finds(folder, tmp_path, monkeypatch):
    """In the first layer of the first decoded token, where both runs have the same query."""
    totals, looks, finish = [], [], TorchSteps.finish

    def watched(self):
        done = finish(self)
        totals.append(self.left_out()[1])
        return done

    def note(self, shares, true_shares, drawn, counts):
        looks.append((shares.sum(-1), true_shares.sum(0), drawn, shares))

    monkeypatch.setattr(TorchSteps, "finish", watched)
    monkeypatch.setattr(audit.Audit, "note", note)
    monkeypatch.setattr(audit, "layer_due", lambda num_layers, position: 0)
    monkeypatch.setattr(audit, "NUM_DRAWS", 20_000)  # nothing with any mass is passed over
    run(folder, tmp_path, Mode("bounded", selector="everything", selector_options={}))
    everything = totals[0]
    totals.clear()
    run(folder, tmp_path, Mode("bounded", selector="window", selector_options={}))
    estimated, true, drawn, shares = looks[0]
    assert len(drawn) == int((shares.sum((0, 1)) > 0).sum()) > 10
    # With the truth in the estimate's place a head's mass is the whole one, but for float32 sums.
    corrected = totals[0] + (1 - estimated + true).log()
    assert torch.allclose(corrected, everything, rtol=0, atol=1e-4)


def test_deadline_mode_never_waits_and_says_what_it_missed(folder, tmp_path):
    mode = Mode("deadline", selector_options={"epsilon": EPSILON}, foresight="nothing")
    with open_small(folder, tmp_path, mode=mode) as llm:
        keep_in_memory(llm, NUM_TOKENS, 0.0, sequences=4, text=True)
        llm._context = NUM_TOKENS
        with llm.session() as session:
            session.append(IDS[:PREFILLED])
            session.last_logits()
            stats, fidelity = session._runtime.store.stats, session._engine.selected.fidelity
            before = stats.snapshot()
            rows = [session.decode(token) for token in IDS[PREFILLED : PREFILLED + 20]]
            spent = stats - before
    assert (spent.misses, spent.late, spent.stall_s) == (0, 0, 0.0)
    assert torch.isfinite(torch.stack(rows)).all()
    assert fidelity.dropped > 0, "the first token finds nothing read"
    assert fidelity.to_dict()["missed_mass"]["max"] > 0


def test_what_came_too_late_in_deadline_mode_is_there_for_the_next_token(folder, tmp_path):
    """The wish that a layer makes for what it lacked outlives its own turn."""
    mode = Mode("deadline", selector_options={"epsilon": EPSILON}, foresight="nothing")
    with open_small(folder, tmp_path, mode=mode, store={"hot_records": 1000}) as llm:
        keep_in_memory(llm, NUM_TOKENS, 0.0, sequences=4, text=True)
        llm._context = NUM_TOKENS
        with llm.session() as session:
            session.append(IDS[:PREFILLED])
            session.last_logits()
            session.decode(IDS[PREFILLED])
            table, asked = session._sequence.table, session._sequence.trail.last
            records = session._runtime.store.records
            assert session._engine.selected.fidelity.dropped > 0
            for layer, wanted in asked.items():
                assert len(wanted)
                until(lambda at=(layer, wanted): records.is_ready(table, *at).all(), "read")


def test_full_pages_cannot_be_selected(folder):
    with pytest.raises(InputError, match="--kv-bits 8, 6, 4"):
        LLM.open(folder, mode="bounded", kv_bits="full")


def test_an_unknown_mode_names_the_known_ones(folder):
    with pytest.raises(InputError, match="exact, bounded, deadline"):
        LLM.open(folder, mode="fast")


def test_an_unknown_foresight_names_the_known_ones():
    with pytest.raises(ValueError, match="history, nothing, rehearsal, union"):
        make_foresight("crystal ball")


def test_output_says_what_was_left_out(folder, tmp_path):
    with open_small(folder, tmp_path, mode=BOUNDED) as llm:
        kv = llm.generate(IDS, max_new_tokens=5, temperature=0).kv
    assert 0 < kv["misplaced_mass"]["max"] <= kv["missed_mass"]["max"] < 1
    assert 0 < kv["selected_share"] <= 1 and kv["pages_never_attended"] >= 0
    assert kv["dropped_records"] == 0

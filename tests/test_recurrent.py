"""Layers that keep a state in place of keys and values: whatever is interrupted has changed
nothing, going back costs no more than it must, and memory is what the plan says. That their logits
are those of transformers, in any cut and from any tier, stands in test_families.py, and sessions of
all kinds in test_prefix_sessions.py.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from interruptions import interrupted_after
from sessions_under_test import IDS
from small_llm import TINY, open_small

from ebbtide.offload.decoder import Decoder
from ebbtide.offload.engine import Engine
from ebbtide.offload.errors import BadCheckpoint, UnsupportedModel
from ebbtide.offload.mode import Mode
from ebbtide.offload.model_config import read_model_config
from ebbtide.offload.planner import Request, make_plan
from ebbtide.offload.sequence import Sequence
from ebbtide.offload.states import States

HYBRIDS = ["qwen3.5", "granite4-h", "lfm2"]
CELL = TINY["cell_tokens"]
TEXT, ANSWER = IDS[:140], IDS[140:210]
TRACED = [
    *(Decoder.recur, Engine.prefill, Engine.decode, Engine.settle, Engine._keep_processed),
    *(Sequence.decoded, Sequence.prefilled, Sequence._commit, Sequence.resume_point),
    *(States.begin, States.commit, States.of, States.newest),
]


def opened(folder, place, *, sweep_cells: int = 1, **options):
    llm = open_small(folder, place, **TINY, **options)
    llm._context = 1024
    plan = llm.admission.plan
    llm.admission.plan = lambda *a, **k: replace(plan(*a, **k), sweep_cells=sweep_cells)
    return llm


@pytest.mark.parametrize("sweep_cells", [1, 3])
@pytest.mark.parametrize("name", HYBRIDS)
def test_an_interrupted_reading_goes_on_to_the_bit(checkpoint, tmp_path, name, sweep_cells):
    """At every fifth line that a run of cells takes, within a cell and at its edges."""
    with opened(checkpoint(name), tmp_path, sweep_cells=sweep_cells) as llm:
        expected = []
        for at in range(1, 5000, 5):
            with llm.open_session(1024, sequences=1) as session:
                session.append(TEXT[:20], process=False)
                session.last_logits()
                session.append(TEXT[20:], process=False)
                is_interrupted = interrupted_after(at, TRACED, session.last_logits)
                expected.append(session.last_logits().clone())
                assert session._sequence.states.length == len(TEXT)
            if not is_interrupted:
                break
        assert at > 50
    assert all(torch.equal(row, expected[-1]) for row in expected)


@pytest.mark.parametrize("mode", ["exact", "bounded"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_an_interrupted_token_is_decoded_anew_to_the_bit(checkpoint, tmp_path, name, mode):
    """At each line that decoding a token takes, and at another one for each token."""
    with opened(checkpoint(name), tmp_path, mode=Mode(mode)) as llm:

        def rows(interrupted: bool) -> list[torch.Tensor]:
            found, at = [], 0
            with llm.open_session(1024, sequences=1) as session:
                sequence, engine = session._sequence, session._engine
                session.append(TEXT, process=False)
                session.last_logits()
                for token in ANSWER:
                    sequence.tokens.append(token)
                    if interrupted:
                        at += 1
                        interrupted_after(at, TRACED, lambda: engine.decode(sequence))
                        engine.settle(sequence)
                    if sequence.length < len(sequence.tokens):
                        found.append(engine.logits(engine.decode(sequence))[0].clone())
                    else:  # it was done, and what came of it is lost
                        found.append(None)
            return found

        expected, got = rows(False), rows(True)
    compared = [torch.equal(a, b) for a, b in zip(expected, got, strict=True) if b is not None]
    assert all(compared) and len(compared) > 20


@pytest.mark.parametrize("name", HYBRIDS)
def test_going_back_costs_less_than_a_cell_as_long_as_cells_are_raw(checkpoint, tmp_path, name):
    with opened(checkpoint(name), tmp_path) as llm, llm.session() as session:
        session.append(TEXT, process=False)
        expected = session.last_logits().clone()
        within = len(TEXT) % CELL
        for back, recomputed in ((1, within - 1), (within, 0)):
            session.truncate(len(TEXT) - back)
            session.append(TEXT[len(TEXT) - back :], process=False)
            assert torch.equal(session.last_logits(), expected)
            assert session.take_recomputed() == recomputed
        session.truncate(len(TEXT) - 3 * CELL)
        session.append(TEXT[len(TEXT) - 3 * CELL :], process=False)
        assert torch.equal(session.last_logits(), expected)
        assert session.take_recomputed() == len(TEXT) - 3 * CELL  # from the start


@pytest.mark.parametrize("name", HYBRIDS)
def test_an_answer_is_made_again_without_reading_anything(checkpoint, tmp_path, name):
    """The state behind a prompt is kept with the raw cells: the last two prompts can be gone back
    to from any distance."""
    with opened(checkpoint(name), tmp_path) as llm, llm.session() as session:
        first = session.generate(TEXT, max_new_tokens=100)
        held = session.tokens
        session.generate(ANSWER, max_new_tokens=50)
        session.undo()
        assert session.tokens == held
        session.truncate(len(TEXT))
        again = session.generate(max_new_tokens=100)
        assert again.token_ids == first.token_ids
        assert again.usage["recomputed_tokens"] == 0


@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("sweep_cells", [1, 8])
@pytest.mark.parametrize("name", HYBRIDS)
def test_the_plan_counts_every_copy(checkpoint, tmp_path, name, sequences, sweep_cells):
    with opened(checkpoint(name), tmp_path) as llm:
        request = Request(1024, sequences, sweep_cells=sweep_cells)
        plan = make_plan(llm.admission.facts, llm.geometry, llm.admission.limits, request)
        with llm.open_session(1024, sequences=sequences) as session:
            session._engine.sweep_cells = sweep_cells
            states = session._engine.open_sequence(1024).states
            held = sum(copy.nbytes for copy in states._copies) * min(2, sequences)
            held += max(0, sequences - 2) * states.newest(0).nbytes  # snapshots
            recurrent = llm.config.recurrent
            held += 4 * sum(r.channels * r.conv_width for r in recurrent)
    assert plan.host["recurrent states"] == held


def test_nothing_is_guessed_where_nothing_can_be_taken_back(checkpoint, tmp_path):
    with opened(checkpoint("qwen3.5"), tmp_path) as llm:
        output = llm.generate(TEXT * 2, max_new_tokens=5)
        assert llm.plan.drafts is None
        assert set(output.usage["completion_tokens_details"].values()) == {0}


@pytest.mark.parametrize(
    ("name", "field", "value", "says"),
    [
        ("qwen3.5", "linear_num_value_heads", 3, "cannot share"),
        ("qwen3.5", "linear_conv_kernel_dim", 1, "linear_conv_kernel_dim"),
        ("qwen3.5", "layer_types", ["linear_attention"] * 3, "no layer attends"),
        ("qwen3.5", "layer_types", ["linear_attention", "delta", "full_attention"], "'delta'"),
        ("granite4-h", "mamba_d_head", 24, "do not make"),
        ("granite4-h", "mamba_n_groups", 3, "cannot share"),
        ("granite4-h", "time_step_limit", [1.0], "time_step_limit"),
        ("granite4-h", "time_step_limit", [float("nan"), 1.0], "time_step_limit"),
        ("lfm2", "conv_L_cache", 0, "conv_L_cache"),
        ("lfm2", "full_attn_idxs", 1, "full_attn_idxs"),
    ],
)
def test_what_is_wrong_in_a_configuration_is_named(checkpoint, tmp_path, name, field, value, says):
    config = json.loads((checkpoint(name) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises((BadCheckpoint, UnsupportedModel), match=says):
        read_model_config(tmp_path)

"""Tokens that are verified together have the bits of tokens that are decoded one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from model_matrix import VARIANTS
from random_checkpoints import make
from sessions_under_test import IDS, LONG
from small_llm import hold, open_spilling

from ebbtide.kernels import dispatch
from ebbtide.offload.mode import Mode
from ebbtide.offload.planning.plan import Loaded

needs_kernels = pytest.mark.skipif(dispatch._cpu is None, reason="no compiled kernels here")

pytestmark = pytest.mark.usefixtures("few_pages")
NUM_TOKENS, PREFILLED = 210, 3  # three: the sink's rows are verified as well
TOKENS = IDS[:NUM_TOKENS]


def opened(folder, spill_dir, **options):
    return open_spilling(folder, spill_dir, context=NUM_TOKENS, **options)


def verified(llm, session, count: int) -> torch.Tensor:
    """Logits of TOKENS from PREFILLED on, `count` at a time."""
    session.append(TOKENS[:PREFILLED])
    session.last_logits()
    engine, sequence, rows, at = session._engine, session._sequence, [], PREFILLED
    while at < NUM_TOKENS:
        some = TOKENS[at : at + min(count, engine.room_to_verify(sequence))]
        rows.append(engine.logits(engine.verify(sequence, some)))
        assert sequence.length == len(sequence.tokens) == at
        sequence.tokens.extend(some)
        for _ in some:
            engine.take_in(sequence)
        at += len(some)
    session._runtime.store.check_integrity(deep=True)
    return torch.cat(rows)


def decoded(session) -> torch.Tensor:
    session.append(TOKENS[:PREFILLED])
    session.last_logits()
    return torch.stack([session.decode(token) for token in TOKENS[PREFILLED:]])


def assert_same_bits(llm, count: int) -> None:
    with llm.session() as session:
        expected = decoded(session)
    with llm.session() as session:
        assert torch.equal(verified(llm, session, count), expected)


@needs_kernels
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "name",
    [
        *("llama3", "qwen2", "gemma2", "ministral3", "olmoe", "youtu", "laguna-moe", "phi"),
        *("qwen2-head10", "olmo-clip", "qwen3.5", "falcon-h1"),
    ],
)
def test_verifying_selects_for_each_token_what_decoding_does(checkpoint, tmp_path, name, share):
    """And counts the same, but for the looks at estimates, which are the first token's alone."""
    mode, found = Mode("bounded", selector_options={"epsilon": 0.05}), []
    with opened(checkpoint(name), tmp_path, share=share, mode=mode) as llm:
        for run in (lambda s: decoded(s), lambda s: verified(llm, s, 5)):
            with llm.session() as session:
                logits, selected = run(session), session._engine.selected
                never = session._sequence.trail.never_selected()
                found.append((logits, selected.fidelity.take(), never))
    (expected, counted, never), (logits, again, never_again) = found
    assert torch.equal(logits, expected)
    assert 0 < counted.selected < counted.offered
    assert again == counted and never_again == never


@needs_kernels
def test_what_was_guessed_wrong_counts_for_nothing(checkpoint, tmp_path):
    with opened(checkpoint("llama3"), tmp_path, mode=Mode("bounded")) as llm:
        with llm.session() as session:
            session.append(TOKENS[:150])
            session.last_logits()
            engine, sequence = session._engine, session._sequence
            engine.verify(sequence, [5, 6, 7, 8])
            assert engine.selected.fidelity.selections == 0
            engine.verify(sequence, [9, 9])
            for selections in (1, 2):
                sequence.tokens.append(9)
                engine.take_in(sequence)
                assert engine.selected.fidelity.selections == selections * llm.config.num_layers
            assert sequence.length == 152 and not sequence.verified


@needs_kernels
@pytest.mark.parametrize(
    ("name", "codec", "share"),
    [
        *((name, "8", 0.3) for name in VARIANTS),
        *((name, "8", share) for name in ("llama3", "mistral", "olmoe") for share in (0.0, 1.0)),
        *((name, codec, 0.3) for name in ("qwen2", "gemma2") for codec in ("4", "full")),
        *(("qwen2-head10", codec, 0.3) for codec in ("4", "full")),
    ],
)
def test_verifying_gives_the_bits_of_decoding(checkpoint, tmp_path, name, codec, share):
    with opened(checkpoint(name), tmp_path, codec=codec, share=share) as llm:
        assert_same_bits(llm, 5)


@needs_kernels
@pytest.mark.parametrize("head_dim", [16, 32])
def test_queries_that_grow(tmp_path, head_dim):
    """Where the scale of a head is no power of two, it must be multiplied at once."""
    folder = make("ministral3", tmp_path / "model", head_dim=head_dim)
    with opened(folder, tmp_path) as llm:
        assert_same_bits(llm, 7)


@needs_kernels
@pytest.mark.parametrize(
    ("name", "weight_bits"),
    [
        *(("llama2", "8"), ("llama2", "4"), ("qwen3.5", "4"), ("bamba-biases", "8")),
        *(("lfm2-biases", "8"), ("jamba", "8"), ("kimi-linear-moe", "8"), ("qwen3-next", "full")),
    ],
)
def test_quantised_and_streamed_weights(checkpoint, tmp_path, name, weight_bits):
    """States are made once more when the weights of their layers are no longer there."""
    with opened(checkpoint(name), tmp_path, weight_bits=weight_bits) as llm:
        with llm.session() as session:
            expected = decoded(session)
        with llm.session() as session:
            assert torch.equal(verified(llm, session, 7), expected)
        limits = llm.admission.limits
        streams = llm.admission.plan(NUM_TOKENS, 4, loaded=Loaded(2, False))
        llm.admission.limits = replace(limits, host_bytes=sum(streams.host.values()))
        llm.admission.close()
        hold(llm, Loaded(2, False))
        with llm.session() as session:
            assert session._runtime.plan.layers_streamed == 2
            assert torch.equal(verified(llm, session, 7), expected)


@needs_kernels
@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_any_number_of_tokens_together(checkpoint, tmp_path, count):
    with opened(checkpoint("qwen2"), tmp_path) as llm:
        assert_same_bits(llm, count)


def test_every_instruction_set_gives_the_bits_of_decoding(checkpoint, tmp_path, kernels):
    if kernels == "reference":
        pytest.skip("products of the reference have other bits for several rows")
    with opened(checkpoint("qwen2"), tmp_path) as llm:
        assert_same_bits(llm, 7)


@needs_kernels
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(checkpoint, tmp_path, threads):
    with opened(checkpoint("gemma2"), tmp_path) as llm:
        with llm.session() as session:
            expected = decoded(session)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            with llm.session() as session:
                assert torch.equal(verified(llm, session, 6), expected)
        finally:
            torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("name", ["mistral", "qwen3.5", "jamba"])
def test_what_was_verified_in_vain_leaves_no_trace(checkpoint, tmp_path, name):
    with opened(checkpoint(name), tmp_path) as llm:
        with llm.session() as session:
            expected = decoded(session)
        with llm.session() as session:
            session.append(TOKENS[:PREFILLED])
            session.last_logits()
            rows = []
            for token in TOKENS[PREFILLED:]:
                room = session._engine.room_to_verify(session._sequence)
                session._engine.verify(session._sequence, [7] * min(4, room))
                rows.append(session.decode(token))
            assert torch.equal(torch.stack(rows), expected)


@needs_kernels
def test_pages_are_read_once_for_all(checkpoint, tmp_path):
    with (
        open_spilling(checkpoint("llama2"), tmp_path, context=600) as llm,
        llm.session() as session,
    ):
        session.append(LONG)
        session.last_logits()
        stats = session._runtime.store.stats

        def read_by(run) -> int:
            before = stats.hits + stats.late + stats.misses
            run()
            return stats.hits + stats.late + stats.misses - before

        one = read_by(lambda: session.decode(5))
        assert one > 0
        assert read_by(lambda: session._engine.verify(session._sequence, [5, 6, 7, 8])) == one

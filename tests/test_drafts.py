"""Guesses change no token and no bit, whoever makes them; they are made where they pay; and what is
verified together has the bits of what is decoded alone.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from copy import copy
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_matrix import VARIANTS
from random_checkpoints import make
from sessions_under_test import IDS, LONG, assert_nothing_is_held
from small_llm import TINY, keep_in_memory, open_small

from ebbtide.kernels import dispatch
from ebbtide.offload import drafts, planner
from ebbtide.offload.drafts import Drafts
from ebbtide.offload.engine import Engine
from ebbtide.offload.errors import InputError, StorageError
from ebbtide.offload.generation import GenerationConfig
from ebbtide.offload.mode import Mode
from ebbtide.offload.options import Options
from ebbtide.offload.runtime import Runtime
from ebbtide.offload.sampler import Sampler
from ebbtide.offload.sequence import Sequence
from ebbtide.offload.session import Session
from ebbtide.offload.stream import Stream
from ebbtide.prefetch.lookup import LONGEST, SHORTEST, look_up

needs_kernels = pytest.mark.skipif(dispatch._cpu is None, reason="no compiled kernels here")
CONTEXT, ANSWER = 600, 60
GREEDY = {"temperature": 0}
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 5}


@pytest.fixture(autouse=True)
def few_pages(monkeypatch) -> None:
    """What drafts take is a large part of texts this short."""
    monkeypatch.setattr(planner, "_MOST_MOVED_OUT", 2)


@pytest.fixture
def always(monkeypatch) -> None:
    """Guesses are made whatever they take, but for the second round and each 64th."""
    monkeypatch.setattr(drafts._Way, "is_quicker_than", lambda self, *others: True)


def opened(folder, spill_dir, *, share=0.3, draft=True, context=CONTEXT, **options):
    """share: of pages in memory, where nothing is guessed; at 0.3 most of it is needed for that."""
    llm = open_small(folder, spill_dir, draft=draft, **{**TINY, **options})
    llm._context = context
    keep_in_memory(llm, context, share, sequences=4, text=True)
    return llm


def planned(llm):
    return llm.admission.plan(CONTEXT, 4)


# ---- verifying -------------------------------------------------------------------------------


NUM_TOKENS, PREFILLED = 210, 3  # three: the sink's rows are verified as well
TOKENS = IDS[:NUM_TOKENS]


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
        sequence.length += len(some)
        at += len(some)
    session._runtime.store.check_integrity(deep=True)
    return torch.cat(rows)


def decoded(session) -> torch.Tensor:
    session.append(TOKENS[:PREFILLED])
    session.last_logits()
    return torch.stack([session.decode(token) for token in TOKENS[PREFILLED:]])


@needs_kernels
@pytest.mark.parametrize(
    ("name", "codec", "share"),
    [
        *((name, "8", 0.3) for name in VARIANTS),
        *((name, "8", share) for name in ("llama3", "mistral", "olmoe") for share in (0.0, 1.0)),
        *((name, codec, 0.3) for name in ("qwen2", "gemma2") for codec in ("4", "full")),
    ],
)
def test_verifying_gives_the_bits_of_decoding(checkpoint, tmp_path, name, codec, share):
    with opened(
        checkpoint(name), tmp_path, codec=codec, share=share, context=NUM_TOKENS, **TINY
    ) as llm:
        with llm.session() as session:
            expected = decoded(session)
        with llm.session() as session:
            assert torch.equal(verified(llm, session, 5), expected)


@needs_kernels
@pytest.mark.parametrize("head_dim", [16, 32])
def test_queries_that_grow(tmp_path, head_dim):
    """Where the scale of a head is no power of two, it must be multiplied at once."""
    folder = make("ministral3", tmp_path / "model", head_dim=head_dim)
    with opened(folder, tmp_path, context=NUM_TOKENS) as llm:
        with llm.session() as session:
            expected = decoded(session)
        with llm.session() as session:
            assert torch.equal(verified(llm, session, 7), expected)


@needs_kernels
@pytest.mark.parametrize("weight_bits", ["8", "4"])
def test_quantised_and_streamed_weights(checkpoint, tmp_path, weight_bits):
    with opened(
        checkpoint("llama2"), tmp_path, weight_bits=weight_bits, context=NUM_TOKENS, **TINY
    ) as llm:
        with llm.session() as session:
            expected = decoded(session)
        with llm.session() as session:
            assert torch.equal(verified(llm, session, 7), expected)
        limits = llm.admission.limits
        streams = llm.admission.plan(NUM_TOKENS, 4, loaded=(2, False))
        llm.admission.limits = replace(limits, host_bytes=sum(streams.host.values()))
        llm.admission.close()
        with mock.patch.object(llm.admission, "_loaded", (2, False)), llm.session() as session:
            assert session._runtime.plan.layers_streamed == 2
            assert torch.equal(verified(llm, session, 7), expected)


@needs_kernels
@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_any_number_of_tokens_together(checkpoint, tmp_path, count):
    with opened(checkpoint("qwen2"), tmp_path, context=NUM_TOKENS) as llm:
        with llm.session() as session:
            expected = decoded(session)
        with llm.session() as session:
            assert session._engine.most_verified == 16
            assert torch.equal(verified(llm, session, count), expected)


def test_every_instruction_set_gives_the_bits_of_decoding(checkpoint, tmp_path, kernels):
    if kernels == "reference":
        pytest.skip("products of the reference have other bits for several rows")
    with opened(checkpoint("qwen2"), tmp_path, context=NUM_TOKENS) as llm:
        with llm.session() as session:
            expected = decoded(session)
        with llm.session() as session:
            assert torch.equal(verified(llm, session, 7), expected)


@needs_kernels
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(checkpoint, tmp_path, threads):
    with opened(checkpoint("gemma2"), tmp_path, context=NUM_TOKENS) as llm:
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
def test_what_was_verified_in_vain_leaves_no_trace(checkpoint, tmp_path):
    with opened(checkpoint("mistral"), tmp_path, context=NUM_TOKENS) as llm:
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
    with opened(checkpoint("llama2"), tmp_path) as llm, llm.session() as session:
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


# ---- answers ---------------------------------------------------------------------------------


def answers(llm, config: dict, prompts=(LONG, IDS[400:430], IDS[430:440])) -> tuple[list, list]:
    """Of a session's turns, and for each how many guesses were accepted and rejected."""
    tokens, guesses = [], []
    with llm.session() as session:
        for prompt in prompts:
            output = session.generate(list(prompt), max_new_tokens=ANSWER, **config)
            tokens.append(output.token_ids)
            details = output.usage["completion_tokens_details"]
            guesses.append(tuple(details.values()))
            assert output.token_ids == session.tokens[len(session.tokens) - len(tokens[-1]) :]
        session._runtime.store.check_integrity(deep=True)
    assert_nothing_is_held(llm)
    return tokens, guesses


@needs_kernels
@pytest.mark.parametrize("name", ["llama2", "qwen2", "mistral", "gemma2", "olmoe"])
@pytest.mark.parametrize("config", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_answers_are_the_same(checkpoint, tmp_path, always, name, config):
    folder = checkpoint(name)
    with opened(folder, tmp_path, draft=False) as llm:
        expected, none = answers(llm, config)
        assert none == [(0, 0)] * 3 and llm.plan.drafts is None
    for share in (0.0, 0.3, 1.0):
        with opened(folder, tmp_path, share=share) as llm:
            found, guesses = answers(llm, config)
            selects = share == 0.3 and name != "mistral"  # whose layers all have windows
            assert llm.plan.drafts == ("selection" if selects else "lookup")
        assert found == expected
        if selects:
            assert sum(accepted for accepted, _ in guesses) > 0


class Wrong:
    """Guesses anything."""

    def __init__(self, seed: int, vocab_size: int):
        self.random, self.vocab_size = random.Random(seed), vocab_size

    def __call__(self, tokens, count: int) -> list[int]:
        many = self.random.randint(0, count)
        return [self.random.randrange(self.vocab_size) for _ in range(many)]


@needs_kernels
@pytest.mark.parametrize("config", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_lies_change_no_token(checkpoint, tmp_path, always, monkeypatch, config):
    folder = checkpoint("qwen2")
    with opened(folder, tmp_path, draft=False) as llm:
        expected, _ = answers(llm, config)
    monkeypatch.setattr(drafts, "look_up", Wrong(3, 256))
    with opened(folder, tmp_path) as llm:
        found, guesses = answers(llm, config)
    assert found == expected and sum(rejected for _, rejected in guesses) > 50


# Wherever guesses are made, taken and kept.
TRACED = (
    *(Session.decode, Session.hold, Session._changed, Stream._step, Stream._end),
    *(Drafts.take, Drafts.forget, Drafts.begin_answer, Drafts.decode, Drafts._end_round),
    *(Drafts._guess, Drafts._draft, look_up, Sequence.twin, Runtime.make_drafter),
    Engine.verify.__wrapped__,
)


def interrupted_after(count: int, run) -> bool:
    """Whether `run` was interrupted before the count-th line of TRACED, by a KeyboardInterrupt."""
    codes, left = {function.__code__ for function in TRACED}, [count]

    def trace(frame, event, arg):
        if frame.f_code not in codes:
            return None

        def line(frame, event, arg):
            if event == "line":
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt
            return line

        return line

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@needs_kernels
def test_an_interruption_at_any_line_loses_nothing(checkpoint, tmp_path, always):
    """All that was shown stays and nothing else, and what follows is what follows from it."""
    with opened(checkpoint("llama2"), tmp_path) as llm:
        with llm.session() as session:
            session.append(LONG)
            prompt = session.fork()
            expected = prompt.generate(max_new_tokens=12, **GREEDY).token_ids
            prompt.close()
            for count in range(1, 10_000, 4):
                with session.fork() as branch:
                    stream, shown = branch.stream(max_new_tokens=12, **GREEDY), []

                    def read(stream=stream, shown=shown):
                        for piece in stream:
                            shown.extend(piece.token_ids)

                    is_interrupted = interrupted_after(count, read)
                    stream.close()  # which ends what may have been interrupted at its end
                    taken = stream.output.token_ids
                    assert taken[: len(shown)] == shown and len(taken) <= len(shown) + 1
                    assert taken == expected[: len(taken)]
                    assert branch.tokens == LONG + taken
                    after = branch.last_logits().clone()
                with session.fork() as other:  # all of it prefilled: nearly the same
                    other.append(taken)
                    assert (other.last_logits() - after).abs().max() < 0.05
                if not is_interrupted:
                    break
            assert shown == expected and count > 300
            session._runtime.store.check_integrity(deep=True)


@needs_kernels
def test_text_that_goes_another_way_forgets_the_guesses(checkpoint, tmp_path, always):
    """Every way to change a session's tokens, with guesses waiting."""
    folder = checkpoint("llama2")

    waiting: Counter[str] = Counter()  # times that guesses waited when the text was changed

    def changed(llm) -> list[torch.Tensor]:
        found, sampler = [], Sampler(GenerationConfig())

        def wrong(session):  # not what was guessed
            found.append(session.decode(11).clone())

        def fork(session):
            with session.fork() as branch:
                found.append(branch.decode(9).clone())

        def truncate(session):
            session.truncate(len(session.tokens) - 1)

        def append(session):
            session.append([4, 5])

        def hold(session):
            session.hold(7)

        with llm.session() as session:

            def write(count: int) -> None:
                logits = session.last_logits()
                for _ in range(count):
                    logits = session.decode(sampler.choose(logits, ()), sampler)
                found.append(logits.clone())

            session.append(LONG)
            for count in range(2, 9):
                for change in (wrong, fork, truncate, append, hold):
                    write(count)
                    waiting[change.__name__] += bool(session._drafts and session._drafts._ahead)
                    change(session)
        return found

    with opened(folder, tmp_path, draft=False) as llm:
        expected = changed(llm)
    with opened(folder, tmp_path) as llm:
        assert all(map(torch.equal, changed(llm), expected))
    assert len(waiting) == 5 and min(waiting.values()) > 0


@needs_kernels
def test_what_an_answer_counted_stays(checkpoint, tmp_path, always):
    with opened(checkpoint("llama2"), tmp_path) as llm, llm.session() as session:
        stream = session.stream(LONG, max_new_tokens=20, **GREEDY)
        list(stream)
        before = stream.output.usage
        assert sum(before["completion_tokens_details"].values()) > 0
        session.generate(IDS[400:430], max_new_tokens=20, **GREEDY)
        assert stream.output.usage == before


@needs_kernels
def test_drafts_of_a_model_with_windows_wish_for_nothing_in_vain(checkpoint, tmp_path, always):
    """A layer that selects reads single records: its spans must not fill the staging slots."""
    with opened(checkpoint("gemma2"), tmp_path) as llm, llm.session() as session:
        session.append(LONG)
        session.last_logits()
        drafter, store = session._runtime.make_drafter(), session._runtime.store
        wished, prefetch = [], store.prefetch

        def watched(table, layer, spans=None):
            wished.append(layer)
            return prefetch(table, layer, spans)

        with mock.patch.object(store, "prefetch", watched):
            for token in (5, 6, 7):
                session._sequence.tokens.append(token)
                drafter.decode(session._sequence)
        windows = session._engine.config.windows
        assert wished and all(windows[layer] for layer in wished)


@needs_kernels
def test_stop_strings_and_ends_leave_the_session_whole(checkpoint, tmp_path, always):
    folder = checkpoint("llama2")
    with opened(folder, tmp_path, draft=False) as llm:
        whole = llm.generate(LONG, max_new_tokens=ANSWER, **GREEDY)
        stop = whole.text[len(whole.text) // 2 :][:3]
        expected = llm.generate(LONG, max_new_tokens=ANSWER, stop_strings=[stop], **GREEDY)
        assert expected.finish_reason == "stop" and len(expected.token_ids) < ANSWER
    with opened(folder, tmp_path) as llm, llm.session() as session:
        output = session.generate(LONG, max_new_tokens=ANSWER, stop_strings=[stop], **GREEDY)
        assert (output.text, output.token_ids) == (expected.text, expected.token_ids)
        assert session.tokens == LONG + output.token_ids
        assert session._sequence.length < len(session.tokens)
    with opened(folder, tmp_path, context=len(LONG) + 20) as llm:  # the context's end
        output = llm.generate(LONG, **GREEDY)
        assert output.finish_reason == "length" and output.token_ids == whole.token_ids[:20]


# ---- where there are guesses -----------------------------------------------------------------


@needs_kernels
def test_pages_are_selected_for_guesses_where_they_are_on_disk(checkpoint, tmp_path):
    folder = checkpoint("llama2")
    with opened(folder, tmp_path, share=1.0) as llm, llm.session() as session:
        plan, runtime = session._runtime.plan, session._runtime
        assert plan.drafts == "lookup" and runtime.make_drafter() is None
    with opened(folder, tmp_path) as llm, llm.session() as session:
        plan, exact = session._runtime.plan, session._engine
        assert plan.drafts == "selection" and not plan.selects and plan.hot_records
        assert plan.decode_bytes["disk"] > 0  # for each reading
        drafter = session._runtime.make_drafter()
        assert exact.selected is None and drafter.selected is not None
        assert session._runtime.make_drafter() is drafter
    with opened(folder, tmp_path, share=0.0) as llm:  # there is no room for them
        assert planned(llm).drafts == "lookup" and not planned(llm).hot_records
    with opened(folder, tmp_path, share=0.95) as llm:  # more would be moved out than that is worth
        assert planned(llm).far_spans["disk"] and planned(llm).drafts == "lookup"
    with opened(folder, tmp_path, codec="full") as llm:
        assert planned(llm).drafts == "lookup"
    with opened(checkpoint("mistral"), tmp_path) as llm:  # windows everywhere
        assert planned(llm).drafts == "lookup"
    for options in ({"mode": Mode("bounded")}, {"mode": Mode("deadline")}, {"draft": False}):
        with opened(folder, tmp_path, **options) as llm, llm.session() as session:
            assert session._runtime.plan.drafts is None and session._drafts is None


@needs_kernels
def test_a_head_that_streams_is_not_drafted_with(checkpoint, tmp_path):
    with opened(checkpoint("llama2"), tmp_path) as llm:
        for loaded in ((0, True), (0, False)):
            plan = llm.admission.plan(CONTEXT, 4, loaded=loaded)
            assert plan.fits and plan.far_spans["disk"]
            assert (plan.drafts == "selection") == loaded[1]


@needs_kernels
def test_what_only_scores_plans_for_no_guesses(checkpoint, tmp_path):
    with opened(checkpoint("llama2"), tmp_path) as llm:
        llm.admission.limits = replace(llm.admission.limits, host_bytes=1 << 30)
        llm.logits(IDS)
        assert llm.admission.latest_plan.drafts is None


def test_without_kernels_nothing_is_guessed(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("EBBTIDE_KERNELS", "reference")
    with opened(checkpoint("llama2"), tmp_path) as llm, llm.session() as session:
        assert llm.plan.drafts is None and session._drafts is None


def test_draft_is_true_or_false():
    with pytest.raises(InputError, match="draft is 'yes'; allowed is True or False"):
        Options(draft="yes")


# ---- how many, and whether -------------------------------------------------------------------


class FakeSequence:
    cell_tokens = 64

    def __init__(self):
        self.tokens, self.length = [0], 1

    def will_write(self, cell: int) -> None:
        pass

    def twin(self):
        other = copy(self)
        other.tokens = self.tokens[:]
        return other


class FakeEngine:
    """Takes so many seconds; what it says next is always the token before plus one."""

    most_verified, vocab = 16, 10_000

    def __init__(self, clock: list[float], seconds: float, each: float = 0.0, lies: float = 0.0):
        self.clock, self.seconds, self.each = clock, seconds, each
        self.lies, self.random = lies, random.Random(1)
        self.verified: list[int] = []  # how many tokens, in each round

    def room_to_verify(self, sequence) -> int:
        return self.most_verified

    def decode(self, sequence):
        self.clock[0] += self.seconds
        self.verified.append(1)
        sequence.length += 1
        return [sequence.tokens[sequence.length - 1]]

    def verify(self, sequence, tokens):
        self.clock[0] += self.seconds + self.each * len(tokens)
        self.verified.append(len(tokens))
        return tokens

    def logits(self, residual):
        says = [(t + 1) % self.vocab for t in residual]
        if self.lies:
            says = [(s + 7) % self.vocab if self.random.random() < self.lies else s for s in says]
        return torch.nn.functional.one_hot(torch.tensor(says), self.vocab).float()


def write(engine, drafter, clock, count: int) -> tuple[Drafts, float]:
    """`count` tokens; seconds for each."""
    one, sampler = Drafts(engine, lambda: drafter), Sampler(GenerationConfig())
    sequence, token = FakeSequence(), 1
    for _ in range(count):
        ready = one.take(sequence.length, token)
        sequence.tokens.append(token)
        if ready is not None:
            sequence.length += 1
        else:
            ready = one.decode(sequence, sampler, 100)
        token = sampler.choose(ready, ())
    assert sequence.tokens == [i % engine.vocab for i in range(count + 1)]
    assert len(sequence.tokens) == sequence.length
    return one, clock[0] / count


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(drafts.time, "perf_counter", lambda: now[0])
    return now


def test_guesses_that_are_right_become_more(clock):
    engine, drafter = FakeEngine(clock, 1.0), FakeEngine(clock, 0.1)
    one, seconds = write(engine, drafter, clock, 800)
    assert max(engine.verified) == 16 and seconds < 0.25
    assert one.counts[0] > 700 and one.counts[1] < 20


def test_guesses_that_are_wrong_are_hardly_made(clock):
    engine, drafter = FakeEngine(clock, 1.0), FakeEngine(clock, 0.1, lies=1.0)
    one, seconds = write(engine, drafter, clock, 2000)
    assert one.counts[0] == 0 and one.counts[1] < 30
    assert seconds < 1.01


def test_guesses_that_cost_more_than_they_save_are_hardly_made(clock):
    """Right as they are: what attends to few pages takes as long as what attends to all."""
    engine, drafter = FakeEngine(clock, 1.0, each=0.1), FakeEngine(clock, 1.0)
    one, seconds = write(engine, drafter, clock, 2000)
    assert seconds < 1.02 and one.counts[0] < 60


def test_some_right_guesses_are_few_at_a_time(clock):
    engine, drafter = FakeEngine(clock, 1.0), FakeEngine(clock, 0.1, lies=0.3)
    _, seconds = write(engine, drafter, clock, 2000)
    rounds = engine.verified[100:]
    assert 2 < sum(rounds) / len(rounds) < 6
    assert seconds < 0.65


def test_a_disk_that_became_slow_is_noticed(clock):
    """Guesses did not pay; then every page takes ten times as long, and they do."""
    engine, drafter = FakeEngine(clock, 0.1), FakeEngine(clock, 0.2)
    one, sampler = Drafts(engine, lambda: drafter), Sampler(GenerationConfig())
    sequence, token = FakeSequence(), 1
    for count in range(3000):
        if count == 1000:
            engine.seconds = 1.0
            before = one.counts[0]
        ready = one.take(sequence.length, token)
        sequence.tokens.append(token)
        if ready is None:
            ready = one.decode(sequence, sampler, 100)
        else:
            sequence.length += 1
        token = sampler.choose(ready, ())
    assert before < 200 and one.counts[0] - before > 1000


# ---- what was said before --------------------------------------------------------------------


@given(
    tokens=st.lists(st.integers(0, 3), max_size=40),
    count=st.integers(0, 8),
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_lookups_are_what_followed_the_longest_same_words(tokens, count):
    def ends_at(stop: int) -> int:
        """How many of the last tokens also stand before `stop`."""
        most = 0
        while most < min(stop, LONGEST) and tokens[stop - 1 - most] == tokens[-1 - most]:
            most += 1
        return most

    same = {stop: ends_at(stop) for stop in range(1, len(tokens))}
    longest = max(same.values(), default=0)
    found = look_up(tokens, count)
    if longest < SHORTEST or count == 0:
        assert found == []
    else:
        stop = max(s for s, length in same.items() if length == longest)
        assert found == tokens[stop : stop + count]


def test_a_twin_draws_what_the_sampler_will_draw():
    sampler = Sampler(GenerationConfig(do_sample=True, seed=3))
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    sampler.choose(logits, ())
    twin = sampler.twin()
    foreseen = [twin.choose(logits, ()) for _ in range(20)]
    assert [sampler.choose(logits, ()) for _ in range(20)] == foreseen
    assert len(set(foreseen)) > 3


@needs_kernels
def test_a_failing_disk_is_said_and_nothing_hangs(checkpoint, tmp_path, always, monkeypatch):
    with opened(checkpoint("llama2"), tmp_path) as llm, llm.session() as session:
        stream = session.stream(LONG, max_new_tokens=ANSWER, **GREEDY)
        next(stream)
        store = session._runtime.store

        def fails(*_):
            raise StorageError("the disk is gone")

        monkeypatch.setattr(store._transfers, "demand_all", fails)
        with pytest.raises(StorageError, match="gone"):
            list(stream)

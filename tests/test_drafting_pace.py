"""Guesses are made where they pay, as many as are right, and of what was said before."""

from __future__ import annotations

import random
from copy import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebbtide.offload.planning.footprint import MOST_VERIFIED
from ebbtide.offload.running import drafts
from ebbtide.offload.running.drafts import Drafts
from ebbtide.offload.running.sampler import Sampler
from ebbtide.offload.sessions.generation import GenerationConfig
from ebbtide.prefetch.lookup import LONGEST, SHORTEST, look_up

# ---- how many, and whether -------------------------------------------------------------------


class FakeSequence:
    cell_tokens = 64

    def __init__(self):
        self.tokens, self.length, self.verified = [0], 1, []

    def will_write(self, cell: int) -> None:
        pass

    def twin(self, trail=None):
        other = copy(self)
        other.tokens = self.tokens[:]
        return other


class FakeEngine:
    """Takes so many seconds; what it says next is always the token before plus one."""

    vocab = 10_000

    def __init__(self, clock: list[float], seconds: float, each: float = 0.0, lies: float = 0.0):
        self.clock, self.seconds, self.each = clock, seconds, each
        self.lies, self.random = lies, random.Random(1)
        self.verified: list[int] = []  # how many tokens, in each round

    def room_to_verify(self, sequence) -> int:
        return MOST_VERIFIED

    def take_in(self, sequence):
        sequence.verified.pop()
        sequence.length += 1

    def decode(self, sequence):
        self.clock[0] += self.seconds
        self.verified.append(1)
        sequence.length += 1
        return [sequence.tokens[sequence.length - 1]]

    def verify(self, sequence, tokens):
        self.clock[0] += self.seconds + self.each * len(tokens)
        self.verified.append(len(tokens))
        sequence.verified[:] = tokens
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
        ready = one.take(sequence, token)
        sequence.tokens.append(token)
        if ready is not None:
            engine.take_in(sequence)
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
        ready = one.take(sequence, token)
        sequence.tokens.append(token)
        if ready is None:
            ready = one.decode(sequence, sampler, 100)
        else:
            engine.take_in(sequence)
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

"""Several tokens for one reading of weights and pages: what follows is guessed, all guesses are
verified at once, and kept as far as they were right.

    guess    what followed the same words before (lookup), or what the model itself says when it
             attends to few pages (selection)
    verify   each guess's logits, to the bit those of decoding one token after the other

So guesses change neither a token nor a bit, only the time. How many are made at once, and whether
any are, follows from how many were right and how long that took. (Speculative decoding.) Knows
sequences and a sampler; keeps no text.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import torch

from ..prefetch.lookup import look_up
from .engine import Engine
from .sampler import Sampler
from .sequence import Sequence

_FIRST_COUNT = 4
_NEW_SHARE = 0.3  # of the latest round in what a way is said to take
# Rounds until a way that did not pay is tried again, twice as many each time; and until decoding
# without guesses is timed again.
_LEAST_WAIT, _MOST_WAIT, _PLAIN_WAIT = 16, 1024, 64


@dataclass
class _Way:
    """How tokens are had. more: guesses added after all were right; after one was wrong there is
    one less."""

    more: int
    count: int = _FIRST_COUNT  # guesses at once
    round_s: float = 0.0  # of a round, as of late
    round_tokens: float = 0.0  # that came of it; 0: not tried yet
    wait: int = _LEAST_WAIT
    next_try: int = 0  # the round

    @property
    def seconds(self) -> float | None:
        """For each token; None: not known."""
        return self.round_s / self.round_tokens if self.round_tokens else None

    def note_time(self, seconds: float, num_tokens: int) -> None:
        new = _NEW_SHARE if self.round_tokens else 1.0
        self.round_s += new * (seconds - self.round_s)
        self.round_tokens += new * (num_tokens - self.round_tokens)

    def note_guesses(self, guessed: int, kept: int, most: int) -> None:
        count = self.count + self.more if kept == guessed else self.count - 1
        self.count = max(1, min(most, count))

    def is_quicker_than(self, *others: _Way) -> bool:
        """As far as is known."""
        known = [other.seconds for other in others if other.seconds is not None]
        return self.seconds is None or all(self.seconds < seconds for seconds in known)

    def plan_try(self, number: int, pays: bool) -> None:
        """After round `number`."""
        self.wait = _LEAST_WAIT if pays else min(2 * self.wait, _MOST_WAIT)
        self.next_try = number + self.wait


class Drafts:
    """Of one session. engine: in exact mode, decodes and verifies; drafter: its twin that attends
    to few pages, or None. accepted, rejected: guesses, since the last `take_counts`.
    """

    def __init__(self, engine: Engine, drafter: Engine | None):
        self._engine, self._drafter = engine, drafter
        self._plain, self._lookup, self._selection = _Way(more=0), _Way(more=2), _Way(more=1)
        self._ahead: deque[tuple[int, torch.Tensor]] = deque()  # guesses, logits behind each
        self._num_rounds = 0
        # The last one: its way, guesses, and seconds, where it is to be timed.
        self._round: tuple[_Way, int, float | None] | None = None
        self._kept = 0  # guesses of the last round that were right
        self._is_first = True  # of an answer: it finds nothing read ahead
        self.accepted = self.rejected = 0

    def take(self, token: int) -> torch.Tensor | None:
        """The logits (vocab,) behind a token that was sampled, if it was guessed: its keys and
        values are there. None otherwise; what was guessed after it is wrong too."""
        if self._ahead and self._ahead[0][0] == token:
            self._kept += 1
            self.accepted += 1
            return self._ahead.popleft()[1]
        self.forget()
        return None

    def forget(self) -> None:
        """The text goes on otherwise than was guessed."""
        self.rejected += len(self._ahead)
        self._ahead.clear()

    def begin_answer(self) -> None:
        """What comes next is not what was decoded last, nor will it show what was right."""
        self.forget()
        self._round, self._is_first = None, True

    def take_counts(self) -> tuple[int, int]:
        """Guesses that were accepted and rejected since the last call."""
        counts = self.accepted, self.rejected
        self.accepted = self.rejected = 0
        return counts

    def decode(self, sequence: Sequence, sampler: Sampler, most: int) -> torch.Tensor:
        """Process the one pending token; returns its logits (vocab,). sampler: what will choose the
        next tokens; nothing is drawn from it. most: how many may follow."""
        self._end_round()
        began = time.perf_counter()
        way, guesses = self._guess(sequence, sampler, most)
        if guesses:
            pending = sequence.tokens[-1]
            rows = self._engine.logits(self._engine.verify(sequence, [pending, *guesses]))
            sequence.length += 1
            self._ahead.extend(zip(guesses, rows[1:], strict=True))
        else:
            rows = self._engine.logits(self._engine.decode(sequence))
        seconds = None if self._is_first else time.perf_counter() - began
        self._round, self._kept, self._is_first = (way, len(guesses), seconds), 0, False
        return rows[0]

    # ---- inside ------------------------------------------------------------------------------

    def _end_round(self) -> None:
        """Learns from the last round, whose guesses were taken or not."""
        self._num_rounds += 1
        if self._round is None:
            return
        way, guessed, seconds = self._round
        if seconds is not None:
            way.note_time(seconds, 1 + self._kept)
        if guessed:
            way.note_guesses(guessed, self._kept, self._engine.most_verified - 1)
        if way is self._plain:
            way.next_try = self._num_rounds + _PLAIN_WAIT
        else:
            way.plan_try(self._num_rounds, way.is_quicker_than(self._plain))

    def _guess(self, sequence: Sequence, sampler: Sampler, most: int) -> tuple[_Way, list[int]]:
        """What is guessed now, and how."""
        most = min(most, self._engine.room_to_verify(sequence) - 1)
        plain, lookup, selection = self._plain, self._lookup, self._selection
        if most < 1 or (self._num_rounds >= plain.next_try and not self._is_first):
            return plain, []
        if self._pays(lookup, plain, selection):
            guesses = look_up(sequence.tokens, min(most, lookup.count))
            if guesses:
                return lookup, guesses
        if self._drafter is not None and self._pays(selection, plain):
            return selection, self._draft(sequence, min(most, selection.count), sampler)
        return plain, []

    def _pays(self, way: _Way, *others: _Way) -> bool:
        return way.is_quicker_than(*others) or self._num_rounds >= way.next_try

    def _draft(self, sequence: Sequence, count: int, sampler: Sampler) -> list[int]:
        """What the sampler will choose, if the drafter is right. The sequence stays as it is."""
        length, num_tokens, guesses = sequence.length, len(sequence.tokens), []
        foreseen = sampler.twin()
        try:
            while len(guesses) < count:
                logits = self._drafter.logits(self._drafter.decode(sequence))[0]
                guess = foreseen.choose(logits, sequence.tokens)
                if guess in sampler.config.eos_token_ids:
                    break  # nothing follows
                guesses.append(guess)
                sequence.tokens.append(guess)
        finally:
            sequence.length = length
            del sequence.tokens[num_tokens:]
        return guesses

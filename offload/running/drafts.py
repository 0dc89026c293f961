"""Several tokens for one reading of weights and pages: what follows is guessed, all guesses are
verified at once, and kept as far as they were right.

    guess    what a grammar leaves no choice about, what followed the same words before (lookup), or
             what the model itself says when it attends to few pages (selection)
    verify   each guess's logits, to the bit those of decoding one token after the other

So guesses change neither a token nor a bit, only the time. How many are made at once, and whether
any are, follows from how many were right and how long that took. (Speculative decoding.) Knows
sequences and a sampler; keeps no text.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch

from ...prefetch.lookup import look_up
from ...prefetch.trail import Trail
from ..errors import InputError, ModelError
from ..planning.footprint import MOST_VERIFIED
from .engine import Engine
from .sampler import Sampler
from .sequence import Sequence

_FIRST_COUNT = 4
# Of the latest rounds: how many guesses are judged by, and decoding without any.
_ROUNDS_KEPT, _PLAIN_KEPT = 8, 3
# Rounds until a way is tried again: while it pays, and, doubled each time, while it does not; and
# until decoding without guesses is timed again.
_LEAST_WAIT, _MOST_WAIT, _PLAIN_WAIT = 16, 1024, 64


class _Way:
    """How tokens are had. more: guesses added after all were right; after one was wrong there is
    one less."""

    def __init__(self, more: int, num_kept: int = _ROUNDS_KEPT):
        self.more, self.count = more, _FIRST_COUNT  # guesses at once
        # Seconds of the latest rounds, and how many tokens came of each.
        self.rounds: deque[tuple[float, int]] = deque(maxlen=num_kept)
        self.wait, self.next_try = _LEAST_WAIT, 0  # rounds; the round

    @property
    def seconds(self) -> float | None:
        """For each token; None: not known."""
        if not self.rounds:
            return None
        return sum(seconds for seconds, _ in self.rounds) / sum(tokens for _, tokens in self.rounds)

    def note_guesses(self, guessed: int, kept: int, most: int) -> None:
        if kept < guessed:
            self.count = max(1, self.count - 1)
        elif guessed >= self.count:  # no fewer than it should have made
            self.count = min(most, self.count + self.more)

    def is_quicker_than(self, *others: _Way) -> bool:
        """As far as is known."""
        known = [other.seconds for other in others if other.seconds is not None]
        return self.seconds is None or all(self.seconds < seconds for seconds in known)

    def plan_try(self, number: int, pays: bool) -> None:
        """After round `number`."""
        self.wait = _LEAST_WAIT if pays else min(2 * self.wait, _MOST_WAIT)
        self.next_try = number + self.wait


class _Plain(_Way):
    """Without guesses."""

    def __init__(self):
        super().__init__(more=0, num_kept=_PLAIN_KEPT)

    @property
    def seconds(self) -> float | None:
        """The least: a disk that was held up once must not make guesses look good for long."""
        return min((seconds for seconds, _ in self.rounds), default=None)


class Drafts:
    """Of one session. engine: decodes and verifies, in any mode but deadline; make_drafter: gives
    its twin that attends to few pages, or None. counts: guesses that were accepted and rejected.
    """

    def __init__(self, engine: Engine, make_drafter: Callable[[], Engine | None]):
        self._engine, self._make_drafter = engine, make_drafter
        self._plain, self._lookup, self._selection = _Plain(), _Way(more=2), _Way(more=1)
        self._forced = _Way(more=0)  # always right, so it is always tried
        # Guesses with the places they are for, and the logits behind them.
        self._ahead: deque[tuple[int, int, torch.Tensor]] = deque()
        self._sequence: Sequence | None = None  # behind which they stand
        self._num_rounds = 0
        # The last one: its way, guesses, and seconds, where it is to be timed.
        self._round: tuple[_Way, int, float | None] | None = None
        self._kept = 0  # guesses of the last round that were right
        self._is_first = True  # of an answer: it finds nothing read ahead
        self._trail = Trail()  # of what the drafter selected
        self._num_accepted = self._num_rejected = 0

    @property
    def counts(self) -> tuple[int, int]:
        """How many guesses were right, and how many wrong, so far."""
        return self._num_accepted, self._num_rejected

    def take(self, sequence: Sequence, token: int) -> torch.Tensor | None:
        """The logits (vocab,) behind a token that was sampled as the next, if it was guessed: its
        keys and values are there. None otherwise; what was guessed after it is wrong too."""
        place = sequence.length, token
        if self._ahead and self._ahead[0][:2] == place and sequence.verified:
            self._kept += 1
            self._num_accepted += 1
            return self._ahead.popleft()[2]
        self.forget()
        return None

    def forget(self) -> None:
        """The text goes on otherwise than was guessed."""
        self._num_rejected += len(self._ahead)
        self._ahead.clear()
        if self._sequence is not None:  # what was computed for guesses has its memory
            self._sequence.verified.clear()

    def begin_answer(self) -> None:
        """What comes next is not what was decoded last, nor will it show what was right."""
        self.forget()
        self._round, self._is_first = None, True
        for way in (self._lookup, self._selection):  # each is tried once in each answer
            way.next_try = min(way.next_try, self._num_rounds + 2)

    def decode(self, sequence: Sequence, sampler: Sampler, most: int) -> torch.Tensor:
        """Process the one pending token; returns its logits (vocab,). sampler: what will choose the
        next tokens; nothing is drawn from it. most: how many of those may be processed."""
        position = sequence.length
        assert len(sequence.tokens) == position + 1, "one token is pending"
        self._end_round()
        drafter = self._make_drafter()  # the first time that takes long
        began = time.perf_counter()
        way, guesses = self._guess(drafter, sequence, sampler, most)
        if guesses:
            pending, self._sequence = sequence.tokens[position], sequence
            rows = self._engine.logits(self._engine.verify(sequence, [pending, *guesses]))
            self._engine.take_in(sequence)
            places = range(position + 1, position + 1 + len(guesses))
            self._ahead.extend(zip(places, guesses, rows[1:], strict=True))
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
        if guessed:
            way.note_guesses(guessed, self._kept, MOST_VERIFIED - 1)
        if seconds is None:
            return
        way.rounds.append((seconds, 1 + self._kept))
        if way is self._plain:
            way.next_try = self._num_rounds + _PLAIN_WAIT
        else:
            others = {self._plain, self._lookup, self._selection} - {way}
            way.plan_try(self._num_rounds, way.is_quicker_than(*others))

    def _guess(
        self, drafter: Engine | None, sequence: Sequence, sampler: Sampler, most: int
    ) -> tuple[_Way, list[int]]:
        """What is guessed now, and how."""
        most = min(most, self._engine.room_to_verify(sequence) - 1)
        plain, lookup, selection = self._plain, self._lookup, self._selection
        if most >= 1 and sampler.constraint is not None:
            forced = sampler.constraint.forced()[: min(most, MOST_VERIFIED - 1)]
            if forced:
                return self._forced, forced
        if most < 1 or (self._num_rounds >= plain.next_try and not self._is_first):
            return plain, []
        if self._pays(lookup, plain, selection):
            guesses = look_up(sequence.tokens, min(most, lookup.count))
            if guesses:
                return lookup, guesses
        if drafter is not None and self._pays(selection, plain):
            count = min(most, selection.count)
            return selection, self._draft(drafter, sequence, count, sampler)
        return plain, []

    def _pays(self, way: _Way, *others: _Way) -> bool:
        return way.is_quicker_than(*others) or self._num_rounds >= way.next_try

    def _draft(
        self, drafter: Engine, sequence: Sequence, count: int, sampler: Sampler
    ) -> list[int]:
        """What the sampler will choose, if the drafter is right. All happens behind the sequence's
        end, whose pending token has its cell."""
        sequence.will_write(sequence.length // sequence.cell_tokens)
        ahead, foreseen, guesses = sequence.twin(self._trail), sampler.twin(), []
        while len(guesses) < count:
            logits = drafter.logits(drafter.decode(ahead))[0]
            try:
                guess = foreseen.choose(logits, ahead.tokens)
            except (ModelError, InputError):  # not the answer's
                break
            if guess in sampler.config.eos_token_ids or foreseen.is_done:
                break  # nothing follows
            guesses.append(guess)
            ahead.tokens.append(guess)
        return guesses

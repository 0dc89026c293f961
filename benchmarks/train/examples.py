"""Training examples: token ids, the weight of each in the loss, and their positions.

A row is a conversation with as many turns as fit, so that a good part of its tokens are answers;
what room is left, the next one takes. Some rows are natural text or chat, some are random sequences
said again. Knows no network.
"""

from __future__ import annotations

import math
import random

import documents
import haystack
import torch
from corpus import Corpus
from tokenizer import ASSISTANT_ID, BOS_ID, END_ID, FIRST_ORDINARY_ID, PAD_ID, USER_ID
from tokenizers import Tokenizer

# The loss weight of a token, by what it is.
ANSWER, NATURAL, NONE = 1.0, 0.2, 0.0
# The shares of rows that are no conversation about facts.
NATURAL_ROWS, CHAT_ROWS, REPETITIONS = 0.02, 0.01, 0.02
PROSE_COUNTED = 0.0  # of the tokens of documents
# A document's characters to a token, as a part of prose's: names and numbers take more tokens.
DENSITY = 0.875
# The longest rows are nearly filled by one document of prose: facts at all distances.
FILLED_TOKENS, FILLED_SHARES, FILLED_DENSITY = 20000, (0.75, 0.95), 0.95
TURN_TOKENS = 40


class Examples:
    """Draws examples from one random stream at a time."""

    def __init__(self, tokenizer: Tokenizer, corpus: Corpus, max_positions: int):
        self.tokenizer, self.corpus = tokenizer, corpus
        self.max_positions = max_positions
        self.vocab = tokenizer.get_vocab_size()
        self.prose = haystack.Prose(corpus.books, random.Random(0))
        self.natural = haystack.Prose([*corpus.books, "\n\n".join(corpus.docs)], random.Random(0))
        self.reseed(random.Random(0))
        text = "".join(self.prose.piece(5000) for _ in range(40))
        self.chars_per_token = len(text) / len(self._encode(text))  # of prose

    def reseed(self, rng: random.Random) -> None:
        """Draw from `rng` from here on."""
        self.rng = self.prose.rng = self.natural.rng = rng

    def batch(self, size: int, num_tokens: int) -> tuple[torch.Tensor, ...]:
        """(ids, targets, loss weights, positions), each (size, num_tokens)."""
        rows = [self._row(num_tokens + 1) for _ in range(size)]
        ids, weights = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
        positions = torch.stack([self._positions(num_tokens) for _ in range(size)])
        return ids[:, :-1], ids[:, 1:], weights[:, 1:], positions

    def _row(self, length: int) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        while length - len(ids) > 48:
            more_ids, more_weights = self._example(length - len(ids))
            ids += more_ids
            weights += more_weights
        missing = length - len(ids)
        return (ids + [PAD_ID] * missing)[:length], (weights + [NONE] * missing)[:length]

    def _example(self, room: int) -> tuple[list[int], list[float]]:
        kind = self.rng.random()
        if kind < REPETITIONS:
            return self._repetition(min(room, 512))
        if kind < REPETITIONS + NATURAL_ROWS:
            text = self.natural.piece(int(min(room, 1024) * 4.5))
            ids = [BOS_ID, *self._encode(text)][: min(room, 1024)]
            return ids, [NONE] + [NATURAL] * (len(ids) - 1)
        if kind < REPETITIONS + NATURAL_ROWS + CHAT_ROWS:
            return self._chat(room)
        return self._conversation(room)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _turns(
        self, opening: str, turns: list[tuple[str, str]], room: int
    ) -> tuple[list[int], list[float]]:
        """As many turns as `room` holds; `opening` stands before the first question."""
        ids, weights = [BOS_ID], [NONE]
        for i, (question, answer) in enumerate(turns):
            asked = self._encode((opening if i == 0 else "") + question)
            said = self._encode(answer)
            if i and len(ids) + len(asked) + len(said) + 3 > room:
                break
            ids += [USER_ID, *asked, ASSISTANT_ID, *said, END_ID]
            counted = [
                NATURAL if i == 0 and self.rng.random() < PROSE_COUNTED else NONE for _ in asked
            ]
            weights += [NONE, *counted, NONE] + [ANSWER] * (len(said) + 1)
        return ids, weights

    def _conversation(self, room: int) -> tuple[list[int], list[float]]:
        rng = self.rng
        share = rng.uniform(0.2, 0.7) if room < 1200 else rng.uniform(0.4, 0.92)
        num_chars = int(room * share * DENSITY * self.chars_per_token)
        if room > FILLED_TOKENS:
            share = rng.uniform(*FILLED_SHARES)
            num_chars = int(room * share * FILLED_DENSITY * self.chars_per_token)
        num_turns = max(1, int(room * (1 - share) / TURN_TOKENS) + 1)
        drawn = documents.conversation(
            haystack.Setting(rng, self.prose, num_chars, min(num_turns, 100))
        )
        gap = "\n\n" if rng.random() < 0.9 else "\n"
        return self._turns(drawn.document + gap, drawn.turns, room)

    def _chat(self, room: int) -> tuple[list[int], list[float]]:
        for _ in range(10):
            messages = self.rng.choice(self.corpus.chat)
            if sum(len(m["content"]) for m in messages) < room * 3.5:
                break
        asked = [m["content"] for m in messages if m["role"] != "assistant"]
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        ids, weights = self._turns("", list(zip(asked, said, strict=False)), room)
        return ids[:room], weights[:room]

    def _repetition(self, room: int) -> tuple[list[int], list[float]]:
        """A random sequence, then random pieces of it."""
        rng = self.rng
        length = rng.randrange(8, max(13, room // 2))
        alphabet = rng.choices(range(FIRST_ORDINARY_ID, self.vocab), k=rng.choice([16, 64, 400]))
        sequence = rng.choices(alphabet, k=length)
        ids, weights = [BOS_ID, *sequence], [NONE] * (1 + length)
        while len(ids) < room:
            start = rng.randrange(0, max(1, length - 8))
            stop = min(length, start + rng.randrange(min(8, length), length + 1))
            ids += sequence[start:stop]
            # Three tokens must be seen before the rest can be known.
            weights += ([NONE] * 3 + [ANSWER] * (stop - start))[: stop - start]
        return ids[:room], weights[:room]

    def _positions(self, num_tokens: int) -> torch.Tensor:
        """Consecutive within one to four chunks, with random skips between (PoSE, 2309.10400).

        So positions up to max_positions are trained on texts far shorter.
        """
        rng = self.rng
        num_chunks = rng.choice([1, 1, 2, 3, 4])
        cuts = sorted(rng.sample(range(16, num_tokens - 16), num_chunks - 1))
        room = max(1, self.max_positions - num_tokens)
        widest = math.exp(rng.uniform(0, math.log(room)))
        skips = sorted(int(rng.uniform(0, widest)) for _ in range(num_chunks))
        positions = torch.arange(num_tokens)
        for skip, start, stop in zip(skips, [0, *cuts], [*cuts, num_tokens], strict=True):
            positions[start:stop] += skip
        return positions

"""Training examples: token ids, the weight of each in the loss, and their positions.

Two phases. In the first, three examples in four are a random sequence repeated, so that copying is
learnt; in the second nearly all are documents with turns, some with natural text in front. Knows no
network.
"""

from __future__ import annotations

import math
import random

import documents
import torch
from tokenizer import BOS_ID, CONTROL_TOKENS, PAD_ID, VOCAB_SIZE
from tokenizers import Tokenizer

FIRST_ORDINARY_ID = len(CONTROL_TOKENS)
OPENING = "<|bos|><|user|>"
# The loss weight of a token, by what it is.
ANSWER, NATURAL, OTHER, NONE = 1.0, 0.5, 0.1, 0.0


class Examples:
    """Draws examples from one random stream; `copying` is the first phase and may be changed."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        natural: list[str],
        rng: random.Random,
        copying: bool,
        max_positions: int,
    ):
        self.tokenizer, self.natural, self.rng = tokenizer, natural, rng
        self.copying, self.max_positions = copying, max_positions

    def batch(self, size: int, num_tokens: int) -> tuple[torch.Tensor, ...]:
        """(ids, targets, loss weights, positions), each (size, num_tokens)."""
        ids, weights, positions = [], [], []
        for _ in range(size):
            drawn_ids, drawn_weights = self._example(num_tokens)
            ids.append(drawn_ids)
            weights.append(drawn_weights)
            positions.append(self._positions(num_tokens))
        all_ids, all_weights = torch.tensor(ids), torch.tensor(weights)
        return all_ids[:, :-1], all_ids[:, 1:], all_weights[:, 1:], torch.stack(positions)

    def _example(self, num_tokens: int) -> tuple[list[int], list[float]]:
        """Ids and weights, num_tokens + 1 of each: inputs and targets overlap."""
        share = self.rng.random()
        if self.rng.random() < (0.75 if self.copying else 0.04):
            return self._repetition(num_tokens)
        if share < 0.12:
            text = "<|bos|>" + self._natural_text(num_tokens * 4)
            ids = self.tokenizer.encode(text).ids[: num_tokens + 1]
            weights = [NATURAL] * len(ids)
        else:
            ids, weights = self._conversation(num_tokens, natural_in_front=share < 0.3)
        missing = num_tokens + 1 - len(ids)
        return ids + [PAD_ID] * missing, weights + [NONE] * missing

    def _repetition(self, num_tokens: int) -> tuple[list[int], list[float]]:
        """A random sequence, then the same again and again; later, random pieces of it."""
        rng = self.rng
        length = (
            rng.randrange(4, 20) if self.copying else rng.randrange(8, max(13, num_tokens // 3))
        )
        size = rng.choice([16, 64, 400])
        alphabet = [rng.randrange(FIRST_ORDINARY_ID, VOCAB_SIZE) for _ in range(size)]
        sequence = [rng.choice(alphabet) for _ in range(length)]
        ids, weights = [BOS_ID, *sequence], [NONE] * (1 + length)
        while len(ids) < num_tokens + 1:
            start = rng.randrange(0, max(1, length - 8))
            stop = min(length, start + rng.randrange(min(8, length), length + 1))
            if self.copying:
                ids += sequence
                weights += [ANSWER] * length
            else:  # two tokens must be seen before the rest can be known
                ids += sequence[start:stop]
                weights += [NONE, NONE] + [ANSWER] * max(0, stop - start - 2)
        return ids[: num_tokens + 1], weights[: num_tokens + 1]

    def _conversation(
        self, num_tokens: int, natural_in_front: bool
    ) -> tuple[list[int], list[float]]:
        num_chars = int((num_tokens - 260) * 3.6) if num_tokens > 600 else int(num_tokens * 1.4)
        num_chars = int(num_chars * self.rng.uniform(0.25, 1.0))
        text, spans = documents.conversation(self.rng, max(num_chars, 150), max_questions=10)
        if natural_in_front:
            front = self._natural_text(max(200, num_chars // 2)) + " "
            text = OPENING + front + text[len(OPENING) :]
            spans = [(start + len(front), stop + len(front)) for start, stop in spans]
        encoding = self.tokenizer.encode(text)
        ids = encoding.ids[: num_tokens + 1]
        weights = [OTHER] * len(ids)
        span = 0
        for i, (start, _) in enumerate(encoding.offsets[: num_tokens + 1]):
            while span < len(spans) and start >= spans[span][1]:
                span += 1
            if span < len(spans) and start >= spans[span][0]:
                weights[i] = ANSWER
        return ids, weights

    def _natural_text(self, num_chars: int) -> str:
        """A piece of a natural text, of num_chars where the text is long enough."""
        while True:
            text = self.rng.choice(self.natural)
            if len(text) >= num_chars + 200:
                start = self.rng.randrange(len(text) - num_chars)
                return text[start : start + num_chars]
            if len(text) >= 400:
                return text[:num_chars]

    def _positions(self, num_tokens: int) -> torch.Tensor:
        """Consecutive within one to three chunks, with random skips between (PoSE, 2309.10400).

        So positions up to max_positions are trained on texts far shorter.
        """
        rng = self.rng
        num_chunks = rng.choice([1, 1, 2, 3])
        cuts = sorted(rng.sample(range(16, num_tokens - 16), num_chunks - 1))
        widest = math.exp(rng.uniform(0, math.log(self.max_positions - num_tokens)))
        skips = sorted(int(rng.uniform(0, widest)) for _ in range(num_chunks))
        positions = torch.arange(num_tokens)
        for skip, start, stop in zip(skips, [0, *cuts], [*cuts, num_tokens], strict=True):
            positions[start:stop] += skip
        return positions

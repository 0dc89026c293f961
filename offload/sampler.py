"""From logits to one token id.

The filters and their order are Hugging Face's: repetition penalty, temperature, top-k, top-p,
min-p. What is left is sampled with one random number per token by inverting the cumulative
distribution over ids, on the CPU: the same seed gives the same tokens on every machine that
computes the same logits. Greedy choice goes to the lowest id among equals.

Knows no model and no text, and keeps no token: the history is given with every call.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from .errors import ModelError
from .generation import GenerationConfig


class Sampler:
    """Chooses the tokens of one answer. Not for several answers: each starts from the seed.

    `seed` is the one in use, also where the config leaves it open, so that a run can be repeated.
    """

    def __init__(self, config: GenerationConfig):
        self.config = config
        self.seed = random.SystemRandom().getrandbits(63) if config.seed is None else config.seed
        self._random = random.Random(self.seed)

    def choose(self, logits: torch.Tensor, history_ids: Sequence[int] | torch.Tensor) -> int:
        """The next token. logits (vocab,), history_ids: prompt and answer so far (read only where
        a repetition penalty is set). ModelError when the logits are not numbers."""
        logits = logits.detach().to("cpu", torch.float32)  # (vocab,)
        if logits.isnan().any() or not logits.max().isfinite():
            raise ModelError(
                "the model computed logits that are not numbers: its weights are damaged, or a "
                "dtype overflows"
            )
        if self.config.greedy:
            penalised = penalise(logits, history_ids, self.config.repetition_penalty)
            # argmax leaves open which of several equals it finds.
            return int((penalised == penalised.max()).nonzero()[0])
        probabilities = self.probabilities(logits, history_ids).double()  # (vocab,)
        cumulative = probabilities.cumsum(0)
        threshold = self._random.random() * float(cumulative[-1])
        # The first id whose sum exceeds the threshold; it has a probability above 0.
        chosen = int(torch.searchsorted(cumulative, threshold, right=True))
        return min(chosen, int(probabilities.nonzero()[-1]))

    def probabilities(
        self, logits: torch.Tensor, history_ids: Sequence[int] | torch.Tensor
    ) -> torch.Tensor:
        """(vocab,) float32 that sums to 1: what `choose` samples from, filtered ids being 0."""
        config = self.config
        scores = penalise(logits, history_ids, config.repetition_penalty)
        scores = scores / config.temperature
        scores = keep_top_k(scores, config.top_k)
        scores = keep_top_p(scores, config.top_p)
        scores = keep_min_p(scores, config.min_p)
        return scores.softmax(-1)


def penalise(
    logits: torch.Tensor, history_ids: Sequence[int] | torch.Tensor, penalty: float
) -> torch.Tensor:
    """Tokens of the history made less likely (CTRL, section 4.1): (vocab,) -> (vocab,)."""
    if penalty == 1.0 or len(history_ids) == 0:
        return logits
    ids = torch.as_tensor(history_ids, dtype=torch.int64, device="cpu")  # (num_tokens,)
    seen = logits[ids]
    out = logits.clone()
    out[ids] = torch.where(seen < 0, seen * penalty, seen / penalty)
    return out


def keep_top_k(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """The top_k best and all that equal the last of them; 0 keeps all. (vocab,) -> (vocab,)."""
    if top_k == 0 or top_k >= len(scores):
        return scores
    least = scores.topk(top_k).values[-1]
    return scores.masked_fill(scores < least, -torch.inf)


def keep_top_p(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """The fewest best whose probabilities reach top_p, at least one; among equals the lowest ids.
    (vocab,) -> (vocab,)."""
    if top_p >= 1.0:
        return scores
    best_first, ids = scores.sort(descending=True, stable=True)
    # Summed from the least likely up, as Hugging Face does: the sums round alike.
    below = best_first.flip(0).softmax(-1).cumsum(-1).flip(0)  # mass of this one and all after it
    dropped = below <= 1 - top_p
    dropped[0] = False
    return scores.masked_fill(torch.zeros_like(dropped).scatter(0, ids, dropped), -torch.inf)


def keep_min_p(scores: torch.Tensor, min_p: float) -> torch.Tensor:
    """All that are at least min_p times as likely as the best. (vocab,) -> (vocab,)."""
    if min_p == 0.0:
        return scores
    probabilities = scores.softmax(-1)
    dropped = probabilities < min_p * probabilities.max()
    dropped[scores.argmax()] = False
    return scores.masked_fill(dropped, -torch.inf)

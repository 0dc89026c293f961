"""From logits to one token id.

What settings make of the logits comes first (`logits_processors`), then a constraint, if there is
one, then the filters, in Hugging Face's order: temperature, top-k, top-p, min-p, typical-p. What is
left is sampled with one random number per token by inverting the cumulative distribution over ids,
on the CPU: the same seed gives the same tokens on every machine that computes the same logits.
Greedy choice goes to the lowest id among equals.

Knows no model and no text, and keeps no token: the history is given with every call.
"""

from __future__ import annotations

import math
import random
from copy import copy
from typing import TYPE_CHECKING

import torch

from ...kernels.threads import torch_alone
from ..errors import InputError, ModelError
from ..sessions.generation import GenerationConfig
from .logits_processors import Ids, processed, run_all

if TYPE_CHECKING:
    from ..answers.constraint import Constraint


class Sampler:
    """Chooses the tokens of one answer. Not for several answers: each starts from the seed.

    `seed` is the one in use, also where the config leaves it open, so that a run can be repeated.
    constraint: what tokens may come; it goes along with what is chosen. None: all may.
    answer_start: how many tokens of a history are the prompt's.
    """

    def __init__(
        self,
        config: GenerationConfig,
        constraint: Constraint | None = None,
        answer_start: int = 0,
    ):
        self.config, self.constraint = config, constraint
        self._answer_start = answer_start
        self._processors = config.logits_processors
        self.seed = random.SystemRandom().getrandbits(63) if config.seed is None else config.seed
        self._random = random.Random(self.seed)

    def twin(self) -> Sampler:
        """Another one that draws the numbers that this one will draw, for guesses. The caller's
        own processors are not asked there: each sees every token of the answer once."""
        other = copy(self)
        other._processors = ()
        other._random = random.Random()
        other._random.setstate(self._random.getstate())
        if self.constraint is not None:
            other.constraint = self.constraint.twin()
        return other

    @property
    def is_done(self) -> bool:
        """Whether nothing may follow what was chosen."""
        return self.constraint is not None and self.constraint.is_over

    @torch_alone
    def choose(self, logits: torch.Tensor, history_ids: Ids) -> int:
        """The next token. logits (vocab,), history_ids: prompt and answer so far (read only where
        a setting looks at them). ModelError when the logits are not numbers; InputError where
        a constraint cannot be followed, or nothing is left to choose."""
        token = self._chosen(logits, history_ids)
        if self.constraint is not None:
            self.constraint.accept(token)
        return token

    def _chosen(self, logits: torch.Tensor, history_ids: Ids) -> int:
        logits = logits.detach().to("cpu", torch.float32)  # (vocab,)
        best = _first_best(logits)
        if not math.isfinite(logits[best]):
            raise ModelError(
                "the model computed logits that are not numbers: its weights are damaged, or a "
                "dtype overflows"
            )
        if self.config.greedy:
            ids, scores = self._allowed(logits, history_ids)
            best = best if scores is logits else _first_best(scores)
            return best if ids is None else int(ids[best])
        ids, scores = self._kept(logits, history_ids)
        probabilities = scores.softmax(-1).double()
        if ids is None:
            ids = probabilities.nonzero().flatten()
            probabilities = probabilities[ids]
        cumulative = probabilities.cumsum(0)
        threshold = self._random.random() * float(cumulative[-1])
        # The first id whose sum exceeds the threshold; it has a probability above 0.
        chosen = int(torch.searchsorted(cumulative, threshold, right=True))
        return int(ids[min(chosen, len(ids) - 1)])

    def probabilities(self, logits: torch.Tensor, history_ids: Ids) -> torch.Tensor:
        """(vocab,) float32 that sums to 1: what `choose` samples from, filtered ids being 0."""
        ids, scores = self._kept(logits, history_ids)
        if ids is not None:
            scores = torch.full_like(logits, -torch.inf).scatter(0, ids, scores)
        return scores.softmax(-1)

    def _allowed(self, logits, history_ids) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The ids that may come, in order, and what their logits (vocab,) have become; None for all
        ids, whose logits are the same tensor where nothing changes them."""
        scores = processed(self.config, logits, history_ids, self._answer_start)
        scores, ids = run_all(self._processors, scores, history_ids), None
        if self.constraint is not None:
            ids = self.constraint.allowed()
            scores = scores[ids]
        if scores is not logits and scores.max() == -torch.inf:
            what = "token" if ids is None else "token that the JSON schema allows"
            raise InputError(
                f"no {what} is left to choose: what bans tokens (suppress_tokens, bad_words_ids, "
                "no_repeat_ngram_size, min_new_tokens, logits_processors) bans all of them"
            )
        return ids, scores

    def _kept(self, logits, history_ids) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The ids that pass all filters, in order, and their scores; None for all ids. Each filter
        looks only at what the one before it left: vocabularies are long.
        """
        config, (ids, scores) = self.config, self._allowed(logits, history_ids)
        scores = scores / config.temperature
        for keep in (
            lambda scores: top_k_places(scores, config.top_k),
            lambda scores: top_p_places(scores, config.top_p),
            lambda scores: min_p_places(scores, config.min_p),
            lambda scores: typical_places(scores, config.typical_p),
        ):
            places = keep(scores)
            if places is not None:
                scores = scores[places]
                ids = places if ids is None else ids[places]
        return ids, scores


def _first_best(scores: torch.Tensor) -> int:
    """The first of the greatest, or of those that are no numbers. (numpy says which of several
    equals it finds; torch leaves it open.)
    """
    return int(scores.numpy().argmax())


def top_k_places(scores: torch.Tensor, top_k: int) -> torch.Tensor | None:
    """Where the top_k best are, and all that equal the last of them; None for all (top_k = 0).
    (n,) -> (kept,), ascending."""
    if top_k == 0 or top_k >= len(scores):
        return None
    return (scores >= scores.topk(top_k).values[-1]).nonzero().flatten()


def top_p_places(scores: torch.Tensor, top_p: float) -> torch.Tensor | None:
    """Where the fewest best are whose probabilities reach top_p, at least one; among equals the
    lowest ids. None for all. (n,) -> (kept,), ascending."""
    if top_p >= 1.0:
        return None
    probabilities = scores.softmax(-1)
    # Those that together weigh less than half of what may be dropped are not worth sorting.
    heavy = (probabilities > (1 - top_p) / (2 * len(scores))).nonzero().flatten()
    weights = probabilities[heavy]
    rest = float(probabilities.sum(dtype=torch.float64) - weights.sum(dtype=torch.float64))
    order = scores[heavy].sort(descending=True, stable=True).indices
    # Summed from the least likely up, as Hugging Face does.
    below = weights[order].flip(0).cumsum(0).flip(0) + max(0.0, rest)
    kept = below > 1 - top_p  # mass of this one and of all after it
    kept[0] = True
    return heavy[order[kept]].sort().values


def min_p_places(scores: torch.Tensor, min_p: float) -> torch.Tensor | None:
    """Where all are that are at least min_p times as likely as the best; None for all.
    (n,) -> (kept,), ascending."""
    if min_p == 0.0:
        return None
    probabilities = scores.softmax(-1)
    kept = probabilities >= min_p * probabilities.max()
    kept[scores.argmax()] = True
    return kept.nonzero().flatten()


def typical_places(scores: torch.Tensor, typical_p: float) -> torch.Tensor | None:
    """Where those are that surprise about as much as is to be expected: the fewest, the most
    typical first, whose probabilities reach typical_p, and all that equal the last of them; None
    for all. (n,) -> (kept,), ascending. (Meister et al., 2023: Locally Typical Sampling)"""
    if typical_p >= 1.0:
        return None
    logprobs = scores.log_softmax(-1)
    probabilities = logprobs.exp()
    entropy = -(logprobs * probabilities).nansum()  # nan: 0 times -inf
    distance, order = (-logprobs - entropy).abs().sort(stable=True)
    below = int((probabilities[order].cumsum(0) < typical_p).sum())
    last = distance[min(below, len(distance) - 1)]
    return order[distance <= last].sort().values

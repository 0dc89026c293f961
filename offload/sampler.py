"""From logits to one token id.

The filters and their order are Hugging Face's: repetition penalty, temperature, top-k, top-p,
min-p. Presence and frequency penalties, which Hugging Face lacks, are OpenAI's, and follow the
repetition penalty. What is left is sampled with one random number per token by inverting the
cumulative distribution over ids, on the CPU: the same seed gives the same tokens on every machine
that computes the same logits. Greedy choice goes to the lowest id among equals. A constraint, if
there is one, comes before all filters but the penalties.

Knows no model and no text, and keeps no token: the history is given with every call.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING

import torch

from ..kernels.threads import torch_alone
from .errors import ModelError
from .generation import GenerationConfig

if TYPE_CHECKING:
    from .answers.constraint import Constraint


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
        self.seed = random.SystemRandom().getrandbits(63) if config.seed is None else config.seed
        self._random = random.Random(self.seed)

    def twin(self) -> Sampler:
        """Another one that draws the numbers that this one will draw."""
        other = copy(self)
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
    def choose(self, logits: torch.Tensor, history_ids: Sequence[int] | torch.Tensor) -> int:
        """The next token. logits (vocab,), history_ids: prompt and answer so far (read only where
        a penalty is set). ModelError when the logits are not numbers; InputError where
        a constraint cannot be followed."""
        token = self._chosen(logits, history_ids)
        if self.constraint is not None:
            self.constraint.accept(token)
        return token

    def _chosen(self, logits: torch.Tensor, history_ids: Sequence[int] | torch.Tensor) -> int:
        logits = logits.detach().to("cpu", torch.float32)  # (vocab,)
        best = _first_best(logits)
        if not math.isfinite(logits[best]):
            raise ModelError(
                "the model computed logits that are not numbers: its weights are damaged, or a "
                "dtype overflows"
            )
        if self.config.greedy:
            penalised = self._penalised(logits, history_ids)
            if self.constraint is not None:
                allowed = self.constraint.allowed()
                return int(allowed[_first_best(penalised[allowed])])
            return best if penalised is logits else _first_best(penalised)
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

    def probabilities(
        self, logits: torch.Tensor, history_ids: Sequence[int] | torch.Tensor
    ) -> torch.Tensor:
        """(vocab,) float32 that sums to 1: what `choose` samples from, filtered ids being 0."""
        ids, scores = self._kept(logits, history_ids)
        if ids is not None:
            scores = torch.full_like(logits, -torch.inf).scatter(0, ids, scores)
        return scores.softmax(-1)

    def _penalised(self, logits, history_ids) -> torch.Tensor:
        """(vocab,) -> (vocab,), the same tensor where nothing is penalised."""
        config = self.config
        scores = penalise(logits, history_ids, config.repetition_penalty)
        presence, frequency = config.presence_penalty, config.frequency_penalty
        if presence == frequency == 0.0:
            return scores
        return take_off(scores, history_ids[self._answer_start :], presence, frequency)

    def _kept(self, logits, history_ids) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The ids that pass all filters, in order, and their scores; None for all ids. Each filter
        looks only at what the one before it left: vocabularies are long.
        """
        config, ids = self.config, None
        scores = self._penalised(logits, history_ids)
        if self.constraint is not None:
            ids = self.constraint.allowed()
            scores = scores[ids]
        scores = scores / config.temperature
        for keep, limit in (
            (top_k_places, config.top_k),
            (top_p_places, config.top_p),
            (min_p_places, config.min_p),
        ):
            places = keep(scores, limit)
            if places is not None:
                scores = scores[places]
                ids = places if ids is None else ids[places]
        return ids, scores


def _first_best(scores: torch.Tensor) -> int:
    """The first of the greatest, or of those that are no numbers. (numpy says which of several
    equals it finds; torch leaves it open.)
    """
    return int(scores.numpy().argmax())


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


def take_off(
    logits: torch.Tensor,
    answer_ids: Sequence[int] | torch.Tensor,
    presence: float,
    frequency: float,
) -> torch.Tensor:
    """The logit of each token of the answer lowered by `presence`, and by `frequency` for each time
    that it is there (OpenAI, API reference): (vocab,) -> (vocab,)."""
    if len(answer_ids) == 0:
        return logits
    ids = torch.as_tensor(answer_ids, dtype=torch.int64, device="cpu")  # (num_tokens,)
    ids, counts = ids.unique(return_counts=True)
    out = logits.clone()
    out[ids] -= presence + frequency * counts
    return out


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

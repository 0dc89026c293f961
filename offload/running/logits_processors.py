"""From the logits that a model computed to those that a token is chosen by: biases, penalties, bans
and a caller's own functions.

Their order is Hugging Face's: bias, repetition penalty, bans of repeated runs, of words, of the end
and of tokens, and last what the caller brings. Presence and frequency penalties, which Hugging Face
lacks, are OpenAI's, and follow the repetition penalty. What is banned has the logit -inf.

Knows no model and no text, and keeps no token. Every function gives back the logits that it was
given, the same tensor, where it changes nothing, and changes a copy where it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from ..errors import InputError
from ..sessions.generation import GenerationConfig

Ids = Sequence[int] | torch.Tensor


def processed(
    config: GenerationConfig, logits: torch.Tensor, history_ids: Ids, answer_start: int
) -> torch.Tensor:
    """logits (vocab,) float32 on the CPU as the settings have them. history_ids: prompt and answer
    so far; answer_start: how many of them are the prompt's."""
    scores = add_bias(logits, config.logit_bias)
    scores = penalise(scores, history_ids, config.repetition_penalty)
    presence, frequency = config.presence_penalty, config.frequency_penalty
    if presence or frequency:
        scores = take_off(scores, history_ids[answer_start:], presence, frequency)
    too_few = len(history_ids) - answer_start < config.min_new_tokens
    return ban(
        scores,
        run_ends(history_ids, config.no_repeat_ngram_size),
        word_ends(history_ids, config.bad_words_ids),
        config.eos_token_ids if too_few else (),
        config.suppress_tokens,
    )


def add_bias(logits: torch.Tensor, bias: dict[int, float]) -> torch.Tensor:
    """(vocab,) -> (vocab,). bias: what is added to the logits of some tokens."""
    if not bias:
        return logits
    out = logits.clone()
    out[list(bias)] += torch.tensor(list(bias.values()), dtype=out.dtype)
    return out


def penalise(logits: torch.Tensor, history_ids: Ids, penalty: float) -> torch.Tensor:
    """Tokens of the history made less likely (CTRL, section 4.1): (vocab,) -> (vocab,)."""
    if penalty == 1.0 or len(history_ids) == 0:
        return logits
    ids = torch.from_numpy(_array(history_ids)).long()  # (num_tokens,)
    seen = logits[ids]
    out = logits.clone()
    out[ids] = torch.where(seen < 0, seen * penalty, seen / penalty)
    return out


def take_off(
    logits: torch.Tensor, answer_ids: Ids, presence: float, frequency: float
) -> torch.Tensor:
    """The logit of each token of the answer lowered by `presence`, and by `frequency` for each time
    that it is there (OpenAI, API reference): (vocab,) -> (vocab,)."""
    if len(answer_ids) == 0:
        return logits
    ids, counts = torch.from_numpy(_array(answer_ids)).long().unique(return_counts=True)
    out = logits.clone()
    out[ids] -= presence + frequency * counts
    return out


def run_ends(history_ids: Ids, size: int) -> np.ndarray | tuple[()]:
    """The tokens that would make the last `size` tokens of a text a run that it has already, some
    of them several times; with the size 0 none."""
    if size == 0 or len(history_ids) < size:
        return ()
    ids = _array(history_ids)
    if size == 1:
        return ids
    # Of the runs that are there and are to be completed; most tokens are no part of any.
    ends = np.flatnonzero(ids[size - 2 : -1] == ids[-1]) + size - 1
    for back in range(2, size):
        ends = ends[ids[ends - back] == ids[-back]]
    return ids[ends]


def word_ends(history_ids: Ids, words: Iterable[Sequence[int]]) -> list[int]:
    """The last tokens of the words of which all others stand at the text's end."""
    longest = max(map(len, words), default=0)
    last = list(map(int, history_ids[-longest:])) if longest else []
    return [word[-1] for word in words if list(word[:-1]) == last[len(last) - len(word) + 1 :]]


def ban(logits: torch.Tensor, *banned: Sequence[int] | np.ndarray) -> torch.Tensor:
    """(vocab,) -> (vocab,). banned: lists of ids, some of which the model may have no logit for."""
    given = [np.asarray(ids, dtype=np.int64) for ids in banned if len(ids)]
    if not given:
        return logits
    ids = np.concatenate(given)
    out = logits.clone()
    out[torch.from_numpy(ids[ids < len(logits)])] = -math.inf
    return out


def run_all(processors: Sequence[Callable], logits: torch.Tensor, history_ids: Ids) -> torch.Tensor:
    """(vocab,) -> (vocab,). Each processor takes ids (1, num_tokens) int64 and logits (1, vocab)
    float32, its own to change, and gives logits of that shape, as Hugging Face's LogitsProcessor
    does. InputError for one that gives anything else; what one raises goes on to the caller."""
    if not processors:
        return logits
    ids = torch.from_numpy(_array(history_ids)).long()[None]
    scores = logits[None].clone()
    for processor in processors:
        given = processor(ids, scores)
        if not isinstance(given, torch.Tensor) or given.shape != scores.shape:
            got = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
            raise _refusal(processor, f"must give logits {tuple(scores.shape)}, and gave {got}")
        if not given.is_floating_point():
            raise _refusal(processor, f"must give logits of floats, and gave {given.dtype}")
        scores = given.detach().to("cpu", torch.float32)
        if not bool((scores < math.inf).all()):  # so it is with nan
            raise _refusal(processor, "gave logits that are infinite or no numbers")
    return scores[0]


def _refusal(processor: Callable, reason: str) -> InputError:
    name = getattr(processor, "__name__", type(processor).__name__)
    return InputError(f"logits_processors: {name} {reason}")


def _array(ids: Ids) -> np.ndarray:
    """int32; a copy, for a view would keep the tokens from growing for as long as it lives."""
    given = ids.cpu().numpy() if isinstance(ids, torch.Tensor) else ids
    return np.array(given, dtype=np.int32)

"""What bounded mode loses and saves with one model, measured on a text and questions about it.

The text is read once, exactly. Then the same tokens are decoded in exact mode and at each epsilon,
and the distributions of the next token compared: of the text's last tokens, and of the model's own
answers. Samples nothing and chooses nothing for the runtime; the caller reads the result.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence as Sequence_
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError
from ..mode import Mode
from ..sessions.session import Session
from .scoring import output_bytes

if TYPE_CHECKING:
    from ..llm import LLM

EPSILONS = (0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Trial:
    """One way to choose pages, over all decoded tokens of a kind ("text" or "answers").

    epsilon: None for exact mode. kl_mean, kl_max: KL divergence in nats of the next token's
    distribution from exact mode's. same_top1: share of tokens with the same most likely successor.
    selected_share: of the sealed records, those attended in full. ms_per_token: the median; in
    bounded mode the first tokens find no hot records yet. Where not all pages fit, a plan for exact
    mode alone would keep more of them in memory than this one, which is made for selecting, does.
    """

    kind: str
    epsilon: float | None
    num_tokens: int
    kl_mean: float
    kl_max: float
    same_top1: float
    selected_share: float
    disk_bytes_per_token: float
    ms_per_token: float


@dataclass(frozen=True)
class Calibration:
    """document_tokens: how many the text has. trials: by kind, exact mode first."""

    document_tokens: int
    trials: tuple[Trial, ...]

    def largest_epsilon(self, most_kl: float, kind: str | None = None) -> float | None:
        """The largest epsilon whose mean KL is at most `most_kl`, as is that of all smaller ones;
        None where there is none. kind: of which trials; None: of every kind.
        """
        best = None
        for epsilon in sorted({t.epsilon for t in self.trials if t.epsilon is not None}):
            tried = [t for t in self.trials if t.epsilon == epsilon and kind in (None, t.kind)]
            if any(t.kl_mean > most_kl for t in tried) or not tried:
                break
            best = epsilon
        return best

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(
    llm: LLM,
    document: str,
    questions: Sequence_[str] = (),
    *,
    epsilons: Sequence_[float] = EPSILONS,
    num_tokens: int = 64,
) -> Calibration:
    """What bounded mode loses and saves at each epsilon, against exact mode: decoding the last
    num_tokens of the document, and at most as many of the model's own answer to each question.

    llm: an LLM that was opened with mode="bounded". The document is read once. Raises InputError
    for another mode, or where the document is too short to have pages to choose from;
    ContextOverflow and DoesNotFit as every request does.
    """
    if not llm.admission.selects:
        raise InputError("only a model that was opened with mode='bounded' can be calibrated")
    if num_tokens < 1:
        raise InputError(f"num_tokens is {num_tokens!r}; it must be 1 or more")
    _check_epsilons(epsilons)
    text = _text_ids(llm, document)
    asked = [llm.encode([{"role": "user", "content": f"{document}\n\n{q}"}]) for q in questions]
    sealed_from = llm.geometry.layout.page_tokens + 2 * llm.geometry.cell_tokens
    if len(text) < sealed_from + num_tokens:
        raise InputError(
            f"the document has {len(text):,} tokens, and only from "
            f"{sealed_from + num_tokens:,} on are there pages to choose from; give a longer one"
        )
    longest = max([len(text), *(len(ids) + num_tokens for ids in asked)])
    context = llm.context_or(longest)
    needs = {"output_bytes": output_bytes(llm.config.vocab_size, 2 * num_tokens)}
    with llm.open_session(context, sequences=4, **needs) as session:
        session._admit(longest)
        session.append(text[:-num_tokens])
        probes = [_Probe("text", text[:-num_tokens], text[-num_tokens:])]
        probes += [_Probe("answers", ids, None) for ids in asked]
        measured: dict[tuple[str, float | None], list[Run]] = {}
        for probe in probes:
            exact, forced = None, probe.forced
            for epsilon in (None, *epsilons):
                with session.fork() as branch:
                    branch._replace_from(_common(branch.tokens, probe.prompt), probe.prompt)
                    first, eos = branch.last_logits(), llm.generation.eos_token_ids
                    run = decode_run(branch, first, forced, num_tokens, _mode(epsilon), exact, eos)
                if exact is None:
                    exact, forced = run.log_probs, run.tokens
                run.log_probs = None
                measured.setdefault((probe.kind, epsilon), []).append(run)
    trials = [_trial(kind, epsilon, runs) for (kind, epsilon), runs in measured.items()]
    return Calibration(len(text), tuple(trial for trial in trials if trial.num_tokens))


@dataclass(frozen=True)
class _Probe:
    """What is decoded after a prompt: given tokens, or exact mode's own answer."""

    kind: str
    prompt: list[int]
    forced: list[int] | None


@dataclass
class Run:
    """What some decoded tokens were and took. log_probs: (tokens, vocab) of what follows each,
    where there was nothing to compare with; kl (nats) and same_top1: how far each was from it."""

    tokens: list[int]
    log_probs: torch.Tensor | None
    kl: list[float]
    same_top1: list[bool]
    seconds: list[float]
    selected_share: float = 1.0
    disk_bytes: int = 0


def decode_run(
    session: Session,
    first_logits: torch.Tensor,
    forced: list[int] | None,
    most_tokens: int,
    mode: Mode,
    exact: torch.Tensor | None = None,
    eos_token_ids: Sequence_[int] = (),
) -> Run:
    """Decode `forced` in a mode, or, greedily, what the model itself says, which begins with the
    likeliest of first_logits (vocab,). exact: the log-probabilities to compare with. The session
    is left with the tokens in it, and in this mode.
    """
    session._engine.choose_pages(mode)
    session._runtime.store.records.clear_hot()  # what other runs read
    session.usage.begin_count()
    logits, rows = first_logits, None
    if exact is None:
        rows = torch.empty(most_tokens, len(first_logits))
    run = Run([], None, [], [], [])
    for index in range(most_tokens if forced is None else len(forced)):
        token = int(logits.argmax()) if forced is None else forced[index]
        if forced is None and token in eos_token_ids:
            break
        began = time.perf_counter()
        logits = session.decode(token)
        run.seconds.append(time.perf_counter() - began)
        run.tokens.append(token)
        log_probs = logits.float().log_softmax(-1).cpu()
        reference = log_probs if exact is None else exact[index]
        if rows is not None:
            rows[index] = log_probs
        difference = reference.exp() * (reference - log_probs)
        run.kl.append(max(0.0, difference.nan_to_num().sum().item()))
        run.same_top1.append(bool(reference.argmax() == log_probs.argmax()))
    kv = session.usage.kv()
    run.selected_share = kv.get("selected_share", 1.0)
    run.disk_bytes = kv["bytes_read"].get("disk", 0)
    run.log_probs = None if rows is None else rows[: len(run.tokens)]
    return run


def _text_ids(llm, document: str) -> list[int]:
    """The document as a question about it begins, so that both share what is read."""
    tokenizer = llm.tokenizer
    if not tokenizer.template_source:
        return llm.encode(document)
    message = [{"role": "user", "content": document}]
    ids = tokenizer.chat_ids(message, add_generation_prompt=False)
    while ids and ids[-1] in tokenizer.special_ids:
        ids.pop()
    return ids


def _check_epsilons(epsilons: Sequence_[float]) -> None:
    if not epsilons or not all(0 <= epsilon <= 1 for epsilon in epsilons):
        raise InputError(f"epsilons are {list(epsilons)}; give at least one, each from 0 to 1")


def _mode(epsilon: float | None) -> Mode:
    if epsilon is None:
        return Mode()
    return Mode("bounded", selector_options={"epsilon": epsilon})


def _common(held: list[int], wanted: list[int]) -> int:
    """How many tokens both begin with."""
    pairs = zip(held, wanted, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(held), len(wanted)))


def _trial(kind: str, epsilon: float | None, runs: list[Run]) -> Trial:
    kl = [value for run in runs for value in run.kl]
    count = max(1, len(kl))
    return Trial(
        kind,
        epsilon,
        len(kl),
        sum(kl) / count,
        max(kl, default=0.0),
        sum(same for run in runs for same in run.same_top1) / count,
        sum(run.selected_share * len(run.tokens) for run in runs) / count,
        sum(run.disk_bytes for run in runs) / count,
        1e3 * statistics.median([s for run in runs for s in run.seconds] or [0.0]),
    )

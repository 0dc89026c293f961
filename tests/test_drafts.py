"""Guesses change no token and no bit, whoever makes them, and lose none; and they are made where
there is room for them.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from inspect import unwrap
from unittest import mock

import pytest
import torch
from interruptions import interrupted_after
from sessions_under_test import IDS, LONG, assert_nothing_is_held
from small_llm import open_spilling

from ebbtide.kernels import dispatch
from ebbtide.offload.errors import InputError, StorageError
from ebbtide.offload.layers.selected_attention import SelectedAttention
from ebbtide.offload.layers.states import States
from ebbtide.offload.mode import Mode
from ebbtide.offload.options import Options
from ebbtide.offload.planning.plan import Loaded
from ebbtide.offload.running import drafts
from ebbtide.offload.running.drafts import Drafts
from ebbtide.offload.running.engine import Engine
from ebbtide.offload.running.runtime import Runtime
from ebbtide.offload.running.sampler import Sampler
from ebbtide.offload.running.sequence import Sequence
from ebbtide.offload.sessions.generation import GenerationConfig
from ebbtide.offload.sessions.session import Session
from ebbtide.offload.sessions.stream import Stream
from ebbtide.prefetch.lookup import look_up

needs_kernels = pytest.mark.skipif(dispatch._cpu is None, reason="no compiled kernels here")
pytestmark = pytest.mark.usefixtures("few_pages")

CONTEXT, ANSWER = 600, 60
WITH_STATES = ("qwen3.5", "granite4-h", "lfm2", "falcon-h1")
PROMPTS = (LONG, IDS[400:430], IDS[430:440])
GREEDY = {"temperature": 0}
# Windows that keep enough pages for some to lie on disk.
WIDER = {name: {"sliding_window": 150} for name in ("gemma2", "gemma3n", "gemma4", "laguna-moe")}
WIDER["llama4-moe"] = {"attention_chunk_size": 150}
PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.2}
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 5, **PENALTIES}


@pytest.fixture
def always(monkeypatch) -> None:
    """Guesses are made whatever they take, but for the second round and each 64th."""
    monkeypatch.setattr(drafts._Way, "is_quicker_than", lambda self, *others: True)


def opened(folder, spill_dir, *, context=CONTEXT, **options):
    return open_spilling(folder, spill_dir, context=context, **options)


def planned(llm):
    return llm.admission.plan(CONTEXT, 4)


def answers(llm, config: dict, prompts=PROMPTS) -> tuple[list, list]:
    """Of a session's turns, and for each how many guesses were accepted and rejected."""
    tokens, guesses = [], []
    with llm.session() as session:
        for prompt in prompts:
            output = session.generate(list(prompt), max_new_tokens=ANSWER, **config)
            tokens.append(output.token_ids)
            details = output.usage["completion_tokens_details"]
            guesses.append(
                (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"])
            )
            assert output.token_ids == session.tokens[len(session.tokens) - len(tokens[-1]) :]
        session._runtime.store.check_integrity(deep=True)
    assert_nothing_is_held(llm)
    return tokens, guesses


@needs_kernels
@pytest.mark.parametrize(
    "name",
    [
        "llama2",
        "qwen2",
        "mistral",
        "gemma2",
        "gemma3n",
        "gemma4",
        "olmoe",
        "laguna-moe",
        "llama4-moe",
        *WITH_STATES,
    ],
)
@pytest.mark.parametrize("config", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_answers_are_the_same(checkpoint, tmp_path, always, name, config):
    folder = checkpoint(name, **WIDER.get(name, {}))
    with opened(folder, tmp_path, draft=False) as llm:
        expected, none = answers(llm, config)
        assert none == [(0, 0)] * 3 and llm.plan.drafts is None
    for share in (0.0, 0.3, 1.0):
        with opened(folder, tmp_path, share=share) as llm:
            found, guesses = answers(llm, config)
            # The layers of mistral all have windows.
            selects = share == 0.3 and name not in ("mistral", *WITH_STATES)
            assert llm.plan.drafts == ("selection" if selects else "lookup")
        assert found == expected
        if selects or (name in WITH_STATES and config is GREEDY):
            assert sum(accepted for accepted, _ in guesses) > 0


@needs_kernels
@pytest.mark.parametrize(
    "name",
    [
        *("llama2", "qwen2", "gemma2", "gemma3n-two-streams", "gemma4", "youtu", "llama4-moe"),
        *("qwen3.5", "falcon-h1"),
    ],
)
@pytest.mark.parametrize("config", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_answers_of_bounded_mode_are_the_same(checkpoint, tmp_path, always, name, config):
    folder, mode = checkpoint(name), Mode("bounded", selector_options={"epsilon": 0.05})
    with opened(folder, tmp_path, mode=mode, draft=False) as llm:
        expected, none = answers(llm, config)
        assert none == [(0, 0)] * 3 and llm.plan.drafts is None
    for share in (0.0, 0.3, 1.0):
        with opened(folder, tmp_path, mode=mode, share=share) as llm:
            found, guesses = answers(llm, config)
            assert llm.plan.drafts == "lookup"
        assert found == expected
        if config is GREEDY:  # random models repeat themselves then
            assert sum(accepted for accepted, _ in guesses) > 0


class Wrong:
    """Guesses anything."""

    def __init__(self, seed: int, vocab_size: int):
        self.random, self.vocab_size = random.Random(seed), vocab_size

    def __call__(self, tokens, count: int) -> list[int]:
        many = self.random.randint(0, count)
        return [self.random.randrange(self.vocab_size) for _ in range(many)]


@needs_kernels
@pytest.mark.parametrize("config", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["qwen2", *WITH_STATES])
def test_lies_change_no_token(checkpoint, tmp_path, always, monkeypatch, name, config):
    folder = checkpoint(name)
    with opened(folder, tmp_path, draft=False) as llm:
        expected, _ = answers(llm, config)
    monkeypatch.setattr(drafts, "look_up", Wrong(3, 256))
    with opened(folder, tmp_path) as llm:
        found, guesses = answers(llm, config)
    assert found == expected and sum(rejected for _, rejected in guesses) > 50


class HalfRight:
    """Knows what will be said, and guesses something else from a random place on."""

    def __init__(self, text: list[int], seed: int):
        self.text, self.random = text, random.Random(seed)

    def __call__(self, tokens, count: int) -> list[int]:
        known = self.text[len(tokens) : len(tokens) + count]
        right = self.random.randint(0, len(known))
        return known[:right] + [(token + 1) % 256 for token in known[right:]]


@needs_kernels
@pytest.mark.parametrize("name", ["qwen2", "kimi-linear-moe", "nemotron-h", "jamba", *WITH_STATES])
def test_guesses_are_right_up_to_anywhere(checkpoint, tmp_path, always, monkeypatch, name):
    folder, text = checkpoint(name), []
    with opened(folder, tmp_path, draft=False) as llm:
        expected, _ = answers(llm, SAMPLED)
    for prompt, answer in zip(PROMPTS, expected, strict=True):
        text += [*prompt, *answer]
    monkeypatch.setattr(drafts, "look_up", HalfRight(text, 5))
    with opened(folder, tmp_path) as llm:
        found, guesses = answers(llm, SAMPLED)
    assert found == expected
    assert min(sum(of) for of in zip(*guesses, strict=True)) > 20  # right and wrong ones


@needs_kernels
def test_an_answer_leaves_nothing_that_was_computed_for_guesses(
    checkpoint, tmp_path, always, monkeypatch
):
    """Another session's answer has that memory now."""
    monkeypatch.setattr(drafts, "look_up", Wrong(3, 256))
    with opened(checkpoint("qwen3.5"), tmp_path) as llm, llm.session() as session:
        for count in range(1, 9):
            session.generate(LONG[:40], max_new_tokens=count, **GREEDY)
            assert not session._sequence.verified
        stream, waited = session.stream(LONG[:40], max_new_tokens=20, **GREEDY), 0
        for _ in range(6):
            next(stream)
            waited += len(session._sequence.verified)
        stream.close()
        assert waited and not session._sequence.verified


# Wherever guesses are made, taken and kept.
TRACED = (
    *(Session.decode, Session.hold, Session._changed, Stream._step, Stream._end),
    *(Drafts.take, Drafts.forget, Drafts.begin_answer, Drafts.decode, Drafts._end_round),
    *(Drafts._guess, Drafts._draft, look_up, Sequence.twin, Runtime.make_drafter),
    *(
        unwrap(Engine.verify),
        Engine.take_in,
        *(States.begin, States.end),
        SelectedAttention.run_several,
        SelectedAttention.note,
    ),
)


@needs_kernels
@pytest.mark.parametrize(
    ("name", "mode"), [("llama2", "exact"), ("llama2", "bounded"), ("qwen3.5", "exact")]
)
def test_an_interruption_at_any_line_loses_nothing(checkpoint, tmp_path, always, name, mode):
    """All that was shown stays and nothing else, and what follows is what follows from it."""
    with opened(checkpoint(name), tmp_path, mode=Mode(mode)) as llm:
        with llm.session() as session:
            session.append(LONG)
            prompt = session.fork()
            expected = prompt.generate(max_new_tokens=12, **GREEDY).token_ids
            prompt.close()
            for count in range(1, 10_000, 7):
                with session.fork() as branch:
                    stream, shown = branch.stream(max_new_tokens=12, **GREEDY), []

                    def read(stream=stream, shown=shown):
                        for piece in stream:
                            shown.extend(piece.token_ids)

                    is_interrupted = interrupted_after(count, TRACED, read)
                    stream.close()  # which ends what may have been interrupted at its end
                    taken = stream.output.token_ids
                    assert taken[: len(shown)] == shown and len(taken) <= len(shown) + 1
                    assert taken == expected[: len(taken)]
                    assert branch.tokens == LONG + taken
                    after = branch.last_logits().clone()
                if mode == "exact":  # as prefill is, which computes nearly the same
                    with session.fork() as other:
                        other.append(taken)
                        assert (other.last_logits() - after).abs().max() < 0.05
                if not is_interrupted:
                    break
            assert shown == expected and count > 300
            session._runtime.store.check_integrity(deep=True)


@needs_kernels
@pytest.mark.parametrize("name", ["llama2", "qwen3.5"])
def test_text_that_goes_another_way_forgets_the_guesses(
    checkpoint, tmp_path, always, monkeypatch, name
):
    """Every way to change a session's tokens, with guesses waiting."""
    folder = checkpoint(name)
    if (
        name in WITH_STATES
    ):  # which guesses are looked up for alone, and this text says nothing again
        monkeypatch.setattr(drafts, "look_up", Wrong(3, 256))

    waiting: Counter[str] = Counter()  # times that guesses waited when the text was changed

    def changed(llm) -> list[torch.Tensor]:
        found, sampler = [], Sampler(GenerationConfig())

        def wrong(session):  # not what was guessed
            found.append(session.decode(11).clone())

        def fork(session):
            with session.fork() as branch:
                found.append(branch.decode(9).clone())

        def truncate(session):
            session.truncate(len(session.tokens) - 1)

        def append(session):
            session.append([4, 5])

        def hold(session):
            session.hold(7)

        with llm.session() as session:

            def write(count: int) -> None:
                logits = session.last_logits()
                for _ in range(count):
                    logits = session.decode(sampler.choose(logits, ()), sampler)
                found.append(logits.clone())

            session.append(LONG)
            for count in range(2, 9):
                for change in (wrong, fork, truncate, append, hold):
                    write(count)
                    waiting[change.__name__] += bool(session._drafts and session._drafts._ahead)
                    change(session)
        return found

    with opened(folder, tmp_path, draft=False) as llm:
        expected = changed(llm)
    with opened(folder, tmp_path) as llm:
        assert all(map(torch.equal, changed(llm), expected))
    assert len(waiting) == 5 and min(waiting.values()) > 0


@needs_kernels
def test_what_an_answer_counted_stays(checkpoint, tmp_path, always):
    with opened(checkpoint("llama2"), tmp_path) as llm, llm.session() as session:
        stream = session.stream(LONG, max_new_tokens=20, **GREEDY)
        list(stream)
        before = stream.output.usage
        assert before["completion_tokens_details"]["accepted_prediction_tokens"] > 0
        session.generate(IDS[400:430], max_new_tokens=20, **GREEDY)
        assert stream.output.usage == before


@needs_kernels
@pytest.mark.parametrize(("name", "mode"), [("gemma2", "bounded"), ("mistral", "exact")])
def test_verifying_wishes_for_what_it_reads_alone(checkpoint, tmp_path, name, mode):
    """Not for all of a layer that selects, nor for spans that a window has passed."""
    with opened(checkpoint(name), tmp_path, mode=Mode(mode), share=0.0) as llm:
        with llm.session() as session:
            session.append(LONG)
            session.last_logits()
            engine, sequence, wished = session._engine, session._sequence, []
            spans = session._runtime.store.spans
            prefetch = spans.prefetch

            def watched(table, layer, wanted=None):
                wished.append((layer, wanted))
                return prefetch(table, layer, wanted)

            with mock.patch.object(spans, "prefetch", watched):
                engine.verify(sequence, [5, 6, 7])
            windows, cell = engine.config.windows, sequence.length // sequence.cell_tokens
            assert wished
            for layer, wanted in wished:
                assert windows[layer] is not None
                seen = engine.attention.spans_wanted(layer, sequence.length, cell, windows[layer])
                assert wanted == list(seen)


@needs_kernels
def test_drafts_of_a_model_with_windows_wish_for_nothing_in_vain(checkpoint, tmp_path, always):
    """A layer that selects reads single records: its spans must not fill the staging slots."""
    folder = checkpoint("gemma2", **WIDER["gemma2"])
    with opened(folder, tmp_path) as llm, llm.session() as session:
        session.append(LONG)
        session.last_logits()
        drafter, spans = session._runtime.make_drafter(), session._runtime.store.spans
        wished, prefetch = [], spans.prefetch

        def watched(table, layer, wanted=None):
            wished.append(layer)
            return prefetch(table, layer, wanted)

        with mock.patch.object(spans, "prefetch", watched):
            for token in (5, 6, 7):
                session._sequence.tokens.append(token)
                drafter.decode(session._sequence)
        windows = session._engine.config.windows
        assert wished and all(windows[layer] for layer in wished)


@needs_kernels
def test_stop_strings_and_ends_leave_the_session_whole(checkpoint, tmp_path, always):
    folder = checkpoint("llama2")
    with opened(folder, tmp_path, draft=False) as llm:
        whole = llm.generate(LONG, max_new_tokens=ANSWER, **GREEDY)
        stop = whole.text[len(whole.text) // 2 :][:3]
        expected = llm.generate(LONG, max_new_tokens=ANSWER, stop_strings=[stop], **GREEDY)
        assert expected.finish_reason == "stop" and len(expected.token_ids) < ANSWER
    with opened(folder, tmp_path) as llm, llm.session() as session:
        output = session.generate(LONG, max_new_tokens=ANSWER, stop_strings=[stop], **GREEDY)
        assert (output.text, output.token_ids) == (expected.text, expected.token_ids)
        assert session.tokens == LONG + output.token_ids
        assert session._sequence.length < len(session.tokens)
    with opened(folder, tmp_path, context=len(LONG) + 20) as llm:  # the context's end
        output = llm.generate(LONG, **GREEDY)
        assert output.finish_reason == "length" and output.token_ids == whole.token_ids[:20]


# ---- where there are guesses -----------------------------------------------------------------


@needs_kernels
def test_pages_are_selected_for_guesses_where_they_are_on_disk(checkpoint, tmp_path):
    folder = checkpoint("llama2")
    with opened(folder, tmp_path, share=1.0) as llm, llm.session() as session:
        plan, runtime = session._runtime.plan, session._runtime
        assert plan.drafts == "lookup" and runtime.make_drafter() is None
    with opened(folder, tmp_path) as llm, llm.session() as session:
        plan, exact = session._runtime.plan, session._engine
        assert plan.drafts == "selection" and not plan.selects and plan.hot_records
        assert plan.decode_bytes["disk"] > 0  # for each reading
        drafter = session._runtime.make_drafter()
        assert exact.selected is None and drafter.selected is not None
        assert session._runtime.make_drafter() is drafter
    with opened(folder, tmp_path, share=0.0) as llm:  # there is no room for them
        assert planned(llm).drafts == "lookup" and not planned(llm).hot_records
    with opened(folder, tmp_path, share=0.95) as llm:  # more would be moved out than that is worth
        assert planned(llm).far_spans["disk"] and planned(llm).drafts == "lookup"
    with opened(folder, tmp_path, codec="full") as llm:
        assert planned(llm).drafts == "lookup"
    with opened(checkpoint("mistral"), tmp_path) as llm:  # windows everywhere
        assert planned(llm).drafts == "lookup"
    with opened(folder, tmp_path, mode=Mode("bounded")) as llm:  # few pages are read anyway
        assert planned(llm).drafts == "lookup"
    for options in ({"mode": Mode("deadline")}, {"draft": False}):
        with opened(folder, tmp_path, **options) as llm, llm.session() as session:
            assert session._runtime.plan.drafts is None and session._drafts is None


@needs_kernels
def test_a_head_that_streams_is_not_drafted_with(checkpoint, tmp_path):
    with opened(checkpoint("llama2"), tmp_path) as llm:
        limits = llm.admission.limits
        # Reading so small a head takes more than the head does.
        for loaded, more in ((Loaded(0, True), 0), (Loaded(0, False), 256 << 10)):
            llm.admission.limits = replace(limits, host_bytes=limits.host_bytes + more)
            plan = llm.admission.plan(CONTEXT, 4, loaded=loaded)
            assert plan.fits and plan.far_spans["disk"]
            assert (plan.drafts == "selection") == loaded.head_resident


@needs_kernels
def test_what_only_scores_plans_for_no_guesses(checkpoint, tmp_path):
    with opened(checkpoint("llama2"), tmp_path) as llm:
        llm.admission.limits = replace(llm.admission.limits, host_bytes=1 << 30)
        llm.logits(IDS)
        assert llm.admission.latest_plan.drafts is None


def test_without_kernels_nothing_is_guessed(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("EBBTIDE_KERNELS", "reference")
    with opened(checkpoint("llama2"), tmp_path) as llm, llm.session() as session:
        assert llm.plan.drafts is None and session._drafts is None


def test_draft_is_true_or_false():
    with pytest.raises(InputError, match="draft is 'yes'; allowed is True or False"):
        Options(draft="yes")


@needs_kernels
def test_a_failing_disk_is_said_and_nothing_hangs(checkpoint, tmp_path, always, monkeypatch):
    with opened(checkpoint("llama2"), tmp_path) as llm, llm.session() as session:
        stream = session.stream(LONG, max_new_tokens=ANSWER, **GREEDY)
        next(stream)
        store = session._runtime.store

        def fails(*_):
            raise StorageError("the disk is gone")

        monkeypatch.setattr(store._transfers, "demand_all", fails)
        with pytest.raises(StorageError, match="gone"):
            list(stream)

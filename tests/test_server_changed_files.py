"""A server whose model's files change: what is the same goes on, another model answers the next
request, and what cannot be loaded is said until it can.
"""

from __future__ import annotations

import asyncio
import os

import pytest
from random_checkpoints import make
from small_llm import open_small
from tool_templates import with_tools

from ebbtide import Output, errors
from ebbtide.cli.options import Settings
from ebbtide.cli.run import Run
from ebbtide.cli.server import worker as worker_module
from ebbtide.cli.server.error_object import error_object
from ebbtide.cli.server.job import Job
from ebbtide.cli.server.request import chat_request, completion_request
from ebbtide.cli.server.text_query import tokenize_query
from ebbtide.cli.server.worker import Worker
from ebbtide.cli.signals import Signals
from ebbtide.offload.planning import admission

CONTEXT, HELLO = 1000, [{"role": "user", "content": "Hello"}]


def made(folder, seed: int = 0, **config):
    return with_tools(make("llama2", folder, seed=seed, **config), "hermes")


@pytest.fixture
def model(tmp_path):
    folder = made(tmp_path / "model")
    weights = folder / "model.safetensors"
    found = weights.stat()
    os.utime(weights, ns=(found.st_atime_ns, found.st_mtime_ns - 86_400 * 10**9))
    return folder


@pytest.fixture
def loads(monkeypatch) -> list:
    """Of each time that weights are loaded."""
    found, original = [], admission.WeightStore
    monkeypatch.setattr(
        admission, "WeightStore", lambda *a, **k: found.append(a) or original(*a, **k)
    )
    return found


@pytest.fixture
def worker(model, tmp_path, loads):
    with open_small(model, tmp_path) as llm:
        llm._context = CONTEXT
        yield Worker(Run(Settings(quiet=True), Signals()), llm, most_waiting=1)


def last_event(worker, request):
    async def collect():
        job = Job(request)
        worker.answer(job)
        await asyncio.sleep(0)  # what was put is there
        return [job.events.get_nowait() for _ in range(job.events.qsize())]

    return asyncio.run(collect())[-1]


def ask(worker, **fields):
    fields = {"messages": HELLO, "max_tokens": 8, "temperature": 0, **fields}
    return last_event(worker, chat_request(fields))


def expected_of(folder, tmp_path) -> list[int]:
    """What a server that was started with a model answers."""
    with open_small(folder, tmp_path) as llm:
        llm._context = CONTEXT
        return ask(Worker(Run(Settings(quiet=True), Signals()), llm, most_waiting=1)).token_ids


def test_a_touched_file_and_a_copy_go_on_with_the_weights_in_memory(worker, model, loads):
    first = ask(worker).token_ids
    weights = model / "model.safetensors"
    for change in (
        lambda: os.utime(weights),
        lambda: [os.utime(path) for path in model.iterdir()],
        lambda: (model / "other").write_bytes(weights.read_bytes()),
        lambda: (model / "other").replace(weights),
    ):
        change()
        assert ask(worker).token_ids == first
        assert len(loads) == 1 and worker.counts["requests_failed"] == 0


@pytest.mark.parametrize("how", ["replaced", "overwritten"])
@pytest.mark.parametrize("config", [{}, {"num_hidden_layers": 5}])
def test_another_model_in_its_place_answers_the_next_request(
    worker, model, tmp_path, loads, how, config
):
    other = made(tmp_path / "other", seed=1, **config)
    expected = expected_of(other, tmp_path)
    assert ask(worker).token_ids != expected
    for path in other.iterdir():
        if how == "replaced":
            path.replace(model / path.name)
        else:
            (model / path.name).write_bytes(path.read_bytes())
    loads.clear()
    for _ in range(2):
        assert ask(worker).token_ids == expected and len(loads) == 1
    assert worker.counts["requests_failed"] == 0


def test_a_template_that_changed_is_the_model_too(worker, model, tmp_path):
    other = with_tools(make("llama2", tmp_path / "other"), "hermes", more="Be brief.")
    expected = expected_of(other, tmp_path)
    assert ask(worker).token_ids != expected
    for path in other.iterdir():
        path.replace(model / path.name)
    assert ask(worker).token_ids == expected


def test_an_answer_under_way_ends_with_an_error_and_the_next_is_the_new_models(
    worker, model, tmp_path, monkeypatch
):
    """The embedding's rows are read from the file for each token."""
    weights, other = model / "model.safetensors", made(tmp_path / "other", seed=1)
    expected, started = expected_of(other, tmp_path), []
    told = Worker._told

    def overwrites(self, job, stream):
        weights.write_bytes((other / "model.safetensors").read_bytes())
        started.append(True)
        return told(self, job, stream)

    monkeypatch.setattr(Worker, "_told", overwrites)
    failed = ask(worker)
    monkeypatch.undo()
    assert started and isinstance(failed, errors.BadCheckpoint)
    assert error_object(failed)[0] == 503
    assert ask(worker).token_ids == expected


def test_what_cannot_be_loaded_is_said_until_it_can(worker, model):
    first, weights = ask(worker).token_ids, model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    for _ in range(2):
        failed = ask(worker)
        assert isinstance(failed, errors.BadCheckpoint) and "incomplete" in str(failed)
        status, body = error_object(failed)
        assert status == 503 and body["error"]["code"] == "model_unavailable"
        assert "incomplete" in worker.trouble
        assert worker.trouble.startswith("model/model.safetensors")  # not where it lies
        assert not worker.is_loaded
    # What only the tokenizer is asked needs no weights.
    assert last_event(worker, tokenize_query({"content": "Hello"}))["tokens"]
    weights.write_bytes(whole)
    assert ask(worker).token_ids == first and worker.trouble is None


def test_a_context_that_does_not_fit_is_the_servers_trouble(worker, model, monkeypatch):
    full = errors.DoesNotFit("no room", tier="host", needed_bytes=2, available_bytes=1)

    def fails():
        raise full

    ask(worker)
    made(model, seed=1)
    monkeypatch.setattr(worker._llm, "session", fails)
    assert isinstance(ask(worker), errors.StorageError) and worker.trouble == "no room"
    monkeypatch.undo()
    assert isinstance(ask(worker), Output) and worker.trouble is None


def test_a_model_that_is_not_made_for_the_context_is_the_servers_trouble(worker, model, tmp_path):
    first = ask(worker).token_ids
    short, kept = made(tmp_path / "short", max_position_embeddings=600), tmp_path / "kept"
    model.rename(kept)
    short.rename(model)
    for _ in range(2):
        assert isinstance(ask(worker), errors.StorageError)
        assert "1,000" in worker.trouble and "600" in worker.trouble
    model.rename(short)
    kept.rename(model)
    assert ask(worker).token_ids == first and worker.trouble is None


def test_nobody_needs_to_ask_for_it_to_be_tried_again(worker, model, monkeypatch):
    """Who is told that a server is not well may send it nothing more."""

    class Well(BaseException):
        pass

    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert isinstance(ask(worker), errors.BadCheckpoint) and worker.trouble
    opens, tries = worker._open_session, []

    def watched():
        tries.append(worker.trouble)
        if len(tries) == 3:
            weights.write_bytes(whole)
        opens()
        raise Well

    monkeypatch.setattr(worker, "_open_session", watched)
    monkeypatch.setattr(worker_module, "_SIGNAL_S", 0.001)
    monkeypatch.setattr(worker_module, "_TRY_AGAIN_S", 0.0)
    worker._try_again_s = 0.0
    with pytest.raises(Well):
        worker.work()
    assert len(tries) == 3 and worker.trouble is None and worker.is_loaded


def test_the_context_told_is_the_new_models(worker, model, tmp_path):
    other = made(tmp_path / "other", max_position_embeddings=600)
    worker._llm._context = None
    for path in other.iterdir():
        path.replace(model / path.name)
    assert isinstance(ask(worker), Output)
    assert worker.context == 600
    long = completion_request({"prompt": [5] * 700})
    assert isinstance(last_event(worker, long), errors.ContextOverflow)

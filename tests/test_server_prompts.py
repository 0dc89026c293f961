"""Several prompts in one request for a completion: each has a choice, one after another."""

from __future__ import annotations

import asyncio
import json

import pytest
from server_listening import ScriptedWorker, ask, listening, output

from ebbtide import LLM, Output, Piece, errors
from ebbtide.cli.options import Settings
from ebbtide.cli.run import Run
from ebbtide.cli.server.bad_request import BadRequest
from ebbtide.cli.server.estimate import estimate_query
from ebbtide.cli.server.job import Answered, HungUp, Job, Started
from ebbtide.cli.server.request import completion_request
from ebbtide.cli.server.worker import Worker
from ebbtide.cli.signals import Signals

PATH = "/v1/completions"

# --- requests


@pytest.mark.parametrize("prompt", [["a", "b", "a"], [[1], [2, 3]], ["a", [1]]])
def test_each_is_a_text_or_token_ids(prompt):
    found = completion_request({"prompt": prompt})
    assert found.prompts == prompt and found.prompt == prompt[0] and not found.is_chat


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"prompt": ["a", 1]}, r"'prompt\[1\]' must be a text or a list of token ids, and not emp"),
        ({"prompt": ["a", ""]}, r"'prompt\[1\]' must be"),
        ({"prompt": [[1], [2.5]]}, r"'prompt\[1\]' must be"),
        ({"prompt": ["a"] * 129}, "may hold 128 prompts at most, not 129"),
        ({"prompt": ["a", "b"], "logprobs": 1}, "for several prompts need 'stream': true"),
    ],
)
def test_the_wrong_one_is_named(body, says):
    with pytest.raises(BadRequest, match=says):
        completion_request(body)
    if "logprobs" in body:
        assert completion_request({**body, "stream": True}).tells_logprobs


def test_what_one_would_take_is_told_of_one():
    with pytest.raises(BadRequest, match="'prompt' must be one prompt here"):
        estimate_query({"prompt": ["a", "b"]}, lambda request: {})


# --- responses


EVENTS = (
    *(Started(3, 2), Piece("One", [1]), Piece(".", [1]), Answered(output("One."))),
    *(Started(3, 2), Answered(output("", finish_reason="length"))),
    *(Started(3, 2), Piece("Three.", [1]), output("Three.")),
)
ASKED = {"prompt": ["a", "b", "c"]}


def test_a_whole_answer_has_a_choice_for_each():
    with listening(ScriptedWorker(*EVENTS)) as (address, _):
        status, text = ask(address, ASKED, PATH)
    choices = json.loads(text)["choices"]
    assert status == 200
    assert [(c["index"], c["text"], c["finish_reason"]) for c in choices] == [
        (0, "One.", "stop"),
        (1, "", "length"),
        (2, "Three.", "stop"),
    ]


def test_a_stream_tells_of_one_after_another():
    body = {**ASKED, "stream": True, "stream_options": {"include_usage": True}}
    with listening(ScriptedWorker(*EVENTS)) as (address, _):
        status, text = ask(address, body, PATH)
    *lines, end = [line for line in text.split("\n") if line.startswith("data: ")]
    *chunks, last = [json.loads(line.removeprefix("data: ")) for line in lines]
    told = [chunk["choices"][0] for chunk in chunks]
    assert [(c["index"], c["text"], c["finish_reason"]) for c in told] == [
        (0, "One", None),
        (0, ".", None),
        (0, "", "stop"),
        (1, "", "length"),
        (2, "Three.", None),
        (2, "", "stop"),
    ]
    assert status == 200 and last["usage"] and last["choices"] == [] and end == "data: [DONE]"


# --- the model's side


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spill")
    with LLM.open(None, context=96, spill_dir=str(folder), prefix_cache="off") as llm:
        yield llm


@pytest.fixture
def worker(llm):
    found = Worker(Run(Settings(quiet=True), Signals()), llm, most_waiting=1)
    yield found
    found._close_session()


def events_of(worker, request, on_event=lambda job, event: None) -> list:
    async def collect():
        job, events = Job(request), []
        job.put = lambda event: (events.append(event), on_event(job, event))
        worker.answer(job)
        return events

    return asyncio.run(collect())


PROMPTS = ["Once upon a time", "The tower of", "Once upon a hill"]
WAY = {"max_tokens": 5, "temperature": 0}


def test_answers_are_those_that_each_prompt_has_alone_and_their_usage_is_summed(worker):
    alone = [events_of(worker, completion_request({"prompt": p, **WAY}))[-1] for p in PROMPTS]
    events = events_of(worker, completion_request({"prompt": PROMPTS, **WAY}))
    ends = [event for event in events if isinstance(event, Answered | Output)]
    outputs = [end.output if isinstance(end, Answered) else end for end in ends]
    assert [found.text for found in outputs] == [found.text for found in alone]
    assert [type(end) for end in ends] == [Answered, Answered, Output] and events[-1] is ends[-1]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert outputs[-1].usage[name] == sum(found.usage[name] for found in alone)
    known = [event.cached_tokens for event in events if isinstance(event, Started)]
    assert outputs[-1].usage["prompt_tokens_details"]["cached_tokens"] == sum(known) > 0


def test_answers_have_together_as_many_tokens_as_the_context_holds(worker):
    """There is memory for the text of so many; each that is left has one token, and says why."""
    asked = {"prompt": PROMPTS * 2, "temperature": 0, "min_tokens": 70}
    events = events_of(worker, completion_request(asked))
    ends = [event for event in events if isinstance(event, Answered | Output)]
    outputs = [end.output if isinstance(end, Answered) else end for end in ends]
    written = [len(found.token_ids) for found in outputs]
    assert written[0] >= 70 and sum(written[:2]) == worker.context and written[2:] == [1] * 4
    assert {found.finish_reason for found in outputs[1:]} == {"length"}


@pytest.mark.parametrize(
    ("wrong", "error"), [("word " * 500, errors.ContextOverflow), ([10**6], errors.InputError)]
)
def test_none_is_answered_where_one_is_wrong(worker, wrong, error):
    events = events_of(worker, completion_request({"prompt": ["Once", wrong], **WAY}))
    assert [type(event) for event in events] == [error]


def test_who_hangs_up_leaves_the_others_unanswered(worker):
    def hang_up(job, event):
        job.has_hung_up = job.has_hung_up or isinstance(event, Answered)

    events = events_of(worker, completion_request({"prompt": PROMPTS, **WAY}), hang_up)
    assert isinstance(events[-1], HungUp)
    assert sum(isinstance(event, Answered) for event in events) == 1
    # The session goes on.
    assert events_of(worker, completion_request({"prompt": "Once", **WAY}))[-1].text

"""The `openai` package against a running server: what its users send, and what its types make of
the answers.
"""

from __future__ import annotations

import pytest
from server_listening import strictly
from server_process import KEY, serving

from ebbtide import LLM

openai = pytest.importorskip("openai")

HELLO = [{"role": "user", "content": "Say something."}]
ASKED = {"model": "ebb-nano", "messages": HELLO, "temperature": 0, "max_completion_tokens": 12}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("served"), "--context", "2048") as server:
        yield openai.OpenAI(base_url=server.said["url"], api_key=KEY, max_retries=0, timeout=50)


def test_a_stream_ends_with_its_usage_where_that_is_asked_for(client):
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    whole = client.chat.completions.create(**ASKED)
    strictly(ChatCompletion, whole)
    assert whole.usage.completion_tokens <= 12 and whole.choices[0].message.content
    for options in ({}, {"stream_options": {"include_usage": True}}):
        chunks = [*client.chat.completions.create(**ASKED, stream=True, **options)]
        for chunk in chunks:
            strictly(ChatCompletionChunk, chunk)
        said = [c.choices[0].delta.content or "" for c in chunks if c.choices]
        assert "".join(said) == whole.choices[0].message.content
        told = [chunk.usage for chunk in chunks if chunk.usage is not None]
        assert len(told) == len(options)
        for usage in told:
            assert usage.completion_tokens == whole.usage.completion_tokens
            assert chunks[-1].usage == usage and chunks[-1].choices == []


def test_what_changes_nothing_is_passed_over_and_the_rest_has_its_effect(client):
    neutral = {
        **{"n": 1, "user": "ann", "metadata": {"a": "b"}, "store": False},
        **{"service_tier": "auto", "logit_bias": {}, "presence_penalty": 0, "logprobs": False},
        **{"safety_identifier": "x", "prompt_cache_options": {"mode": "implicit"}},
    }
    said = client.chat.completions.create(**ASKED).choices[0].message.content
    assert client.chat.completions.create(**ASKED, **neutral).choices[0].message.content == said
    asked = {**ASKED, "temperature": 1.4, "max_completion_tokens": 24}
    drawn = [
        client.chat.completions.create(**asked, seed=seed).choices[0].message.content
        for seed in (1, 1, -1, -1)
    ]
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]
    stops = [said[5:8], "never there"]
    stopped = client.chat.completions.create(**ASKED, stop=stops).choices[0]
    assert stopped.message.content == said[: said.index(said[5:8])]
    assert stopped.finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"n": 2}, "n", "there is one answer to a request"),
        ({"logit_bias": {"5": 200}}, "logit_bias", "a number from -100 to 100"),
        ({"modalities": ["text", "audio"]}, "modalities", "text alone"),
        ({"web_search_options": {}}, "web_search_options", "not a field"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "What is this?"},
                            {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}},
                        ],
                    }
                ]
            },
            "messages[0].content",
            "a part of type 'image_url' cannot be read",
        ),
    ],
)
def test_what_is_not_done_is_refused_by_name(client, fields, param, says):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**{**ASKED, **fields})
    error = refused.value
    assert error.param == param and says in error.message


def test_tokens_are_favoured_and_banned(client):
    with LLM.open(None) as llm:
        way = {"max_new_tokens": 9, "temperature": 0}
        first = llm.generate("Once upon a time", **way).token_ids[0]
        bans = {"logit_bias": {first: -100}, "no_repeat_ngram_size": 2}
        alone = llm.generate("Once upon a time", **way, **bans)
    asked = {"model": "ebb-nano", "prompt": "Once upon a time", "max_tokens": 9, "temperature": 0}
    more = {"logit_bias": {str(first): -100}, "extra_body": {"no_repeat_ngram_size": 2}}
    assert client.completions.create(**asked, **more).choices[0].text == alone.text
    with pytest.raises(openai.BadRequestError, match="there is no token 999999"):
        client.completions.create(**asked, logit_bias={"999999": 1})


def test_a_stream_that_is_closed_leaves_the_server_to_others(client):
    stream = client.chat.completions.create(**{**ASKED, "max_completion_tokens": 900}, stream=True)
    next(stream)
    stream.close()
    assert client.chat.completions.create(**ASKED).choices[0].message.content


def test_an_asynchronous_client_asks_several_at_once(client):
    import asyncio

    async def ask_all():
        base, key = str(client.base_url), client.api_key
        async with openai.AsyncOpenAI(base_url=base, api_key=key, max_retries=0) as several:
            asked = [several.chat.completions.create(**ASKED) for _ in range(3)]
            return await asyncio.gather(*asked)

    found = asyncio.run(ask_all())
    assert len({answer.choices[0].message.content for answer in found}) == 1


def test_several_prompts_have_a_choice_each(client):
    from openai.types import Completion

    prompts = ["Once upon a time", "The tower", "Once"]
    asked = {"model": "ebb-nano", "max_tokens": 6, "temperature": 0}
    alone = [client.completions.create(prompt=p, **asked).choices[0].text for p in prompts]
    whole = client.completions.create(prompt=prompts, **asked)
    strictly(Completion, whole)
    assert [(choice.index, choice.text) for choice in whole.choices] == [*enumerate(alone)]
    assert whole.usage.completion_tokens == 18
    said = [""] * len(prompts)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in client.completions.create(prompt=prompts, **asked, **options):
        for choice in chunk.choices:
            said[choice.index] += choice.text
    assert said == alone and chunk.usage.completion_tokens == 18
    for prompt in ([], ["Once", ""], ["Once"] * 129):
        with pytest.raises(openai.BadRequestError, match="'prompt"):
            client.completions.create(prompt=prompt, **asked)


def test_models_and_plain_texts(client):
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).model_extra["context_length"] == 2048
    with pytest.raises(openai.NotFoundError, match="no model 'other' here"):
        client.models.retrieve("other")
    asked = {"model": model.id, "prompt": "Once upon a time", "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**asked)
    pieces = client.completions.create(**asked, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text

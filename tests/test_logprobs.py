"""Log-probabilities of an answer's tokens: the model's own, whatever was sampled or guessed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from sessions_under_test import IDS, LONG
from small_llm import open_spilling

from ebbtide import LLM
from ebbtide.kernels import dispatch
from ebbtide.offload.running import drafts
from ebbtide.offload.running.logprobs import Logprobs

PROMPT = "The mill stands by the river, and the miller"
SAMPLED = {"temperature": 1.3, "top_p": 0.9, "top_k": 30, "seed": 3, "presence_penalty": 0.5}
SCHEMA = {"type": "array", "items": {"type": "integer"}, "maxItems": 3}
CHAT = [{"role": "user", "content": "Name some numbers."}]


@pytest.fixture(scope="module")
def llm():
    with LLM.open(None, context=400) as llm:
        yield llm


def told(logprobs) -> list:
    return [(t.token_id, t.logprob, [(o.token_id, o.logprob) for o in t.top]) for t in logprobs]


@pytest.mark.parametrize("way", [{"temperature": 0}, SAMPLED], ids=["greedy", "sampled"])
def test_they_are_of_the_softmax_of_the_models_logits(llm, way):
    prompt = llm.encode(PROMPT)
    output = llm.generate(prompt, logprobs=5, max_new_tokens=20, **way)
    answer = output.token_ids
    text = [*prompt, *answer]
    rows = llm.logits(text[:-1], prefill_tokens=len(prompt), last=len(answer))
    expected = rows.double().log_softmax(-1)
    scores = llm.score(text, prefill_tokens=len(prompt), last=len(answer))
    assert len(output.logprobs) == len(answer)
    for row, score, token, found in zip(expected, scores, answer, output.logprobs, strict=True):
        assert found.token_id == token
        # The sum of some thousand exponentials in float32, against float64.
        assert found.logprob == pytest.approx(float(row[token]), abs=1e-5)
        assert found.logprob == pytest.approx(float(score), abs=1e-6)
        best = row.topk(5)
        assert [other.token_id for other in found.top] == best.indices.tolist()
        assert [o.logprob for o in found.top] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert b"" != found.bytes == llm.tokenizer.token_bytes(token + 1)[-1]
    assert b"".join(t.bytes for t in output.logprobs).decode() == output.text


def test_pieces_have_those_of_their_tokens_and_a_dropped_stream_what_there_is(llm):
    way = {"logprobs": 2, "max_new_tokens": 9, **SAMPLED}
    whole = llm.generate(PROMPT, **way)
    assert whole.token_ids == llm.generate(PROMPT, **{**way, "logprobs": None}).token_ids
    pieces = [*llm.stream(PROMPT, **way)]
    assert [len(piece.logprobs) for piece in pieces] == [1] * len(pieces)
    assert [told(piece.logprobs)[0] for piece in pieces] == told(whole.logprobs)
    stream = llm.stream(PROMPT, **way)
    next(stream), next(stream)
    early = stream.output.logprobs
    next(stream)
    stream.close()
    assert told(early) == told(whole.logprobs)[:2]  # it does not grow
    assert told(stream.output.logprobs) == told(whole.logprobs)[:3]


def test_none_are_told_where_none_are_asked_for(llm):
    output = llm.generate(PROMPT, max_new_tokens=2)
    assert output.logprobs is None
    assert [piece.logprobs for piece in llm.stream(PROMPT, max_new_tokens=2)] == [(), ()]
    alone = llm.generate(PROMPT, max_new_tokens=2, logprobs=0).logprobs
    assert [t.top for t in alone] == [(), ()]


def test_a_stop_string_cuts_text_and_no_token(llm):
    whole = llm.generate(PROMPT, max_new_tokens=20, **SAMPLED).text
    stop = whole[20:26]
    cut = llm.generate(PROMPT, max_new_tokens=20, stop=stop, logprobs=1, **SAMPLED)
    assert cut.text == whole[: whole.index(stop)]
    assert len(cut.logprobs) == len(cut.token_ids)
    written = b"".join(t.bytes for t in cut.logprobs).decode()
    assert written.startswith(cut.text + stop) and whole.startswith(written)


def test_a_schema_leaves_the_models_own_mind(llm):
    output = llm.chat(CHAT, json_schema=SCHEMA, logprobs=1, max_new_tokens=60)
    prompt = llm.encode(CHAT)
    scores = llm.score(
        [*prompt, *output.token_ids], prefill_tokens=len(prompt), last=len(output.token_ids)
    )
    assert [t.logprob for t in output.logprobs] == pytest.approx(scores.tolist(), abs=1e-5)
    # It would rather have said something else.
    assert any(t.logprob < t.top[0].logprob for t in output.logprobs)


@pytest.mark.parametrize(
    "way",
    [{"temperature": 0}, SAMPLED, {"json_schema": SCHEMA}, {"stop": ["e", "the mill"]}],
    ids=["greedy", "sampled", "schema", "stop"],
)
@pytest.mark.parametrize("draft", [True, False])
def test_what_is_told_of_the_text_is_what_the_models_scores_say(way, draft):
    """Each token of the text once, with its own log-probability, where it stands."""
    with LLM.open(None, context=400, draft=draft) as llm:
        prompt = llm.encode(CHAT)
        stream = llm.stream(CHAT, logprobs=0, max_new_tokens=40, **way)
        text_tokens = [token for piece in stream for token in piece.text_tokens]
        output = stream.output
        scores = llm.score(
            [*prompt, *output.token_ids], prefill_tokens=len(prompt), last=len(output.token_ids)
        ).tolist()
    places = [token.place for token in text_tokens]
    assert places == sorted({*places}) and (output.text == "") is (places == [])
    for place, offset, (told,) in text_tokens:
        assert told.token_id == output.token_ids[place]
        assert told.logprob == pytest.approx(scores[place], abs=1e-5)
        shown = output.text[offset : offset + len(told.token)]
        assert shown and told.token.startswith(shown)


@pytest.mark.skipif(dispatch._cpu is None, reason="no compiled kernels here")
@pytest.mark.usefixtures("few_pages")
def test_guessed_and_verified_tokens_have_the_same_to_the_bit(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(drafts._Way, "is_quicker_than", lambda self, *others: True)
    found, accepted = [], []
    for draft in (True, False):
        way = {"context": 600, "draft": draft, "share": 0.3}
        with open_spilling(checkpoint("llama2"), tmp_path, **way) as llm, llm.session() as session:
            turns = [
                session.generate(list(prompt), max_new_tokens=60, temperature=0, logprobs=3)
                for prompt in (LONG, IDS[400:430], IDS[430:440])
            ]
        details = [turn.usage["completion_tokens_details"] for turn in turns]
        accepted.append(sum(of["accepted_prediction_tokens"] for of in details))
        found.append([told(turn.logprobs) for turn in turns])
    assert accepted[0] > 0 == accepted[1]
    assert found[0] == found[1]


def test_equals_come_by_their_ids_and_slices_stay_as_they_are():
    kept = Logprobs(3, lambda token: b"%d" % token)
    kept.add(torch.tensor([0.0, 2.0, 2.0, 2.0, 2.0]), 4)
    part = kept[:]
    kept.add(torch.tensor([0.0, 5.0, 1.0, 4.0, 2.0]).bfloat16(), 0)
    assert [t.token_id for t in kept[0].top] == [1, 2, 3]
    assert [t.token for t in kept[1].top] == ["1", "3", "4"]
    assert (kept[-1].token_id, len(kept), len(part), len(kept[1:])) == (0, 2, 1, 1)
    assert kept[1:][0] == kept[1] and [*part] == [kept[0]]
    with pytest.raises(IndexError):
        part[1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_an_answer_can_be_copied_and_compared(llm, copied):
    output = llm.chat(CHAT, max_new_tokens=6, logprobs=2, temperature=0)
    found = copied(output)
    assert found == output and told(found.logprobs) == told(output.logprobs)
    assert found.logprobs[2:] == output.logprobs[2:] != output.logprobs[:2]
    assert told(copied(output.logprobs[1:3])) == told(output.logprobs)[1:3]
    # Without the tokenizer: some bytes for each of 6 * 3 tokens.
    assert len(pickle.dumps(output.logprobs)) < 1000


def test_a_token_takes_what_is_said():
    kept = Logprobs(20, lambda token: b"")
    for _ in range(64):
        kept.add(torch.arange(100.0), 7)
    assert (kept._ids.itemsize + kept._values.itemsize) * len(kept._ids) == 64 * 168

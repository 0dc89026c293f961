"""Answers that keep to a JSON schema: whatever is sampled, by whichever tokenizer, parses and is
what the schema allows; and it is the same however it was decoded.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_checkpoints import make
from sampled_answers import PLACE, grammar_of, sampled, value_of
from small_llm import open_spilling
from tokenizers import Tokenizer as Backend
from tokenizers import models
from tokenizers_under_test import CHATML, DATA, USER, byte_level, byte_level_backend, harmony, write

from ebbtide import LLM, Budget, GenerationConfig, errors
from ebbtide.offload.answers.constraint import Constrainer, _Vocabulary, constrainer_bytes
from ebbtide.offload.answers.grammar import Grammar
from ebbtide.offload.mode import Mode
from ebbtide.offload.running import drafts
from ebbtide.offload.running.sampler import Sampler
from ebbtide.offload.text.encoder import Encoder
from ebbtide.offload.text.text import Tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(byte_level(tmp_path_factory.mktemp("made")))


@pytest.mark.parametrize("name", ["llama2", "mistral", "qwen2.5", "smollm2"])
def test_real_tokenizers_write_what_the_schema_allows(name):
    """Byte-level ones and ones of SentencePiece, which drop a blank at the beginning."""
    folder = DATA / "tokenizers" / name
    if not folder.exists():
        pytest.skip("the shared tokenizers are not here")
    tokenizer = Tokenizer.load(folder)
    texts = set()
    for seed in range(3):
        ids = sampled(tokenizer, PLACE, seed=seed)
        assert not tokenizer.special_ids.intersection(ids[:-1])  # smollm2's has no end
        texts.add(tokenizer.decode(ids))
        value_of(tokenizer.decode(ids), PLACE)
    assert len(texts) == 3


def test_control_tokens_are_no_part_of_a_value(made):
    """Though one is spelled in the schema: it is written in letters."""
    schema = {"const": "a<|im_start|>b<|im_end|>"}
    ids = sampled(made, schema)
    assert value_of(made.decode(ids), schema) == schema["const"]
    assert ids[-1] == made.eos_token_id and not made.special_ids.intersection(ids[:-1])


@pytest.mark.parametrize("before", ["", '"b" ', "/[bc]/ "])
def test_a_text_that_the_model_has_no_tokens_for_is_refused(made, before):
    """At the beginning and further on: where nothing may come there is nothing to choose from."""
    num_ids = made.encode("c")[0] + 1  # of this tokenizer's letters the first three

    def sample():
        constraint = Constrainer(made, num_ids).begin(Grammar(f'start: {before}"cat"'), ())
        while not constraint.is_over:
            assert max(constraint.forced(), default=0) < num_ids
            constraint.accept(int(constraint.allowed()[0]))

    with pytest.raises(errors.InputError, match="the model has no token for what comes next"):
        sample()


@pytest.mark.parametrize("spelled", [[300, 301], None], ids=["others", "none"])
def test_a_text_is_spelled_with_what_the_model_has(made, monkeypatch, spelled):
    """Where the tokenizer writes it with tokens that the model has not, or cannot write it."""
    names = {300: b"ca", 301: b"ll"}
    monkeypatch.setattr(Encoder, "encode_inside", lambda self, text: spelled)
    own = Tokenizer.bytes_of
    monkeypatch.setattr(Tokenizer, "bytes_of", lambda self, i: names.get(i) or own(self, i))
    constraint = Constrainer(made, made.num_ids).begin(Grammar('start: /[ab]/ "call"'), ())
    constraint.accept(made.encode("b")[0])
    assert constraint.forced() == made.encode("call")
    assert constraint.allowed().tolist() == made.encode("c")


def test_the_fewest_tokens_are_taken(made):
    vocabulary = _Vocabulary(made, made.num_ids)
    (end,) = (at for at, text in enumerate(vocabulary.tokens) if text == b"<end>")
    for at, text in enumerate((b"ab", b"bc", b"abc", b"", b"d")):
        vocabulary.tokens[at] = text
    for at in range(5, 256):
        vocabulary.tokens[at] = b"x%d" % at
    vocabulary.tokens[5] = b"a"
    assert vocabulary._spelled(b"abcab") == [2, 0]
    assert vocabulary._spelled(b"abcd") == [2, 4]
    assert vocabulary._spelled(b"aabbc") == [5, 0, 1]  # the longest first would not do
    assert vocabulary._spelled(b"abcb") == [end + 1]
    assert vocabulary._spelled(b"<end>") == [end + 1]  # it is no text


def test_an_answer_ends_where_its_value_does_and_nowhere_else(made):
    grammar = grammar_of({"enum": ["a", "ab"]}, made)
    constraint = Constrainer(made, made.num_ids).begin(grammar, (made.eos_token_id,))
    for char, ends in (('"', False), ("a", False), ("b", False), ('"', True)):
        assert (made.eos_token_id in constraint.allowed()) is False
        (token,) = made.encode(char)
        assert token in constraint.allowed()
        constraint.accept(token)
        assert (constraint.allowed().tolist() == [made.eos_token_id]) is ends
    assert not constraint.is_over  # that token is still to come


def test_an_answer_without_a_token_that_ends_it_is_over_with_its_value(made):
    constraint = Constrainer(made, made.num_ids).begin(Grammar('start: "ab"'), ())
    for char in "ab":
        assert not constraint.is_over
        constraint.accept(made.encode(char)[0])
    assert constraint.is_over and len(constraint.allowed()) == 0


def test_a_twin_goes_its_own_way(made):
    constraint = Constrainer(made, made.num_ids).begin(Grammar('start: "a" | "bc"'), ())
    twin = constraint.twin()
    twin.accept(made.encode("b")[0])
    assert twin.allowed().tolist() == made.encode("c")
    assert constraint.allowed().tolist() == sorted(made.encode("ab"))


def test_a_tokenizer_whose_tokens_have_no_bytes_of_their_own_is_refused(tmp_path):
    words = Backend(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(errors.UnsupportedModel, match="blanks between all tokens"):
        Constrainer(Tokenizer.load(write(tmp_path, words)), 2)


# ---- thoughts ----------------------------------------------------------------------------------

THINKING = CHATML.replace("assistant\n'", "assistant\n<think>\n'") + "{# </think> #}"


@pytest.mark.parametrize(
    ("template", "think"),
    [(CHATML + "{# </think> #}", None), (THINKING, None), (CHATML + "{# </think> #}", False)],
    ids=["may think", "thinks", "should not"],
)
def test_thoughts_are_free_and_answers_are_not(tmp_path, template, think):
    tokenizer = Tokenizer.load(byte_level(tmp_path, template=template))
    prompt = tokenizer.chat_ids([USER])
    thoughts = set()
    for seed in range(6):
        ids = sampled(tokenizer, PLACE, prompt, seed=seed, think=think, most=4000)
        reader = tokenizer.answer_reader(prompt)
        said = [*map(reader.push, ids[:-1]), reader.finish()]
        value_of("".join(answer for _, answer in said), PLACE)
        thoughts.add("".join(thought for thought, _ in said))
    assert (thoughts == {""}) is (think is False)


@pytest.mark.parametrize("think", [None, False])
def test_in_channels_the_final_message_is_the_value(tmp_path, think):
    tokenizer = Tokenizer.load(harmony(tmp_path))
    prompt = tokenizer.chat_ids([USER], think=think)
    thoughts = set()
    for seed in range(6):
        ids = sampled(tokenizer, PLACE, prompt, seed=seed, most=4000)
        reader = tokenizer.answer_reader(prompt)
        said = [*map(reader.push, ids[:-1]), reader.finish()]
        value_of("".join(answer for _, answer in said), PLACE)
        thoughts.add("".join(thought for thought, _ in said))
        assert not reader.warnings
    assert (thoughts == {""}) is (think is False)


def test_a_spelled_mark_ends_no_thought_where_a_token_does(tmp_path):
    """Who reads the answer would take it for the end of the thought."""
    backend = byte_level_backend()
    backend.add_special_tokens(["<|end|>", "[THINK]", "[/THINK]"])
    template = "{{ messages[0].content }}[THINK]{# [/THINK] #}"
    folder = write(tmp_path, backend, template=template, eos_token="<|end|>")
    tokenizer = Tokenizer.load(folder)
    prompt = tokenizer.chat_ids([USER])
    grammar = grammar_of({"const": 1}, tokenizer, prompt)
    constraint = Constrainer(tokenizer, tokenizer.num_ids).begin(grammar, tokenizer.end_ids)
    for token in tokenizer.encode("so [/THINK"):
        constraint.accept(token)
    assert tokenizer.encode("]")[0] not in constraint.allowed()


# ---- schemas -----------------------------------------------------------------------------------


def too_many_alternatives() -> dict:
    """Of 150 properties each: small as text, and 22,500 of them when it is spelled out."""
    names = [f"k{i}" for i in range(150)]
    whole = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
    each = [{"allOf": [{"$ref": "#/$defs/whole"}, {"required": [name]}]} for name in names]
    return {"$defs": {"whole": whole}, "anyOf": each}


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "objekt"}, "objekt"),
        ({"not": {"type": "string"}}, "Unimplemented keys.*not"),
        ({"$ref": "file:///etc/passwd"}, "does not fetch"),
        ({"$ref": "http://127.0.0.1:1/schema.json"}, "does not fetch"),
        ({"$ref": "#"}, "nothing satisfies it"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
        (False, "schema is false"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"x-guidance": {"lenient": True}, "uniqueItems": True}, "Unimplemented keys"),
        (too_many_alternatives(), "too big"),
    ],
)
def test_schemas_that_cannot_be_followed_are_refused_with_the_reason(made, schema, reason):
    grammar = grammar_of(schema, made)
    with pytest.raises(errors.InputError, match=f"(?s)JSON schema cannot be followed.*{reason}"):
        Constrainer(made, made.num_ids).begin(grammar, made.end_ids)


def test_a_schema_that_takes_too_much_is_refused_where_it_does(builtin):
    """This one asks to remember which of the last 200 letters were an a."""
    with pytest.raises(errors.InputError, match=r"cannot be followed: .*too many states"):
        sampled(builtin.tokenizer, {"type": "string", "pattern": ".*a.{200}b.{200}$"})


names = st.sampled_from(["a", "b", "naïve", 'q"', "x y"])
whole_numbers = st.integers(-(2**53) + 1, 2**53 - 1)  # beyond them choices are refused
leaves = st.one_of(
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": "integer", "minimum": -5, "maximum": 2000},
            {"type": "number", "minimum": 0, "maximum": 10},
            {"type": "string", "maxLength": 6},
            {"type": "string", "pattern": "^[a-c]{2,4}$"},
            {"type": "string", "format": "date"},
        ]
    ),
    st.lists(st.one_of(st.none(), st.booleans(), whole_numbers, st.text()), min_size=1).map(
        lambda values: {"enum": values}
    ),
)


def objects(inner):
    def schema(properties, num_required, is_closed):
        required = list(properties)[:num_required]
        more = False if is_closed else {"type": "boolean"}
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": more,
        }

    fields = st.dictionaries(names, inner, max_size=3)
    return st.builds(schema, fields, st.integers(0, 3), st.just(True))


schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        objects(inner),
        inner.map(lambda items: {"type": "array", "items": items, "maxItems": 2}),
        st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some}),
    ),
    max_leaves=6,
)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(schemas, st.integers(0, 1000))
def test_any_schema_is_kept_to(made, schema, seed):
    ids = sampled(made, schema, seed=seed)
    value_of(made.decode(ids), schema)


@pytest.mark.parametrize("number", [2**53 - 1, 1 - 2**53])
def test_the_greatest_whole_numbers_are_kept_to(made, number):
    assert (
        value_of(made.decode(sampled(made, {"const": number}, seed=1)), {"const": number}) == number
    )


# ---- whole answers -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def builtin():
    with LLM.open(None) as llm:
        yield llm


LIST = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 9}
WAYS = [
    {},
    {"temperature": 1.5, "seed": 1},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.02, "seed": 2},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.7, "frequency_penalty": 0.4},
]


@pytest.mark.parametrize("way", WAYS)
def test_the_built_in_model_keeps_to_it(builtin, way):
    output = builtin.chat([USER], json_schema=LIST, max_new_tokens=200, **way)
    assert output.finish_reason == "stop"
    value_of(output.text, LIST)


def test_a_value_that_is_cut_short_says_so(builtin):
    output = builtin.chat([USER], json_schema=LIST, max_new_tokens=2)
    assert output.finish_reason == "length"
    assert not builtin.chat([USER], max_new_tokens=4).text.startswith("[")


def test_a_stop_string_ends_a_value_too(builtin):
    schema = {"type": "object", "properties": {"a": {"const": "xyz"}}, "required": ["a"]}
    output = builtin.chat([USER], json_schema=schema, stop_strings="yz", max_new_tokens=50)
    assert (output.text, output.finish_reason) == ('{"a": "x', "stop")


def test_a_refused_schema_leaves_a_session_as_it_was(builtin):
    with builtin.session(context=400) as session:
        session.generate([USER], max_new_tokens=3)
        before = session.tokens
        with pytest.raises(errors.InputError, match="schema"):
            session.generate([USER], json_schema={"type": "objekt"})
        assert session.tokens == before
        value_of(session.generate([USER], json_schema=LIST, max_new_tokens=99).text, LIST)


def with_room(llm: LLM) -> LLM:
    """Its budget is as much larger as a schema takes."""
    limits = llm.admission.limits
    more_bytes = constrainer_bytes(llm.config.vocab_size)
    llm.admission.limits = replace(limits, host_bytes=limits.host_bytes + more_bytes)
    llm.expect_schemas()
    return llm


@pytest.mark.parametrize("mode", ["exact", "bounded"])
def test_guessed_tokens_keep_to_it_and_change_nothing(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(drafts._Way, "is_quicker_than", lambda self, *others: True)
    schema = {"type": "array", "items": {"type": "string", "maxLength": 9}, "minItems": 6}
    folder = byte_level(make("llama2", tmp_path / "model"))
    answers, accepted = [], 0
    for draft in (True, False):
        options = {"context": 400 * len(WAYS), "draft": draft, "mode": Mode(mode)}
        with open_spilling(folder, tmp_path, **options) as llm, with_room(llm).session() as session:
            for way in WAYS:
                prompt = llm.encode("ab " * 90, begins=not session.tokens)
                output = session.generate(prompt, json_schema=schema, max_new_tokens=60, **way)
                answers.append(output.token_ids)
                details = output.usage["completion_tokens_details"]
                accepted += details["accepted_prediction_tokens"]
    assert answers[: len(WAYS)] == answers[len(WAYS) :]
    assert accepted > 0


@pytest.mark.parametrize("way", WAYS[:2])
def test_what_a_schema_leaves_no_choice_about_is_verified_at_once(builtin, way):
    """Nothing like it was said before, so that nothing but the schema can have guessed it."""
    word = "The quick brown fox jumps over the lazy dog, twice at least"
    schema = {"properties": {word: {"const": word[::-1]}}, "required": [word]}
    schema |= {"type": "object", "additionalProperties": False}
    with LLM.open(None, draft=False) as plain:
        alone = plain.chat([USER], json_schema=schema, max_new_tokens=150, **way)
    output = builtin.chat([USER], json_schema=schema, max_new_tokens=150, **way)
    assert output.token_ids == alone.token_ids
    num_tokens = output.usage["completion_tokens"]
    details = output.usage["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] > num_tokens // 2 > 20


def test_guesses_end_where_nothing_may_follow(builtin):
    """Without tokens that end an answer it is over with its value, for who guesses too."""
    sampler = Sampler(GenerationConfig(), constraint_without_ends(builtin.tokenizer))
    twin = sampler.twin()
    logits = torch.zeros(builtin.tokenizer.num_ids)
    chosen = []
    while not twin.is_done:
        chosen.append(twin.choose(logits, []))
    assert builtin.tokenizer.decode(chosen) == '"ab"' and not sampler.is_done


def constraint_without_ends(tokenizer: Tokenizer):
    return Constrainer(tokenizer, tokenizer.num_ids).begin(
        grammar_of({"const": "ab"}, tokenizer), ()
    )


# ---- memory and costs --------------------------------------------------------------------------


def test_the_memory_is_part_of_the_plan_from_the_first_schema_on():
    with LLM.open(None, budget=Budget(host_memory="2GiB")) as llm:
        before = llm.plan_at(500).host["runtime"]
        llm.chat([USER], max_new_tokens=1)
        assert llm.plan.host["runtime"] == before
        llm.chat([USER], json_schema=LIST, max_new_tokens=1)
        needed = constrainer_bytes(llm.config.vocab_size)
        assert llm.plan.host["runtime"] == before + needed
        llm.expect_schemas()
        assert llm.plan_at(500).host["runtime"] == before + needed


HOSTILE = """
import random, sys
from itertools import islice, permutations
import psutil
from ebbtide import GenerationConfig, errors
from ebbtide.offload.answers.rules import answer_grammar
from ebbtide.offload.answers.constraint import Constrainer, constrainer_bytes
from ebbtide.offload.text.text import Tokenizer

tokenizer = Tokenizer.load(sys.argv[1])
names = {f"k{i}": {"type": "string"} for i in range(150)}
whole = {"type": "object", "properties": names}
each = [{"allOf": [{"$ref": "#/$defs/whole"}, {"required": [name]}]} for name in names]
met = {f"p{i}": {"type": "string", "pattern": ".*a.{%d}b" % (i + 10)} for i in range(6)}
refs = [{"$ref": f"#/$defs/p{i}"} for i in range(6)]
orders = [{"allOf": order} for order in islice(permutations(refs), 400)]
schemas = [
    {"$defs": {"whole": whole}, "anyOf": each},
    {"type": "string", "pattern": ".*a.{200}b.{200}$"},
    {"type": "string", "pattern": "((a{1,300}b?){1,300}c?){1,300}$"},
    {"enum": [f"{i}-{i * i}" for i in range(3500)]},
    {"type": "object", "properties": {f"key{i}": {"type": "string"} for i in range(1500)}},
    {"type": "string", "minLength": 10**6, "maxLength": 10**7},
    {"allOf": [{"type": "string", "pattern": ".*a.{%d}b" % (i + 10)} for i in range(6)]},
    {"$defs": met, "anyOf": orders},
    {"type": "integer", "multipleOf": 100003},
]
rss = psutil.Process().memory_info
before = most = rss().rss
constrainer = Constrainer(tokenizer, tokenizer.num_ids)
numbers = random.Random(1)
for schema in schemas:
    config = GenerationConfig(json_schema=schema)
    try:
        constraint = constrainer.begin(answer_grammar(tokenizer, config, None, None), ())
        for _ in range(60):
            allowed = constraint.allowed()
            if not len(allowed):
                break
            constraint.accept(int(numbers.choice(allowed)))
            most = max(most, rss().rss)
    except errors.InputError:
        pass
    most = max(most, rss().rss)
print(most - before, constrainer_bytes(tokenizer.num_ids))
"""


def test_what_is_set_aside_is_enough_for_schemas_that_are_made_to_take_memory():
    folder = DATA / "tokenizers" / "smollm2"
    if not folder.exists():
        pytest.skip("the shared tokenizers are not here")
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE, str(folder)], check=True, capture_output=True, text=True
    )
    taken, set_aside = map(int, done.stdout.split())
    assert 0 < taken < set_aside


def test_a_session_that_took_all_memory_leaves_none_for_a_schema():
    with LLM.open(None) as llm:
        small = sum(llm.plan_at(500).host.values())
        limits = replace(llm.admission.limits, host_bytes=small + (8 << 20))
        llm.admission.limits = limits
        with llm.session(context=500) as session:
            with pytest.raises(errors.DoesNotFit, match=r"schema takes .* open sessions have left"):
                session.generate([USER], json_schema=LIST)
            session.generate([USER], max_new_tokens=2)


def test_without_a_schema_nothing_is_imported():
    code = (
        "import sys, ebbtide\n"
        "with ebbtide.LLM.open(None) as llm:\n"
        "    llm.chat([{'role': 'user', 'content': 'hi'}], max_new_tokens=2)\n"
        "assert 'llguidance' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_library_it_is_said_what_to_install(builtin, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(errors.InputError, match=r"pip install 'ebbtide\[structured\]'"):
        with LLM.open(None) as llm:
            llm.chat([USER], json_schema=LIST)

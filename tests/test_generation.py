"""GenerationConfig: who samples, what is refused and in which words, what model folders ask for."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.offload.errors import BadCheckpoint, InputError
from ebbtide.offload.sessions.generation import GenerationConfig


def folder_with(tmp_path, generation=None, config=None):
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return tmp_path


def test_default_is_greedy_and_open_ended():
    config = GenerationConfig()
    assert config.greedy
    assert config.max_new_tokens is None
    assert config.top_k == 0 and config.top_p == 1 and config.min_p == 0
    assert config.repetition_penalty == 1


def test_fields_are_pinned():
    """Names are part of the public face."""
    assert [f.name for f in dataclasses.fields(GenerationConfig)] == [
        "max_new_tokens",
        "min_new_tokens",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "no_repeat_ngram_size",
        "suppress_tokens",
        "bad_words_ids",
        "logits_processors",
        "stop_strings",
        "seed",
        "eos_token_ids",
        "think",
        "json_schema",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "logprobs",
        "warnings",
    ]


SAMPLING_MODEL = GenerationConfig(do_sample=True, temperature=0.6)


@pytest.mark.parametrize(
    ("model", "given", "greedy", "temperature"),
    [
        (GenerationConfig(), {}, True, 1.0),
        (GenerationConfig(), {"temperature": 0.7}, False, 0.7),
        (GenerationConfig(), {"temperature": 0}, True, 0.0),
        (GenerationConfig(), {"do_sample": True}, False, 1.0),
        (GenerationConfig(), {"temperature": 0.7, "do_sample": False}, True, 0.7),
        (GenerationConfig(), {"temperature": 0, "do_sample": True}, True, 0.0),
        (GenerationConfig(), {"top_p": 0.9}, True, 1.0),
        (SAMPLING_MODEL, {}, False, 0.6),
        (SAMPLING_MODEL, {"do_sample": False}, True, 0.6),
        (SAMPLING_MODEL, {"temperature": 0}, True, 0.0),
        (SAMPLING_MODEL, {"temperature": 1.2}, False, 1.2),
        (SAMPLING_MODEL, {"temperature": 1e-9}, True, 1e-9),
        (SAMPLING_MODEL, {"temperature": None, "do_sample": None}, False, 0.6),
    ],
)
def test_who_samples(model, given, greedy, temperature):
    config = model.resolve(**given)
    assert config.greedy is greedy
    assert config.temperature == temperature


def test_resolve_leaves_the_original_alone():
    base = GenerationConfig()
    assert base.resolve(top_k=5, seed=3) == GenerationConfig(top_k=5, seed=3)
    assert base == GenerationConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        base.top_k = 3


def test_aliases():
    config = GenerationConfig().resolve(stop="\n\n", eos_token_id=[2, 7, 2])
    assert config.stop_strings == ("\n\n",)
    assert config.eos_token_ids == (2, 7)
    with pytest.raises(InputError, match="stop_strings is given twice"):
        GenerationConfig().resolve(stop="a", stop_strings=["b"])


def test_tokens_may_be_named_as_json_has_them():
    config = GenerationConfig().resolve(
        logit_bias={"5": 1, 7: -100}, suppress_tokens=3, bad_words_ids=[[4, 4], [5]]
    )
    assert config.logit_bias == {5: 1.0, 7: -100.0}
    assert config.suppress_tokens == (3,) and config.bad_words_ids == ((4, 4), (5,))
    assert config.resolve() == config
    config.check_ids(8)
    with pytest.raises(InputError, match="logit_bias: there is no token 7; the model has 7"):
        config.check_ids(7)


def test_processors_are_a_list_or_one():
    config = GenerationConfig().resolve(logits_processor=[len, max])
    assert config.logits_processors == (len, max)
    assert config.resolve(logits_processors=len).logits_processors == (len,)


def test_settings_without_effect_are_said():
    config = GenerationConfig().resolve(top_p=0.9, top_k=4)
    assert config.warnings == ("top_k, top_p: without effect, as the answer is greedy",)
    assert GenerationConfig().resolve(top_p=0.9, temperature=0.5).warnings == ()
    assert GenerationConfig().resolve(temperature=0).warnings == ()


@pytest.mark.parametrize(
    ("name", "near"), [("temprature", "temperature"), ("max_tokens", "max_new_tokens")]
)
def test_unknown_names_list_the_known(name, near):
    with pytest.raises(InputError) as caught:
        GenerationConfig().resolve(**{name: 1})
    message = str(caught.value)
    assert f"{name} is not a generation setting. Did you mean {near}?" in message
    assert "repetition_penalty" in message and "stop_strings" in message


def test_unknown_name_without_neighbour():
    with pytest.raises(InputError, match=r"zzz is not a generation setting\. Known: bad_words_ids"):
        GenerationConfig().resolve(zzz=1)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("temperature", math.nan, "a number of at least 0, not nan"),
        ("temperature", math.inf, "not inf"),
        ("temperature", -0.1, "not -0.1"),
        ("temperature", "0.7", "not '0.7'"),
        ("temperature", True, "not True"),
        ("temperature", 10**400, "a number of at least 0"),
        ("top_p", 1.01, "a number from 0 to 1, not 1.01"),
        ("top_p", -1, "not -1"),
        ("min_p", math.nan, "not nan"),
        ("typical_p", 1.5, "a number from 0 to 1, not 1.5"),
        ("top_k", -1, "a whole number from 0"),
        ("top_k", 2.5, "not 2.5"),
        ("top_k", 2.0, "not 2.0"),
        ("top_k", True, "not True"),
        ("top_k", 2**63, "a whole number"),
        ("max_new_tokens", 0, "a whole number from 1"),
        ("max_new_tokens", -5, "not -5"),
        ("max_new_tokens", False, "not False"),
        ("repetition_penalty", 0, "a number from 0.01 to 100, not 0"),
        ("repetition_penalty", -1.1, "not -1.1"),
        ("presence_penalty", 2.01, "a number from -2 to 2, not 2.01"),
        ("frequency_penalty", -3, "not -3"),
        ("logit_bias", [[5, 1]], "an object of token ids and numbers from -100 to 100"),
        ("logit_bias", {"x": 1}, "a key must be a token id, not 'x'"),
        ("logit_bias", {-1: 1}, "a key must be a token id, not -1"),
        ("logit_bias", {True: 1}, "a key must be a token id, not True"),
        ("logit_bias", {(1, 2): 1}, "a key must be a token id, not (1, 2)"),
        ("logit_bias", {"5": 100.5}, "logit_bias of 5 must be a number from -100 to 100"),
        ("logit_bias", dict.fromkeys(range(1025), 1), "1,024 tokens at most, not 1,025"),
        ("no_repeat_ngram_size", -1, "a whole number from 0"),
        ("min_new_tokens", 1.5, "a whole number from 0"),
        ("suppress_tokens", ["the"], "a token id"),
        ("suppress_tokens", range(1025), "1,024 tokens at most"),
        ("bad_words_ids", [5], "a list of words, each a list of token ids"),
        ("bad_words_ids", [[5], []], "a list of words, each a list of token ids"),
        ("bad_words_ids", [[5, "x"]], "a list of words, each a list of token ids"),
        ("bad_words_ids", [[1] * 600] * 2, "1,024 tokens at most, not 1,200"),
        ("logits_processors", [3], "a list of functions (ids, logits) -> logits"),
        ("logprobs", 21, "a whole number from 0 to 20, not 21"),
        ("logprobs", True, "not True"),
        ("repetition_penalty", 1e-300, "not 1e-300"),
        ("seed", -1, "a whole number from 0"),
        ("seed", 2**64, "a whole number from 0"),
        ("seed", 1.5, "not 1.5"),
        ("do_sample", 1, "True or False, not 1"),
        ("think", "yes", "True, False or one of low, medium, high, not 'yes'"),
        ("think", 1, "not 1"),
        ("think", ["low"], "not ['low']"),
        ("stop_strings", 3, "text, or a list of texts"),
        ("stop_strings", ["a", 3], "text, or a list of texts"),
        ("stop_strings", [""], "1 to 1000 characters, one has 0"),
        ("stop_strings", ["a" * 1001], "one has 1001"),
        ("stop_strings", [str(i) for i in range(65)], "64 texts at most, not 65"),
        ("eos_token_ids", -1, "a token id"),
        ("eos_token_ids", [True], "a token id"),
        ("eos_token_ids", 2.0, "a token id"),
        ("eos_token_ids", "</s>", "a token id"),
    ],
)
def test_what_is_refused_names_value_and_range(name, value, allowed):
    with pytest.raises(InputError) as caught:
        GenerationConfig().resolve(**{name: value})
    assert name in str(caught.value)
    assert allowed in str(caught.value)
    with pytest.raises(InputError):
        GenerationConfig(**{name: value})


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers() | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)
FIELDS = [f.name for f in dataclasses.fields(GenerationConfig) if f.name != "warnings"]


@given(st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=4))
def test_any_value_is_taken_in_range_or_refused(values):
    try:
        config = GenerationConfig().resolve(**values)
    except InputError:
        return
    assert math.isfinite(config.temperature) and config.temperature >= 0
    assert type(config.top_k) is int and config.top_k >= 0
    assert 0 <= config.top_p <= 1 and 0 <= config.min_p <= 1
    assert config.repetition_penalty > 0
    assert config.max_new_tokens is None or config.max_new_tokens >= 1
    assert all(type(i) is int and i >= 0 for i in config.eos_token_ids)
    assert all(isinstance(text, str) and text for text in config.stop_strings)


def test_numbers_of_other_libraries_are_taken():
    numpy = pytest.importorskip("numpy")
    config = GenerationConfig().resolve(top_k=numpy.int64(4), temperature=numpy.float32(0.5))
    assert (config.top_k, config.temperature) == (4, 0.5)
    assert type(config.top_k) is int and type(config.temperature) is float


# Model folders


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 2}, {"eos_token_id": 9}, (2,)),
        ({"eos_token_id": [1, 2, 1]}, None, (1, 2)),
        ({}, {"eos_token_id": 9}, (9,)),
        (None, {"eos_token_id": [8, 9]}, (8, 9)),
        (None, {"text_config": {"eos_token_id": 7}}, (7,)),
        ({"eos_token_id": None}, {"eos_token_id": 0}, (0,)),
        (None, None, ()),
    ],
)
def test_eos_ids_come_from_the_folder(tmp_path, generation, config, expected):
    folder = folder_with(tmp_path, generation, config)
    assert GenerationConfig.from_model_folder(folder).eos_token_ids == expected


def test_sampling_comes_from_the_folder(tmp_path):
    wishes = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": None}
    config = GenerationConfig.from_model_folder(folder_with(tmp_path, wishes, {}))
    assert config == GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, top_k=20)
    assert config.warnings == ()


def test_a_temperature_in_the_folder_alone_does_not_sample(tmp_path):
    """As in Hugging Face: many greedy models carry one."""
    config = GenerationConfig.from_model_folder(folder_with(tmp_path, {"temperature": 0.6}))
    assert config.greedy


def test_wrong_wishes_of_a_folder_are_left_out_and_named(tmp_path):
    wishes = '{"do_sample": true, "top_p": 7, "temperature": NaN, "top_k": 3, "_from": 1}'
    config = GenerationConfig.from_model_folder(folder_with(tmp_path, wishes))
    assert config == GenerationConfig(do_sample=True, top_k=3)
    assert len(config.warnings) == 2
    assert "generation_config.json: top_p must be a number from 0 to 1" in config.warnings[1]
    assert "left out" in config.warnings[0]


@pytest.mark.parametrize(
    "generation", ["{", "[1]", '{"eos_token_id": "x"}', '{"eos_token_id": -1}', b"\xff\xfe"]
)
def test_damaged_folders_are_bad_checkpoints(tmp_path, generation):
    data = generation if isinstance(generation, bytes) else generation.encode()
    (tmp_path / "generation_config.json").write_bytes(data)
    with pytest.raises(BadCheckpoint, match=tmp_path.name):
        GenerationConfig.from_model_folder(tmp_path)

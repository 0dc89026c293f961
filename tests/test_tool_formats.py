"""Calls of functions as models of each format write them, read from whole texts and from pieces."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers_under_test import USER
from tool_templates import (
    ARGUMENTS,
    COMMAND,
    OFFERED,
    TOOLS,
    UNQUOTED_ENDS,
    call_text,
    ids_of,
    read,
    tokenizer_of,
    with_tools,
)
from tool_templates import tokenizer as tokenizer  # a fixture

from ebbtide.offload.answers.call_reader import CallReader
from ebbtide.offload.answers.tool_formats import format_of
from ebbtide.offload.answers.tools import Calls
from ebbtide.offload.text.text import Tokenizer

# ---- reading -----------------------------------------------------------------------------------


def test_what_the_template_writes_is_read_back(tokenizer):
    written = call_text(tokenizer)
    assert read(tokenizer, [written]) == read(tokenizer, written) == ("", [("weather", ARGUMENTS)])


def test_the_same_from_tokens_of_which_some_are_special(tokenizer):
    reader = tokenizer.answer_reader(tokenizer.chat_ids([USER], tools=TOOLS), (), Calls(OFFERED))
    said = [*map(reader.push, ids_of(tokenizer, call_text(tokenizer))), reader.finish()]
    (call,) = reader.take_calls()
    assert all(answer == "" for _, answer in said) and reader.take_calls() == []
    assert (call.name, json.loads(call.arguments)) == ("weather", ARGUMENTS)
    assert len(call.id) == 9 and call.id.isalnum()


def test_control_tokens_beside_calls_of_llama_4_are_nothing(tmp_path):
    """Its template writes both before the calls, models one of them on either side."""
    tokenizer = tokenizer_of("llama 4", tmp_path)
    written = '{"name": "clock", "parameters": {}}'
    for answer in (f"<|python_start|><|python_end|>{written}" * 2, f"<|python_start|>{written}"):
        reader = tokenizer.answer_reader(
            tokenizer.chat_ids([USER], tools=TOOLS), (), Calls(OFFERED)
        )
        said = [*map(reader.push, ids_of(tokenizer, answer)), reader.finish()]
        assert all(text == "" for _, text in said)
        assert [call.name for call in reader.take_calls()] == ["clock"] * answer.count(written)


def test_texts_before_calls_stay_and_blanks_between_go(tokenizer):
    format = format_of(tokenizer)
    written = call_text(tokenizer)
    if format.at_start:
        assert read(tokenizer, f"I look. {written}") == (f"I look. {written}", [])
        return
    text, calls = read(tokenizer, f"I look.\n\n{written}")
    assert (text, calls) == ("I look.", [("weather", ARGUMENTS)])
    if format.closing:
        two = f"A < b,  and\n{written}\n{written}\nDone. "
        assert read(tokenizer, two) == ("A < b,  andDone. ", [("weather", ARGUMENTS)] * 2)
        assert read(tokenizer, two, most=1)[1] == [("weather", ARGUMENTS)]


def test_text_without_calls_is_left_alone(tokenizer):
    for text in ("", " a\n", "x < y and [TOOL <tool <|too", "  {a}", '{"name": "x"', "  "):
        assert read(tokenizer, [text]) == read(tokenizer, text) == (text, [])


def test_what_is_no_call_is_text(tokenizer):
    written = call_text(tokenizer)
    for damaged in (written.replace("weather", "whether"), written[: len(written) * 2 // 3]):
        text, calls = read(tokenizer, damaged)
        assert (text, calls) == (damaged, [])
        assert read(tokenizer, [damaged]) == (text, calls)


written_texts = st.text(st.sampled_from('ab \n"\\{}[],:ü</>|')) | st.sampled_from(
    (
        *("<|im_end|>", "</tool_calls", "<tool_call>", "null", "True", " 1\n", "\n"),
        *("</tool_call>", "</parameter>", "</arg_value>", "</tool_calls>"),
    )
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e6, 1e6) | written_texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", min_size=1), inner),
    max_leaves=5,
)


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(st.fixed_dictionaries({"note": written_texts, "hours": st.lists(values)}), st.data())
def test_whatever_is_written_is_read_back_however_it_is_cut(tokenizer, arguments, data):
    format = format_of(tokenizer)
    end = UNQUOTED_ENDS.get(format.name)
    if format.name in ("gemma", "seed"):  # whose small templates here write no such texts in lists
        arguments["hours"] = [1, True]
    assume(end is None or end not in arguments["note"])  # a text ends with it
    written = call_text(tokenizer, arguments)
    cuts = data.draw(st.lists(st.integers(0, len(written)), max_size=6).map(sorted))
    pieces = [written[a:b] for a, b in pairwise([0, *cuts, len(written)])]
    assert read(tokenizer, pieces) == ("", [("weather", arguments)])


WRITTEN = [
    # as models write them besides
    ("hermes", '<tool_call>{"name":"clock","arguments":{}}</tool_call>', [("clock", {})]),
    ("hermes", '<tool_call>\n{"name": "clock", "arguments": "{}"}\n', [("clock", {})]),
    (
        "hermes",
        '<tool_call>{"name": "weather", "arguments": {"note": "</tool_call>"}}</tool_call>',
        [("weather", {"note": "</tool_call>"})],
    ),
    ("hermes", '<tool_call>{"name": "clock", "arguments": {"a": 1e999}}</tool_call>', None),
    ("hermes", '<tool_call>{"name": "clock", "arguments": [1]}</tool_call>', None),
    ("hermes", '<tool_call>[{"name": "clock", "arguments": {}}]</tool_call>', None),
    ("hermes", "<tool_call>" + "[" * 5000 + "</tool_call>", None),
    (
        "tagged",
        "<tool_call><function=weather><parameter=days>2</parameter><parameter=note>\n 1\n2 \n"
        "</parameter><parameter=exact>True</parameter></function></tool_call>",
        [("weather", {"days": 2, "note": " 1\n2 ", "exact": True})],
    ),
    (
        "tagged",
        "<tool_call>\n<function=weather>\n<parameter=days>\nmany\n</parameter>\n<parameter=new>\n7\n"
        "</parameter>\n</function>\n</tool_call>",
        [("weather", {"days": "many", "new": "7"})],
    ),
    (
        "tagged",
        "<tool_call><function=weather><parameter=hours>['a\"</parameter>', None]</parameter>"
        "</function></tool_call>",
        [("weather", {"hours": ['a"</parameter>', None]})],
    ),
    ("tagged", "<tool_call>\n<function=clock>\n</function>\n</tool_call>", [("clock", {})]),
    ("tagged", "<tool_call>\n<function=clock>\nnow\n</function>\n</tool_call>", None),
    ("keyed", "<tool_call>clock</tool_call>", [("clock", {})]),
    (
        "keyed",
        "<tool_call>weather<arg_key>days</arg_key><arg_value>2</arg_value><arg_key>note</arg_key>"
        "<arg_value>3</arg_value></tool_call>",
        [("weather", {"days": 2, "note": "3"})],
    ),
    ("llama", '<|python_tag|>{"name": "clock", "parameters": {}}', [("clock", {})]),
    (
        "llama",
        ' {"name": "clock", "parameters": {}}; {"name": "clock", "arguments": {"a": null}}\n',
        [("clock", {})],  # the template takes one for an answer
    ),
    ("llama", '{"name": "Ann", "parameters": {}}', None),
    ("llama", '{"name": "clock", "parameters": {}} is the call.', None),
    (
        "llama 4",
        '{"name": "clock", "parameters": {}}{"name": "clock", "parameters": {}}',
        [("clock", {})] * 2,
    ),
    (
        "mistral",
        "[TOOL_CALLS]clock[CALL_ID]abcdefghi[ARGS]{}[TOOL_CALLS]clock[ARGS]{}",
        [("clock", {})] * 2,
    ),
    ("mistral", '[TOOL_CALLS] [{"name": "clock", "arguments": {}}]', [("clock", {})]),
    ("mistral", "[TOOL_CALLS]clock", None),
    (
        "mistral list",
        '[TOOL_CALLS] [{"name": "clock", "arguments": {}, "id": "abcdefghi"}, '
        '{"name": "clock", "arguments": {}}]',
        [("clock", {})] * 2,
    ),
    ("gemma", "<|tool_call>call:clock{}<tool_call|>", [("clock", {})]),
    (
        "gemma",
        '<|tool_call>call:weather{a:{<|"|>b<|"|>:[1.5,-2,null,{}],c:true},note:<|"|>},{<|"|>}'
        "<tool_call|>",
        [("weather", {"a": {"b": [1.5, -2, None, {}], "c": True}, "note": "},{"})],
    ),
    ("gemma", "<|tool_call>call:clock{a:null, b :1}<tool_call|>", [("clock", {"a": None, "b": 1})]),
    ("gemma", "<|tool_call>call:clock{" + " " * 9000 + "}<tool_call|>", None),
    ("gemma", "<|tool_call>call:clock{a:b}<tool_call|>", None),
    ("gemma", "<|tool_call>call:clock{a:[1}<tool_call|>", None),
    ("gemma", "<|tool_call>call:clock{" + "a:{" * 900 + "<tool_call|>", None),
    (
        "lfm2",
        "<|tool_call_start|>[ weather(note = 'it\\'s \\u00fc\\n', days=-2, x=(1, 2.5e3,), "
        "y={\"a\": None, 'b': [True]}) , clock( ) ]<|tool_call_end|>",
        [
            (
                "weather",
                {
                    **{"note": "it's ü\n", "days": -2, "x": [1, 2500.0]},
                    "y": {"a": None, "b": [True]},
                },
            ),
            ("clock", {}),
        ],
    ),
    ("lfm2", "<|tool_call_start|>clock()<|tool_call_end|>", [("clock", {})]),
    (
        "lfm2",
        '<|tool_call_start|>[weather(note="<|tool_call_end|>\\ud83d\\ude00")]<|tool_call_end|>',
        [("weather", {"note": "<|tool_call_end|>😀"})],
    ),
    ("lfm2", "<|tool_call_start|>[clock(1)]<|tool_call_end|>", None),
    ("lfm2", "<|tool_call_start|>[clock(a=b)]<|tool_call_end|>", None),
    ("lfm2", "<|tool_call_start|>[clock() clock()]<|tool_call_end|>", None),
    ("lfm2", "<|tool_call_start|>[clock(a=" + "[" * 900 + ")]<|tool_call_end|>", None),
    ("lfm2", "<|tool_call_start|>[clock(a=" + "9" * 9000 + ")]<|tool_call_end|>", None),
    ("granite", '<|tool_call|> [{"name": "clock", "arguments": {}}]\n', [("clock", {})]),
    ("granite", '<|tool_call|>{"name": "clock"}', None),
    (
        "smollm3",
        '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>',
        [("clock", {})],
    ),
    (
        "cohere",
        '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "clock", "parameters": {}},\n'
        '{"tool_name": "clock", "parameters": {"a": "<|END_ACTION|>"}}]<|END_ACTION|>',
        [("clock", {}), ("clock", {"a": "<|END_ACTION|>"})],
    ),
    (
        "deepseek",
        "<｜tool▁calls▁begin｜>\n<｜tool▁call▁begin｜>clock<｜tool▁sep｜>\n"
        '{"a": "x```json <｜tool▁calls▁end｜>"}<｜tool▁call▁end｜>\n<｜tool▁calls▁end｜>',
        [("clock", {"a": "x```json <｜tool▁calls▁end｜>"})],
    ),
    (
        "deepseek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```json\n{}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [("clock", {})],
    ),
    ("deepseek", "<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>", None),
    (
        "kimi",
        "<|tool_calls_section_begin|> <|tool_call_begin|>functions.clock:3 "
        "<|tool_call_argument_begin|> {} <|tool_call_end|>\n<|tool_calls_section_end|>",
        [("clock", {})],
    ),
    (
        "kimi",
        "<|tool_calls_section_begin|><|tool_call_begin|>clock<|tool_call_argument_begin|>{"
        "<|tool_call_end|><|tool_calls_section_end|>",
        None,
    ),
    (
        "minimax",
        '<minimax:tool_call>\n<invoke name="clock">\n</invoke>\n<invoke name="weather"><parameter '
        'name="hours">["</parameter></invoke></minimax:tool_call>"]</parameter></invoke>\n'
        "</minimax:tool_call>",
        [("clock", {}), ("weather", {"hours": ["</parameter></invoke></minimax:tool_call>"]})],
    ),
    (
        "minimax",
        '<minimax:tool_call><invoke name="clock"></invoke> and</minimax:tool_call>',
        None,
    ),
    (
        "seed",
        "<seed:tool_call>\n<function=weather>\n<parameter=days>2</parameter>\n<parameter=note>1"
        "</parameter><parameter=hours>[None, 'a\"b']</parameter></function></seed:tool_call>",
        [("weather", {"days": 2, "note": "1", "hours": [None, 'a"b']})],
    ),
]


@pytest.mark.parametrize(("name", "written", "calls"), WRITTEN)
def test_calls_as_models_write_them(tmp_path, name, written, calls):
    tokenizer = tokenizer_of(name, tmp_path)
    expected = ("", calls) if calls is not None else (written, [])
    assert read(tokenizer, [written]) == expected
    assert read(tokenizer, written) == expected


def test_a_call_of_another_function_hides_none_that_follows(tokenizer):
    format = format_of(tokenizer)
    written = call_text(tokenizer)
    other = written.replace("weather", "whether")
    if not format.closing:  # whose calls are read at the answer's end, all or none
        return
    whole = f"I look.\n\n{other}\n{written}\nNo."
    expected = (f"I look.\n\n{other}No.", [("weather", ARGUMENTS)])
    assert read(tokenizer, [whole]) == read(tokenizer, whole) == expected
    reader = CallReader(format, Calls(OFFERED))
    assert reader.push(f"\n{other} and") == f"\n{other} and"  # at once


BROKEN = [
    ("hermes", '<tool_call>\n{"name": "clock", "arguments": {"a": 1}\n</tool_call>'),
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"note": "so}}\n</tool_call>'),
    ("hermes", "<tool_call>the clock</tool_call>"),
    ("apriel", '<tool_calls>[{"name": "clock", "arguments": {}</tool_calls>'),
    ("tagged", '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'),
    ("tagged", "<tool_call><function=clock>now</function></tool_call>"),
    ("keyed", "<tool_call>clock<arg_key>a</arg_key>1</tool_call>"),
    ("gemma", "<|tool_call>call:clock{a:[1}<tool_call|>"),
    ("lfm2", "<|tool_call_start|>[clock(a=)]<|tool_call_end|>"),
    ("cohere", '<|START_ACTION|>[{"tool_name": "clock", "parameters": {}<|END_ACTION|>'),
    ("deepseek", "<｜tool▁calls▁begin｜>clock<｜tool▁calls▁end｜>"),
    ("kimi", "<|tool_calls_section_begin|>clock<|tool_calls_section_end|>"),
    ("minimax", '<minimax:tool_call><invoke name="clock">now</invoke></minimax:tool_call>'),
]


@pytest.mark.parametrize(("name", "broken"), BROKEN)
def test_a_broken_call_is_text_at_once_and_so_is_what_follows(tmp_path, name, broken):
    """It was held back to the end of the answer."""
    tokenizer = tokenizer_of(name, tmp_path)
    reader = CallReader(format_of(tokenizer), Calls(OFFERED))
    assert reader.push(f"{broken} I could not") == f"{broken} I could not"
    written = call_text(tokenizer)
    for pieces in ([f"{broken}\n{written}"], f"{broken}\n{written}"):
        assert read(tokenizer, pieces) == (broken, [("weather", ARGUMENTS)])


@pytest.mark.parametrize("name", ["tagged", "keyed"])
def test_closings_in_strings_of_json_end_nothing(tmp_path, name):
    tokenizer = tokenizer_of(name, tmp_path)
    ends = [
        "</parameter>\n</function>\n</tool_call>",
        "</arg_value></tool_call>",
        '\\"</tool_call>',
    ]
    arguments = {"hours": [*ends, {"</arg_value>": '6"'}], "days": 2}
    written = call_text(tokenizer, arguments)
    for pieces in ([written], written):
        assert read(tokenizer, pieces) == ("", [("weather", arguments)])


@pytest.mark.parametrize("name", ["tagged", "keyed"])
def test_quotes_that_are_no_json_hold_nothing_back(tmp_path, name):
    """A model's number with a unit, and a text that may be null."""
    tokenizer = tokenizer_of(name, tmp_path)
    written = call_text(tokenizer, {"days": '6"', "size": 'so "big'})
    schema = {
        "days": {"type": "integer"},
        "size": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    }
    calls = Calls({"weather": {"type": "object", "properties": schema}})
    assert CallReader(format_of(tokenizer), calls).push(f"{written} Done") == "Done"
    assert json.loads(calls.take()[0].arguments) == {"days": '6"', "size": 'so "big'}


@pytest.mark.parametrize("name", ["tagged", "keyed"])
def test_what_may_be_a_text_is_one_where_nothing_else_may_be(tmp_path, name):
    """Numbers that are names, as programs ask for that leave a text out by null."""
    tokenizer = tokenizer_of(name, tmp_path)
    written = call_text(tokenizer, {key: "7" for key in "abcde"} | {"f": "null", "g": '"7"'})
    text_or_null = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    properties = {
        **{"a": text_or_null, "b": {"type": ["string", "null"]}, "c": {"type": "integer"}},
        **{"d": {"type": ["string", "integer"]}, "e": {"anyOf": 5, "type": [[]]}},
        **{"f": text_or_null, "g": text_or_null},
    }
    calls = Calls({"weather": {"type": "object", "properties": properties}})
    assert CallReader(format_of(tokenizer), calls).push(written) == ""
    found = {**{"a": "7", "b": "7", "c": 7, "d": 7, "e": 7}, "f": None, "g": "7"}
    assert json.loads(calls.take()[0].arguments) == found


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("lfm2", '<|tool_call_start|>[weather(note="MARK", exact=True)]<|tool_call_end|>'),
        ("lfm2.5", '<|tool_call_start|>[weather(note="MARK", exact=True)]<|tool_call_end|>'),
        (
            "granite",
            '<|tool_call|>[{"name": "weather", "arguments": {"note": "MARK", "exact": true}}]',
        ),
        (
            "smollm3",
            '<tool_call>\n{"name": "weather", "arguments": {"note": "MARK", "exact": true}}\n'
            "</tool_call>",
        ),
    ],
)
def test_calls_are_written_where_the_template_leaves_them_out(tmp_path, name, written):
    """As the model writes them; what stands in them is text, though it spells a mark."""
    tokenizer = tokenizer_of(name, tmp_path)
    mark = format_of(tokenizer).opening
    function = {"name": "weather", "arguments": {"note": mark, "exact": True}}
    call = {"role": "assistant", "tool_calls": [{"id": "a", "function": function}]}
    parts = [{"type": "text", "text": "I "}, {"type": "text", "text": "look."}]
    for content, before in (("I look.", "I look.\n"), (parts, "I \nlook.\n"), ("", "")):
        asked = [USER, {**call, "content": content}, {"role": "tool", "content": "rain"}]
        text = tokenizer.chat_text(asked)
        assert f"assistant\n{before}{written.replace('MARK', mark)}<|im_end|>" in text
        ids = tokenizer.chat_ids(asked)
        assert ids.count(tokenizer._backend.token_to_id(mark)) == 1
    assert '"weather"' in tokenizer.chat_text([USER], tools=TOOLS)
    assert '"weather"' not in tokenizer.chat_text([USER])


def test_a_command_thinks_calls_and_answers(tmp_path):
    """Its thoughts, calls and answers all stand between control tokens."""
    folder = with_tools(tmp_path, "cohere", "{# <|END_THINKING|> #}", COMMAND)
    tokenizer = Tokenizer.load(folder)
    called = f"<|START_THINKING|>I look.<|END_THINKING|>{call_text(tokenizer)}"
    for answer, expected in (
        (called, ("I look.", "", [("weather", ARGUMENTS)])),
        ("<|START_RESPONSE|>Rain.<|END_RESPONSE|>", ("", "Rain.", [])),
    ):
        prompt = tokenizer.chat_ids([USER], tools=TOOLS)
        reader = tokenizer.answer_reader(prompt, (), Calls(OFFERED))
        said = [*map(reader.push, ids_of(tokenizer, answer)), reader.finish()]
        thought, text = ("".join(part) for part in zip(*said, strict=True))
        calls = [(call.name, json.loads(call.arguments)) for call in reader.take_calls()]
        assert (thought, text, calls) == expected


def test_arguments_that_nobody_could_encode_hold_a_mark_in_their_place():
    calls = Calls(OFFERED)
    assert calls.add([("clock", '{"a": "\\ud800b"}')])
    assert calls.take()[0].arguments == '{"a": "\ufffdb"}'


LONG = 200_000
LOOPS = [  # answers that repeat themselves, as small models do
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"note": "', "</tool_call>"),
    ("hermes", "<tool_call>{", '\\"'),
    ("apriel", "<tool_calls>[", '\\"'),
    ("lfm2", "<|tool_call_start|>[weather(note='", "<|tool_call_end|>"),
    ("lfm2", "<|tool_call_start|>[weather(note=", "'\\"),
    ("mistral", "[TOOL_CALLS]clock[CALL_ID]", " "),
    ("deepseek", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>clock<｜tool▁sep｜>{}", "\n"),
    ("tagged", '<tool_call><function=weather><parameter=hours>["', "</parameter></tool_call>"),
    (
        "keyed",
        '<tool_call>weather<arg_key>hours</arg_key><arg_value>["',
        "</arg_value></tool_call>",
    ),
]


@pytest.mark.parametrize(("name", "start", "again"), LOOPS)
def test_an_answer_that_repeats_itself_is_text_in_linear_time(tmp_path, name, start, again):
    """By the square or the cube of its length it would be minutes or hours."""
    tokenizer = tokenizer_of(name, tmp_path)
    reader = CallReader(format_of(tokenizer), Calls(OFFERED))
    text = start + again * (LONG // len(again)) + format_of(tokenizer).closing
    assert reader.push(text) + reader.finish() == text


def test_characters_that_are_none_make_no_call(tmp_path):
    written = '<|tool_call_start|>[weather(note="\\UFFFFFFFF")]<|tool_call_end|>'
    assert read(tokenizer_of("lfm2", tmp_path), [written]) == (written, [])

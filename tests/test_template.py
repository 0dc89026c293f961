"""Chat templates: transformers' text where it renders, and an error for all else a template does.

The attacks are what a downloaded template could do: reach Python's internals, run for ever, fill
the memory. Each must end as an InputError that names the template, soon and in any thread.
"""

from __future__ import annotations

import json
import threading
import time
import tracemalloc
from datetime import datetime
from pathlib import Path

import pytest
from jinja2.exceptions import UndefinedError

from ebbtide.offload.errors import InputError
from ebbtide.offload.text.template import (
    FALLBACK_SOURCE,
    MAX_SOURCE_CHARS,
    ChatTemplate,
    check_messages,
)

TEMPLATES = Path(__file__).resolve().parents[2] / "shared" / "data" / "templates"
SOURCES = sorted(TEMPLATES.glob("*.jinja"))
NOW = datetime(2024, 3, 5, 6, 7, 8)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b> & 'x' \"q\" é😀 "},
    {"role": "assistant", "content": "Hello\n\n there "},
    {"role": "user", "content": "Why?\n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nBecause."},
    {"role": "user", "content": "ok"},
]


def render(source: str, messages=None, **variables) -> str:
    messages = check_messages(messages or [{"role": "user", "content": "hi"}])
    return ChatTemplate(source, "toy").render(messages, now=NOW, **{**TOKENS, **variables})


def oracle(monkeypatch, source, messages, **options):
    """What transformers renders, at the same moment."""
    module = pytest.importorskip("transformers.utils.chat_template_utils")

    class Frozen(datetime):
        @classmethod
        def now(cls, tz=None):
            return NOW

    monkeypatch.setattr(module, "datetime", Frozen)
    return module.render_jinja_template([messages], chat_template=source, **TOKENS, **options)[0][0]


@pytest.mark.skipif(not SOURCES, reason="../shared/data/templates is not here")
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
@pytest.mark.parametrize("chat", [CHAT, CHAT[1:2]], ids=["three-turns", "one-turn"])
@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "whole"])
def test_real_templates_render_as_transformers_does(path, chat, prompt, monkeypatch):
    source = path.read_text(encoding="utf-8")
    try:
        try:
            expected = oracle(monkeypatch, source, chat, add_generation_prompt=prompt)
        except (TypeError, UndefinedError):  # it walks through the tools, and there are none
            no_tools = {"tools": [], "functions": "", "datetime": "2024-03-05 06:07:08"}
            expected = oracle(monkeypatch, source, chat, add_generation_prompt=prompt, **no_tools)
    except Exception as error:
        # The template cannot render this conversation: ours fails as well, and for that reason.
        with pytest.raises(InputError) as caught:
            render_path(path, chat, prompt)
        assert path.stem in str(caught.value)
        assert str(error) in str(caught.value)
    else:
        assert render_path(path, chat, prompt) == expected


def render_path(path, chat, prompt):
    template = ChatTemplate(path.read_text(encoding="utf-8"), path.stem)
    return template.render(check_messages(chat), add_generation_prompt=prompt, now=NOW, **TOKENS)


@pytest.mark.skipif(not SOURCES, reason="../shared/data/templates is not here")
def test_most_real_templates_render():
    """Were all to fail alike in both libraries, the test above would pass and show nothing."""
    num_rendered = 0
    for path in SOURCES:
        try:
            num_rendered += bool(render_path(path, CHAT[1:2], True))
        except InputError:
            pass
    assert num_rendered >= 0.9 * len(SOURCES)


THREE_TURNS = [
    {"role": "system", "content": "Be brief."},
    *(
        {"role": role, "content": f"{role} {turn}"}
        for turn in range(3)
        for role in ("user", "assistant")
    ),
][:-1]


@pytest.mark.skipif(not SOURCES, reason="../shared/data/templates is not here")
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_three_turns_with_a_system_prompt_render_or_the_role_is_named(path):
    try:
        text = render_path(path, THREE_TURNS, True)
    except InputError as error:
        # Gemma 2 knows no system prompts; MiroThinker's assigns to what it must not, anywhere.
        assert "System role not supported" in str(error) or "line 280" in str(error)
    else:
        assert all(f"user {turn}" in text for turn in range(3))


def test_templates_that_walk_through_tools_may_have_none():
    source = "{% for t in tools %}{{ t }}{% endfor %}{{ messages[0].content }}"
    assert render(source) == "hi"
    assert render("{{ functions | join }}{{ messages[0].content }}") == "hi"
    with pytest.raises(InputError, match="not iterable"):
        render("{% for t in documents %}{% endfor %}")


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}\n  {{- m['role'] }}|{{ m.content | tojson }}\n{% endfor %}",
        "{{ messages | tojson(indent=2) }}{{ '<&>' | tojson(ensure_ascii=True) }}",
        "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}"
        "{% endfor %}",
        "{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x }}",
        "{% set ns = namespace(a=1, s='') %}{% for m in messages %}{% set ns.a = ns.a + 1 %}"
        "{% set ns.s = ns.s ~ m.role %}{% endfor %}{{ ns.a }}{{ ns.s }}",
        "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a') ~ f(1) + 'b' * 3 }}",
        "{{ strftime_now('%d %b %Y') }}{{ missing }}{{ missing | default('d') }}",
        "{{ messages[1:] | length }}{{ messages | map(attribute='role') | join(', ') }}",
        "{{ (messages | selectattr('role', 'equalto', 'user') | list)[0].content }}",
        "{{ 'a-b' .replace('-', '+').split('+') }}{{ '%s has %d' % ('x', 3) }}",
        "{{ '{:>5}|{x}'.format(1, x='y') }}{{ 'a\nb' | indent(2) }}{{ [1, 2] + [3] }}",
        "{{ '<i>' | safe + '<b>' }}{{ dict(a=1).items() | list }}{{ 2 ** 10 }}{{ 7 % 4 }}",
        "{% filter upper %}{{ eos_token }}{% endfilter %}{% set b %}x{{ 1 }}{% endset %}{{ b }}",
        "{% for a, b in [('x', 1), ('y', 2)] %}{{ a, b }}{% endfor %}{{ {'k': [1]}.k }}",
    ],
)
def test_dialect_is_that_of_transformers(source, monkeypatch):
    assert render(source, CHAT) == oracle(monkeypatch, source, CHAT)


REACHES = {
    "class": "{{ ''.__class__.__mro__ }}",
    "class-item": "{{ ''['__class__'] }}!",
    "attr": "{{ '' | attr('__class__') }}",
    "attr-format": "{{ ('{0.__class__}' | attr('format'))(1) }}",
    "format": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "format-map": "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "map-attribute": "{{ [''] | map(attribute='__class__') | list }}",
    "sort-attribute": "{{ ['', 'a'] | sort(attribute='__class__.x') }}",
    "cycler": "{{ cycler.__init__.__globals__ }}",
    "joiner": "{{ joiner.__init__.__globals__.os }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "lipsum-call": "{{ lipsum(n=1000000) }}",
    "global": "{{ raise_exception.__globals__ }}",
    "strftime": "{{ strftime_now.__closure__ }}",
    "macro": "{% macro m() %}{% endmacro %}{{ m._func.__code__ }}",
    "self": "{{ self._TemplateReference__context }}",
    "loop": "{% for x in [1] %}{{ loop._iterable.__class__ }}{% endfor %}",
    "namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "namespace-make": "{{ namespace({'_x': 1}) }}",
    "undefined": "{{ missing._fail_with_undefined_error.__globals__ }}",
    "mutate-messages": "{{ messages.append({}) }}",
    "mutate-message": "{{ messages[0].update({'role': 'system'}) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "extends": "{% extends 'x' %}",
    "builtins": "{{ __builtins__.open }}",
    "encode": "{{ 'x'.encode() }}",
    "generator": "{{ (messages | map('string')).gi_frame.f_globals }}",
    "syntax": "{% for %}",
    "source": "x" * (MAX_SOURCE_CHARS + 1),
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep-blocks": "{% if x %}" * 3000 + "{% endif %}" * 3000,
    "long-sum": "{{ 1" + "+1" * 20000 + " }}",
    "long-walk": "{{ a" + ".b" * 20000 + " }}",
}


@pytest.mark.parametrize("attack", REACHES)
def test_what_reaches_out_is_refused(attack):
    with pytest.raises(InputError, match="toy"):
        render(REACHES[attack])


DOUBLE = (
    "{{% set n = namespace(x={start}) %}}"
    "{{% for i in range(99) %}}{step}{{% endfor %}}{{{{ n.x }}}}"
)


def doubling(step: str, start: str = "'abc'") -> str:
    return DOUBLE.format(step="{% set n.x = " + step + " %}", start=start)


BURNS = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "times": "{{ 'a' * 10**10 }}",
    "times-twice": "{{ 'a' * 10**5 * 10**5 }}",
    "times-list": "{{ [1] * 10**10 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "nested": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested-quiet": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}"
    "{% endfor %}",
    "nested-map": "{% for i in range(99999) %}{{ range(99999) | map('abs') | sum }}{% endfor %}",
    "macro": "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "tree": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "recursive": "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "plus": doubling("n.x + n.x"),
    "tilde": doubling("n.x ~ n.x"),
    "square": doubling("n.x * n.x", "7"),
    "list-plus": doubling("n.x + n.x", "[1]"),
    "list-of-lists": doubling("[n.x, n.x]", "[1]"),
    "map-of-maps": doubling("{'a': n.x, 'b': n.x}", "{}"),
    "dict-call": doubling("dict(a=n.x, b=n.x)", "{}"),
    "views": doubling("[dict(a=n.x).items(), dict(a=n.x).values()]", "[1]"),
    "tuples": doubling("(n.x, n.x)", "(1,)"),
    "join": doubling("[n.x, n.x] | join"),
    "join-method": doubling("n.x.join([n.x, n.x])"),
    "replace": doubling("n.x | replace('a', 'aaa')"),
    "replace-method": doubling("n.x.replace('a', 'aaa')"),
    "replace-empty": "{% set s = 'a' * 10**6 %}{{ s.replace('', s) }}",
    "percent": doubling("'%s%s' % (n.x, n.x)"),
    "format-filter": doubling("'%s%s' | format(n.x, n.x)"),
    "format-method": doubling("'{0}{0}'.format(n.x)"),
    "block": DOUBLE.format(
        step="{% set x %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = x %}", start="'abc'"
    ),
    "pad-percent": "{{ '%999999999d' % 1 }}",
    "pad-star": "{{ '%*d' % (999999999, 1) }}",
    "pad-precision": "{{ '%.999999999f' % 1.5 }}",
    "pad-format": "{{ '{:>999999999}'.format(1) }}",
    "pad-format-nested": "{{ '{:{}}'.format(1, 999999999) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ '\\t'.expandtabs(10**9) }}",
    "center": "{{ 'a' | center(10**9) }}",
    "batch": "{{ [1] | batch(10**9, 0) | list }}",
    "indent": "{{ 'a' | indent(10**9, true) }}",
    "tojson-indent": "{{ [1] | tojson(indent=10**9) }}",
    "tojson-separator": "{% set s = ',' * 10**6 %}{{ [1, 2] * 1000 | tojson(separators=(s, s)) }}",
    "sum-of-lists": "{{ range(99999) | map('list') | sum(start=[]) }}",
    "many-strings": "{% set s = 'a' * 10**6 %}{{ range(99999) | map('string') | "
    "map('replace', '', s) | list }}",
    "references": "{% set s = 'a' * 10**6 %}{{ ([s] * 10**5) | string }}",
    "output": "{% set s = 'a' * 10**6 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    "strftime": "{{ strftime_now('%c' * 10**6) }}",
}


@pytest.mark.parametrize("attack", BURNS)
def test_what_burns_time_or_memory_is_stopped(attack):
    """Within a second of CPU (plus what the last single step takes) and 200 MB. The smaller the
    limit of the meter, the quicker the test: a quarter of a second here."""
    start_s = time.thread_time()
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="toy"):
            template = ChatTemplate(BURNS[attack], "toy", seconds=0.25)
            template.render(check_messages([{"role": "user", "content": "hi"}]), **TOKENS)
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()
    assert time.thread_time() - start_s < 1.5


def test_limits_hold_in_any_thread():
    caught = []

    def work():
        try:
            ChatTemplate(BURNS["nested"], "toy", seconds=0.1).render(check_messages(CHAT))
        except InputError as error:
            caught.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(caught) == 3
    assert all("ran longer than 0.1 s" in message for message in caught)


def test_one_template_renders_in_several_threads_at_once():
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", "toy")
    texts = {}

    def work(index):
        for _ in range(50):
            message = {"role": "user", "content": str(index)}
            texts[index] = template.render(check_messages([message] * 20))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {index: str(index) * 20 for index in range(4)}


def test_long_documents_and_histories_render():
    """The limits grow with what is rendered, so that they meet hostile templates alone."""
    source = (
        "{% set ns = namespace(all=[], text='') %}{% for m in messages %}"
        "{% set ns.all = ns.all + [m] %}{% set ns.text = ns.text + m.content | trim %}{% endfor %}"
        "{{ ns.text }}{{ ns.all | length }}"
    )
    document = "word " * 400_000
    assert render(source, [{"role": "user", "content": document}]) == document.strip() + "1"
    turns = [{"role": "user", "content": "0123456789" * 20}] * 2000
    assert render(source, turns) == "0123456789" * 20 * 2000 + "2000"


def test_a_refusal_carries_the_templates_own_words():
    with pytest.raises(InputError, match="template of toy refuses these messages: no system here"):
        render("{{ raise_exception('no system here') }}")


def test_errors_name_the_line():
    with pytest.raises(InputError, match="line 3"):
        render("a\nb\n{{ missing.attribute }}")
    with pytest.raises(InputError, match="line 2"):
        ChatTemplate("a\n{% if %}", "toy")


def test_fallback_is_plain_text():
    text = render(FALLBACK_SOURCE, CHAT[:4], adds_bos=True)
    assert text == (
        "<s>Be brief.\n\nUser: Hi <b> & 'x' \"q\" é😀 \n\nAssistant: Hello\n\n there \n\n"
        "User: Why?\n\n\nAssistant:"
    )


# Messages


def test_messages_are_copied_to_plain_types():
    class Loud(str):
        def __str__(self):
            raise AssertionError("called")

    given = [{"role": "user", "content": Loud("hi"), "name": None, "extra": (1, 2.5, True)}]
    checked = check_messages(given)
    assert checked == [{"role": "user", "content": "hi", "extra": [1, 2.5, True]}]
    assert type(checked[0]["content"]) is str
    checked[0]["content"] = "changed"
    assert given[0]["content"] == "hi"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hello", "must be a list"),
        ({"role": "user", "content": "x"}, "must be a list"),
        ([], "empty"),
        (["hello"], r"messages\[0\] must be a mapping"),
        ([{"content": "x"}], r"messages\[0\]: the role is missing"),
        ([{"role": "usr", "content": "x"}], "'usr'; known roles are system"),
        ([{"role": "user"}], r"messages\[0\]: content is missing"),
        ([{"role": "assistant", "content": None}], "content is missing"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": 3}], r"messages\[1\].*int"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "'image'"),
        ([{"role": "user", "content": ["x"]}], "'str'"),
        ([{"role": "user", "content": "x", "y": object()}], "object"),
        ([{"role": "user", "content": "x", 3: "y"}], "names must be text"),
    ],
)
def test_bad_messages_are_named(messages, reason):
    with pytest.raises(InputError, match=reason):
        check_messages(messages)


def test_deep_messages_are_refused():
    deep = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(InputError, match="nested more than 64"):
        check_messages([{"role": "user", "content": "x", "tools": deep}])
    for arguments in ({"a": deep}, json.dumps({"a": deep})):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        with pytest.raises(InputError, match="nested more than 64"):
            check_messages([{"role": "assistant", "tool_calls": [call]}])


def test_an_assistant_may_call_tools_without_content():
    called = {"type": "function", "function": {"name": "f", "arguments": {}}}
    call = {"role": "assistant", "tool_calls": [called]}
    assert check_messages([call]) == [{**call, "content": ""}]

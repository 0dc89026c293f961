"""JSON schemas that are refused before anything is compiled."""

from __future__ import annotations

import json

import pytest

from ebbtide import GenerationConfig, errors


def nested(num_levels: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(num_levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ("{", "is not JSON"),
        ('{"minimum": NaN}', "NaN is no JSON"),
        ("[]", "must be a JSON schema, an object"),
        (7, "must be a JSON schema, an object"),
        ({"const": object()}, "holds what is not JSON"),
        ({"const": float("inf")}, "holds what is not JSON"),
        ({"const": "\ud800"}, "is not valid Unicode"),
        (nested(5000), "nested more than 64 deep"),
        ({"const": 2**53}, "has 9007199254740992 to choose from"),
        ({"properties": {"a": {"enum": [1, -(2**60)]}}}, f"has {-(2**60)} to choose from"),
        ({"enum": ["x" * 1000] * 200}, "characters as JSON; 65,536 are allowed"),
    ],
)
def test_what_is_no_schema_is_refused_by_its_name(schema, reason):
    with pytest.raises(errors.InputError, match=f"json_schema.*{reason}"):
        GenerationConfig(json_schema=schema)


def test_great_numbers_are_bounds_and_choices_may_be_great():
    """As programs write them: bounds are no text of an answer."""
    GenerationConfig(json_schema={"type": "integer", "maximum": 2**63 - 1, "minimum": -(2**63)})
    GenerationConfig(json_schema={"enum": [2**53 - 1, 1 - 2**53, "9007199254740993", 1e300]})


def patterns(num: int) -> list[dict]:
    """Which of the last letters were an a: to match several at once takes three times the memory
    for each more."""
    return [{"type": "string", "pattern": f".*a.{{{i + 10}}}b"} for i in range(num)]


def one_in_another(schemas: list[dict]) -> dict:
    first, *others = schemas
    return {**first, "anyOf": [one_in_another(others)]} if others else first


def in_properties(schemas: list[dict]) -> list[dict]:
    return [{"type": "object", "properties": {"a": schema}} for schema in schemas]


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": patterns(15)},
        {"allOf": in_properties(patterns(15))},
        one_in_another(patterns(15)),
        {"$defs": dict(zip("abcdefg", patterns(7), strict=True)), "$ref": "#", "format": "date"},
    ],
)
def test_a_text_must_match_few_patterns_at_once(schema):
    with pytest.raises(errors.InputError, match=r"patterns and formats; 6 are allowed"):
        GenerationConfig(json_schema=schema)


def test_many_patterns_that_never_meet_are_taken():
    """As programs write them that leave values out by null, and refer to a part by one allOf."""
    times = {"type": "string", "format": "date-time"}
    fields = {f"t{i}": {"anyOf": [times, {"type": "null"}], "title": "T"} for i in range(20)}
    fields["first"] = {"allOf": [{"$ref": "#/$defs/time"}], "default": None}
    schema = {"type": "object", "properties": fields, "$defs": {"time": times}}
    assert json.loads(GenerationConfig(json_schema=schema).json_schema) == schema

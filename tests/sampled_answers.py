"""Answers of a model of no mind, kept to a schema. Not tests."""

from __future__ import annotations

import json

import torch
from jsonschema import Draft202012Validator

from ebbtide import GenerationConfig
from ebbtide.offload.answers.constraint import Constrainer
from ebbtide.offload.answers.grammar import Grammar
from ebbtide.offload.answers.rules import answer_grammar
from ebbtide.offload.running.sampler import Sampler
from ebbtide.offload.text.text import Tokenizer

PLACE = {
    "type": "object",
    "properties": {
        "code": {"type": "string", "maxLength": 8},
        "place": {"enum": ["Varn", "Лидс", "the <|im_end|> mill", 'q"\\']},
        "years": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["code", "place", "years"],
    "additionalProperties": False,
}
HOT = GenerationConfig(do_sample=True, temperature=1.5, seed=3)


def sampled(
    tokenizer: Tokenizer, schema, prompt=None, *, seed=0, think=None, most=600, padding=7
) -> list[int]:
    """What a model of no mind writes: tokens by chance, at a temperature of 1.5, up to its end."""
    vocab_size = tokenizer.num_ids + padding
    ends = tokenizer.end_ids
    config = GenerationConfig(json_schema=json.dumps(schema), think=think)
    grammar = answer_grammar(tokenizer, config, prompt, None)
    sampler = Sampler(HOT, Constrainer(tokenizer, vocab_size).begin(grammar, ends))
    numbers = torch.Generator().manual_seed(seed)
    # It ends what it has begun more often than chance would.
    liked = [i for i, text in enumerate(tokenizer.token_bytes(tokenizer.num_ids)) if text in LIKED]
    liked += [i for i in tokenizer.special_ids if i not in ends]
    ids: list[int] = []
    while len(ids) < most:
        logits = torch.randn(vocab_size, generator=numbers)
        logits[liked] += 9.0
        ids.append(sampler.choose(logits, ids))
        if ids[-1] in ends or sampler.constraint.is_over:
            return ids
    raise AssertionError(f"no end: {tokenizer.decode(ids)}")


def grammar_of(schema, tokenizer: Tokenizer, prompt=None) -> Grammar:
    return answer_grammar(tokenizer, GenerationConfig(json_schema=schema), prompt, None)


LIKED = [b'"', b"}", b"]", b"</think>", b'"}', b'"]']


def value_of(text: str, schema):
    value = json.loads(text)
    Draft202012Validator(schema).validate(value)
    return value

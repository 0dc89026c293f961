"""benchmarks/train: its documents are honest, its network is the exported one, its runs resume."""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks" / "train"
if not SCRIPTS.exists():
    pytest.skip("this is not a checkout", allow_module_level=True)
sys.path.insert(0, str(SCRIPTS))
try:
    import documents
    import examples
    import export
    import facts
    import haystack
    import model as network
    import tokenizer as tokenizers_
    import train
finally:
    sys.path.remove(str(SCRIPTS))

SENTENCE = "On the {} day of the journey the old captain wrote to his sister in the north. "


def book(seed):
    rng = random.Random(seed)
    return "".join(SENTENCE.format(facts.words.made_word(rng)) for _ in range(400))


def setting(seed, num_chars=1500):
    rng = random.Random(seed)
    return haystack.Setting(rng, haystack.Prose([book(seed)], rng), num_chars, 6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["needles", "multi_key", "several", "hops"]))
def test_what_is_answered_stands_in_the_document(seed, task):
    drawn = documents.conversation(setting(seed), task)
    for _, answer in drawn.turns:
        if answer.endswith(facts.UNSAID):
            stem = answer.removesuffix("? " + facts.UNSAID)
            assert stem + " " not in drawn.document
            continue
        # Sentences are said in other words now and then; the values are the same.
        for sentence in re.findall(r"[^.]+\.", answer):
            assert sentence.split()[-1].rstrip(".") in drawn.document


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_lists_are_in_the_order_of_the_document(seed):
    drawn = documents.conversation(setting(seed)._replace(num_turns=30), "numbered")
    lists = [answer for _, answer in drawn.turns if answer.startswith("1. ")]
    assert len(lists) == 1
    points = [line.split(". ", 1) for line in lists[0].split("\n")]
    assert [number for number, _ in points] == [str(n) for n in range(1, len(points) + 1)]
    places = [drawn.document.index(f" {number}: {point}") for number, point in points]
    assert places == sorted(places)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_chains_of_variables_follow_from_the_document(seed):
    drawn = documents.conversation(setting(seed), "variables")
    for question, answer in drawn.turns:
        name = question.split()[-1].rstrip("?")
        for step in re.findall(r"[^.]+\.", answer):
            step = step.strip()
            assert step in drawn.document and step.startswith(f"Variable {name} ")
            name = step.split()[-1].rstrip(".")
        assert name.isdigit()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([2.0**-20, 1.0, 300.0]))
def test_rounded_weights_are_8_bits_that_bfloat16_holds(seed, scale):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(seed)) * scale
    rounded = export.rounded(weight)
    assert torch.equal(rounded.to(torch.bfloat16).float(), rounded)
    groups, exact = rounded.view(-1, export.GROUP), weight.view(-1, export.GROUP)
    # Steps are at most twice the least that 127 of them need; half a step is lost.
    most = exact.abs().amax(1, keepdim=True) / 127
    assert ((groups - exact).abs() <= most).all()
    assert all(len(group.unique()) <= 255 for group in groups)


def test_an_untrained_network_copies():
    torch.manual_seed(0)
    shape = network.Shape(vocab=1024)
    copying, other = network.Model(shape), network.Model(shape)
    network.copy_from_birth(copying)
    once = torch.randint(6, shape.vocab, (8, 40))
    twice = torch.cat([once, once], 1)
    positions = torch.arange(79)[None].expand(8, -1)

    def right(model):
        with torch.no_grad():
            hidden = model.hidden(twice[:, :-1], positions)[:, 43:]
            return (model.logits(hidden).argmax(-1) == twice[:, 44:]).float().mean().item()

    # By chance one token in 1024 is right.
    assert right(copying) > 0.2 and right(other) < 0.02


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a corpus and a tokenizer for the tiny network."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "corpus").mkdir()
    talk = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The captain."}]
    for name, lines in {
        "books": [{"title": str(n), "text": book(n)} for n in range(11)],
        "docs": [{"title": "d", "text": book(20)}],
        "chat": [{"messages": talk}],
    }.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "corpus" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    texts = [book(n) for n in range(3)]
    trained = tokenizers_.train_tokenizer(texts, network.SHAPES["tiny"].vocab)
    trained.save(str(folder / "tokenizer.json"))
    return folder


def trainer(work, fresh, dtype="float32"):
    arguments = {"minutes": 1e9, "compile": False, "seed": 1, "workers": 0, "device": "cpu"}
    return train.Trainer(
        argparse.Namespace(work=work, size="tiny", dtype=dtype, fresh=fresh, **arguments)
    )


def test_a_resumed_run_is_the_run_that_was_not_interrupted(work):
    whole = trainer(work, fresh=True)
    for _ in range(2):
        whole.step()
    whole.save()
    last = whole.step()
    resumed = trainer(work, fresh=False)
    assert resumed.progress.steps == 2
    assert resumed.step() == last
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bfloat16_training_is_near_float32_training(work):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        losses[dtype] = trainer(work, True, dtype).step()["loss"]
    # The first loss: one pass of two layers, each product rounded to 8 bits of mantissa.
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_positions_rise_and_stay_below_the_most(work):
    drawn = trainer(work, fresh=True).feed
    ids, targets, weights, positions = drawn.batch(3, lambda: (8, 256))
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    assert (positions.diff(dim=1) >= 1).all()
    assert positions.max() < network.SHAPES["tiny"].max_positions
    assert 0.1 < (weights == examples.ANSWER).float().mean() < 0.7


def test_the_exported_network_is_the_one_that_transformers_computes(work, tmp_path):
    from random_checkpoints import reference_model

    made = trainer(work, fresh=True)
    made.step()
    made.save()
    export.export(work, tmp_path / "model", query_scale=1.2)
    ours = export.load(tmp_path / "model")
    theirs = reference_model(tmp_path / "model", attention="sdpa")
    ids = torch.randint(6, 1024, (1, 200))
    with torch.no_grad():
        hidden = ours.hidden(ids, torch.arange(200)[None])
        # Both in float32; only the order of sums differs.
        torch.testing.assert_close(ours.logits(hidden), theirs(ids).logits, rtol=1e-3, atol=1e-3)

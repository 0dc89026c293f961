"""benchmarks/train: its documents are honest, its network is the exported one, its runs resume."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_runs import (
    SCRIPTS,
    attention,
    birth,
    book,
    documents,
    examples,
    export,
    facts,
    haystack,
    make_work,
    network,
    selection,
    story,
    teller,
    trainer,
)


def setting(seed, num_chars=1500):
    rng = random.Random(seed)
    return haystack.Setting(rng, haystack.Prose([book(seed)], rng), num_chars, 6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["needles", "multi_key", "several", "hops"]))
def test_what_is_answered_stands_in_the_document(seed, task):
    drawn = documents.conversation(setting(seed), task)
    for question, answer in drawn.turns:
        if answer.endswith(facts.UNSAID):
            stem = answer.removesuffix("? " + facts.UNSAID)
            # Of people other things may be said.
            verb = re.search(r" (live|work)\b", question)
            assert f"{stem} {verb[1] + 's' if verb else ''}" not in drawn.document
            continue
        # Sentences are said in other words now and then; the values are the same.
        for sentence in re.findall(r"[^.]+\.", answer):
            assert sentence.split()[-1].rstrip(".") in drawn.document


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_lists_are_in_the_order_of_the_document(seed):
    drawn = documents.conversation(setting(seed, 6000)._replace(num_turns=60), "numbered")
    lists = [answer for _, answer in drawn.turns if answer.startswith("1. ")]
    labels = set(re.findall(r"(Key point|[A-Z][a-z]+) 1: ", drawn.document))
    assert 1 <= len(lists) == len(labels)
    for answer in lists:
        points = [line.split(". ", 1) for line in answer.split("\n")]
        assert [number for number, _ in points] == [str(n) for n in range(1, len(points) + 1)]
        # Two lists may begin with the same quoted sentence: one of them is this one.
        named = re.findall(r"(Key point|[A-Z][a-z]+) 1: " + re.escape(points[0][1]), drawn.document)
        assert any(is_list_of(drawn.document, label, points) for label in named)


def is_list_of(document, label, points):
    """Whether the document states just these points under a label, in their order."""
    places = [document.find(f"{label} {number}: {point}") for number, point in points]
    return (
        min(places) >= 0
        and places == sorted(places)
        and f"{label} {len(points) + 1}: " not in document
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(100, 20000))
def test_tales_speak_of_what_the_facts_speak_of(seed, num_chars):
    told = teller.pieces(random.Random(seed), num_chars, ["The Oslo mill belongs to Ada."])
    text = "".join(told)
    longest = max(map(len, told))
    assert num_chars <= len(text) <= num_chars + longest
    # 8 to 60 sentences, about 60 characters each, in each chapter; half of them are known.
    assert num_chars < 20000 - 1 or {"Oslo", "Ada", "mill"} & set(re.findall(r"\w+", text))
    assert "belongs to" not in text


def test_the_packaged_documents_are_these(tmp_path):
    packaged = SCRIPTS.parents[1] / "offload" / "builtin"
    for name, text in (
        ("story.md", story.story(story.STORY_SEED, story.STORY_FACTS)),
        ("report.md", story.report(story.REPORT_SEED, story.REPORT_POINTS)),
    ):
        assert (packaged / name).read_text(encoding="utf-8") == text


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
    birth.copy_from_birth(copying)
    once = torch.randint(6, shape.vocab, (8, 40))
    twice = torch.cat([once, once], 1)
    positions = torch.arange(79)[None].expand(8, -1)

    def right(model):
        with torch.no_grad():
            hidden = model.hidden(twice[:, :-1], positions)[:, 43:]
            return (model.logits(hidden).argmax(-1) == twice[:, 44:]).float().mean().item()

    # By chance one token in 1024 is right.
    assert right(copying) > 0.95 and right(other) < 0.02


def test_an_untrained_network_tells_places_by_more_than_two_tokens():
    """After the same two tokens, what follows is told by the tokens before these."""
    torch.manual_seed(0)
    shape = network.Shape(vocab=1024)
    model = network.Model(shape)
    birth.copy_from_birth(model)
    subjects, values = torch.randint(20, 1024, (2, 24)), torch.randint(20, 1024, (24,))
    said = torch.stack([*subjects, torch.full((24,), 7), torch.full((24,), 8), values], 1)
    right = 0
    for asked in said:
        ids = torch.cat([said.flatten(), asked[:4]])[None]
        with torch.no_grad():
            logits = model.logits(model.hidden(ids, torch.arange(ids.shape[1])[None])[0, -1])
        right += logits.argmax().item() == asked[4]
    # By the last two tokens alone it would be one in 24.
    assert right > 18


def test_the_first_layer_looks_near():
    """Also in a network that was born without: pairs that turn quickly come round again."""
    torch.manual_seed(0)
    shape = network.Shape(vocab=1024)
    model = network.Model(shape)
    birth.copy_from_birth(model)
    ids = torch.randint(6, shape.vocab, (1, 16384))
    cos, sin = network.turns(torch.arange(16384)[None], shape)

    def far():
        """What each head gives, in the mean, to tokens more than 256 before the present one."""
        layer = model.layers[0]
        with torch.no_grad():
            x = layer.input_layernorm(model.embed_tokens(ids))
            q = layer.self_attn.queries(x, cos, sin)[0, :, -1000::50]
            keys = layer.self_attn.keys_values(x, cos, sin)[0][0].repeat_interleave(2, 0)
        before = torch.arange(len(ids[0]))[-1000::50, None] - torch.arange(len(ids[0]))
        scores = (q @ keys.transpose(1, 2) * shape.head_dim**-0.5).masked_fill(before < 0, -1e9)
        return (scores.softmax(-1) * (before > 256)).sum(-1).mean(1)

    assert far().max() < 0.1
    birth.look_near(model, 0.0)
    assert far().min() > 0.5
    birth.look_near(model)
    assert far().max() < 0.1


def _attention_parts(tokens, scale):
    torch.manual_seed(tokens)
    q = (torch.randn(2, 6, tokens, 64) * scale).bfloat16()
    k, v = (torch.randn(2, 3, tokens, 64).bfloat16() for _ in range(2))
    return q, k, v, torch.randn(2, 6, tokens, 64)


@pytest.mark.parametrize(("tokens", "scale"), [(64, 1.0), (192, 1.0), (512, 4.0), (512, 0.0)])
def test_the_training_kernel_is_attention_and_its_gradients(tokens, scale):
    if attention.kernel() is None:
        pytest.skip("attention.cpp does not run here")
    *parts, upstream = _attention_parts(tokens, scale)
    wanted = torch.ones(2, tokens, dtype=torch.bool)
    wanted[0, : tokens // 128 * 64] = False
    upstream[~wanted[:, None].expand(2, 6, tokens)] = 0

    def result(parts, attend):
        parts = [part.clone().requires_grad_() for part in parts]
        out = attend(*parts)
        grads = torch.autograd.grad(out, parts, upstream.to(out.dtype))
        out = out.transpose(1, 2)[wanted]
        return [x.detach().double() for x in (out, *grads)]

    exact = result([part.double() for part in parts], attention.attend)
    fast = result(parts, lambda q, k, v: attention.attend(q, k, v, wanted))
    for one, other in zip(fast, exact, strict=True):
        # Inputs and probabilities are rounded to 8 bits of mantissa; keys of less than 2^-12 of
        # the attention are left out.
        assert (one - other).norm() <= 0.01 * other.norm() + 1e-6


def test_the_last_layer_computes_only_what_is_wanted():
    torch.manual_seed(0)
    model = network.Model(network.SHAPES["tiny"])
    ids, positions = torch.randint(6, 1024, (2, 60)), torch.arange(60)[None].expand(2, -1)
    wanted = torch.rand(2, 60) < 0.3
    with torch.no_grad():
        everything, some = (model.hidden(ids, positions, which) for which in (None, wanted))
    # The same products in float32, of fewer rows at once.
    torch.testing.assert_close(some, everything[wanted], rtol=1e-4, atol=1e-5)


def _selecting(tokens, spread):
    """Queries of the last cell's last tokens, keys, values, and what the criterion weighs by."""
    torch.manual_seed(tokens)
    q, keys, values = torch.randn(4, 9, 32), torch.randn(2, tokens, 32), torch.randn(2, tokens, 32)
    at = torch.arange(tokens - 40, tokens, 5)[:9]
    heads = selection.Heads(torch.rand(4) + 0.5, torch.rand(len(at)) + 1, bits=2)
    return [q[:, : len(at)] * spread, keys, values], at, heads


def _dense(q, keys, values, at):
    keys, values = (x.repeat_interleave(len(q) // len(x), 0) for x in (keys, values))
    scores = q @ keys.transpose(1, 2)
    scores = scores.masked_fill(torch.arange(keys.shape[1]) > at[:, None], -torch.inf)
    return scores.softmax(-1) @ values


def test_a_selection_of_everything_is_attention_and_its_gradients():
    parts, at, heads = _selecting(1536, spread=1.0)
    results = []
    for dense in (True, False):
        given = [part.clone().requires_grad_() for part in parts]
        if dense:
            out = _dense(*given, at)
        else:
            out, kept = selection.attend(*given, at, heads, selection.Choice(0.0, 0.1))
            assert (kept.read == 1).all()
        upstream = torch.linspace(-1, 1, out.numel()).view_as(out)
        results.append([out, *torch.autograd.grad((out * upstream).sum(), given)])
    # Keys that are attended in full are exact, whatever their first bits say.
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)


def test_pages_that_are_not_selected_count_by_their_means():
    (q, keys, values), at, heads = _selecting(1536, spread=1.0)
    keys = keys[:, :: selection.PAGE].repeat_interleave(selection.PAGE, 1)  # nothing is misplaced
    out, kept = selection.attend(q, keys, values, at, heads, selection.Choice(0.01, 0.1))
    assert (kept.read == 0).all() and (kept.wrong < 1e-3).all()
    torch.testing.assert_close(out, _dense(q, keys, values, at), rtol=1e-3, atol=1e-4)


def test_a_smaller_epsilon_selects_more_and_is_less_wrong():
    parts, at, heads = _selecting(4096, spread=2.0)
    dense = _dense(*parts, at)
    read, wrong = [], []
    for epsilon in (0.4, 0.1, 0.02):
        out, kept = selection.attend(*parts, at, heads, selection.Choice(epsilon, 0.1))
        read.append(kept.read.mean().item())
        wrong.append((out - dense).norm().item())
    assert read == sorted(read) and read[0] < read[-1] and wrong == sorted(wrong, reverse=True)


def test_the_bounded_stream_that_reads_everything_is_the_dense_one():
    torch.manual_seed(0)
    model = network.Model(network.SHAPES["tiny"])
    for layer in model.layers:
        layer.self_attn.o_proj.weight.data *= 100
    ids, positions = torch.randint(6, 1024, (1536,)), torch.arange(1536)
    counted = torch.zeros(1536, dtype=torch.bool)
    counted[1024:1500] = torch.rand(476) < 0.3
    tokens = selection.draw_rows(counted, random.Random(0), 10**9)
    assert torch.equal(tokens, counted.nonzero()[:, 0])
    entered = []
    with torch.no_grad():
        dense = model.hidden(ids[None], positions[None], counted[None], entered)
        entered = [x[0] for x in entered]
        for epsilon, same in ((0.0, True), (1.0, False)):
            choice = selection.Choice(epsilon, 0.1)
            found, kept = selection.hidden(model, ids, positions, entered, tokens, choice)
            assert len(kept) == len(model.layers)
            # float32, in another order of sums.
            assert torch.allclose(found, dense, rtol=1e-3, atol=1e-3) == same


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_work(tmp_path_factory.mktemp("work"))


def test_bounded_answers_are_trained(work):
    """From the same weights, less of bounded answers goes wrong after some steps."""
    made = trainer(work, True, bounded=True)
    made.recipe = replace(made.recipe, lengths=((1.0, {1024: 1.0}),))
    made.bounded = replace(made.bounded, dense_tokens=512, tokens_per_row=1)
    measured = [made.step() for _ in range(12)]
    losses = [m["bounded_loss"] for m in measured if "bounded_loss" in m]
    assert len(losses) > 4 and losses[-1] < losses[0]
    assert all(m["kl"] >= 0 and 0 <= m["read_0"] <= 1 for m in measured if "kl" in m)


def test_an_exported_network_is_turned_away_from_far_tokens(work, tmp_path):
    made = trainer(work, fresh=True)
    birth.look_near(made.model, 0.0)
    made.save()
    export.export(work, tmp_path / "before", query_scale=1.0)
    export.export_near(tmp_path / "before", tmp_path / "after")
    before, after = (export.load(tmp_path / name).state_dict() for name in ("before", "after"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == [f"layers.0.self_attn.{part}_proj.weight" for part in "qk"]
    files = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("before", "after")]
    assert files[0] == files[1]


def test_training_starts_from_exported_weights(work, tmp_path):
    made = trainer(work, fresh=True)
    made.step()
    made.save()
    export.export(work, tmp_path / "model", query_scale=1.0)
    started = trainer(work, fresh=True, start=tmp_path / "model")
    exported = export.load(tmp_path / "model").state_dict()
    for name, tensor in started.model.state_dict().items():
        assert torch.equal(tensor, exported[name]), name


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


def test_the_mean_of_checkpoints_is_exported(work, tmp_path):
    made = trainer(work, fresh=True)
    first, second = tmp_path / "first.pt", tmp_path / "second.pt"
    for path in (first, second):
        made.step()
        made.save()
        (work / "checkpoint.pt").rename(path)
    (_, a), (_, b), (size, mean) = map(export.averaged, ([first], [second], [first, second]))
    assert size == "tiny" and a.keys() == mean.keys()
    for name, tensor in mean.items():
        assert not torch.equal(a[name], b[name]), name
        torch.testing.assert_close(tensor, (a[name] + b[name]) / 2)
    state = torch.load(second, weights_only=True)
    torch.save(state | {"size": "nano"}, second)
    with pytest.raises(SystemExit, match="nano, tiny"):
        export.averaged([first, second])


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

"""A token through all layers in one call is, to the bit and in what it counts, the layers one by
one; and what one call cannot do goes layer by layer.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from model_matrix import VARIANTS
from random_checkpoints import make
from small_llm import TINY, hold, hold_few_experts, keep_in_memory, open_small

from ebbtide.kernels import dispatch
from ebbtide.offload.layers import mlp
from ebbtide.offload.layers.decoder import Decoder
from ebbtide.offload.mode import Mode
from ebbtide.offload.pages.record_reader import RecordReader
from ebbtide.offload.planning.plan import Loaded
from ebbtide.offload.running import engine
from ebbtide.offload.running.whole_token import WholeToken
from ebbtide.prefetch.top_p import CRITERIA

NUM_TOKENS, PREFILLED = 210, 3  # three: the sink's rows are decoded as well
CELL_TOKENS = TINY["cell_tokens"]
IDS = torch.randint(0, 256, (NUM_TOKENS,), generator=torch.Generator().manual_seed(4)).tolist()
# MLPs with xIELU, SparseMixer.
_BY_LAYERS = ("apertus", "phimoe")
BY_LAYERS = {name for name in VARIANTS if name.startswith(_BY_LAYERS)}

# Of what a layer may be one of each: attention alone, states in others, beside it, MLPs apart,
# experts and a shared one, experts of gate and up in one beside null scores, layers of two shapes
# that share pages and have inputs of their own, experts beside MLPs, streams beside each other,
# experts of weighted inputs, layer norms and biases of keys that turn in part, an MLP beside
# attention, latents of keys and of experts, heads with zeros behind them, bounds, scans, gates and
# decays of few numbers beside gated latents, gates by softplus.
KINDS = ("qwen2", "qwen3.5", "lfm3", "falcon-h1", "nemotron-h", "qwen3-next", "gpt-oss", "gemma4")
KINDS += ("gemma4-moe", "gemma3n", "llama4-moe", "stablelm", "cohere-qk-norm", "glm4-moe-lite")
KINDS += ("nemotron-h-moe-latent", "qwen2-head10", "olmo-clip", "jamba")
KINDS += ("kimi-linear-moe", "ling3-moe", "laguna-moe")

pytestmark = pytest.mark.skipif(dispatch._cpu is None, reason="no compiled kernels here")


@pytest.fixture
def served(monkeypatch) -> list[bool]:
    """Of each decoded token that reached it, whether one call served."""
    found, run = [], WholeToken.run

    def watched(self, sequence, *entering):
        residual = run(self, sequence, *entering)
        found.append(residual is not None)
        return residual

    monkeypatch.setattr(WholeToken, "run", watched)
    return found


BOUNDED = Mode("bounded", selector_options={"epsilon": 0.02})


def run(folder, spill_dir, codec="8", share=1.0, **options):
    with open_small(folder, spill_dir, codec, **{**TINY, **options}) as llm:
        keep_in_memory(llm, NUM_TOKENS, share)
        logits = llm.logits(IDS, prefill_tokens=PREFILLED)
        stats = llm.last_stats
        return logits, (stats.resident, stats.bytes_read, stats.bytes_written)


def run_bounded(folder, spill_dir, share=1.0, mode=BOUNDED, **store):
    """Logits of each decoded token, what was read, and what the selections are said to be."""
    with open_small(folder, spill_dir, mode=mode, store=store, **TINY) as llm:
        keep_in_memory(llm, NUM_TOKENS, share, sequences=4, text=True)
        llm._context = NUM_TOKENS
        with llm.session() as session:
            session.append(IDS[:PREFILLED])
            rows = [session.last_logits(), *(session.decode(i) for i in IDS[PREFILLED:])]
            stats, selected = session._runtime.store.stats, session._engine.selected
            of_disk = stats.hits + stats.late + stats.misses
            never = session._sequence.trail.never_selected()
            counted = (stats.resident, of_disk, stats.bytes_read), never
            said = {**vars(selected.fidelity), **vars(selected.audit)}
            return torch.stack(rows), counted, said


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        *((name, "8") for name in VARIANTS),
        *(
            (name, codec)
            for name in (
                *("llama3", "qwen2", "gemma2", "gemma4", "stablelm", "glm4-moe-lite"),
                "qwen2-head10",
            )
            for codec in ("4", "full")
        ),
    ],
)
def test_bits_and_counts_are_those_of_the_layers(
    checkpoint, tmp_path, monkeypatch, served, name, codec
):
    folder = checkpoint(name)
    whole, counted = run(folder, tmp_path, codec)
    if name in BY_LAYERS:
        assert not served
        return
    borders = sum(p % CELL_TOKENS == 0 for p in range(PREFILLED, NUM_TOKENS)) - 1  # one seals none
    assert len(served) == NUM_TOKENS - PREFILLED and served.count(False) == borders
    monkeypatch.setattr(engine, "make_whole_token", lambda *_: None)
    layers, expected = run(folder, tmp_path, codec)
    assert torch.equal(whole, layers)
    assert counted == expected


@pytest.mark.parametrize("name", KINDS)
def test_every_instruction_set_gives_the_bits_of_its_layers(
    checkpoint, tmp_path, monkeypatch, served, kernels, name
):
    folder = checkpoint(name)
    whole, _ = run(folder, tmp_path)
    assert any(served) == (kernels != "reference")
    monkeypatch.setattr(engine, "make_whole_token", lambda *_: None)
    assert torch.equal(whole, run(folder, tmp_path)[0])


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("name", KINDS)
def test_threads_change_no_bit(checkpoint, tmp_path, served, name, threads):
    folder = checkpoint(name)
    alone, _ = run(folder, tmp_path)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        several, _ = run(folder, tmp_path)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, several) and any(served)


@pytest.mark.parametrize("name", ["llama3", "llama4-moe"])
def test_the_first_page_on_disk_ends_it(checkpoint, tmp_path, served, name):
    """As long as nothing is there, one call serves; afterwards no token takes it."""
    folder = checkpoint(name)
    expected, _ = run(folder, tmp_path)
    served.clear()
    logits, (_, bytes_read, _) = run(folder, tmp_path, share=0.0)
    assert torch.equal(logits, expected) and bytes_read["disk"] > 0
    assert served == sorted(served, reverse=True)
    assert served.count(True) == 2 * CELL_TOKENS - PREFILLED


@pytest.mark.parametrize("name", VARIANTS)
def test_selecting_gives_the_bits_counts_and_figures_of_the_layers(
    checkpoint, tmp_path, monkeypatch, served, name
):
    folder = checkpoint(name)
    whole, counted, said = run_bounded(folder, tmp_path)
    assert any(served) == (name not in BY_LAYERS)
    monkeypatch.setattr(engine, "make_whole_token", lambda *_: None)
    layers, counted_by_layers, said_by_layers = run_bounded(folder, tmp_path)
    assert torch.equal(whole, layers)
    assert counted == counted_by_layers  # hits of spans too
    # The same numbers, added up in another order and precision.
    assert said == pytest.approx(said_by_layers, rel=1e-4, abs=1e-6)
    if said["offered"]:
        assert 0 < said["selected"] < said["offered"] and said["num_drawn"] > 0


@pytest.mark.parametrize("name", ["llama4-moe", "cohere2", "smollm3"])
def test_biases_of_keys_that_do_not_turn_serve(tmp_path, monkeypatch, served, name):
    """Some of these models' layers have no positions: all that a key's bias adds is a constant."""
    folder = make(name, tmp_path / "model", attention_bias=True)
    whole, counted, _ = run_bounded(folder, tmp_path)
    assert any(served)
    monkeypatch.setattr(engine, "make_whole_token", lambda *_: None)
    layers, expected, _ = run_bounded(folder, tmp_path)
    assert torch.equal(whole, layers) and counted == expected


def test_a_bias_of_keys_that_a_layer_has_not_is_refused(checkpoint, tmp_path, monkeypatch):
    """Some layers attend another's pages: how many heads a bias is of is asked of the keys."""
    bias = torch.zeros(4, 16)
    monkeypatch.setattr(Decoder, "key_bias", lambda self, w: bias)
    with open_small(checkpoint("gemma4"), tmp_path, **TINY) as llm:
        keep_in_memory(llm, NUM_TOKENS, 1.0)
        with pytest.raises(ValueError, match="there are no keys"):
            llm.logits(IDS[:5])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_selects_as_its_layers_do(
    checkpoint, tmp_path, monkeypatch, served, criterion
):
    folder, options = checkpoint("qwen2"), {"epsilon": 0.1, "criterion": criterion}
    mode = Mode("bounded", selector_options=options)
    whole, counted, _ = run_bounded(folder, tmp_path, mode=mode)
    assert any(served)
    monkeypatch.setattr(engine, "make_whole_token", lambda *_: None)
    layers, expected, _ = run_bounded(folder, tmp_path, mode=mode)
    assert torch.equal(whole, layers) and counted == expected


def test_selecting_on_every_instruction_set_gives_the_bits_of_its_layers(
    checkpoint, tmp_path, monkeypatch, served, kernels
):
    folder = checkpoint("qwen2")
    whole, _, _ = run_bounded(folder, tmp_path)
    assert any(served) == (kernels != "reference")
    monkeypatch.setattr(engine, "make_whole_token", lambda *_: None)
    assert torch.equal(whole, run_bounded(folder, tmp_path)[0])


def test_selecting_gives_the_same_bits_with_more_threads(checkpoint, tmp_path, served):
    folder = checkpoint("llama3")
    expected, _, _ = run_bounded(folder, tmp_path)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(run_bounded(folder, tmp_path)[0], expected)
    finally:
        torch.set_num_threads(before)


NOTHING_AHEAD = replace(BOUNDED, foresight="nothing")


@pytest.mark.parametrize("num_hot", [3, 8, 1000])
@pytest.mark.parametrize(
    "name", ["llama3", "qwen2", "gemma2", "gemma4", "stablelm", "glm4-moe-lite", "qwen2-head10"]
)
def test_what_is_selected_from_disk_is_brought_in_the_middle(
    checkpoint, tmp_path, monkeypatch, served, name, num_hot
):
    """With frames for less than a layer's selection, for some layers' and for everything."""
    folder = checkpoint(name)
    expected, _, _ = run_bounded(folder, tmp_path)
    served.clear()
    of_disk = dict(share=0.0, mode=NOTHING_AHEAD, hot_records=num_hot)
    whole, counted, said = run_bounded(folder, tmp_path, **of_disk)
    assert torch.equal(whole, expected)
    has_windows = name.startswith("gemma")  # whose pages are attended and not selected
    if not has_windows:
        borders = sum(p % CELL_TOKENS == 0 for p in range(PREFILLED, NUM_TOKENS)) - 1
        assert served.count(False) == borders
    monkeypatch.setattr(engine, "make_whole_token", lambda *_: None)
    layers, counted_by_layers, said_by_layers = run_bounded(folder, tmp_path, **of_disk)
    assert torch.equal(whole, layers)
    assert said == pytest.approx(said_by_layers, rel=1e-4, abs=1e-6)
    # With fewer frames, what comes first decides what makes room; spans of windows are read ahead.
    if num_hot == 1000 and not has_windows:
        assert counted == counted_by_layers


@pytest.mark.parametrize("name", ["nemotron-h-moe", "nemotron-h-moe-latent", "qwen3.5"])
def test_pages_from_disk_of_the_one_layer_that_attends(
    checkpoint, tmp_path, monkeypatch, served, name
):
    """Of texts so long that a plan has them there: few pages of one layer take less memory than
    reading any from disk does, so experts are read, or layers streamed, before these are."""

    def decoded():
        with open_small(checkpoint(name), tmp_path, mode=NOTHING_AHEAD, **TINY) as llm:
            keep_in_memory(llm, 3000, 0.1, sequences=4, text=True)
            llm._context = 3000
            with llm.session() as session:
                session.append(IDS * 7)
                session.last_logits()
                rows = torch.stack([session.decode(i) for i in IDS[:80]])
                return rows, session._runtime.store.stats.bytes_read

    whole, read = decoded()
    assert served.count(True) > 70 and read["disk"] > 0
    monkeypatch.setattr(engine, "make_whole_token", lambda *_: None)
    assert torch.equal(whole, decoded()[0])


@pytest.mark.parametrize(
    "mode", [replace(BOUNDED, foresight="history"), replace(BOUNDED, name="deadline")], ids=str
)
def test_what_is_read_ahead_or_left_out_when_late_goes_layer_by_layer(
    checkpoint, tmp_path, served, mode
):
    run_bounded(checkpoint("llama3"), tmp_path, share=0.0, mode=mode)
    # Until something is on disk: two cells, and a history that selected nothing yet.
    assert 2 * CELL_TOKENS - PREFILLED <= served.count(True) <= 2 * CELL_TOKENS + 1


class Mishap(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, Mishap])
def test_what_is_raised_while_bringing_ends_the_call_and_loses_nothing(
    checkpoint, tmp_path, monkeypatch, error
):
    folder, original, calls = checkpoint("llama3"), RecordReader.fetch_in_place, []

    def failing(self, table, layer, records):
        calls.append(layer)
        if len(calls) % 5 == 0:
            raise error("now")
        return half_way(original(self, table, layer, records), len(calls) % 7 == 0)

    def half_way(coming, fails):
        yield next(coming)
        if fails:
            raise error("half way")
        yield from coming

    def decoded(session, token):
        session._sequence.tokens.append(token)
        while True:
            try:
                return session._engine.logits(session._engine.decode(session._sequence))
            except error:
                continue

    def answers():
        with open_small(folder, tmp_path, mode=NOTHING_AHEAD, **TINY) as llm:
            keep_in_memory(llm, NUM_TOKENS, 0.0, sequences=4, text=True)
            llm._context = NUM_TOKENS
            with llm.session() as session:
                session.append(IDS[:100])
                session.last_logits()
                return torch.cat([decoded(session, token) for token in IDS[100:160]])

    expected = answers()
    monkeypatch.setattr(RecordReader, "fetch_in_place", failing)
    assert torch.equal(answers(), expected)
    assert len(calls) > 50


@pytest.mark.parametrize("name", ["llama3", "gemma4"])
def test_other_selectors_and_streamed_layers_go_layer_by_layer(checkpoint, tmp_path, served, name):
    folder = checkpoint(name)
    run_bounded(folder, tmp_path, mode=Mode("bounded", selector="window", selector_options={}))
    with open_small(folder, tmp_path, **TINY) as llm:
        keep_in_memory(llm, NUM_TOKENS, 1.0)
        hold(llm, Loaded(1, True))
        llm.logits(IDS, prefill_tokens=PREFILLED)
    assert not served


@pytest.mark.parametrize("name", ["qwen3-moe", "nemotron-h-moe", "gemma4-moe"])
def test_another_session_prepares_no_expert_again(checkpoint, tmp_path, monkeypatch, served, name):
    made, original = [], mlp.RoutedStep
    monkeypatch.setattr(mlp, "RoutedStep", lambda *args: made.append(args) or original(*args))
    with open_small(checkpoint(name), tmp_path, **TINY) as llm:
        keep_in_memory(llm, NUM_TOKENS, 1.0, sequences=4, text=True)
        for _ in range(3):
            with llm.open_session(NUM_TOKENS, sequences=1) as session:
                session.append(IDS[:PREFILLED])
                session.decode(IDS[PREFILLED])
        assert len(made) == sum(experts is not None for experts in llm.config.experts) > 0
    assert served == [True] * 3


@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3-next", "gemma4-moe"])
def test_experts_that_are_not_in_memory_go_layer_by_layer(checkpoint, tmp_path, served, name):
    folder = checkpoint(name)
    expected, _ = run(folder, tmp_path)
    assert any(served)
    served.clear()
    with open_small(folder, tmp_path, **TINY) as llm:
        keep_in_memory(llm, NUM_TOKENS, 1.0)
        hold_few_experts(llm)
        assert torch.equal(llm.logits(IDS, prefill_tokens=PREFILLED), expected)
    assert not served


@pytest.mark.parametrize(
    "name",
    ["qwen2", "gemma4", "gemma3n", "llama4-moe", "stablelm", "glm4-moe-lite"],
)
def test_forks_rewinds_and_copies_are_seen(checkpoint, tmp_path, monkeypatch, served, name):
    """Tables change under a session's feet: shared spans are copied, cells sealed anew."""

    def answers():
        with open_small(checkpoint(name), tmp_path, **TINY) as llm:
            llm._context = NUM_TOKENS
            found = []
            with llm.session() as session:
                session.append(IDS[:100])
                found.append(session.last_logits())
                with session.fork() as other:
                    for own, theirs in zip(IDS[100:180], reversed(IDS[100:180]), strict=True):
                        found += [session.decode(own), other.decode(theirs)]
                session.truncate(120)
                found += [session.decode(token) for token in IDS[:90]]
            return found

    whole = answers()
    assert served.count(True) > 200
    monkeypatch.setattr(engine, "make_whole_token", lambda *_: None)
    assert all(torch.equal(a, b) for a, b in zip(whole, answers(), strict=True))

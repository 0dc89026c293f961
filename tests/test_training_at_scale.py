"""benchmarks/train on a GPU, as far as a machine without one shows: what is compiled, what other
processes draw, which steps are left out, what is packed."""

from __future__ import annotations

import functools
import random
import subprocess
import sys

import psutil
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch._dynamo.testing import CompileCounter
from training_runs import (
    SCRIPTS,
    attention,
    corpus,
    evaluate,
    examples,
    export,
    feed,
    make_work,
    network,
    pack,
    train,
    trainer,
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_work(tmp_path_factory.mktemp("work"))


def step_of(model, ids, positions, counted):
    """Loss and gradients of predicting the same tokens again."""
    hidden = model.hidden(ids, positions, counted)
    loss = F.cross_entropy(model.logits(hidden).float(), ids[counted])
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def batch_of(rows, tokens):
    torch.manual_seed(tokens)
    ids = torch.randint(6, 1024, (rows, tokens))
    return ids, torch.arange(tokens).expand_as(ids), torch.rand(rows, tokens) < 0.3


def test_one_compilation_serves_all_layers_and_lengths(monkeypatch):
    torch.compiler.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    torch.manual_seed(0)
    model = network.Model(network.Shape(1024, 64, 4, 2, 1, 32, 96))
    batches = [batch_of(*shape) for shape in ((8, 64), (2, 256), (1, 512), (16, 32))]
    plain = [step_of(model, *batch) for batch in batches]
    model.compile_parts()
    compiled = [step_of(model, *batch) for batch in batches]
    assert counter.frame_count == 2  # before attention, and after it
    with torch.compiler.set_stance("force_eager"):
        evaluate.found(model, list(range(6, 40)), [7, 8])
    assert counter.frame_count == 2
    model.uncompile()
    after = [step_of(model, *batch) for batch in batches]
    for one, other, again in zip(plain, compiled, after, strict=True):
        # The same operations, with or without the compiler.
        torch.testing.assert_close(other, one)
        torch.testing.assert_close(again, one)


def test_what_does_not_compile_trains_as_it_is(work, monkeypatch, capsys):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    torch.compiler.reset()
    plain = trainer(work, fresh=True).step()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    made = trainer(work, fresh=True, compile=True)
    assert "goes on without torch.compile" in capsys.readouterr().out
    assert made.step() == plain


def test_a_step_puts_nothing_beside_the_networks_device(monkeypatch):
    """Meta tensors refuse others, as those of a GPU do."""
    monkeypatch.setattr(torch.fx.experimental._config, "meta_nonzero_assume_all_nonzero", True)
    model = network.Model(network.SHAPES["reader"]).to("meta")
    optimisers = train._optimisers(model, train.RECIPES["reader"])
    rows, tokens = 2, 32768
    ids, positions = (torch.zeros(rows, tokens, dtype=torch.long, device="meta") for _ in range(2))
    losses = step_of(model, ids, positions, torch.ones_like(ids, dtype=torch.bool))
    for parameter, gradient in zip(model.parameters(), losses[1:], strict=True):
        parameter.grad = gradient
    for optimiser in optimisers:
        optimiser.step()
    assert all(part.is_meta for part in losses)
    with pytest.raises(RuntimeError, match="meta"):
        step_of(model, ids, positions.cpu().new_zeros(rows, tokens, device="cpu"), ids > 0)


def test_every_step_of_the_reader_has_as_many_tokens():
    """So that one compilation serves; and rows as long as the positions are drawn."""
    recipe, shape = train.RECIPES["reader"], network.SHAPES["reader"]
    lengths = {tokens for _, mixed in recipe.lengths for tokens in mixed}
    assert max(lengths) == shape.max_positions
    assert all(recipe.batch_tokens % tokens == 0 for tokens in lengths)
    assert recipe.lengths[-1][0] == 1.0
    assert all(sum(mixed.values()) == pytest.approx(1) for _, mixed in recipe.lengths)


def test_rows_of_all_positions_are_consecutive(work):
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    drawn = examples.Examples(tokenizer, corpus.read(work), 256)
    for seed in range(20):
        drawn.reseed(random.Random(seed))
        *_, positions = drawn.batch(1, 256)
        assert positions[0].tolist() == list(range(256))


def test_rows_are_the_same_whoever_draws_them(work, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))  # where the other processes find the modules
    here, there = (feed.Feed(work, 4096, 1, workers) for workers in (0, 2))
    try:
        for step in range(2):
            one, other = (made.batch(step, lambda: (5, 256)) for made in (here, there))
            assert [part.shape for part in one] == [(5, 256)] * 4
            for a, b in zip(one, other, strict=True):
                assert torch.equal(a, b) and a.dtype == b.dtype
    finally:
        there.close()


def test_processes_that_draw_end_with_the_one_that_is_killed(work):
    script = f"""
import sys; sys.path.insert(0, {str(SCRIPTS)!r})
from pathlib import Path
if __name__ == "__main__":
    import feed
    made = feed.Feed(Path({str(work)!r}), 4096, 1, 2)
    made.batch(0, lambda: (2, 256))
    print(*made._pool._processes, flush=True)
    sys.stdin.read()
"""
    path = work / "drawing.py"
    path.write_text(script, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    drawing = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    process.kill()
    process.communicate()
    assert len(drawing) == 2 and not psutil.wait_procs(drawing, timeout=60)[1]


def test_a_batch_whose_loss_is_no_number_teaches_nothing(work):
    made = trainer(work, fresh=True)
    made.save()
    kept = (work / "checkpoint.pt").read_bytes()
    drawn = made.feed.batch
    made.feed.batch = lambda step, shape: spoilt(drawn(step, shape))
    before = [parameter.clone() for parameter in made.model.parameters()]
    made.step()
    made.save()
    assert made.lost == 1 and (work / "checkpoint.pt").read_bytes() == kept
    for was, is_now in zip(before, made.model.parameters(), strict=True):
        # Weight decay alone: of a gradient of zeros comes no direction.
        torch.testing.assert_close(is_now, was, rtol=1e-4, atol=1e-6)
    with pytest.raises(SystemExit, match=r"The loss is no number, 11 steps one after the other"):
        train.train(made, float("inf"), 10**9, float("inf"))
    made.feed.batch = drawn
    made.step()
    assert made.lost == 0


def spoilt(batch):
    ids, targets, weights, positions = batch
    return ids, targets, torch.where(weights > 0, torch.inf, weights), positions


def test_a_kernel_that_is_not_there_is_not_chosen(capsys):
    found = attention.quickest(torch.device("cpu"), 2, 64, tokens=64)
    # PyTorch has one kernel besides plain products on a CPU.
    assert found == [attention.SDPBackend.FLASH_ATTENTION]
    assert "attention: FLASH_ATTENTION in" in capsys.readouterr().out


def test_packed_models_are_the_same(work, tmp_path):
    made = trainer(work, fresh=True)
    made.step()
    made.save()
    export.export(work, tmp_path / "model", query_scale=1.0)
    paths = pack.pack(tmp_path / "model", tmp_path / "pieces", piece_mib=0.15)
    assert len(paths) > 1 and all(path.stat().st_size <= 0.15 * 2**20 for path in paths)
    pack.unpack(tmp_path / "pieces", tmp_path / "again")
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        if name != pack.WEIGHTS:
            assert (tmp_path / "model" / name).read_bytes() == (
                tmp_path / "again" / name
            ).read_bytes()
    one, other = (export.load_file(tmp_path / f / pack.WEIGHTS) for f in ("model", "again"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]) and tensor.dtype == other[name].dtype
    paths[0].unlink()
    with pytest.raises(SystemExit, match="not all of a model"):
        pack.unpack(tmp_path / "pieces", tmp_path / "less")


def test_what_is_on_no_grid_is_not_packed():
    with pytest.raises(SystemExit, match="layer is on no grid of 8 bits"):
        pack.packed("layer", torch.randn(4, 64))

"""Weights that are let go of are gone at once: whoever holds a closed session, and whatever was
prepared of layers, holds none of them. The next plan counts on that memory.
"""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from interruptions import interrupted_after
from random_checkpoints import make
from small_llm import TINY, hold, open_small, open_spilling

from ebbtide.offload.errors import InputError
from ebbtide.offload.mode import Mode
from ebbtide.offload.planning.admission import Admission
from ebbtide.offload.planning.plan import Loaded
from ebbtide.offload.running.runtime import Runtime

# Attention alone, states, experts, latents, layers of several shapes, streams beside each other.
KINDS = ("llama2", "qwen3.5", "gpt-oss", "deepseek-v3-moe", "gemma4", "gemma3n")
PROMPT = list(range(3, 150))


@contextmanager
def no_collector():
    """What cycles hold stays."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def refs_of(llm) -> list[weakref.ref]:
    """To the tensors of all layers and the head that are in memory."""
    weights = llm.admission.weights
    layers = list(weights._resident.values())
    kept = [value for layer in layers for value in layer.values()] + list(weights.head.blocks or ())
    tensors = [v for k in kept for v in ([k] if isinstance(k, torch.Tensor) else vars(k).values())]
    return [weakref.ref(t) for t in (*layers, *tensors) if isinstance(t, (dict, torch.Tensor))]


def living(refs: list[weakref.ref]) -> int:
    return sum(ref() is not None for ref in refs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight_bits", ["full", "4"])
def test_nothing_holds_weights_that_were_let_go_of(kind, weight_bits, tmp_path):
    folder = make(kind, tmp_path / "model")
    with no_collector(), open_small(folder, tmp_path, weight_bits=weight_bits, **TINY) as llm:
        session = llm.session(context=400)
        first = session.generate(PROMPT, max_new_tokens=5, temperature=0).token_ids
        refs = refs_of(llm)
        assert living(refs) == len(refs) > 10
        with pytest.raises(InputError, match="session is open"):
            llm.unload()
        session.close()
        llm.unload()
        assert living(refs) == 0
        with llm.session(context=400) as again:
            assert again.generate(PROMPT, max_new_tokens=5, temperature=0).token_ids == first


@pytest.mark.parametrize("options", [{"mode": Mode("bounded")}, {"mode": Mode("deadline")}, {}])
def test_nothing_holds_what_a_closed_session_s_reads_went_to(options, tmp_path):
    """Pages at hand, and those on their way: who reads them holds them as long as it may read."""
    folder = make("llama2", tmp_path / "model")
    with no_collector(), open_spilling(folder, tmp_path, context=400, **options) as llm:
        session = llm.session()
        session.generate(PROMPT * 2, max_new_tokens=20, temperature=0)
        io = session._runtime.store._transfers._io
        refs = [weakref.ref(arena.frames) for arena in (io._arena, io.hot_arena)]
        assert living(refs) == 2
        session.close()
        assert living(refs) == 0


@pytest.mark.parametrize("options", [{"mode": Mode("bounded")}, {"mode": Mode("deadline")}, {}])
def test_nor_do_modes_and_guesses(options, tmp_path):
    folder = make("llama2", tmp_path / "model")
    with no_collector(), open_spilling(folder, tmp_path, context=400, **options) as llm:
        session = llm.session()
        session.generate(PROMPT * 2, max_new_tokens=20, temperature=0)
        with session.fork() as branch:
            branch.generate(PROMPT[:9], max_new_tokens=5)
        refs = refs_of(llm)
        session.close()
        llm.unload()
        assert living(refs) == 0


def test_a_plan_that_holds_weights_otherwise_finds_the_memory_of_the_first(tmp_path):
    """Loaded anew for another request: never are both in memory."""
    folder = make("qwen2", tmp_path / "model")
    with no_collector(), open_small(folder, tmp_path) as llm:
        llm.generate(PROMPT, max_new_tokens=2)
        refs = refs_of(llm)
        seen = []
        llm.on_progress = lambda progress: seen.append(living(refs))
        hold(llm, llm.admission._loaded._replace(layers_streamed=1))
        llm.generate(PROMPT, max_new_tokens=2)
        assert seen and max(seen) == 0


def test_what_ctrl_c_left_half_closed_keeps_no_weights(tmp_path):
    folder = make("llama2", tmp_path / "model")
    with open_small(folder, tmp_path, **TINY) as llm:
        session = llm.session(context=400)
        session.generate(PROMPT, max_new_tokens=2)
        assert interrupted_after(3, [Runtime.close], session.close)
        assert not session.is_open and session in llm.sessions
        llm.unload()
        assert llm.admission.weights is None and session not in llm.sessions


def test_weights_load_wherever_loading_was_interrupted(checkpoint, tmp_path):
    with open_small(checkpoint("llama2"), tmp_path) as llm:
        hold(llm, Loaded(2, False))
        expected, count, is_interrupted = llm.logits([1, 2, 3]), 1, True
        while is_interrupted:
            llm.unload()
            is_interrupted = interrupted_after(
                count, [Admission._load], lambda: llm.logits([1, 2, 3]), instructions=True
            )
            assert torch.equal(llm.logits([1, 2, 3]), expected)
            count += 1
        assert count > 20

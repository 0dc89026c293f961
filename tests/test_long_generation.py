"""Long answers in bounded mode: what was generated seals, can be chosen, and is never lost."""

from __future__ import annotations

import pytest
import torch
from small_llm import keep_in_memory, open_small

from ebbtide.offload.mode import Mode
from ebbtide.prefetch import audit

PROMPT_TOKENS, NUM_TOKENS = 100, 420
IDS = torch.randint(0, 256, (NUM_TOKENS,), generator=torch.Generator().manual_seed(4)).tolist()
BUDGET_TOKENS = 64
MODES = {
    "top_p": Mode("bounded", selector_options={"epsilon": 0.4}),
    "budget": Mode("bounded", "quest", {"num_tokens": BUDGET_TOKENS}, foresight="nothing"),
}


def generate(folder, spill_dir, mode: Mode, share: float, **store):
    """Decodes IDS after the prompt: logits (num_tokens, vocab), records by layer, which of them
    were ever chosen, the traffic meanwhile, and the geometry.
    """
    with open_small(folder, spill_dir, mode=mode, store=store) as llm:
        keep_in_memory(llm, NUM_TOKENS, share, sequences=4, text=True)
        llm._context = NUM_TOKENS
        with llm.session() as session:
            session.append(IDS[:PROMPT_TOKENS])
            rows = [session.last_logits()]
            store = session._runtime.store
            before = store.stats.snapshot()
            rows += [session.decode(token) for token in IDS[PROMPT_TOKENS:]]
            spent = store.stats - before
            store.check_integrity()
            sequence, layers = session._sequence, range(llm.config.num_layers)
            counts = [sequence.table.num_records(layer) for layer in layers]
            ever = [sequence.trail._ever[layer] for layer in layers]
            return torch.stack(rows), counts, ever, spent, session._engine.geometry


@pytest.mark.parametrize("name", MODES)
def test_generated_pages_seal_stay_and_are_chosen(checkpoint, tmp_path, monkeypatch, name):
    monkeypatch.setattr(audit, "EVERY_TOKENS", 10**6)
    folder, mode = checkpoint("qwen2"), MODES[name]
    expected, counts, ever, _, geometry = generate(folder, tmp_path, mode, 1.0)
    tokens = geometry.layout.record_tokens
    assert set(counts) == {geometry.sealed_tokens(NUM_TOKENS) // tokens}, "every sealed token stays"
    of_prompt = -(-PROMPT_TOKENS // tokens)
    assert all(chosen[:of_prompt].any() and chosen[of_prompt:].any() for chosen in ever)
    # A cache of six records gives up each of them again and again: all come back as they were.
    found, counts_on_disk, _, spent, _ = generate(folder, tmp_path, mode, 0.0, hot_records=6)
    assert torch.equal(found, expected) and counts_on_disk == counts
    assert spent.misses + spent.late > 2 * sum(counts)
    if name == "budget":  # a step reads no more, however long the answer
        steps, per_layer = NUM_TOKENS - PROMPT_TOKENS, BUDGET_TOKENS // tokens
        assert spent.bytes_read["disk"] <= steps * per_layer * len(counts) * (
            geometry.layout.record_bytes
        )

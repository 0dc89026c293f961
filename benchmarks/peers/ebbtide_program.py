"""Ebbtide, through its engine: decode and prefill without text and sampling.

    python benchmarks/peers/ebbtide_program.py FOLDER MOST_TOKENS [WEIGHT_BITS [ISA]]

Variants: pages of 8 and of 4 bits, all in memory and all attended to (exact mode). A deep cache is
filled without computing it: random keys and values are sealed once and written to the page store
for every layer as often as the depth needs, and the raw cells are filled with random numbers.
Codes of quantised weights are drawn at random as well, as in the GGUF file: quantising takes
longer than all that is measured, and speed depends on shapes alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from program import serve

from ebbtide import LLM
from ebbtide.kernels import dispatch
from ebbtide.offload.options import Options
from ebbtide.offload.pages.geometry import choose_geometry
from ebbtide.offload.pages.page_table import Tier
from ebbtide.offload.pages.pager import PageStore
from ebbtide.offload.running.engine import Engine
from ebbtide.offload.weights import weights

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from random_state import fill, random_weight

PAGES = {"8-bit pages": "8", "4-bit pages": "4"}
_SLACK_TOKENS = 1024  # for what is decoded at a depth


class EbbtideProgram:
    def __init__(self, folder: str, most_tokens: int, weight_bits: str = "4", isa: str = ""):
        if isa:
            dispatch.compiled_for().use_instruction_set(isa)
        torch.manual_seed(0)
        weights.quantise_weight = random_weight
        self._llm = LLM(
            Options(model=folder, weight_bits=weight_bits, context=most_tokens, draft=False)
        )
        with self._llm.open_session(1, sequences=1):  # loads the weights
            pass
        self._config, self._most = self._llm.config.fixed_for(most_tokens), most_tokens
        self.variants = self.prefill_variants = list(PAGES)
        self._engines = {name: self._engine(bits) for name, bits in PAGES.items()}
        self._sequences = {name: self._sequence(name, 0) for name in PAGES}

    def facts(self) -> dict:
        config, store = self._config, self._llm.admission.weights
        tensors = [t for layer in range(config.num_layers) for t in store.layer(layer).values()]
        tensors += store.head.blocks
        return {
            "weight_bytes": sum(_num_bytes(t) for t in tensors),
            "kv_bytes_per_token": {
                name: self._kv_bytes_per_token(engine) for name, engine in self._engines.items()
            },
            "kernels": f"{dispatch.backend()} {dispatch.instruction_set()}".strip(),
        }

    def fill(self, depth: int) -> None:
        for name in PAGES:
            self._engines[name].sequences.close(self._sequences[name])
            self._sequences[name] = self._sequence(name, depth)

    def decode(self, variant: str, threads: int, tokens: int) -> None:
        torch.set_num_threads(threads)
        engine, sequence = self._engines[variant], self._sequences[variant]
        for _ in range(tokens):
            sequence.tokens.append((sequence.length * 7919 + 1) % self._config.vocab_size)
            engine.logits(engine.decode(sequence))

    def prefill(self, variant: str, threads: int, tokens: int) -> None:
        torch.set_num_threads(threads)
        engine, sequence = self._engines[variant], self._sequence(variant, 0)
        ids = [(i * 7919 + 1) % self._config.vocab_size for i in range(tokens)]
        sequence.tokens.extend(ids)
        engine.logits(engine.prefill(sequence))
        engine.sequences.close(sequence)

    def _engine(self, kv_bits: str) -> Engine:
        geometry = choose_geometry(self._config, kv_bits)
        layout, layers = geometry.layout, len(self._config.kv_layers)
        spans = geometry.num_spans(self._most + _SLACK_TOKENS) + 1
        frames = {tier: 0 for tier in Tier}
        frames[Tier.HOST] = layers * spans * geometry.records_per_span
        store = PageStore(
            layers,
            layout.record_bytes,
            layout.near_record_bytes,
            geometry.records_per_span,
            frames,
        )
        loaded = self._llm.admission.weights
        return Engine(self._config, loaded, store, geometry, torch.device("cpu"))

    def _sequence(self, name: str, depth: int):
        """A sequence of `depth` tokens, of which each layer's keys and values are random."""
        engine = self._engines[name]
        sequence = engine.sequences.open(self._most + _SLACK_TOKENS)
        if depth == 0:
            return sequence
        fill(engine, sequence, depth)
        return sequence

    def _kv_bytes_per_token(self, engine: Engine) -> float:
        """Both planes of a sealed token, in all layers; the raw cells come on top."""
        layout = engine.geometry.layout
        record = layout.record_bytes + layout.near_record_bytes * (not layout.is_full)
        return record / layout.record_tokens * len(self._config.kv_layers)


def _num_bytes(tensor) -> int:
    return tensor.num_bytes if hasattr(tensor, "num_bytes") else tensor.nbytes


if __name__ == "__main__":
    serve(lambda: EbbtideProgram(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))

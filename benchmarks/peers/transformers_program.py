"""Hugging Face transformers on the CPU: the same checkpoint in bfloat16, as it is stored.

    python benchmarks/peers/transformers_program.py FOLDER MOST_TOKENS

Weights and cache have 16 bits, so this is no equal of 4-bit weights; it is what most people run. A
deep cache is random numbers, given to the model as the cache of earlier tokens; a hybrid's is read.
"""

from __future__ import annotations

import sys

import torch
from program import CHUNK_TOKENS, serve
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache


class TransformersProgram:
    def __init__(self, folder: str, most_tokens: int):
        del most_tokens  # its cache grows by copying itself
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self._config = self._model.config
        self.variants = self.prefill_variants = ["bfloat16"]
        self.fill(0)

    def facts(self) -> dict:
        c = self._config
        elements = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
        return {
            "weight_bytes": sum(p.nbytes for p in self._model.parameters()),
            "kv_bytes_per_token": {"bfloat16": 2 * elements},
        }

    @torch.inference_mode()
    def fill(self, depth: int) -> None:
        c = self._config
        self._cache, self._length = DynamicCache(config=c), depth
        kinds = set(getattr(c, "layer_types", None) or ())
        if depth and kinds > {"full_attention"}:  # states are computed
            self._length = 0
            for start in range(0, depth, CHUNK_TOKENS):
                self._run([(start + i) % c.vocab_size for i in range(CHUNK_TOKENS)])
        elif depth:
            shape = (1, c.num_key_value_heads, depth, c.head_dim)
            for layer in range(c.num_hidden_layers):
                part = torch.randn(shape, dtype=torch.bfloat16)
                self._cache.update(part, part.clone(), layer)

    def decode(self, variant: str, threads: int, tokens: int) -> None:
        torch.set_num_threads(threads)
        for _ in range(tokens):
            self._run([(self._length * 7919 + 1) % self._config.vocab_size])

    def prefill(self, variant: str, threads: int, tokens: int) -> None:
        torch.set_num_threads(threads)
        self.fill(0)
        self._run([(i * 7919 + 1) % self._config.vocab_size for i in range(tokens)])

    @torch.inference_mode()
    def _run(self, ids: list[int]) -> None:
        self._model(
            input_ids=torch.tensor([ids]),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._length += len(ids)


if __name__ == "__main__":
    serve(lambda: TransformersProgram(sys.argv[1], int(sys.argv[2])))

"""llama.cpp, through its C interface as llama-cpp-python binds it.

    python benchmarks/peers/llama_program.py FILE.gguf MOST_TOKENS

Variants: a cache of float16 with and without flash attention, and of 8 and 4 bits (Q8_0, Q4_0),
which need it. Prompts are read 512 tokens at a time, as llama.cpp does by default. A deep cache is
filled without computing it: 256 tokens are processed once, saved
by llama_state_seq_get_data, and loaded again and again into a second sequence, whose positions
are moved on before it joins the first. All calls are llama.cpp's own, so the cache is laid out as
decoding finds it; what it says is noise.
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp as llama
from program import CHUNK_TOKENS, serve

_F16, _Q4, _Q8 = (getattr(llama, f"GGML_TYPE_{name}") for name in ("F16", "Q4_0", "Q8_0"))
# name: (type of keys and values, flash attention, their bits)
CACHES = {
    "f16": (_F16, False, 16),
    "f16, flash attention": (_F16, True, 16),
    "q8_0, flash attention": (_Q8, True, 8.5),
    "q4_0, flash attention": (_Q4, True, 4.5),
}
_SLACK_TOKENS = 1024  # for what is decoded at a depth
_BATCH_TOKENS = 512
_MAIN, _SPARE = 0, 1  # sequences


class LlamaProgram:
    """caches: the variants whose contexts are made, of `most_tokens` each."""

    def __init__(self, path: str, most_tokens: int, caches=tuple(CACHES)):
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(
            path.encode(), llama.llama_model_default_params()
        )
        assert self._model, f"llama.cpp cannot load {path}"
        self._vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self.variants = list(CACHES)
        self.prefill_variants = self.variants[:2]
        self._contexts = {
            name: self.make_context(name, most_tokens + _SLACK_TOKENS) for name in caches
        }
        self._lengths = dict.fromkeys(caches, 0)

    def facts(self) -> dict:
        model = self._model
        head_dim = llama.llama_model_n_embd(model) // llama.llama_model_n_head(model)
        elements = 2 * llama.llama_model_n_layer(model) * llama.llama_model_n_head_kv(model)
        if llama.llama_model_is_hybrid(model):
            elements = 0  # it does not say how many layers attend
        return {
            # The embedding is the head as well, and is read once.
            "weight_bytes": llama.llama_model_size(model),
            "kv_bytes_per_token": {
                name: elements * head_dim * bits / 8 for name, (_, _, bits) in CACHES.items()
            },
            "version": llama.__version__,
            "system": llama.llama_print_system_info().decode(),
        }

    def fill(self, depth: int) -> None:
        for name, context in self._contexts.items():
            self.fill_context(context, depth)
            self._lengths[name] = depth

    def decode(self, variant: str, threads: int, tokens: int) -> None:
        context = self._contexts[variant]
        llama.llama_set_n_threads(context, threads, threads)
        for _ in range(tokens):
            at = self._lengths[variant]
            self.run(context, [(at * 7919 + 1) % self._vocab], at)
            self._lengths[variant] += 1

    def prefill(self, variant: str, threads: int, tokens: int) -> None:
        context = self._contexts[variant]
        llama.llama_set_n_threads(context, threads, threads)
        llama.llama_memory_clear(llama.llama_get_memory(context), False)
        for start in range(0, tokens, _BATCH_TOKENS):
            self.run(context, self.prompt(min(_BATCH_TOKENS, tokens - start)), start)
        self._lengths[variant] = tokens

    def close(self) -> None:
        """Free all contexts and the model."""
        for context in self._contexts.values():
            llama.llama_free(context)
        llama.llama_model_free(self._model)

    def make_context(self, cache: str, most_tokens: int):
        """An empty context with one of CACHES; the caller frees it."""
        kind, flash, _ = CACHES[cache]
        params = llama.llama_context_default_params()
        params.n_ctx = -(-most_tokens // 256) * 256
        params.n_batch = params.n_ubatch = _BATCH_TOKENS
        params.n_seq_max, params.kv_unified = 2, True
        params.type_k = params.type_v = kind
        params.flash_attn_type = int(flash)
        params.no_perf = True
        context = llama.llama_init_from_model(self._model, params)
        assert context, "llama.cpp cannot make a context"
        return context

    def fill_context(self, context, depth: int) -> None:
        memory = llama.llama_get_memory(context)
        llama.llama_memory_clear(memory, False)
        if depth == 0:
            return
        assert depth % CHUNK_TOKENS == 0, "depths are multiples of 256"
        llama.llama_set_n_threads(context, 2, 2)
        if llama.llama_model_is_hybrid(self._model):  # a state cannot be moved on
            for start in range(0, depth, CHUNK_TOKENS):
                self.run(context, self.prompt(), start)
            return
        self.run(context, self.prompt(), 0)
        size = llama.llama_state_seq_get_size(context, _MAIN)
        state = (ctypes.c_uint8 * size)()
        size = llama.llama_state_seq_get_data(context, state, size, _MAIN)
        for start in range(CHUNK_TOKENS, depth, CHUNK_TOKENS):
            done = llama.llama_state_seq_set_data(context, state, size, _SPARE)
            assert done, "llama.cpp cannot restore its own state"
            llama.llama_memory_seq_add(memory, _SPARE, 0, CHUNK_TOKENS, start)
            llama.llama_memory_seq_cp(memory, _SPARE, _MAIN, -1, -1)
            llama.llama_memory_seq_rm(memory, _SPARE, -1, -1)
        reached = llama.llama_memory_seq_pos_max(memory, _MAIN) + 1
        assert reached == depth, f"the cache holds {reached} tokens, not {depth}"

    def prompt(self, tokens: int = CHUNK_TOKENS) -> list[int]:
        return [(i * 7919 + 1) % self._vocab for i in range(tokens)]

    def run(self, context, tokens: list[int], position: int) -> None:
        """Process tokens from `position` on; the last one's logits are computed."""
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, _MAIN
            batch.logits[i] = i == len(tokens) - 1
        failed = llama.llama_decode(context, batch)
        assert not failed, f"llama_decode failed with {failed}"
        llama.llama_synchronize(context)
        llama.llama_batch_free(batch)


if __name__ == "__main__":
    serve(lambda: LlamaProgram(sys.argv[1], int(sys.argv[2])))

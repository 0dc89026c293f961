"""Whether llama.cpp computes from a GGUF file what Ebbtide computes.

    python benchmarks/peers/gguf_logits.py FILE.gguf ... [--tokens 100] [--weight-bits full]

An independent judge of names, orders of rows and metadata. Both get the same random tokens, and
keep keys and values in float32 and raw cells. Printed are the greatest difference of a logit, the
KL divergence, and how often the first choice is the same; the last line is JSON. Both round
activations where weights are quantised, each in its own way. Windows of Mistral and Phi-3 are not
llama.cpp's, and gpt-oss's yarn differs; see docs/log.md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from ebbtide import LLM, Budget


def theirs(path: Path, ids: list[int]) -> torch.Tensor:
    """(len(ids), vocab) float32 logits of llama.cpp."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = max(512, len(ids))
    options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
    options.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, options)
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for at, token in enumerate(ids):
        batch.token[at], batch.pos[at], batch.logits[at] = token, at, 1
        batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
    assert llama_cpp.llama_decode(context, batch) == 0
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = [llama_cpp.llama_get_logits_ith(context, at) for at in range(len(ids))]
    logits = torch.from_numpy(np.stack([np.ctypeslib.as_array(r, (size,)).copy() for r in rows]))
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return logits


def ours(path: Path, ids: list[int], weight_bits: str) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as folder:
        with LLM.open(
            path,
            dtype="float32",
            kv_bits="full",
            weight_bits=weight_bits,
            spill_dir=folder,
            budget=Budget(),
            threads=1,
        ) as llm:
            return llm.logits(ids)


def compare(path: Path, num_tokens: int, weight_bits: str) -> dict:
    with LLM.open(path, threads=1) as llm:
        size = llm.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, min(size, 256), (num_tokens,), generator=generator).tolist()
    judge, found = theirs(path, ids), ours(path, ids, weight_bits)
    said, expected = found.log_softmax(-1), judge.log_softmax(-1)
    divergence = (expected.exp() * (expected - said)).sum(-1)
    return {
        "file": path.name,
        "greatest_difference": (found - judge).abs().max().item(),
        "greatest_logit": judge.abs().max().item(),
        "greatest_kl": divergence.max().item(),
        "median_kl": divergence.median().item(),
        "same_first_choice": (found.argmax(-1) == judge.argmax(-1)).float().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--weight-bits", default="full")
    given = parser.parse_args()
    results = [compare(path, given.tokens, given.weight_bits) for path in given.files]
    for r in results:
        print(
            f"{r['file']}: difference {r['greatest_difference']:.1e} of {r['greatest_logit']:.1f}, "
            f"KL {r['greatest_kl']:.1e} (median {r['median_kl']:.1e}), first choice the same "
            f"{r['same_first_choice']:.1%}"
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()

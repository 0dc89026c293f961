"""What models that are quantised in their files take to load, and their speeds.

    python benchmarks/packed.py FOLDER [--formats awq,gptq,...] [--threads N] [--tokens N]

FOLDER: a model of plain numbers, as benchmarks/checkpoints.py writes them. In a temporary folder
its matrices are written anew in each format, of random codes in groups of 128 inputs. For each, and
for the plain model with weights of 8 and of 4 bits: seconds to load from the page cache, bytes that
all of the weights take, tokens per second of a prompt, and milliseconds for a decoded token. The
last line is one JSON object.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: else its threads spin

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ebbtide import LLM

GROUP, BLOCK = 128, 128
MIDDLE = 0x77777777  # zeros of 8, less 1
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}
CONFIGS = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
    "gptq": {**_GPTQ, "sym": False},
    "gptq-sym": {**_GPTQ, "sym": True},
    "gptq-order": {**_GPTQ, "sym": True, "desc_act": True},
    "gptq-8": {**_GPTQ, "sym": True, "bits": 8},
    "fp8": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
}


def pack(rows: int, columns: int, name: str) -> dict[str, torch.Tensor]:
    """A matrix of random codes, of about the standard deviation columns ** -0.5."""
    groups, spread = columns // GROUP, columns**-0.5
    if name == "fp8":
        codes = torch.randn(rows, columns).to(torch.float8_e4m3fn)
        return {
            ".weight": codes,
            ".weight_scale_inv": torch.full((-(-rows // BLOCK), groups), spread),
        }
    bits = 8 if name == "gptq-8" else 4
    per_word = 32 // bits

    def words(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32).random_(-(1 << 31), (1 << 31) - 1)

    scales = torch.full((groups, rows), spread / (4.6 if bits == 4 else 73.9)).half()
    if name == "awq":
        zeros = torch.full((groups, rows // 8), MIDDLE + 0x11111111 - (1 << 32)).int()
        return {".qweight": words(columns, rows // 8), ".qzeros": zeros, ".scales": scales}
    middle = MIDDLE if bits == 4 else 0x7F7F7F7F
    index = torch.arange(columns, dtype=torch.int32) // GROUP
    return {
        ".qweight": words(columns // per_word, rows),
        ".qzeros": torch.full((groups, rows // per_word), middle).int(),
        ".scales": scales,
        ".g_idx": index[torch.randperm(columns)] if name == "gptq-order" else index,
    }


def write(source: Path, folder: Path, name: str) -> None:
    """The model in a format, file by file."""
    for file in source.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            shutil.copyfile(file, folder / file.name)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = CONFIGS[name]
    (folder / "config.json").write_text(json.dumps(config))
    places = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors = {}
        with safe_open(file, "pt") as opened:
            for key in opened.keys():
                w = opened.get_tensor(key)
                if w.dim() != 2 or ".layers." not in key or w.shape[1] % GROUP or len(w) % 8:
                    tensors[key] = w
                    continue
                made = pack(*w.shape, name)
                tensors |= {key.removesuffix(".weight") + end: t for end, t in made.items()}
        save_file(tensors, folder / file.name)
        places |= dict.fromkeys(tensors, file.name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))


def measure(folder: Path, bits: str, tokens: int) -> dict[str, float]:
    ids = torch.randint(0, 1000, (tokens,)).tolist()
    with LLM.open(folder, weight_bits=bits, context=tokens + 64) as llm:
        start = time.perf_counter()
        llm.logits(ids[:2])  # loads
        load_s = time.perf_counter() - start
        timings = [llm.generate(ids, max_new_tokens=33, temperature=0).timings for _ in range(3)]
        return {
            "load_s": load_s,
            "weights_bytes": sum(llm.admission.facts.layer_sizes),
            "prompt_tokens_per_s": max(t["prefill_tokens_per_s"] for t in timings),
            "token_ms": 1e3 / max(t["decode_tokens_per_s"] for t in timings),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--formats", default=",".join(CONFIGS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    report = {"threads": options.threads}
    for name in ("plain-8", "plain-4", *options.formats.split(",")):
        with tempfile.TemporaryDirectory(dir=options.folder.parent) as scratch:
            if name.startswith("plain"):
                report[name] = measure(options.folder, name[-1], options.tokens)
            else:
                write(options.folder, Path(scratch), name)
                report[name] = measure(Path(scratch), "auto", options.tokens)
        of = report[name]
        print(
            f"{name:<12}{of['load_s']:7.2f} s to load, layers "
            f"{of['weights_bytes'] / 2**20:7.0f} MiB, "
            f"prompt {of['prompt_tokens_per_s']:6.0f} tokens/s, a token {of['token_ms']:6.1f} ms",
            flush=True,
        )
    print(json.dumps(report))


if __name__ == "__main__":
    main()

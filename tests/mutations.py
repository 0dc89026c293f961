"""Damages model folders in thousands of ways, and opens each: only typed errors may come out, and
memory must not grow.

    python tests/mutations.py [COUNT] [SEED]     the full count: 10000

A mutant is a small checkpoint of some family with one to three edits: bytes of config.json, of a
shard's header or length, of its data, or of the index; a value of config.json or of a header
replaced by an odd one; a file cut, emptied or left out. A mutant that still opens must answer with
a row of logits, or refuse by name.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

ROOM_BYTES = 768 << 20  # for a model
FAMILIES = [
    *("llama3", "qwen2", "phi3-longrope-long", "gemma3", "mixtral", "exaone4", "granite"),
    *("qwen3.5-moe", "granite4-h-moe", "lfm2", "nemotron-h-moe", "falcon-h1", "cohere2-moe"),
    *("apertus", "hunyuan-moe", "ernie4.5-moe", "mellum-moe", "starcoder2", "lfm3"),
    *("laguna-moe", "granite-swa-moe", "nemotron-h-moe-latent", "minicpm3", "phimoe"),
    *("gemma3n", "llama4-moe", "olmo-hybrid", "jamba-moe", "kimi-linear-moe", "ling3-moe"),
    *("stablelm-qk-norm", "llama-head100"),
]
PACKED = [  # of packed_files.FORMATS
    *("awq", "gptq", "gptq, groups in another order", "gptq, 8 bits", "compressed-tensors, zeros"),
    *("compressed-tensors, bytes", "compressed-tensors, float8 of blocks", "fp8", "modelopt"),
]
_ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 1 << 31, 1 << 40, 1 << 64, 10**400, 0.5, -0.0, 1e-300),
    *(1e308, float("nan"), float("inf"), "", "silu", "\u0000", "a" * 10_000, [], [0], [[]], {}),
    *({"a": {}}, [1] * 100, ["sliding_attention"] * 3, {"rope_type": "longrope"}, "LLLG"),
]
_BYTES = [b"-", b"9", b"[", b"]", b"{", b"}", b'"', b"null", b",", b":", b"\\u0000", b"\xff", b""]


def mutate(folder: Path, chance: random.Random) -> str:
    """Damage a copy of a model in place; says how."""
    kinds = [_edit_bytes, _odd_value, _odd_value, _edit_header, _edit_header, _edit_data, _cut]
    kind = chance.choice(kinds)
    for _ in range(chance.randint(1, 3)):
        kind(folder, chance)
    return kind.__name__.removeprefix("_")


def _edit_bytes(folder: Path, chance: random.Random) -> None:
    """Bytes of a JSON file, or of the first kilobytes of a shard."""
    path = chance.choice(sorted(folder.glob("*.json")) + sorted(folder.glob("*.safetensors")))
    content = bytearray(path.read_bytes())
    at = chance.randrange(min(len(content), 8192) or 1)
    content[at : at + chance.randint(0, 3)] = chance.choice(_BYTES)
    path.write_bytes(content)


def _odd_value(folder: Path, chance: random.Random) -> None:
    """One value of config.json or of the index, however deep."""
    path = chance.choice([folder / "config.json"] * 4 + sorted(folder.glob("*.index.json")))
    try:
        value = json.loads(path.read_text())
        _replace_somewhere(value, chance)
        path.write_text(json.dumps(value))
    except (ValueError, OSError):
        pass  # an earlier edit has broken it already


def _replace_somewhere(value: Any, chance: random.Random) -> None:
    inner = [v for v in value.values() if isinstance(v, dict) and v] if value else []
    if inner and chance.random() < 0.5:
        _replace_somewhere(chance.choice(inner), chance)
    elif value:
        key = chance.choice(sorted(value))
        if chance.random() < 0.2:
            value[chance.choice(["rope_scaling", "head_dim", "text_config", key])] = value.pop(key)
        else:
            value[key] = chance.choice(_ODD)


def _edit_header(folder: Path, chance: random.Random) -> None:
    """One tensor's entry in a shard's header; the length is kept true, mostly."""
    path = chance.choice(sorted(folder.glob("*.safetensors")))
    content = path.read_bytes()
    try:
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        _replace_somewhere(header, chance)
    except (ValueError, struct.error, TypeError, AttributeError):
        return
    text = json.dumps(header).encode()
    stated = len(text) if chance.random() < 0.9 else chance.choice([0, 7, 1 << 20, 1 << 62])
    path.write_bytes(struct.pack("<Q", stated) + text + content[8 + length :])


def _edit_data(folder: Path, chance: random.Random) -> None:
    """Numbers of a tensor: any bits, infinities and NaN among them."""
    path = chance.choice(sorted(folder.glob("*.safetensors")))
    content = bytearray(path.read_bytes())
    at = chance.randrange(len(content) or 1)
    content[at : at + 4] = chance.choice([b"\xff" * 4, b"\x00\x00\x80\x7f", chance.randbytes(4)])
    path.write_bytes(content)


def _cut(folder: Path, chance: random.Random) -> None:
    path = chance.choice([p for p in sorted(folder.iterdir()) if p.suffix != ".jinja"])
    if chance.random() < 0.2:
        path.unlink()
        return
    content = path.read_bytes()
    path.write_bytes(content[: chance.choice([0, 7, 8, len(content) // 2, len(content) - 1])])


def open_and_ask(folder: Path) -> None:
    """What a user does with a model."""
    from ebbtide import LLM, Budget

    # What this process has by now counts too: after thousands of tests a gibibyte.
    taken_bytes = psutil.Process().memory_info().rss
    budget = Budget(host_memory=taken_bytes + ROOM_BYTES, disk_memory=0)
    with LLM.open(folder, budget=budget, weight_bits="8", kv_bits="8") as llm:
        assert llm.tokenizer is not None
        assert llm.logits([1, 2, 3], last=1).shape == (1, llm.config.vocab_size)


def run(models: list[Path], count: int, seed: int, scratch: Path) -> Counter:
    """How `count` mutants ended: by the name of the error, or "opened". Any error that is not ours
    comes through, with the mutant left in `scratch`.
    """
    from ebbtide.offload.errors import EbbtideError

    ends: Counter = Counter()
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        folder = scratch / "mutant"
        shutil.copytree(chance.choice(models), folder)
        how = mutate(folder, chance)
        try:
            open_and_ask(folder)
            ends["opened"] += 1
        except EbbtideError as error:
            assert type(error) is not EbbtideError and str(error)
            ends[type(error).__name__] += 1
        except BaseException as error:
            raise AssertionError(f"mutant {number} of seed {seed} ({how}): {error!r}") from error
        shutil.rmtree(folder)
    return ends


def make_models(folder: Path) -> list[Path]:
    """One small checkpoint of each family, in shards, and of each way of being quantised."""
    from packed_files import write
    from random_checkpoints import make

    plain = make("llama3", folder / "plain")
    models = [make(name, folder / name, sharded=i % 2 == 0) for i, name in enumerate(FAMILIES)]
    return models + [write(plain, name, folder / name)[0] for name in PACKED]


if __name__ == "__main__":
    import resource

    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as name:
        models = make_models(Path(name) / "models")
        run(models, 50, seed + 1, Path(name))  # what grows once, has grown
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ends = run(models, count, seed, Path(name))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"mutants": count, "peak_grown_kib": grown, "ends": ends}))

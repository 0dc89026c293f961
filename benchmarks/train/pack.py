"""An exported model in pieces that are small enough to be fetched from anywhere, and back.

    python benchmarks/train/pack.py MODEL --out PIECES [--piece-mib 16]
    python benchmarks/train/pack.py PIECES --out MODEL --unpack

Matrices are written as what they are, codes of 8 bits and a power of two for every 32: half of what
they take in bfloat16. Unpacked they are the same numbers. Each piece is a safetensors file; the
first has the other files of the folder in its metadata.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from export import GROUP, step_exponents
from safetensors import safe_open
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
CODES, EXPONENTS = ".codes", ".exponents"
HEADER_BYTES = 64 << 10  # of a safetensors file, less its metadata
Tensors = dict[str, torch.Tensor]


def packed(name: str, weight: torch.Tensor) -> Tensors:
    """Codes and exponents of a matrix on the grid; what is no matrix stays as it is."""
    if weight.dim() != 2:
        return {name: weight}
    groups = weight.float().reshape(-1, GROUP)
    exponents = step_exponents(groups)
    codes = groups / torch.exp2(exponents)
    if not torch.equal(codes, codes.round().clamp(-127, 127)):
        raise SystemExit(f"{name} is on no grid of 8 bits: give a folder that export.py wrote.")
    shapes = (weight.shape, (weight.shape[0], -1))
    parts = (codes.to(torch.int8), exponents.to(torch.int8))
    return {
        name + kind: part.reshape(shape)
        for kind, part, shape in zip((CODES, EXPONENTS), parts, shapes, strict=True)
    }


def unpacked(tensors: Tensors) -> Tensors:
    """The weights, in bfloat16."""
    weights = {}
    for name, tensor in tensors.items():
        if name.endswith(CODES):
            name = name.removesuffix(CODES)
            steps = torch.exp2(tensors[name + EXPONENTS].float()).reshape(-1, 1)
            groups = tensor.float().reshape(-1, GROUP) * steps
            tensor = groups.reshape(tensor.shape).to(torch.bfloat16)
        elif name.endswith(EXPONENTS):
            continue
        weights[name] = tensor
    return weights


def pieces(tensors: Tensors, most_bytes: int, first_bytes: int) -> list[Tensors]:
    """Tensors shared out, the largest first, so that no piece takes more than most_bytes; the first
    has first_bytes besides."""
    filled: list[tuple[int, Tensors]] = [(first_bytes, {})]
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].nbytes):
        fits = (n for n, (size, _) in enumerate(filled) if size + tensor.nbytes <= most_bytes)
        number = next(fits, len(filled))
        if number == len(filled):
            filled.append((0, {}))
        size, part = filled[number]
        filled[number] = (size + tensor.nbytes, part | {name: tensor})
    return [part for _, part in filled]


def pack(model: Path, out: Path, piece_mib: float) -> list[Path]:
    """Writes the pieces; returns their paths."""
    others = {
        path.name: path.read_text(encoding="utf-8")
        for path in sorted(model.iterdir())
        if path.name != WEIGHTS
    }
    tensors: Tensors = {}
    for name, weight in load_file(str(model / WEIGHTS)).items():
        tensors |= packed(name, weight)
    # JSON writes a sign of UTF-8 in as many bytes, and a quotation mark in two.
    others_bytes = sum(2 * len(text.encode()) for text in others.values())
    parts = pieces(tensors, int(piece_mib * 2**20) - HEADER_BYTES, others_bytes)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"piece-{n}-of-{len(parts)}.safetensors" for n in range(1, len(parts) + 1)]
    for n, (path, part) in enumerate(zip(paths, parts, strict=True)):
        save_file(part, str(path), metadata={"format": "pt", **({} if n else others)})
    return paths


def unpack(folder: Path, out: Path) -> None:
    paths = sorted(folder.glob("piece-*-of-*.safetensors"))
    if not paths or len(paths) != int(paths[0].stem.split("-")[-1]):
        raise SystemExit(f"{folder} has {len(paths)} pieces: not all of a model, nor of one alone.")
    out.mkdir(parents=True, exist_ok=True)
    tensors: Tensors = {}
    for path in paths:
        tensors |= load_file(str(path))
        with safe_open(str(path), "pt") as file:
            for name, text in file.metadata().items():
                if name != "format":
                    (out / Path(name).name).write_text(text, encoding="utf-8", newline="\n")
    save_file(unpacked(tensors), str(out / WEIGHTS), metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--piece-mib", type=float, default=16, help="the most that a piece takes")
    parser.add_argument("--unpack", action="store_true")
    given = parser.parse_args()
    if given.unpack:
        unpack(given.folder, given.out)
        print(f"wrote {given.out}")
    else:
        for path in pack(given.folder, given.out, given.piece_mib):
            print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()

"""Folders whose weights are quantised, as other programs write them, made from a plain one, number
by number by what each format says; and beside each the same model with the numbers that its codes
say, in float32.

    AWQ (gemm)   qweight (in, out / 8), qzeros (groups, out / 8): of each 8 outputs, from the lowest
                 bits, 0 2 4 6 1 3 5 7; scales (groups, out)
    GPTQ         qweight (in / per word, out); qzeros (groups, out / per word), less 1 in its first
                 version; scales (groups, out); g_idx (in): the group of each input
    compressed-tensors
                 weight_packed (out, in / per word) of codes plus the middle; weight_scale (out,
                 groups); weight_zero_point (out / per word, groups) likewise
    FP8          weight (out, in) in E4M3; weight_scale_inv: of each block
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)
KEPT_PLAIN = (
    "norm",
    "embed",
    "lm_head",
    ".gate.weight",
    "router",
    "conv1d",
    "in_proj_a.",
    "in_proj_b.",
    "linear_attn.a_proj.",
    "linear_attn.b_proj.",
)


def words(values: np.ndarray, bits: int, order=None) -> torch.Tensor:
    """The last axis' whole numbers, a word's share of neighbours in each: int32."""
    per_word = 32 // bits
    order = range(per_word) if order is None else order
    shares = values.astype(np.int64).reshape(*values.shape[:-1], -1, per_word)
    to = np.zeros(shares.shape[:-1], np.uint32)
    for place, index in enumerate(order):
        to |= (shares[..., index] & ((1 << bits) - 1)).astype(np.uint32) << np.uint32(bits * place)
    return torch.from_numpy(to.view(np.int32).copy())


def codes_of(w: np.ndarray, index: np.ndarray, bits: int, symmetric: bool, dtype=np.float16):
    """w (out, in) of inputs in groups (in,): codes, scales and zeros (out, groups), by the range of
    each group."""
    most, count = (1 << bits) - 1, int(index.max()) + 1
    codes = np.zeros(w.shape, np.int64)
    scales, zeros = np.zeros((len(w), count), dtype), np.zeros((len(w), count), np.int64)
    for g in range(count):
        part = w[:, index == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            # Of 8 bits, -128 is left out, which the kernels do not multiply.
            scale = 2 * np.maximum(-low, high) / (most - (bits == 8))
            zero = np.full(len(w), (most + 1) // 2)
        else:
            scale = (high - low) / most
            zero = None
        scales[:, g] = np.maximum(scale, 1e-4)
        wide = scales[:, g].astype(np.float64)
        zeros[:, g] = zero if symmetric else np.clip(np.rint(-low / wide), 0, most)
        codes[:, index == g] = np.clip(
            np.rint(part / wide[:, None]) + zeros[:, g][:, None], 0, most
        )
    return codes, scales, zeros


def said(codes, scales, zeros, index) -> torch.Tensor:
    """What they mean: (out, in) float32, exactly where scales are of 16 bits."""
    wide = (codes - zeros[:, index]) * scales.astype(np.float64)[:, index]
    return torch.from_numpy(wide.astype(np.float32))


class Format:
    """One way of writing. pack(w) gives a module's tensors, by the ends of their names, and the
    matrix that they mean."""

    def __init__(self, group: int = 32, bits: int = 4, symmetric: bool = False):
        self.group, self.bits, self.symmetric = group, bits, symmetric
        self.generator = np.random.default_rng(group + bits)

    def config(self) -> dict:
        raise NotImplementedError

    def index(self, inputs: int) -> np.ndarray:
        return np.arange(inputs) // (self.group if self.group > 0 else inputs)

    def pack(self, w: np.ndarray) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        index = self.index(w.shape[1])
        found = codes_of(w, index, self.bits, self.symmetric)
        return self.tensors(*found, index), said(*found, index)


class Awq(Format):
    def config(self):
        size = self.group if self.group > 0 else -1
        of = {"bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}
        return {"quant_method": "awq", **of}

    def tensors(self, codes, scales, zeros, index):
        return {
            ".qweight": words(codes.T, 4, AWQ_OUTPUTS),
            ".qzeros": words(zeros.T, 4, AWQ_OUTPUTS),
            ".scales": torch.from_numpy(scales.T.copy()),
        }


class Gptq(Format):
    def __init__(self, *args, version: int = 1, has_order: bool = False, **more):
        super().__init__(*args, **more)
        self.version, self.has_order = version, has_order

    def config(self):
        size = self.group if self.group > 0 else -1
        of = {"bits": self.bits, "group_size": size, "sym": self.symmetric}
        layout = "gptq" if self.version == 1 else "gptq_v2"
        of |= {"desc_act": self.has_order, "checkpoint_format": layout}
        return {"quant_method": "gptq", **of}

    def index(self, inputs):
        index = super().index(inputs)
        return self.generator.permutation(index) if self.has_order else index

    def tensors(self, codes, scales, zeros, index):
        less = zeros - (self.version == 1)
        return {
            ".qweight": words(codes, self.bits).T.contiguous(),
            ".qzeros": words(less.T, self.bits),
            ".scales": torch.from_numpy(scales.T.copy()),
            ".g_idx": torch.from_numpy(index.astype(np.int32)),
        }


class Compressed(Format):
    def __init__(self, *args, has_order: bool = False, as_bytes: bool = False, **more):
        super().__init__(*args, **more)
        self.has_order, self.as_bytes = has_order, as_bytes

    def config(self):
        weights = {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric}
        weights |= {"strategy": "group" if self.group > 0 else "channel", "group_size": self.group}
        form = "int-quantized" if self.as_bytes else "pack-quantized"
        group = {"targets": ["Linear"], "weights": weights}
        return {
            "quant_method": "compressed-tensors",
            "format": form,
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        }

    def index(self, inputs):
        index = super().index(inputs)
        return self.generator.permutation(index) if self.has_order else index

    def tensors(self, codes, scales, zeros, index):
        middle = 1 << (self.bits - 1)
        if self.as_bytes:
            made = {".weight": torch.from_numpy((codes - middle).astype(np.int8))}
        else:
            made = {".weight_packed": words(codes, self.bits)}
            made[".weight_shape"] = torch.tensor(codes.shape)
        made[".weight_scale"] = torch.from_numpy(scales).bfloat16()
        if not self.symmetric:
            made[".weight_zero_point"] = words(zeros.T, self.bits).T.contiguous()
        if self.has_order:
            made[".weight_g_idx"] = torch.from_numpy(index.astype(np.int32))
        return made

    def pack(self, w):
        """Its scales are bfloat16."""
        index = self.index(w.shape[1])
        codes, scales, zeros = codes_of(w, index, self.bits, self.symmetric, np.float32)
        scales = torch.from_numpy(scales).bfloat16().float().numpy()
        return self.tensors(codes, scales, zeros, index), said(codes, scales, zeros, index)


class Fp8(Format):
    """block: rows and columns that share a scale; 0 for all of them. of_powers: scales are powers
    of two, E8M0."""

    def __init__(self, block, method: str = "fp8", of_powers: bool = False):
        super().__init__()
        self.block, self.method, self.of_powers = block, method, of_powers

    def config(self):
        if self.method == "modelopt":
            return {"quant_method": "modelopt", "quant_algo": "FP8"}
        if self.method == "fp8":
            return {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(self.block)}
        weights = {"num_bits": 8, "type": "float", "block_structure": None}
        if all(self.block) and self.block != (1, 0):
            weights["block_structure"] = list(self.block)
        group = {"targets": ["Linear"], "weights": weights}
        groups = {"config_groups": {"group_0": group}}
        return {"quant_method": "compressed-tensors", "format": "float-quantized", **groups}

    def pack(self, w):
        rows, columns = (n or of for n, of in zip(self.block, w.shape, strict=True))
        of = -(-w.shape[0] // rows), -(-w.shape[1] // columns)
        codes = torch.empty(w.shape, dtype=torch.float8_e4m3fn)
        scales, wide = torch.empty(of), torch.empty(w.shape)
        for i in range(of[0]):
            for j in range(of[1]):
                at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                part = torch.from_numpy(w[at])
                scales[i, j] = part.abs().max().clamp(min=1e-9) / 448
                if self.of_powers:
                    scales[i, j] = 2.0 ** scales[i, j].log2().ceil()
                codes[at] = (part / scales[i, j]).to(torch.float8_e4m3fn)
                wide[at] = codes[at].float() * scales[i, j]
        end = ".weight_scale_inv" if self.method == "fp8" else ".weight_scale"
        if self.block == (0, 0):
            scales = scales.view(()) if self.method == "modelopt" else scales.view(1)
        if self.of_powers:
            scales = scales.to(torch.float8_e8m0fnu)
        return {".weight": codes, end: scales}, wide


FORMATS = {
    "awq": Awq(),
    "awq, groups of 64": Awq(64),
    "awq, uneven groups": Awq(64),
    "gptq": Gptq(),
    "gptq, second version": Gptq(version=2),
    "gptq, symmetric": Gptq(symmetric=True),
    "gptq, whole rows": Gptq(0),
    "gptq, groups in another order": Gptq(has_order=True),
    "gptq, 8 bits": Gptq(bits=8, symmetric=True),
    "gptq, 8 bits with zeros": Gptq(bits=8),
    "compressed-tensors": Compressed(symmetric=True),
    "compressed-tensors, zeros": Compressed(),
    "compressed-tensors, whole rows": Compressed(0, symmetric=True),
    "compressed-tensors, groups in another order": Compressed(symmetric=True, has_order=True),
    "compressed-tensors, 8 bits": Compressed(bits=8, symmetric=True),
    "compressed-tensors, bytes": Compressed(0, bits=8, symmetric=True, as_bytes=True),
    "compressed-tensors, float8 of rows": Fp8((1, 0), "compressed-tensors"),
    "compressed-tensors, float8 of blocks": Fp8((64, 32), "compressed-tensors"),
    "compressed-tensors, float8": Fp8((0, 0), "compressed-tensors"),
    "fp8": Fp8((32, 32)),
    "fp8, uneven blocks": Fp8((64, 64)),
    "fp8, scales of powers": Fp8((32, 32), of_powers=True),
    "modelopt": Fp8((0, 0), "modelopt"),
}


def write(source: Path, name: str, folder: Path) -> tuple[Path, Path]:
    """The model of a plain folder in one of FORMATS, and with the numbers that this means."""
    form = FORMATS[name]
    tensors = load_file(source / "model.safetensors")
    packed, plain = {}, {}
    for key, w in tensors.items():
        if w.dim() != 2 or any(part in key for part in KEPT_PLAIN):
            packed[key] = plain[key] = w
            continue
        made, plain[key] = form.pack(w.numpy())
        packed |= {key.removesuffix(".weight") + end: t for end, t in made.items()}
    folders = folder / "packed", folder / "plain"
    for to, held in zip(folders, (packed, plain), strict=True):
        to.mkdir(parents=True)
        for file in source.iterdir():
            if file.name != "model.safetensors":
                (to / file.name).write_bytes(file.read_bytes())
        save_file({key: t.contiguous() for key, t in held.items()}, to / "model.safetensors")
    change(folders[0], quantization_config=form.config())
    return folders


def change(folder: Path, **fields) -> None:
    """Fields of its config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

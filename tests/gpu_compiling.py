"""Compiles the Triton kernels, as calls ask for them, to machine code of GPUs that are not there.

    python tests/gpu_compiling.py [CAPABILITY ...]

Prints one line for each kernel: what it is, its shared memory, registers that were spilled. Without
an argument for compute capability 8.0, 8.6 and 12.0. Not in Triton's interpreter: a process of its
own.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ebbtide.kernels.gpu import products, rows, spans
from ebbtide.kernels.layout import PageLayout
from ebbtide.kernels.quantised import QuantisedWeight, quantised_shapes

CAPABILITIES = (80, 86, 120)
# What a program may have of shared memory.
MOST_SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.int32: "*i32", torch.int8: "*i8", torch.uint8: "*u8",
}  # fmt: skip


class Recorded:
    """In a kernel's place: keeps what it is called with, by what it is compiled for."""

    def __init__(self, kernel):
        self.kernel, self.calls = kernel, {}

    def __getitem__(self, grid):
        return self._record

    def _record(self, *given, **named):
        signature, constants, attributes = {}, {}, {}
        options = {"num_warps": named.pop("num_warps", 4)}
        if "num_stages" in named:
            options["num_stages"] = named.pop("num_stages")
        values = dict(zip(self.kernel.arg_names, given, strict=False)) | named
        for place, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, values[parameter.name]
            is_one = isinstance(value, int) and value == 1
            if parameter.is_constexpr or (is_one and not parameter.do_not_specialize):
                signature[name], constants[name] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[name] = _POINTERS[value.dtype]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 or parameter.do_not_specialize:
                    continue
            if not isinstance(value, float):
                attributes[(place,)] = [["tt.divisibility", 16]]
        key = tuple(map(str, (signature, constants, attributes, options)))
        self.calls[key] = (signature, constants, attributes, options)


def record() -> list[Recorded]:
    """Calls every kernel as a model does: heads of 64 to 512, all codecs and weights."""
    recorded = []
    for module in (products, rows, spans):
        for name, kernel in list(vars(module).items()):
            if isinstance(kernel, triton.JITFunction) and kernel.params and _is_launched(kernel):
                recorded.append(Recorded(kernel))
                setattr(module, name, recorded[-1])
    for bits, kind in ((4, {}), (8, {}), (4, {"is_float": True}), (4, {"is_affine": True})):
        codes, scales = quantised_shapes((256, 512), bits, kind.get("is_affine", False))
        of_codes = torch.empty(codes, dtype=torch.int32)
        of_scales = torch.empty(scales, dtype=torch.float16)
        weight = QuantisedWeight(bits, 512, 256, of_codes, of_scales, **kind)
        for count in (1, 100):
            products.linear(torch.empty(count, 512), weight, torch.empty(256))
    products.linear_raw(torch.empty(1, 512), torch.empty(256, 512, dtype=torch.bfloat16), None)
    layouts = [
        PageLayout(2, 64, 64, 2, key_bits=5, value_bits=4, near_bits=2),
        PageLayout(2, 128, 64, 1, key_bits=8, value_bits=8, near_bits=2),
        PageLayout(2, 80, 64, 1, key_bits=6, value_bits=6, near_bits=3, value_means=True),
        PageLayout(2, 256, 64, 1, key_bits=8, value_bits=8, near_bits=2, near_resident=False),
        PageLayout(2, 512, 64, 1, key_bits=8, value_bits=8, near_bits=2),
        PageLayout(2, 128, 64, 1, codec="full", raw_dtype=torch.bfloat16),
        PageLayout(2, 64, 64, 1, codec="full", raw_dtype=torch.float16),
        PageLayout(2, 128, 64, 1, codec="full", raw_dtype=torch.float32),
        PageLayout(2, 512, 64, 1, codec="full", raw_dtype=torch.float32),
    ]
    at = torch.empty(8, dtype=torch.int64)
    for layout in layouts:
        for count in (4, 1024):
            q = torch.empty(2, count, layout.head_dim)
            parts = torch.empty(4, 2, count), torch.empty(4, 2, count), torch.empty(4, *q.shape)
            bias = torch.empty(2, count, 8 * layout.record_tokens) if count == 4 else None
            cap = 30.0 if layout.head_dim == 256 else 0.0
            spans.attend_spans(q, at, at, 4, (64, 500), bias, layout, cap, parts)
        runs = [1 << 40, 1 << 40, 1 << 14, 64] * 3
        one = [part[0] for part in parts]
        spans.attend_raw(q[:, :4], layout.raw_dtype, runs, None, cap, one)
        # A head of its own for each query, the text's first tokens, one record.
        spans.attend_raw(q[:, :1], layout.raw_dtype, [*runs[:3], 1], q[:, :1, 0], cap, one)
        spans.attend_spans(q[:, :1], at[:1], at[:1], 1, (1, 500), None, layout, cap, parts)
        spans.join(parts)
        spans.join(parts, is_whole=False)
    spans.join([part[:1] for part in parts])
    x = torch.empty(3, 8, 128)
    rows.rms_norm(x, torch.empty(128), 0.0, 1e-6)
    rows.rms_norm(torch.empty(1, 4096), torch.empty(4096), 1.0, 1e-6)
    rows.rms_norm(torch.empty(1, 1), torch.empty(1), 0.0, 1e-6)
    for interleaved in (False, True):
        angles = torch.empty(3, 1, 64)
        for heads in (x, x[:, :1]):
            rows.turn(heads, angles, angles, interleaved, 0.5, True)
    for activation in rows.ACTIVATIONS:
        rows.gate(torch.empty(1, 2048), torch.empty(1, 2048), activation)
    return recorded


def _is_launched(kernel) -> bool:
    """Whether a function is launched, and not called by another kernel."""
    return "program_id" in kernel.src


def spilled_bytes(cubin: bytes) -> int:
    """Local memory that a thread of the kernel takes, as the tools of CUDA that come with Triton
    say."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    return int(re.search(r"STACK:(\d+)", said.stdout).group(1))


def main() -> None:
    wanted = [int(text) for text in sys.argv[1:]] or CAPABILITIES
    for one in record():
        for signature, constants, attributes, options in one.calls.values():
            shown = {k: v for k, v in constants.items() if k in _SHOWN}
            for capability in wanted:
                source = ASTSource(one.kernel, signature, constants, attributes)
                target = GPUTarget("cuda", capability, 32)
                made = triton.compile(source, target=target, options=options)
                assert made.metadata.shared <= MOST_SHARED[capability], made.metadata.shared
                spilled = spilled_bytes(made.asm["cubin"])
                name = one.kernel.__name__
                print(capability, name, shown, made.metadata.shared, spilled, flush=True)


_SHOWN = "BITS IS_FLOAT IS_AFFINE ROWS DIM DIMS IS_FULL KIND WIDTH".split()

if __name__ == "__main__":
    main()

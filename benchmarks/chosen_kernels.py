"""The options by which benchmarks of kernels choose what they measure."""

from __future__ import annotations

import argparse
import os

import torch

from ebbtide.kernels import dispatch


def add_options(parser: argparse.ArgumentParser) -> None:
    """--threads and --isa."""
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", default="", help="instruction set, or reference")


def choose(options: argparse.Namespace) -> str:
    """Puts the options into force, prints and returns which kernels serve."""
    torch.set_num_threads(options.threads)
    if options.isa == "reference":
        os.environ["EBBTIDE_KERNELS"] = "reference"
    elif options.isa:
        os.environ["EBBTIDE_KERNELS"] = "compiled"
        dispatch.compiled_for().use_instruction_set(options.isa)
    kernels = dispatch.backend()
    if kernels == "compiled":
        kernels += f" ({dispatch.instruction_set()})"
    print(f"kernels: {kernels}, {options.threads} threads")
    return kernels

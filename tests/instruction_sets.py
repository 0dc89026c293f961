"""The compiled kernels' instruction sets that this machine has, for the fixture `kernels`."""

from __future__ import annotations

from ebbtide.kernels import dispatch

# Where there are none, tests that ask for them are skipped and say why.
COMPILED = dispatch._cpu.instruction_sets() if dispatch._cpu else ["portable"]

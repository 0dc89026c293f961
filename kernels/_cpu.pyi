"""What cpu/module.cpp offers. Tensors are passed as addresses that the caller has checked."""

from collections.abc import Callable

import numpy as np

INTERFACE: int

def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def unpack(
    near: int,
    records: int,
    layout: list[int],
    num_records: int,
    out_k: int,
    k_stride: int,
    out_v: int,
    v_stride: int,
    threads: int,
) -> None: ...
def seal(
    k: int, v: int, layout: list[int], num_records: int, near: int, records: int, threads: int
) -> bool: ...
def multiply(
    kind: int,
    weight: int,
    scales: int,
    first: int,
    num_inputs: int,
    num_outputs: int,
    x: int,
    x_stride: int,
    num_rows: int,
    out: int,
    out_stride: int,
    threads: int,
) -> None: ...
def quantise_rows(x: int, num_inputs: int, stride: int, to: int, num_rows: int) -> None: ...
def row_bytes(num_inputs: int) -> int: ...
def attend(
    q: int,
    num_rows: int,
    near: int,
    records: int,
    layout: list[int],
    num_records: int,
    visible_from: int,
    visible_to: int,
    bias: int,
    max: int,
    sum: int,
    out: int,
    threads: int,
) -> None: ...

class LayerStep:
    """numbers: in the order of step.py."""

    def __init__(
        self, numbers: list[int], eps: float, norm_offset: float, residual_multiplier: float
    ) -> None: ...
    def project(
        self, x: int, cosines: int, sines: int, scale: float, q: int, k: int, v: int, threads: int
    ) -> None: ...
    def project_into(
        self,
        x: int,
        cosines: int,
        sines: int,
        scale: float,
        q: int,
        places: list[int],
        kind: int,
        threads: int,
    ) -> None: ...
    def add_attention(self, x: int, attended: int, out: int, threads: int) -> None: ...
    def add_mlp(self, x: int, out: int, threads: int) -> None: ...
    def mix(self, x: int, attended: int, out: int, threads: int) -> None: ...

class BlockProduct:
    """numbers: of each block, in the order of step.py; norm: an address, or 0."""

    def __init__(self, numbers: list[int], norm: int, offset: float, eps: float) -> None: ...
    def run(self, x: int, out: int, threads: int) -> None: ...

class TokenStep:
    """numbers: in the order of token_step.py."""

    def __init__(
        self,
        steps: list[LayerStep],
        numbers: list[int],
        amplitudes: list[float],
        layout: list[int],
        raw_kind: int,
        records_per_span: int,
        softcap: float,
    ) -> None: ...
    def run(
        self, x: int, scale: float, numbers: list[int], tables: int, out: int, threads: int
    ) -> None: ...

def rms_norm(
    x: int, weight: int, offset: float, eps: float, n: int, rows: int, out: int
) -> None: ...
def crcs_of(records: int, num_records: int, record_bytes: int, out: int) -> None: ...

class Reads:
    """Tags, frames, counts and places are int64 arrays; see ../offload/reads.py."""

    def __init__(
        self,
        fd: int,
        drops_cache: bool,
        frame_bytes: int,
        crcs: int,
        num_tags: int,
        states: int,
        num_threads: int,
        most_bytes: int,
        most_at_once: int = 0,
        read_into: Callable[[int, int, int], bool] | None = None,
        keep: object = None,
    ) -> None: ...
    def submit(
        self,
        tags: np.ndarray,
        frames: np.ndarray,
        counts: np.ndarray,
        places: np.ndarray,
        urgency: int,
    ) -> None: ...
    def promote(self, tags: np.ndarray) -> None: ...
    def expect(self, tags: np.ndarray) -> None: ...
    def cancel(self, tags: np.ndarray) -> None: ...
    def happened(self) -> int: ...
    def kick(self) -> None: ...
    def wait(self, seen: int, seconds: float) -> bool: ...
    def failure(self) -> tuple[int, int, int, int]: ...
    def counts(self) -> tuple[int, int, float]: ...
    def close(self, seconds: float) -> bool: ...

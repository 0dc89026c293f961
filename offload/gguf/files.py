"""A model in a GGUF file: what model_files.py asks of one. Nothing but headers is read here, and
the few numbers by which RoPE's frequencies are divided.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from ..errors import BadCheckpoint
from ..models.checkpoint import Checkpoint, TensorRef
from ..models.fingerprint import files_digest
from ..models.model_config import ModelConfig
from ..sessions.generation import GenerationConfig
from ..text.tokenizer_files import TokenizerFiles
from ..weights.packing import Plain
from .config import read_gguf_config
from .file import GgufHeader, read_header
from .names import open_gguf
from .tokenizer import end_ids, read_gguf_tokenizer, tokens_digest

_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
_MOST_FACTORS = 4096


class GgufFiles:
    """See ModelFiles."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def header(self) -> GgufHeader:
        return read_header(self.path)

    def config(self) -> ModelConfig:
        return read_gguf_config(self.header, self._factors())

    def checkpoint(self, config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> Checkpoint:
        return open_gguf(self.header, config, shapes)

    def texts(self) -> list[Path]:
        return []  # the weights' header says it

    def generation(self) -> GenerationConfig:
        return GenerationConfig(eos_token_ids=tuple(end_ids(self.header)))

    def tokenizer(self) -> TokenizerFiles:
        return read_gguf_tokenizer(self.header, self.path.name)

    def fingerprint(self) -> str:
        return files_digest(list(self.header.known)).hex()

    def tokens_fingerprint(self) -> str:
        return tokens_digest(self.header)

    def _factors(self) -> dict[str, list[float]]:
        """Of RoPE's frequencies, by the names of the tensors that hold them."""
        refs = {}
        for name in _FACTORS:
            found = self.header.tensors.get(name)
            if found is None:
                continue
            if found.kind != "F32" or len(found.shape) != 1 or found.shape[0] > _MOST_FACTORS:
                raise BadCheckpoint(f"{found.path}: {name} is not a list of numbers in F32.")
            packing = Plain(torch.float32)
            refs[name] = TensorRef(found.path, found.offset, found.num_bytes, packing, found.shape)
        shapes = {name: ref.shape for name, ref in refs.items()}
        known = {ref.path: self.header.known[ref.path] for ref in refs.values()}
        checkpoint = Checkpoint(refs, shapes, known, self.path)
        try:
            return {name: checkpoint.read(name).tolist() for name in refs}
        finally:
            checkpoint.close()

"""A model's files, whatever their format: its configuration, its tensors, its tokenizer, and what
tells it from others.

    FolderFiles   a folder in Hugging Face's layout
    GgufFiles     a GGUF file, in gguf/files.py

Opening reads headers and small files; no weights.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ..sessions.generation import GenerationConfig
from ..sessions.session_file import tokenizer_fingerprint
from ..text.tokenizer_files import TokenizerFiles, read_tokenizer_files
from .checkpoint import Checkpoint
from .fingerprint import model_fingerprint, text_files
from .model_config import ModelConfig, read_model_config
from .safetensors_files import has_own_head, open_folder

Shapes = dict[str, tuple[int, ...]]


class ModelFiles(Protocol):
    """path: the folder or file. Methods raise BadCheckpoint and UnsupportedModel."""

    path: Path

    def config(self) -> ModelConfig: ...

    def checkpoint(self, config: ModelConfig, shapes: Shapes) -> Checkpoint:
        """The tensors that are needed, of these shapes."""
        ...

    def texts(self) -> list[Path]:
        """Small files beside the weights, which say what the model is."""
        ...

    def generation(self) -> GenerationConfig:
        """The model's own settings of answers."""
        ...

    def tokenizer(self) -> TokenizerFiles: ...

    def fingerprint(self) -> str:
        """Equal for the same model; another one has another."""
        ...

    def tokens_fingerprint(self) -> str:
        """Two models with the same one spell the same tokens."""
        ...


class FolderFiles:
    """A folder in Hugging Face's layout."""

    def __init__(self, folder: Path):
        self.path = folder

    def config(self) -> ModelConfig:
        """Of the head the files are believed: one of its own that stands there is used, as
        transformers 5 does. Models whose head was trained apart go on saying that it is tied, and
        of a text part config.json says it in two places, and in either by defaults."""
        config = read_model_config(self.path)
        if config.tied_embeddings and has_own_head(self.path, config.renamed):
            return replace(config, tied_embeddings=False)
        return config

    def checkpoint(self, config: ModelConfig, shapes: Shapes) -> Checkpoint:
        how = config.renamed, config.stacked, config.quantisation, config.head_rows, config.joined
        weight = 1.0 - config.norm_offset
        return open_folder(self.path, shapes, *how, [(part, weight) for part in config.unit_norms])

    def texts(self) -> list[Path]:
        return text_files(self.path)

    def generation(self) -> GenerationConfig:
        return GenerationConfig.from_model_folder(self.path)

    def tokenizer(self) -> TokenizerFiles:
        return read_tokenizer_files(self.path)

    def fingerprint(self) -> str:
        return model_fingerprint(self.path)

    def tokens_fingerprint(self) -> str:
        return tokenizer_fingerprint(self.path)


def open_model_files(path: Path) -> ModelFiles:
    """The files of a model at a folder, or at a GGUF file."""
    if path.is_file():
        from ..gguf.files import GgufFiles

        return GgufFiles(path)
    return FolderFiles(path)

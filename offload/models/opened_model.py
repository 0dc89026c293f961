"""A model as its files described it when they were looked at: what everything else is made from.

Headers and small files are read; no weights. Files may change while a model is open, in place or
for others of their names: `is_replaced` says so, and whoever wants the new ones opens them anew.
Knows no budget and no request.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import BadCheckpoint
from ..options import Options, choose_weight_bits
from ..pages.geometry import Geometry, choose_geometry
from ..planning.footprint import Facts
from ..sessions.generation import GenerationConfig
from ..weights.skeleton import expected_shapes
from .checkpoint import Checkpoint
from .known_file import KnownFile, changed_error
from .model_config import ModelConfig
from .model_files import ModelFiles, open_model_files


@dataclass(frozen=True)
class OpenedModel:
    """texts: the small files that say what the model is, as they were."""

    files: ModelFiles
    config: ModelConfig
    checkpoint: Checkpoint
    facts: Facts
    geometry: Geometry
    generation: GenerationConfig
    texts: tuple[KnownFile, ...]

    def is_replaced(self) -> bool:
        """Whether some file has other bytes by now, or its name belongs to another file. One that
        was touched, or came again as a copy, is the same."""
        return self.checkpoint.is_replaced() or self._changed_text() is not None

    def check_texts(self) -> None:
        """After something was read of them later: raises BadCheckpoint where that may be another
        model's."""
        if (changed := self._changed_text()) is not None:
            raise changed_error(changed)

    def _changed_text(self) -> Path | None:
        """One that holds something else by now, or that was not there."""
        try:
            there = self.files.texts()
        except BadCheckpoint:  # nothing is; what is open goes on
            there = []
        known = {text.path for text in self.texts}
        changed = (text.path for text in self.texts if text.is_replaced())
        return next((path for path in there if path not in known), None) or next(changed, None)


def open_model(
    path: Path, name: str, options: Options, geometry: Geometry | None = None
) -> OpenedModel:
    """The model at a folder or GGUF file. name: for messages. geometry: in place of the one that
    suits the model. Raises BadCheckpoint and UnsupportedModel."""
    files = open_model_files(path)
    texts = tuple(map(KnownFile, files.texts()))
    for text in texts:
        text.remember([(0, text.size)])
    config = files.config()
    if options.dtype != "auto":
        config = replace(config, dtype=options.dtype)
    shapes = expected_shapes(config)
    checkpoint = files.checkpoint(config, shapes)
    packings = {name: ref.packing for name, ref in checkpoint.refs.items()}
    bits = choose_weight_bits(options.weight_bits, shapes, packings.values())
    return OpenedModel(
        files,
        config,
        checkpoint,
        Facts(name, config, shapes, bits, packings),
        geometry or choose_geometry(config, options.kv_bits, selects=options.mode != "exact"),
        files.generation(),
        texts,
    )

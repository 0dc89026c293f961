"""What one architecture is to the tables of families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..models.config_fields import Fields


@dataclass(frozen=True)
class Family:
    """One architecture.

    title: what people call it; features: what sets it apart, for docs/models.md. fields(get,
    head_dim): ModelConfig fields, `ropes` always among them. defaults: what config.json means where
    it leaves a field out. text_config: whether the text model is a part of the configuration.
    quantised: the quant_method of files that can be read as they are. names: fields that its files
    call otherwise, their names to the usual ones.
    """

    title: str
    features: str
    fields: Callable[[Fields, int], dict]
    defaults: dict = field(default_factory=dict)
    text_config: bool = False
    quantised: str | None = None
    names: dict[str, str] = field(default_factory=dict)

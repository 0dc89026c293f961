"""Selector: every record. What exact mode attends to, and what others are compared with."""

from __future__ import annotations

import torch

from .evidence import Evidence


class Everything:
    def select(self, evidence: Evidence) -> torch.Tensor:
        return evidence.present().nonzero().flatten()

"""What the tests of sessions share: a small model in little memory, and token ids."""

from __future__ import annotations

import pytest
import torch
from small_llm import open_small

from ebbtide.offload.planning import planner

EOS = 257  # the tokenizer's, and what config.json says
IDS = torch.randint(0, 256, (600,), generator=torch.Generator().manual_seed(2)).tolist()
LONG = IDS[:400]  # several sealed cells


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("llama2")


@pytest.fixture
def llm(folder, tmp_path):
    with open_small(folder, tmp_path) as opened:
        opened._context = 2048
        yield opened


@pytest.fixture
def few_pages(monkeypatch) -> None:
    """Guesses are made by few pages, though what that takes is a large part of texts this short."""
    monkeypatch.setattr(planner, "_MOST_MOVED_OUT", 2)


def assert_nothing_is_held(llm):
    assert not llm.sessions

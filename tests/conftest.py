"""Settings that hold for every test: one torch thread, no hub, firm hypothesis runs."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

# Triton's kernels run in its interpreter where there is no GPU; it is asked when they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings
from instruction_sets import COMPILED
from random_checkpoints import checkpoint  # noqa: F401 - a fixture
from scripted_harmony import (  # noqa: F401 - fixtures
    script,
    scripted,
    scripted_folder,
    scripted_llm,
    scripted_tokenizer,
)
from sessions_under_test import few_pages, folder, llm  # noqa: F401 - fixtures
from tokenizers_under_test import chatml, llama, real, real_folder, small  # noqa: F401 - fixtures

# Workers share the cores; several threads each would be slower, and the sums of a test's oracle
# would depend on the machine.
torch.set_num_threads(1)

# A loaded machine must not fail a test by its clock; CI must not fail by luck.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(params=["reference", *COMPILED])
def kernels(request, monkeypatch) -> str:
    """Every implementation of the kernels: the torch reference, and each instruction set."""
    from ebbtide.kernels import dispatch

    if request.param == "reference":
        monkeypatch.setenv("EBBTIDE_KERNELS", "reference")
        yield request.param
        return
    monkeypatch.setenv("EBBTIDE_KERNELS", "auto")
    if dispatch.backend() != "compiled":
        pytest.skip(f"no compiled kernels here: {dispatch._missing}")
    usual = dispatch.instruction_set()
    dispatch._cpu.use_instruction_set(request.param)
    yield request.param
    dispatch._cpu.use_instruction_set(usual)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """No settings of the machine's user: the file that is looked for."""
    from ebbtide.cli import config, options, settings_file

    for name in options.BY_NAME.values():
        monkeypatch.delenv(name.envvar, raising=False)
    for module in (settings_file, config):
        monkeypatch.setattr(module, "settings_path", lambda: tmp_path / "config.toml")
    return tmp_path / "config.toml"

"""Which kernels serve, and that an installation from source has them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from ebbtide import LLM
from ebbtide.kernels import dispatch


def test_the_extension_was_built():
    """Pure Python serves where there is no compiler; here it would hide a broken build."""
    if os.environ.get("CI") != "true" and dispatch._cpu is None:
        pytest.skip(f"no compiled kernels here: {dispatch._missing}")
    assert dispatch._cpu is not None, dispatch._missing
    assert dispatch.backend() == "compiled"
    known = ("amx", "avx512vnni", "avx512", "avxvnni", "avx2", "neon_dot", "neon", "portable")
    assert dispatch.instruction_set() == dispatch._cpu.instruction_sets()[0]
    assert set(dispatch._cpu.instruction_sets()) <= set(known)


def test_the_reference_can_be_forced(monkeypatch):
    monkeypatch.setenv("EBBTIDE_KERNELS", "reference")
    assert dispatch.backend() == "reference"
    assert dispatch.compiled_for(torch.zeros(1)) is None


def test_where_the_extension_is_missing(monkeypatch):
    monkeypatch.setattr(dispatch, "_cpu", None)
    monkeypatch.setattr(dispatch, "_missing", "no such file")
    monkeypatch.setenv("EBBTIDE_KERNELS", "auto")
    assert dispatch.backend() == "reference"
    assert dispatch.instruction_set() == ""
    monkeypatch.setenv("EBBTIDE_KERNELS", "compiled")
    with pytest.raises(dispatch.KernelsUnavailable, match=r"cannot be used: no such file"):
        dispatch.backend()


def test_that_the_reference_serves_in_place_of_the_extension_is_said(monkeypatch):
    """Once, where nobody chose it: many times slower is no detail."""
    monkeypatch.setattr(dispatch, "_cpu", None)
    monkeypatch.setattr(dispatch, "_missing", "no such file")
    monkeypatch.setenv("EBBTIDE_KERNELS", "auto")
    with LLM.open() as llm:
        (warning,) = [text for text in llm.warnings if "slower: no such file. Install" in text]
    assert warning == dispatch.cpu_kernel_fault()
    monkeypatch.setenv("EBBTIDE_KERNELS", "reference")
    assert dispatch.cpu_kernel_fault() == ""
    with LLM.open() as llm:
        assert not any("slower" in text for text in llm.warnings)


def test_other_devices_are_the_references(monkeypatch):
    monkeypatch.setenv("EBBTIDE_KERNELS", "auto")
    assert dispatch.compiled_for(torch.zeros(1), torch.zeros(1, device="meta")) is None


def test_kernels_for_gpus_serve_no_tensors_of_the_cpu(monkeypatch):
    for choice in ("auto", "reference", "compiled"):
        monkeypatch.setenv("EBBTIDE_KERNELS", choice)
        assert dispatch.gpu_for(torch.zeros(1)) is None
        assert dispatch.gpu_for(torch.zeros(1, device="meta")) is None
    monkeypatch.setattr(dispatch, "_is_interpreted", lambda: False)
    monkeypatch.setenv("EBBTIDE_KERNELS", "triton")
    with pytest.raises(dispatch.KernelsUnavailable, match="for tests in Triton's interpreter"):
        dispatch.gpu_for(torch.zeros(1))


def test_an_unknown_choice_lists_the_known_ones(monkeypatch):
    monkeypatch.setenv("EBBTIDE_KERNELS", "fast")
    with pytest.raises(ValueError, match="known are auto, reference, compiled"):
        dispatch.backend()


def test_an_empty_choice_is_auto(monkeypatch):
    monkeypatch.setenv("EBBTIDE_KERNELS", "")
    assert dispatch.backend() in ("compiled", "reference")


@pytest.mark.skipif(dispatch._cpu is None, reason="no compiled kernels here")
@pytest.mark.parametrize(
    ("name", "expected"),
    [("portable", "portable compiled"), ("sse9", " reference"), ("", None)],
)
def test_an_instruction_set_is_chosen_by_name(name, expected):
    """One that this machine lacks leaves the reference, and `compiled` says why."""
    code = """
from ebbtide.kernels import dispatch
print(dispatch.instruction_set(), dispatch.backend(), dispatch.cpu_kernel_fault(), sep="|")
"""
    given = {**os.environ, "EBBTIDE_INSTRUCTION_SET": name, "EBBTIDE_KERNELS": "auto"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True
    )
    chosen, backend, why = run.stdout.strip("\n").split("|")
    best = dispatch._cpu.instruction_sets()[0]
    assert f"{chosen} {backend}" == (expected or f"{best} compiled")
    assert (f"sse9; it has {best}" in why and "Name one" in why) == (name == "sse9")
    assert bool(why) == (name == "sse9")

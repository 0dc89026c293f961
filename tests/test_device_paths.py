"""The paths that a GPU takes: copies to the compute device, and parity where there is one."""

from __future__ import annotations

import pytest
import torch
from small_llm import hold, keep_in_memory, open_small, small_geometry

from ebbtide import LLM, Budget
from ebbtide.offload.options import Options
from ebbtide.offload.planning.plan import Loaded

IDS = torch.randint(0, 256, (1000,), generator=torch.Generator().manual_seed(6)).tolist()
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


def run(folder, tmp_path, share, codec="8", **store):
    with open_small(folder, tmp_path, codec, store=store) as llm:
        keep_in_memory(llm, len(IDS), share)
        return llm.logits(IDS, prefill_tokens=940), llm.last_stats


@pytest.mark.parametrize("codec", ["full", "8"])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_records_that_are_copied_to_the_device_give_the_same_bits(
    checkpoint, tmp_path, share, codec
):
    """A foreign device, simulated: every record is copied before it is computed on."""
    folder = checkpoint("qwen2")
    plain, _ = run(folder, tmp_path, share, codec)
    copied, stats = run(folder, tmp_path, share, codec, copy_to_compute=True)
    assert torch.equal(copied, plain)
    assert (stats.bytes_read["disk"] > 0) == (share < 1)


@needs_cuda
@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("streamed", [(0, True), (2, False)], ids=["resident", "streamed"])
def test_cuda_gives_the_logits_of_the_cpu(checkpoint, tmp_path, name, streamed):
    """float32 sums in another order, through three layers and 8-bit pages: a code that rounds to
    its neighbour moves a logit by about 1e-3 of the largest.
    """
    folder = checkpoint(name)
    results = []
    for device in ("cpu", "cuda"):
        options = Options(
            model=folder,
            device=device,
            budget=Budget(device_memory="2GiB", host_memory="8GiB", disk_memory="1GiB"),
            spill_dir=tmp_path,
        )
        with LLM(options, geometry=small_geometry(folder)) as llm:
            hold(llm, Loaded(*streamed))
            results.append(llm.logits(IDS, prefill_tokens=940))
    expected, got = results
    assert (got - expected).abs().max() <= 5e-3 * expected.abs().max()


@needs_cuda
def test_tiers_do_not_matter_on_cuda(checkpoint, tmp_path):
    folder = checkpoint("qwen2")
    results = []
    for device_memory in ("2GiB", "80MiB"):
        options = Options(
            model=folder,
            device="cuda",
            budget=Budget(device_memory=device_memory, host_memory="8GiB", disk_memory="1GiB"),
            spill_dir=tmp_path,
        )
        with LLM(options, geometry=small_geometry(folder)) as llm:
            results.append(llm.logits(IDS, prefill_tokens=940))
    assert torch.equal(*results)

"""Logits equal transformers' for every family: cell by cell, token by token, in any layout."""

from __future__ import annotations

import pytest
import torch
from random_checkpoints import FAMILIES, reference_logits
from small_llm import TINY, open_small

NUM_TOKENS = 300
IDS = torch.randint(0, 256, (NUM_TOKENS,), generator=torch.Generator().manual_seed(4)).tolist()


def tolerance(logits: torch.Tensor) -> float:
    """Two float32 programs that sum in another order differ by rounding alone."""
    return 2e-4 * max(1.0, logits.abs().max().item())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("prefill_tokens", [NUM_TOKENS, 130], ids=["cells", "decode"])
def test_full_pages_give_the_logits_of_transformers(checkpoint, tmp_path, name, prefill_tokens):
    folder = checkpoint(name)
    expected = reference_logits(folder, IDS)
    with open_small(folder, tmp_path, "full") as llm:
        got = llm.logits(IDS, prefill_tokens=prefill_tokens)
    assert (got - expected).abs().max() <= tolerance(expected)


@pytest.mark.parametrize("name", ["mistral", "qwen2-window"])
@pytest.mark.parametrize("prefill_tokens", [NUM_TOKENS, 130], ids=["cells", "decode"])
def test_windows_reach_into_sealed_pages(checkpoint, tmp_path, name, prefill_tokens):
    folder = checkpoint(name)
    expected = reference_logits(folder, IDS)
    with open_small(folder, tmp_path, "full", **TINY) as llm:
        got = llm.logits(IDS, prefill_tokens=prefill_tokens)
    assert (got - expected).abs().max() <= tolerance(expected)


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3"])
def test_the_other_config_layout_and_shards_load_alike(checkpoint, tmp_path, name):
    hub, new = checkpoint(name), checkpoint(name, layout="transformers5", sharded=True)
    with open_small(hub, tmp_path, "full") as llm:
        one = llm.logits(IDS[:100])
    with open_small(new, tmp_path, "full") as llm:
        assert torch.equal(llm.logits(IDS[:100]), one)


@pytest.mark.parametrize("name", ["llama3", "qwen2-key-biases", "qwen3", "mistral"])
@pytest.mark.parametrize("rotate", [False, True])
def test_8_bit_pages_stay_near_the_full_run(checkpoint, tmp_path, name, rotate):
    """8 bits of a peaked random model cost little: a mean KL of 1e-3 is 20 times what they do, and
    a tenth of what forgetting the key bias or the rotation of queries does."""
    folder = checkpoint(name)
    with open_small(folder, tmp_path, "full") as llm:
        full = llm.logits(IDS).log_softmax(-1)
    with open_small(folder, tmp_path, "8", rotate=rotate, **TINY) as llm:
        coarse = llm.logits(IDS).log_softmax(-1)
    kl = (full.exp() * (full - coarse)).sum(-1)
    assert kl.mean() < 1e-3
    assert kl.max() > 0  # pages were sealed: the runs are not the same one


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_are_the_reference_of_their_own_dequantisation(
    checkpoint, tmp_path, bits
):
    """A model of group-quantised weights is the model whose weights are the dequantised ones."""
    from safetensors.torch import load_file, save_file

    from ebbtide.kernels.matmul import quantise_weight

    folder = checkpoint("llama2")
    tensors = load_file(folder / "model.safetensors")
    for key, tensor in tensors.items():
        if "proj" in key:
            tensors[key] = quantise_weight(tensor, bits).rows(0, tensor.shape[0]).contiguous()
        if key == "lm_head.weight":
            tensors[key] = quantise_weight(tensor, 8).rows(0, tensor.shape[0]).contiguous()
    other = tmp_path / "dequantised"
    other.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (other / file.name).write_bytes(file.read_bytes())
    save_file(tensors, other / "model.safetensors")
    with open_small(folder, tmp_path, "full", weight_bits=str(bits)) as llm:
        got = llm.logits(IDS[:150], prefill_tokens=100)
    expected = reference_logits(other, IDS[:150])
    assert (got - expected).abs().max() <= tolerance(expected)

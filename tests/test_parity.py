"""Logits equal transformers' cell by cell, token by token, in any layout and from any file. Every
entry of the matrix is compared in test_families.py; here stand the longer texts and the odd files.
"""

from __future__ import annotations

import json

import pytest
import torch
from random_checkpoints import reference_logits
from small_llm import TINY, open_small

NUM_TOKENS = 300
IDS = torch.randint(0, 256, (NUM_TOKENS,), generator=torch.Generator().manual_seed(4)).tolist()


def tolerance(logits: torch.Tensor) -> float:
    """Two float32 programs that sum in another order differ by rounding alone."""
    return 2e-4 * max(1.0, logits.abs().max().item())


@pytest.mark.parametrize("name", ["llama3", "qwen2", "gemma3", "qwen3-moe"])
@pytest.mark.parametrize("prefill_tokens", [NUM_TOKENS, 130], ids=["cells", "decode"])
def test_full_pages_give_the_logits_of_transformers(checkpoint, tmp_path, name, prefill_tokens):
    folder = checkpoint(name)
    expected = reference_logits(folder, IDS)
    with open_small(folder, tmp_path, "full") as llm:
        got = llm.logits(IDS, prefill_tokens=prefill_tokens)
    assert (got - expected).abs().max() <= tolerance(expected)


@pytest.mark.parametrize(
    "name", ["llama3", "qwen3", "gemma3", "gemma4", "gemma4-moe", "mixtral", "phi3-longrope-long"]
)
def test_the_other_config_layout_and_shards_load_alike(checkpoint, tmp_path, name):
    hub, new = checkpoint(name), checkpoint(name, layout="transformers5", sharded=True)
    with open_small(hub, tmp_path, "full") as llm:
        one = llm.logits(IDS[:100])
    with open_small(new, tmp_path, "full") as llm:
        assert torch.equal(llm.logits(IDS[:100]), one)


@pytest.mark.parametrize(
    "name", ["llama3", "qwen2-key-biases", "qwen3", "mistral", "glm", "smollm3-yarn", "gemma2"]
)
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
    checkpoint, tmp_path, bits, monkeypatch
):
    """A model of group-quantised weights is the model whose weights are the dequantised ones, but
    for the rounding of activations, which is taken out here: a random model magnifies it.
    """
    from safetensors.torch import load_file, save_file

    from ebbtide.kernels import matmul
    from ebbtide.kernels.quantised import quantise_weight

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
    monkeypatch.setenv("EBBTIDE_KERNELS", "reference")
    monkeypatch.setattr(matmul, "rounded_rows", lambda x: x)
    with open_small(folder, tmp_path, "full", weight_bits=str(bits)) as llm:
        got = llm.logits(IDS[:150], prefill_tokens=100)
    expected = reference_logits(other, IDS[:150])
    assert (got - expected).abs().max() <= tolerance(expected)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("gemma3", "Gemma3ForConditionalGeneration"),
        ("gemma3n", "Gemma3nForConditionalGeneration"),
        ("gemma4", "Gemma4ForConditionalGeneration"),
        ("gemma4-unified", "Gemma4UnifiedForConditionalGeneration"),
        ("qwen3.5", "Qwen3_5ForConditionalGeneration"),
        ("qwen3.5-moe", "Qwen3_5MoeForConditionalGeneration"),
        ("llama4-moe", "Llama4ForConditionalGeneration"),
        ("mistral4-moe", "Mistral3ForConditionalGeneration"),
    ],
)
def test_the_text_part_of_a_larger_model_is_the_model_itself(
    checkpoint, tmp_path, name, architecture, prefix
):
    """Both ways in which files name it, beside tensors of other parts."""
    from safetensors.torch import load_file, save_file

    folder, whole = checkpoint(name, layout="transformers5"), tmp_path / "whole"
    whole.mkdir()
    tensors = load_file(folder / "model.safetensors")
    named = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
    named["vision_tower.patches.weight"] = torch.ones(3, 3, dtype=torch.float64)
    named["mtp.layers.0.self_attn.q_proj.weight"] = torch.ones(3, 3)
    save_file(named, whole / "model.safetensors")
    text = json.loads((folder / "config.json").read_text())
    outer = {"architectures": [architecture], "dtype": text.pop("dtype")}
    if name.startswith("qwen"):  # positions of images and texts are one in a text
        text["rope_parameters"] |= {"mrope_section": [1, 1, 0], "mrope_interleaved": True}
    (whole / "config.json").write_text(json.dumps({**outer, "text_config": text}))
    with open_small(folder, tmp_path, "full") as llm:
        expected = llm.logits(IDS[:100])
    with open_small(whole, tmp_path, "full") as llm:
        assert torch.equal(llm.logits(IDS[:100]), expected)


def test_longrope_is_fixed_by_options_and_request_and_never_by_a_budget(checkpoint, tmp_path):
    """The original length of this model is 128: from 129 tokens on the long factors hold."""
    folder = checkpoint("phi3-longrope-long")

    def factors(llm, **request) -> bool:
        with llm.open_session(100, sequences=1, **request) as session:
            rope = session._runtime.engine.config.ropes[0]
        return rope.parameters["factors"][-1] == 40.0

    with open_small(folder, tmp_path) as llm:
        assert not factors(llm) and factors(llm, reach=129)
        with llm.stream([1, 2, 3], max_new_tokens=5) as short, llm.stream([1, 2, 3]) as long:
            kinds = [s._session._runtime.engine.config.ropes[0] for s in (short, long)]
        assert [rope.parameters["factors"][-1] for rope in kinds] == [2.0, 40.0]
        with llm.session() as session:
            assert session._runtime.engine.config.ropes[0] == kinds[1]
    expected = reference_logits(folder, IDS[:100])
    with open_small(folder, tmp_path, "full") as llm:
        assert (llm.logits(IDS[:100]) - expected).abs().max() <= tolerance(expected)
        llm._context = 300
        assert (llm.logits(IDS[:100]) - expected).abs().max() > 0.1

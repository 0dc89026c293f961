"""A model in a GGUF file is the model of the folder that it was made from: the same logits to the
bit for numbers that the file holds as they are.
"""

from __future__ import annotations

import json
import shutil

import gguf
import gguf_writer
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_writer import rewritten, write
from safetensors.torch import load_file, save_file
from small_llm import TINY, hold, hold_few_experts, open_small
from variants import rope

from ebbtide.kernels.quantised import QuantisedWeight
from ebbtide.offload.models.checkpoint import Checkpoint
from ebbtide.offload.models.model_config import read_model_config
from ebbtide.offload.models.model_files import open_model_files
from ebbtide.offload.planning.plan import Loaded

IDS = torch.randint(0, 256, (150,), generator=torch.Generator().manual_seed(5)).tolist()
# A file has one scale of yarn's.
_YARN = rope(
    rope_type="yarn",
    factor=4.0,
    original_max_position_embeddings=64,
    mscale=1.0,
    mscale_all_dim=1.0,
)
# What files of Llama 4 do not say.
_LLAMA4 = {
    "no_rope_layers": None,
    "attention_chunk_size": 8192,
    "floor_scale": 8192,
    "attn_scale": 0.1,
}
# Variants of model_matrix.py, with what a GGUF file cannot say made ordinary.
VARIANTS = {
    **{
        name: {}
        for name in (
            *("llama2", "llama-linear", "llama-biases", "llama-head80", "mistral", "ministral3"),
            *("mixtral", "qwen2", "qwen2-yarn", "qwen3", "qwen3-moe", "phi3", "phi3-window"),
            *("phi3-longrope-long", "phi3-longrope-short", "gemma3", "gemma3n", "gemma4"),
            *("gemma4-keys-are-values", "gemma4-moe", "olmo2", "olmo3", "olmoe", "granite", "glm4"),
            *("exaone4", "gpt-oss", "seed-oss", "qwen3-next", "qwen3.5", "qwen3.5-shared-keys"),
            *("qwen3.5-moe", "lfm2", "lfm2-moe", "granite4-h", "granite4-h-moe", "granite-moe"),
            *("granite-moe-shared", "nemotron-h", "nemotron-h-moe", "nemotron-h-moe-latent"),
            *("ernie4.5", "ernie4.5-moe", "hunyuan-moe", "arcee", "starcoder2", "nemotron"),
            *("nemotron-biases", "stablelm", "stablelm-parallel", "phi", "glm4-moe", "cohere"),
            *("cohere-qk-norm", "jamba", "jamba-moe", "kimi-linear-moe", "ling3-moe"),
            *("llama-head100", "stablelm-qk-norm", "olmo"),
            *("glm4-moe-groups", "deepseek-v2-moe", "deepseek-v2-moe-groups", "glm4-moe-lite"),
        )
    },
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "smollm3": {"num_hidden_layers": 5, "no_rope_layers": None, "no_rope_layer_interval": 4},
    "cohere2": {"tie_word_embeddings": True},
    "deepseek-v3-moe": {"rope_parameters": _YARN},
    "jais2": {},
    "olmo-clip": {"attention_bias": False},
    "llama4-moe": {**_LLAMA4, "num_local_experts": 16, "rope_parameters": rope(5e5)},
    "llama4-moe-plain": {
        **_LLAMA4,
        "num_local_experts": 128,
        "attn_temperature_tuning": True,
        "attention_bias": False,
        "no_rope_layer_interval": 4,
    },
    "qwen2-moe": {"use_sliding_window": False},
    "dots1-moe": {"max_window_layers": 3, "num_key_value_heads": 4},
    "minimax-m2-moe": {},
    "afmoe": {"num_hidden_layers": 5, "global_attn_every_n_layers": 4},
    "minicpm3": {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256, "v_head_dim": None},
}
# What a file has divided or multiplied, in float32: frequencies by factors, a base, weights by
# Falcon-H1's multipliers.
WITH_FACTORS = ("llama3", "exaone4-global", "hunyuan", "falcon-h1", "apertus")


def logits_of(path, tmp_path, kv_bits="8", **options):
    # Of a file of few bits it is not known what its raw keys and values were.
    with open_small(path, tmp_path, kv_bits, **{**TINY, "dtype": "float32", **options}) as llm:
        return llm.logits(IDS, prefill_tokens=100)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_the_folder(checkpoint, tmp_path, name):
    folder = checkpoint(name, **VARIANTS[name])
    path = write(folder, tmp_path / "model.gguf")
    assert torch.equal(logits_of(path, tmp_path), logits_of(folder, tmp_path))


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("qwen2", gguf.MODEL_ARCH.QWEN2VL),
        ("qwen3", gguf.MODEL_ARCH.QWEN3VL),
        ("qwen3-moe", gguf.MODEL_ARCH.QWEN3VLMOE),
    ],
)
def test_the_text_part_of_a_model_for_pictures_is_its_text_model(
    checkpoint, tmp_path, monkeypatch, name, arch
):
    folder = checkpoint(name)
    named = json.loads((folder / "config.json").read_text())["architectures"][0]
    monkeypatch.setitem(gguf_writer.ARCHITECTURES, named, arch)
    path = write(folder, tmp_path / "model.gguf", arch__rope__dimension_sections=[4, 2, 2, 0])
    assert torch.equal(logits_of(path, tmp_path), logits_of(folder, tmp_path))


def test_layers_with_a_norm_before_the_mlp_have_it_behind_attention(checkpoint, tmp_path):
    """As StableLM 3B's files do, which say that it stands beside it."""
    folder = checkpoint("stablelm")
    path = write(folder, tmp_path / "model.gguf", arch__use_parallel_residual=True)
    assert torch.equal(logits_of(path, tmp_path), logits_of(folder, tmp_path))


def test_projections_one_by_one_are_those_head_by_head(checkpoint, tmp_path):
    folder = checkpoint("qwen3-next")
    path = write(folder, tmp_path / "model.gguf", by_heads=False)
    ours, theirs = logits_of(path, tmp_path), logits_of(folder, tmp_path)
    assert torch.equal(ours, theirs)


def test_keys_and_values_of_heads_in_one_tensor_are_the_same(checkpoint, tmp_path):
    """As in older files, which say otherwise what is kept of a token too."""
    folder = checkpoint("deepseek-v2-moe")
    keys = {"head_count_kv": 4, "key_length": 40, "value_length": 20}
    keys |= {"key_length_mla": None, "value_length_mla": None}
    keys = {f"arch__attention__{name}": value for name, value in keys.items()}
    path = write(folder, tmp_path / "model.gguf", heads_apart=False, **keys)
    assert torch.equal(logits_of(path, tmp_path), logits_of(folder, tmp_path))


@pytest.mark.parametrize("name", WITH_FACTORS)
def test_factors_are_those_of_the_folder(checkpoint, tmp_path, name):
    folder = checkpoint(name)
    path = write(folder, tmp_path / "model.gguf")
    # With pages of 8 bits a key next to the border of two codes may be sealed to the other.
    ours, theirs = (logits_of(p, tmp_path, "full") for p in (path, folder))
    # Angles or weights differ by float32's rounding of a factor.
    assert (ours - theirs).abs().max() <= 2e-4 * theirs.abs().max()


def with_numbers_of(folder, path, out):
    """A copy of a folder with the numbers that a GGUF file of it holds, in place of its own."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    config = read_model_config(folder)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, tensor in tensors.items():
        found = held[names.get_name(name, try_suffixes=(".weight", ".bias"))]
        numbers = gguf.quants.dequantize(found.data, found.tensor_type)
        numbers = torch.from_numpy(np.array(numbers)).view(tensor.shape)
        heads = {".q_proj.": config.num_heads, ".k_proj.": config.num_kv_heads}
        count = next((n for part, n in heads.items() if part in name), None)
        if count is not None:
            numbers = numbers.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2)
        tensors[name] = numbers.contiguous()
    save_file(tensors, out / "model.safetensors")
    return out


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_half_precision_is_read_as_it_is(checkpoint, tmp_path, kind):
    folder = checkpoint("llama2", dtype="float16" if kind == "F16" else "bfloat16")
    path = write(folder, tmp_path / "model.gguf", kind)
    ours, theirs = (logits_of(p, tmp_path, dtype="auto") for p in (path, folder))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 8), ("Q4_0", 4)])
@pytest.mark.parametrize("asked", ["auto", "full", "8"])
def test_own_groups_are_kept_as_they_are(checkpoint, tmp_path, kind, bits, asked):
    folder = checkpoint("llama2")
    path = write(folder, tmp_path / "model.gguf", kind)
    plain = with_numbers_of(folder, path, tmp_path / "plain")
    with open_small(plain, tmp_path, "8", dtype="float32", **TINY) as llm:
        llm.logits(IDS[:3])
        numbers = dict(llm.admission.weights._resident)
    with open_small(path, tmp_path, "8", weight_bits=asked, dtype="float32", **TINY) as llm:
        resident = llm.logits(IDS, prefill_tokens=100)
        for layer, tensors in llm.admission.weights._resident.items():
            for name, kept in tensors.items():
                if isinstance(kept, QuantisedWeight):
                    assert kept.bits == bits
                    assert torch.equal(kept.rows(0, kept.out_features), numbers[layer][name])
                else:
                    assert kept.dim() == 1
        assert llm.plan.disk["weights"] == 0
    with open_small(path, tmp_path, "8", weight_bits=asked, dtype="float32", **TINY) as llm:
        hold(llm, Loaded(2, True))
        assert torch.equal(llm.logits(IDS, prefill_tokens=100), resident)
        assert llm.admission.weights.bytes_streamed > 0


@pytest.mark.parametrize("bits", ["8", "4", "full"])
@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1"])
def test_other_quantisations_are_decoded_and_kept_in_bits(checkpoint, tmp_path, kind, bits):
    folder = checkpoint("llama2")
    path = write(folder, tmp_path / "model.gguf", kind)
    plain = with_numbers_of(folder, path, tmp_path / "plain")
    ours = logits_of(path, tmp_path, weight_bits=bits)
    assert torch.equal(ours, logits_of(plain, tmp_path, weight_bits=bits))
    with open_small(path, tmp_path, "8", weight_bits=bits, dtype="float32", **TINY) as llm:
        hold(llm, Loaded(3, False))
        assert torch.equal(llm.logits(IDS, prefill_tokens=100), ours)


@pytest.mark.parametrize("bits", ["auto", "8", "4", "full"])
def test_a_minimum_for_each_group_is_kept(checkpoint, tmp_path, bits):
    folder = checkpoint("llama2")
    path = write(folder, tmp_path / "model.gguf", "Q4_1")
    plain = with_numbers_of(folder, path, tmp_path / "plain")
    with open_small(plain, tmp_path, "8", dtype="float32", **TINY) as llm:
        llm.logits(IDS[:3])
        numbers = dict(llm.admission.weights._resident)
    with open_small(path, tmp_path, "8", weight_bits=bits, dtype="float32", **TINY) as llm:
        resident = llm.logits(IDS, prefill_tokens=100)
        for layer, tensors in llm.admission.weights._resident.items():
            for name, kept in tensors.items():
                if isinstance(kept, QuantisedWeight):
                    assert kept.bits == 4 and kept.is_affine
                    said = numbers[layer][name]
                    # Scales are the file's own, offsets are rounded to float16.
                    off = (kept.rows(0, kept.out_features) - said).abs().max()
                    assert off <= 2.0**-11 * said.abs().max()
    with open_small(path, tmp_path, "8", weight_bits=bits, dtype="float32", **TINY) as llm:
        hold(llm, Loaded(3, False))
        assert torch.equal(llm.logits(IDS, prefill_tokens=100), resident)


@pytest.mark.parametrize("bits", ["auto", "8", "4"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0", "Q4_1", "Q5_1", "MXFP4"])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_experts_are_read_one_by_one(checkpoint, tmp_path, name, kind, bits):
    folder = checkpoint(name)
    if kind == "MXFP4":
        path = write(folder, tmp_path / "model.gguf", "F32", experts="MXFP4")
    else:
        path = write(folder, tmp_path / "model.gguf", kind)
    resident = logits_of(path, tmp_path, weight_bits=bits)
    with open_small(path, tmp_path, "8", weight_bits=bits, dtype="float32", **TINY) as llm:
        hold_few_experts(llm)
        assert torch.equal(llm.logits(IDS, prefill_tokens=100), resident)
        assert llm.admission.weights._experts.misses > 0


def as_floats(path, out):
    """The same file with every number in F32."""

    def floats(name, data, kind):
        numbers = gguf.quants.dequantize(data, kind)
        return [(name, np.ascontiguousarray(numbers, np.float32), Kind.F32)]

    return rewritten(path, out, floats)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
@pytest.mark.parametrize(
    "name", ["qwen3-next", "qwen3.5", "qwen3.5-moe", "lfm2-moe", "granite4-h-moe"]
)
def test_hybrids_keep_the_numbers_of_their_blocks(checkpoint, tmp_path, name, kind):
    path = write(checkpoint(name), tmp_path / "model.gguf", kind)
    floats = as_floats(path, tmp_path / "floats.gguf")
    with open_small(floats, tmp_path, dtype="float32") as llm:
        llm.logits(IDS[:3])
        numbers = dict(llm.admission.weights._resident)
    exact = 0
    with open_small(path, tmp_path, weight_bits="auto", dtype="float32") as llm:
        llm.logits(IDS[:3])
        for layer, tensors in llm.admission.weights._resident.items():
            for part, kept in tensors.items():
                said = numbers[layer][part]
                if not isinstance(kept, QuantisedWeight):
                    assert torch.equal(kept, said), part
                    continue
                off = (kept.rows(0, kept.out_features) - said).abs()
                exact += not off.any()
                # What was decoded has 8 bits: half a step of 127, and float16's rounding of it.
                assert off.max() <= 0.51 / 127 * said.abs().max(), part
    assert exact > 3 if kind != "Q5_1" else True


@pytest.mark.parametrize(("bits", "others"), [("auto", None), ("full", None), ("8", 8), ("4", 4)])
def test_one_decoded_tensor_changes_no_others(checkpoint, tmp_path, bits, others):
    """By "auto" small models stay as they are, but for what the files have in fewer bits."""
    path = write(checkpoint("llama2"), tmp_path / "m.gguf", others={"blk.0.ffn_up": "Q5_1"})
    with open_small(path, tmp_path, weight_bits=bits) as llm:
        resident = llm.logits([1, 2, 3])
        store = llm.admission.weights
        tensors = {(layer, n): t for layer, of in store._resident.items() for n, t in of.items()}
        found = {of: getattr(t, "bits", None) for of, t in tensors.items() if len(t.shape) == 2}
        decoded = found.pop((0, "mlp.up_proj.weight"))
        assert decoded == (8 if bits == "auto" else others)
        assert set(found.values()) == {others}
        assert getattr(store.head.blocks[0], "bits", None) == (None if others is None else 8)
        loaded = sum(num_bytes(t) for t in tensors.values())
        assert 0 <= sum(llm.admission.facts.layer_sizes) - loaded < 64 * 2 * len(tensors)
        assert llm.plan.weight_bits == ("full" if others is None else bits)
    with open_small(path, tmp_path, weight_bits=bits) as llm:
        hold(llm, Loaded(llm.config.num_layers, False))
        assert torch.equal(llm.logits([1, 2, 3]), resident)


def num_bytes(tensor) -> int:
    return sum(part.nbytes for part in parts(tensor))


def parts(tensor):
    return [tensor.codes, tensor.scales] if isinstance(tensor, QuantisedWeight) else [tensor]


@pytest.mark.parametrize("bits", ["auto", "full", "8", "4"])
@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
@pytest.mark.parametrize("name", ["llama3", "mixtral", "phi3"])
def test_the_plan_counts_the_bytes_that_are_loaded(checkpoint, tmp_path, name, kind, bits):
    path = write(checkpoint(name), tmp_path / "model.gguf", kind)
    with open_small(path, tmp_path, weight_bits=bits) as llm:
        llm.logits([1, 2, 3])
        store = llm.admission.weights
        kept = [t for layer in store._resident.values() for t in layer.values()] + store.head.blocks
        real = sum(part.numel() * part.itemsize for t in kept for part in parts(t))
        assert real <= llm.plan.host["weights"] <= real + 128 * len(kept)


def test_planning_reads_headers_alone(checkpoint, tmp_path, monkeypatch):
    path = write(checkpoint("llama2"), tmp_path / "model.gguf", "Q5_1")
    monkeypatch.setattr(Checkpoint, "fill", lambda *args: pytest.fail("a tensor was read"))
    with open_small(path, tmp_path, weight_bits="auto") as llm:
        assert llm.plan.fits and llm.plan.weight_bits == "8" and llm.plan.quantised_by == "Q5_1"


def test_another_file_is_another_model(checkpoint, tmp_path):
    """To what is kept of a text that was read; the tokens are the same."""
    folder = checkpoint("llama2")
    paths = [write(folder, tmp_path / f"{kind}.gguf", kind) for kind in ("Q8_0", "Q4_0")]
    found = []
    for path in paths:
        with open_small(path, tmp_path) as llm:
            found.append((llm.fingerprint, llm.tokens_fingerprint, llm.model_name))
    assert found[0][0] != found[1][0] and found[0][1] == found[1][1]
    assert found[0][2] == str(paths[0])


def test_a_chat_ends_where_the_file_says(checkpoint, tmp_path):
    path = write(checkpoint("llama2"), tmp_path / "model.gguf")
    with open_small(path, tmp_path) as llm:
        ends = llm.generation.eos_token_ids
        assert llm.tokenizer.eos_token_id in ends
        said = llm.tokenizer.chat_text([{"role": "user", "content": "hi <|end|>"}])
        assert said == "<|bos|><|user|>hi <|end|><|assistant|>"
        ids = llm.encode([{"role": "user", "content": "hi <|end|>"}])
        assert ids.count(llm.tokenizer.eos_token_id) == 0
        assert llm.chat([{"role": "user", "content": "hi"}], max_new_tokens=3).text is not None


def test_what_lies_beside_is_no_word_about_the_file(checkpoint, tmp_path):
    """A folder's settings of quantisation are of its safetensors."""
    path = write(checkpoint("llama2"), tmp_path / "m.gguf")
    said = {"quantization": {"quant_algo": "NVFP4"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(said))
    assert open_model_files(path).config().quantisation is None

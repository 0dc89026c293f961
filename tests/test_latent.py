"""Latent attention: what the files' kv_b_proj becomes, however it is packed; pages of one head for
many that query; layers of a checkpoint that are no part of the model.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from packed_files import write
from prefixes_under_test import TEXT, last_logits, short_texts_count  # noqa: F401
from prefixes_under_test import opened as opened_with_store
from random_checkpoints import reference_logits
from safetensors.torch import load_file, save_file
from small_llm import TINY, keep_in_memory, open_small

from ebbtide.kernels.effect import composed_norms, output_norms
from ebbtide.kernels.matmul import linear, linear_heads
from ebbtide.kernels.quantised import quantise_weight
from ebbtide.offload.errors import BadCheckpoint, UnsupportedModel
from ebbtide.offload.mode import Mode
from ebbtide.offload.models.model_config import config_of
from ebbtide.offload.models.model_files import open_model_files
from ebbtide.offload.pages.geometry import choose_geometry
from ebbtide.offload.prefixes.layout import PrefixLayout
from ebbtide.offload.running.sequence import RawPages
from ebbtide.offload.weights.kept_tensors import Arena, most_staging, stored_bytes
from ebbtide.offload.weights.skeleton import expected_shapes
from ebbtide.offload.weights.tensor_loader import TensorLoader

HEADS, RANK, NOPE, VALUE = 4, 40, 24, 20  # of the matrix of models
IDS = torch.randint(0, 256, (400,), generator=torch.Generator().manual_seed(6)).tolist()
LAYER = "model.layers.1.self_attn."


def changed(source, folder, change) -> object:
    """A copy of a folder with other tensors: change(tensors) alters the dict of them."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors")
    return folder


def checkpoint_of(folder):
    files = open_model_files(folder)
    config = files.config()
    return files.checkpoint(config, expected_shapes(config))


def parts(kv_b: torch.Tensor) -> dict[str, torch.Tensor]:
    """What kv_b_proj (heads * (nope + value), rank) is in the decoder's order."""
    heads = kv_b.view(HEADS, NOPE + VALUE, RANK)
    return {
        "k_b_proj": heads[:, :NOPE].transpose(1, 2).reshape(HEADS * RANK, NOPE),
        "v_b_proj": heads[:, NOPE:].reshape(HEADS * VALUE, RANK),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_heads_are_those_of_the_file(checkpoint, dtype):
    folder = checkpoint("deepseek-v3-moe", dtype=dtype)
    kv_b = load_file(folder / "model.safetensors")[f"{LAYER}kv_b_proj.weight"]
    opened = checkpoint_of(folder)
    for name, want in parts(kv_b).items():
        assert torch.equal(opened.read(f"{LAYER}{name}.weight"), want)
    opened.close()


@pytest.mark.parametrize(
    "form", ["fp8", "awq", "gptq, symmetric", "gptq, groups in another order", "compressed-tensors"]
)
def test_rows_of_heads_are_decoded_where_the_files_have_codes(checkpoint, tmp_path, form):
    """To 16 bits, which is what they are rounded to here. Sizes are those that every format has."""
    sizes = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "v_head_dim": 32, "q_lora_rank": 64}
    sizes |= {"moe_intermediate_size": 64, "hidden_size": 64, "qk_rope_head_dim": 64}
    folder = checkpoint("deepseek-v3-moe", head_dim=64, **sizes)
    packed, plain = write(folder, form, tmp_path)
    kv_b = load_file(plain / "model.safetensors")[f"{LAYER}kv_b_proj.weight"]
    heads = kv_b.view(HEADS, 64, 64)
    opened = checkpoint_of(packed)
    read = opened.read(f"{LAYER}k_b_proj.weight")
    want = heads[:, :32].transpose(1, 2).reshape(HEADS * 64, 32)
    assert torch.equal(read, want.to(read.dtype)) and read.dtype.itemsize == 2
    assert torch.equal(
        opened.read(f"{LAYER}v_b_proj.weight"), heads[:, 32:].reshape(-1, 64).to(read.dtype)
    )
    opened.close()


@pytest.mark.parametrize("bits", [None, 8, 4, "auto"])
def test_what_is_kept_of_a_head_is_quantised_as_any_matrix_and_counted(checkpoint, bits):
    folder = checkpoint("deepseek-v3-moe", dtype="bfloat16")
    kv_b = load_file(folder / "model.safetensors")[f"{LAYER}kv_b_proj.weight"]
    opened = checkpoint_of(folder)
    for name, want in parts(kv_b).items():
        ref = opened.refs[f"{LAYER}{name}.weight"]
        size = stored_bytes(name, ref.shape, ref.packing, bits)
        arena = Arena.of(size)
        with TensorLoader(opened, bits, most_staging([ref], bits)) as loader:
            kept = loader.begin(f"{LAYER}{name}.weight", arena)
            loader.finish()
        assert arena._used == size
        if bits in (None, "auto"):
            assert torch.equal(kept, want)
        else:
            assert torch.equal(
                kept.rows(0, len(want)), quantise_weight(want, bits).rows(0, len(want))
            )
    opened.close()


def test_a_kv_b_proj_of_another_shape_is_named(checkpoint, tmp_path):
    def cut(tensors):
        tensors[f"{LAYER}kv_b_proj.weight"] = tensors[f"{LAYER}kv_b_proj.weight"][:-1]

    folder = changed(checkpoint("youtu"), tmp_path / "cut", cut)
    with pytest.raises(BadCheckpoint, match=r"kv_b_proj.weight has the shape \[175, 40\].*176, 40"):
        checkpoint_of(folder)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("rows", [1, 3, 33])
def test_products_of_heads_are_those_of_each_head(bits, rows, kernels):
    """Twenty outputs a head: they begin within strips. Inputs are a part of what lies there."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, HEADS, 8 + RANK, generator=generator)[..., 8:]
    weight = torch.randn(HEADS * VALUE, RANK, generator=generator)
    kept = weight if bits is None else quantise_weight(weight, bits)
    whole = weight if bits is None else kept.rows(0, len(weight))
    out = linear_heads(x, kept)
    for head in range(HEADS):
        own = whole[head * VALUE : (head + 1) * VALUE]
        own = own if bits is None else quantise_weight(weight, bits).part(head * 20, head * 20 + 20)
        assert torch.equal(out[:, head], linear(x[:, head].contiguous(), own))


def test_norms_of_two_matrices_are_those_of_their_product():
    generator = torch.Generator().manual_seed(3)
    projection = torch.randn(96, HEADS * VALUE, generator=generator)
    values = torch.randn(HEADS * VALUE, RANK, generator=generator)
    product = torch.einsum(
        "ohv,hvr->ohr", projection.view(96, HEADS, VALUE), values.view(HEADS, VALUE, RANK)
    )
    got = composed_norms(projection.split(40), values, HEADS)
    torch.testing.assert_close(got, output_norms(product.flatten(1), 1, RANK))


def test_layers_behind_the_last_are_no_part_of_the_model(checkpoint, tmp_path):
    """Files of DeepSeek-V3 and GLM-4.5 have one more, which guesses tokens."""
    source = checkpoint("deepseek-v3-moe")

    def add(tensors):
        for name in [n for n in tensors if n.startswith("model.layers.2.")]:
            tensors[name.replace("layers.2.", "layers.3.")] = tensors[name].clone()
        tensors["model.layers.3.eh_proj.weight"] = torch.ones(64, 128)
        tensors["model.layers.3.shared_head.head.weight"] = torch.ones(264, 64)

    with open_small(source, tmp_path, "full") as llm:
        expected = llm.logits(IDS[:90])
    with open_small(changed(source, tmp_path / "more", add), tmp_path, "full") as llm:
        assert torch.equal(llm.logits(IDS[:90]), expected)


@pytest.mark.parametrize("name", ["deepseek-v3-moe", "deepseek-v2-moe", "glm4-moe", "afmoe"])
def test_experts_in_one_tensor_are_the_same(checkpoint, tmp_path, name):
    source = checkpoint(name)

    def stack(tensors):
        for layer in range(3):
            prefix = f"model.layers.{layer}.mlp.experts."
            if f"{prefix}0.gate_proj.weight" not in tensors:
                continue
            gate, up, down = (
                torch.stack([tensors.pop(f"{prefix}{e}.{part}_proj.weight") for e in range(8)])
                for part in ("gate", "up", "down")
            )
            tensors[f"{prefix}gate_up_proj"] = torch.cat((gate, up), 1)
            tensors[f"{prefix}down_proj"] = down

    with open_small(source, tmp_path, "full") as llm:
        expected = llm.logits(IDS[:90])
    with open_small(changed(source, tmp_path / "stacked", stack), tmp_path, "full") as llm:
        assert torch.equal(llm.logits(IDS[:90]), expected)


@pytest.mark.parametrize("name", ["deepseek-v3-moe", "youtu"])
def test_pages_are_selected_alike_wherever_they_lie(checkpoint, tmp_path, name):
    """What is left out counts through its means: near what attending to everything gives."""
    folder = checkpoint(name)
    mode = Mode("bounded", selector_options={"epsilon": 0.1})

    def run(mode, share):
        with open_small(folder, tmp_path, mode=mode, **TINY) as llm:
            keep_in_memory(llm, len(IDS), share)
            return llm.logits(IDS, prefill_tokens=360), llm.last_stats

    bounded, _ = run(mode, 1.0)
    spilled, stats = run(mode, 0.3)
    assert stats.bytes_read["disk"] > 0
    assert torch.equal(bounded, spilled)
    exact = run(Mode(), 1.0)[0].log_softmax(-1)[360:]
    kl = (exact.exp() * (exact - bounded.log_softmax(-1)[360:])).sum(-1)
    assert 0 < kl.median() < 0.05


def test_pages_of_8_bits_are_near_transformers(checkpoint, tmp_path):
    folder = checkpoint("youtu")
    expected = reference_logits(folder, IDS).log_softmax(-1)
    with open_small(folder, tmp_path, "8", **TINY) as llm:
        got = llm.logits(IDS, prefill_tokens=300).log_softmax(-1)
    kl = (expected.exp() * (expected - got)).sum(-1)
    assert kl.mean() < 1e-3


# Of released models, what config.json says besides the defaults of their architecture, and how many
# parameters they are known to have.
RELEASED = {
    "DeepSeek-V2-Lite": (
        15.7e9,
        {
            **{"architectures": ["DeepseekV2ForCausalLM"], "num_hidden_layers": 27},
            **{"hidden_size": 2048, "intermediate_size": 10944, "num_attention_heads": 16},
            **{"vocab_size": 102400, "q_lora_rank": None, "moe_intermediate_size": 1408},
            **{"first_k_dense_replace": 1, "topk_method": "greedy"},
        },
    ),
    "DeepSeek-V3": (
        671e9,
        {
            **{"architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 61},
            **{"hidden_size": 7168, "intermediate_size": 18432, "num_attention_heads": 128},
            **{"vocab_size": 129280, "num_nextn_predict_layers": 1},
        },
    ),
    "GLM-4.7-Flash": (
        29.9e9,
        {
            **{"architectures": ["Glm4MoeLiteForCausalLM"], "num_hidden_layers": 47},
            **{"hidden_size": 2048, "intermediate_size": 10240, "num_attention_heads": 20},
            **{"vocab_size": 154880, "partial_rotary_factor": 1.0, "rope_theta": 1000000},
        },
    ),
    "GLM-4.5-Air": (
        106.9e9,
        {
            **{"architectures": ["Glm4MoeForCausalLM"], "num_hidden_layers": 46},
            **{"hidden_size": 4096, "intermediate_size": 10944, "num_attention_heads": 96},
            **{"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151552},
            **{"attention_bias": True},
        },
    ),
    "MiniMax-M2": (
        228.7e9,
        {
            **{"architectures": ["MiniMaxM2ForCausalLM"], "num_hidden_layers": 62},
            **{"hidden_size": 3072, "intermediate_size": 1536, "num_attention_heads": 48},
            **{"vocab_size": 200064, "rotary_dim": 64},
        },
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_as_many_parameters_as_they_are_known_for(name):
    known, raw = RELEASED[name]
    config = config_of({"torch_dtype": "bfloat16", **raw}, Path("config.json"))
    count = sum(math.prod(shape) for shape in expected_shapes(config).values())
    assert abs(count / known - 1) < 0.002


def test_a_latent_is_kept_once():
    """At 8 bits in little more than half of the two bytes that each of its 576 numbers has in
    llama.cpp's cache."""
    config = config_of(RELEASED["DeepSeek-V3"][1], Path("config.json"))
    for bits, most in (("8", 0.55), ("6", 0.41), ("4", 0.36)):
        layout = choose_geometry(config, bits).layout
        assert (layout.kv_heads, layout.head_dim, layout.shared_from) == (1, 576, 64)
        assert layout.near_bytes_per_token + layout.far_bytes_per_token < most * 2 * 576


def test_a_latent_lies_in_kept_files_once():
    """The raw cell too: a file's parts are what raw pages of one cell take in memory."""
    config = config_of(RELEASED["DeepSeek-V2-Lite"][1], Path("config.json"))
    geometry = choose_geometry(config, "8")
    sizes = PrefixLayout(config, geometry).raw_sizes(has_sink=True)
    layouts = geometry.layouts(range(config.num_page_layers))
    assert sum(sizes) == RawPages.num_bytes(layouts, 1, geometry.cell_tokens)


@pytest.mark.parametrize("codec", ["8", "full"])
def test_kept_latents_are_found(checkpoint, tmp_path, codec):
    with opened_with_store(checkpoint("youtu"), tmp_path, cap=None, codec=codec) as llm:
        expected, restored = last_logits(llm, TEXT)
        assert not restored
    with opened_with_store(checkpoint("youtu"), tmp_path, codec=codec) as llm:
        last_logits(llm, TEXT)
    with opened_with_store(checkpoint("youtu"), tmp_path, codec=codec) as llm:
        logits, restored = last_logits(llm, TEXT)
    assert restored == len(TEXT) - 1
    assert torch.equal(logits, expected)


def test_a_group_that_cannot_give_enough_experts_is_named():
    raw = {**RELEASED["DeepSeek-V3"][1], "n_group": 64, "topk_group": 1}
    with pytest.raises(BadCheckpoint, match=r"8 of 256 experts.* 1 of 64 groups"):
        config_of(raw, Path("config.json"))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'.*greedy"),
        ({"norm_topk_prob": True}, "norm_topk_prob"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is not 1"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25"),
        ({"kv_lora_rank": 1024}, "head_dim 1088 is above 1024"),
        ({"qk_rope_head_dim": 60}, "turns have 572 numbers, which is not a multiple of 8"),
    ],
)
def test_what_no_such_model_has_is_refused_by_name(fields, says):
    with pytest.raises(UnsupportedModel, match=says):
        config_of({**RELEASED["DeepSeek-V2-Lite"][1], **fields}, Path("config.json"))

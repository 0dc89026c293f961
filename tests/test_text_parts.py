"""The text parts of models for pictures, against transformers' whole models, which are given text
alone: their files' names, the layouts of their configurations, positions of three axes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from random_checkpoints import SMALL, fill, write_tokenizer
from safetensors.torch import load_file, save_file
from small_llm import TINY, hold_few_experts, open_small
from variants import EXPERTS, WINDOW, rope, types
from variants_hybrid import DELTA

from ebbtide.offload.errors import UnsupportedModel
from ebbtide.offload.families.architectures import FAMILIES

IDS = torch.randint(0, 256, (150,), generator=torch.Generator().manual_seed(4)).tolist()
_AXES = {"mrope_section": [2, 3, 3]}
_QWEN_EYE = {"depth": 1, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 64}
_GLM_EYE = {"depth": 1, "num_heads": 2, "hidden_size": 16, "out_hidden_size": 64}
_LFM_EYE = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
_LFM_EYE |= {"intermediate_size": 16}
_COHERE2 = {
    "model_type": "cohere2",
    "sliding_window": WINDOW,
    "layer_types": types("LGL"),
    "rope_parameters": rope(),
    "logit_scale": 1.0,  # which the whole models of transformers leave out
    "tie_word_embeddings": True,
}
_QWEN3_5 = {"model_type": "qwen3_5_text", **DELTA}
# Text and picture parts of each; what the hub says of the first besides.
PARTS = {
    "Qwen2VL": (
        {"rope_parameters": {**rope(1e6), **_AXES}},
        {"depth": 1, "num_heads": 2, "embed_dim": 16, "hidden_size": 64},
    ),
    "Qwen2_5_VL": (
        {"rope_parameters": {**rope(1e6), **_AXES}, "tie_word_embeddings": True},
        {**_QWEN_EYE, "hidden_size": 16},
    ),
    "Qwen3VL": (
        {"rope_parameters": {**rope(5e6), **_AXES, "mrope_interleaved": True}},
        {**_QWEN_EYE, "hidden_size": 16, "deepstack_visual_indexes": [0]},
    ),
    "Qwen3VLMoe": (
        {**EXPERTS, "mlp_only_layers": [1], "norm_topk_prob": True}
        | {"rope_parameters": {**rope(5e6), **_AXES, "mrope_interleaved": True}},
        {**_QWEN_EYE, "hidden_size": 16, "deepstack_visual_indexes": [0]},
    ),
    "Glm4v": (
        {"rope_parameters": rope(1e4, partial_rotary_factor=0.5, mrope_section=[1, 1, 2])},
        _GLM_EYE,
    ),
    "Glm4vMoe": (
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "rope_parameters": rope(1e4, partial_rotary_factor=0.5, mrope_section=[1, 1, 2]),
        },
        _GLM_EYE,
    ),
    "Exaone4_5_": (
        {"model_type": "exaone4", "sliding_window": WINDOW, "layer_types": types("LGL")}
        | {"rope_parameters": rope()},
        {**_QWEN_EYE, "hidden_size": 16},
    ),
    "Lfm2Vl": (
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv"]}
        | {"block_multiple_of": 16, "rope_parameters": rope(1e6)},
        _LFM_EYE,
    ),
    "Lfm3Vl": (
        {
            "model_type": "lfm3",
            "layer_types": ["conv", "sliding_attention", "full_attention"],
            "sliding_window": WINDOW,
        },
        _LFM_EYE,
    ),
    "InternVL": (
        {"model_type": "qwen3", "use_sliding_window": False, "rope_parameters": rope(1e6)},
        {**_LFM_EYE, "image_size": [28, 28], "patch_size": [14, 14]},
    ),
    "SmolVLM": ({"model_type": "llama", "rope_parameters": rope()}, _LFM_EYE),
    "Idefics3": ({"model_type": "llama", "rope_parameters": rope()}, _LFM_EYE),
    "AyaVision": (_COHERE2, _LFM_EYE),
    "Cohere2Vision": (_COHERE2, _LFM_EYE),
    "MiniCPMV4_6": (_QWEN3_5, _LFM_EYE),
    "MiniCPMV4_7": (_QWEN3_5, _LFM_EYE),
    "MuseGlimmer": (
        {"sliding_window": WINDOW, "layer_rope_theta": [1e4, 0, 1e4]}
        | {"layer_types": types("LGL"), "final_logit_softcapping": 6.0, "qk_scale_factor": 2.5}
        | {"rope_parameters": rope(), "output_multiplier": 0.8, "post_norm_eps": 0.3},
        {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
        | {"intermediate_size": 16},
    ),
}
NAMES = list(PARTS)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """`whole(name)`: a folder of the whole model, and what transformers makes of IDS; made once."""
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = _make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def _make(name: str, folder):
    text, eye = PARTS[name]
    config_name = f"{name.removesuffix('_')}{'_' if name.endswith('_') else ''}Config"
    config = getattr(transformers, config_name)(
        text_config={**SMALL, **text}, vision_config=eye, image_token_id=262, video_token_id=263
    )
    config.tie_word_embeddings = text.get("tie_word_embeddings", False)
    config.text_config.tie_word_embeddings = config.tie_word_embeddings
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    fill(model, torch.Generator().manual_seed(0))
    model.eval().save_pretrained(folder)
    write_tokenizer(folder, SMALL["vocab_size"])
    with torch.no_grad():
        return folder, model(torch.tensor([IDS])).logits[0]


def _close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Two float32 programs that sum in another order differ by rounding alone."""
    return (got - expected).abs().max() <= 2e-4 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_the_text_part_gives_what_the_whole_model_does(whole, tmp_path, name):
    folder, expected = whole(name)
    with open_small(folder, tmp_path, "full", **TINY) as llm:
        assert _close(llm.logits(IDS, prefill_tokens=100), expected)


@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen2_5_VL"])
def test_early_files_say_all_in_one_object(whole, tmp_path, name):
    """And name the text's tensors as a language model alone does."""
    folder, expected = whole(name)
    early = tmp_path / "early"
    early.mkdir()
    tensors = load_file(folder / "model.safetensors")
    plain = {n.replace("model.language_model.", "model."): t for n, t in tensors.items()}
    save_file(
        {n.replace("model.visual.", "visual."): t for n, t in plain.items()},
        early / "model.safetensors",
    )
    write_tokenizer(early, SMALL["vocab_size"])
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    theta = text.pop("rope_parameters")["rope_theta"]
    text |= {"rope_theta": theta, "rope_scaling": {"type": "mrope", **_AXES}}
    (early / "config.json").write_text(json.dumps({**config, **text, "model_type": "qwen2_vl"}))
    with open_small(early, tmp_path, "full", **TINY) as llm:
        assert _close(llm.logits(IDS, prefill_tokens=100), expected)


def test_experts_of_files_may_lie_by_columns(whole, tmp_path):
    """As the hub has them; transformers writes them by rows."""
    folder, expected = whole("Qwen3VLMoe")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    tensors = load_file(folder / "model.safetensors")
    turned = {
        name: t.transpose(1, 2).contiguous() if ".experts." in name else t
        for name, t in tensors.items()
    }
    save_file(turned, other / "model.safetensors")
    for bits in ("full", "8"):
        with open_small(folder, tmp_path, "full", weight_bits=bits, **TINY) as llm:
            by_rows = llm.logits(IDS)
        with open_small(other, tmp_path, "full", weight_bits=bits, **TINY) as llm:
            assert torch.equal(llm.logits(IDS), by_rows)
            assert bits != "full" or _close(by_rows, expected)
        with open_small(other, tmp_path, "full", weight_bits=bits, **TINY) as llm:
            hold_few_experts(llm)
            assert torch.equal(llm.logits(IDS), by_rows)
            assert llm.admission.weights.reads_experts


def test_experts_of_float8_in_one_tensor_are_read_by_rows_alone(whole, tmp_path):
    """As transformers would write them. By columns they are refused by name."""
    folder, _ = whole("Qwen3VLMoe")
    tensors = load_file(folder / "model.safetensors")
    experts = {name for name in tensors if ".experts." in name}
    codes = {name: tensors[name].to(torch.float8_e4m3fn) for name in experts}
    scales = {f"{name}_scale_inv": torch.full((8, 1, 1), 0.5) for name in experts}
    meant = {name: 0.5 * code.float() for name, code in codes.items()}
    turned = {name: code.transpose(1, 2).contiguous() for name, code in codes.items()}
    for name, changed in (("rows", codes | scales), ("plain", meant), ("columns", turned | scales)):
        other = tmp_path / name
        shutil.copytree(folder, other)
        save_file({**tensors, **changed}, other / "model.safetensors")
        if name != "plain":
            config = json.loads((folder / "config.json").read_text())
            config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
            (other / "config.json").write_text(json.dumps(config))
    with open_small(tmp_path / "plain", tmp_path, "full", **TINY) as llm:
        expected = llm.logits(IDS)
    with open_small(tmp_path / "rows", tmp_path, "full", **TINY) as llm:
        assert _close(llm.logits(IDS), expected)
    with pytest.raises(UnsupportedModel, match=r"float8 by columns.*each expert in tensors"):
        open_small(tmp_path / "columns", tmp_path, "full", **TINY)


@pytest.mark.parametrize("name", ["InternVL", "Qwen2_5_VL"])
@pytest.mark.parametrize(("outer", "inner"), [(True, False), (False, True), (True, True)])
def test_the_head_is_tied_where_the_files_have_none(whole, tmp_path, name, outer, inner):
    """One of these has a head of its own, and files of either may say anything."""
    folder, expected = whole(name)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"] = outer, inner
    (other / "config.json").write_text(json.dumps(config))
    with open_small(other, tmp_path, "full", **TINY) as llm:
        assert llm.config.tied_embeddings == (name == "Qwen2_5_VL")
        assert _close(llm.logits(IDS, prefill_tokens=100), expected)


def test_every_text_part_is_compared():
    """Here, or as its own text model in test_parity.py."""
    there = {"Gemma3", "Gemma3n", "Gemma4", "Gemma4Unified", "Llama4", "Qwen3_5", "Qwen3_5Moe"}
    there.add("Mistral3")
    parts = {name for name, family in FAMILIES.items() if family.text_config}
    assert parts == {f"{name}ForConditionalGeneration" for name in (*NAMES, *there)}

"""config.json: what is read from it in both layouts, and that whatever is wrong in it is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_checkpoints import FAMILIES

from ebbtide.offload.errors import BadCheckpoint, ModelError, UnsupportedModel
from ebbtide.offload.families.architectures import FAMILIES as SUPPORTED
from ebbtide.offload.layers.decoder import Decoder
from ebbtide.offload.models.model_config import config_of, read_model_config
from ebbtide.offload.weights.skeleton import expected_shapes

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def read(tmp_path):
    """`read(**changes)`: the configuration of LLAMA with changes; a value of ... takes one out."""

    def reading(**changes):
        raw = {k: v for k, v in {**LLAMA, **changes}.items() if v is not ...}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        return read_model_config(tmp_path)

    return reading


def test_what_is_left_out_has_the_usual_value(read):
    config = read(num_key_value_heads=...)
    assert (config.num_kv_heads, config.head_dim, config.groups) == (4, 16, 1)
    assert (config.dtype, config.norm_eps, config.tied_embeddings) == ("bfloat16", 1e-6, False)
    assert [(r.kind, r.theta) for r in config.ropes] == [("default", 10000.0)] * 3
    assert config.windows == (None, None, None)


# transformers' names of what is a model of its own.
_CLASSES = {name.removesuffix("ForCausalLM") for name in SUPPORTED if name.endswith("ForCausalLM")}
_TEXT_PARTS = {n.removesuffix("ForConditionalGeneration") for n in SUPPORTED} - set(SUPPORTED)
# Which are no model that is known here where nothing is said.
_NOT_WHOLE = {"Bamba", "Dots1", "Glm4Moe", "GraniteMoeHybrid", "NemotronH"}
# What no file leaves out.
_ALWAYS_SAID = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_ALWAYS_SAID += ("num_attention_heads",)


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        *((name, {}) for name in sorted(_CLASSES - _NOT_WHOLE)),
        ("Bamba", {"attn_layer_indices": [5]}),
        ("GraniteMoeHybrid", {"layer_types": [*["linear_attention"] * 31, "full_attention"]}),
        ("Glm4Moe", {"head_dim": 128}),
        ("ExaoneMoe", {"n_group": 4}),
        ("Glm4Moe", {"head_dim": 128, "n_group": 8}),
        (
            "Dots1",
            {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_group": 8}
            | {"moe_intermediate_size": 1408},
        ),
        ("Mistral4", {"n_group": 8}),
    ],
)
def test_fields_left_out_mean_what_they_mean_to_transformers(architecture, said):
    """Its configuration of nothing, which says all fields, is that of a file that says nothing."""
    import transformers

    known_as = {"BailingMoeV3": "BailingHybrid"}.get(architecture, architecture)
    classes = (f"{known_as}{text}Config" for text in ("Text", ""))
    of = next(c for c in (getattr(transformers, name, None) for name in classes) if c)
    every = of(**said).to_dict()
    every["architectures"] = [f"{architecture}ForCausalLM"]
    few = {k: every[k] for k in (*_ALWAYS_SAID, "architectures") if k in every} | said
    whole, left_out = (config_of(raw, Path("config.json")) for raw in (every, few))
    if architecture in ("Mistral4", "Ministral3"):  # whose RoPE says the greatest length once more
        for theirs, ours in zip(whole.ropes, left_out.ropes, strict=True):
            theirs.parameters.pop("max_position_embeddings", None)
            assert theirs == ours
    assert whole == left_out


@pytest.mark.parametrize("architecture", sorted(_TEXT_PARTS - {"Mistral3", "Glm4vMoe"}))
def test_text_parts_leave_out_what_their_class_knows(architecture):
    """The same of what stands in text_config, whose kind is always said. (Of two the class alone
    describes no model, or another one.)"""
    import transformers

    whole = getattr(transformers, f"{architecture}Config")()
    every = whole.text_config.to_dict()
    few = {k: every[k] for k in (*_ALWAYS_SAID, "model_type") if k in every}
    tied = {k: v for k, v in every.items() if k == "tie_word_embeddings"}
    beside = {"architectures": [f"{architecture}ForConditionalGeneration"], **tied}
    read = (config_of({**beside, "text_config": text}, Path("c")) for text in (every, few))
    assert next(read) == next(read)


@pytest.mark.parametrize("name", FAMILIES)
def test_both_layouts_say_the_same(checkpoint, tmp_path, name):
    hub = checkpoint(name)
    new = checkpoint(name, layout="transformers5")
    assert read_model_config(hub) == read_model_config(new)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "MambaForCausalLM.*Supported:.* LlamaForCausalLM",
        ),
        ({"architectures": []}, "'llama' is not supported"),
        ({"architectures": ...}, "'llama' is not supported"),
        ({"architectures": [["LlamaForCausalLM"]]}, "not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantised .gptq.*unquantised"),
        ({"quantization_config": "awq"}, "awq"),
        (
            {"architectures": ["GlmMoeDsaForCausalLM"]},
            "GlmMoeDsa.*an indexer that chooses.*not run yet",
        ),
        ({"architectures": ["LlamaForCausalLM2"]}, "'LlamaForCausalLM2' is not supported"),
        ({"hidden_act": "xielu"}, "xielu.*Supported: silu"),
        ({"hidden_act": ["silu"]}, "not supported"),
        ({"partial_rotary_factor": 0.5}, "partial rotary"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "'ntk' is not.*linear, llama3"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "not supported"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ({"rope_scaling": "linear"}, "not supported"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn.*float32, bfloat16, float16"),
        (
            {
                "architectures": ["DeepseekV2ForCausalLM"],
                **{"kv_lora_rank": 20, "qk_rope_head_dim": 16, "q_lora_rank": None},
                **{"qk_nope_head_dim": 16, "v_head_dim": 16},
            },
            "what turns have 36 numbers, which is not a multiple of 8",
        ),
        ({"architectures": ["PhiForCausalLM"], "qk_layernorm": True}, "qk_layernorm is not"),
        (
            {
                "architectures": ["Cohere2ForCausalLM"],
                "layer_types": ["sliding_attention", "chunked_attention", "full_attention"],
            },
            "of the type 'chunked_attention'",
        ),
        (
            {
                "architectures": ["AyaVisionForConditionalGeneration"],
                "text_config": {**LLAMA, "model_type": "cohere"},
            },
            "text part of the model_type 'cohere' .*Supported: cohere2",
        ),
        # A scaling that was added to a file of transformers 5.
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
            },
            "rope_scaling .* and rope_parameters .* contradict each other",
        ),
        (
            {
                "architectures": ["Gemma4ForCausalLM"],
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
            },
            "contradict each other",
        ),
        # Its output head would have a bias.
        ({"architectures": ["Ernie4_5_MoeForCausalLM"], "use_bias": True}, "use_bias"),
    ],
)
def test_what_we_do_not_run_is_named(read, changes, says):
    with pytest.raises(UnsupportedModel, match=says):
        read(**changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": ...}, "does not say hidden_size"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is"),
        ({"vocab_size": "264"}, "vocab_size is '264'"),
        ({"vocab_size": 1 << 60}, "vocab_size is"),
        ({"num_attention_heads": 1 << 20, "head_dim": 1 << 20}, "more than any model"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"num_key_value_heads": 8}, "4 attention heads cannot share 8"),
        ({"hidden_size": 2}, "does not say head_dim"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"rope_scaling": {"type": "linear"}}, "linear needs factor above 0, got None"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "got inf"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3 needs low_freq_factor"),
        (
            {
                "rope_scaling": {"type": "yarn", "factor": 4.0},
                "max_position_embeddings": ...,
            },
            "yarn needs original_max_position_embeddings",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": "one"}}, "mscale 'one'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "dynamic has a factor below 1"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1] * 8}}, "needs long_factor, 8"),
        (
            {"rope_scaling": {"type": "su", "short_factor": [1] * 7}},
            "needs short_factor, 8 numbers",
        ),
    ],
)
def test_what_cannot_be_true_is_named(read, changes, says):
    with pytest.raises(BadCheckpoint, match=says):
        read(**changes)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "has no config.json.*Hugging Face id"),
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
        (b"[1]", "holds a list, not an object"),
        (b"null", "holds a NoneType"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, content, says):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(BadCheckpoint, match=says):
        read_model_config(tmp_path)


def test_yarn_of_a_hub_states_the_original_length(read):
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": None}
    config = read(rope_scaling=scaling)
    assert config.max_positions == 4 * 4096
    assert config.ropes[0].parameters["original_max_position_embeddings"] == 4096


@pytest.mark.parametrize(
    ("architecture", "said", "is_read_as"),
    [
        ("Gemma", {}, "gelu_tanh"),
        ("Gemma", {"hidden_act": "gelu"}, "gelu_tanh"),  # as early files have it
        ("Gemma", {"hidden_act": "silu"}, "silu"),
        ("Gemma2", {}, "gelu_tanh"),
        ("Gemma2", {"hidden_act": "silu"}, "gelu_tanh"),  # a field that counts for nothing
        ("Gemma2", {"hidden_activation": "gelu"}, "gelu"),
        ("Gemma3", {"hidden_activation": "silu"}, "silu"),
        ("VaultGemma", {"hidden_activation": "silu"}, "silu"),
    ],
)
def test_gemmas_are_activated_by_what_their_class_reads(read, architecture, said, is_read_as):
    config = read(architectures=[f"{architecture}ForCausalLM"], head_dim=16, **said)
    assert config.activation == is_read_as


def test_norms_of_lfm3_go_by_either_name(read):
    names = {"norm_eps": 1e-5, "rms_norm_eps": 1e-3}
    config = read(architectures=["Lfm3ForCausalLM"], layer_types=["full_attention"] * 3, **names)
    assert config.norm_eps == 1e-3


def test_half_of_bambas_heads_turn_whatever_stands_beside_its_rope(read):
    bamba = {"architectures": ["BambaForCausalLM"], "attn_layer_indices": [1]}
    bamba |= {"mamba_n_heads": 8, "mamba_d_head": 16, "partial_rotary_factor": 0.25}
    assert [rope.share for rope in read(**bamba).ropes] == [0.5] * 3
    within = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    assert [rope.share for rope in read(**bamba, rope_parameters=within).ropes] == [0.25] * 3


def test_a_scaling_may_stand_there_twice(read):
    scaling = {"type": "linear", "factor": 4.0}
    parameters = {"rope_type": "linear", "factor": 4, "rope_theta": 1e6}
    config = read(rope_scaling=scaling, rope_parameters=parameters)
    assert [(r.kind, r.theta) for r in config.ropes] == [("linear", 1e6)] * 3


def test_alpha_stretches_the_base_of_a_dynamic_scaling_alone(read):
    hunyuan = {"architectures": ["HunYuanDenseV1ForCausalLM"], "rope_theta": 1e4}
    (rope, *_) = read(**hunyuan, rope_scaling={"type": "dynamic", "alpha": 50.0}).ropes
    assert (rope.kind, rope.theta) == ("default", pytest.approx(1e4 * 50 ** (16 / 14)))
    (rope, *_) = read(**hunyuan, rope_scaling={"type": "linear", "factor": 2.0, "alpha": 5.0}).ropes
    assert (rope.kind, rope.theta) == ("linear", 1e4)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
_NAMES = sorted(
    {*LLAMA, "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "dtype", "hidden_act"}
    | {"rms_norm_eps", "tie_word_embeddings", "sliding_window", "use_sliding_window"}
    | {"layer_types", "max_window_layers", "partial_rotary_factor", "quantization_config"}
    | {"sliding_window_pattern", "rope_local_base_freq", "text_config", "no_rope_layers"}
    | {"num_experts", "num_local_experts", "num_experts_per_tok", "mlp_only_layers"}
    | {"decoder_sparse_step", "query_pre_attn_scalar", "attn_logit_softcapping", "clip_qkv"}
    | {"logits_scaling", "attention_multiplier", "original_max_position_embeddings", "model_type"}
    | {"altup_active_idx", "altup_num_inputs", "altup_correct_scale", "activation_sparsity_pattern"}
    | {"num_kv_shared_layers", "moe_layers", "attention_chunk_size", "attn_temperature_tuning"}
    | {"interleave_moe_layer_step", "no_rope_layer_interval", "attn_scale", "floor_scale"}
)
_ROPE_KINDS = ["yarn", "linear", "llama3", "dynamic", "longrope", "su"]
_ROPE = st.dictionaries(
    st.sampled_from(
        "rope_type type factor mscale low_freq_factor beta_fast short_factor long_factor "
        "partial_rotary_factor llama_4_scaling_beta full_attention".split()
    ),
    st.sampled_from(_ROPE_KINDS) | _JSON | st.dictionaries(st.just("rope_type"), _JSON),
)


@settings(max_examples=400)
@example(changes={"model_type": {}}, architecture="Mistral3ForConditionalGeneration")
@example(changes={"mlp_only_layers": [0]}, architecture="Kolibri1ForCausalLM")
@given(
    changes=st.dictionaries(st.sampled_from(_NAMES), _JSON | _ROPE, max_size=3),
    architecture=st.sampled_from(sorted(SUPPORTED)),
)
def test_whatever_stands_there_only_model_errors_come_out(tmp_path_factory, changes, architecture):
    folder = tmp_path_factory.mktemp("config")
    raw = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, **changes}
    raw = {**raw, "text_config": changes.get("text_config", raw), "architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(raw))
    try:
        config = read_model_config(folder)
        assert len(config.ropes) == len(config.windows) == config.num_layers
        Decoder(config.fixed_for(100_000), torch.device("cpu"))
        if config.num_layers < 100:
            shapes = expected_shapes(config)
            assert all(n > 0 for shape in shapes.values() for n in shape)
    except ModelError:
        pass
    finally:
        shutil.rmtree(folder)


def test_a_text_part_takes_what_stands_beside_it(read):
    text = {**LLAMA, "torch_dtype": None, "architectures": None, "sliding_window": 7}
    config = read(
        architectures=["Mistral3ForConditionalGeneration"], text_config=text, hidden_size=...
    )
    assert (config.hidden_size, config.dtype, config.windows) == (64, "bfloat16", (7, 7, 7))
    with pytest.raises(BadCheckpoint, match="has no text_config"):
        read(architectures=["Gemma3ForConditionalGeneration"], hidden_size=...)


@pytest.mark.parametrize(("window", "kept"), [(4095, 4095), (4096, None), (262144, None)])
def test_a_window_that_no_text_is_longer_than_is_none(read, window, kept):
    """As Phi-3.5's files have it: of 262,144 tokens, or as many as a text may have."""
    config = read(architectures=["Phi3ForCausalLM"], sliding_window=window)
    assert (config.max_positions, config.windows) == (4096, (kept,) * 3)


def test_command_r_says_its_length_beside_the_size_of_a_mask(read):
    cohere = {"architectures": ["CohereForCausalLM"], "max_position_embeddings": 8192}
    assert read(**cohere).max_positions == 8192
    assert read(**cohere, model_max_length=131072).max_positions == 131072


def test_large_gemmas_leave_out_what_their_class_knows(read):
    """As the files of the 4B model do."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34}
    text |= {"intermediate_size": 10240, "sliding_window": 1024}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    config = read(architectures=["Gemma3ForConditionalGeneration"], text_config=text)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.tied_embeddings) == (262208, True)
    assert [i for i, w in enumerate(config.windows) if w is None] == [5, 11, 17, 23, 29]
    assert {(r.theta, r.kind) for r in config.ropes} == {(1e6, "linear"), (1e4, "default")}
    assert config.attention_softcap == config.logits_softcap == 0


def test_scalings_that_depend_on_length_are_fixed_once(read):
    scaling = {"type": "dynamic", "factor": 4.0}
    config = read(rope_scaling=scaling)
    assert config.max_positions == 4 * 4096
    short, exact, long = (config.fixed_for(n) for n in (10, 4096, 16384))
    assert short == exact and short.ropes[0].theta == 10000.0
    assert long.ropes[0].theta > short.ropes[0].theta
    assert long.fixed_for(10) == long  # once
    plain = read()
    assert plain.fixed_for(10) is plain


def test_longrope_may_say_its_magnitude_for_either_length(checkpoint):
    """As Phi-3.5-MoE's does, in place of what the lengths come to. transformers multiplies by it
    and forgets the factors of long texts."""
    config = read_model_config(checkpoint("phimoe-longrope"))
    short, long = (config.fixed_for(context).ropes[0].parameters for context in (4096, 4097))
    assert (short["attention_factor"], short["factors"][-1]) == (1.2, 2.0)
    assert (long["attention_factor"], long["factors"][-1]) == (1.3, 16.0)

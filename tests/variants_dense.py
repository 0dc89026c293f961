"""Small checkpoints of the architectures that attend in every layer."""

from __future__ import annotations

from typing import Any

from variants import GRANITE, WINDOW, Variant, rope, types, yarn


def _longrope(original: int) -> dict[str, Any]:
    """Three quarters of 16 elements turn: six pairs."""
    return {
        "max_position_embeddings": 8192,
        "original_max_position_embeddings": original,
        "rope_parameters": rope(
            rope_type="longrope",
            partial_rotary_factor=0.75,
            short_factor=[1.0, 1.1, 1.2, 1.4, 1.7, 2.0],
            long_factor=[1.0, 1.5, 3.0, 8.0, 20.0, 40.0],
            original_max_position_embeddings=original,
        ),
    }


_LLAMA3 = rope(
    500000.0,
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
_GEMMA2 = {
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 6.0,
    "sliding_window": WINDOW,
}
_GEMMA3N = {
    "tie_word_embeddings": True,
    "sliding_window": WINDOW,
    "rope_parameters": {"full_attention": rope(1e6), "sliding_attention": rope(1e4)},
    "hidden_size_per_layer_input": 24,
    "laurel_rank": 8,
}
_GEMMA4_ROPES = {
    "sliding_attention": rope(1e4),
    "full_attention": rope(1e6, rope_type="proportional", partial_rotary_factor=0.25),
}
_GEMMA4 = {
    "tie_word_embeddings": True,
    "sliding_window": WINDOW,
    "rope_parameters": _GEMMA4_ROPES,
    "global_head_dim": 32,
    "final_logit_softcapping": 6.0,
    "hidden_size_per_layer_input": 0,
}
_KEYS_ARE_VALUES = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}


def _hub_gemma4(pattern: str, **more: Any) -> dict[str, Any]:
    """Hubs name each kind's RoPE too, and the global layers' sizes once."""
    others = ("rope_theta", "rope_scaling", "rope_local_base_freq", "per_layer_config")
    return {
        "layer_types": types(pattern),
        "rope_parameters": _GEMMA4_ROPES,
        "global_head_dim": 32,
        **dict.fromkeys(others, ...),
        **more,
    }


DENSE_VARIANTS: dict[str, Variant] = {
    "llama2": Variant("Llama", "as many KV heads as heads", {"num_key_value_heads": 4}),
    "llama3": Variant(
        "Llama", "llama3 scaling", {"tie_word_embeddings": True, "rope_parameters": _LLAMA3}
    ),
    "llama-linear": Variant(
        "Llama", "linear scaling", {"rope_parameters": rope(rope_type="linear", factor=2.0)}
    ),
    "llama-dynamic": Variant(
        "Llama",
        "dynamic scaling, fixed for the request's length",
        {
            "max_position_embeddings": 64,
            "rope_parameters": rope(rope_type="dynamic", factor=16.0),
        },
    ),
    "llama-biases": Variant("Llama", "biases", {"attention_bias": True, "mlp_bias": True}),
    "llama-head80": Variant("Llama", "heads of 80", {"head_dim": 80, "num_key_value_heads": 4}),
    "llama-head100": Variant(
        "Llama",
        "heads of 100, which pages hold as 104",
        {"head_dim": 100, "num_key_value_heads": 4},
    ),
    "llama-relu": Variant("Llama", "gates of ReLU", {"hidden_act": "relu"}),
    "llama-one-kv-head": Variant("Llama", "one KV head", {"num_key_value_heads": 1}),
    "llama4": Variant(
        "Llama4",
        "no experts; attention in chunks and norms of heads in every layer",
        {
            "intermediate_size_mlp": 96,
            "attention_chunk_size": 80,
            "moe_layers": [],
            "no_rope_layers": [1, 1, 1],
            "tie_word_embeddings": True,
        },
        {"interleave_moe_layer_step": 0, "num_local_experts": 0, "num_experts_per_tok": 0},
    ),
    "mistral": Variant("Mistral", "windows", {"sliding_window": WINDOW}),
    "mistral-no-window": Variant(
        "Mistral", "no window", {"sliding_window": None, "rope_parameters": rope(1e6)}
    ),
    "ministral": Variant(
        "Ministral",
        "windows in some layers",
        {"sliding_window": WINDOW, "layer_types": types("GLL")},
        {"layer_types": types("GLL")},
    ),
    "ministral3": Variant(
        "Ministral3",
        "queries that grow",
        {
            "sliding_window": None,
            "rope_parameters": yarn(
                64, llama_4_scaling_beta=0.4, mscale=1.0, mscale_all_dim=1.0, beta_fast=32.0
            ),
        },
    ),
    "qwen2": Variant(
        "Qwen2", "biases", {"tie_word_embeddings": True, "rope_parameters": rope(1e6)}
    ),
    "qwen2-key-biases": Variant("Qwen2", "large key biases", {"rope_parameters": rope(1e6)}),
    "qwen2-head10": Variant(
        "Qwen2",
        "heads of 10, which pages hold as 16; biases",
        {"hidden_size": 40, "head_dim": 10, "tie_word_embeddings": True},
    ),
    "qwen2-yarn": Variant(
        "Qwen2", "yarn", {"max_position_embeddings": 512, "rope_parameters": yarn()}
    ),
    "qwen2-window": Variant(
        "Qwen2",
        "windows from the second layer on",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": Variant(
        "Qwen3",
        "norms of query and key heads",
        {"head_dim": 32, "tie_word_embeddings": True, "rope_parameters": rope(1e6)},
    ),
    "qwen3-head12": Variant(
        "Qwen3", "norms of heads of 12, which pages hold as 16", {"head_dim": 12}
    ),
    "phi3": Variant("Phi3", "fused projections", {"num_key_value_heads": 4}),
    "phi3-window": Variant("Phi3", "windows", {"sliding_window": WINDOW}),
    "phi3-longrope-long": Variant("Phi3", "longrope beyond the original length", _longrope(128)),
    "phi3-longrope-short": Variant("Phi3", "longrope within the original length", _longrope(512)),
    "gemma": Variant("Gemma", "norms of 1 + w, scaled embeddings, GELU", {"head_dim": 32}),
    "gemma2": Variant("Gemma2", "soft-caps, four norms, local layers", _GEMMA2),
    "gemma3": Variant(
        "Gemma3",
        "two RoPEs",
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 16,
            "layer_types": types("LGL"),
            "rope_parameters": {
                "full_attention": rope(1e6, rope_type="linear", factor=8.0),
                "sliding_attention": rope(1e4),
            },
        },
        {"sliding_window_pattern": 2},
    ),
    "gemma3n": Variant(
        "Gemma3n",
        "four residual streams, learnt residuals, gates of which few numbers count, layers that "
        "attend others' pages, inputs of each layer",
        {
            **_GEMMA3N,
            "num_hidden_layers": 7,
            "layer_types": types("LLGLGLG"),
            "num_kv_shared_layers": 4,
            "intermediate_size": [96, 96, 64, 96, 128, 96, 96],
            "activation_sparsity_pattern": [0.7, 0.9, 0.0, 0.7, 0.0, 0.0, 0.0],
            "vocab_size_per_layer_input": 200,
            "pad_token_id": 0,
        },
        {"layer_types": types("LLGLGLG")},
    ),
    "gemma3n-two-streams": Variant(
        "Gemma3n",
        "two streams, of which the first is not scaled; layers of the usual kinds; biases",
        {
            **_GEMMA3N,
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 1,
            "altup_num_inputs": 2,
            "altup_correct_scale": False,
            "attention_bias": True,
            "final_logit_softcapping": 6.0,
            "vocab_size_per_layer_input": 264,
        },
    ),
    "gemma4": Variant(
        "Gemma4",
        "wide global heads, layers that attend others' pages and have wider MLPs, inputs of each "
        "layer",
        {
            **_GEMMA4,
            "num_hidden_layers": 7,
            "layer_types": types("LLGLGLG"),
            "num_kv_shared_layers": 4,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 24,
            "vocab_size_per_layer_input": 270,
        },
        _hub_gemma4("LLGLGLG"),
    ),
    "gemma4-keys-are-values": Variant(
        "Gemma4",
        "global layers with another number of KV heads, whose keys are their values",
        {**_GEMMA4, **_KEYS_ARE_VALUES, "layer_types": types("LGG")},
        _hub_gemma4("LGG", num_global_key_value_heads=1),
    ),
    "gemma4-moe": Variant(
        "Gemma4",
        "experts beside an MLP, with a norm, a scale and factors of their own",
        {
            **_GEMMA4,
            **_KEYS_ARE_VALUES,
            "layer_types": types("LLG"),
            "enable_moe_block": True,
            "num_experts": 6,
            "top_k_experts": 2,
            "moe_intermediate_size": 40,
        },
        _hub_gemma4("LLG", num_global_key_value_heads=1),
    ),
    "gemma4-unified": Variant(
        "Gemma4Unified",
        "biases, of keys that are values too; a scaled RoPE",
        {
            **{k: v for k, v in _GEMMA4.items() if k != "hidden_size_per_layer_input"},
            **_KEYS_ARE_VALUES,
            "layer_types": types("GLG"),
            "attention_bias": True,
            "rope_parameters": {
                **_GEMMA4_ROPES,
                "full_attention": {**_GEMMA4_ROPES["full_attention"], "factor": 4.0},
            },
        },
        _hub_gemma4(
            "GLG",
            num_global_key_value_heads=1,
            rope_parameters={
                **_GEMMA4_ROPES,
                "full_attention": {**_GEMMA4_ROPES["full_attention"], "factor": 4.0},
            },
        ),
    ),
    "smollm3": Variant(
        "SmolLM3",
        "layers without positions",
        {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True},
    ),
    "smollm3-yarn": Variant(
        "SmolLM3",
        "yarn, layers without positions by their interval",
        {"no_rope_layer_interval": 2, "rope_parameters": yarn(), "attention_bias": True},
    ),
    "olmo2": Variant("Olmo2", "norms after, one norm over all heads"),
    "olmo3": Variant(
        "Olmo3",
        "yarn in the global layers alone",
        {
            "sliding_window": WINDOW,
            "layer_types": types("LGL"),
            "rope_parameters": {
                "full_attention": {**yarn(64), "rope_theta": 500000.0},
                "sliding_attention": rope(500000.0),
            },
        },
        {"layer_types": types("LGL")},
    ),
    "iquestcoder": Variant("IQuestCoder", "Llama's layers, biases", {"attention_bias": True}),
    "vaultgemma": Variant("VaultGemma", "soft-caps, two norms, local layers", _GEMMA2),
    "granite": Variant("Granite", "four multipliers", GRANITE),
    "granite-swa": Variant(
        "GraniteSWA",
        "windows, scores without a value, and a RoPE of its own or none in each layer",
        {
            **GRANITE,
            "sliding_window": WINDOW,
            "layer_rope_theta": [0, 10000.0, 500000],
            "tie_word_embeddings": True,
        },
    ),
    "granite-swa-biases": Variant(
        "GraniteSWA",
        "one RoPE, layers of the kinds that are named; biases",
        {
            **GRANITE,
            "sliding_window": WINDOW,
            "layer_types": types("LGL"),
            "attention_bias": True,
            "mlp_bias": True,
        },
        {"layer_types": types("LGL"), "layer_rope_theta": ...},
    ),
    "hyperclovax": Variant(
        "HyperCLOVAX",
        "norms after; logits multiplied; scores of the usual scale",
        {**GRANITE, "attention_multiplier": None},
    ),
    "hyperclovax-no-norms": Variant(
        "HyperCLOVAX", "no norms after; four multipliers", {**GRANITE, "use_post_norm": False}
    ),
    "glm": Variant(
        "Glm",
        "interleaved RoPE on half of each head",
        {"rope_parameters": rope(partial_rotary_factor=0.5), "attention_bias": True},
    ),
    "glm4": Variant(
        "Glm4",
        "the same, with norms after",
        {"rope_parameters": rope(partial_rotary_factor=0.5), "attention_bias": False},
    ),
    "exaone4": Variant(
        "Exaone4",
        "global layers without positions",
        {"sliding_window": WINDOW, "sliding_window_pattern": 2},
    ),
    "exaone4-global": Variant(
        "Exaone4",
        "no window: every layer turns",
        {
            "sliding_window": None,
            "layer_types": types("GGG"),
            "rope_parameters": _LLAMA3,
        },
        {"layer_types": types("GGG")},
    ),
    "cohere": Variant(
        "Cohere",
        "attention and MLP side by side, layer norms, interleaved RoPE",
        {"logit_scale": 0.75, "tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
    "cohere-biases": Variant("Cohere", "biases", {"attention_bias": True, "logit_scale": 0.6}),
    "cohere-qk-norm": Variant(
        "Cohere",
        "layer norms of heads, each with weights of its own",
        {"use_qk_norm": True, "logit_scale": 0.75, "tie_word_embeddings": True},
    ),
    "cohere2": Variant(
        "Cohere2",
        "the same; local layers, and one without positions",
        {"sliding_window": WINDOW, "layer_types": types("LGL"), "logit_scale": 0.75},
        {"sliding_window_pattern": 2},
    ),
    "arcee": Variant("Arcee", "squared ReLU", {"attention_bias": True, "mlp_bias": True}),
    "apertus": Variant(
        "Apertus",
        "xIELU, norms of other names",
        {"rope_parameters": _LLAMA3, "attention_bias": True},
    ),
    "jais2": Variant("Jais2", "squared ReLU, layer norms with biases"),
    "jais2-no-biases": Variant(
        "Jais2", "biases of norms alone", {"attention_bias": False, "mlp_bias": False}
    ),
    "starcoder2": Variant(
        "Starcoder2", "GELU, layer norms with biases, windows", {"sliding_window": WINDOW}
    ),
    "starcoder2-no-biases": Variant(
        "Starcoder2", "no windows; biases of norms alone", {"use_bias": False, "hidden_act": "gelu"}
    ),
    "ernie4.5": Variant("Ernie4_5", "interleaved RoPE, biases", {"use_bias": True}),
    "hunyuan": Variant(
        "HunYuanDenseV1",
        "norms of heads behind RoPE; a base that alpha stretches",
        {
            "attention_bias": True,
            "rope_parameters": rope(rope_type="dynamic", alpha=50.0, factor=1.0),
        },
    ),
    "cwm": Variant(
        "Cwm",
        "local layers, llama3 scaling",
        {
            "sliding_window": WINDOW,
            "layer_types": types("GLL"),
            "rope_parameters": _LLAMA3,
        },
    ),
    "internlm3": Variant(
        "InternLM3",
        "biases under their own names",
        {"attention_bias": True, "mlp_bias": True},
        {"qkv_bias": True, "bias": True, "attention_bias": ..., "mlp_bias": ...},
    ),
    "helium": Variant(
        "Helium", "interleaved RoPE", {"num_key_value_heads": 4, "attention_bias": True}
    ),
    "seed-oss": Variant("SeedOss", "biases of queries, keys and values alone"),
    "nemotron": Variant(
        "Nemotron",
        "squared ReLU, layer norms of 1 + w, RoPE on half of each head",
        {"rope_parameters": rope(partial_rotary_factor=0.5), "norm_eps": 1e-5},
    ),
    "nemotron-biases": Variant(
        "Nemotron",
        "biases; all pairs turn",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": rope(partial_rotary_factor=1.0),
        },
    ),
    "phi": Variant(
        "Phi",
        "attention and MLP side by side, layer norms, a bias of the head",
        {"rope_parameters": rope(partial_rotary_factor=0.5)},
    ),
    "stablelm": Variant(
        "StableLm",
        "layer norms, biases of queries, keys and values, RoPE on a quarter of each head",
        {"use_qkv_bias": True, "rope_parameters": rope(partial_rotary_factor=0.25)},
    ),
    "stablelm-parallel": Variant(
        "StableLm",
        "attention and MLP side by side",
        {"use_parallel_residual": True, "rope_parameters": rope(partial_rotary_factor=0.5)},
    ),
    "stablelm-qk-norm": Variant(
        "StableLm",
        "layer norms of heads, each with weights of its own; attention and MLP side by side",
        {
            "qk_layernorm": True,
            "use_parallel_residual": True,
            "rope_parameters": rope(partial_rotary_factor=0.75),
        },
    ),
    "olmo": Variant("Olmo", "layer norms without weights"),
    "olmo-clip": Variant(
        "Olmo",
        "queries, keys and values within bounds; biases of attention",
        {"clip_qkv": 1.5, "attention_bias": True},
    ),
    "olmo-biases": Variant("Olmo", "biases of attention", {"attention_bias": True}),
    "nanochat": Variant(
        "NanoChat",
        "norms without weights, embeddings normed, RoPE the other way round, soft-caps",
        {"hidden_act": "relu2", "final_logit_softcapping": 6.0},
    ),
}

"""Which architectures there are, by the names that config.json gives them."""

from __future__ import annotations

from .cohere import COHERE_FAMILIES
from .conv import CONV_FAMILIES
from .dense import DENSE_FAMILIES
from .gateless import GATELESS_FAMILIES
from .gemma import GEMMA_FAMILIES
from .granite import GRANITE_FAMILIES
from .hybrid import HYBRID_FAMILIES
from .kimi import KIMI_FAMILIES
from .latent import LATENT_FAMILIES
from .layer_norm import LAYER_NORM_FAMILIES
from .llama4 import LLAMA4_FAMILIES
from .mamba import MAMBA_FAMILIES
from .mixture import MIXTURE_FAMILIES
from .muse import MUSE_FAMILIES
from .routed import ROUTED_FAMILIES
from .text_part import TEXT_PART_FAMILIES

_TABLES = (
    DENSE_FAMILIES,
    GRANITE_FAMILIES,
    GEMMA_FAMILIES,
    GATELESS_FAMILIES,
    COHERE_FAMILIES,
    LAYER_NORM_FAMILIES,
    ROUTED_FAMILIES,
    MIXTURE_FAMILIES,
    LLAMA4_FAMILIES,
    LATENT_FAMILIES,
    HYBRID_FAMILIES,
    KIMI_FAMILIES,
    CONV_FAMILIES,
    MAMBA_FAMILIES,
    MUSE_FAMILIES,
    TEXT_PART_FAMILIES,
)
FAMILIES = {name: family for table in _TABLES for name, family in table.items()}
assert len(FAMILIES) == sum(map(len, _TABLES)), "an architecture stands in two tables"

_INDEXER = "an indexer that chooses what is attended"
_STREAMS = "residual streams beside each other"
# Architectures with something that the decoder does not know, and with what.
REFUSED = {
    "RecurrentGemmaForCausalLM": "recurrent layers",
    "MiniMaxForCausalLM": "lightning attention layers",
    "MiMoV2FlashForCausalLM": "values of another size than keys",
    "Qwen4ExpForCausalLM": f"{_INDEXER}, and {_STREAMS}",
    "Qwen4ExpForConditionalGeneration": f"{_INDEXER}, and {_STREAMS}",
    "HYV4ForCausalLM": f"{_INDEXER}, and {_STREAMS}",
    "DeepseekV32ForCausalLM": _INDEXER,
    "GlmMoeDsaForCausalLM": _INDEXER,
    "Dots3NoteForCausalLM": _INDEXER,
    "AXK2ForCausalLM": _INDEXER,
    "Glm5NextForConditionalGeneration": f"{_INDEXER}, and {_STREAMS}",
    "ZayaForCausalLM": "convolutions over queries and keys",
}

"""Which architectures there are, by the names that config.json gives them."""

from __future__ import annotations

from .cohere_families import COHERE_FAMILIES
from .conv_families import CONV_FAMILIES
from .families import DENSE_FAMILIES
from .gateless_families import GATELESS_FAMILIES
from .gemma_families import GEMMA_FAMILIES
from .granite_families import GRANITE_FAMILIES
from .hybrid_families import HYBRID_FAMILIES
from .latent_families import LATENT_FAMILIES
from .layer_norm_families import LAYER_NORM_FAMILIES
from .mamba_families import MAMBA_FAMILIES
from .mixture_families import MIXTURE_FAMILIES
from .muse_families import MUSE_FAMILIES
from .routed_families import ROUTED_FAMILIES
from .text_part_families import TEXT_PART_FAMILIES

_TABLES = (
    DENSE_FAMILIES,
    GRANITE_FAMILIES,
    GEMMA_FAMILIES,
    GATELESS_FAMILIES,
    COHERE_FAMILIES,
    LAYER_NORM_FAMILIES,
    ROUTED_FAMILIES,
    MIXTURE_FAMILIES,
    LATENT_FAMILIES,
    HYBRID_FAMILIES,
    CONV_FAMILIES,
    MAMBA_FAMILIES,
    MUSE_FAMILIES,
    TEXT_PART_FAMILIES,
)
FAMILIES = {name: family for table in _TABLES for name, family in table.items()}
assert len(FAMILIES) == sum(map(len, _TABLES)), "an architecture stands in two tables"

# Architectures that keep a state which the decoder does not know, and in what.
UNKNOWN_STATES = {
    "OlmoHybridForCausalLM": "Gated DeltaNet layers of another make",
    "KimiLinearForCausalLM": "Kimi Delta Attention layers",
    "JambaForCausalLM": "Mamba layers",
    "RecurrentGemmaForCausalLM": "recurrent layers",
    "MiniMaxForCausalLM": "lightning attention layers",
}

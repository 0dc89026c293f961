"""The matrix of models: one entry for each small checkpoint that the tests make and compare with
transformers, in float32, in both layouts of config.json.

Adding a family is an entry in one of offload's files of families and one in variants_dense.py,
variants_routed.py or variants_hybrid.py. docs/models.md is made from both:

    python tests/model_matrix.py
"""

from __future__ import annotations

from pathlib import Path

from variants_dense import DENSE_VARIANTS
from variants_hybrid import HYBRID_VARIANTS
from variants_routed import ROUTED_VARIANTS

VARIANTS = {**DENSE_VARIANTS, **ROUTED_VARIANTS, **HYBRID_VARIANTS}


def page() -> str:
    """docs/models.md."""
    from ebbtide.offload.families.architectures import FAMILIES, REFUSED

    made = {name: [] for name in FAMILIES}
    for name, variant in VARIANTS.items():
        made[f"{variant.architecture}ForCausalLM"].append(f"`{name}`: {variant.shows}")
    lines = [_HEAD]
    for architecture, family in FAMILIES.items():
        same = "the text model" if family.text_config else "the same model"
        checked = "; ".join(made[architecture]) or f"{same}, under the names of its files"
        lines.append(f"| {family.title} | `{architecture}` | {family.features} | {checked} |")
    lines.append(_gguf())
    lines += [_AFTER, *(f"| {' | '.join(row)} |" for row in _PACKED), _PACKED_AFTER]
    lines += [f"* `{name}`: {what}" for name, what in REFUSED.items()]
    return "\n".join(lines) + "\n"


def _gguf() -> str:
    """Which architectures of GGUF files are read."""
    from ebbtide.offload.gguf.config import ARCHITECTURES

    return _GGUF.format(", ".join(f"`{name}`" for name in ARCHITECTURES))


_GGUF = """
GGUF files of these architectures, by the names that llama.cpp gives them:
{}.
A file of a small checkpoint has its folder's logits to the bit (`tests/test_gguf_model.py`), and
those that llama.cpp computes within the rounding of float32 ([log.md](log.md)). Q8_0, Q4_0 and
MXFP4 are kept as they are, Q4_K and Q4_1 in four bits with scales and offsets in float16; what else
is decoded is kept in the bits that are asked for, 8 by default (IQ1 to IQ3, TQ and NVFP4 by the
`gguf` package, all others by the compiled kernels). Tokenizers are
byte-level BPE, whose pre-tokenizer's name must be known, and SentencePiece's BPE. Windows that a
file says and llama.cpp leaves out (Mistral, Phi-3) are kept to, and gpt-oss's yarn is not cut to
whole numbers, as in the original models."""

_HEAD = """\
# Models

Made from the families in `offload/families/` and from `tests/model_matrix.py` by
`python tests/model_matrix.py`; a test says when this page is stale. "Checked" names the small
random checkpoints of an architecture, and what would show in them. Each is compared with
transformers in float32: prefill in cells and decode token by token, full pages and pages of 8 bits,
both layouts of config.json, texts longer than the windows, sessions resumed, forked and truncated.
Text parts are compared with the whole model, given text alone (`tests/test_text_parts.py`),
or are a text model of this table under longer names.

| models | architecture in config.json | what sets it apart | checked |
|---|---|---|---|"""

_AFTER = """
RoPE scalings: linear, llama3, yarn, dynamic, longrope. The last two depend on the length of the
text and are fixed when a session opens: for `--context`, else for what a request with a known
number of new tokens needs, else for the model's limit; never for what happens to fit.

Experts: every expert that the router chose for a token is multiplied, and no other. Where not all
of them fit in memory, those that are chosen are read. gpt-oss's are kept as its files have them, in
MXFP4. Routers stay in the file's own precision when weights are quantised, and so do the
projections from which decays and gains are made in Gated DeltaNet, Kimi Delta Attention and
Mamba's scan.

## Models that are quantised in their files

A folder of any family above may hold matrices that another program has quantised. Which ones are
is seen by their tensors; all else is as in other folders. `ebbtide plan` says how they are kept.
"""

# What is quantised in the files: the method in config.json, what it is, and how it is kept.
_PACKED = (
    ("in config.json", "what is in the files", "kept as"),
    ("---", "---", "---"),
    (
        "`awq`",
        '4 bits, the "gemm" version, groups of 32, 64, 128 or more inputs, or whole rows',
        "the codes, scales and zeros of the files, 5 bits per weight",
    ),
    (
        "`gptq`, both versions",
        "4 bits",
        "the same; where `sym` is true without zeros, 4.5 bits per weight",
    ),
    ("`gptq` with `desc_act`", "4 or 8 bits; inputs of a group lie apart", "decoded"),
    (
        "`gptq`",
        "8 bits",
        "where `sym` is true the codes and scales of the files, 8.5 bits per weight (-128 becomes "
        "-127); else decoded",
    ),
    (
        "`compressed-tensors`, pack-quantized",
        "4 or 8 bits, with zeros or without, groups or whole rows; also with `weight_g_idx`",
        "as of GPTQ",
    ),
    (
        "`compressed-tensors`, int-quantized",
        "int8 weights",
        "the codes and scales of the files, 8.5 bits per weight",
    ),
    (
        "`compressed-tensors`, float-quantized; `fbgemm_fp8`; `modelopt` FP8",
        "float8 (E4M3), a scale for all, for each output or for blocks",
        "decoded",
    ),
    (
        "`fp8`",
        "float8 (E4M3), a scale for each block or for all, float32 or a power of two; experts of a "
        "layer in one tensor too",
        "decoded",
    ),
    ("`mxfp4`", "gpt-oss's experts", "the codes and scales of the files, 4.5 bits per weight"),
)

_PACKED_AFTER = """
"The codes and scales of the files" are exact where float16 has the scales: AWQ's and GPTQ's are
float16, bfloat16 ones fit from 2**-14 up; smaller ones lose bits, and what is below 2**-25 is zero.
They stay whatever `--weight-bits` says, but that codes of 8 bits become 4 where it says so. What is
decoded has the bits that `--weight-bits` says: 8 by `auto`, also in small models, and numbers of 16
bits by `full` (float8's as bfloat16). Activations are rounded to 8 bits by all products with codes;
scales of activations in the files are not used.

Groups that are no multiple of 32 inputs are decoded too. A quantised output head or embedding is
refused, and so are, by name: bitsandbytes, HQQ, AQLM and all methods that the table lacks; other
numbers of bits; AWQ's "gemv" versions; NVFP4, and MXFP4 of other families; sparse weights;
transforms of activations; GPTQ models whose modules differ (`dynamic`). Use the unquantised model
in place of these: `--weight-bits 8` or `4` quantises it while loading.

Checked: each row of the table in small random checkpoints, packed by a program of the tests' own
from what the formats say, against transformers with the same numbers in float32, and float8 against
what transformers reads. AutoAWQ's and compressed-tensors' own unpacking, once, gave our numbers
where both were rounded alike.

## Not yet

Refused by name are these architectures, for what they have and the decoder does not know:
"""


if __name__ == "__main__":
    path = Path(__file__).parent.parent / "docs" / "models.md"
    path.write_text(page(), encoding="utf-8")
    print(f"wrote {path}")

"""Every entry of the matrix: logits are transformers', pages of 8 bits cost next to nothing, and
neither tiers nor streamed weights nor the pieces of a session change a bit.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_matrix import VARIANTS, page
from random_checkpoints import reference_logits
from small_llm import TINY, open_small

from ebbtide.kernels import dispatch
from ebbtide.offload.families.architectures import FAMILIES
from ebbtide.offload.layers.decoder import Decoder
from ebbtide.offload.planning.plan import Loaded
from ebbtide.offload.weights.weights import LayerTensors

NUM_TOKENS = 200  # six cells of 32, and four times a window
PREFILLED = 140  # the rest goes through decode, and crosses two borders of cells
IDS = torch.randint(0, 256, (NUM_TOKENS,), generator=torch.Generator().manual_seed(4)).tolist()


# Whose weights have 8 bits while they are streamed, beside those of mixtures.
QUANTISED = ("mixtral", "phi3", "glm4", "gemma2", "gemma3n")


def tolerance(logits: torch.Tensor) -> float:
    """Two float32 programs that sum in another order differ by rounding alone."""
    return 2e-4 * max(1.0, logits.abs().max().item())


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(checkpoint, tmp_path, name):
    folder = checkpoint(name)
    expected = reference_logits(folder, IDS)
    with open_small(folder, tmp_path, "full", **TINY) as llm:
        full = llm.logits(IDS)
        decoded = llm.logits(IDS, prefill_tokens=PREFILLED)
    assert (full - expected).abs().max() <= tolerance(expected)
    assert (decoded - expected).abs().max() <= tolerance(expected)
    # 8 bits of a peaked random model cost little. Where experts are chosen, another choice of one
    # of them in a hundred rows may cost more than all the rest.
    with open_small(folder, tmp_path, "8", **TINY) as llm:
        coarse = llm.logits(IDS, prefill_tokens=PREFILLED).log_softmax(-1)
    full = full.log_softmax(-1)
    kl = (full.exp() * (full - coarse)).sum(-1)
    assert kl.median() < 1e-3
    assert kl.max() > 0  # pages were sealed: the runs are not the same one


def keep_nothing(llm) -> None:
    """Every layer and the head are streamed, and every page goes to disk."""
    original, streamed = llm.admission.plan, Loaded(llm.config.num_layers, False)

    def plan(context, sequences=1, **request):
        plan = original(context, sequences, **{**request, "loaded": streamed})
        num_spans = 10 * (plan.num_spans + plan.layers_streamed)  # with room for forks
        return replace(
            plan,
            far_spans={**plan.far_spans, "host": 0, "disk": num_spans},
            disk={**plan.disk, "far planes": num_spans * llm.geometry.span_bytes},
        )

    llm.admission.plan = plan


@pytest.mark.parametrize("name", VARIANTS)
def test_neither_tiers_nor_streaming_nor_sessions_change_a_bit(checkpoint, tmp_path, name):
    """All weights streamed, all pages on disk, and a session that went another way for a while."""
    bits = "8" if "moe" in name or name in QUANTISED else "full"
    with open_small(checkpoint(name), tmp_path, weight_bits=bits, **TINY) as llm:
        expected = llm.logits(IDS, prefill_tokens=PREFILLED)
    with open_small(checkpoint(name), tmp_path, weight_bits=bits, **TINY) as llm:
        llm._context = NUM_TOKENS
        keep_nothing(llm)
        with llm.session() as session:
            session.append(IDS[:45])
            session.last_logits()
            session.take_snapshot()
            with session.fork() as other:
                other.append(IDS[45:PREFILLED])
                rows = [other.last_logits()]
                rows += [other.decode(token) for token in IDS[PREFILLED:]]
            session.append(list(reversed(IDS[:80])))
            session.last_logits()
            session.truncate(45)
            session.append(IDS[45:PREFILLED])
            assert torch.equal(session.last_logits(), rows[0])
            assert llm.admission.weights.bytes_streamed > 0
            assert session._runtime.store.stats.bytes_read["disk"] > 0
    assert torch.equal(torch.stack(rows), expected[PREFILLED - 1 :])


@pytest.mark.parametrize("codec", ["8", "8, packed", "full"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_row_has_its_bits_however_the_text_was_cut(
    checkpoint, tmp_path, monkeypatch, name, codec
):
    """Of a cell only the rows that are new are attended, and in the end only the last one. Packed:
    as where that is faster, on any machine."""
    if codec == "8, packed":
        monkeypatch.setattr(dispatch, "byte_products", lambda: True)
    with open_small(checkpoint(name), tmp_path, codec.removesuffix(", packed"), **TINY) as llm:
        expected = torch.empty(NUM_TOKENS, llm.config.residual_size)

        def keep(cell: int, x: torch.Tensor, new: slice) -> None:
            expected[cell * TINY["cell_tokens"] :][new] = x[new]

        def prefill(stops: list[int], on_rows=None) -> list[torch.Tensor]:
            with llm.open_session(NUM_TOKENS, sequences=1, text=False) as session:
                sequence = session._sequence
                sequence.tokens.extend(IDS)
                return [session._engine.prefill(sequence, on_rows, stop_at=s) for s in stops]

        prefill([NUM_TOKENS], keep)
        stops = [1, 2, 5, 31, 32, 33, 64, 65, 95, 97, 160, 199, NUM_TOKENS]
        for stop, row in zip(stops, prefill(stops), strict=True):
            assert torch.equal(row[0], expected[stop - 1])


@pytest.mark.parametrize(
    "name",
    [
        *("gemma2", "gemma3n", "olmo2", "phi3", "ministral3", "smollm3"),
        *("afmoe", "deepseek-v2-moe", "mistral4-moe"),
    ],
)
def test_queries_alone_are_those_of_the_layer(checkpoint, tmp_path, name):
    """What rehearses a layer must compute what the layer will: to the bit."""
    with open_small(checkpoint(name), tmp_path, **TINY) as llm:
        shape = 32, llm.config.residual_size
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        llm.logits(IDS[:3])
        decoder = Decoder(llm.config, llm.device)
        for layer in range(llm.config.num_layers):
            w = llm.admission.weights.layer(layer)
            predicted = decoder.predicted(w, x, slice(0, 32))
            q, *_ = decoder.project(layer, w, predicted, slice(0, 32), 96)
            needed = (
                "altup.",
                "self_attn.q_",
                "self_attn.k_b_",
                f"{llm.config.norms_of(layer).before_attention}.",
            )
            w = LayerTensors((n, tensor) for n, tensor in w.items() if n.startswith(needed))
            assert torch.equal(decoder.queries(layer, w, x, slice(0, 32), 96), q)


def test_the_page_of_models_is_what_the_matrix_says():
    path = Path(__file__).parent.parent / "docs" / "models.md"
    stale = "docs/models.md is stale: run python tests/model_matrix.py"
    assert path.read_text(encoding="utf-8") == page(), stale


def test_every_architecture_has_a_variant_or_is_a_text_part():
    made = {f"{variant.architecture}ForCausalLM" for variant in VARIANTS.values()}
    names = {name for name, family in FAMILIES.items() if not family.text_config}
    # Another name of one that has a variant: test_recurrent.py compares what both are read as.
    again = {name for name in names - made if any(FAMILIES[name] is FAMILIES[n] for n in made)}
    assert made == names - again

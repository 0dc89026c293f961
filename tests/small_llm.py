"""Opens a model with small pages, and decides what share of them is in memory.

Not tests. Small sizes make many pages seal within a test's length.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ebbtide import LLM, Budget
from ebbtide.kernels.layout import PageLayout
from ebbtide.offload.mode import Mode
from ebbtide.offload.models.model_files import open_model_files
from ebbtide.offload.options import Options
from ebbtide.offload.pages.geometry import (
    Geometry,
    choose_finer_layers,
    make_geometry,
    shaped_pages,
)
from ebbtide.offload.planning.plan import Loaded
from ebbtide.offload.running.scoring import output_bytes
from ebbtide.offload.weights.expert_cache import fewest_slots

PAGE_TOKENS, CELL_TOKENS, SPAN_TOKENS = 16, 64, 128
# Cells so small that a window of 48 tokens reaches back into sealed pages.
TINY = {"page_tokens": 8, "cell_tokens": 32, "span_tokens": 64}


def small_geometry(
    folder: Path,
    codec: str = "8",
    *,
    page_tokens: int = PAGE_TOKENS,
    cell_tokens: int = CELL_TOKENS,
    span_tokens: int = SPAN_TOKENS,
    rotate: bool = False,
    selects: bool = False,
    dtype: str = "auto",
) -> Geometry:
    """codec: full, 8, 6 or 4, as --kv-bits has them. dtype: of raw keys and values; auto: the
    model's."""
    config = open_model_files(Path(folder)).config()
    if dtype != "auto":
        config = replace(config, dtype=dtype)
    bits = {"8": (8, 8), "6": (6, 6), "4": (5, 4)}.get(codec, (8, 8))
    layout = PageLayout(
        config.num_kv_heads,
        config.page_dim,
        page_tokens,
        2 if cell_tokens >= 2 * page_tokens else 1,
        codec="full" if codec == "full" else "quantised",
        key_bits=bits[0],
        value_bits=bits[1],
        near_bits=2,
        value_means=selects,
        rotate=rotate,
        raw_dtype=getattr(torch, config.dtype),
        shared_from=config.values_from,
    )
    pages = shaped_pages(config, layout)
    if len(set(pages)) > 1:  # of other shapes than the first more, as in larger models
        count = min(2 * layout.pages_per_record, cell_tokens // page_tokens)
        pages = [p if p == pages[0] else replace(p, pages_per_record=count) for p in pages]
        geometry = make_geometry(cell_tokens, span_tokens, pages)
    else:
        geometry = Geometry(cell_tokens, span_tokens, layout)
    return replace(geometry, finer_layers=choose_finer_layers(config) if selects else ())


def open_small(
    folder: Path,
    spill_dir: Path,
    codec: str = "8",
    *,
    weight_bits="full",
    store=None,
    mode: Mode | None = None,
    draft: bool = True,
    dtype: str = "auto",
    **geometry,
) -> LLM:
    """An LLM with small pages; `store` is what PageStore takes besides (overlap, ...)."""
    mode = mode or Mode()
    return LLM(
        Options(
            model=folder,
            budget=Budget(host_memory="8GiB", disk_memory="1GiB"),
            spill_dir=spill_dir,
            weight_bits=weight_bits,
            dtype=dtype,
            mode=mode.name,
            draft=draft,
        ),
        geometry=small_geometry(folder, codec, selects=mode.selects, dtype=dtype, **geometry),
        mode=mode,
        **(store or {}),
    )


def open_spilling(
    folder: Path, spill_dir: Path, *, context: int, share: float = 0.3, **options
) -> LLM:
    """One with TINY pages for sessions of `context` tokens. share: of the far planes in memory,
    where nothing is guessed; at 0.3 most of that is needed to select pages for guesses."""
    llm = open_small(folder, spill_dir, **{**TINY, **options})
    llm._context = context
    keep_in_memory(llm, context, share, sequences=4, text=True)
    return llm


def keep_in_memory(
    llm: LLM,
    context: int,
    share: float,
    *,
    sequences: int = 1,
    text: bool = False,
    at_home: bool = False,
) -> None:
    """Set the host budget so that about `share` of the far planes of `context` tokens fit.

    sequences, text: as the request will have them; `logits` asks for one sequence and no text.
    at_home: that share lies there in modes that select too, since the disk has no room for it.
    """
    llm.admission.limits = replace(llm.admission.limits, runtime_bytes=0, host_bytes=1 << 34)
    if share < 1:
        output = 0 if text else output_bytes(llm.config.vocab_size, context)
        request = dict(text=text, output_bytes=output)
        llm.admission.keep_in_memory(share, context, sequences, **request)
        if at_home:
            plan = llm.admission.plan(context, sequences, **request)
            room = plan.disk["far planes"] - int(share * plan.num_spans) * llm.geometry.span_bytes
            llm.admission.limits = replace(llm.admission.limits, disk_bytes=room)
            plan = llm.admission.plan(context, sequences, **request).raise_if_unfit()
            assert plan.far_spans["host"] and plan.far_spans["disk"]


def hold(llm, loaded: Loaded, **more) -> None:
    """Weights lie so from now on, whatever the budget. more: of each Request."""
    original = llm.admission.request

    def request(context, sequences=1, **said):
        return original(context, sequences, **{**said, "loaded": loaded, **more})

    llm.admission.request = request


def hold_few_experts(llm, **more) -> None:
    """As few routed experts in memory as a token needs. more: of each Request."""
    slots = fewest_slots(max(e.chosen for e in llm.config.experts if e is not None))
    hold(llm, Loaded(0, True, slots), **more)

"""The plan: what it promises holds, more budget never fits less, and what is missing is named."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plans_under_test import MODELS, MiB, facts_of, model, routed_model
from random_checkpoints import make
from small_llm import open_small

from ebbtide import LLM, Budget
from ebbtide.offload.errors import ContextOverflow, DoesNotFit
from ebbtide.offload.mode import Mode
from ebbtide.offload.models import checkpoint as checkpoint_module
from ebbtide.offload.pages.geometry import choose_geometry
from ebbtide.offload.pages.page_table import Tier
from ebbtide.offload.planning.budget import Limits
from ebbtide.offload.planning.filling import WRITE_BUFFERS
from ebbtide.offload.planning.operations import reading_operations
from ebbtide.offload.planning.page_spans import PageSpans
from ebbtide.offload.planning.plan import Plan, Request
from ebbtide.offload.planning.planner import make_plan

FACTS = {(name, bits): facts_of(m, bits) for name, m in MODELS.items() for bits in (None, 8, 4)}
KV_BITS = [("full", False), *((bits, selects) for bits in "864" for selects in (False, True))]


@st.composite
def plans(draw):
    """(facts, geometry, limits, request), with budgets around what is needed."""
    facts = FACTS[draw(st.sampled_from(list(FACTS)))]
    kv_bits, selects = draw(st.sampled_from(KV_BITS))
    geometry = choose_geometry(facts.config, kv_bits, selects=selects)
    size = st.integers(0, 600).map(lambda n: n * MiB // 2)
    limits = Limits(
        device_bytes=draw(st.none() | size),
        host_bytes=draw(size) + 100 * MiB,
        disk_bytes=draw(st.just(0) | size),
        runtime_bytes=draw(st.integers(0, 100)) * MiB,
    )
    request = Request(
        context=draw(st.integers(1, facts.config.max_positions)),
        sequences=draw(st.sampled_from([1, 4])),
        text=draw(st.booleans()),
    )
    return facts, geometry, limits, request


def test_what_fits_is_no_more_than_the_largest_that_does():
    """In the middle of a cell too, of which the end does not fit."""
    facts = facts_of(MODELS["small"], None)
    geometry = choose_geometry(facts.config, "6", selects=True)

    def planned(host_bytes: int) -> Plan:
        limits = Limits(None, host_bytes, 0, 100 * MiB)
        return make_plan(facts, geometry, limits, Request(4609))

    few, enough = 0, 1 << 30
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if planned(middle).fits else (middle, enough)
    assert planned(enough).largest_context == 4609
    assert planned(few).largest_context <= 4608


@given(plans())
def test_what_fits_is_within_every_budget(case):
    plan = make_plan(*case)
    limits = case[2]
    for tier in ("device", "host", "disk"):
        items = getattr(plan, tier)
        assert (items is None) == (tier == "device" and limits.device_bytes is None)
        assert all(isinstance(n, int) and n >= 0 for n in (items or {}).values())
        if plan.fits and items is not None:
            assert sum(items.values()) <= plan.budget_bytes[tier]
    if plan.fits:
        assert plan.raise_if_unfit() is plan and plan.shortage is None
        assert sum(plan.far_spans.values()) == plan.num_spans
        assert plan.context <= plan.largest_context
    else:
        with pytest.raises(DoesNotFit) as caught:
            plan.raise_if_unfit()
        error = caught.value
        assert error.tier in ("device", "host", "disk")
        assert error.needed_bytes > error.available_bytes == plan.budget_bytes[error.tier]
        assert (error.largest_context or 0) < plan.context


@given(plans(), st.booleans())
def test_what_is_said_to_be_needed_of_memory_is_enough_and_not_too_much(case, routed):
    facts, geometry, limits, request = case
    if routed:
        facts = facts_of(routed_model(), facts.weight_bits)
    limits = replace(limits, device_bytes=None, host_bytes=MiB, disk_bytes=1 << 40)
    shortage = make_plan(facts, geometry, limits, request).shortage
    needed = shortage["needed_bytes"]
    assert shortage["tier"] == "host"

    def fits(host_bytes: int) -> bool:
        return make_plan(facts, geometry, replace(limits, host_bytes=host_bytes), request).fits

    assert fits(needed)
    # What is at hand of pages and how many cells a sweep takes are chosen by what there is.
    assert not fits(int(0.98 * needed) - MiB)


def test_what_experts_are_said_to_need_is_with_the_head_where_it_takes_less():
    """A small head takes less than reading it does."""
    facts = facts_of(routed_model(), None)
    geometry = choose_geometry(facts.config, "full", selects=False)

    def planned(host_bytes: int) -> Plan:
        return make_plan(facts, geometry, Limits(None, host_bytes, 1 << 40, 0), Request(513))

    needed = planned(MiB).shortage["needed_bytes"]
    assert planned(needed).fits and not planned(int(0.98 * needed) - MiB).fits


@given(plans(), st.sampled_from(["device_bytes", "host_bytes", "disk_bytes"]), st.integers(1, 400))
def test_more_budget_never_fits_less(case, tier, more):
    facts, geometry, limits, request = case
    assume(getattr(limits, tier) is not None)
    one = make_plan(*case)
    larger = replace(limits, **{tier: getattr(limits, tier) + more * MiB // 4})
    other = make_plan(facts, geometry, larger, request)
    assert other.fits or not one.fits
    assert other.largest_context >= one.largest_context


@given(plans())
def test_the_largest_context_fits_and_a_cell_more_does_not(case):
    facts, geometry, limits, request = case
    largest = make_plan(*case).largest_context

    def fits(tokens):
        return make_plan(facts, geometry, limits, replace(request, context=tokens)).fits

    if largest:
        assert fits(largest)
    assert largest == facts.config.max_positions or not fits(largest + geometry.cell_tokens)


def a_plan(context=20_000, host=1024, disk=1024, device=None, bits=None, kv_bits="8", **request):
    facts = facts_of(MODELS["small"], bits)
    limits = Limits(device and device * MiB, host * MiB, disk * MiB, 50 * MiB)
    geometry = choose_geometry(facts.config, kv_bits)
    return make_plan(facts, geometry, limits, Request(context, **request))


def least_host(context: int) -> int:
    """MiB with which everything but far planes fits, no weights streamed."""
    roomy = a_plan(context, host=4096)
    span = roomy.kv_far_bytes // roomy.num_spans
    staged = roomy.staging_slots + WRITE_BUFFERS + 1
    return (roomy.fixed_host_bytes + staged * span) // MiB + 1


def selecting_plan(host: int, disk: int = 1024, device: int | None = None, context: int = 60_000):
    """Budgets in MiB."""
    facts = facts_of(MODELS["small"])
    geometry = choose_geometry(facts.config, "8", selects=True)
    limits = Limits(device and device * MiB, host * MiB, disk * MiB, 50 * MiB)
    return make_plan(facts, geometry, limits, Request(context)), geometry


@given(st.integers(140, 200), st.integers(0, 80))
def test_memory_is_for_hot_pages_where_pages_are_selected(host, disk):
    """As far as the disk takes the far planes; a fixed share of those is at hand at least."""
    plan, geometry = selecting_plan(host, disk)
    record = geometry.layout.record_bytes
    assert plan.host["hot pages"] == plan.hot_records * record
    on_disk = plan.far_spans["disk"]
    assert plan.hot_records <= max(1, on_disk) * geometry.records_per_span
    assert (plan.hot_records > 0) == (on_disk > 0)
    if not plan.fits or not on_disk:
        return
    assert plan.hot_records >= plan.num_spans * geometry.records_per_span // 10
    if plan.far_spans["host"]:  # only where the disk is full
        assert (disk * MiB - sum(plan.disk.values())) < geometry.span_bytes
    all_hot = plan.hot_records == on_disk * geometry.records_per_span
    assert all_hot or host * MiB - sum(plan.host.values()) < geometry.span_bytes


@pytest.mark.parametrize("selects", [False, True])
@pytest.mark.parametrize("sequences", [1, 4])
def test_more_memory_never_streams_more_weights(selects, sequences):
    facts = facts_of(MODELS["deep"])
    geometry = choose_geometry(facts.config, "8", selects=selects)
    before = len(facts.layer_sizes)
    for half_mib in range(380, 620, 4):
        limits = Limits(None, half_mib * MiB // 2, 4096 * MiB, 50 * MiB)
        plan = make_plan(facts, geometry, limits, Request(12_000, sequences))
        if plan.fits:
            assert plan.layers_streamed <= before
            before = plan.layers_streamed
    assert before == 0


def test_windows_are_attended_whole_and_memory_keeps_them_before_hot_pages():
    config = replace(MODELS["small"], windows=(4096, 4096, 4096, None))
    geometry, request = choose_geometry(config, "8", selects=True), Request(60_000)
    of_windows = PageSpans(config, geometry, request.context, 1).of_windows(1)
    for mib, keeps_windows in ((145, True), (135, False)):
        limits = Limits(None, mib * MiB, 1024 * MiB, 50 * MiB)
        plan = make_plan(facts_of(config), geometry, limits, request)
        fewest = plan.num_spans * geometry.records_per_span // 10
        assert plan.fits and plan.far_spans["disk"] and plan.sweep_cells == 1
        assert (plan.far_spans["host"] == of_windows) == keeps_windows
        # What makes no span is for hot pages in any case.
        more = plan.hot_records - fewest
        assert (more >= geometry.records_per_span) == keeps_windows


def test_a_token_reads_of_a_layer_with_a_window_its_last_spans():
    limits, reads = Limits(None, 1 << 34, 0, 50 * MiB), []
    for windows in ((None,) * 4, (4096, None, 4096, None)):
        config = replace(MODELS["small"], windows=windows)
        geometry = choose_geometry(config, "8")
        plan = make_plan(facts_of(config), geometry, limits, Request(60_000))
        read = plan.decode_bytes["host"] - plan.host["near planes"]
        reads.append(round(read / geometry.span_bytes))
    spans = geometry.num_spans(60_000)
    assert reads[0] - reads[1] == 2 * (spans - 4096 // geometry.span_tokens - 2)
    # What grows with the text is of the other two.
    growing = plan.decode_page_bytes["host"] - plan.host["near planes"]
    assert round(growing / geometry.span_bytes) == 2 * spans


def test_all_far_planes_lie_in_memory_where_they_fit():
    plan, _ = selecting_plan(1024)
    assert (plan.far_spans["disk"], plan.hot_records) == (0, 0)


def test_a_device_keeps_far_planes_where_pages_are_selected():
    plan, _ = selecting_plan(host=75, device=85)
    assert plan.far_spans["device"] and plan.far_spans["disk"] and not plan.far_spans["host"]
    assert plan.hot_records


def test_without_a_disk_memory_is_what_lacks():
    host = least_host(60_000)
    plan = a_plan(60_000, host=host, disk=0)
    with pytest.raises(DoesNotFit) as caught:
        plan.raise_if_unfit()
    error = caught.value
    assert (error.tier, error.available_bytes) == ("host", host * MiB)
    assert error.largest_context == plan.largest_context
    assert f"At most {plan.largest_context:,} tokens fit" in str(error)
    assert "60,000 tokens of a-model" in str(error) and "--host-memory" in str(error)
    assert "make room on disk (--spill-dir, --disk-memory)" in str(error)
    assert error.exit_code == 3
    assert error.fields()["needed_bytes"] == error.needed_bytes
    # What is said to be needed is enough.
    enough = Limits(None, error.needed_bytes, 0, 50 * MiB)
    facts = facts_of(MODELS["small"])
    assert make_plan(facts, choose_geometry(facts.config, "8"), enough, Request(60_000)).fits


@settings(max_examples=30)
@given(
    context=st.integers(1, 60_000),
    sequences=st.integers(1, 4),
    host=st.integers(1, 200),
    selects=st.booleans(),
)
def test_without_a_disk_what_is_said_to_be_needed_is_enough(context, sequences, host, selects):
    facts = facts_of(MODELS["small"])
    geometry = choose_geometry(facts.config, "8", selects=selects)
    request = Request(context, sequences=sequences)
    plan = make_plan(facts, geometry, Limits(None, host * MiB, 0, 50 * MiB), request)
    if plan.fits:
        return
    with pytest.raises(DoesNotFit) as caught:
        plan.raise_if_unfit()
    enough = Limits(None, caught.value.needed_bytes, 0, 50 * MiB)
    assert make_plan(facts, geometry, enough, request).fits


def test_a_disk_is_no_help_where_memory_lacks_for_what_never_spills():
    with pytest.raises(DoesNotFit) as caught:
        a_plan(60_000, host=1, disk=0).raise_if_unfit()
    assert caught.value.tier == "host" and "on disk" not in str(caught.value)
    assert "1 token DOES NOT FIT (model's limit 65,536, no context fits)" in str(a_plan(1, host=1))


def test_a_plan_without_a_disk_has_no_ceiling_for_what_should_lie_there():
    plan = replace(a_plan(60_000, host=least_host(60_000), disk=0), bandwidth={"host": 1e10})
    assert plan.decode_bytes["disk"] and plan.decode_ceiling_tokens_per_s is None
    assert "DO NOT FIT" in str(plan) and "at most" not in str(plan)
    fits = replace(a_plan(60_000), bandwidth={"host": 1e10, "disk": 1e9})
    assert fits.decode_ceiling_tokens_per_s > 0


def test_a_plan_says_what_is_to_be_known_of_the_disks_speed():
    speeds = {"host": 1e10, "disk": 1e9}
    assert a_plan(disk=1).disk_caveat == "" and "its speed" not in str(a_plan(disk=1))  # of none
    assert replace(a_plan(disk=64), bandwidth=speeds).disk_caveat == ""
    little = replace(a_plan(disk=63), bandwidth=speeds)
    assert "less certain than usual: --disk-memory allows 63.0 MiB" in str(little)
    off = replace(a_plan(disk=0), bandwidth={"host": 1e10})
    assert "disk    its speed is not measured" in str(off)
    assert off.to_dict()["disk_caveat"] == off.disk_caveat


def seen_by_hand(tokens: int, window: int | None, chunked: bool) -> int:
    first = [
        0 if window is None else at - at % window if chunked else max(0, at - window + 1)
        for at in range(tokens)
    ]
    return sum(at - start + 1 for at, start in enumerate(first))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_the_operations_of_reading_are_those_of_its_products(tokens, chunked):
    """Of every layer but the last, which does not all of its work."""
    config = replace(MODELS["small"], chunked=chunked)
    config = replace(config, windows=(64, *config.windows[1:]))
    facts = facts_of(config)
    found = reading_operations(facts, tokens)
    layers = range(config.num_layers - 1)
    q, kv = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    a_layer = config.hidden_size * (2 * q + 2 * kv + 3 * config.intermediate_size)
    assert found["weights"] == 2 * tokens * a_layer * len(layers)
    seen = sum(seen_by_hand(tokens, config.windows[layer], chunked) for layer in layers)
    assert found["pages"] == 2 * 2 * q * seen


def test_of_experts_those_that_are_chosen_are_multiplied():
    config = routed_model()
    facts = facts_of(config)
    experts = config.experts[0]
    fewer = replace(facts, config=replace(config, experts=(replace(experts, chosen=1),) * 99))
    matrices = [
        n for n, s in facts.shapes.items() if len(s) == 2 and n.startswith("model.layers.0")
    ]
    routed = sum(math.prod(facts.shapes[n]) for n in matrices if ".experts." in n)
    saved = facts.prefill_numbers - fewer.prefill_numbers
    assert saved == (config.num_layers - 1) * routed * (experts.chosen - 1) // experts.count


def test_reading_takes_its_operations_or_the_disks_time():
    plan = a_plan(60_000, host=least_host(60_000))
    assert plan.prefill_least_s is None and plan.far_spans["disk"]
    speeds = {"weights": 1e9, "pages": 2e9}
    fast = replace(plan, operations_per_s=speeds, bandwidth={"host": 1e10, "disk": 1e15})
    weights_s, pages_s = (plan.prefill_operations[of] / speeds[of] for of in speeds)
    assert fast.prefill_least_s == pytest.approx(weights_s + pages_s)
    assert fast.reading_least_s(30_000) == pytest.approx(weights_s / 2 + pages_s / 4)
    slow = replace(fast, bandwidth={"host": 1e10, "disk": 1e3})
    share = plan.far_spans["disk"] / plan.num_spans
    assert slow.prefill_least_s == pytest.approx(share * plan.prefill_far_bytes / 1e3)
    assert slow.to_dict()["prefill_least_s"] == slow.prefill_least_s


def test_the_ceiling_is_that_of_the_slowest_tier_with_pages_by_depth_and_weights_whole():
    plan = replace(
        a_plan(100),
        decode_bytes={"device": 0, "host": 3000, "disk": 2000},
        decode_page_bytes={"device": 0, "host": 2000, "disk": 500},
    )
    assert plan.decode_ceiling(100, {"host": 1e4, "disk": 1e3}) == pytest.approx(1 / 2.0)
    assert plan.decode_ceiling(50, {"host": 1e4, "disk": 1e3}) == pytest.approx(1 / 1.75)
    assert plan.decode_ceiling(50, {"host": 1e3, "disk": 1e9}) == pytest.approx(1 / 2.0)
    assert plan.decode_ceiling(500, {"host": 1e3, "disk": 1e9}) == pytest.approx(1 / 3.0)
    assert plan.decode_ceiling(50, {"host": 1e4}) is None
    # Where pages are selected, none of them is counted, at any depth.
    selecting = replace(plan, decode_page_bytes={})
    assert selecting.decode_ceiling(1, {"host": 1e4, "disk": 1e3}) == pytest.approx(1 / 2.0)


def test_a_disk_that_is_too_small_is_what_lacks():
    with pytest.raises(DoesNotFit, match=r"--disk-memory.*lower --context or") as caught:
        a_plan(60_000, host=least_host(60_000), disk=5).raise_if_unfit()
    assert caught.value.tier == "disk" and caught.value.available_bytes == 5 * MiB


def test_a_device_that_is_too_small_is_what_lacks():
    with pytest.raises(DoesNotFit, match="--device-memory") as caught:
        a_plan(device=1).raise_if_unfit()
    assert caught.value.tier == "device" and caught.value.largest_context is None
    assert "Not even a short prompt fits" in str(caught.value)
    assert "--context" not in str(caught.value)  # it would not help


def test_weights_stream_where_pages_have_no_disk_to_go_to():
    """Layers give way to pages when there is no disk tier: the files of the model are there."""
    roomy = a_plan(30_000, host=4096, disk=0)
    needed = sum(roomy.host.values())
    tight = a_plan(30_000, host=needed // MiB, disk=0)
    assert tight.fits and tight.layers_streamed > 0 and roomy.layers_streamed == 0


def test_beyond_the_model_is_an_overflow_whatever_the_memory():
    plan = a_plan(70_000, host=1 << 20)
    assert not plan.fits
    with pytest.raises(ContextOverflow) as caught:
        plan.raise_if_unfit()
    assert (caught.value.needed_tokens, caught.value.available_tokens) == (70_000, 65536)


def test_the_text_names_every_item_and_the_dictionary_is_json():
    for plan in (a_plan(), a_plan(device=100, bits=8), a_plan(60_000, host=110, disk=5)):
        text = str(plan)
        for items in (plan.device, plan.host, plan.disk):
            assert all(name in text for name, size in (items or {}).items() if size)
        assert ("DO NOT FIT" in text) != plan.fits
        assert f"largest that fits {plan.largest_context:,}" in text
        assert plan.explain() == text
        again = json.loads(json.dumps(plan.to_dict()))
        assert again["context"] == plan.context and again["host"] == plan.host
    assert a_plan() == a_plan() != a_plan(10_000)


def test_forks_have_room_for_the_spans_they_copy():
    one, four = a_plan(host=4096), a_plan(host=4096, sequences=4)
    span = one.kv_far_bytes // one.num_spans
    assert four.host["far planes"] - one.host["far planes"] == 2 * 4 * span
    assert four.host["raw tokens"] == 4 * one.host["raw tokens"]


def test_a_plan_of_a_large_model_is_quick():
    config = model(
        layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, vocab=128256,
        max_positions=131072,
    )  # fmt: skip
    began = time.process_time()
    facts = facts_of(config, 4)
    limits = Limits(24 << 30, 32 << 30, 500 << 30, 300 * MiB)
    plan = make_plan(facts, choose_geometry(config), limits, Request(131072))
    assert time.process_time() - began < 1.0
    assert plan.fits and plan.layers_streamed > 0
    # 4 bits and a 16-bit scale per 32 of them; the head has 8 bits.
    kept = sum(facts.layer_sizes) + facts.head_bytes()
    parameters = sum(s[0] * s[1] for s in facts.shapes.values() if len(s) == 2)
    parameters -= 128256 * 8192  # embeddings are read row by row
    exact = (parameters - 128256 * 8192) * 4.5 / 8 + 128256 * 8192 * 8.5 / 8
    assert exact < kept < exact * 1.001


# ---- against what runs -------------------------------------------------------------------------


def test_planning_reads_no_tensor(tmp_path, monkeypatch):
    """The files' data may be absent: headers tell all, and blocks only what the files are."""
    folder = make("llama2", tmp_path / "model")
    path = folder / "model.safetensors"
    size = path.stat().st_size
    length = int.from_bytes(path.read_bytes()[:8], "little")
    os.truncate(path, 8 + length)
    os.truncate(path, size)  # a hole
    monkeypatch.setattr(checkpoint_module, "read_at", None)
    budget = Budget(host_memory="4GiB", disk_memory=0)
    with LLM.open(folder, budget=budget, context=4096) as llm:
        assert llm.plan.fits and llm.plan.context == 4096


def test_opening_says_at_once_what_does_not_fit(checkpoint):
    with pytest.raises(DoesNotFit) as caught:
        LLM.open(checkpoint("llama2"), budget=Budget(host_memory="1MiB"), context=4096)
    assert caught.value.tier == "host"
    with pytest.raises(ContextOverflow):
        LLM.open(checkpoint("llama2"), context=10**6)


@pytest.mark.parametrize(
    ("codec", "mode"),
    [("full", "exact"), ("8", "exact"), ("4", "exact"), ("8", "bounded"), ("4", "bounded")],
)
def test_bytes_per_token_are_what_the_store_uses(checkpoint, tmp_path, codec, mode):
    num_tokens = 1000
    with open_small(checkpoint("llama2"), tmp_path, codec, mode=Mode(mode)) as llm:
        ids = [i % 256 for i in range(num_tokens)]
        with llm.open_session(num_tokens, sequences=1) as session:
            session.append(ids)
            session.last_logits()
            plan, store = llm.plan, session._runtime.store
            used = sum(usage.used_bytes for usage in store.usage().values())
            sealed = llm.geometry.sealed_tokens(num_tokens)
            slack = llm.config.num_layers * llm.geometry.span_bytes
            assert used - slack <= sealed * plan.far_bytes_per_token <= used
            assert plan.kv_far_bytes == used
            near = store.stats.near_bytes_written
            assert near == sealed * plan.resident_bytes_per_token
            whole_spans = llm.geometry.num_spans(num_tokens) * llm.geometry.span_tokens
            arenas = store.reserved_bytes()[Tier.HOST] - store.usage()[Tier.HOST].capacity_bytes
            assert arenas == whole_spans * plan.resident_bytes_per_token == plan.host["near planes"]
            peaks = sum(usage.peak_bytes for usage in store.usage().values())
            assert peaks <= plan.host["far planes"] + plan.disk["far planes"]

"""Plans of models with routed experts: as many are held as there is room for beside the pages."""

from __future__ import annotations

import pytest
from plans_under_test import MiB, facts_of, routed_model

from ebbtide.offload.pages.geometry import choose_geometry
from ebbtide.offload.planning.budget import Limits
from ebbtide.offload.planning.plan import Request
from ebbtide.offload.planning.planner import make_plan
from ebbtide.offload.weights.expert_cache import fewest_slots


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_as_many_experts_are_held_as_memory_has_room_for(bits):
    """Pages first, then experts, and layers are streamed where not even a few fit."""
    facts = facts_of(routed_model(), bits)
    geometry = choose_geometry(facts.config, "8")
    request, ways, before = Request(12_000, sweep_cells=1), [], -1
    for half_mib in range(200, 600, 3):
        limits = Limits(None, half_mib * MiB // 2, 4096 * MiB, 50 * MiB)
        plan = make_plan(facts, geometry, limits, request)
        if not plan.fits:
            continue
        ways.append("layers" if plan.layers_streamed else "experts" if plan.expert_slots else "all")
        assert sum(plan.host.values()) <= limits.host_bytes
        if not plan.expert_slots:
            continue
        assert fewest_slots(2) <= plan.expert_slots <= plan.num_experts == 64
        assert plan.host["routed experts"] == plan.expert_slots * facts.expert_bytes
        few = plan.expert_slots == fewest_slots(2)
        assert few or not plan.far_spans["disk"]
        # Another one has no room.
        assert few or limits.host_bytes - sum(plan.host.values()) < facts.expert_bytes
        assert plan.expert_slots >= before or not plan.head_resident
        before = plan.expert_slots
        assert plan.disk["weights"] == (facts.experts_bytes if bits else 0)
        whole = make_plan(facts, geometry, Limits(None, 1 << 34, 0, 50 * MiB), request)
        held = plan.host["weights"] + facts.experts_bytes
        assert held == whole.host["weights"] or not plan.head_resident
    assert list(dict.fromkeys(ways)) in (["layers", "experts", "all"], ["experts", "all"])


def test_prefill_sweeps_over_several_cells_where_experts_leave_room():
    facts = facts_of(routed_model())
    geometry = choose_geometry(facts.config, "8")
    limits = Limits(None, 160 * MiB, 4096 * MiB, 50 * MiB)
    one, free = (
        make_plan(facts, geometry, limits, Request(12_000, sweep_cells=cells)) for cells in (1, 0)
    )
    assert free.sweep_cells > 1 and one.expert_slots > free.expert_slots > one.expert_slots // 2


def test_a_request_like_the_one_before_sweeps_like_it():
    facts = facts_of(routed_model())
    geometry = choose_geometry(facts.config, "8")
    for mib in (140, 160):
        limits = Limits(None, mib * MiB, 4096 * MiB, 50 * MiB)
        first = make_plan(facts, geometry, limits, Request(12_000))
        again = make_plan(facts, geometry, limits, Request(12_000, loaded=first.loaded))
        assert first.sweep_cells > 1 and again == first


def test_what_others_work_in_is_counted_whoever_asks():
    facts = facts_of(routed_model())
    geometry = choose_geometry(facts.config, "8")
    limits = Limits(None, 160 * MiB, 4096 * MiB, 50 * MiB)
    first = make_plan(facts, geometry, limits, Request(12_000))
    more = {"loaded": first.loaded, "shrinks": True, "sweep_cells": 1}
    alone = make_plan(facts, geometry, limits, Request(4_000, **more))
    beside = Request(4_000, **more, workspace_bytes=first.host["workspace"])
    shared = make_plan(facts, geometry, limits, beside)
    assert shared.host["workspace"] == first.host["workspace"] > alone.host["workspace"]


def test_a_device_streams_layers_and_not_experts():
    facts = facts_of(routed_model())
    limits = Limits(100 * MiB, 4096 * MiB, 4096 * MiB, 50 * MiB)
    plan = make_plan(facts, choose_geometry(facts.config, "8"), limits, Request(12_000))
    assert plan.fits and plan.layers_streamed and not plan.expert_slots

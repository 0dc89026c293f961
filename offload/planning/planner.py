"""What will lie where before anything is loaded: computed from config.json and the safetensors
headers alone.

Tries the ways to lay a request out (`filling`), best first: near planes that do not fit join their
far planes, and only when even that is too much does a request not fit. Where exact mode reads pages
from disk, the plan makes room for guessing tokens by few pages, if that moves few others out of
memory. Results of the model do not depend on any of it. Loads and reserves nothing.
"""

from __future__ import annotations

from dataclasses import replace

from ..pages.geometry import Geometry
from .budget import Limits
from .filling import Filling
from .footprint import Facts
from .operations import reading_operations
from .plan import Loaded, Plan, Request

# How many times as many spans may lie on disk, so that tokens can be guessed by few pages.
_MOST_MOVED_OUT = 1.3


def make_plan(
    facts: Facts,
    geometry: Geometry,
    limits: Limits,
    request: Request,
    bandwidth: dict[str, float] | None = None,
    operations_per_s: dict[str, float] | None = None,
) -> Plan:
    """The plan for a request; `fits` says whether it can be carried out, `shortage` what is missing
    if not.
    """
    plan = lay_out(facts, geometry, limits, request)
    largest = _largest_context(facts, geometry, limits, request, plan)
    if request.context > facts.config.max_positions:
        plan = replace(plan, fits=False)
    speeds = {"bandwidth": bandwidth or {}, "operations_per_s": operations_per_s or {}}
    operations = reading_operations(facts, plan.context)
    return replace(plan, largest_context=largest, prefill_operations=operations, **speeds)


def _largest_context(facts, geometry, limits, request, plan) -> int:
    """Tokens, by bisection over cells, and no fewer than the plan's where that fits; 0 when nothing
    does."""
    most, least = facts.config.max_positions, plan.context if plan.fits else 0
    if least >= most:
        return most

    def fits(tokens: int) -> bool:
        shorter = replace(request, context=tokens, drafts=False)
        return lay_out(facts, geometry, limits, shorter).fits

    if fits(most):
        return most
    # Fits, does not fit; in cells.
    low, high = least // geometry.cell_tokens, -(-most // geometry.cell_tokens)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * geometry.cell_tokens) else (low, middle)
    return max(least, low * geometry.cell_tokens)


def lay_out(facts: Facts, geometry: Geometry, limits: Limits, request: Request) -> Plan:
    """The best way to lay a request out; of the plan that `make_plan` gives, what needs no other:
    `largest_context`, operations and speeds are not there, nor does the model's limit count."""

    def filled(*, near_resident: bool) -> Plan:
        way = geometry.with_pages(near_resident=near_resident)
        return Filling(facts, way, limits, request).plan()

    plan = filled(near_resident=True)
    # Who selects pages needs their near planes at hand.
    if not plan.fits and not geometry.layout.value_means:
        other = filled(near_resident=False)
        plan = other if _lacks_less(other, plan) else plan
    return _with_drafts(plan, facts, geometry, limits, request) or plan


def _lacks_less(plan: Plan, other: Plan) -> bool:
    """Whether a plan fits, or lacks less than the other, which does not; of the same tier."""
    lacks, other_lacks = plan.shortage, other.shortage
    if lacks is None or other_lacks is None or lacks["tier"] != other_lacks["tier"]:
        return True
    return lacks["needed_bytes"] <= other_lacks["needed_bytes"]


def _with_drafts(
    plan: Plan, facts: Facts, geometry: Geometry, limits: Limits, request: Request
) -> Plan | None:
    """The plan with what is needed to guess tokens by few pages, where it fits and is worth it:
    not where few are read anyway, where a guess reads as many weights as a token, or where it would
    change a state, which cannot be taken back."""
    on_disk = plan.far_spans["disk"]
    reads_weights = plan.layers_streamed or plan.expert_slots
    reads_pages = plan.fits and plan.near_resident and on_disk and not reads_weights
    may_select = geometry.may_select(facts.config) and not plan.selects
    if not (request.drafts and reads_pages and may_select) or facts.config.recurrent:
        return None
    geometry = geometry.selecting(facts.config)
    drafting = Filling(facts, geometry, limits, request, selects_drafts=True).plan()
    in_memory = drafting.loaded == Loaded(0, True)
    # Where guesses are wrong, all that had to leave memory for them is read for each token.
    worth_it = 0 < drafting.far_spans["disk"] <= _MOST_MOVED_OUT * on_disk
    return drafting if drafting.fits and in_memory and worth_it else None

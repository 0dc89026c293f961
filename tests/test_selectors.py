"""Selectors: what each promises, on evidence drawn at random and on the edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbtide.prefetch.evidence import Evidence, misplaced_mass, missed_mass
from ebbtide.prefetch.registry import SELECTORS, make_selector
from ebbtide.prefetch.source import Selector

MEASURES = {"mass": missed_mass, "misplaced": misplaced_mass}
BUDGETS = {"quest", "random", "freekv"}  # a fixed number of tokens
EPSILONS = st.floats(0, 1)


def evidence(
    seed: int,
    num_records: int,
    pages_per_record: int = 2,
    kv_heads: int = 2,
    num_rows: int = 3,
    spread: float = 3.0,
) -> Evidence:
    """Random estimates with a first page that is raw and a window that carries some mass."""
    drawn = torch.Generator().manual_seed(seed)
    shape = (kv_heads, num_rows, num_records * pages_per_record)
    log_mass = torch.randn(shape, generator=drawn) * spread
    log_mass[..., :1] = -torch.inf
    rehearsed = log_mass + torch.randn(shape, generator=drawn)
    return Evidence(
        log_mass,
        torch.rand(shape, generator=drawn),
        torch.randn(shape[:2], generator=drawn),
        pages_per_record,
        record_tokens=64 * pages_per_record,
        upper_bound=lambda: log_mass + 1.0,
        rehearsed_log_mass=rehearsed,
    )


def changed(given: Evidence, **fields) -> Evidence:
    return Evidence(**{**vars(given), **fields})


DRAWN = st.builds(
    evidence,
    seed=st.integers(0, 10**6),
    num_records=st.integers(1, 20),
    pages_per_record=st.sampled_from([1, 2, 4]),
    kv_heads=st.integers(1, 3),
    num_rows=st.integers(1, 4),
    spread=st.sampled_from([0.0, 0.3, 3.0, 30.0]),
)


# ---- every selector, one matrix --------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SELECTORS))
@settings(deadline=None)
@given(known=DRAWN)
def test_a_selection_is_of_records_that_are_there_ascending_each_once(name, known):
    selector = make_selector(name)
    assert isinstance(selector, Selector)
    selected = selector.select(known)
    assert selected.dtype == torch.int64
    numbers = selected.tolist()
    assert numbers == sorted(set(numbers))
    assert bool(known.present()[selected].all())
    assert torch.equal(selector.select(known), selected)


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_nothing_is_selected_where_nothing_is_there(name):
    empty = evidence(0, 0)
    assert make_selector(name).select(empty).tolist() == []
    raw_only = evidence(0, 1, pages_per_record=1)  # its only page is the first, which is raw
    assert make_selector(name).select(raw_only).tolist() == []


@pytest.mark.parametrize("name", sorted(SELECTORS))
@given(known=DRAWN, shift=st.sampled_from([-40.0, 0.5, 40.0]))
@settings(deadline=None)
def test_only_differences_of_scores_count(name, known, shift):
    """Softmax does not see a constant that is added to all scores. A shift may round, so the
    masses are ones that survive it to the bit: multiples of 2**-10 well below 2**10."""
    known = changed(known, log_mass=(known.log_mass * 1024).round() / 1024)
    shifted = changed(
        known,
        log_mass=known.log_mass + shift,
        raw_log_mass=torch.full_like(known.raw_log_mass, -torch.inf),
        rehearsed_log_mass=(known.log_mass + shift),
        upper_bound=lambda: known.log_mass + shift,
    )
    plain = changed(
        shifted,
        log_mass=known.log_mass,
        rehearsed_log_mass=known.log_mass,
        upper_bound=lambda: known.log_mass,
    )
    selector = make_selector(name)
    assert selector.select(plain).tolist() == selector.select(shifted).tolist()


def test_unknown_names_and_options_say_what_is_known():
    with pytest.raises(ValueError, match="unknown selector 'best'; known: everything, freekv"):
        make_selector("best")
    with pytest.raises(ValueError, match="'top_p' has no option 'budget'; it has epsilon"):
        make_selector("top_p", budget=3)
    with pytest.raises(ValueError, match="has no option 'epsilon'; it has none"):
        make_selector("everything", epsilon=0.1)
    for wrong in ({"epsilon": -0.1}, {"epsilon": 1.5}, {"criterion": "luck"}):
        with pytest.raises(ValueError):
            make_selector("top_p", **wrong)


# ---- top-p -----------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", sorted(MEASURES))
@settings(deadline=None)
@given(known=DRAWN, epsilon=EPSILONS)
def test_the_bound_holds_for_every_head(criterion, known, epsilon):
    selected = make_selector("top_p", epsilon=epsilon, criterion=criterion).select(known)
    outside = MEASURES[criterion](known, selected)
    assert outside.shape == known.raw_log_mass.shape
    # Both sums are of at most 80 float32 numbers of at most 1, added in different orders.
    assert float(outside.max()) <= epsilon + 80 * 2**-24


@pytest.mark.parametrize("criterion", sorted(MEASURES))
@settings(deadline=None)
@given(known=DRAWN, epsilons=st.tuples(EPSILONS, EPSILONS))
def test_a_smaller_epsilon_selects_at_least_the_same(criterion, known, epsilons):
    strict, loose = (
        make_selector("top_p", epsilon=e, criterion=criterion).select(known).tolist()
        for e in sorted(epsilons)
    )
    assert set(loose) <= set(strict)


@pytest.mark.parametrize("criterion", sorted(MEASURES))
@settings(deadline=None)
@given(known=DRAWN, epsilon=EPSILONS)
def test_no_head_takes_more_than_it_needs(criterion, known, epsilon):
    """With one head the set is the smallest there is: one record fewer breaks the bound."""
    one = changed(
        known,
        log_mass=known.log_mass[:1, :1],
        unevenness=known.unevenness[:1, :1],
        raw_log_mass=known.raw_log_mass[:1, :1],
    )
    selected = make_selector("top_p", epsilon=epsilon, criterion=criterion).select(one)
    costs = one.shares() * (one.unevenness if criterion == "misplaced" else 1.0)
    costs = one.by_record(costs).flatten().double().sort(descending=True).values
    if len(selected):
        assert float(costs[len(selected) - 1 :].sum()) > epsilon - 80 * 2**-24


def test_everything_is_selected_for_an_epsilon_of_zero():
    known = evidence(5, 7)
    assert make_selector("top_p", epsilon=0).select(known).tolist() == list(range(7))


def test_heads_that_average_need_no_page_and_heads_that_point_need_one():
    log_mass = torch.zeros(1, 2, 8)
    unevenness = torch.zeros(1, 2, 8)
    log_mass[0, 1, 5], unevenness[0, 1, 5] = 4.0, 0.98  # head 1 points into page 5
    known = Evidence(log_mass, unevenness, torch.zeros(1, 2))
    assert make_selector("top_p", epsilon=0.1, criterion="misplaced").select(known).tolist() == [5]
    by_mass = make_selector("top_p", epsilon=0.1, criterion="mass").select(known).tolist()
    assert set(by_mass) == set(range(8))  # head 0 spreads its mass over all of them


def test_ties_go_to_the_lowest_number():
    known = Evidence(torch.zeros(1, 1, 6), torch.ones(1, 1, 6), torch.full((1, 1), -torch.inf))
    assert make_selector("top_p", epsilon=0.5).select(known).tolist() == [0, 1, 2]
    quest = changed(known, record_tokens=64, upper_bound=lambda: torch.zeros(1, 1, 6))
    assert make_selector("quest", num_tokens=128).select(quest).tolist() == [0, 1]


# ---- the others ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(BUDGETS))
@settings(deadline=None)
@given(known=DRAWN, num_tokens=st.integers(1, 3000))
def test_a_budget_is_used_and_kept(name, known, num_tokens):
    selected = make_selector(name, num_tokens=num_tokens).select(known)
    allowed = max(1, num_tokens // known.record_tokens)
    assert len(selected) == min(allowed, int(known.present().sum()))


def test_quest_takes_what_any_head_could_point_at():
    bound = torch.zeros(2, 1, 6)
    bound[0, 0, 4], bound[1, 0, 2] = 9.0, 9.0
    known = changed(
        evidence(1, 6, pages_per_record=1, num_rows=1), upper_bound=lambda: bound, record_tokens=64
    )
    assert make_selector("quest", num_tokens=128).select(known).tolist() == [2, 4]
    with pytest.raises(ValueError, match="upper_bound"):
        make_selector("quest").select(changed(known, upper_bound=None))
    with pytest.raises(ValueError, match="how many a record holds"):
        make_selector("quest").select(changed(known, record_tokens=0))


def test_the_window_is_the_newest_records():
    known = evidence(2, 9)
    assert make_selector("window").select(known).tolist() == []
    assert make_selector("window", num_tokens=300).select(known).tolist() == [7, 8]


def test_freekv_keeps_the_last_choice_until_the_query_turns():
    known = changed(
        evidence(3, 9), previous=torch.tensor([2, 5]), continuity=torch.tensor([0.9, 0.85])
    )
    selector = make_selector("freekv", num_tokens=256)
    fresh = selector.select(evidence(3, 9)).tolist()
    assert fresh != [2, 5]
    assert selector.select(known).tolist() == [2, 5]
    turned = changed(known, continuity=torch.tensor([0.9, 0.79]))
    assert selector.select(turned).tolist() == fresh


def test_infinigen_follows_the_rehearsed_query_and_its_cap():
    known = evidence(4, 20, pages_per_record=1)
    rehearsed = torch.zeros_like(known.log_mass)
    rehearsed[..., 13] = 5.0
    pointed = changed(known, rehearsed_log_mass=rehearsed)
    assert make_selector("infinigen").select(pointed).tolist() == [13]
    flat = changed(known, rehearsed_log_mass=torch.zeros_like(known.log_mass))
    assert len(make_selector("infinigen", most=0.2).select(flat)) == 4
    with pytest.raises(ValueError, match="rehearsed"):
        make_selector("infinigen").select(changed(known, rehearsed_log_mass=None))


def test_evidence_that_does_not_fit_together_says_so():
    with pytest.raises(ValueError, match="both must be"):
        Evidence(torch.zeros(1, 1, 4), torch.zeros(1, 1, 3), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="without its pages"):
        Evidence(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="not whole records"):
        Evidence(torch.zeros(1, 1, 5), torch.zeros(1, 1, 5), torch.zeros(1, 1), 2)

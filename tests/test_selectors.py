"""Selectors: what each promises, on evidence drawn at random and on the edges."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbtide.kernels.effect import head_effect, output_norms, value_spread
from ebbtide.prefetch.evidence import Evidence, misplaced_mass, missed_mass
from ebbtide.prefetch.foresight import REHEARSED_EPSILON, for_rehearsal
from ebbtide.prefetch.registry import SELECTORS, make_selector
from ebbtide.prefetch.source import Selector
from ebbtide.prefetch.top_p import CRITERIA, TopP

BUDGETS = {"quest", "random", "freekv", "kvswap"}  # a fixed number of tokens
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
        joint_score=lambda: rehearsed.flatten(0, 1).amax(0),
        effect=torch.rand(shape[:2], generator=drawn),
    )


def changed(given: Evidence, **fields) -> Evidence:
    return dataclasses.replace(given, **fields)


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
@settings(deadline=None, max_examples=40)
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
@settings(deadline=None, max_examples=40)
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
        joint_score=lambda: (known.log_mass + shift).flatten(0, 1).amax(0),
    )
    plain = changed(
        shifted,
        log_mass=known.log_mass,
        rehearsed_log_mass=known.log_mass,
        upper_bound=lambda: known.log_mass,
        joint_score=lambda: known.log_mass.flatten(0, 1).amax(0),
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


ROUNDING = 80 * 2**-23  # sums of at most 80 float32 numbers of at most 1, in another order


def wrong(criterion: str, known: Evidence, selected: torch.Tensor) -> torch.Tensor:
    """(kv_heads, num_rows) float64: what each head gets wrong, worked out page by page."""
    mass = torch.cat([known.raw_log_mass[..., None], known.log_mass], -1).double()
    cost = mass.softmax(-1)[..., 1:]
    if criterion != "mass":
        cost = cost * known.unevenness
    if criterion == "effect":
        cost = cost * known.effect[..., None]
    kept = torch.ones(known.num_pages, dtype=torch.bool)
    for record in selected.tolist():
        start = record * known.pages_per_record
        kept[start : start + known.pages_per_record] = False
    return cost[..., kept].sum(-1)


@pytest.mark.parametrize("criterion", CRITERIA)
@settings(deadline=None, max_examples=40)
@given(known=DRAWN, epsilon=EPSILONS)
def test_the_bound_holds_for_all_heads_together_and_so_for_each(criterion, known, epsilon):
    selected = make_selector("top_p", epsilon=epsilon, criterion=criterion).select(known)
    outside = wrong(criterion, known, selected)
    assert float(outside.square().sum().sqrt()) <= epsilon + ROUNDING
    assert float(outside.max()) <= epsilon + ROUNDING


@pytest.mark.parametrize("criterion", CRITERIA)
@settings(deadline=None, max_examples=40)
@given(known=DRAWN, epsilons=st.tuples(EPSILONS, EPSILONS))
def test_a_smaller_epsilon_selects_at_least_the_same(criterion, known, epsilons):
    strict, loose = (
        make_selector("top_p", epsilon=e, criterion=criterion).select(known).tolist()
        for e in sorted(epsilons)
    )
    assert set(loose) <= set(strict)


@pytest.mark.parametrize("criterion", CRITERIA)
@settings(deadline=None, max_examples=40)
@given(known=DRAWN, epsilon=EPSILONS)
def test_no_record_too_many_is_taken(criterion, known, epsilon):
    """Without the least wanted of its records, the selection breaks the bound."""
    selected = make_selector("top_p", epsilon=epsilon, criterion=criterion).select(known)
    if not len(selected):
        return
    none = wrong(criterion, known, torch.empty(0, dtype=torch.int64)).sum()
    gains = [float(none - wrong(criterion, known, torch.tensor([r])).sum()) for r in selected]
    fewer = [r for i, r in enumerate(selected.tolist()) if i != gains.index(min(gains))]
    left = wrong(criterion, known, torch.tensor(fewer, dtype=torch.int64))
    assert float(left.square().sum().sqrt()) > epsilon - ROUNDING


@settings(deadline=None, max_examples=40)
@given(known=DRAWN, epsilon=EPSILONS)
def test_one_head_takes_the_smallest_set_there_is(known, epsilon):
    one = changed(
        known,
        log_mass=known.log_mass[:1, :1],
        unevenness=known.unevenness[:1, :1],
        raw_log_mass=known.raw_log_mass[:1, :1],
        effect=known.effect[:1, :1],
    )
    selected = make_selector("top_p", epsilon=epsilon, criterion="mass").select(one)
    masses = torch.cat([one.raw_log_mass[..., None], one.log_mass], -1).double().softmax(-1)
    by_record = one.by_record(masses[..., 1:]).flatten().sort(descending=True).values
    if len(selected):
        assert float(by_record[len(selected) - 1 :].sum()) > epsilon - ROUNDING


def test_everything_is_selected_for_an_epsilon_of_zero():
    known = evidence(5, 7)
    assert make_selector("top_p", epsilon=0).select(known).tolist() == list(range(7))


def test_heads_that_average_need_no_page_and_heads_that_point_need_one():
    log_mass = torch.zeros(1, 2, 8)
    unevenness = torch.zeros(1, 2, 8)
    log_mass[0, 1, 5], unevenness[0, 1, 5] = 4.0, 0.98  # head 1 points into page 5
    known = Evidence(log_mass, unevenness, torch.full((1, 2), -5.0))
    assert make_selector("top_p", epsilon=0.1, criterion="misplaced").select(known).tolist() == [5]
    by_mass = make_selector("top_p", epsilon=0.1, criterion="mass").select(known).tolist()
    assert by_mass == list(range(8))  # head 0 spreads its mass over all of them
    deaf = changed(known, effect=torch.tensor([[1.0, 0.05]]))  # what head 1 finds hardly counts
    assert make_selector("top_p", epsilon=0.1).select(deaf).tolist() == []


def test_ties_go_to_the_lowest_number():
    known = Evidence(torch.zeros(1, 1, 6), torch.ones(1, 1, 6), torch.full((1, 1), -torch.inf))
    assert make_selector("top_p", epsilon=0.5).select(known).tolist() == [0, 1, 2]
    quest = changed(known, record_tokens=64, upper_bound=lambda: torch.zeros(1, 1, 6))
    assert make_selector("quest", num_tokens=128).select(quest).tolist() == [0, 1]


def test_the_measures_say_what_top_p_bounds():
    known = evidence(11, 6)
    selected = make_selector("top_p", epsilon=0.2, criterion="mass").select(known)
    for criterion, measure in (("mass", missed_mass), ("misplaced", misplaced_mass)):
        outside = measure(known, selected)
        assert outside.shape == known.raw_log_mass.shape
        assert torch.allclose(outside.double(), wrong(criterion, known, selected), atol=ROUNDING)


def test_what_is_unknown_of_pages_that_are_not_there_does_not_matter():
    known = evidence(12, 6)
    unknown = changed(known, unevenness=known.unevenness.clone())
    unknown.unevenness[..., 0] = torch.nan
    for criterion in CRITERIA:
        selector = make_selector("top_p", epsilon=0.1, criterion=criterion)
        assert selector.select(unknown).tolist() == selector.select(known).tolist()
    assert torch.equal(
        misplaced_mass(unknown, torch.tensor([3])), misplaced_mass(known, torch.tensor([3]))
    )


# ---- the effect of a head ----------------------------------------------------------------------


def test_a_head_that_is_projected_to_nothing_has_no_effect():
    weight = torch.randn(24, 4 * 8, generator=torch.Generator().manual_seed(0))
    weight[:, 8:16] = 0  # the second query head of the first KV head
    norms = output_norms(weight, kv_heads=2, head_dim=8)
    assert (
        norms.shape == (2, 2) and norms[0, 1] == 0 and bool((norms[[0, 1, 1], [0, 0, 1]] > 0).all())
    )
    effect = head_effect(norms, 3.0, torch.zeros(2, 2, 8), torch.tensor([1.0, 0.0]))
    assert effect[0, 0] == norms[0, 0] / 3 and effect[0, 1] == 0 and effect[1].tolist() == [0, 0]
    nothing = head_effect(norms, 0.0, torch.zeros(2, 2, 8), torch.ones(2))
    assert nothing.tolist() == [[0, 0], [0, 0]]


def test_the_effect_is_about_what_misplaced_mass_does():
    """Half the mass moved from one random token to another: what the residual changes by, averaged
    over many, against the estimate. The estimate takes values as equally spread in all directions,
    which these are; the average of 400 differences of 2 * 16 numbers is within a tenth."""
    drawn = torch.Generator().manual_seed(3)
    values = torch.randn(1, 800, 16, generator=drawn)
    weight = torch.randn(40, 16, generator=drawn)
    moved = 0.5 * (values[0, :400] - values[0, 400:])
    change = float((moved @ weight.T).square().sum(-1).mean().sqrt())
    effect = head_effect(
        output_norms(weight, 1, 16), 10.0, torch.zeros(1, 1, 16), value_spread(values)
    )
    # Two independent tokens differ by the square root of 2 of their spread.
    assert change / 10 == pytest.approx(float(effect) * 0.5 * 2**0.5, rel=0.1)


def test_the_spread_of_no_values_is_zero():
    assert value_spread(torch.zeros(2, 0, 4)).tolist() == [0, 0]
    assert value_spread(torch.ones(2, 3, 4)).tolist() == [0, 0]


# ---- the others ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(BUDGETS))
@settings(deadline=None, max_examples=40)
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


def test_kvswap_takes_the_records_with_the_best_token_for_all_heads_together():
    scores = torch.zeros(12)
    scores[[0, 5, 10]] = torch.tensor([9.0, 3.0, 2.0])  # page 0 is the first, which is raw
    known = changed(evidence(6, 6), joint_score=lambda: scores)
    assert make_selector("kvswap", num_tokens=256).select(known).tolist() == [2, 5]
    with pytest.raises(ValueError, match="all heads share"):
        make_selector("kvswap").select(changed(known, joint_score=None))


def test_evidence_that_does_not_fit_together_says_so():
    with pytest.raises(ValueError, match="both must be"):
        Evidence(torch.zeros(1, 1, 4), torch.zeros(1, 1, 3), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="without its pages"):
        Evidence(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="not whole records"):
        Evidence(torch.zeros(1, 1, 5), torch.zeros(1, 1, 5), torch.zeros(1, 1), 2)


@given(given=DRAWN, epsilon=EPSILONS)
def test_for_a_rehearsed_query_no_less_is_chosen(given, epsilon):
    selector = make_selector("top_p", epsilon=epsilon)
    rehearsing = for_rehearsal(selector)
    assert rehearsing.epsilon == REHEARSED_EPSILON * epsilon < max(epsilon, 1e-9)
    assert rehearsing.criterion == selector.criterion
    assert set(selector.select(given).tolist()) <= set(rehearsing.select(given).tolist())


def test_other_selectors_choose_for_a_rehearsed_query_as_ever():
    class Own(TopP):
        pass

    for selector in (make_selector("quest", num_tokens=256), Own(0.1)):
        assert for_rehearsal(selector) is selector

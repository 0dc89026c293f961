"""Bookkeeping of extents and tables, without bytes: who owns which frames, where new ones go."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ebbtide.offload.errors import InputError
from ebbtide.offload.pages.page_table import Extents, NoFrames, PageTable, Tier
from ebbtide.offload.pages.policy import FastestFirst, FirstLayers, Homes, Interleave, make_policy

S = 3  # records per span


def append(extents: Extents, table: PageTable, layer: int, tier: Tier, num_records: int) -> None:
    """Appends within one span, as the pager does without bytes."""
    span, start = divmod(table.num_records(layer), S)
    assert start + num_records <= S
    fresh = extents.allocate(tier, layer, span) if start == 0 else None
    table.append(layer, num_records, fresh)


def test_bookkeeping_needs_no_torch():
    code = (
        "import sys, ebbtide.prefetch.history;"
        "from ebbtide.offload.pages import page_table, policy;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_an_extent_is_whole_and_frames_left_over_are_not_used():
    extents = Extents({Tier.HOST: 3 * S + 2}, S)
    bases = [extents.allocate(Tier.HOST, 0, i).base for i in range(3)]
    assert bases == [0, S, 2 * S]  # from the start, so that memory is touched no further than used
    with pytest.raises(NoFrames):
        extents.allocate(Tier.HOST, 0, 3)
    with pytest.raises(NoFrames):
        extents.allocate(Tier.DISK, 0, 3)


def test_freed_frames_come_back_and_the_peak_stays():
    extents = Extents({Tier.HOST: 2 * S}, S)
    first, _ = extents.allocate(Tier.HOST, 0, 0), extents.allocate(Tier.HOST, 0, 1)
    extents.release(first)
    assert (extents.num_free(Tier.HOST), extents.num_used(Tier.HOST)) == (1, 1)
    assert extents.allocate(Tier.HOST, 0, 2).base == first.base
    for extent in list(extents._used[Tier.HOST].values()):
        extents.release(extent)
    assert (extents.num_used(Tier.HOST), extents.peak_used[Tier.HOST]) == (0, 2)


def test_releasing_twice_and_sharing_what_is_free_are_bugs():
    extents = Extents({Tier.HOST: S}, S)
    extent = extents.allocate(Tier.HOST, 0, 0)
    extents.release(extent)
    with pytest.raises(AssertionError):
        extents.release(extent)
    with pytest.raises(AssertionError):
        extents.share(extent)


def test_a_table_counts_what_it_sees():
    extents, table = Extents({Tier.HOST: 9 * S}, S), PageTable(2, S)
    for count in (2, 1, 3, 1):
        append(extents, table, 1, Tier.HOST, count)
    assert (table.num_records(0), table.num_records(1), table.num_spans(1)) == (0, 7, 3)
    assert [table.records_seen(1, span) for span in range(4)] == [3, 3, 1, 0]
    extents.check([table])


def test_appending_to_what_another_table_sees_is_a_bug():
    extents, table = Extents({Tier.HOST: S}, S), PageTable(1, S)
    append(extents, table, 0, Tier.HOST, 1)
    for extent in table.fork().extents():
        extents.share(extent)
    with pytest.raises(AssertionError, match="others see"):
        table.append(0, 1)


@pytest.mark.parametrize("keep", [0, 1, S - 1, S, S + 1, 2 * S, 2 * S + 1, 99])
def test_truncate_keeps_the_first_records_of_every_layer(keep):
    extents, table = Extents({Tier.HOST: 9 * S}, S), PageTable(2, S)
    for layer, counts in enumerate([(S, S, 1), (S, 1)]):
        for count in counts:
            append(extents, table, layer, Tier.HOST, count)
    before = list(table.extents())
    dropped = table.truncate(keep)
    assert [table.num_records(layer) for layer in (0, 1)] == [min(keep, 7), min(keep, 4)]
    assert {*table.extents()} == {*before} - {*dropped}
    for extent in dropped:
        extents.release(extent)
    extents.check([table])


def test_near_planes_come_from_the_layers_own_arena():
    extents = Extents({Tier.HOST: 3 * S, Tier.DISK: 2 * S}, S, [1, 0, 0])
    assert extents.num_near_extents == [4, 2]  # shares of five extents, rounded up
    assert [extents.allocate(Tier.HOST, 0, i).near_base for i in range(2)] == [0, S]
    first = extents.allocate(Tier.HOST, 2, 0)
    assert (extents.num_free_near(0), extents.num_free_near(1), first.near_base) == (0, 3, 0)
    with pytest.raises(NoFrames):
        extents.allocate(Tier.DISK, 0, 2)
    assert extents.num_free(Tier.DISK) == 2
    extents.release(first)
    assert extents.allocate(Tier.DISK, 1, 0).near_base == first.near_base, "wherever records are"


def test_arenas_share_out_extents_by_what_their_layers_take():
    """A layer that has two spans where another has one takes two shares."""
    for spans_at_once in ([1, 2, 1], [1, 1, 2], [4, 1, 1]):
        longest = 3  # spans of the layer with the longest
        total = longest * sum(spans_at_once)
        extents = Extents({Tier.HOST: total * S}, S, [1, 0, 0], spans_at_once)
        for layer, count in enumerate(spans_at_once):
            for span in range(longest * count):
                extents.allocate(Tier.HOST, layer, span)
        assert extents.num_free(Tier.HOST) == 0


@pytest.mark.parametrize("arenas", [[0, 1, 0], [0, 0, 0], [0, 1, 2]])
def test_layers_with_at_most_so_many_have_near_planes_for_those(arenas):
    most = [2, None, 3]
    extents = Extents({Tier.HOST: 10 * S}, S, arenas, [1, 1, 1], most)
    for layer, count in enumerate((2, 5, 3)):
        for span in range(count):
            extents.allocate(Tier.HOST, layer, span)
    assert (extents.num_bounded, extents.num_free(Tier.HOST)) == (5, 0)


def test_what_is_let_go_of_comes_first():
    """Layer 0 keeps all, layer 1 at most two: of three extents in memory two are for the latter."""
    extents = Extents({Tier.HOST: 3 * S, Tier.DISK: 9 * S}, S, [0, 0], [1, 1], [None, 2])
    homes = Homes(FastestFirst(), extents, [1, 1], [None, 2], 2)

    def take(layer: int, span: int) -> Tier:
        return extents.allocate(homes.choose(layer, span, None), layer, span).tier

    assert [take(0, span) for span in range(3)] == [Tier.HOST, Tier.DISK, Tier.DISK]
    assert [take(1, span) for span in range(2)] == [Tier.HOST, Tier.HOST]
    extents.release(extents.owner(Tier.HOST, 2 * S))  # of layer 1, which another will follow
    assert take(0, 3) is Tier.DISK and take(1, 2) is Tier.HOST


def test_records_may_be_dropped_and_passed_over():
    extents, table = Extents({Tier.HOST: 9 * S}, S), PageTable(2, S)
    for count in (S, S, 1):
        append(extents, table, 0, Tier.HOST, count)
    other = table.fork()
    for extent in table.extents():
        extents.share(extent)
    for extent in table.drop(0, [range(1), range(2, 9)]):
        extents.release(extent)
    table.skip(1, S + 2)
    assert [extent is None for extent in table.entries(0)] == [False, True, False]
    assert (table.num_records(0), table.num_kept(0), other.num_kept(0)) == (2 * S + 1, S + 1, 7)
    assert (table.num_records(1), table.num_spans(1), table.num_kept(1)) == (S + 2, 2, 0)
    with pytest.raises(AssertionError, match="was dropped"):
        table.extent(0, 1)
    with pytest.raises(AssertionError, match="rest is skipped"):
        table.skip(0, 1)  # the last span has a record
    extents.check([table, other])
    for each in (table, other):
        for extent in each.truncate([S, 1]):
            extents.release(extent)
    extents.check([table, other])
    assert [each.num_kept(0) for each in (table, other)] == [S, S]


def test_layers_that_share_see_the_pages_of_another():
    extents, table = Extents({Tier.HOST: 9 * S}, S), PageTable(2, S, pages_of=[0, 1, 1, 0])
    append(extents, table, 1, Tier.HOST, S)
    append(extents, table, 1, Tier.HOST, 1)
    for seen in (table, table.fork()):
        assert [seen.num_records(layer) for layer in range(4)] == [0, S + 1, S + 1, 0]
        assert [seen.num_spans(layer) for layer in range(4)] == [0, 2, 2, 0]
        assert seen.extent(2, 1) is seen.extent(1, 1) and seen.records_seen(2, 1) == 1
        assert len(list(seen.extents())) == 2
    for extent in table.truncate([0, 1]):
        extents.release(extent)
    assert table.num_records(1) == table.num_records(2) == 1
    extents.check([table])


@pytest.mark.parametrize("what", ["leak", "double free", "near", "refs", "gap", "crc"])
def test_check_sees_what_is_broken(what):
    extents, table = Extents({Tier.HOST: 4 * S}, S), PageTable(1, S)
    for _ in range(2):
        append(extents, table, 0, Tier.HOST, S)
    extents.check([table])
    extent = table.extent(0, 0)
    if what == "leak":
        extents.allocate(Tier.HOST, 0, 2)
    elif what == "double free":
        extents._free[Tier.HOST].append(extent.base)
    elif what == "near":
        extent.near_base = table.extent(0, 1).near_base
    elif what == "refs":
        extent.refs += 1
    elif what == "gap":
        table._num_records[0] = S
    else:
        extent.filled, extent.crcs[:2] = 1, (1, 2)
    with pytest.raises(AssertionError):
        extents.check([table])


class Bookkeeping(RuleBasedStateMachine):
    """Any order of append, fork, truncate and close conserves frames and references."""

    near_arenas = None

    def __init__(self):
        super().__init__()
        frames = {Tier.DEVICE: 2 * S, Tier.HOST: 5 * S + 1, Tier.DISK: 9 * S}
        self.extents = Extents(frames, S, self.near_arenas)
        self.tables: list[PageTable] = []

    def any_table(self, pick: int) -> PageTable:
        return self.tables[pick % len(self.tables)]

    def release(self, extents) -> None:
        for extent in extents:
            self.extents.release(extent)

    @precondition(lambda self: len(self.tables) < 4)
    @rule()
    def open(self):
        self.tables.append(PageTable(2, S))

    @precondition(lambda self: self.tables)
    @rule(
        pick=st.integers(0, 9),
        layer=st.integers(0, 1),
        tier=st.sampled_from(Tier),
        count=st.integers(1, S),
    )
    def append(self, pick, layer, tier, count):
        table = self.any_table(pick)
        span, start = divmod(table.num_records(layer), S)
        count = min(count, S - start)
        try:
            if start and table.extent(layer, span).refs > 1:
                new = self.extents.allocate(tier, layer, span)
                new.filled = start
                self.release([table.replace(layer, span, new)])
            elif start:
                table.extent(layer, span).trim(start)
            append(self.extents, table, layer, tier, count)
        except NoFrames:
            assert self.extents.num_free(tier) == 0 or self.extents.num_free_near(layer) == 0

    @precondition(lambda self: self.tables and len(self.tables) < 4)
    @rule(pick=st.integers(0, 9))
    def fork(self, pick):
        self.tables.append(self.any_table(pick).fork())
        for extent in self.tables[-1].extents():
            self.extents.share(extent)

    @precondition(lambda self: self.tables)
    @rule(pick=st.integers(0, 9), keep=st.integers(0, 4 * S))
    def truncate(self, pick, keep):
        self.release(self.any_table(pick).truncate(keep))

    @precondition(lambda self: self.tables)
    @rule(pick=st.integers(0, 9))
    def close(self, pick):
        self.release(self.tables.pop(pick % len(self.tables)).truncate(0))

    @invariant()
    def is_sound(self):
        self.extents.check(self.tables)


class BookkeepingOfTwoArenas(Bookkeeping):
    """The same where layers have near planes of different sizes."""

    near_arenas = (0, 1)


TestBookkeeping = Bookkeeping.TestCase
TestBookkeepingOfTwoArenas = BookkeepingOfTwoArenas.TestCase


def place(policy, num_layers, num_spans, expected, frames):
    """The tier of every (layer, span), written span by span through all layers."""
    free, homes = dict(frames), {}
    for span in range(num_spans):
        for layer in range(num_layers):
            tier = policy.choose(layer, span, free, num_layers, expected)
            assert free[tier] > 0
            free[tier] -= 1
            homes[layer, span] = tier
    return homes, free


@given(st.integers(1, 8), st.integers(1, 40), st.data())
def test_interleave_uses_the_faster_tier_fully_and_every_layer_alike(layers, spans, data):
    total = layers * spans
    fast = data.draw(st.integers(0, total))
    homes, free = place(Interleave(), layers, spans, spans, {Tier.HOST: fast, Tier.DISK: total})
    # Shares are paid in whole extents, so each layer may be owed one at the end.
    assert free[Tier.HOST] <= layers
    per_layer = [sum(homes[l, s] is Tier.HOST for s in range(spans)) for l in range(layers)]
    assert max(per_layer) - min(per_layer) <= 2


@pytest.mark.parametrize("share", [1 / 4, 1 / 2, 2 / 3])
def test_interleave_spreads_evenly_over_spans(share):
    """In every stretch of a layer, the resident share is the same: that is what hides the reads."""
    layers, spans, stretch = 4, 48, 12
    frames = {Tier.HOST: int(layers * spans * share), Tier.DISK: layers * spans}
    homes, _ = place(Interleave(), layers, spans, spans, frames)
    for layer in range(layers):
        for start in range(0, spans, stretch):
            resident = sum(homes[layer, start + i] is Tier.HOST for i in range(stretch))
            assert abs(resident - share * stretch) <= 1


@pytest.mark.parametrize("policy", [Interleave, FastestFirst, FirstLayers])
def test_all_that_fits_stays_in_the_fastest_tier(policy):
    homes, _ = place(policy(), 3, 10, 10, {Tier.DEVICE: 30, Tier.HOST: 30, Tier.DISK: 30})
    assert set(homes.values()) == {Tier.DEVICE}


@pytest.mark.parametrize("policy", [Interleave, FastestFirst, FirstLayers])
@pytest.mark.parametrize("expected", [None, 3, 10, 50])
def test_a_wrong_expectation_still_finds_room_for_everything(policy, expected):
    frames = {Tier.DEVICE: 7, Tier.HOST: 11, Tier.DISK: 12}
    homes, free = place(policy(), 3, 10, expected, frames)
    assert len(homes) == 30 and not any(free.values())


def test_three_tiers_are_interleaved_too():
    frames = {Tier.DEVICE: 24, Tier.HOST: 24, Tier.DISK: 48}
    homes, free = place(Interleave(), 4, 24, 24, frames)
    assert free[Tier.DEVICE] <= 4 and free[Tier.HOST] <= 4
    for layer in range(4):
        first_half = [homes[layer, span] for span in range(12)]
        assert {first_half.count(Tier.DEVICE), first_half.count(Tier.HOST)} <= {2, 3, 4}


def test_fastest_first_fills_tiers_in_turn():
    homes, _ = place(FastestFirst(), 1, 6, 6, {Tier.DEVICE: 1, Tier.HOST: 2, Tier.DISK: 9})
    names = [homes[0, span].value for span in range(6)]
    assert names == ["device", "host", "host", "disk", "disk", "disk"]


@given(st.integers(1, 8), st.integers(1, 30), st.data())
def test_first_layers_are_in_memory_as_far_as_it_goes(layers, spans, data):
    total = layers * spans
    fast = data.draw(st.integers(0, total))
    frames = {Tier.HOST: fast, Tier.DISK: total - fast}
    homes, _ = place(FirstLayers(), layers, spans, spans, frames)
    in_memory = [sum(homes[l, s] is Tier.HOST for s in range(spans)) for l in range(layers)]
    whole = fast // spans
    assert sum(in_memory) == fast
    assert in_memory[:whole] == [spans] * whole
    assert not any(in_memory[whole + 1 :])


def test_an_unknown_policy_names_the_known_ones():
    with pytest.raises(InputError, match=r"'lru'; known: fastest_first, first_layers, interleave"):
        make_policy("lru")
    assert isinstance(make_policy("interleave"), Interleave)

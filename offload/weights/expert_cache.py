"""Routed experts of which not all fit in memory: those used last stay, the others are read when a
router has chosen them, all that a layer lacks at once.

    slot       room for one expert of any layer
    cache      slots of experts that stay until there is no room: the least recently used goes first
    passing    a few slots that take turns, for a cell of prefill, which goes through most experts
               of each layer: kept, they would push out one another before any is used again. As
               long as there is room each layer keeps its share, which spreads reading evenly
    expected   what the next layer's router is thought to choose: read once all is under way that
               the layer at hand asked for, if such thoughts have proved mostly right for that layer

Which experts are at hand changes time alone. Knows neither files nor what is computed.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from ..pages.tier import aligned_bytes

if TYPE_CHECKING:
    from .weights import LayerTensors

# How many are read at once: disks serve several reads faster than one.
READERS = 4
PASSING_SLOTS = READERS + 1
# What is expected of a layer is read where at least this share of what it chose was expected, in a
# mean in which the last token counts an eighth: a wrong one takes the disk from the right ones.
_LEAST_RIGHT = 0.7
_LAST_COUNTS = 1 / 8

Expert = tuple[int, int]  # layer, number
Fill = Callable[[Expert, torch.Tensor], "LayerTensors"]


def fewest_slots(chosen: int) -> int:
    """How many slots a model needs whose routers choose so many experts."""
    return PASSING_SLOTS + chosen


class _Reading:
    """An expert on its way into a slot."""

    def __init__(self, expert: Expert):
        self.expert = expert
        self._done = threading.Event()
        self._tensors: LayerTensors | None = None
        self._error: BaseException | None = None

    def run(self, fill: Fill, buffer: torch.Tensor | None) -> None:
        try:
            assert buffer is not None, "the slot was given back"
            self._tensors = fill(self.expert, buffer)
        except BaseException as error:
            self._error = error
        self._done.set()

    def result(self) -> LayerTensors:
        self._done.wait()
        if self._error is not None:
            raise self._error
        assert self._tensors is not None
        return self._tensors

    def has_failed(self) -> bool:
        return self._done.is_set() and self._error is not None


class _Slot:
    """reading: the last that was begun; only that one may write, one at a time."""

    def __init__(self, num_bytes: int):
        self.buffer: torch.Tensor | None = aligned_bytes(num_bytes)
        self.reading: _Reading | None = None
        self._writing = threading.Lock()

    def fill(self, fill: Fill, reading: _Reading) -> None:
        with self._writing:
            if self.reading is reading:  # nobody has taken the slot for another expert
                reading.run(fill, self.buffer)

    def has_failed(self) -> bool:
        return self.reading is not None and self.reading.has_failed()

    def let_go(self) -> None:
        """Give the memory back, which waits for a reading that is under way."""
        with self._writing:
            self.buffer = None


class ExpertCache:
    """num_slots, of slot_bytes each. fill(expert, buffer) reads an expert into a slot and gives its
    tensors by their names within the layer; called in several threads. num_layers: those that have
    routed experts.

    One thread asks at a time. An interruption leaves nothing to repair: a slot belongs to an expert
    once its reading is under way, and is free as long as it belongs to none; whoever takes a free
    slot takes it from a reading that nobody waits for.
    """

    def __init__(self, fill: Fill, slot_bytes: int, num_slots: int, num_layers: int):
        assert num_slots > PASSING_SLOTS, "an expert has no slot to stay in"
        self._fill, self._num_layers = fill, num_layers
        # Each in memory of its own, which is given back when others need it.
        slots = [_Slot(slot_bytes) for _ in range(num_slots)]
        self._passing, self._slots = slots[:PASSING_SLOTS], slots[PASSING_SLOTS:]
        self._held: OrderedDict[Expert, _Slot] = OrderedDict()  # the least recently used first
        self._pool = ThreadPoolExecutor(READERS, "ebbtide-experts")
        self._expected: dict[int, list[Expert]] = {}  # by layer, in the order of asking
        self._begun_early: dict[Expert, Future] = {}  # of those expected
        self._right: dict[int, float] = defaultdict(float)  # by layer: see _LEAST_RIGHT
        self.hits = self.misses = self.foreseen = self.reads = 0

    def bring(
        self, layer: int, numbers: Sequence[int], *, keeps: bool, at_hand_first: bool = False
    ) -> Iterator[tuple[int, LayerTensors]]:
        """The tensors of a layer's experts, in the order of `numbers`, or those that need not be
        read before the others; each is good until the next is asked for. keeps: whether those that
        are read push out the least recently used ones. Raises what reading raises.
        """
        wanted = [(layer, number) for number in numbers]
        for expert in wanted:
            slot = self._held.get(expert)
            if slot is not None and slot.has_failed():
                del self._held[expert]  # when nobody waited for it any more
        self._compare(layer, wanted)
        lacking = deque(expert for expert in wanted if expert not in self._held)
        self.hits += len(wanted) - len(lacking)
        self.misses += len(lacking)
        for expert in wanted:
            if expert in self._held:
                self._held.move_to_end(expert)
        if at_hand_first:
            wanted.sort(key=lambda expert: expert not in self._held)
        needed = set(wanted)  # of those that are held: they must not go before their turn
        passing: dict[Expert, _Slot] = {}
        for expert in wanted:
            while lacking and self._begin(lacking[0], needed, passing, keeps):
                lacking.popleft()
            if keeps and not lacking:
                self._begin_expected(needed)
            reading = (passing.get(expert) or self._held[expert]).reading
            assert reading is not None and reading.expert == expert, "a slot holds another expert"
            try:
                tensors = reading.result()
            except BaseException:
                self._held.pop(expert, None)
                raise
            yield expert[1], tensors
            needed.discard(expert)
            passing.pop(expert, None)

    def expect(self, layer: int, numbers: Sequence[int]) -> None:
        """Which experts of a layer the router will choose, as far as one can tell: to be called
        before the layer that comes first asks for its own. Whatever is said here, `bring` gives
        what it is asked for."""
        self._expected[layer] = [(layer, number) for number in numbers]

    def shrink(self, num_slots: int) -> None:
        """Give the memory of all but so many slots back; the least recently used experts go. On
        return nothing is read into it any more."""
        keep = min(num_slots - PASSING_SLOTS, len(self._slots))
        assert keep > 0, "an expert has no slot to stay in"
        while len(self._held) > keep:
            self._held.popitem(last=False)
        held = list(self._held.values())
        used = {id(slot) for slot in held}
        free = [slot for slot in self._slots if id(slot) not in used]
        kept = held + free[: keep - len(held)]
        gone, self._slots = set(self._slots).difference(kept), kept
        for slot in gone:
            slot.reading = None  # what has not begun never will
        for slot in gone:
            slot.let_go()

    def close(self) -> None:
        """Stop reading, and let go of all memory. May be called again."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._held.clear()
        self._slots, self._passing = [], []

    def _begin(
        self, expert: Expert, needed: set[Expert], passing: dict[Expert, _Slot], keeps: bool
    ) -> bool:
        """Read an expert, if there is room for it now."""
        slot = self._room(expert[0], needed, keeps)
        if slot is not None:
            self._read(expert, slot)
            self._held[expert] = slot
            return True
        used = {id(slot) for slot in passing.values()}
        slot = next((slot for slot in self._passing if id(slot) not in used), None)
        if slot is None:
            return False
        self._read(expert, slot)
        passing[expert] = slot
        return True

    def _begin_expected(self, needed: set[Expert]) -> None:
        """Read what is expected and not held, as far as there is room that nobody needs."""
        kept = needed.union(*self._expected.values())
        for expert in itertools.chain(*self._expected.values()):
            if expert in self._held or self._right[expert[0]] < _LEAST_RIGHT:
                continue
            slot = self._room(expert[0], kept, keeps=True)
            if slot is None:
                return
            self._begun_early[expert] = self._read(expert, slot)
            self._held[expert] = slot

    def _compare(self, layer: int, wanted: list[Expert]) -> None:
        """What was expected with what is wanted: readings in vain end, or their slots go first."""
        expected = self._expected.pop(layer, None)
        if wanted and expected is not None:
            right = len(set(wanted).intersection(expected))
            self.foreseen += right
            self._right[layer] += (right / len(wanted) - self._right[layer]) * _LAST_COUNTS
        for expert in set(self._begun_early).difference(wanted):
            slot = self._held.pop(expert, None)  # first: nobody may wait for what was cancelled
            if slot is None:
                continue
            if self._begun_early[expert].cancel():
                self.reads -= 1
            else:
                self._held[expert] = slot
                self._held.move_to_end(expert, last=False)
        self._begun_early.clear()

    def _room(self, layer: int, needed: set[Expert], keeps: bool) -> _Slot | None:
        """A slot in which an expert of a layer may stay."""
        if len(self._held) < len(self._slots):
            layer_share = -(-len(self._slots) // self._num_layers)
            if not keeps and sum(held[0] == layer for held in self._held) >= layer_share:
                return None
            used = {id(slot) for slot in self._held.values()}
            return next(slot for slot in self._slots if id(slot) not in used)
        victim = next((held for held in self._held if held not in needed), None) if keeps else None
        return None if victim is None else self._held.pop(victim)

    def _read(self, expert: Expert, slot: _Slot) -> Future:
        reading = slot.reading = _Reading(expert)
        self.reads += 1
        return self._pool.submit(slot.fill, self._fill, reading)

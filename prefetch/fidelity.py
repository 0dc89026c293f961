"""What was left out, by the runtime's own estimate: counters of an answer. Numbers only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Fidelity:
    """Sums over the selections since it was made or cleared; one selection per layer and token.

    offered, selected: records that could be and were attended in full. dropped: selected, but
    not there in time (deadline mode). Shares are of a query head's softmax mass: missed, outside
    the selection; misplaced, the part of it that stands at the wrong tokens once pages outside are
    replaced by their mean values.
    """

    selections: int = 0
    offered: int = 0
    selected: int = 0
    dropped: int = 0
    missed_sum: float = 0.0
    missed_max: float = 0.0
    misplaced_sum: float = 0.0
    misplaced_max: float = 0.0

    def note(
        self,
        offered: int,
        selected: int,
        dropped: int,
        missed: float,
        most_missed: float,
        misplaced: float,
        most_misplaced: float,
    ) -> None:
        """One selection; of shares the mean over query heads, and the greatest."""
        self.selections += 1
        self.offered += offered
        self.selected += selected
        self.dropped += dropped
        self.missed_sum += missed
        self.missed_max = max(self.missed_max, most_missed)
        self.misplaced_sum += misplaced
        self.misplaced_max = max(self.misplaced_max, most_misplaced)

    def take(self) -> Fidelity:
        """What was counted, and starts anew."""
        taken = Fidelity(**vars(self))
        self.__init__()
        return taken

    def to_dict(self) -> dict:
        """As a `kv` object has it."""
        count = max(1, self.selections)
        return {
            "missed_mass": {"mean": self.missed_sum / count, "max": self.missed_max},
            "misplaced_mass": {"mean": self.misplaced_sum / count, "max": self.misplaced_max},
            "selected_share": self.selected / self.offered if self.offered else 1.0,
            "dropped_records": self.dropped,
        }

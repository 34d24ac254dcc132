"""From what each rank's steps took to the name of one that all others wait for, and of the cause.

A slow rank changes no number of a run; it only takes everybody's time. All ranks see the same
times, so all come to the same answer.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW_STEPS = 8
"""Steps that are looked at: one that is slow from now on is told after five, within ten."""
MIN_STEPS = WINDOW_STEPS // 2 + 1
RATIO = 1.5
"""How many times the others' time a straggler takes."""
MIN_EXCESS_SECONDS = 0.1
"""A smaller excess is what a busy host does to a process now and then."""


@dataclass(frozen=True, kw_only=True)
class RankTimes:
    """What one rank did in a step, without waiting for others but in the passes of ZeRO 3."""

    data_seconds: float
    """Waiting for its loader."""
    forward_seconds: float
    """Forward passes."""

    @property
    def busy_seconds(self) -> float:
        """All of it."""
        return self.data_seconds + self.forward_seconds


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A rank that is slower than the others; times are medians over the last steps."""

    rank: int
    cause: str
    """`data` or `compute`, whichever of the two exceeds the others' by more."""
    busy_seconds: float
    others_seconds: float

    def describe(self) -> str:
        """Say it in one line."""
        return (
            f"rank {self.rank} is a straggler by {self.cause}: {self.busy_seconds:.3f} s a step "
            f"where the others take {self.others_seconds:.3f} s and then wait for it"
        )


class StragglerWatch:
    """Remembers the last steps of an attempt, and who has been told of."""

    def __init__(self) -> None:
        """Begin with no step seen."""
        self._steps: deque[Sequence[RankTimes]] = deque(maxlen=WINDOW_STEPS)
        self._told: int | None = None

    def note(self, times: Sequence[RankTimes]) -> Straggler | None:
        """Take in a step.

        Args:
            times: Of every rank, in rank order.

        Returns:
            A straggler that has not been told of since it became one.
        """
        self._steps.append(times)
        found = find_straggler(list(self._steps))
        before, self._told = self._told, None if found is None else found.rank
        return None if found is None or found.rank == before else found


def find_straggler(steps: Sequence[Sequence[RankTimes]]) -> Straggler | None:
    """Give the slowest rank if its usual step takes much longer than the others'.

    Args:
        steps: Times of all ranks, by step.
    """
    if len(steps) < MIN_STEPS or len(steps[0]) < 2:
        return None
    ranks = range(len(steps[0]))
    # The lower of two middle ones: half of the steps may be slow for another reason.
    busy = [statistics.median_low(step[rank].busy_seconds for step in steps) for rank in ranks]
    slowest = max(ranks, key=busy.__getitem__)
    others = statistics.median(busy[rank] for rank in ranks if rank != slowest)
    if busy[slowest] < RATIO * others or busy[slowest] - others < MIN_EXCESS_SECONDS:
        return None
    data = [statistics.median_low(step[rank].data_seconds for step in steps) for rank in ranks]
    data_excess = data[slowest] - statistics.median(data[r] for r in ranks if r != slowest)
    return Straggler(
        rank=slowest,
        cause="data" if data_excess > (busy[slowest] - others) / 2 else "compute",
        busy_seconds=busy[slowest],
        others_seconds=others,
    )

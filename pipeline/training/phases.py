"""From the phases that a rank passes to its heartbeat, and to the faults that a test wants there.

`enter` stands wherever a rank begins something that can hang or fail. Outside of `following` it
does nothing: one look at a variable.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from pipeline.data.loader import TokenBatch
from pipeline.training.faults import FaultPlan, Phase, load_plan
from pipeline.training.heartbeat import Heartbeat


class Scalable(Protocol):
    """A number or a tensor."""

    def __mul__(self, factor: float, /) -> "Scalable": ...


Value = TypeVar("Value", bound=Scalable)


class Follower:
    """Follows one rank through one attempt."""

    def __init__(self, heartbeat: Heartbeat, faults: FaultPlan | None) -> None:
        """Begin before the first phase.

        Args:
            heartbeat: Where the rank says how far it is.
            faults: What is to go wrong; None nothing.
        """
        self._heartbeat = heartbeat
        self.faults = faults
        self.step = 0
        self._thread = threading.get_ident()

    def enter(self, phase: Phase, step: int | None) -> None:
        """Beat, then let the fault of this place strike; see the function `enter`."""
        # A checkpoint that is written by a thread of its own must not pass for progress.
        if threading.get_ident() == self._thread:
            self.step = self.step if step is None else step
            self._heartbeat.beat(self.step, phase)
        if self.faults is not None:
            self.faults.strike(phase, self.step if step is None else step)


_follower: Follower | None = None


@contextmanager
def following(run_dir: Path, heartbeat: Heartbeat, attempt: int) -> Iterator[None]:
    """Follow this rank while the block runs.

    Args:
        run_dir: The run directory.
        heartbeat: Where the rank says how far it is.
        attempt: Which start of the run this is, from 1.

    Raises:
        ConfigError: The environment names a fault plan that cannot be used.
    """
    global _follower
    plan = load_plan(run_dir, int(os.environ.get("RANK", "0")), attempt)
    _follower = Follower(heartbeat, plan)
    try:
        yield
    finally:
        _follower = None


def enter(phase: Phase, step: int | None = None) -> None:
    """Say that this rank begins a phase.

    Args:
        phase: Which one.
        step: The optimizer step that it belongs to, from 1; None is the one of the phase before.
    """
    if _follower is not None:
        _follower.enter(phase, step)


def altered(phase: Phase, value: Value) -> Value:
    """Give a value as a fault leaves it; without one, the value itself."""
    if _follower is None or _follower.faults is None:
        return value
    factor = _follower.faults.strike(phase, _follower.step)
    return value if factor == 1.0 else value * factor  # type: ignore[return-value]


def note_samples(micro_batches: Sequence[TokenBatch]) -> None:
    """Write down which samples this rank reads in the step in progress, where a plan is set."""
    if _follower is not None and _follower.faults is not None:
        ids = [int(number) for batch in micro_batches for number in batch.sample_ids]
        _follower.faults.note_samples(_follower.step, ids)

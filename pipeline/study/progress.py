"""What a study tells while it runs: which step, how far, how long it may still take."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config.schema import RunConfig
from pipeline.study.estimate import expect_seconds, training_flops
from pipeline.study.plan import StudyPlan
from pipeline.study.planned import Cell, TrainCell
from pipeline.study.timeline import Outcome, Phase, Step, append_step


@dataclass(frozen=True, kw_only=True)
class StudyEvent:
    """A step of a study that begins or has ended."""

    kind: Literal["begin", "end"]
    phase: Phase
    cell: str | None
    """Name of the cell; None for preparing and reporting."""
    index: int
    """Which step this is, from 1."""
    total: int
    """Number of steps."""
    expected_seconds: float | None
    """Rough expectation for this step, good to a factor of about two; None where there is none."""
    remaining_seconds: float | None
    """Rough expectation for this step, if it begins, and all later ones."""
    outcome: Outcome | Literal["skipped"] | None = None
    """How the step ended; skipped is a cell that was finished already."""
    seconds: float | None = None
    """How long the step took."""
    message: str = ""
    """Why it failed."""


class Progress:
    """Tells what runs, keeps the timeline, and expects what is still to come."""

    def __init__(self, plan: StudyPlan, on_event: Callable[[StudyEvent], None]) -> None:
        """Begin before the first step.

        Args:
            plan: The cells.
            on_event: Called when a step begins and ends.
        """
        self._plan = plan
        self._on_event = on_event
        self._total = plan.num_cells + 2
        self._index = 0
        self._rate: float | None = None
        self._pending: list[Cell] = list(plan.cells)

    def begin(self, phase: Phase, cell: Cell | None) -> None:
        """Announce a step."""
        self._index += 1
        self._emit("begin", phase, cell)

    def skip(self, cell: Cell) -> None:
        """Announce that a cell was finished already."""
        self._index += 1
        self._pending.remove(cell)
        self._emit("end", phase_of(cell), cell, outcome="skipped")

    def end(
        self, phase: Phase, cell: Cell | None, started: float, outcome: Outcome, reason: str = ""
    ) -> None:
        """Announce how a step ended and add it to the timeline.

        Args:
            phase: Kind of step.
            cell: The cell, if it is one.
            started: Unix seconds.
            outcome: How it ended.
            reason: Why it failed.
        """
        seconds = time.time() - started
        step = Step(
            phase=phase,
            cell=cell.name if cell else None,
            started_unix_seconds=started,
            seconds=seconds,
            outcome=outcome,
            reason=reason or None,
        )
        append_step(self._plan.directory, step)
        if cell is not None:
            self._pending.remove(cell)
        if isinstance(cell, TrainCell) and outcome == "complete":
            flops = training_flops(cell.run, _vocab_size(cell.run))
            self._rate = flops / seconds / cell.num_workers
        self._emit("end", phase, cell, outcome=outcome, seconds=seconds, message=reason)

    def _emit(
        self, kind: Literal["begin", "end"], phase: Phase, cell: Cell | None, **values: Any
    ) -> None:
        pending = [self._expect(other) for other in self._pending]
        self._on_event(
            StudyEvent(
                kind=kind,
                phase=phase,
                cell=cell.name if cell else None,
                index=self._index,
                total=self._total,
                expected_seconds=self._expect(cell) if cell else None,
                remaining_seconds=sum(seconds or 0.0 for seconds in pending),
                **values,
            )
        )

    def _expect(self, cell: Cell) -> float | None:
        run = cell.run if isinstance(cell, TrainCell) else next(iter(cell.runs.values()))
        return expect_seconds(cell, _vocab_size(run), self._rate)


def _vocab_size(run: RunConfig) -> int:
    """Give a vocabulary for expectations only, where a loaded tokenizer leaves it open."""
    return run.model.vocab_size or run.data.tokenizer.vocab_size


def phase_of(cell: Cell) -> Phase:
    """Tell which phase a cell belongs to."""
    return "train" if isinstance(cell, TrainCell) else "probe"

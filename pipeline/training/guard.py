"""Stops a run whose numbers stay non-finite; the engine has already left such steps out."""

from dataclasses import dataclass

from pipeline.errors import TrainingDiverged
from pipeline.training.engine import StepOutcome


@dataclass(frozen=True, kw_only=True)
class SkippedSteps:
    """Steps that were not applied because loss or gradient was not finite."""

    total: int = 0
    """Over the whole run."""
    in_a_row: int = 0
    """Up to now; 0 after a step that was applied."""


def count_skip(
    skipped: SkippedSteps, outcome: StepOutcome, step: int, max_in_a_row: int
) -> SkippedSteps:
    """Give the counts after a step.

    Every rank has the same outcome, so all raise together.

    Args:
        skipped: Counts before the step.
        outcome: What the step did.
        step: Number of the step, from 1.
        max_in_a_row: `guard.max_nonfinite_steps`.

    Raises:
        TrainingDiverged: This is the last of too many skipped steps in a row.
    """
    if outcome.applied:
        return SkippedSteps(total=skipped.total)
    skipped = SkippedSteps(total=skipped.total + 1, in_a_row=skipped.in_a_row + 1)
    if skipped.in_a_row >= max_in_a_row:
        raise TrainingDiverged(
            f"{skipped.in_a_row} steps in a row up to step {step} had a non-finite loss or "
            f"gradient (loss {outcome.loss}, gradient norm {outcome.grad_norm}); none was "
            "applied, the weights are those before them. Lower train.optimizer.learning_rate, or "
            "look at the data of these steps"
        )
    return skipped

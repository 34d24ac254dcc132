"""From what a step measured to whether it counts: non-finite numbers, spikes, and when to stop.

The engine has already left such steps out; here the ranks, which all see the same numbers, keep
count and say what is above the usual.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from pipeline.config.schema import GuardConfig
from pipeline.errors import TrainingDiverged
from pipeline.training.engine import NO_LIMITS, StepLimits, StepOutcome


@dataclass(frozen=True, kw_only=True)
class SkippedSteps:
    """Steps that were not applied, because of a non-finite number or a spike."""

    total: int = 0
    """Over the whole run."""
    in_a_row: int = 0
    """Up to now; 0 after a step that was applied."""


@dataclass(frozen=True, kw_only=True)
class GuardState:
    """What the search for spikes remembers; a checkpoint keeps it as JSON."""

    losses: tuple[float, ...] = ()
    """Losses of the newest applied steps, nats per token, oldest first."""
    grad_norms: tuple[float, ...] = ()
    """Their gradient norms before clipping."""
    num_spikes: int = 0
    """Spikes of the run so far."""
    num_rewinds: int = 0
    """How often the run went back to a checkpoint because of one."""

    def limits(self, guard: GuardConfig) -> StepLimits:
        """Give what the next step may not exceed: mean and `spike_sigmas` deviations of the window.

        Without limit while the window is less than half full, as at the start of a run, where
        loss and norm fall fast.

        Source: SkipStepOptimizer of OLMo-core,
        https://github.com/allenai/OLMo-core/blob/main/src/olmo_core/optim/skip_step_optimizer.py
        """
        if guard.spike == "off" or len(self.losses) < guard.spike_window_steps // 2:
            return NO_LIMITS
        return StepLimits(
            loss=_limit(self.losses, guard.spike_sigmas),
            grad_norm=_limit(self.grad_norms, guard.spike_sigmas),
        )

    def after(self, outcome: StepOutcome, guard: GuardConfig) -> Self:
        """Give the state after a step; only applied steps, which are finite, enter the window."""
        if guard.spike == "off":
            return self
        if not outcome.applied:
            return replace(self, num_spikes=self.num_spikes + int(is_spike(outcome)))
        size = guard.spike_window_steps
        return replace(
            self,
            losses=(*self.losses, outcome.loss)[-size:],
            grad_norms=(*self.grad_norms, outcome.grad_norm)[-size:],
        )

    def to_json(self) -> dict[str, Any]:
        """Give the state as plain values."""
        return {**vars(self), "losses": list(self.losses), "grad_norms": list(self.grad_norms)}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """Give the state of `to_json`; an empty mapping, of an older checkpoint, is a new one."""
        lists = {k: tuple(map(float, tree.get(k, ()))) for k in ("losses", "grad_norms")}
        return cls(
            losses=lists["losses"],
            grad_norms=lists["grad_norms"],
            num_spikes=int(tree.get("num_spikes", 0)),
            num_rewinds=int(tree.get("num_rewinds", 0)),
        )


def is_spike(outcome: StepOutcome) -> bool:
    """Tell whether a step was left out although its numbers are finite."""
    return not outcome.applied and outcome.is_finite


def describe_spike(outcome: StepOutcome, limits: StepLimits, step: int) -> str:
    """Say by which number a step is a spike."""
    found = [
        f"{name} {value:.4g} above {limit:.4g}"
        for name, value, limit in (
            ("loss", outcome.loss, limits.loss),
            ("gradient norm", outcome.grad_norm, limits.grad_norm),
        )
        if value > limit
    ]
    return f"step {step} is a spike: {' and '.join(found)}"


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
        what = "was a spike" if is_spike(outcome) else "had a non-finite loss or gradient"
        raise TrainingDiverged(
            f"{skipped.in_a_row} steps in a row up to step {step} were skipped, the last {what} "
            f"(loss {outcome.loss}, gradient norm {outcome.grad_norm}); none was "
            "applied, the weights are those before them. Lower train.optimizer.learning_rate, or "
            "look at the data of these steps"
        )
    return skipped


def check_policy(
    guard: GuardConfig, state: GuardState, outcome: StepOutcome, limits: StepLimits, step: int
) -> None:
    """Stop the run at a spike where the policy says so; every rank raises.

    Raises:
        TrainingDiverged: The policy is raise, or rewind and there were enough rewinds.
    """
    if not is_spike(outcome):
        return
    told = (
        f"{describe_spike(outcome, limits, step)} ({guard.spike_sigmas:g} standard deviations over "
        f"the last {len(state.losses)} steps); it was not applied"
    )
    if guard.spike == "raise":
        raise TrainingDiverged(
            f"{told}, and guard.spike=raise. The same command starts again from the newest "
            "checkpoint; guard.spike=skip or rewind, in a run of its own, goes on by itself"
        )
    if guard.spike == "rewind" and state.num_rewinds >= guard.max_rewinds:
        raise TrainingDiverged(
            f"{told}, after {state.num_rewinds} rewinds (guard.max_rewinds): leaving data out does "
            "not help. Lower train.optimizer.learning_rate, in a run of its own"
        )


def _limit(values: tuple[float, ...], sigmas: float) -> float:
    """Give mean plus deviations; infinity where all values are equal."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean + sigmas * math.sqrt(variance) if variance > 0.0 else math.inf

"""What a study found, as plain values: the content of `<study>/result.json`."""

from dataclasses import dataclass, field
from typing import Literal

from pipeline.study.fits import Estimate
from pipeline.study.records import Baseline

SCHEMA_VERSION = 1

Status = Literal["complete", "partial", "failed", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """A condition that the study states about itself."""

    name: str
    passed: bool
    text: str
    """The numbers behind the verdict."""


@dataclass(frozen=True, kw_only=True)
class FamilyResult:
    """One family over its seeds; what was not measured is None."""

    label: str
    display_name: str
    runs: list[str]
    num_parameters: int | None
    """All parameters; None where the vocabulary is not known yet."""
    non_embedding_parameters: int
    size_error_fraction: float | None
    """Signed relative difference of the matched quantity from the reference."""
    loss: Estimate | None
    """Final validation loss, nats per token, over the seeds."""
    bits_per_byte: Estimate | None
    tokens_per_second: Estimate | None
    """Median training throughput of all ranks, over the seeds."""
    peak_bytes: Estimate | None
    """Peak memory of the largest rank, over the seeds."""
    position_slope: Estimate | None
    """Change of validation loss per doubling of the position, in nats; the interval is that over
    the seeds, and with one seed the scatter of the positions around the line."""
    step_time_slope: Estimate | None
    """Exponent of step time over sequence length at a fixed number of tokens a step."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One family minus, or over, the reference of the match, else the first family."""

    label: str
    reference: str
    loss_difference: Estimate
    """Nats per token, paired by seed."""
    is_tie: bool
    """Whether the difference of losses is within the published noise of single runs, or with
    several seeds its interval covers zero."""
    throughput_ratio: float | None
    position_slope_difference: Estimate | None
    """Of the loss at each position, on the same validation tokens, paired by seed; the interval is
    as that of `position_slope`."""
    step_time_slope_difference: Estimate | None
    """Paired by round."""


@dataclass(frozen=True, kw_only=True)
class WallTime:
    """Where the seconds of a study went; writing the report is not in it."""

    prepare_seconds: float
    train_cell_seconds: float
    probe_cell_seconds: float
    training_step_seconds: float
    """Optimizer steps of the training runs."""
    timed_step_seconds: float
    """Warm-up and timed steps of the step-time probe."""

    @property
    def total_seconds(self) -> float:
        """Data, cells and nothing else."""
        return self.prepare_seconds + self.train_cell_seconds + self.probe_cell_seconds

    @property
    def step_fraction(self) -> float | None:
        """Share of the time in training and timed steps; None before anything ran."""
        if self.total_seconds <= 0:
            return None
        return (self.training_step_seconds + self.timed_step_seconds) / self.total_seconds


@dataclass(frozen=True, kw_only=True)
class SummaryPoint:
    """One point of a scaling curve in the tracker; `step` is the metric's own axis."""

    metric: str
    step: int
    value: float


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """A whole study."""

    study: str
    status: Status
    """complete; partial when a cell is missing; failed when a check is not met; or stopped."""
    headline: list[str]
    """What was found, in sentences."""
    checks: list[Check]
    missing: dict[str, str]
    """Cells without a result, with the reason."""
    baseline: Baseline | None
    families: list[FamilyResult]
    comparisons: list[Comparison]
    wall_time: WallTime
    summaries: dict[str, list[SummaryPoint]]
    """Label of a family to its scaling curves."""
    schema_version: int = field(default=SCHEMA_VERSION)

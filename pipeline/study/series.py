"""From records of runs and probes to the series that charts draw and sentences quote.

A quantity that a run did not record is absent from its series.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.study.estimate import StateFormula, state_bytes_formula
from pipeline.study.fits import Estimate, Quartiles, estimate_mean, find_quartiles
from pipeline.tracking.events import Event
from pipeline.tracking.store import ProbeResult, RunRecord

MIN_BIN_POSITIONS = 8
"""Positions that a bin needs for an interval from their scatter."""


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """Loss of one run over its course."""

    run: str
    steps: list[int]
    tokens: list[float]
    seconds: list[float]
    loss: list[float]
    """Nats per token."""


@dataclass(frozen=True, kw_only=True)
class PositionBin:
    """Mean validation loss over neighbouring positions of the sample."""

    first: int
    """First position of the bin, counted from 1."""
    last: int
    loss: Estimate
    """The interval is Student's, from the scatter of the positions; single positions have none."""

    @property
    def centre(self) -> float:
        """Geometric middle of the bin."""
        return float((self.first * self.last) ** 0.5)


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Timed optimizer steps of one family at one sequence length."""

    label: str
    sequence_tokens: int
    tokens_per_step: int
    world_size: int
    step_seconds: list[float]
    """One per round, in the order of the rounds."""
    warmup_seconds: float
    """All untimed steps of this arm together."""

    @property
    def quartiles(self) -> Quartiles:
        """Median and middle half of the step time, in seconds."""
        return find_quartiles(self.step_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of a step over its median time, all ranks together."""
        return self.tokens_per_step / self.quartiles.median


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Model state on the fullest rank, measured and by formula."""

    label: str
    zero_stage: int
    world_size: int
    parameters: int
    gradients: int
    optimizer: int
    formula: StateFormula

    @property
    def total(self) -> int:
        """Bytes of parameters, gradients and optimizer state."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def excess_fraction(self) -> float:
        """Signed relative difference between measured and formula."""
        return self.total / self.formula.total - 1.0


def loss_curve(record: RunRecord, kind: str) -> LossCurve:
    """Give the training or validation loss of a run.

    Args:
        record: The run.
        kind: `train` or `eval`; the metric is `<kind>/loss`.
    """
    name = f"{kind}/loss"
    points = [
        (event.step, seconds, event.metrics[name])
        for event, seconds in _with_seconds(record.events)
        if event.kind == kind and name in event.metrics
    ]
    step_tokens = record.config.train.global_batch_tokens
    return LossCurve(
        run=record.result.run,
        steps=[step for step, _, _ in points],
        tokens=[float(step * step_tokens) for step, _, _ in points],
        seconds=[seconds for _, seconds, _ in points],
        loss=[loss for _, _, loss in points],
    )


def _with_seconds(events: Iterable[Event]) -> Iterator[tuple[Event, float]]:
    """Pair each event with the seconds its run had run for, pauses between attempts left out.

    Events that state `progress/seconds` anchor the count; others add the time since the last one.
    """
    anchor_time, anchor_seconds = 0.0, 0.0
    for event in events:
        stated = event.metrics.get("progress/seconds")
        if event.kind in ("start", "resume") or stated is not None:
            anchor_time = event.time_unix_seconds
            anchor_seconds = anchor_seconds if stated is None else stated
        yield event, anchor_seconds + event.time_unix_seconds - anchor_time


def step_seconds_of(record: RunRecord) -> float | None:
    """Give the seconds that the optimizer steps of a run took, or None where it kept no account."""
    return record.result.goodput.get("train_seconds")


def mean_positions(runs: Sequence[RunRecord]) -> list[float] | None:
    """Give the validation loss at each position as the mean over runs; None where none has it."""
    return mean_curve(list(positions_by_seed(runs).values()))


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float] | None:
    """Give the mean of curves of one length; None where there is none."""
    return [float(value) for value in np.mean(curves, axis=0)] if curves else None


def positions_by_seed(runs: Iterable[RunRecord]) -> dict[int, list[float]]:
    """Give the validation loss at each position by the seed of the run, where it was measured."""
    return {
        run.result.seed: run.result.per_position_loss
        for run in runs
        if run.result.per_position_loss is not None
    }


def position_gaps(runs: Iterable[RunRecord], others: Iterable[RunRecord]) -> list[list[float]]:
    """Give the loss at each position minus that of the other family, one curve a common seed.

    Runs on samples of different lengths have no common positions, and no curve.
    """
    own, other = positions_by_seed(runs), positions_by_seed(others)
    return [
        [a - b for a, b in zip(own[seed], other[seed], strict=True)]
        for seed in own
        if seed in other and len(own[seed]) == len(other[seed])
    ]


def bin_positions(losses: Sequence[float]) -> list[PositionBin]:
    """Average a loss by position over bins that grow with the position.

    Args:
        losses: Mean loss at positions 1..T, nats per token.

    Returns:
        Bins with edges at powers of two and their halves: 1, 2, 3, 4-5, 6-7, 8-11, 12-15, ...
    """
    edges = [1]
    while edges[-1] <= len(losses):
        low = 2 ** (edges[-1].bit_length() - 1)
        edges.append(edges[-1] + max(1, low // 2))
    if len(edges) > 2 and 2 * (len(losses) + 1 - edges[-2]) < edges[-1] - edges[-2]:
        # What is left at the end is less than half a bin: it joins the one before.
        del edges[-2]
    bins = []
    for first, end in zip(edges, edges[1:], strict=False):
        values = list(losses[first - 1 : min(end - 1, len(losses))])
        mean = estimate_mean(values)
        if len(values) < MIN_BIN_POSITIONS:
            mean = Estimate(value=mean.value, low=None, high=None, num=len(values))
        bins.append(PositionBin(first=first, last=first + len(values) - 1, loss=mean))
    return bins


def step_times(probes: Iterable[ProbeResult]) -> list[StepTimes]:
    """Give the timed steps of all step-time probes, one entry for each family and length."""
    cells: dict[tuple[int, str, int], list[dict[str, Any]]] = {}
    for probe, record in _records(probes, "step_time"):
        key = (probe.world_size, record["label"], record["sequence_tokens"])
        cells.setdefault(key, []).append(record)
    return [
        StepTimes(
            label=label,
            sequence_tokens=length,
            tokens_per_step=records[0]["tokens_per_step"],
            world_size=world_size,
            step_seconds=[r["step_seconds"] for r in sorted(records, key=lambda r: r["round"])],
            warmup_seconds=sum(r.get("warmup_seconds", 0.0) for r in records),
        )
        for (world_size, label, length), records in cells.items()
    ]


def at_largest_world(times: Sequence[StepTimes]) -> list[StepTimes]:
    """Give the arms of the largest world size that was timed, by sequence length.

    Findings, charts and curves over the length come from these: step times at another number of
    ranks are another measurement.
    """
    largest = max((t.world_size for t in times), default=0)
    return sorted((t for t in times if t.world_size == largest), key=lambda t: t.sequence_tokens)


def by_world_size(times: Sequence[StepTimes]) -> list[StepTimes]:
    """Give the arms that differ in nothing but the world size, by world size.

    Args:
        times: Arms of one family.

    Returns:
        At the longest sequence that was timed at every world size, those with as many tokens a step
        as at the largest one; empty where no length is common.
    """
    world_sizes = {t.world_size for t in times}
    lengths = [{t.sequence_tokens for t in times if t.world_size == size} for size in world_sizes]
    common = set.intersection(*lengths) if lengths else set()
    own = sorted(
        (t for t in times if t.sequence_tokens == max(common, default=0)),
        key=lambda t: t.world_size,
    )
    return [t for t in own if t.tokens_per_step == own[-1].tokens_per_step]


def state_bytes(probes: Iterable[ProbeResult]) -> list[StateBytes]:
    """Give the model state of all model-state probes, of each engine the fullest rank."""
    cells: dict[tuple[int, str, int], list[dict[str, Any]]] = {}
    for probe, record in _records(probes, "model_state"):
        key = (probe.world_size, record["label"], record["zero_stage"])
        cells.setdefault(key, []).append(record)
    return [
        _fullest_rank(label, stage, world_size, records)
        for (world_size, label, stage), records in cells.items()
    ]


def _fullest_rank(
    label: str, zero_stage: int, world_size: int, records: list[dict[str, Any]]
) -> StateBytes:
    names = ("parameter_bytes", "gradient_bytes", "optimizer_bytes")
    fullest = max(records, key=lambda record: sum(record[name] for name in names))
    return StateBytes(
        label=label,
        zero_stage=zero_stage,
        world_size=world_size,
        parameters=fullest["parameter_bytes"],
        gradients=fullest["gradient_bytes"],
        optimizer=fullest["optimizer_bytes"],
        formula=state_bytes_formula(fullest["num_parameters"], zero_stage, world_size),
    )


def _records(
    probes: Iterable[ProbeResult], name: str
) -> Iterator[tuple[ProbeResult, dict[str, Any]]]:
    for probe in probes:
        if probe.probe == name:
            yield from ((probe, record) for record in probe.records)

"""From the records of a study to its result: fits, comparisons, checks and scaling curves."""

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.study.fits import Estimate, estimate_mean, estimate_slope_over_rounds, fit_line
from pipeline.study.headline import NOISE_NATS, write_headline
from pipeline.study.outcome import (
    Check,
    Comparison,
    FamilyResult,
    Status,
    StudyResult,
    SummaryPoint,
    WallTime,
)
from pipeline.study.records import StudyRecords
from pipeline.study.series import (
    StepTimes,
    at_largest_world,
    bin_positions,
    by_world_size,
    loss_curve,
    mean_positions,
    position_gaps,
    positions_by_seed,
    state_bytes,
    step_seconds_of,
    step_times,
)
from pipeline.study.wording import QUANTITIES
from pipeline.tracking.store import RunRecord

FIRST_SLOPE_POSITION = 16
"""The slope over positions starts here: the first tokens gain from any context at all."""


def analyze(records: StudyRecords, *, stopped: bool = False) -> StudyResult:
    """Turn records into a result.

    Args:
        records: The study as it stands on disk.
        stopped: Whether the study ended on request before its last cell.
    """
    all_times = step_times(records.probes.values())
    times = at_largest_world(all_times)
    families = [_describe_family(records, label, times) for label in records.plan.families]
    comparisons = _compare(records, families, times)
    checks = _check(records, families)
    wall_time = measure_wall_time(records, all_times)
    states = state_bytes(records.probes.values())
    return StudyResult(
        study=records.study.name,
        status=_judge(records, checks, stopped),
        headline=write_headline(records, families, comparisons, times, states),
        checks=checks,
        missing=dict(records.missing),
        baseline=records.baseline,
        families=families,
        comparisons=comparisons,
        wall_time=wall_time,
        summaries={label: _summarize(records, label) for label in records.plan.families},
    )


def result_of_headline(records: StudyRecords, headline: list[str], *, stopped: bool) -> StudyResult:
    """Give the result of a study that compares no families at one size: its findings alone.

    Args:
        records: The study as it stands on disk.
        headline: What was found.
        stopped: Whether the study ended on request before its last cell.
    """
    return StudyResult(
        study=records.study.name,
        status=_judge(records, [], stopped),
        headline=headline,
        checks=[],
        missing=dict(records.missing),
        baseline=records.baseline,
        families=[],
        comparisons=[],
        wall_time=measure_wall_time(records, []),
        summaries={},
    )


def _describe_family(records: StudyRecords, label: str, times: Sequence[StepTimes]) -> FamilyResult:
    runs = records.runs_of(label)
    size = records.plan.sizes.get(label)
    counted = runs[0].result.num_parameters if runs else None
    closed_form = records.plan.families[label].model.num_parameters(0)
    return FamilyResult(
        label=label,
        display_name=records.plan.display_name(label),
        runs=[record.result.run for record in runs],
        num_parameters=None if counted is None else counted.total,
        non_embedding_parameters=closed_form.non_embedding,
        size_error_fraction=None if size is None else size.error_fraction,
        loss=_over_seeds(runs, "eval/loss"),
        bits_per_byte=_over_seeds(runs, "eval/bits_per_byte"),
        tokens_per_second=_over_seeds(runs, "perf/tokens_per_second"),
        peak_bytes=_over_seeds(runs, "memory/peak_bytes"),
        position_slope=_position_slope(list(positions_by_seed(runs).values())),
        step_time_slope=_step_time_slope([_rounds(times, label)]),
    )


def _over_seeds(runs: Sequence[RunRecord], name: str) -> Estimate | None:
    values = [r.result.metrics[name].value for r in runs if name in r.result.metrics]
    return estimate_mean(values) if values else None


def _compare(
    records: StudyRecords, families: Sequence[FamilyResult], times: Sequence[StepTimes]
) -> list[Comparison]:
    reference = next(family for family in families if family.label == records.reference)
    comparisons = []
    for family in families:
        if family is reference:
            continue
        difference = _loss_difference(records, family.label, reference.label)
        if difference is None:
            continue
        rounds = [_rounds(times, label) for label in (family.label, reference.label)]
        comparisons.append(
            Comparison(
                label=family.label,
                reference=reference.label,
                loss_difference=difference,
                is_tie=_is_tie(difference),
                throughput_ratio=_ratio(family.tokens_per_second, reference.tokens_per_second),
                position_slope_difference=_position_slope(
                    position_gaps(records.runs_of(family.label), records.runs_of(reference.label))
                ),
                step_time_slope_difference=_step_time_slope(rounds),
            )
        )
    return comparisons


def _loss_difference(records: StudyRecords, label: str, reference: str) -> Estimate | None:
    by_seed = {r.result.seed: r.result.metrics.get("eval/loss") for r in records.runs_of(reference)}
    differences = []
    for record in records.runs_of(label):
        own, other = record.result.metrics.get("eval/loss"), by_seed.get(record.result.seed)
        if own is not None and other is not None:
            differences.append(own.value - other.value)
    return estimate_mean(differences) if differences else None


def _is_tie(difference: Estimate) -> bool:
    """One seed: within the published noise of single runs. Several: the interval covers zero."""
    if difference.num == 1:
        return abs(difference.value) < NOISE_NATS
    return not difference.excludes_zero


def _ratio(value: Estimate | None, reference: Estimate | None) -> float | None:
    return None if value is None or reference is None else value.value / reference.value


def _position_slope(curves: Sequence[Sequence[float]]) -> Estimate | None:
    """Fit loss over log2 of the position, one curve for each seed.

    Positions of one run share their documents and their weights, so only seeds give an interval of
    runs; that of a single curve is the scatter of its positions around the line.
    """
    long = [curve for curve in curves if len(curve) >= 2 * FIRST_SLOPE_POSITION]
    if not long:
        return None
    slopes = []
    for curve in long:
        positions = np.arange(FIRST_SLOPE_POSITION, len(curve) + 1)
        slopes.append(fit_line(list(np.log2(positions)), curve[FIRST_SLOPE_POSITION - 1 :]).slope)
    return slopes[0] if len(slopes) == 1 else estimate_mean([slope.value for slope in slopes])


Rounds = tuple[list[float], list[list[float]]]
"""Sequence lengths, and for each round one step time per length."""


def _rounds(times: Sequence[StepTimes], label: str) -> Rounds | None:
    """Collect the rounds of a family at one world size, in the order of the sequence lengths."""
    own = [t for t in times if t.label == label]
    if len(own) < 2:
        return None
    by_round = [list(row) for row in zip(*(t.step_seconds for t in own), strict=True)]
    return [float(t.sequence_tokens) for t in own], by_round


def _step_time_slope(rounds: Sequence[Rounds | None]) -> Estimate | None:
    """Fit the exponent of one family, or of the ratio of the first to the second."""
    known = [r for r in rounds if r is not None]
    if len(known) < len(rounds):
        return None
    lengths, values = known[0]
    if len(known) == 2:
        values = [
            [a / b for a, b in zip(first, second, strict=True)]
            for first, second in zip(known[0][1], known[1][1], strict=True)
        ]
    return estimate_slope_over_rounds(lengths, values)


def _check(records: StudyRecords, families: Sequence[FamilyResult]) -> list[Check]:
    checks = []
    if records.baseline is not None:
        floor = records.baseline.unigram_entropy_nats
        for family in families:
            if family.loss is None:
                continue
            passed = family.loss.value < floor
            checks.append(
                Check(
                    name=f"{family.label}_beats_unigram",
                    passed=passed,
                    text=f"{family.display_name}: {family.loss.value:.3f} nats/token is "
                    f"{'below' if passed else 'NOT below'} the unigram entropy of the validation "
                    f"text, {floor:.3f} nats/token",
                )
            )
    match = records.study.match
    for family in families:
        if match is None or family.size_error_fraction is None:
            continue
        checks.append(
            Check(
                name=f"{family.label}_is_matched",
                passed=abs(family.size_error_fraction) <= match.tolerance_fraction,
                text=f"{family.display_name}: {QUANTITIES[match.quantity]} differ by "
                f"{family.size_error_fraction:+.2%} from {match.reference}, "
                f"allowed {match.tolerance_fraction:.0%}",
            )
        )
    return checks


def _judge(records: StudyRecords, checks: Sequence[Check], stopped: bool) -> Status:
    if stopped and records.missing:
        return "stopped"
    if not all(check.passed for check in checks):
        return "failed"
    return "partial" if records.missing else "complete"


def measure_wall_time(records: StudyRecords, times: Sequence[StepTimes]) -> WallTime:
    """Add up where the seconds of a study went; `times` are all timed steps."""
    spent = {"prepare": 0.0, "train": 0.0, "probe": 0.0, "report": 0.0}
    for step in records.timeline:
        spent[step.phase] += step.seconds
    return WallTime(
        prepare_seconds=spent["prepare"],
        train_cell_seconds=spent["train"],
        probe_cell_seconds=spent["probe"],
        training_step_seconds=sum(step_seconds_of(r) or 0.0 for r in records.runs.values()),
        timed_step_seconds=sum(sum(t.step_seconds) + t.warmup_seconds for t in times),
    )


def _summarize(records: StudyRecords, label: str) -> list[SummaryPoint]:
    """List the scaling curves of a family for the tracker, each with its own step axis."""
    runs = records.runs_of(label)
    own_times = [t for t in step_times(records.probes.values()) if t.label == label]
    points: list[tuple[str, int, float]] = []
    for times in at_largest_world(own_times):
        length = times.sequence_tokens
        points.append(("scaling/step_seconds", length, times.quartiles.median))
        points.append(("scaling/tokens_per_second", length, times.tokens_per_second))
    for times in by_world_size(own_times):
        num_ranks = times.world_size
        points.append(("scaling/step_seconds_by_ranks", num_ranks, times.quartiles.median))
        points.append(("scaling/tokens_per_second_by_ranks", num_ranks, times.tokens_per_second))
    for state in state_bytes(records.probes.values()):
        if state.label == label:
            name = f"scaling/model_state_bytes_zero{state.zero_stage}"
            points.append((name, state.world_size, float(state.total)))
    positions = mean_positions(runs)
    for bin_ in bin_positions(positions) if positions else []:
        points.append(("scaling/position_loss", round(bin_.centre), bin_.loss.value))
    if runs:
        curve = loss_curve(runs[0], "eval")
        for tokens, loss in zip(curve.tokens, curve.loss, strict=True):
            points.append(("scaling/loss_by_tokens", int(tokens), loss))
        points += _size_points(runs)
    return [SummaryPoint(metric=name, step=step, value=value) for name, step, value in points]


def _size_points(runs: Sequence[RunRecord]) -> list[tuple[str, int, float]]:
    """Give the points whose axis is the number of parameters, as means over the seeds."""
    names: Mapping[str, str] = {
        "scaling/loss": "eval/loss",
        "scaling/bits_per_byte": "eval/bits_per_byte",
        "scaling/tokens_per_second_by_parameters": "perf/tokens_per_second",
        "scaling/peak_bytes_by_parameters": "memory/peak_bytes",
    }
    size = runs[0].result.num_parameters.non_embedding
    estimates = {name: _over_seeds(runs, source) for name, source in names.items()}
    return [(name, size, e.value) for name, e in estimates.items() if e is not None]

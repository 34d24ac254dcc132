"""From records to the tables of a report, every cell as text; a missing measurement is a dash."""

from collections.abc import Callable, Iterable, Mapping

from pipeline.study.fits import Estimate, Quartiles
from pipeline.study.outcome import FamilyResult
from pipeline.study.page import Table
from pipeline.study.records import StudyRecords
from pipeline.study.series import StateBytes, StepTimes
from pipeline.study.wording import say_bytes, say_count, say_estimate, say_number, say_seconds
from pipeline.tracking.store import MetricValue, RunRecord

ABSENT = "\N{EN DASH}"


def tabulate_runs(records: StudyRecords) -> list[Table]:
    """Give the training runs: what each one was, and what it reached."""
    names = [cell.name for cell in records.plan.train_cells]
    runs = [records.runs[name] for name in names if name in records.runs]
    identity = Table(
        columns=(
            "run", "width", "depth", "heads", "parameters", "non-embedding", "FLOPs/token",
            "steps", "tokens", "learning rate", "seed", "ranks", "ZeRO", "precision", "attempts",
        ),
        rows=[_identity(record) for record in runs],
    )  # fmt: skip
    measured = Table(
        columns=(
            "run", "validation loss (nats/token)", "bits/byte", "tokens/s", "step time",
            "peak memory a rank", "model state a rank", "wall time",
        ),
        rows=[_measured(record) for record in runs],
        note="tokens/s and step time are medians over the steps of the run, with the interquartile "
        "range and the number of steps; peak memory is that of the largest rank and includes "
        "interpreter and libraries; the loss is over all validation tokens; the learning rate is "
        "the peak of its schedule.",
    )  # fmt: skip
    return [identity, measured]


def tabulate_families(families: Iterable[FamilyResult]) -> Table:
    """Give each family over its seeds."""
    rows = [
        (
            family.display_name,
            say_count(family.non_embedding_parameters),
            _say_percent(family.size_error_fraction),
            _say_known(family.loss, lambda estimate: say_estimate(estimate, 4)),
            _say_known(family.bits_per_byte, lambda estimate: say_estimate(estimate, 4)),
            _say_known(family.tokens_per_second, lambda estimate: say_count(estimate.value)),
            _say_known(family.peak_bytes, lambda estimate: say_bytes(estimate.value)),
            ", ".join(family.runs) or ABSENT,
        )
        for family in families
    ]
    return Table(
        columns=(
            "family", "non-embedding parameters", "size against reference",
            "validation loss (nats/token)", "bits/byte", "tokens/s", "peak memory a rank", "runs",
        ),
        rows=rows,
    )  # fmt: skip


def tabulate_step_times(times: Iterable[StepTimes], names: Mapping[str, str]) -> Table:
    """Give the timed steps of every arm."""
    rows = [
        (
            names[t.label],
            str(t.sequence_tokens),
            str(t.tokens_per_step // t.sequence_tokens),
            str(t.world_size),
            _say_quartiles(t.quartiles),
            str(t.quartiles.num),
            say_count(t.tokens_per_second),
        )
        for t in sorted(times, key=lambda t: (t.label, t.world_size, t.sequence_tokens))
    ]
    return Table(
        columns=(
            "family", "sequence (tokens)", "sequences a step", "ranks",
            "step time: median (quartiles)", "repeats", "tokens/s",
        ),
        rows=rows,
    )  # fmt: skip


def tabulate_state(states: Iterable[StateBytes], names: Mapping[str, str]) -> Table:
    """Give measured and expected model state of every engine."""
    rows = [
        (
            names[s.label],
            str(s.world_size),
            str(s.zero_stage),
            say_bytes(s.parameters),
            say_bytes(s.gradients),
            say_bytes(s.optimizer),
            say_bytes(s.total),
            say_bytes(s.formula.published),
            say_bytes(s.formula.total),
            f"{say_number(100 * s.excess_fraction, 1)}%",
        )
        for s in sorted(states, key=lambda s: (s.label, s.world_size, s.zero_stage))
    ]
    return Table(
        columns=(
            "family", "ranks", "ZeRO stage", "parameters", "gradients", "optimizer", "total",
            "published formula", "with master weights", "difference",
        ),
        rows=rows,
        note="Bytes of the fullest rank, summed over the distinct tensors of the engine after one "
        "step; each engine is measured once, and the count has no spread. The difference is that "
        "from the formula with DeepSpeed's master weights; padding and uneven parts explain it.",
    )  # fmt: skip


def tabulate_probes(records: StudyRecords) -> Table:
    """Give the probe cells."""
    rows = []
    for cell in records.plan.probe_cells:
        result = records.probes.get(cell.name)
        seconds = None if result is None else (result.ended - result.started).total_seconds()
        rows.append(
            (
                cell.name,
                cell.probe,
                ", ".join(f"{key}={value}" for key, value in cell.params.items()) or ABSENT,
                str(cell.num_workers),
                ABSENT if result is None else str(len(result.records)),
                ABSENT if seconds is None else say_seconds(seconds),
            )
        )
    return Table(
        columns=("cell", "probe", "arguments", "ranks", "records", "wall time"),
        rows=rows,
        num_text_columns=3,
    )


def tabulate_environment(records: StudyRecords) -> Table | None:
    """Give machine and versions, as the first finished cell recorded them."""
    found = [record.result.environment for record in records.runs.values()]
    found += [result.environment for result in records.probes.values()]
    if not found:
        return None
    first = found[0]
    packages = first.get("packages", {})
    rows = [
        (name.replace("_", " "), _say_value(name, first[name]))
        for name in (
            "cpu_model", "num_cores", "memory_bytes", "device", "platform", "python", "git_commit",
        )
        if name in first
    ]  # fmt: skip
    rows += [(name, str(version)) for name, version in packages.items()]
    return Table(columns=("what", "value"), rows=rows, num_text_columns=2)


def _say_known(estimate: Estimate | None, say: Callable[[Estimate], str]) -> str:
    return ABSENT if estimate is None else say(estimate)


def _say_percent(fraction: float | None) -> str:
    return ABSENT if fraction is None else f"{say_number(100 * fraction, 2)}%"


def _say_value(name: str, value: object) -> str:
    return say_bytes(float(str(value))) if name.endswith("_bytes") else str(value)


def _identity(record: RunRecord) -> tuple[str, ...]:
    result, config = record.result, record.config
    return (
        result.run,
        str(config.model.width),
        str(config.model.depth),
        str(config.model.heads),
        say_count(result.num_parameters.total),
        say_count(result.num_parameters.non_embedding),
        f"{result.flops_per_token / 1e6:.2f} M",
        say_count(result.steps),
        say_count(result.tokens),
        f"{config.train.optimizer.learning_rate:g}",
        str(result.seed),
        str(result.world_size),
        str(result.zero_stage),
        result.precision,
        str(result.attempts),
    )


def _measured(record: RunRecord) -> tuple[str, ...]:
    metrics = record.result.metrics
    states = record.result.model_state_bytes
    largest = (
        max((s.parameters + s.gradients + s.optimizer for s in states), default=None)
        if states
        else None
    )
    wall = (record.result.ended - record.result.started).total_seconds()
    return (
        record.result.run,
        _say_metric(metrics.get("eval/loss"), lambda value: f"{value:.4f}"),
        _say_metric(metrics.get("eval/bits_per_byte"), lambda value: f"{value:.4f}"),
        _say_metric(metrics.get("perf/tokens_per_second"), say_count),
        _say_metric(metrics.get("perf/step_seconds"), say_seconds),
        _say_metric(metrics.get("memory/peak_bytes"), say_bytes),
        ABSENT if largest is None else say_bytes(largest),
        say_seconds(wall),
    )


def _say_metric(metric: MetricValue | None, say: Callable[[float], str]) -> str:
    if metric is None:
        return ABSENT
    if metric.spread is None:
        return say(metric.value)
    return f"{say(metric.value)} (IQR {say(metric.spread)}, n={metric.num})"


def _say_quartiles(quartiles: Quartiles) -> str:
    low, middle, high = (1e3 * v for v in (quartiles.low, quartiles.median, quartiles.high))
    return f"{middle:.1f} ms ({low:.1f} to {high:.1f})"

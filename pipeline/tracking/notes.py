"""From configs and results to the Markdown descriptions that MLflow shows on top of a run."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.config.schema import RunConfig
from pipeline.config.study import StudyConfig
from pipeline.tracking.metrics import METRICS
from pipeline.tracking.store import ProbeResult, RunResult


def describe_study(
    study: StudyConfig, headline: Sequence[str], num_finished: int, num_cells: int
) -> str:
    """Describe a study: what it found, and where to look.

    Args:
        study: The study.
        headline: What it found, in sentences; empty before it has ended.
        num_finished: Cells with a verdict.
        num_cells: Cells that were started.
    """
    found = "\n".join(f"- {sentence}" for sentence in headline)
    return "\n\n".join(
        [
            f"**Study {study.name}**: {' and '.join(study.families)}, "
            f"{_count(len(study.seeds), 'seed')} each; {num_finished} of "
            f"{_count(num_cells, 'started cell')} ended.",
            *([found] if found else []),
            "The whole report is the artifact `report.html`. The child runs are the training runs "
            "and the probes; select the runs named `scaling: ...` and press Compare for curves "
            "over sequence length, ranks and parameters.",
        ]
    )


def describe_run(config: RunConfig, result: RunResult | None, attempt: int) -> str:
    """Describe a training run; without a result, what it is going to be."""
    model = config.model
    lines = [
        f"**{model.family}**, width {model.width}, depth {model.depth}; {config.precision}, "
        f"ZeRO stage {config.zero.stage}, seed {config.seed}. Budget "
        f"{config.train.total_tokens:,} tokens in {config.train.total_steps:,} steps of "
        f"{config.train.global_batch_tokens:,}, sequences of {config.train.sequence_tokens:,}."
    ]
    if result is not None:
        size = result.num_parameters
        lines.append(
            f"Done: {size.total:,} parameters ({size.non_embedding:,} outside the embedding), "
            f"{_count(result.world_size, 'rank')}, {result.tokens:,} tokens in "
            f"{result.steps:,} steps."
        )
        lines.append(_table(result))
    if attempt > 1:
        lines.append(
            f"Started {attempt} times. Only points that the final state descends from are shown; "
            "the event log holds the rest."
        )
    return "\n\n".join(lines)


def describe_probe(result: ProbeResult, table: str) -> str:
    """Describe a probe cell.

    Args:
        result: What it measured.
        table: Name of the artifact with the records.
    """
    return (
        f"**Probe {result.probe}** on {_count(result.world_size, 'rank')}: "
        f"{_count(len(result.records), 'record')}, in the artifact `{table}`."
    )


def describe_summary(family: str, names: Iterable[str]) -> str:
    """Describe a summary run: which step axis each of its metrics has."""
    rows = [
        f"| `{name}` | {METRICS[name].axis} | {METRICS[name].unit} | {METRICS[name].meaning} |"
        for name in sorted(names)
    ]
    return "\n".join(
        [
            f"**Scaling of {family}.** The step axis of these metrics is not time:",
            "",
            "| metric | step axis | unit | meaning |",
            "|---|---|---|---|",
            *rows,
            "",
            "Select this run and that of another family and press Compare.",
        ]
    )


def describe_data(
    name: str,
    fingerprint: str,
    manifest: Mapping[str, Any] | None,
    totals: Mapping[str, Any],
    attempt: int,
) -> str:
    """Describe the preparation of shards; without a manifest, how far it is.

    Args:
        name: Of its sources.
        fingerprint: Of the shards.
        manifest: Of the shards, once they are all there.
        totals: Free fields of the last event: documents left out, by reason.
        attempt: How often it was started.
    """
    parts = [f"**Data {name}**, fingerprint `{fingerprint}`."]
    if manifest is None:
        parts.append("Its shards are not all written.")
    else:
        rows = [_split_row(split, record) for split, record in manifest["splits"].items()]
        head = "| split | shards | documents | tokens | text bytes |"
        parts += [
            f"Encoded by {manifest.get('encoder')} {manifest.get('encoder_version')} with a "
            f"vocabulary of {manifest.get('vocab_size', 0):,}.",
            "\n".join([head, "|---|---:|---:|---:|---:|", *rows]),
        ]
    reasons = [
        f"| {what} | {reason} | {number:,} |"
        for what in ("dropped", "quarantined")
        for reason, number in totals.get(what, {}).items()
    ]
    if reasons:
        parts.append("\n".join(["| left out | reason | number |", "|---|---|---:|", *reasons]))
    if attempt > 1:
        parts.append(f"Started {attempt} times; it went on from the splits that were done.")
    parts.append(
        "The step axis is the number of splits done. The training runs on these shards are found "
        f'in their experiments by the search `tags.data_fingerprint = "{fingerprint}"`.'
    )
    return "\n\n".join(parts)


def _split_row(split: str, record: Mapping[str, Any]) -> str:
    return (
        f"| {split} | {len(record['shards']):,} | {record['documents']:,} | "
        f"{record['tokens']:,} | {record.get('text_bytes', 0):,} |"
    )


def _table(result: RunResult) -> str:
    rows = [
        f"| `{name}` | {metric.value:.6g} | {metric.unit} | {metric.num} |"
        for name, metric in result.metrics.items()
    ]
    return "\n".join(["| metric | value | unit | n |", "|---|---:|---|---:|", *rows])


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"

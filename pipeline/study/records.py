"""From a study directory to everything that its cells left there, keyed by cell."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.config.batching import IGNORED_LABEL
from pipeline.config.load import read_study
from pipeline.config.study import StudyConfig
from pipeline.data.loader import ValidationBatches
from pipeline.data.shards import ShardSet, load_manifest
from pipeline.study.plan import StudyPlan, plan_study
from pipeline.study.timeline import Step, list_failures, read_timeline
from pipeline.tracking.store import ProbeResult, RunRecord, read_probes, read_runs


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What a model without context reaches on the validation text."""

    unigram_entropy_nats: float
    """Entropy of the validation tokens' own frequencies: no model without context does better."""
    validation_tokens: int
    train_tokens: int
    """Tokens of the training split, each seen once an epoch."""
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class StudyRecords:
    """A study as it stands on disk."""

    study: StudyConfig
    plan: StudyPlan
    runs: Mapping[str, RunRecord]
    """Finished training cells by name."""
    probes: Mapping[str, ProbeResult]
    """Finished probe cells by name."""
    missing: Mapping[str, str]
    """Cells without a result, with the reason."""
    timeline: list[Step]
    baseline: Baseline | None
    """None where no training cell has finished."""

    @property
    def reference(self) -> str:
        """Label of the family that the others are compared with."""
        match = self.study.match
        return next(iter(self.plan.families)) if match is None else match.reference

    def runs_of(self, label: str) -> list[RunRecord]:
        """Give the finished runs of a family, one per seed."""
        names = [cell.name for cell in self.plan.train_cells if cell.label == label]
        return [self.runs[name] for name in names if name in self.runs]


def read_records(study_dir: Path) -> StudyRecords:
    """Read a study from its directory; the directory may have been moved since it ran.

    Raises:
        ConfigError: `study.yaml` is missing or not a study.
        DataError: The prepared text that the runs were trained on is gone.
        TrackingError: A result cannot be read.
    """
    study = read_study(study_dir)
    plan = replace(plan_study(study), directory=study_dir)
    planned = {cell.name for cell in plan.cells}
    runs = {r.run_dir.name: r for r in read_runs(study_dir) if r.run_dir.name in planned}
    probes = {r.run: r for r in read_probes(study_dir) if r.run in planned}
    timeline = read_timeline(study_dir)
    return StudyRecords(
        study=study,
        plan=plan,
        runs=runs,
        probes=probes,
        missing=_find_missing(plan, {*runs, *probes}, timeline),
        timeline=timeline,
        baseline=_measure_baseline(list(runs.values())),
    )


def measure_unigram(
    prepared_dir: Path, sequence_tokens: int, max_tokens: int | None = None
) -> Baseline:
    """Measure the entropy of single validation tokens, those that evaluation scores.

    Args:
        prepared_dir: Directory of prepared shards.
        sequence_tokens: T of the runs.
        max_tokens: Labels that evaluation scores; None scores all.

    Returns:
        The entropy in nats per token, end-of-document tokens included as in the validation loss.

    Raises:
        DataError: The directory is not prepared, or holds less than one sample.
    """
    manifest = load_manifest(prepared_dir)
    shards = ShardSet(manifest, "validation")
    batches = ValidationBatches(shards, sequence_tokens, 1, 0, 1, max_tokens)
    counts = np.zeros(manifest.vocab_size, dtype=np.int64)
    for batch in batches:
        scored = batch.labels[batch.labels != IGNORED_LABEL]
        counts += np.bincount(scored, minlength=manifest.vocab_size)
    return Baseline(
        unigram_entropy_nats=entropy_nats(counts),
        validation_tokens=batches.num_labels,
        train_tokens=manifest.splits["train"].tokens,
        vocab_size=manifest.vocab_size,
    )


def entropy_nats(counts: np.ndarray) -> float:
    """Give the entropy of a distribution given as counts, in nats."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _measure_baseline(runs: list[RunRecord]) -> Baseline | None:
    for run in runs:
        if run.config.data.prepared_dir is not None:
            return measure_unigram(
                run.config.data.prepared_dir,
                run.config.train.sequence_tokens,
                run.config.eval.max_tokens,
            )
    return None


def _find_missing(plan: StudyPlan, finished: set[str], timeline: list[Step]) -> dict[str, str]:
    failures = list_failures(timeline)
    names = [cell.name for cell in plan.cells]
    return {name: failures.get(name, "it has not run") for name in names if name not in finished}

"""From a study to its finished directory: data once, then every cell, then analysis and report.

A cell that is finished already is left as it is; one that fails is listed and the others still run.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from pipeline.config.data import DataConfig
from pipeline.config.load import STUDY_FILE, dump_yaml
from pipeline.config.study import StudyConfig
from pipeline.data.checks import check_prepared
from pipeline.data.shards import ShardManifest
from pipeline.errors import PipelineError
from pipeline.study.analyze import analyze
from pipeline.study.cells import refuse_other_study, write_cell
from pipeline.study.ladder_report import report_ladder
from pipeline.study.outcome import StudyResult
from pipeline.study.plan import StudyPlan, plan_study
from pipeline.study.planned import Cell, ProbeCell
from pipeline.study.progress import Progress, StudyEvent, phase_of
from pipeline.study.records import read_records
from pipeline.study.report import write_report
from pipeline.study.search_report import report_search
from pipeline.study.timeline import Outcome
from pipeline.tracking.atomic import write_text_atomic
from pipeline.tracking.store import (
    RESULT_FILE,
    Verdict,
    read_verdict,
    write_json_atomic,
)


class Launcher(Protocol):
    """Runs all ranks of one run directory."""

    def run(
        self, run_dir: Path, *, num_workers: int, stop_after_steps: int | None = None
    ) -> Verdict:
        """Run to a verdict.

        Raises:
            LaunchError: A rank failed or was lost.
        """
        ...

    def command(self, run_dir: Path, *, num_workers: int) -> list[str]:
        """Give the command that runs the same ranks by hand."""
        ...


Prepare = Callable[[DataConfig], ShardManifest]
Quiet = Callable[[], AbstractContextManager[None]]


def never() -> bool:
    """Tell that nobody asked for a stop."""
    return False


def run_study(
    study: StudyConfig,
    launcher: Launcher,
    *,
    prepare: Prepare,
    on_event: Callable[[StudyEvent], None] = lambda event: None,
    quiet: Quiet = nullcontext,
    should_stop: Callable[[], bool] = never,
) -> StudyResult:
    """Run every cell that is not finished yet, then analyze and report.

    Args:
        study: The study; `output_dir` is absolute.
        launcher: Runs the ranks of a cell.
        prepare: Tokenizes the text, or finds it prepared.
        on_event: Called when a step begins and ends.
        quiet: Entered around probe cells; whatever else computes on the host should rest inside.
        should_stop: Asked after preparing and after each cell. A request that reached no run, in
            the last step of one or during a probe, stops the study here.

    Returns:
        The result; the caller fails unless its status is complete.

    Raises:
        ConfigError: The study contradicts itself, its directory belongs to another study, or an
            embedding table is too small for the tokenizer.
        DataError: The text cannot be prepared, or is too short for a run.
    """
    plan = plan_study(study)
    plan.directory.mkdir(parents=True, exist_ok=True)
    refuse_other_study(plan)
    (plan.directory / RESULT_FILE).unlink(missing_ok=True)
    write_text_atomic(plan.directory / STUDY_FILE, dump_yaml(study))
    progress = Progress(plan, on_event)
    manifest = _prepare(plan, prepare, progress)
    stopped = False
    for cell in plan.cells:
        if stopped or should_stop():
            stopped = True
            break
        run_dir = write_cell(plan, cell, manifest)
        if read_verdict(run_dir) == "complete":
            progress.skip(cell)
            continue
        with quiet() if isinstance(cell, ProbeCell) else nullcontext():
            stopped = _run_cell(launcher, cell, run_dir, progress) == "stopped"
    progress.begin("report", None)
    started = time.time()
    result = report_study(plan.directory, stopped=stopped)
    progress.end("report", None, started, "complete")
    return result


def report_study(study_dir: Path, *, stopped: bool = False) -> StudyResult:
    """Analyze what a study directory holds, and write report and result.

    Args:
        study_dir: Directory of the study.
        stopped: Whether the study ended on request before its last cell.

    Raises:
        ConfigError: The directory holds no study.
        DataError: The prepared text is gone.
        TrackingError: A result cannot be read.
    """
    records = read_records(study_dir)
    if records.study.ladder is not None:
        result = report_ladder(records, stopped=stopped)
    elif records.study.search is not None:
        result = report_search(records, records.study.search, stopped=stopped)
    else:
        result = analyze(records, stopped=stopped)
        write_report(result, records)
    write_json_atomic(study_dir / RESULT_FILE, asdict(result))
    return result


def _prepare(plan: StudyPlan, prepare: Prepare, progress: Progress) -> ShardManifest:
    """Prepare the text that all families share, and check that it suffices for each."""
    progress.begin("prepare", None)
    started = time.time()
    manifest = prepare(next(iter(plan.families.values())).data)
    for label, run in plan.families.items():
        try:
            check_prepared(run, manifest)
        except PipelineError as exc:
            raise type(exc)(f"families.{label}: {exc}") from exc
    progress.end("prepare", None, started, "complete")
    return manifest


def _run_cell(launcher: Launcher, cell: Cell, run_dir: Path, progress: Progress) -> Outcome:
    phase = phase_of(cell)
    progress.begin(phase, cell)
    started = time.time()
    outcome: Outcome
    try:
        outcome = launcher.run(run_dir, num_workers=cell.num_workers)
        reason = ""
        if outcome == "complete" and read_verdict(run_dir) != "complete":
            outcome, reason = "failed", "the ranks ended well but left no result.json"
    except PipelineError as exc:
        outcome, reason = "failed", str(exc)
    progress.end(phase, cell, started, outcome, reason)
    return outcome

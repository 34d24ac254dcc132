"""The verbs about studies: quickstart, study, report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.options import (
    EXIT_STOPPED,
    AsJson,
    DryRun,
    LauncherName,
    Overrides,
    as_tree,
    for_ray_job,
    states_output,
)

if TYPE_CHECKING:
    from launch.display import Display
    from launch.stopping import StopRequest
    from pipeline.config.data import DataConfig
    from pipeline.config.study import StudyConfig
    from pipeline.data.shards import ShardManifest
    from pipeline.study.outcome import StudyResult
    from pipeline.study.plan import StudyPlan
    from pipeline.study.planned import Cell
    from pipeline.study.progress import StudyEvent

EstimatedOn = Annotated[
    Path | None,
    typer.Option("--cluster", metavar="FILE", help="With --dry-run: machines to estimate on."),
]

QUICKSTART = Path(__file__).resolve().parent.parent / "configs" / "study" / "quickstart.yaml"


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command()(quickstart)
    app.command()(study)
    app.command()(report)


def quickstart(
    overrides: Overrides = None, dry_run: DryRun = False, as_json: AsJson = False
) -> None:
    """Train both families on the embedded text and report, in about five minutes on two cores."""
    study(QUICKSTART, overrides, dry_run=dry_run, as_json=as_json)


def study(
    config: Annotated[Path, typer.Argument(metavar="STUDY", help="Study YAML.")],
    overrides: Overrides = None,
    launcher: LauncherName = None,
    cluster: EstimatedOn = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Run every cell of a study that is not finished, then analyze and report."""
    from launch import build_launcher
    from launch.display import Display, WatchedLauncher
    from launch.expecting import ExpectingLauncher
    from launch.stopping import StopRequest
    from launch.study_estimate import with_hardware
    from pipeline.study.plan import plan_study

    display = Display(as_json=as_json)
    loaded = load(config, list(overrides or []), launcher)
    loaded = with_hardware(loaded, cluster, is_dry_run=dry_run)
    plan = plan_study(loaded)
    stop = StopRequest(display.say)
    expecting = ExpectingLauncher(
        launcher=build_launcher(loaded.cluster, stop), cluster=loaded.cluster, say=display.say
    )
    starter = WatchedLauncher(launcher=expecting, display=display)
    if dry_run:
        answer_dry_run(display, loaded, plan, starter)
        return
    result = execute(loaded, plan, starter, stop, display)
    answer_study(display, plan.directory, result)


def report(
    directory: Annotated[Path, typer.Argument(metavar="STUDY_DIR", help="Directory of a study.")],
    as_json: AsJson = False,
) -> None:
    """Analyze a study again from its directory and write its report anew."""
    from launch.display import Display
    from pipeline.study.execute import report_study

    answer_study(Display(as_json=as_json), directory, report_study(directory))


def load(config: Path, overrides: list[str], launcher: str | None) -> "StudyConfig":
    """Load a study for this process: launcher and output as the surroundings demand.

    Raises:
        ConfigError: The study is wrong, or a Ray job does not say where results go.
    """
    from launch.environment import check_output_is_stated, expected_accelerator
    from pipeline.config.cluster import check_run_on_cluster
    from pipeline.config.load import load_study
    from pipeline.probes.params import check_probe
    from pipeline.study.plan import plan_study

    if launcher is not None:
        overrides = [*overrides, f"cluster.launcher={launcher}"]
    check_output_is_stated(states_output(config, overrides))
    loaded = load_study(config, overrides)
    cluster = for_ray_job(loaded.cluster)
    accelerator = expected_accelerator(cluster.launcher, cluster.accelerator) or "cuda"
    plan = plan_study(loaded)
    for run in plan.families.values():
        check_run_on_cluster(run, cluster.num_workers, accelerator)
    for cell in plan.probe_cells:
        check_probe(cell.probe, cell.params, cell.runs, cell.num_workers)
    return loaded.model_copy(update={"cluster": cluster})


def execute(
    loaded: "StudyConfig",
    plan: "StudyPlan",
    launcher: Any,
    stop: "StopRequest",
    display: "Display",
) -> "StudyResult":
    """Run a study with its events replayed to MLflow beside it."""
    from contextlib import ExitStack

    from launch.preparing import preparing
    from launch.run_lock import alone_in
    from launch.sync_process import syncing
    from pipeline.data.ray_tasks import ray_session
    from pipeline.study.execute import run_study
    from pipeline.tracking.mlflow_sync import uri_beside

    configured = next(iter(plan.families.values())).tracking.uri
    uri = uri_beside(loaded.output_dir, configured)
    plan.directory.mkdir(parents=True, exist_ok=True)
    display.say(
        f"study {loaded.name}: {plan.num_cells} cells, launcher {loaded.cluster.launcher}, "
        f"results in {plan.directory}"
    )

    prepare = preparing(display, indent="  ")

    def prepare_and_listen(data: "DataConfig") -> "ShardManifest":
        manifest = prepare(data)
        stop.listen_again()
        return manifest

    with ExitStack() as stack:
        if loaded.cluster.launcher == "ray":
            stack.enter_context(ray_session(loaded.cluster.ray_address, loaded.cluster.num_workers))
        stack.enter_context(alone_in(plan.directory))
        stack.enter_context(stop.listening())
        process = stack.enter_context(syncing(plan.directory, uri, display.say))
        return run_study(
            loaded,
            launcher,
            prepare=prepare_and_listen,
            on_event=lambda event: display.say(describe_event(event)),
            quiet=process.paused,
            should_stop=lambda: stop.is_made,
        )


def describe_event(event: "StudyEvent") -> str:
    """Say in one line which step of a study begins or has ended."""
    from launch.display import format_seconds

    what = f"[{event.index}/{event.total}] {event.phase} {event.cell or ''}".rstrip()
    if event.kind == "begin":
        parts = []
        if event.expected_seconds is not None:
            parts.append(f"about {format_seconds(event.expected_seconds)}")
        if event.remaining_seconds:
            parts.append(f"about {format_seconds(event.remaining_seconds)} until all is done")
        return f"{what}: {', '.join(parts)}" if parts else what
    if event.outcome == "skipped":
        return f"{what}: finished already"
    ending = f"{what}: {event.outcome} in {format_seconds(event.seconds or 0.0)}"
    return f"{ending}: {event.message}" if event.message else ending


def answer_dry_run(
    display: "Display", loaded: "StudyConfig", plan: "StudyPlan", launcher: Any
) -> None:
    """Show the resolved study, its cells, what each will take and the command of each.

    Nothing is started.
    """
    import yaml

    from launch.study_estimate import cell_lines, estimate_cell

    planned: list[Cell] = [*plan.train_cells, *plan.probe_cells]
    cells = [
        {
            "name": cell.name,
            "num_workers": cell.num_workers,
            "command": launcher.command(plan.run_dir(cell), num_workers=cell.num_workers),
            "estimate": estimate_cell(cell, loaded.cluster),
        }
        for cell in planned
    ]
    sizes = {label: as_plain(size) for label, size in plan.sizes.items()}
    payload = {
        "directory": str(plan.directory),
        "study": as_tree(loaded),
        "sizes": sizes,
        "cells": cells,
    }
    lines = [yaml.safe_dump(as_tree(loaded), sort_keys=False).rstrip()]
    lines += [f"{label}: {size}" for label, size in sizes.items()]
    lines += cell_lines(cells)
    lines += [f"would run: {' '.join(cell['command'])}" for cell in cells]
    display.answer(payload, lines)


def as_plain(size: Any) -> dict[str, Any]:
    """Give a matched size as plain values: shape and distance from the target."""
    return {
        "model": as_tree(size.model),
        "num_parameters": size.num_parameters,
        "target": size.target,
    }


def answer_study(display: "Display", directory: Path, result: "StudyResult") -> None:
    """Show what a study found and where it stands.

    Raises:
        typer.Exit: 1 when something is missing or a check failed, 75 when it was stopped.
    """
    from dataclasses import asdict

    lines = ["", f"study {result.study}: {result.status}"]
    lines += [f"  {sentence}" for sentence in result.headline]
    lines += [f"  check not met: {check.text}" for check in result.checks if not check.passed]
    lines += [f"  missing: {cell}: {reason}" for cell, reason in result.missing.items()]
    lines += [
        "",
        f"report: {directory / 'report.html'} (open it in a browser; report.md is its text)",
        f"MLflow: python -m launch ui {directory.parent}",
    ]
    if result.status == "stopped":
        lines.append("the same command goes on from here")
    display.answer({"directory": str(directory), **asdict(result)}, lines)
    if result.status != "complete":
        raise typer.Exit(EXIT_STOPPED if result.status == "stopped" else 1)

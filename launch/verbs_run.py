"""The verbs about one run: init, train."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.options import (
    EXIT_STOPPED,
    AsJson,
    ClusterFile,
    DryRun,
    LauncherName,
    NumWorkers,
    Overrides,
    RunRequest,
    as_tree,
    load_request,
)

RunFile = Annotated[Path, typer.Argument(metavar="RUN", help="Run YAML, or a run directory.")]
StopAfter = Annotated[
    int | None, typer.Option(metavar="N", help="Stop with a checkpoint after N steps.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Start even where the estimate says that memory is short.")
]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command()(train)
    app.command()(init)


def train(
    config: RunFile,
    overrides: Overrides = None,
    launcher: LauncherName = None,
    cluster: ClusterFile = None,
    workers: NumWorkers = None,
    stop_after_steps: StopAfter = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train one run; the same command again goes on from its newest checkpoint."""
    from contextlib import ExitStack

    from launch import build_launcher
    from launch.display import Display, WatchedLauncher
    from launch.expecting import ExpectingLauncher
    from launch.preparing import preparing
    from launch.run_dirs import init_run
    from launch.run_lock import alone_in
    from launch.stopping import StopRequest
    from launch.sync_process import syncing
    from launch.verbs_estimate import refuse_unless_it_fits
    from pipeline.tracking.mlflow_sync import resolve_uri
    from pipeline.tracking.store import read_verdict

    request = load_request(
        config, overrides, cluster_file=cluster, launcher=launcher, num_workers=workers
    )
    display = Display(as_json=as_json)
    plan = describe(request, display.say)
    refuse_unless_it_fits(request, force=force)
    stop = StopRequest(display.say)
    expecting = ExpectingLauncher(
        launcher=build_launcher(request.cluster, stop), cluster=request.cluster, say=display.say
    )
    starter = WatchedLauncher(launcher=expecting, display=display)
    num_workers = request.cluster.num_workers
    if dry_run:
        command = starter.command(Path(plan["run_dir"]), num_workers=num_workers)
        display.answer(plan | {"command": command}, dry_run_lines(plan, command))
        return
    run_dir = init_run(request.run, preparing(display))
    if read_verdict(run_dir) == "complete":
        display.say(f"{run_dir} is finished already; another run needs another name=NAME")
        answer_run(display, run_dir, "complete")
        return
    display.say(
        f"training {request.run.name}: {num_workers} ranks by {request.cluster.launcher}, "
        f"{request.run.train.total_steps} steps, logs in {run_dir}/rank-0.log"
    )
    with ExitStack() as stack:
        stack.enter_context(alone_in(run_dir))
        stack.enter_context(stop.listening())
        stack.enter_context(syncing(run_dir, resolve_uri(run_dir, None), display.say))
        verdict = starter.run(run_dir, num_workers=num_workers, stop_after_steps=stop_after_steps)
    answer_run(display, run_dir, verdict)
    if verdict == "stopped":
        raise typer.Exit(EXIT_STOPPED)


def init(
    config: RunFile,
    overrides: Overrides = None,
    launcher: LauncherName = None,
    cluster: ClusterFile = None,
    workers: NumWorkers = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write a resolved run directory and prepare its data; start nothing."""
    from launch import build_launcher
    from launch.display import Display
    from launch.hostfile import HostfileLauncher
    from launch.preparing import preparing
    from launch.run_dirs import init_run
    from launch.stopping import StopRequest

    request = load_request(
        config, overrides, cluster_file=cluster, launcher=launcher, num_workers=workers
    )
    display = Display(as_json=as_json)
    plan = describe(request, display.say)
    starter = build_launcher(request.cluster, StopRequest(display.say))
    num_workers = request.cluster.num_workers
    command = starter.command(Path(plan["run_dir"]), num_workers=num_workers)
    if dry_run:
        display.answer(plan | {"command": command}, dry_run_lines(plan, command))
        return
    run_dir = init_run(request.run, preparing(display))
    lines = [
        f"run directory: {run_dir}",
        *origin_lines(plan),
        f"start it with: {' '.join(command)}",
    ]
    answer = {"run_dir": str(run_dir), "automatic": plan["automatic"], "command": command}
    if isinstance(starter, HostfileLauncher):
        by_host = starter.commands_by_host(run_dir, num_workers=num_workers)
        lines.append("or, where the hosts have no ssh, on each of them:")
        lines += [f"  {host}: {' '.join(words)}" for host, words in by_host.items()]
        answer["command_by_host"] = by_host
    display.answer(answer, lines)


def describe(request: RunRequest, on_event: Callable[[str], None]) -> dict[str, Any]:
    """Check a run against its machines and give what it will do, as plain values.

    Raises:
        ConfigError: Batches do not divide over the ranks, or the device cannot run the precision.
    """
    from launch.environment import expected_accelerator
    from launch.run_dirs import check_owner, run_dir_of
    from pipeline.config.automatic import list_origins
    from pipeline.config.cluster import check_run_on_cluster

    run, cluster = request.run, request.cluster
    accelerator = expected_accelerator(cluster.launcher, cluster.accelerator)
    batches = check_run_on_cluster(run, cluster.num_workers, accelerator or "cuda")
    check_owner(run_dir_of(run), run)
    return {
        "run_dir": str(run_dir_of(run)),
        "accelerator": accelerator or "whatever the hosts have",
        "batches": {
            "world_size": batches.world_size,
            "micro_batch_samples": batches.micro_batch_samples,
            "accumulation_steps": batches.accumulation_steps,
            "sequence_tokens": batches.sequence_tokens,
            "global_batch_tokens": batches.global_batch_tokens,
            "total_steps": run.train.total_steps,
        },
        "automatic": list_origins(run),
        "run": as_tree(run),
        "cluster": as_tree(cluster),
    }


def dry_run_lines(plan: dict[str, Any], command: list[str]) -> list[str]:
    """Give the answer of a dry run for a person: resolved config, batches, command."""
    import yaml

    resolved = yaml.safe_dump({"run": plan["run"], "cluster": plan["cluster"]}, sort_keys=False)
    batches = ", ".join(f"{name} {value}" for name, value in plan["batches"].items())
    return [
        resolved.rstrip(),
        f"batches: {batches}",
        *origin_lines(plan),
        f"device: {plan['accelerator']}",
        f"run directory: {plan['run_dir']}",
        f"would run: {' '.join(command)}",
    ]


def origin_lines(plan: dict[str, Any]) -> list[str]:
    """Say which numbers of an automatic run its rule filled, and which were stated."""
    names = {"by_rule": "filled by rule", "stated": "stated"}
    lines = []
    for origin, values in plan["automatic"].items():
        shown = [
            f"{path} {value:,}" if isinstance(value, int) else f"{path} {value:.4g}"
            for path, value in values.items()
        ]
        lines += [f"{names[origin]}: {', '.join(shown)}"] if shown else []
    return lines


def answer_run(display: Any, run_dir: Path, verdict: str) -> None:
    """Show how a run ended, what it reached, and where to look."""
    from pipeline.tracking.goodput import describe_goodput
    from pipeline.tracking.store import read_result

    payload: dict[str, Any] = {"run_dir": str(run_dir), "verdict": verdict}
    if verdict == "stopped":
        lines = [f"stopped with a checkpoint in {run_dir}; the same command goes on from there"]
        display.answer(payload, lines)
        return
    result = read_result(run_dir)
    metrics = result.metrics
    payload["metrics"] = {name: metric.value for name, metric in metrics.items()}
    payload["goodput"] = dict(result.goodput)
    lines = [f"finished: {run_dir}/result.json"]
    for name in ("eval/loss", "eval/bits_per_byte", "perf/tokens_per_second"):
        if name in metrics:
            lines.append(f"  {name:24} {metrics[name].value:.4g} {metrics[name].unit}")
    if (told := describe_goodput(result.goodput)) is not None:
        lines.append(f"  {told}")
    lines.append(f"MLflow: python -m launch ui {run_dir.parent}")
    display.answer(payload, lines)

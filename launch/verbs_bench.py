"""The verb that measures where the time of a run's steps goes, or what a machine can do: bench."""

from collections.abc import Mapping, Sequence
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
    load_request,
)
from launch.verbs_run import describe, dry_run_lines

LABELS = {
    "step_seconds": "step",
    "forward_seconds": "  forward",
    "backward_seconds": "  backward",
    "optimizer_seconds": "  optimizer",
    "communication_seconds": "  communication, within the above",
    "tokens_per_second": "tokens",
    "flops_per_second": "model FLOPs",
    "peak_flops_per_second": "peak of matrix products",
    "peak_fraction": "share of the peak",
    "peak_memory_bytes": "peak memory of a rank",
    "torch_step_seconds": "step of bare PyTorch, ZeRO 0",
    "deepspeed_share_fraction": "DeepSpeed's share over it",
}
"""What a person reads for each measured name."""

BenchedRun = Annotated[
    Path | None,
    typer.Argument(metavar="[RUN]", help="Run YAML, or a run directory; none with --machine."),
]
MachineFile = Annotated[
    Path | None,
    typer.Option(
        "--machine",
        metavar="FILE.yaml",
        help="Measure this machine's curves and write a cluster file for `estimate` and `train`.",
    ),
]
Steps = Annotated[int, typer.Option("--steps", metavar="N", help="Timed steps; 4 or more.")]


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(bench)


def bench(
    config: BenchedRun = None,
    overrides: Overrides = None,
    machine: MachineFile = None,
    steps: Steps = 20,
    launcher: LauncherName = None,
    cluster: ClusterFile = None,
    workers: NumWorkers = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Measure the steps of a run: their parts, throughput, share of the peak, and memory.

    Nothing of the run itself is touched: it is measured in the directory NAME-bench beside it. With
    --machine FILE.yaml and no run, the curves of this machine are measured, on all of its cores.
    """
    if machine is not None or config is None:
        measure_machine(machine, config, cluster, workers, as_json=as_json, dry_run=dry_run)
        return
    bench_run(
        config, overrides, steps=steps, launcher=launcher, cluster=cluster, workers=workers,
        dry_run=dry_run, as_json=as_json,
    )  # fmt: skip


def measure_machine(
    machine: Path | None, config: Path | None, cluster_file: Path | None, workers: int | None,
    *, as_json: bool, dry_run: bool,
) -> None:  # fmt: skip
    """Measure this machine and write the file, or say what would be measured.

    Raises:
        ConfigError: A run is named as well, or no file.
    """
    from launch.bench_machine import check_request, measure
    from launch.display import Display

    display = Display(as_json=as_json)
    cluster = check_request(machine, config, cluster_file, workers)
    ranks = f"{cluster.num_workers} ranks of {cluster.threads_per_worker} threads"
    if dry_run or machine is None:
        display.answer(
            {"machine": str(machine), "num_workers": cluster.num_workers},
            [f"would measure {ranks} for {machine}"],
        )
        return
    display.say(f"measuring this machine with {ranks}; let nothing else compute meanwhile")
    tree = measure(cluster, machine, display)
    display.answer(
        {"machine": str(machine), **tree},
        [
            f"wrote {machine}: estimate with --cluster {machine}",
            *(f"  {name:26} {value}" for name, value in tree["hardware"].items()),
        ],
    )


def bench_run(
    config: Path, overrides: list[str] | None, *, steps: int, launcher: str | None,
    cluster: Path | None, workers: int | None, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure the steps of a run, or say what would be."""
    from launch import build_launcher
    from launch.display import Display, WatchedLauncher
    from launch.preparing import preparing
    from launch.run_lock import alone_in
    from launch.stopping import StopRequest
    from pipeline.probes.params import check_probe
    from pipeline.tracking.store import read_probe_result

    request = load_request(
        config, overrides, cluster_file=cluster, launcher=launcher, num_workers=workers
    )
    display = Display(as_json=as_json)
    plan = describe(request, display.say)
    num_workers = request.cluster.num_workers
    params = {"steps": steps}
    check_probe("bench", params, {request.run.name: request.run}, num_workers)
    stop = StopRequest(display.say)
    starter = WatchedLauncher(launcher=build_launcher(request.cluster, stop), display=display)
    run_dir = request.run.output_dir / f"{request.run.name}-bench"
    if dry_run:
        command = starter.command(run_dir, num_workers=num_workers)
        plan |= {"run_dir": str(run_dir), "probe": "bench", "params": params, "command": command}
        display.answer(plan, dry_run_lines(plan, command))
        return
    write_bench(run_dir, request, params, preparing(display))
    display.say(
        f"measuring {request.run.name}: {num_workers} ranks by {request.cluster.launcher}, "
        f"{steps} steps, logs in {run_dir}/rank-0.log"
    )
    with alone_in(run_dir), stop.listening():
        verdict = starter.run(run_dir, num_workers=num_workers)
    if verdict == "stopped":
        display.answer({"run_dir": str(run_dir), "verdict": verdict}, ["stopped"])
        raise typer.Exit(EXIT_STOPPED)
    result = read_probe_result(run_dir)
    display.answer(
        {
            "run_dir": str(run_dir),
            "world_size": result.world_size,
            "measured": {
                record["name"]: {k: record[k] for k in ("value", "num", "spread", "unit")}
                for record in result.records
            },
            "environment": result.environment,
        }
    )
    if not as_json:
        display.show(build_table(request.run.name, result.records))


def write_bench(
    run_dir: Path, request: RunRequest, params: Mapping[str, Any], prepare: Any
) -> None:
    """Prepare the run's data and write the directory that the ranks measure in.

    Raises:
        DataError: The text cannot be used, or a split is too small for the run.
    """
    import yaml

    from launch.run_dirs import with_prepared
    from pipeline.data.checks import check_prepared
    from pipeline.tracking.atomic import write_text_atomic
    from pipeline.tracking.environment import write_environment
    from pipeline.tracking.store import PROBE_FILE, RESULT_FILE

    manifest = prepare(request.run.data)
    check_prepared(request.run, manifest)
    run = with_prepared(request.run, manifest.directory)
    run_dir.mkdir(parents=True, exist_ok=True)
    # A bench is taken anew each time.
    (run_dir / RESULT_FILE).unlink(missing_ok=True)
    tree = {
        "probe": "bench",
        "params": dict(params),
        "data_fingerprint": manifest.fingerprint,
        "runs": {run.name: run.model_dump(mode="json")},
    }
    write_text_atomic(run_dir / PROBE_FILE, yaml.safe_dump(tree, sort_keys=False))
    write_environment(run_dir)


def build_table(name: str, records: Sequence[Mapping[str, Any]]) -> Any:
    """Lay the records out for a person: medians, interquartile ranges, counts."""
    from rich.table import Table

    table = Table(title=f"bench of {name}")
    table.add_column("")
    for heading in ("median", "IQR", "of"):
        table.add_column(heading, justify="right")
    for record in records:
        spread = record["spread"]
        shown = "" if spread is None else show_value(spread, record["unit"])
        value = show_value(record["value"], record["unit"])
        table.add_row(LABELS[record["name"]], value, shown, str(record["num"]))
    return table


def show_value(value: float, unit: str) -> str:
    """Print a number in the unit that people read."""
    scale, printed = {
        "s": (1e3, "ms"), "bytes": (2**-20, "MiB"), "FLOP/s": (1e-9, "GFLOP/s"), "1": (100.0, "%"),
    }.get(unit, (1.0, unit))  # fmt: skip
    return f"{value * scale:,.1f} {printed}"

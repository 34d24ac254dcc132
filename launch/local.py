"""From a run directory to ranks on this machine: one forked process a rank, torch loaded once.

A fork server loads torch, DeepSpeed and the training code a single time; every rank of every run
is a fresh fork of it: state cannot leak from one run to the next, and a start costs milliseconds.
"""

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from launch.environment import (
    base_environment,
    detect_accelerator,
    free_port,
    nvidia_devices,
    rank_environment,
)
from launch.parent_death import signal_on_parent_death
from launch.rank_logs import last_lines, log_path, redirect_output
from launch.rank_record import RankFailure, clear_records, first_failure
from launch.stopping import StopRequest, is_probe
from launch.worker import exit_at_once
from pipeline.config.cluster import ClusterConfig
from pipeline.data.ray_surroundings import environment_set
from pipeline.errors import LaunchError
from pipeline.tracking.store import Verdict, clear_stopped, read_verdict

PRELOADED = ["torch", "pipeline.training.train"]
PRELOADED_ON_CPU = [
    "pipeline.training.deepspeed_engine",
    "pipeline.probes.execute",
    # Loaded by the first optimizer and by DeepSpeed's engine: 3 s a rank, if not here.
    "torch._dynamo",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.comm.mori",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "setuptools",
    "pipeline.models.gpt",
    "pipeline.models.lstm",
    "launch.preloaded",
]
"""Loading DeepSpeed may start CUDA, which does not survive a fork; so on CPU only."""

GRACE_SECONDS = 2.0
"""How long the other ranks may take to fail by themselves after one of them failed."""


@dataclass(frozen=True, kw_only=True)
class RankStart:
    """All that a forked process needs to become a rank; plain values only, as it is pickled."""

    run_dir: str
    rank: int
    environment: dict[str, str]
    stop_after_steps: int | None


class LocalLauncher:
    """Starts ranks as processes of this machine and waits for their verdict."""

    def __init__(self, cluster: ClusterConfig, stop: StopRequest) -> None:
        """Keep the cluster; nothing starts before `run`.

        Args:
            cluster: Threads per rank and accelerator.
            stop: Passed on to the ranks.
        """
        self._cluster = cluster
        self._stop = stop

    def command(self, run_dir: Path, *, num_workers: int) -> list[str]:
        """Give a command that runs the same ranks by hand."""
        worker = ["--module", "launch.worker", "--run", str(run_dir)]
        return ["deepspeed", "--num_accelerators", str(num_workers), *worker]

    def run(
        self, run_dir: Path, *, num_workers: int, stop_after_steps: int | None = None
    ) -> Verdict:
        """Run all ranks of a run directory to their verdict.

        Args:
            run_dir: Holds `run.yaml` or `probe.yaml`.
            num_workers: World size.
            stop_after_steps: Stop with a checkpoint once this many steps are done.

        Returns:
            complete when `result.json` stands, stopped when the ranks agreed to stop.

        Raises:
            LaunchError: A rank failed; it names the rank, how it ended and its last output.
        """
        if self._cluster.accelerator == "cuda" and not nvidia_devices():
            raise LaunchError(
                "cluster.accelerator=cuda, but this machine shows no NVIDIA device; "
                "use cluster.accelerator=cpu"
            )
        run_dir = run_dir.absolute()
        # What an earlier attempt left must not pass for what this one says.
        clear_stopped(run_dir)
        clear_records(run_dir)
        with self._stop.reaching(run_dir):
            ranks = self._start(run_dir, num_workers, stop_after_steps)
            try:
                failed = _wait(ranks, run_dir, self._stop)
            finally:
                _end(ranks)
        if failed:
            raise describe_failure(run_dir, {rank: ranks[rank].exitcode for rank in failed})
        if self._stop.is_made and is_probe(run_dir) and read_verdict(run_dir) is None:
            return "stopped"
        return verdict_of(run_dir)

    def _start(
        self, run_dir: Path, num_workers: int, stop_after_steps: int | None
    ) -> list[ForkServerProcess]:
        accelerator = detect_accelerator(self._cluster.accelerator)
        base = base_environment(accelerator, self._cluster.threads_per_worker)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            PRELOADED + (PRELOADED_ON_CPU if accelerator == "cpu" else [])
        )
        with environment_set(base):
            forkserver.ensure_running()
        port = free_port()
        ranks = []
        for rank in range(num_workers):
            start = RankStart(
                run_dir=str(run_dir),
                rank=rank,
                environment=base | own_variables() | rank_environment(rank, num_workers, port),
                stop_after_steps=stop_after_steps,
            )
            process = context.Process(target=become_rank, args=(start,), name=f"rank-{rank}")
            process.start()
            ranks.append(process)
        return ranks


def become_rank(start: RankStart) -> None:
    """Turn a fork of the fork server into a rank; never returns."""
    # Ctrl-C reaches the whole foreground group; the launching process alone decides what it means.
    os.setsid()
    # The fork server ends with the launching process, and no rank may outlive it.
    signal_on_parent_death(signal.SIGKILL)
    redirect_output(log_path(Path(start.run_dir), start.rank))
    # The fork server keeps the variables of its own start, which may be those of an earlier run.
    for name in own_variables():
        del os.environ[name]
    os.environ.update(start.environment)
    arguments = ["--run", start.run_dir]
    if start.stop_after_steps is not None:
        arguments += ["--stop-after-steps", str(start.stop_after_steps)]
    exit_at_once(arguments)


def own_variables() -> dict[str, str]:
    """Give the variables of this process that are addressed to us."""
    return {name: value for name, value in os.environ.items() if name.startswith("TANDEM_")}


def verdict_of(run_dir: Path) -> Verdict:
    """Give the verdict that ranks left behind; their exit codes alone prove nothing.

    Raises:
        LaunchError: The ranks ended and left neither result nor stop mark.
    """
    verdict = read_verdict(run_dir)
    if verdict is None:
        raise LaunchError(
            f"all ranks of {run_dir} ended without an error, yet neither result.json nor "
            f"stopped.json stands; last output of rank 0:\n{last_lines(log_path(run_dir, 0))}"
        )
    return verdict


def describe_failure(run_dir: Path, exit_codes: dict[int, int | None]) -> RankFailure:
    """Name the rank that the others followed, where and after which step, and how it ended.

    Args:
        run_dir: The run directory.
        exit_codes: Failed ranks and how they ended; a negative code is a signal.
    """
    endings = {rank: describe_ending(code) for rank, code in exit_codes.items()}
    return first_failure(run_dir, endings)


def describe_ending(code: int | None) -> str:
    """Say how a process ended, given what its parent was told."""
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _wait(ranks: list[ForkServerProcess], run_dir: Path, stop: StopRequest) -> list[int]:
    """Wait until all ranks ended, or one failed; give the failed ones."""
    has_nothing_to_save = is_probe(run_dir)
    deadline: float | None = None
    while alive := [process for process in ranks if process.is_alive()]:
        connection.wait([process.sentinel for process in alive], timeout=0.2)
        if stop.is_made and has_nothing_to_save:
            return []
        if deadline is None and any(process.exitcode for process in ranks):
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            break
    return [rank for rank, process in enumerate(ranks) if process.exitcode]


def _end(ranks: list[ForkServerProcess]) -> None:
    for process in ranks:
        if process.is_alive():
            process.kill()
    for process in ranks:
        process.join()

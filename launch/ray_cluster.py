"""From a run directory to Ray Train workers, on a running cluster or on a local one."""

import os
import shutil
import threading
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.environment import Accelerator, base_environment
from launch.local import verdict_of
from launch.rank_logs import last_lines, log_path, redirect_output
from launch.stopping import StopRequest, is_probe
from launch.worker import run_rank
from pipeline.config.cluster import ClusterConfig
from pipeline.data.ray_surroundings import environment_set
from pipeline.data.ray_tasks import ray_session
from pipeline.errors import LaunchError, PipelineError
from pipeline.tracking.store import Verdict, clear_stopped, read_verdict

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

STORAGE = ".ray-train"
START_SECONDS = 300
"""How long the workers may take to start: loading torch and DeepSpeed takes a minute when busy."""

CONTROLLER_ENVIRONMENT = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_SECONDS),
    # A dead worker is noticed at the next look.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # Nothing here asks Ray about preemption, and its watcher warns about its own arguments.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


class RayLauncher:
    """Starts one Ray Train worker a rank and waits for their verdict."""

    def __init__(self, cluster: ClusterConfig, stop: StopRequest) -> None:
        """Keep the cluster; Ray is reached in `run`.

        Args:
            cluster: Address, placement, threads per rank and accelerator.
            stop: Passed on to the ranks.
        """
        self._cluster = cluster
        self._stop = stop

    def command(self, run_dir: Path, *, num_workers: int) -> list[str]:
        """Give a command that runs the same ranks by hand."""
        config = str(run_dir / "run.yaml")
        options = ["--launcher", "ray", "--workers", str(num_workers)]
        return ["python", "-m", "launch", "train", config, *options]

    def run(
        self, run_dir: Path, *, num_workers: int, stop_after_steps: int | None = None
    ) -> Verdict:
        """Run all ranks of a run directory that every node sees, to their verdict.

        Raises:
            LaunchError: The cluster has no room, or a rank failed; it names the rank and the cause.
        """
        run_dir = run_dir.absolute()
        with ExitStack() as stack:
            # Ray Train's own bookkeeping: every node must see it, and nobody needs it later.
            stack.callback(shutil.rmtree, run_dir / STORAGE, ignore_errors=True)
            stack.enter_context(ray_session(self._cluster.ray_address, num_workers))
            stack.enter_context(environment_set(CONTROLLER_ENVIRONMENT))
            trainer = self._build_trainer(run_dir, num_workers, stop_after_steps)
            clear_stopped(run_dir)
            stack.enter_context(self._stop.reaching(run_dir))
            _fit(trainer, run_dir, end_early=lambda: is_probe(run_dir) and self._stop.is_made)
            if is_probe(run_dir) and self._stop.is_made and read_verdict(run_dir) is None:
                # Leaving the session ends its workers.
                return "stopped"
            return verdict_of(run_dir)

    def _build_trainer(
        self, run_dir: Path, num_workers: int, stop_after_steps: int | None
    ) -> "TorchTrainer":
        import ray
        import ray.train.torch

        resources = ray.cluster_resources()
        accelerator = choose_accelerator(self._cluster.accelerator, resources, num_workers)
        environment = base_environment(accelerator, self._cluster.threads_per_worker)
        return ray.train.torch.TorchTrainer(
            rank_of_worker,
            train_loop_config={
                "run_dir": str(run_dir), "stop_after_steps": stop_after_steps,
            },
            scaling_config=ray.train.ScalingConfig(
                num_workers=num_workers,
                use_gpu=accelerator == "cuda",
                resources_per_worker=worker_resources(accelerator, resources, num_workers),
                placement_strategy=self._cluster.placement.upper(),
            ),
            torch_config=ray.train.torch.TorchConfig(
                backend="nccl" if accelerator == "cuda" else "gloo"
            ),
            # A name that was used before would make Ray Train resume that run's bookkeeping.
            run_config=ray.train.RunConfig(
                name=uuid.uuid4().hex[:12],
                storage_path=str(run_dir / STORAGE),
                worker_runtime_env={"env_vars": environment},
            ),
        )  # fmt: skip


def rank_of_worker(settings: dict[str, Any]) -> None:
    """Run one rank inside a Ray Train worker, which has joined its process group already."""
    run_dir = Path(settings["run_dir"])
    redirect_output(log_path(run_dir, int(os.environ["RANK"])))
    run_rank(run_dir, settings["stop_after_steps"])


def choose_accelerator(choice: str, resources: dict[str, float], num_workers: int) -> Accelerator:
    """Tell what the ranks compute on, from what the cluster offers.

    Args:
        choice: `cluster.accelerator`.
        resources: The cluster's total resources by Ray's names.
        num_workers: World size.

    Raises:
        LaunchError: CUDA is asked for, or partly there, and the GPUs are fewer than the ranks.
    """
    num_gpus = int(resources.get("GPU", 0))
    if choice == "cpu" or (choice == "auto" and num_gpus == 0):
        return "cpu"
    if num_gpus < num_workers:
        raise LaunchError(
            f"{num_workers} ranks need a GPU each, the Ray cluster has {num_gpus}; "
            f"use cluster.num_workers={max(1, num_gpus)} or cluster.accelerator=cpu"
        )
    return "cuda"


def worker_resources(
    accelerator: Accelerator, resources: dict[str, float], num_workers: int
) -> dict[str, float]:
    """Give what each worker reserves: one CPU, or an equal part where CPUs are fewer than ranks.

    Raises:
        LaunchError: No node of the cluster offers a CPU; Ray would wait for ever.
    """
    num_cpus = resources.get("CPU", 0.0)
    if num_cpus <= 0:
        raise LaunchError("no node of the Ray cluster offers a CPU; add a worker node")
    # Ray counts resources in steps of 0.0001; rounding down keeps the sum within the cluster.
    share = 1.0 if num_cpus >= num_workers else int(num_cpus / num_workers * 100) / 100
    return {"CPU": max(share, 0.01), **({"GPU": 1.0} if accelerator == "cuda" else {})}


def _fit(trainer: "TorchTrainer", run_dir: Path, end_early: Callable[[], bool]) -> None:
    """Run the trainer in a second thread, so that this one can turn signals into a stop request.

    Raises:
        LaunchError: A worker failed, or the workers could not be started.
    """
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive() and not end_early():
        thread.join(timeout=0.2)
    if errors:
        raise explain(errors[0], run_dir) from errors[0]


def explain(error: BaseException, run_dir: Path) -> LaunchError:
    """Name the rank and the cause behind an error of Ray Train."""
    from ray.train import WorkerGroupError

    if not isinstance(error, WorkerGroupError):
        return LaunchError(f"Ray Train could not run {run_dir.name}: {error}")
    rank, failure = next(iter(error.worker_failures.items()))
    cause: BaseException = failure
    while cause.__cause__ is not None:
        cause = cause.__cause__
    quoted = last_lines(log_path(run_dir, rank))
    result = LaunchError(
        f"rank {rank} of {run_dir.name} failed with {type(cause).__name__}: {cause}; "
        f"log: {log_path(run_dir, rank)}\n{quoted}"
    )
    if isinstance(cause, PipelineError):
        result.exit_code = cause.exit_code
    return result

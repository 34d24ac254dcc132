"""From a world size to one attempt of a run as Ray Train workers, and to what ended it."""

import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from launch.environment import base_environment
from launch.local import own_variables
from launch.rank_logs import log_path, redirect_output
from launch.rank_record import (
    RankFailure,
    first_failure,
    newest_checkpoint_step,
    recorded,
)
from launch.ray_cluster import STORAGE
from launch.ray_group import GroupConfig
from launch.ray_nodes import Room
from launch.worker import run_rank
from pipeline.config.cluster import ClusterConfig
from pipeline.errors import LaunchError

UNUSED = ("DatasetsCallback",)
"""Ray Train's callbacks that start a process, which loads pandas for seconds, and serve nobody
here: no rank reads Ray datasets."""


class RankTrainer(DataParallelTrainer):  # type: ignore[misc]
    """Ray Train without the process that no run needs; an attempt begins seconds earlier."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if type(callback).__name__ not in UNUSED]


def build_trainer(
    room: Room, cluster: ClusterConfig, num_workers: int, stop_after_steps: int | None
) -> RankTrainer:
    """Build the trainer of one attempt.

    Args:
        room: The run, what a rank reserves, and what it computes on.
        cluster: Placement and threads per rank.
        num_workers: World size.
        stop_after_steps: Passed on to the ranks.
    """
    environment = base_environment(room.accelerator, cluster.threads_per_worker) | own_variables()
    return RankTrainer(
        rank_of_worker,
        train_loop_config={"run_dir": str(room.run_dir), "stop_after_steps": stop_after_steps},
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers,
            use_gpu=room.accelerator == "cuda",
            resources_per_worker=dict(room.needs),
            placement_strategy=cluster.placement.upper(),
        ),
        backend_config=GroupConfig(),
        run_config=ray.train.RunConfig(
            # A name that was used before would make Ray Train resume that run's bookkeeping.
            name=uuid.uuid4().hex[:12],
            storage_path=str(room.run_dir / STORAGE),
            worker_runtime_env={"env_vars": environment},
            # Workers that do not start are tried again for ever by default.
            failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )


def rank_of_worker(settings: dict[str, Any]) -> None:
    """Run one rank inside a Ray Train worker, which knows its place among the others."""
    run_dir, rank = Path(settings["run_dir"]), int(os.environ["RANK"])
    redirect_output(log_path(run_dir, rank))
    with recorded(run_dir, rank, ray.get_runtime_context().get_node_id()):
        run_rank(run_dir, settings["stop_after_steps"])


def fit(trainer: RankTrainer, run_dir: Path, goes_on: Callable[[], bool]) -> None:
    """Run the trainer in a second thread, so that this one can turn signals into a stop request.

    Args:
        trainer: From `build_trainer`.
        run_dir: The run directory.
        goes_on: Asked five times a second; the ranks are left to themselves once it says no.

    Raises:
        LaunchError: A worker failed, or the workers could not be started.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=run, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive() and goes_on():
        thread.join(timeout=0.2)
    if errors:
        raise explain(errors[0], run_dir) from errors[0]


def explain(error: BaseException, run_dir: Path) -> LaunchError:
    """Name rank, host, step and cause behind an error of Ray Train."""
    if isinstance(error, ray.train.WorkerGroupError):
        endings = {rank: describe_ending(exc) for rank, exc in error.worker_failures.items()}
        return first_failure(run_dir, endings)
    message = f"Ray Train could not run {run_dir.name}: {error}"
    if isinstance(error, ray.train.ControllerError):
        # A node that went while ranks were being placed on it; the next attempt asks for others.
        return RankFailure(message, step=newest_checkpoint_step(run_dir), is_final=False)
    return LaunchError(message)


def describe_ending(error: BaseException) -> str:
    """Say how a rank's worker ended, given what Ray was told."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, ray.exceptions.RayActorError):
        return f"the loss of its process or host: {' '.join(str(error).split())}"
    return f"{type(error).__name__}: {error}"

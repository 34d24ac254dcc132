"""From a run directory to Ray Train workers, on a running cluster or on a local one.

Ray Train starts the ranks of one attempt. Whether another follows, and on how many ranks, is
decided here: Ray would repeat a wrong config as often as it repeats a lost node, would wait for a
node that is gone, and would choose world sizes over which the global batch does not divide. The
checkpoints are the run's own, so every attempt goes on from the newest at whatever world size.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from launch.local import verdict_of
from launch.rank_record import clear_records
from launch.restarts import run_with_restarts
from launch.stopping import STOP_FILE, StopRequest, is_probe
from pipeline.config.cluster import ClusterConfig
from pipeline.data.ray_surroundings import environment_set
from pipeline.data.ray_tasks import ray_session
from pipeline.errors import LaunchError
from pipeline.tracking.store import Verdict, clear_stopped, read_verdict

if TYPE_CHECKING:
    from launch.ray_nodes import Room

STORAGE = ".ray-train"
"""Ray Train's own bookkeeping, in the run directory: every node must see it."""
GROWTH_SECONDS = 30
"""Time between two looks for room for more ranks; to stop and start again costs about as much."""
CONTROLLER_ENVIRONMENT = {
    # Loading torch and DeepSpeed takes a minute when busy.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
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
            cluster: Address, placement, threads per rank, accelerator, world sizes and failures.
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
            LaunchError: The cluster has no room, a node does not see the storage, or ranks failed
                too often; rank, host, step and cause are named.
        """
        from launch.ray_nodes import find_room

        run_dir = run_dir.absolute()
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, run_dir / STORAGE, ignore_errors=True)
            stack.enter_context(ray_session(self._cluster.ray_address, num_workers))
            stack.enter_context(environment_set(CONTROLLER_ENVIRONMENT))
            room = find_room(self._cluster, run_dir, num_workers)
            stack.enter_context(self._stop.reaching(run_dir))
            return run_with_restarts(
                lambda: self._attempt(room, stop_after_steps),
                run_dir,
                max_failures=self._cluster.max_failures,
                may_restart=lambda: not self._stop.is_made,
                on_event=self._stop.on_event,
            )

    def _attempt(self, room: "Room", stop_after_steps: int | None) -> Verdict:
        """Run the ranks on what room there is; begin again where more has come up."""
        from launch.ray_trainer import build_trainer, fit

        run_dir = room.run_dir
        while True:
            size = room.wait_for_size(self._stop.on_event)
            if len(room.sizes) > 1:
                self._stop.on_event(f"{run_dir.name} runs on {size} ranks; legal: {room.sizes}")
            # What an earlier attempt left must not pass for what this one says.
            clear_stopped(run_dir)
            clear_records(run_dir)
            growth = Growth(room, size, self._stop)
            trainer = build_trainer(room, self._cluster, size, stop_after_steps)
            with growth.alone_asking():
                fit(trainer, run_dir, goes_on=partial(self._goes_on, run_dir, growth))
            if is_probe(run_dir) and self._stop.is_made and read_verdict(run_dir) is None:
                # Leaving the session ends its workers.
                return "stopped"
            verdict = verdict_of(run_dir)
            if verdict == "complete" or self._stop.is_made or not growth.is_asked:
                return verdict

    def _goes_on(self, run_dir: Path, growth: "Growth") -> bool:
        growth.look()
        return not (is_probe(run_dir) and self._stop.is_made)


class Growth:
    """Asks a run on fewer ranks than it may have to stop with a checkpoint once there is room."""

    def __init__(self, room: "Room", size: int, stop: StopRequest) -> None:
        """Begin to watch.

        Args:
            room: What the run may have.
            size: Ranks it has now.
            stop: Whether the user has asked for a stop; told of what happens.
        """
        self.is_asked = False
        self._room = room
        self._size = size
        self._stop = stop
        self._next = time.monotonic() + GROWTH_SECONDS

    @contextmanager
    def alone_asking(self) -> Iterator[None]:
        """Drop its own request when the attempt that it was made to has ended, well or not."""
        try:
            yield
        finally:
            if self.is_asked and not self._stop.is_made:
                (self._room.run_dir / STOP_FILE).unlink(missing_ok=True)

    def look(self) -> None:
        """Look for room, not more often than `GROWTH_SECONDS` tells, and ask for the stop."""
        is_done = self.is_asked or self._stop.is_made or self._size == self._room.sizes[-1]
        if is_done or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + GROWTH_SECONDS
        if self._room.believed_size() <= self._size:
            return
        try:
            size = self._room.size()
        except LaunchError as exc:
            self._stop.on_event(f"not growing: {exc}")
            return
        if size > self._size:
            self._stop.on_event(f"room for {size} ranks: stopping with a checkpoint to go on there")
            (self._room.run_dir / STOP_FILE).touch()
            self.is_asked = True

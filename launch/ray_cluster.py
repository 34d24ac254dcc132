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
from launch.rank_record import clear_records, read_records
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
GROWTH_SECONDS = 10
"""Time between two looks for room for more ranks."""
DRAIN_SECONDS = 2
"""Time between two looks for nodes that are to leave; a cloud gives 30 s and more."""
CONTROLLER_ENVIRONMENT = {
    # Loading torch and DeepSpeed takes a minute when busy.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    # A dead worker is noticed at the next look.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # `Move` looks for nodes that are to leave; Ray's watcher is one more process.
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
        """Run the ranks on what room there is; begin again where they were asked to move.

        Raises:
            LaunchError: There is no room, and no move has left a checkpoint to stop at.
        """
        from launch.ray_trainer import build_trainer, fit

        run_dir = room.run_dir
        has_moved = False
        while True:
            size = room.wait_for_size(self._stop)
            if size == 0 and self._stop.is_made:
                return "stopped"
            if size == 0 and has_moved:
                self._stop.on_event(f"stopped: {room.describe_lack()}")
                return "stopped"
            if size == 0:
                raise LaunchError(room.describe_lack())
            if len(room.sizes) > 1:
                self._stop.on_event(f"{run_dir.name} runs on {size} ranks; legal: {room.sizes}")
            # What an earlier attempt left must not pass for what this one says.
            clear_stopped(run_dir)
            clear_records(run_dir)
            move = Move(room, size, self._stop)
            trainer = build_trainer(room, self._cluster, size, stop_after_steps)
            with move.alone_asking():
                fit(trainer, run_dir, goes_on=partial(self._goes_on, run_dir, move))
            if is_probe(run_dir) and self._stop.is_made and read_verdict(run_dir) is None:
                # Leaving the session ends its workers.
                return "stopped"
            verdict = verdict_of(run_dir)
            if verdict == "complete" or self._stop.is_made or not move.is_asked:
                return verdict
            has_moved = True

    def _goes_on(self, run_dir: Path, move: "Move") -> bool:
        move.look()
        return not (is_probe(run_dir) and self._stop.is_made)


class Move:
    """Asks a run to stop with a checkpoint, to go on where no node leaves or where more have come.

    A probe has nothing to save, and stays.
    """

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
        self._begun = time.monotonic()
        self._log_time = _changed(room.run_dir)
        self._next_drain = 0.0
        self._next_growth: float | None = None
        self._is_blind = False

    @contextmanager
    def alone_asking(self) -> Iterator[None]:
        """Drop its own request when the attempt that it was made to has ended, well or not."""
        try:
            yield
        finally:
            if self.is_asked and not self._stop.is_made:
                (self._room.run_dir / STOP_FILE).unlink(missing_ok=True)

    def look(self) -> None:
        """Ask for the stop where there is a reason; costs little until a look is due."""
        if self.is_asked or self._stop.is_made or is_probe(self._room.run_dir):
            return
        now = time.monotonic()
        if now >= self._next_drain:
            self._next_drain = now + DRAIN_SECONDS
            self._look_for_leaving()
        if self._next_growth is None and _changed(self._room.run_dir) != self._log_time:
            # Training begins. To stop and start again costs as long as that has taken, so that it
            # is left alone for as long.
            self._next_growth = now + now - self._begun
        if self._next_growth is not None and now >= self._next_growth and not self.is_asked:
            self._next_growth = now + GROWTH_SECONDS
            self._look_for_room()

    def _look_for_leaving(self) -> None:
        from launch.ray_nodes import leaving_node_ids

        try:
            leaving = leaving_node_ids()
            records = read_records(self._room.run_dir).values() if leaving else ()
        except (RuntimeError, OSError) as exc:
            # Ray's own errors are among these; a healthy run goes on, and the next look may work.
            if not self._is_blind:
                self._stop.on_event(f"cannot tell whether nodes are to leave: {exc}")
            self._is_blind = True
            return
        self._is_blind = False
        if hosts := sorted({record.host for record in records if record.node_id in leaving}):
            self._ask(f"Ray is told that {', '.join(hosts)} will leave")

    def _look_for_room(self) -> None:
        if self._size == self._room.sizes[-1] or self._room.believed_size() <= self._size:
            return
        try:
            size = self._room.size()
        except LaunchError as exc:
            self._stop.on_event(f"not growing: {exc}")
            return
        if size > self._size:
            self._ask(f"room for {size} ranks")

    def _ask(self, reason: str) -> None:
        self._stop.on_event(f"{reason}: stopping with a checkpoint, to go on from it")
        (self._room.run_dir / STOP_FILE).touch()
        self.is_asked = True


def _changed(run_dir: Path) -> int | None:
    """Tell when ranks last wrote to the event log."""
    log = run_dir / "events.jsonl"
    return log.stat().st_mtime_ns if log.exists() else None

"""From attempts that fail to a verdict: the next one goes on from the newest checkpoint."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from launch.rank_record import RankFailure
from pipeline.errors import LaunchError
from pipeline.tracking.store import Verdict

FILE = "failures.jsonl"
"""One line in the run directory for each attempt that was lost."""


def run_with_restarts(
    attempt: Callable[[], Verdict],
    run_dir: Path,
    *,
    max_failures: int,
    may_restart: Callable[[], bool],
    on_event: Callable[[str], None],
) -> Verdict:
    """Attempt a run until it ends, or fails again and again without a new checkpoint.

    Args:
        attempt: Runs all ranks to their verdict, from the newest checkpoint.
        run_dir: Takes a line for each failure.
        max_failures: Failures in a row without a new checkpoint that end the run; 1 never restarts.
        may_restart: Whether nobody has asked the run to stop.
        on_event: Told of each failure that is followed by another attempt.

    Raises:
        LaunchError: The last failure; one that would repeat itself is the last at once.
    """
    in_a_row, step = 0, None
    while True:
        try:
            return attempt()
        except RankFailure as failure:
            in_a_row = in_a_row + 1 if failure.step == step else 1
            step = failure.step
            _write(run_dir, failure, in_a_row)
            if failure.is_final or not may_restart():
                raise
            if in_a_row >= max_failures:
                raise LaunchError(
                    f"{in_a_row} failures in a row without a new checkpoint "
                    f"(cluster.max_failures={max_failures}); the last: {failure}"
                ) from failure
            start = "its start" if step is None else f"step {step}"
            on_event(f"{failure}\nattempting again from {start}; failure {in_a_row} in a row")


def _write(run_dir: Path, failure: RankFailure, in_a_row: int) -> None:
    line = {
        "time_unix_seconds": time.time(),
        "in_a_row": in_a_row,
        "checkpoint_step": failure.step,
        "message": str(failure),
    }
    with (run_dir / FILE).open("a") as stream:
        stream.write(json.dumps(line) + "\n")

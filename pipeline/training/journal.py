"""From what happens in an attempt to its event logs: one of the run, and one a host.

Rank 0 writes `events.jsonl`; the first rank of every host writes the host's own load to
`events.<host>.jsonl`, so that hosts never append to one file. All methods are collective where they
say so; on other ranks they write nothing.
"""

import contextlib
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.config.load import lineage_hash
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError, LaunchError, TrackingError
from pipeline.tracking.events import (
    Event,
    EventKind,
    EventWriter,
    next_attempt,
    read_events,
    surviving_events,
)
from pipeline.tracking.redaction import redact
from pipeline.training.attempts import check_progress, spent_before, train_seconds_until
from pipeline.training.distributed import RankContext, gather_json
from pipeline.training.meters import HostMonitor
from pipeline.training.phases import enter

EVENTS = "events.jsonl"
ERROR_CHARACTERS = 500


class Journal:
    """Writes the events of one attempt; use it as a context manager."""

    def __init__(self, run_dir: Path, run: RunConfig, ranks: RankContext) -> None:
        """Number the attempt and open the logs; collective.

        Args:
            run_dir: The run directory.
            run: Its config.
            ranks: This rank among the others.

        Raises:
            ConfigError: The log tells of attempts with another config.
        """
        self._path = run_dir / EVENTS
        earlier = read_events(self._path)
        _check_same_config(earlier, run, run_dir)
        self.attempt: int = gather_json(next_attempt(self._path), ranks)[0]
        """Number of this attempt, from 1; one that goes back to a checkpoint begins another."""
        self.spent_before: dict[str, float] = {}
        """Seconds up to the start of this process, by what they went into."""
        self._earlier = earlier
        self._ranks = ranks
        self._run = run
        self._step = 0
        self._has_begun = False
        host = socket.gethostname()
        is_first = gather_json(host, ranks).index(host) == ranks.rank
        self._host_path = run_dir / f"events.{host}.jsonl"
        self._monitor = HostMonitor() if is_first else None
        self._stack = ExitStack()
        self._run_log: EventWriter | None = None
        self._host_log: EventWriter | None = None
        self._open()

    def _open(self) -> None:
        if self._ranks.rank == 0:
            self._run_log = self._stack.enter_context(EventWriter(self._path, self.attempt))
        if self._monitor is not None:
            self._host_log = self._stack.enter_context(EventWriter(self._host_path, self.attempt))

    def continue_from(self, step: int, started_unix_seconds: float) -> None:
        """Take over the account of earlier attempts, unless they have led nowhere; collective.

        Args:
            step: Where this attempt begins.
            started_unix_seconds: When its process began.

        Raises:
            LaunchError: Too many attempts in a row began at this step and made no progress.
        """
        self.spent_before = spent_before(self._earlier, step, started_unix_seconds)
        self._step = step
        allowed = self._run.guard.max_attempts_without_progress
        # Rank 0's log counts; one that another host sees late must not part the ranks.
        error: LaunchError | None = None
        try:
            check_progress(self._earlier, step, allowed)
        except LaunchError as exc:
            error = exc
        told = gather_json(str(error) if error else None, self._ranks)[0]
        if told is not None:
            raise LaunchError(told)

    def go_back_to(self, step: int) -> float:
        """Begin another attempt in this process, from a checkpoint.

        Args:
            step: Of the checkpoint.

        Returns:
            Seconds of kept steps up to there, over all attempts.
        """
        kept = train_seconds_until(read_events(self._path), step)
        self._stack.close()
        self.attempt += 1
        self._step = step
        self._open()
        return kept

    def lacks_evaluation(self, step: int) -> bool:
        """Tell whether the run, as it stood before this attempt, was not scored at a step."""
        found = [e for e in surviving_events(self._earlier) if (e.kind, e.step) == ("eval", step)]
        return bool(gather_json(not found, self._ranks)[0])

    @property
    def last_seq(self) -> int | None:
        """Number of the last event of the run's log, on rank 0."""
        return None if self._run_log is None else self._run_log.last_seq

    def write(self, kind: EventKind, step: int, values: Mapping[str, Any]) -> None:
        """Append an event to the run's log, on rank 0."""
        # The event of a checkpoint may come behind those of later steps.
        self._step = max(self._step, step)
        self._has_begun = True
        if self._run_log is not None:
            enter("track.log")
            self._run_log.write(kind, step, values)

    def write_host(self, step: int) -> None:
        """Append this host's load to its log, on its first rank."""
        if self._host_log is not None and self._monitor is not None:
            self._host_log.write("system", step, self._monitor.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # An attempt that was refused before its first event leaves the log as it found it.
        if error is not None and self._has_begun:
            told = redact(f"{type(error).__name__}: {error}")[:ERROR_CHARACTERS]
            # Neither a full disk nor a log that has another owner may hide the error.
            with contextlib.suppress(OSError, TrackingError):
                self.write("abort", self._step, {"error": told})
        self._stack.close()


def _check_same_config(earlier: list[Event], run: RunConfig, run_dir: Path) -> None:
    hashes = {e.values["config_hash"] for e in earlier if "config_hash" in e.values}
    if hashes - {lineage_hash(run)}:
        raise ConfigError(
            f"{run_dir} holds a run of another config than its run.yaml; "
            "give the changed run a name of its own"
        )

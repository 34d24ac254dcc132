"""From what happens in an attempt to its event logs: one of the run, and one a host.

Rank 0 writes `events.jsonl`; the first rank of every host writes the host's own load to
`events.<host>.jsonl`, so that hosts never append to one file. All methods are collective where they
say so; on other ranks they write nothing.
"""

import socket
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.config.load import lineage_hash
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError
from pipeline.tracking.events import (
    Event,
    EventKind,
    EventWriter,
    next_attempt,
    read_events,
    surviving_events,
)
from pipeline.training.distributed import RankContext, gather_json
from pipeline.training.meters import HostMonitor
from pipeline.training.phases import enter

EVENTS = "events.jsonl"
ACCOUNT = "spent_seconds"
"""Field of an event: wall time of all attempts by what it went into, as `spent_seconds` gives."""


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
        earlier = read_events(run_dir / EVENTS)
        _check_same_config(earlier, run, run_dir)
        self.attempt: int = gather_json(next_attempt(run_dir / EVENTS), ranks)[0]
        """Number of this attempt, from 1."""
        self.spent_before: dict[str, float] = {}
        """Seconds of the earlier attempts, up to their last accounts, by what they went into."""
        self._earlier = earlier
        host = socket.gethostname()
        is_first = gather_json(host, ranks).index(host) == ranks.rank
        self._monitor = HostMonitor() if is_first else None
        self._stack = ExitStack()
        self._run_log: EventWriter | None = None
        self._host_log: EventWriter | None = None
        if ranks.rank == 0:
            self._run_log = self._stack.enter_context(EventWriter(run_dir / EVENTS, self.attempt))
        if is_first:
            path = run_dir / f"events.{host}.jsonl"
            self._host_log = self._stack.enter_context(EventWriter(path, self.attempt))

    def continue_from(self, step: int) -> None:
        """Take over the account of earlier attempts; what they trained after `step` is lost."""
        accounts = [e for e in self._earlier if ACCOUNT in e.values]
        if not accounts:
            return
        kept = [e for e in surviving_events(accounts) if e.step <= step]
        # The account of a checkpoint is of its begin, and stands behind those of later steps.
        newest = max(accounts, key=lambda event: event.values[ACCOUNT]["wall"])
        spent = dict(newest.values[ACCOUNT])
        kept_seconds = kept[-1].values[ACCOUNT]["train"] if kept else 0.0
        spent["lost"] = spent.get("lost", 0.0) + spent["train"] - kept_seconds
        self.spent_before = {**spent, "train": kept_seconds}

    @property
    def last_seq(self) -> int | None:
        """Number of the last event of the run's log, on rank 0."""
        return None if self._run_log is None else self._run_log.last_seq

    def write(self, kind: EventKind, step: int, values: Mapping[str, Any]) -> None:
        """Append an event to the run's log, on rank 0."""
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
        self._stack.close()


def _check_same_config(earlier: list[Event], run: RunConfig, run_dir: Path) -> None:
    hashes = {e.values["config_hash"] for e in earlier if "config_hash" in e.values}
    if hashes - {lineage_hash(run)}:
        raise ConfigError(
            f"{run_dir} holds a run of another config than its run.yaml; "
            "give the changed run a name of its own"
        )

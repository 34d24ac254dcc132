"""From what a rank says of itself, and how it ended, to the one failure that all others follow.

Each rank notes in the run directory where it runs, and what stopped it. One that was killed, or
whose host lost power, says nothing more; the others fail a moment later because they lost it.
"""

import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.rank_logs import last_lines, log_path
from pipeline.errors import LaunchError, PipelineError, TrackingError
from pipeline.tracking.atomic import write_text_atomic
from pipeline.tracking.events import Event, read_events

FINAL_KINDS = ("ConfigError", "DataError", "CheckpointError", "TrainingDiverged")
"""Errors that the next attempt would meet again."""
LOST_PEER = re.compile(r"gloo|nccl|tcpstore|connection|\bpeer\b|timed out|found no group", re.I)
"""How an error reads that a rank meets because another one is gone."""
VMSTAT = Path("/proc/vmstat")


@dataclass(frozen=True, kw_only=True)
class RankRecord:
    """What a rank said of itself: the content of `rank-<rank>.json`."""

    rank: int
    host: str
    process_id: int
    node_id: str | None = None
    """Ray's name of its node; None where Ray did not start it."""
    kind: str | None = None
    """Class of the error that stopped it; None while it runs and after it died without a word."""
    cause: str | None = None
    """The error's message."""
    exit_code: int = 1
    """What the command line returns for it."""
    oom_kills: int | None = None
    """Processes that its kernel had killed for lack of memory when the rank began; None where the
    kernel does not count them."""


class RankFailure(LaunchError):
    """A rank was lost: which, where, after which step, and whether another attempt may help."""

    def __init__(self, message: str, *, step: int | None, is_final: bool) -> None:
        """Keep what a restart depends on.

        Args:
            message: Names rank, host, step and cause.
            step: Newest step that a checkpoint holds; None where there is none.
            is_final: Whether the next attempt would meet the same error.
        """
        super().__init__(message)
        self.step = step
        self.is_final = is_final


@contextmanager
def recorded(run_dir: Path, rank: int, node_id: str | None = None) -> Iterator[None]:
    """Note that a rank runs here, and the error that ends it.

    Args:
        run_dir: The run directory.
        rank: This rank.
        node_id: As in `RankRecord`.

    Raises:
        LaunchError: This host does not see the run directory.
    """
    host = socket.gethostname()
    if not any((run_dir / name).is_file() for name in ("run.yaml", "probe.yaml")):
        raise LaunchError(
            f"host {host} does not see the run directory {run_dir}; every host must have the same "
            "storage under the same path: mount it there, or choose another output_dir"
        )
    path = run_dir / f"rank-{rank}.json"
    record = RankRecord(
        rank=rank,
        host=host,
        process_id=os.getpid(),
        node_id=node_id,
        oom_kills=count_oom_kills(),
    )
    begun = json.dumps(asdict(record))
    write_text_atomic(path, begun)
    try:
        yield
    except Exception as exc:
        failed = asdict(record) | {"kind": type(exc).__name__, "cause": str(exc)}
        if isinstance(exc, PipelineError):
            failed |= {"kind": exc.kind, "exit_code": exc.exit_code}
        # The storage may be what failed; the error itself must come out. A rank that was replaced
        # leaves the word of its successor.
        with suppress(OSError):
            if path.read_text() == begun:
                write_text_atomic(path, json.dumps(failed))
        raise


def clear_records(run_dir: Path) -> None:
    """Drop what ranks of an earlier attempt said, and what they were killed in the midst of."""
    for path in (*run_dir.glob("rank-*.json"), *run_dir.glob(".rank-*.json.*.tmp")):
        path.unlink(missing_ok=True)


def read_records(run_dir: Path) -> dict[int, RankRecord]:
    """Give what each rank said of itself, those that failed first before the others."""
    paths = sorted(run_dir.glob("rank-*.json"), key=lambda path: path.stat().st_mtime_ns)
    records = [RankRecord(**json.loads(path.read_text())) for path in paths]
    return {record.rank: record for record in records}


def first_failure(run_dir: Path, endings: Mapping[int, str] | None = None) -> RankFailure:
    """Name the rank that the others followed.

    That is one with an error of its own, else one that died without a word, else the first that
    spoke: what remains are the ranks that lost it.

    Args:
        run_dir: The run directory.
        endings: Ranks known to have failed, and how their processes ended. Ray reports those that
            it sees first; None where only the ranks themselves can tell.
    """
    records = read_records(run_dir)
    spoke = [rank for rank, record in records.items() if record.kind is not None]
    own = [rank for rank in spoke if not LOST_PEER.search(records[rank].cause or "")]
    known = sorted(endings or {})
    silent = [rank for rank in [*known, *sorted(records)] if rank not in spoke]
    step = newest_checkpoint_step(run_dir)
    rank = next(iter([*own, *silent, *spoke]), None)
    if rank is None:
        return RankFailure(f"the ranks of {run_dir.name} were lost", step=step, is_final=False)
    record = records.get(rank)
    log = log_path(run_dir, rank)
    quoted = f"; log: {log}\n{last_lines(log)}" if log.exists() else ""
    error = RankFailure(
        f"rank {rank} of {run_dir.name}{_place(run_dir, record)} failed with "
        f"{_cause(record, (endings or {}).get(rank))}{quoted}",
        step=step,
        is_final=record is not None and record.kind in FINAL_KINDS,
    )
    if record is not None:
        error.exit_code = record.exit_code
    return error


def newest_checkpoint_step(run_dir: Path) -> int | None:
    """Give the step of the newest checkpoint that the event log tells of; None without one."""
    steps = [event.step for event in _events(run_dir) if event.kind == "checkpoint"]
    return max(steps, default=None)


def _events(run_dir: Path) -> list[Event]:
    """Read the event log; the failure that is being told matters more than a damaged line."""
    try:
        return read_events(run_dir / "events.jsonl")
    except TrackingError:
        return []


def _place(run_dir: Path, record: RankRecord | None) -> str:
    host = f" on {record.host}" if record is not None else ""
    events = _events(run_dir)
    return f"{host} after step {events[-1].step}" if events else f"{host} before its first step"


def _cause(record: RankRecord | None, ending: str | None) -> str:
    if record is not None and record.kind is not None:
        return f"{record.kind}: {record.cause}"
    told = ending or "no word: it was killed, it hangs, or its host was lost"
    # The kernel kills by SIGKILL: another ending has another cause.
    if ending is not None and re.match(r"exit code|signal (?!SIGKILL)", ending):
        return told
    if record is None or record.oom_kills is None or record.host != socket.gethostname():
        return told
    killed = (count_oom_kills() or 0) - record.oom_kills
    if killed <= 0:
        return told
    return (
        f"{told}, out of memory (OOM): the kernel of this host has killed {killed} process(es) for "
        "lack of memory since the rank began; lower train.micro_batch_samples, use more ranks or "
        "hosts, or raise the memory limit"
    )


def count_oom_kills() -> int | None:
    """Give how many processes the kernel of this host has killed for lack of memory since boot.

    Source: `oom_kill` in /proc/vmstat, from Linux 4.13; kills by a container's limit count as well.
    """
    with suppress(OSError):
        for line in VMSTAT.read_text().splitlines():
            name, _, number = line.partition(" ")
            if name == "oom_kill":
                return int(number)
    return None

"""From a rank's phases to a small file that a watchdog on the same host reads, and back.

A rank counts; it tells no times, so that a stopped clock, a skewed one or a suspended machine
cannot look like a hang. Each rank writes its own file, in two records of fixed length.
"""

import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

RECORD_BYTES = 256
"""Longer than either record; a record is written in one call, padded with spaces."""
OF_SOME_RANKS = ("track.log", "checkpoint.write", "checkpoint.rename", "checkpoint.commit")
"""Phases that not every rank enters equally often, so that they cannot tell who is behind."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """How far a rank is."""

    count: int = 0
    """Phases entered in this attempt: it changes as long as the rank lives."""
    step: int = 0
    """The optimizer step in progress, from 1; 0 before the first."""
    position: int = 0
    """Phases of this step that all ranks enter equally often: it tells who is behind."""
    phase: str = "start"


@dataclass(frozen=True, kw_only=True)
class Member:
    """Which process a rank is."""

    rank: int
    host: str
    attempt: int
    """Which start of the run, from 1."""
    pid: int
    started_ticks: int
    """When the kernel started it, since boot: another process may get the same pid later."""


class Heartbeat:
    """Writes the file of one rank; use `close` at its end."""

    def __init__(self, directory: Path, rank: int, attempt: int) -> None:
        """Create the file, in place of one that an earlier attempt left.

        Args:
            directory: Holds the files of all ranks; made where it is missing.
            rank: This rank.
            attempt: Which start of the run this is, from 1.
        """
        directory.mkdir(exist_ok=True)
        host = socket.gethostname()
        self._path = path = directory / f"{host}.{rank}"
        # Written whole before it has its name, so that the watchdog never reads half a record.
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        self._descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        pid = os.getpid()
        member = Member(
            rank=rank, host=host, attempt=attempt, pid=pid, started_ticks=started_ticks(pid) or 0
        )
        self._count, self._step, self._position = 0, 0, 0
        self._put(json.dumps(asdict(member)), 0)
        self._put(json.dumps(asdict(Beat())), RECORD_BYTES)
        temporary.replace(path)

    def beat(self, step: int, phase: str) -> None:
        """Say that a phase begins.

        Args:
            step: The optimizer step in progress.
            phase: Its name.
        """
        is_of_all = phase not in OF_SOME_RANKS
        before = self._position if step == self._step else 0
        self._count, self._step, self._position = self._count + 1, step, before + is_of_all
        # Formatted by hand, because this runs some ten times in a step of perhaps milliseconds.
        self._put(
            f'{{"count":{self._count},"step":{step},"position":{self._position},"phase":"{phase}"}}',
            RECORD_BYTES,
        )

    def close(self) -> None:
        """Remove the file: this rank is done and nobody need wait for it.

        One that a later attempt has put in its place stays: its watchdog looks for it.
        """
        mine = os.fstat(self._descriptor).st_ino
        os.close(self._descriptor)
        with suppress(FileNotFoundError):
            if self._path.stat().st_ino == mine:
                self._path.unlink()

    def _put(self, record: str, offset: int) -> None:
        os.pwrite(self._descriptor, record.encode().ljust(RECORD_BYTES - 1) + b"\n", offset)


def read_heartbeats(directory: Path) -> dict[int, tuple[Member, Beat]]:
    """Read the files of all ranks of the newest attempt, of other hosts as well, by rank.

    A rank that died leaves its file; whether it lives is known on its own host alone.
    """
    found = []
    for path in sorted(directory.glob("[!.]*")):
        try:
            first, second, _ = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            continue
        found.append((Member(**json.loads(first)), Beat(**json.loads(second))))
    newest = max((member.attempt for member, _ in found), default=0)
    return {
        member.rank: (member, beat)
        for member, beat in sorted(found, key=lambda pair: pair[0].rank)
        if member.attempt == newest
    }


def started_ticks(pid: int) -> int | None:
    """Give when a process was started, in clock ticks since boot; None if there is none.

    Source: proc(5), field 22 of /proc/PID/stat; a zombie counts as gone.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])

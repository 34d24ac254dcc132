"""From heartbeats that stand still to the name of the late rank, the ranks' stacks and their end.

One process a host, beside its ranks: a rank that is stopped, or that hangs with the interpreter's
lock, has no thread that could watch it. It loads nothing but the standard library, looks at files
and /proc, and ends when the ranks of its host have.
"""

import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.training.heartbeat import Beat, Member, read_heartbeats, started_ticks

POLL_SECONDS = 0.5
SAFETY_FACTOR = 5
"""A phase may take this many times as long as the longest before; NVIDIA's resiliency extension
takes the same factor for its timeouts (fault_tolerance/config.py, safety_factor)."""
FIRST_STEP_FACTOR = 4
"""The first step restores, compiles and fills caches, for minutes where a model is large."""
STACK_SECONDS = 1.0
"""How long the ranks get to write their stacks."""
GRACE_SECONDS = 4.0
"""How long ranks get to fail by themselves once the late one is gone. Longer than the launcher
waits for the others after a first failure, so that it names the late one."""
RUNNING = {"R": "running", "S": "waiting", "D": "in a disk wait", "T": "stopped by a signal"}
"""Process states of proc(5)."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the first rank of a host tells its watchdog."""

    directory: str
    """Holds the heartbeats."""
    limit_seconds: float
    report: str
    """Takes a JSON line for each hang."""
    logs: str
    """Log of a rank, with {rank} for its number."""
    recorder: str
    """Prefix of the pipes that make NCCL write its flight record."""


@dataclass(frozen=True, kw_only=True)
class RankState:
    """One rank at the moment of a verdict."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    position: int
    state: str | None
    """State of its process as proc(5) has it; None on another host."""
    waits_in: str | None
    """Kernel function that it waits in; None where the kernel does not say."""


class Watch:
    """Watches the ranks of this host until they are gone or stand still."""

    def __init__(self, settings: Settings) -> None:
        """Begin with no rank seen.

        Args:
            settings: Where to look and how long to wait.
        """
        self._settings = settings
        self._host = socket.gethostname()
        self._counts: dict[int, int] = {}
        self._steps: set[int] = set()
        self._silent_seconds = 0.0
        self._longest_seconds = 0.0

    def run(self) -> None:
        """Look until the ranks are gone; end them where they hang."""
        last = time.monotonic()
        while ranks := self._alive():
            now = time.monotonic()
            # Counted in looks and not by the clock: after a suspension all ranks look late.
            self._note(ranks, min(now - last, 2 * POLL_SECONDS))
            last = now
            if self._silent_seconds > self._limit_seconds:
                self._end_hang()
                return
            time.sleep(POLL_SECONDS)

    @property
    def _limit_seconds(self) -> float:
        limit = max(self._settings.limit_seconds, SAFETY_FACTOR * self._longest_seconds)
        return limit * (FIRST_STEP_FACTOR if len(self._steps) < 2 else 1)

    def _note(self, ranks: dict[int, tuple[Member, Beat]], passed_seconds: float) -> None:
        counts = {rank: beat.count for rank, (_, beat) in ranks.items()}
        self._steps |= {beat.step for _, beat in ranks.values() if beat.step > 0}
        if counts == self._counts:
            self._silent_seconds += passed_seconds
            return
        if len(self._steps) >= 2:
            self._longest_seconds = max(self._longest_seconds, self._silent_seconds)
        self._silent_seconds, self._counts = 0.0, counts

    def _alive(self) -> dict[int, tuple[Member, Beat]]:
        found = read_heartbeats(Path(self._settings.directory))
        return {r: pair for r, pair in found.items() if self._lives(pair[0])}

    def _lives(self, member: Member) -> bool:
        return member.host == self._host and started_ticks(member.pid) == member.started_ticks

    def _end_hang(self) -> None:
        """Say who is late, have the stacks written, and end the ranks of this host."""
        seen = [self._look_at(*p) for p in read_heartbeats(Path(self._settings.directory)).values()]
        late = find_late(seen)
        ranks = self._alive()
        for rank, (member, _) in ranks.items():
            self._ask_for_record(rank)
            os.kill(member.pid, signal.SIGUSR1)
        time.sleep(STACK_SECONDS)
        self._tell(seen, late)
        mine = {rank: member for rank, (member, _) in ranks.items()}
        end([member for rank, member in mine.items() if rank in late])
        # The other hosts' watchdogs may have to end the late rank; these then fail by themselves.
        deadline = time.monotonic() + GRACE_SECONDS
        while self._alive() and time.monotonic() < deadline:
            time.sleep(0.1)
        end(list(mine.values()))

    def _look_at(self, member: Member, beat: Beat) -> RankState:
        state = waits_in = None
        if self._lives(member):
            with suppress(OSError):
                stat = Path(f"/proc/{member.pid}/stat").read_text()
                state = stat.rpartition(")")[2].split()[0]
                waits_in = Path(f"/proc/{member.pid}/wchan").read_text().strip("0\n ") or None
        return RankState(
            rank=member.rank, host=member.host, pid=member.pid, step=beat.step, phase=beat.phase,
            position=beat.position, state=state, waits_in=waits_in,
        )  # fmt: skip

    def _ask_for_record(self, rank: int) -> None:
        """Have NCCL write its flight record, where the rank listens for that."""
        with suppress(OSError):
            pipe = os.open(f"{self._settings.recorder}{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
            os.write(pipe, b"1\n")
            os.close(pipe)

    def _tell(self, seen: list[RankState], late: list[int]) -> None:
        """Write the report where the user looks: the late ranks' logs, this output, a file."""
        text = describe(self._host, self._silent_seconds, seen, late)
        print(text, file=sys.stderr, flush=True)
        for rank in late:
            log = Path(self._settings.logs.replace("{rank}", str(rank)))
            if log.is_file():
                with log.open("a") as stream:
                    stream.write(text + "\n")
        line: dict[str, Any] = {
            "host": self._host, "time_unix_seconds": time.time(),
            "silent_seconds": self._silent_seconds, "limit_seconds": self._limit_seconds,
            "late_ranks": late, "ranks": [asdict(state) for state in seen],
        }  # fmt: skip
        with Path(self._settings.report).open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def find_late(seen: list[RankState]) -> list[int]:
    """Name the ranks that the others wait for; none where all are equally far.

    Args:
        seen: All ranks, of other hosts as well where they are known.
    """
    stopped = [s.rank for s in seen if s.state == "T"]
    if stopped:
        return stopped
    least = min((s.step, s.position) for s in seen)
    behind = [s.rank for s in seen if (s.step, s.position) == least]
    return behind if len(behind) < len(seen) else []


def describe(host: str, silent_seconds: float, seen: list[RankState], late: list[int]) -> str:
    """Give the report: a line for the hang, and one for each rank, the late ones first."""
    named = f"rank {', '.join(map(str, late))} is late" if late else "no rank is behind the others"
    lines = [
        f"watchdog on {host}: no rank here has moved for {silent_seconds:.0f} s; {named}; the "
        "ranks are ended (guard.watchdog_seconds), their stacks stand in their logs"
    ]
    for s in sorted(seen, key=lambda s: (s.rank not in late, s.rank)):
        doing = "on another host" if s.state is None else RUNNING.get(s.state, s.state)
        place = f" in {s.waits_in}" if s.waits_in else ""
        lines.append(
            f"  rank {s.rank} on {s.host} (pid {s.pid}): {'late' if s.rank in late else 'waits'}, "
            f"step {s.step}, {s.phase}, {doing}{place}"
        )
    return "\n".join(lines)


def end(members: list[Member]) -> None:
    """Kill ranks, also stopped ones; a pid that another process got since is left alone."""
    for member in members:
        if started_ticks(member.pid) == member.started_ticks:
            with suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGKILL)


if __name__ == "__main__":
    # Ctrl-C stops the ranks together; this process goes when they have gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Watch(Settings(**json.loads(sys.argv[1]))).run()

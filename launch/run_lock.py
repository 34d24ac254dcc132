"""From commands that want one directory to the one that owns it, on one host or on several.

File locks do not hold across hosts on every shared filesystem, and die with nobody noticing where a
process is only stopped. Here each owner claims the next number by a hard link, which one process
alone can make; `owner.json` tells who it is, and its age whether it still answers.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipeline.errors import LaunchError
from pipeline.tracking.atomic import write_text_atomic
from pipeline.training.heartbeat import started_ticks

OWNER_FILE = "owner.json"
CLAIMS = ".owner"
BEAT_SECONDS = 5.0
"""How often an owner says that it lives."""
LIMIT_SECONDS = 60.0
"""Silence after which an owner counts as dead whose process cannot be looked at, or that lives and
does not answer. Twelve beats: a shared filesystem may stall for many seconds."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who works in a directory: the content of `owner.json`."""

    token: int
    """Rises with every owner: one that was taken over holds a smaller one."""
    run: str
    """Name of the directory."""
    host: str
    pid: int
    machine: str | None
    """Which boot of which machine, and which process numbers there; equal means that `pid` can be
    looked at from here. None where there is no /proc."""
    started_ticks: int
    """When the kernel started the process, since boot: another may get the same pid later."""
    since: str
    """When it became the owner, UTC."""
    is_done: bool = False
    """Whether it has left the directory."""


class Ownership:
    """One owner's hold on a directory."""

    def __init__(self, directory: Path, owner: Owner) -> None:
        """Begin to say that this process lives.

        Args:
            directory: What is owned.
            owner: This process.
        """
        self.owner = owner
        self._directory = directory
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()

    def is_lost(self) -> bool:
        """Tell whether another process has taken the directory over, or it is gone."""
        return max(list_claims(self._directory), default=0) != self.owner.token

    def release(self) -> None:
        """Let the next one in; what another owner wrote since stays as it is."""
        self._has_ended.set()
        self._thread.join()
        if not self.is_lost():
            _write_owner(self._directory, Owner(**{**asdict(self.owner), "is_done": True}))

    def _beat(self) -> None:
        while not self._has_ended.wait(BEAT_SECONDS) and not self.is_lost():
            # Without a time the server's clock counts, so that skewed hosts cannot disagree.
            with suppress(FileNotFoundError):
                os.utime(_claim_path(self._directory, self.owner.token))


@contextmanager
def alone_in(directory: Path) -> Iterator[Ownership]:
    """Keep other commands out of a directory while the block runs, on this host and on others.

    Args:
        directory: It exists; every host that may work in it sees it.

    Raises:
        LaunchError: Another command works in it; the message names it.
    """
    ownership = Ownership(directory, _claim(directory))
    try:
        yield ownership
    finally:
        ownership.release()


def list_claims(directory: Path) -> list[int]:
    """List the numbers that owners have claimed and not yet removed; the largest owns."""
    return sorted(int(path.name) for path in (directory / CLAIMS).glob("[0-9]*"))


def read_owner(directory: Path) -> Owner | None:
    """Read who works, or worked last, in a directory; None where nobody did.

    Raises:
        LaunchError: The file is damaged; it is only ever replaced whole.
    """
    path = directory / OWNER_FILE
    try:
        return Owner(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as exc:
        raise LaunchError(
            f"{path} is damaged ({exc}); remove it if no command works there"
        ) from exc


def _claim(directory: Path) -> Owner:
    """Become the owner after the last one, if that one is gone.

    Raises:
        LaunchError: It is not, or another process was faster.
    """
    claims = directory / CLAIMS
    claims.mkdir(exist_ok=True)
    last = max(list_claims(directory), default=0)
    if (holder := _find_holder(directory, last)) is not None:
        raise _refusal(directory, holder)
    mine = _describe_self(directory, last + 1)
    draft = claims / f".{secrets.token_hex(8)}"
    try:
        draft.write_text(json.dumps(asdict(mine)))
        os.link(draft, _claim_path(directory, mine.token))
    except FileExistsError:
        raise _refusal(directory, _read_claim(directory, mine.token)) from None
    finally:
        draft.unlink(missing_ok=True)
    # A number that was claimed and removed before this process came to it could be claimed again;
    # then a larger one is there.
    _check_newest(directory, mine)
    _write_owner(directory, mine)
    _check_newest(directory, mine)
    for number in list_claims(directory):
        if number < mine.token:
            _claim_path(directory, number).unlink(missing_ok=True)
    return mine


def _find_holder(directory: Path, number: int) -> Owner | None:
    """Give the owner by its claim if it still works there."""
    if number == 0:
        return None
    claim = _read_claim(directory, number)
    if claim is None:
        return None
    owner = read_owner(directory)
    if owner is not None and owner.token == number and owner.is_done:
        return None
    is_visible = claim.machine is not None and claim.machine == _this_machine()
    if is_visible and started_ticks(claim.pid) != claim.started_ticks:
        return None
    try:
        return claim if _silent_seconds(directory, number) < LIMIT_SECONDS else None
    except FileNotFoundError:
        # Its successor has removed it, so the next number is claimed.
        return None


def _silent_seconds(directory: Path, number: int) -> float:
    """Give the age of an owner's last beat by the clock of the filesystem, not of this host."""
    probe = directory / CLAIMS / f".{secrets.token_hex(8)}"
    try:
        probe.touch()
        return probe.stat().st_mtime - _claim_path(directory, number).stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _check_newest(directory: Path, mine: Owner) -> None:
    newest = max(list_claims(directory))
    if newest > mine.token:
        _claim_path(directory, mine.token).unlink(missing_ok=True)
        raise _refusal(directory, _read_claim(directory, newest))


def _refusal(directory: Path, holder: Owner | None) -> LaunchError:
    if holder is None:
        return LaunchError(f"another command was faster in {directory}; try again")
    return LaunchError(
        f"another command works in {directory} (process {holder.pid} on {holder.host}, since "
        f"{holder.since}, run {holder.run}); wait for it, stop it with Ctrl-C, or choose another "
        f"directory with name=NAME. If that process is gone, the directory is free "
        f"{LIMIT_SECONDS:.0f} s after its last sign of life"
    )


def _read_claim(directory: Path, number: int) -> Owner | None:
    try:
        return Owner(**json.loads(_claim_path(directory, number).read_bytes()))
    except FileNotFoundError:
        return None


def _claim_path(directory: Path, number: int) -> Path:
    return directory / CLAIMS / f"{number:08d}"


def _write_owner(directory: Path, owner: Owner) -> None:
    write_text_atomic(directory / OWNER_FILE, json.dumps(asdict(owner), indent=1) + "\n")


def _describe_self(directory: Path, token: int) -> Owner:
    pid = os.getpid()
    return Owner(
        token=token, run=directory.name, host=socket.gethostname(), pid=pid,
        machine=_this_machine(), started_ticks=started_ticks(pid) or 0,
        since=datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def _this_machine() -> str | None:
    """Name this boot of this machine and its process numbers; containers have their own numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    numbers = Path("/proc/self/ns/pid")
    if not boot.exists():
        return None
    return f"{boot.read_text().strip()} {os.readlink(numbers)}"

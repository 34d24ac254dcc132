"""Of two commands in one directory one works, also where the first was only stopped (F20)."""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.rank_watch import DIRECTORY as HEARTBEATS
from launch.run_lock import CLAIMS, LIMIT_SECONDS, alone_in
from pipeline.errors import LaunchError
from pipeline.training.heartbeat import read_heartbeats
from tests.chaos.checkers import (
    check_all,
    check_pointer,
    check_samples,
    check_tidy,
    check_verdict,
    check_writer,
)
from tests.chaos.conftest import Golden
from tests.chaos.harness import INTERVAL, NUM_STEPS, Chaos, attempt, chaos_run, history, run_ranks

pytestmark = pytest.mark.slow

LOST = 3
"""Exit code of an owner that has lost its directory."""


@contextmanager
def owner_of(run_dir: Path) -> Iterator[int]:
    """Own a directory by another process, which tells by LOST that it has lost it."""
    reads, gives = os.pipe()
    owner = os.fork()
    if owner == 0:
        try:
            asked = threading.Event()
            signal.signal(signal.SIGTERM, lambda *_: asked.set())
            with alone_in(run_dir) as ownership:
                os.write(gives, b"1")
                while not asked.wait(0.1):
                    pass
                os._exit(LOST if ownership.is_lost() else 0)
        finally:
            os._exit(1)
    os.close(gives)
    try:
        assert os.read(reads, 1), "the owner could not begin"
        yield owner
    finally:
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        os.close(reads)


def test_a_second_run_is_refused_and_a_dead_owner_replaced(chaos: Chaos, golden: Golden) -> None:
    run_dir = chaos.make("run", chaos_run())
    chaos.plan(run_dir)
    with owner_of(run_dir) as owner:
        refused = attempt(run_dir)
    assert f"another command works in {run_dir} (process {owner} on" in str(refused.error)
    assert not (run_dir / "events.jsonl").exists()
    seen = history(run_dir, [attempt(run_dir)])
    check_all(seen, golden())


@pytest.mark.parametrize(
    ("log_every_steps", "refusal"),
    [
        (NUM_STEPS, r"CheckpointError: saving step-0{7}[48] failed: rank 0: .*took the run over"),
        (1, r"TrackingError: \S+events\S*\.jsonl .*took the run over"),
    ],
    ids=["commit", "event"],
)
def test_a_stopped_owner_that_was_replaced_changes_nothing(
    chaos: Chaos, golden: Golden, log_every_steps: int, refusal: str
) -> None:
    run_dir = chaos.make("run", chaos_run(tracking={"log_every_steps": log_every_steps}))
    place = {"phase": "optimizer", "action": "stop", "attempt": 1, "step": 2 * INTERVAL}
    chaos.plan(run_dir, *({"id": f"stop-{rank}", "rank": rank, **place} for rank in (0, 1)))
    errors: list[str] = []

    def train_as_the_owner() -> None:
        try:
            run_ranks(run_dir)
        except LaunchError as exc:
            errors.append(str(exc))

    ranks = threading.Thread(target=train_as_the_owner)
    with owner_of(run_dir) as owner:
        ranks.start()
        wait_until_stopped(run_dir)
        os.kill(owner, signal.SIGSTOP)
        stopped = [member.pid for member, _ in read_heartbeats(run_dir / HEARTBEATS).values()]
        try:
            assert "another command works" in str(attempt(run_dir).error)
            silence(run_dir)
            successor = attempt(run_dir)
            stands = contents(run_dir)
        finally:
            for pid in [*stopped, owner]:
                os.kill(pid, signal.SIGCONT)
            ranks.join(60)
        os.kill(owner, signal.SIGTERM)
        ended = os.waitid(os.P_PID, owner, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        assert ended.si_status == LOST
    assert len(errors) == 1
    assert re.search(refusal, errors[0])
    # The owner that woke up has changed no result, event, checkpoint or owner.
    assert contents(run_dir) == stands
    seen = history(run_dir, [successor])
    clean = golden()
    assert seen.losses == {step: clean.losses[step] for step in seen.losses}
    assert NUM_STEPS in seen.losses
    assert seen.weights == clean.weights
    check_samples(seen, clean)
    check_verdict(seen)
    check_writer(seen)
    check_pointer(run_dir)
    check_tidy(run_dir)


def wait_until_stopped(run_dir: Path) -> None:
    deadline = time.monotonic() + 60
    while len(history(run_dir, []).fired) < 2:
        assert time.monotonic() < deadline, "the faults did not strike"
        time.sleep(0.05)


def silence(run_dir: Path) -> None:
    """Let the owner's last sign of life be as old as if it had been stopped for that long."""
    (claim,) = (run_dir / CLAIMS).glob("[0-9]*")
    past = claim.stat().st_mtime - LIMIT_SECONDS
    os.utime(claim, (past, past))


def contents(run_dir: Path) -> dict[str, bytes]:
    """Give what a run says of itself, by path, without what each rank says of its own end."""
    paths = [
        *run_dir.glob("*.json"),
        *run_dir.glob("events.jsonl"),
        *run_dir.glob("checkpoints/**/*"),
    ]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in paths if path.is_file()}

"""Two commands never work in one directory, and a killed one does not block the next."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.run_lock import (
    BEAT_SECONDS,
    CLAIMS,
    LIMIT_SECONDS,
    alone_in,
    list_claims,
    read_owner,
)
from pipeline.errors import LaunchError

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import os, sys, time
from pathlib import Path
from launch.run_lock import alone_in

with alone_in(Path(sys.argv[1])) as ownership:
    print("held", flush=True)
    sys.stdin.readline()
    print("lost", ownership.is_lost(), flush=True)
"""


def test_a_second_command_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    with holding(tmp_path) as holder:
        with pytest.raises(LaunchError, match=f"another command .*process {holder.pid} on"):
            enter(tmp_path)
        holder.kill()
        holder.wait()
        enter(tmp_path)


@pytest.mark.slow
def test_the_train_command_is_refused_beside_another(cli, tiny_run: Path, tmp_path: Path) -> None:
    shards = tiny_run.parent / "runs" / "data"
    overrides = [f"output_dir={tmp_path}", f"data.output_dir={shards}"]
    assert cli("init", tiny_run, *overrides).code == 0
    with alone_in(tmp_path / "tiny"):
        shown = cli("train", tiny_run, *overrides)
    assert shown.code == 1
    assert "another command works in" in shown.err
    assert not (tmp_path / "tiny" / "events.jsonl").exists()


STARTERS = """
import os, sys, time
from pathlib import Path
from launch.run_lock import (
    BEAT_SECONDS,
    CLAIMS,
    LIMIT_SECONDS,
    alone_in,
    list_claims,
    read_owner,
)
from pipeline.errors import LaunchError

directory, num_starters = Path(sys.argv[1]), int(sys.argv[2])
reads_go, gives_go = os.pipe()
reads_end, gives_end = os.pipe()
for _ in range(num_starters):
    if os.fork() == 0:
        os.close(gives_go), os.close(gives_end)
        os.read(reads_go, 1)
        try:
            with alone_in(directory) as ownership:
                print(f"won {ownership.owner.token}\\n", end="", flush=True)
                os.read(reads_end, 1)
        except LaunchError as exc:
            print(f"refused {str(exc)[:21]}\\n", end="", flush=True)
        os._exit(0)
os.close(reads_go), os.close(reads_end), os.close(gives_go)
sys.stdin.readline()
os.close(gives_end)
for _ in range(num_starters):
    os.wait()
"""
"""Children that all start when the parent closes its pipe; winners hold until stdin says so."""


def race(directory: Path, num_starters: int) -> list[str]:
    command = [sys.executable, "-c", STARTERS, str(directory), str(num_starters)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as starters:
        assert starters.stdin is not None
        assert starters.stdout is not None
        said = [starters.stdout.readline().strip() for _ in range(num_starters)]
        starters.stdin.write("\n")
    assert starters.returncode == 0
    return sorted(said)


@pytest.mark.parametrize("last", ["none", "done", "killed"])
def test_of_twenty_starters_one_wins(tmp_path: Path, last: str) -> None:
    token = 1
    if last == "done":
        enter(tmp_path)
        token = 2
    elif last == "killed":
        with holding(tmp_path) as holder:
            holder.kill()
        token = 2
    said = race(tmp_path, 20)
    assert said == ["refused another command works"] * 19 + [f"won {token}"]
    assert list_claims(tmp_path) == [token]
    owner = read_owner(tmp_path)
    assert owner is not None
    assert (owner.token, owner.is_done) == (token, True)


def test_a_stopped_owner_is_taken_over_and_learns_of_it(tmp_path: Path) -> None:
    with holding(tmp_path) as holder:
        holder.send_signal(signal.SIGSTOP)
        with pytest.raises(LaunchError, match="another command works"):
            enter(tmp_path)
        # As if it had not answered for as long as that.
        claim = tmp_path / CLAIMS / "00000001"
        past = claim.stat().st_mtime - LIMIT_SECONDS
        os.utime(claim, (past, past))
        with alone_in(tmp_path) as successor:
            holder.send_signal(signal.SIGCONT)
            assert holder.stdin is not None
            assert holder.stdout is not None
            holder.stdin.write("\n")
            holder.stdin.flush()
            assert holder.stdout.readline() == "lost True\n"
            assert holder.wait(20) == 0
            # What it left behind does not look like an end of the successor.
            owner = read_owner(tmp_path)
            assert owner is not None
            assert (owner.token, owner.is_done) == (2, False)
            assert not successor.is_lost()


def test_an_owner_on_another_host_counts_as_dead_once_it_is_silent(tmp_path: Path) -> None:
    with holding(tmp_path) as holder:
        claim = tmp_path / CLAIMS / "00000001"
        elsewhere = json.loads(claim.read_text()) | {"machine": "other", "host": "far", "pid": 1}
        claim.write_text(json.dumps(elsewhere))
        holder.kill()
    with pytest.raises(LaunchError, match="process 1 on far, since 20.* run test_an_owner"):
        enter(tmp_path)
    past = claim.stat().st_mtime - LIMIT_SECONDS
    os.utime(claim, (past, past))
    enter(tmp_path)


def test_an_owner_says_that_it_lives(tmp_path: Path) -> None:
    with alone_in(tmp_path):
        claim = tmp_path / CLAIMS / "00000001"
        os.utime(claim, (0, 0))
        deadline = time.monotonic() + 6 * BEAT_SECONDS
        while claim.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.1)


@contextmanager
def holding(directory: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(directory)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        try:
            yield holder
        finally:
            holder.kill()


def enter(directory: Path) -> None:
    with alone_in(directory) as ownership:
        assert not ownership.is_lost()

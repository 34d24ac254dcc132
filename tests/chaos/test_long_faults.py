"""Each fault that one machine can have, at every ZeRO stage and in both families.

`python -m pytest -m long tests/chaos` runs these and the random schedules, and ends with a table.
"""

import json
import math
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.rank_watch import DIRECTORY as HEARTBEATS
from pipeline.tracking.store import read_result
from pipeline.training.checkpoint_files import list_checkpoints
from pipeline.training.heartbeat import read_heartbeats
from tests.chaos.checkers import (
    check_all,
    check_fired,
    check_left_out,
    check_moved,
    check_pointer,
    check_refused,
    check_times,
)
from tests.chaos.conftest import Golden, Note
from tests.chaos.harness import (
    INTERVAL,
    Chaos,
    attempt,
    chaos_run,
    fault,
    history,
    rewrite,
)

pytestmark = [pytest.mark.slow, pytest.mark.long]

FAMILIES = ("gpt", "lstm_attention")
EVERYWHERE = [(family, stage) for stage in range(4) for family in FAMILIES]
WATCHDOG_SECONDS = 5.0
EXIT_SECONDS = 30
"""What a tracking server that does not answer may cost at the end of a run."""
MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")
PLACES = [
    ("data.next", 1, 7), ("forward", 0, 7), ("allreduce", 1, 6), ("backward", 1, 5),
    ("optimizer", 0, 9), ("agree", 1, 7), ("evaluate", 1, 6), ("track.log", 0, 5),
    ("checkpoint.write", 1, INTERVAL), ("checkpoint.write", 0, 2 * INTERVAL),
    ("checkpoint.rename", 0, INTERVAL), ("checkpoint.commit", 0, 2 * INTERVAL),
]  # fmt: skip
"""Phase, rank and step."""


def spread(items: list[Any], *, start: int = 0, by: int = 1) -> list[Any]:
    """Pair items with families and stages in turn, so that all of either occur."""
    return [
        (*EVERYWHERE[(start + by * number) % len(EVERYWHERE)], *item)
        for number, item in enumerate(items)
    ]


@pytest.mark.parametrize(
    ("family", "stage", "phase", "rank", "step"),
    [*spread(PLACES), *spread(PLACES, start=3, by=3)],
)
def test_f1_killed_rank(
    chaos: Chaos, golden: Golden, note: Note,
    family: str, stage: int, phase: str, rank: int, step: int,
) -> None:  # fmt: skip
    run_dir = chaos.make("run", chaos_run(family, stage))
    seen = chaos.survive(run_dir, fault(phase, "kill", rank=rank, step=step))
    check_all(seen, golden(family, stage), f"kill-{phase}")
    check_times(seen)
    assert len(seen.endings) == 2
    assert f"rank {rank} of run on" in str(seen.endings[0].error)
    note("F1", seen)


@pytest.mark.parametrize(("family", "stage"), [("gpt", 1), ("lstm_attention", 2)])
def test_f1_rank_killed_after_the_result(
    chaos: Chaos, golden: Golden, note: Note, family: str, stage: int
) -> None:
    run_dir = chaos.make("run", chaos_run(family, stage))
    seen = chaos.survive(run_dir, fault("exit", "kill", rank=1))
    check_all(seen, golden(family, stage), "kill-exit")
    assert seen.wasted_steps == 0
    note("F1", seen)


HANGS = [
    ("gpt", 0, "forward", "stop"), ("lstm_attention", 1, "forward", "hold_gil"),
    ("gpt", 2, "forward", "hold_gil"), ("lstm_attention", 3, "data.next", "stop"),
    ("gpt", 3, "checkpoint.write", "stop"),
]  # fmt: skip
"""In phases that the other rank leaves; in one where it waits, nobody can say who is late."""


@pytest.mark.parametrize(("family", "stage", "phase", "action"), HANGS)
def test_f4_hung_rank(
    chaos: Chaos, golden: Golden, note: Note, family: str, stage: int, phase: str, action: str
) -> None:
    run = chaos_run(family, stage, guard={"watchdog_seconds": WATCHDOG_SECONDS})
    run_dir = chaos.make("run", run)
    args = {"seconds": 90} if action == "hold_gil" else {}
    seen = chaos.survive(run_dir, fault(phase, action, rank=1, step=2 * INTERVAL, args=args))
    check_all(seen, golden(family, stage), f"{action}-{phase}")
    assert len(seen.endings) == 2
    assert "rank 1 is late" in str(seen.endings[0].error)
    (path,) = run_dir.glob("hangs.*.jsonl")
    assert json.loads(path.read_text())["late_ranks"] == [1]
    note("F4", seen)


@pytest.mark.parametrize(
    ("family", "stage", "phase", "cause"),
    [("gpt", 0, "forward", "compute"), ("lstm_attention", 1, "data.next", "data"),
     ("lstm_attention", 2, "forward", "compute"), ("gpt", 3, "data.next", "data")],
)  # fmt: skip
def test_f5_straggler(
    chaos: Chaos, golden: Golden, note: Note, family: str, stage: int, phase: str, cause: str
) -> None:
    first = 3
    slow = [
        fault(phase, "sleep", id=f"slow-{step}", rank=1, step=step, args={"seconds": 0.3})
        for step in range(first, first + 8)
    ]
    run_dir = chaos.make("run", chaos_run(family, stage))
    seen = chaos.survive(run_dir, *slow)
    check_all(seen, golden(family, stage), *(one["id"] for one in slow))
    assert len(seen.endings) == 1
    (told,) = [e for e in seen.events if e.kind == "straggler"]
    assert (told.values["rank"], told.values["cause"]) == (1, cause)
    assert told.step < first + 10
    assert not [e for e in golden(family, stage).events if e.kind == "straggler"]
    note("F5", seen)


@pytest.mark.parametrize(("family", "stage", "rank"), [("gpt", 0, 0), ("lstm_attention", 3, 1)])
def test_f6_refused_write(
    chaos: Chaos, golden: Golden, note: Note, family: str, stage: int, rank: int
) -> None:
    run_dir = chaos.make("run", chaos_run(family, stage))
    full = fault("checkpoint.write", "enospc", rank=rank, step=2 * INTERVAL)
    seen = chaos.survive(run_dir, full)
    check_all(seen, golden(family, stage), "enospc-checkpoint.write")
    assert f"failed: rank {rank}: [Errno 28] No space left" in str(seen.endings[0].error)
    note("F6", seen)


@pytest.mark.mounts
def test_f6_full_file_system(chaos: Chaos, golden: Golden, note: Note) -> None:
    run_dir = chaos.make("run", chaos_run("gpt", 2))
    place = run_dir / "checkpoints"
    place.mkdir()
    files = list_checkpoints(golden("gpt", 2).run_dir)[0].iterdir()
    checkpoint_bytes = sum(path.stat().st_size for path in files)
    # Room for what a start asks for; somebody else fills the disk in mid-run.
    size = f"size={4 * checkpoint_bytes}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "small", str(place)], check=True)
    ballast = place / "ballast"

    def fill() -> None:
        wait_until(lambda: history(run_dir, []).fired)
        ballast.write_bytes(bytes(shutil.disk_usage(place).free - checkpoint_bytes // 2))

    try:
        chaos.plan(run_dir, fault("forward", "sleep", rank=0, step=7, args={"seconds": 2}))
        with ThreadPoolExecutor(1) as helper:
            filled = helper.submit(fill)
            full = attempt(run_dir)
        filled.result()
        assert "a checkpoint needs" in str(full.error)
        assert [path.name for path in list_checkpoints(run_dir)] == ["step-00000004"]
        check_pointer(run_dir)
        ballast.unlink()
        seen = history(run_dir, [full, attempt(run_dir)])
        check_all(seen, golden("gpt", 2), "sleep-forward")
        note("F6", seen)
    finally:
        subprocess.run(["umount", str(place)], check=True)


SIGNALS = [
    ("data.next", 1, 7), ("forward", 0, 6), ("optimizer", 1, 5), ("agree", 0, 9),
    ("evaluate", 1, 6), ("evaluate", 0, 6), ("checkpoint.write", 1, INTERVAL), ("backward", 1, 4),
]  # fmt: skip


@pytest.mark.parametrize(("family", "stage", "phase", "rank", "step"), spread(SIGNALS))
def test_f13_signal(
    chaos: Chaos, golden: Golden, note: Note,
    family: str, stage: int, phase: str, rank: int, step: int,
) -> None:  # fmt: skip
    run_dir = chaos.make("run", chaos_run(family, stage))
    seen = chaos.survive(run_dir, fault(phase, "terminate", rank=rank, step=step))
    check_all(seen, golden(family, stage), f"terminate-{phase}")
    assert [ending.verdict for ending in seen.endings] == ["stopped", "complete"]
    assert seen.wasted_steps == 0
    note("F13", seen)


@pytest.mark.skipif(not os.access(MEMORY_GROUPS, os.W_OK), reason="no cgroup (v1) for memory here")
@pytest.mark.parametrize(("family", "stage"), [("gpt", 3), ("lstm_attention", 1)])
def test_f14_rank_killed_for_lack_of_memory(
    chaos: Chaos, golden: Golden, note: Note, family: str, stage: int
) -> None:
    run_dir = chaos.make("run", chaos_run(family, stage))
    waits = fault("forward", "sleep", rank=1, step=2, args={"seconds": 2})
    grows = fault("forward", "allocate", rank=1, step=7, args={"bytes": 2**31})
    chaos.plan(run_dir, waits, grows)
    with memory_group(limit_bytes=2**29) as group:

        def put_in() -> None:
            wait_until(lambda: history(run_dir, []).fired)
            member, _ = read_heartbeats(run_dir / HEARTBEATS)[1]
            (group / "cgroup.procs").write_text(str(member.pid))

        with ThreadPoolExecutor(1) as helper:
            placed = helper.submit(put_in)
            killed = attempt(run_dir)
        placed.result()
    told = "failed with signal SIGKILL, out of memory (OOM): the kernel of this host has killed"
    assert f"rank 1 of run on {socket.gethostname()} after step 6 {told}" in str(killed.error)
    seen = history(run_dir, [killed, attempt(run_dir)])
    check_all(seen, golden(family, stage), "sleep-forward", "allocate-forward")
    note("F14", seen)


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """Make a group of processes that may use so much memory together."""
    group = MEMORY_GROUPS / f"tandem-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield group
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def wait_until(is_so: Callable[[], object], timeout_seconds: float = 60) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to pass in time"
        time.sleep(0.02)


@pytest.mark.parametrize(("family", "stage"), EVERYWHERE)
def test_f15_nan(chaos: Chaos, golden: Golden, note: Note, family: str, stage: int) -> None:
    step = 6
    run_dir = chaos.make("run", chaos_run(family, stage))
    poison = fault("loss", "multiply", rank=stage % 2, step=step, args={"factor": math.nan})
    seen = chaos.survive(run_dir, poison)
    check_fired(seen, "multiply-loss")
    check_left_out(seen, golden(family, stage), step)
    note("F15", seen)


@pytest.mark.parametrize(("family", "stage"), [("gpt", 1), ("lstm_attention", 3)])
def test_f17_clock_that_was_set_back_a_day(
    chaos: Chaos, golden: Golden, note: Note, family: str, stage: int
) -> None:
    run_dir = chaos.make("run", chaos_run(family, stage))
    chaos.plan(run_dir)
    first = attempt(run_dir, stop_after_steps=9)
    newest, older = list_checkpoints(run_dir)
    os.utime(older)
    past = time.time() - 7200
    os.utime(newest, (past, past))
    # The log as a host leaves it whose clock is a day ahead.
    log = run_dir / "events.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    ahead = [line | {"time_unix_seconds": line["time_unix_seconds"] + 86_400} for line in lines]
    log.write_text("".join(json.dumps(line) + "\n" for line in ahead))
    seen = history(run_dir, [first, attempt(run_dir)])
    check_all(seen, golden(family, stage))
    assert seen.wasted_steps == 0
    goodput = read_result(run_dir).goodput
    parts = sum(seconds for name, seconds in goodput.items() if name != "wall_seconds")
    assert parts == pytest.approx(goodput["wall_seconds"], rel=0.01)
    assert 0 < goodput["wall_seconds"] < 3600
    note("F17", seen)


@pytest.mark.parametrize(
    ("family", "stages", "worlds"),
    [("gpt", (0, 3), (1, 2)), ("lstm_attention", (3, 0), (2, 1)), ("gpt", (1, 2), (2, 4)),
     ("lstm_attention", (2, 1), (4, 2)), ("gpt", (2, 2), (4, 1)),
     ("lstm_attention", (1, 3), (2, 4))],
)  # fmt: skip
def test_f23_other_world_size_and_stage(
    chaos: Chaos, golden: Golden, note: Note,
    family: str, stages: tuple[int, int], worlds: tuple[int, int],
) -> None:  # fmt: skip
    run_dir = chaos.make("run", chaos_run(family, stages[0]))
    chaos.plan(run_dir)
    first = attempt(run_dir, num_workers=worlds[0], stop_after_steps=6)
    rewrite(run_dir, zero={"stage": stages[1], "bucket_elements": 5_000})
    seen = history(run_dir, [first, attempt(run_dir, num_workers=worlds[1])])
    check_moved(seen, golden(family, 1), stages, worlds)
    note("F23", seen)


@pytest.mark.parametrize(
    ("family", "stage", "phase", "step"),
    [("gpt", 0, "checkpoint.write", INTERVAL), ("lstm_attention", 2, "optimizer", 2),
     ("gpt", 3, "agree", 3)],
)  # fmt: skip
def test_f24_restart_loop(
    chaos: Chaos, note: Note, family: str, stage: int, phase: str, step: int
) -> None:
    run_dir = chaos.make("run", chaos_run(family, stage))
    chaos.plan(run_dir, fault(phase, "raise", rank=0, step=step, attempt=None))
    failed = [attempt(run_dir) for _ in range(3)]
    refused = attempt(run_dir)
    seen = history(run_dir, failed)
    check_refused(seen, refused, f"raise-{phase}")
    note("F24", seen)


def test_f12_server_that_never_answers(
    chaos: Chaos, tiny_run: Path, note: Note, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = chaos.root / "silent"
    chaos.plan(run_dir)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"tracking.uri=http://127.0.0.1:{silent.getsockname()[1]}"
        shards = f"data.output_dir={tiny_run.parent}/runs/data"
        overrides = [f"output_dir={chaos.root}", shards, "name=silent", uri]
        code = main(["train", str(tiny_run), *overrides, "--workers", "2"])
        waited = time.time() - (run_dir / "result.json").stat().st_mtime
        # The fault is that it was asked: a connection waits in the queue.
        silent.settimeout(1)
        silent.accept()[0].close()
    assert code == 0
    assert "MLflow lacks something" in "".join(capfd.readouterr())
    assert waited < EXIT_SECONDS
    note("F12", history(run_dir, []))

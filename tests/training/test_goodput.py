"""Where the wall time of real runs went, also of one that was killed."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking.events import read_events
from pipeline.tracking.goodput import PARTS
from pipeline.tracking.store import RunResult
from pipeline.training.attempts import ACCOUNT
from pipeline.training.distributed import RankContext
from pipeline.training.meters import process_age_seconds
from tests.training.rank_pool import RankPool
from tests.training.runs import Runs, every_step, losses, train_rank

pytestmark = pytest.mark.slow

KILLED_AT = 9


def train_until_killed(ranks: RankContext, run_dir: Path, marker: Path) -> Any:
    """Let rank 1 die without a word once a step is logged."""
    if ranks.rank == 1:
        script = (
            f'until grep -qs \'"kind":"train","step":{KILLED_AT},\' {run_dir}/events.jsonl; '
            f"do sleep 0.01; done; touch {marker}; kill -KILL {os.getpid()}"
        )
        os.posix_spawn("/bin/sh", ["sh", "-c", script], dict(os.environ))
    return train_rank(ranks, run_dir)


def parts_of(result: RunResult) -> dict[str, float]:
    return {k: v for k, v in result.goodput.items() if k != "wall_seconds"}


def test_account_covers_the_time_of_a_killed_attempt(
    two_ranks: RankPool, runs: Runs, tmp_path: Path
) -> None:
    run = every_step("gpt", 1, checkpoint={"every_steps": 4})
    long = run.train.model_copy(update={"total_tokens": 40 * run.train.global_batch_tokens})
    run_dir = runs.make("run", run.model_copy(update={"train": long}))
    marker = tmp_path / "killed"
    with pytest.raises(AssertionError, match=f"code -{int(signal.SIGKILL)}|failed"):
        two_ranks.run(train_until_killed, run_dir, marker)
    assert marker.exists()
    before = read_events(run_dir / "events.jsonl")
    time.sleep(0.5)
    result = two_ranks.run(train_rank, run_dir)[0]

    events = read_events(run_dir / "events.jsonl")
    assert result.attempts == 2
    assert sorted(losses(run_dir)) == list(range(1, 41))
    resumed = next(e for e in events if e.kind == "resume")
    assert resumed.step <= KILLED_AT
    goodput = result.goodput
    wall = goodput["wall_seconds"]
    assert sum(parts_of(result).values()) == pytest.approx(wall, rel=0.01)
    # By the wall clock alone, from the start of the first process to the end of the last.
    begun = events[0].time_unix_seconds - events[0].values[ACCOUNT]["wall"]
    assert wall == pytest.approx(events[-1].time_unix_seconds - begun, rel=0.01)
    assert goodput["restart_seconds"] >= 0.5
    assert goodput["lost_seconds"] > 0.0
    last = before[-1]
    if last.kind == "train":
        assert goodput["lost_seconds"] <= last.values[ACCOUNT]["train"]
    assert result.metrics["perf/goodput_fraction"].value == goodput["train_seconds"] / wall
    assert set(parts_of(result)) <= {f"{name}_seconds" for name in PARTS}


def test_account_knows_every_part_of_an_undisturbed_run(two_ranks: RankPool, runs: Runs) -> None:
    run_dir = runs.make("run", every_step("gpt", 1, checkpoint={"every_steps": 4}))
    two_ranks.run(train_rank, run_dir, 6)
    result = two_ranks.run(train_rank, run_dir)[0]
    goodput = result.goodput
    for name in ("train", "init", "restore", "data_wait", "checkpoint", "eval", "tracking", "idle"):
        assert goodput[f"{name}_seconds"] > 0.0, name
    # On ranks that have trained before, the first step may be no slower than the next ones.
    assert goodput["first_step_seconds"] >= 0.0
    for name in ("lost", "skipped"):
        assert goodput[f"{name}_seconds"] == pytest.approx(0.0, abs=1e-9), name
    wall = goodput["wall_seconds"]
    fraction = goodput["train_seconds"] / (wall - goodput["idle_seconds"])
    assert result.metrics["perf/goodput_fraction"].value == pytest.approx(fraction)
    stop = next(e for e in read_events(run_dir / "events.jsonl") if e.kind == "stop")
    assert result.metrics["progress/seconds"].value < wall - goodput["idle_seconds"] + 1e-9
    assert stop.values[ACCOUNT]["wall"] < wall


def test_age_of_this_process_grows_with_the_monotonic_clock() -> None:
    first, begin = process_age_seconds(), time.perf_counter()
    time.sleep(0.05)
    grown = process_age_seconds() - first
    assert grown == pytest.approx(time.perf_counter() - begin, abs=0.02)
    assert first > 0.0

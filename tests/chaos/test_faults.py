"""Runs that lose a rank, hang, are stopped or meet bad numbers end as if they had lost nothing."""

import json
import math
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.run_dirs import init_run
from launch.run_lock import alone_in
from pipeline.config.load import load_run
from pipeline.data.prepare import prepare
from pipeline.tracking.events import surviving_events
from pipeline.tracking.store import read_verdict
from pipeline.training.checkpoint_files import list_checkpoints, verify_checkpoint
from tests.chaos.checkers import (
    check_all,
    check_fired,
    check_pointer,
    check_samples,
    check_tidy,
    check_verdict,
    check_writer,
)
from tests.chaos.conftest import Golden
from tests.chaos.harness import INTERVAL, NUM_STEPS, Chaos, attempt, chaos_run, history, rewrite

pytestmark = pytest.mark.slow

DETECTION_SECONDS = 15


def fault(phase: str, action: str, **fields: Any) -> dict[str, Any]:
    return {"id": f"{action}-{phase}", "phase": phase, "action": action, "attempt": 1, **fields}


@pytest.mark.parametrize(
    ("family", "stage", "rank", "step", "phase"),
    [
        ("gpt", 1, 1, 7, "backward"),
        ("gpt", 1, 0, INTERVAL, "checkpoint.rename"),
        ("gpt", 1, 0, 2 * INTERVAL, "checkpoint.commit"),
        ("lstm_attention", 3, 1, 6, "optimizer"),
    ],
)
def test_f1_a_killed_rank_costs_an_interval_at_most(
    chaos: Chaos, golden: Golden, family: str, stage: int, rank: int, step: int, phase: str
) -> None:
    run_dir = chaos.make("run", chaos_run(family, stage))
    seen = chaos.survive(run_dir, fault(phase, "kill", rank=rank, step=step))
    check_all(seen, golden(family, stage), f"kill-{phase}")
    assert len(seen.endings) == 2
    killed = rf"rank {rank} of run on \S+ after step \d+ failed with signal SIGKILL"
    assert re.search(killed, str(seen.endings[0].error))


def test_f4_a_hung_rank_is_named_and_the_run_goes_on(chaos: Chaos, golden: Golden) -> None:
    limit_seconds = 5.0
    run = chaos_run(guard={"watchdog_seconds": limit_seconds})
    run_dir = chaos.make("run", run)
    seen = chaos.survive(run_dir, fault("forward", "stop", rank=1, step=6))
    ended = time.monotonic() - seen.endings[1].seconds
    check_all(seen, golden(), "stop-forward")
    assert len(seen.endings) == 2
    error = str(seen.endings[0].error)
    assert re.search(r"rank 1 of run on \S+ after step 5 failed with signal SIGKILL", error)
    assert "rank 1 is late" in error
    assert "step 6, forward, stopped by a signal" in error
    (hang,) = [
        json.loads(line)
        for path in run_dir.glob("hangs.*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert hang["late_ranks"] == [1]
    assert hang["limit_seconds"] >= limit_seconds
    # The verdict came soon after the watchdog had waited long enough.
    assert ended - seen.fired[0]["monotonic_seconds"] - hang["silent_seconds"] < DETECTION_SECONDS
    # The rank that waited has left its stack.
    assert "in train_step" in (run_dir / "rank-0.log").read_text()


@pytest.mark.parametrize("stage", [0, 3])
def test_f15_a_step_with_nan_on_one_rank_is_left_out_by_all(
    chaos: Chaos, golden: Golden, stage: int
) -> None:
    step = 6
    run_dir = chaos.make("run", chaos_run("gpt", stage))
    poison = fault("loss", "multiply", rank=1, step=step, args={"factor": math.nan})
    seen = chaos.survive(run_dir, poison)
    check_fired(seen, "multiply-loss")
    check_samples(seen, golden("gpt", stage))
    check_verdict(seen)
    check_writer(seen)
    check_pointer(run_dir)
    clean = golden("gpt", stage).losses
    assert len(seen.endings) == 1
    assert [e.step for e in seen.events if e.kind == "skip"] == [step]
    # A loss is taken before its step's update, so the one that is left out shows a step later.
    assert {s: seen.losses[s] for s in range(1, step)} == {s: clean[s] for s in range(1, step)}
    assert math.isnan(float.fromhex(seen.losses[step]))
    later = [float.fromhex(seen.losses[s]) for s in range(step + 1, NUM_STEPS + 1)]
    assert all(map(math.isfinite, later))
    assert seen.losses[step + 1] != clean[step + 1]
    assert verify_checkpoint(list_checkpoints(run_dir)[0]).skipped_total == 1


def test_f13_a_signal_to_one_rank_stops_all_with_a_checkpoint(chaos: Chaos, golden: Golden) -> None:
    run_dir = chaos.make("run", chaos_run())
    chaos.plan(run_dir, fault("forward", "terminate", rank=1, step=6))
    first = attempt(run_dir)
    assert first.verdict == "stopped"
    assert read_verdict(run_dir) == "stopped"
    assert list_checkpoints(run_dir)[0].name == "step-00000006"
    seen = history(run_dir, [first, attempt(run_dir)])
    check_all(seen, golden(), "terminate-forward")
    assert seen.wasted_steps == 0


def test_f12_a_tracking_server_that_refuses_changes_nothing_and_is_said(
    chaos: Chaos, tiny_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    overrides = [f"output_dir={chaos.root}", f"data.output_dir={tiny_run.parent}/runs/data"]
    clean = init_run(load_run(tiny_run, [*overrides, "name=clean"]), prepare)
    chaos.plan(clean)
    golden = history(clean, [attempt(clean)])
    run_dir = chaos.root / "refused"
    # The stop comes from a rank, and the command tells it as its own exit code.
    chaos.plan(run_dir, fault("forward", "terminate", rank=1, step=4))
    uri = f"tracking.uri=http://127.0.0.1:{port}"
    code = main(["train", str(tiny_run), *overrides, "name=refused", uri, "--workers", "2"])
    shown = capfd.readouterr()
    assert code == 75
    assert "MLflow lacks something" in shown.out + shown.err
    seen = history(run_dir, [])
    check_fired(seen, "terminate-forward")
    assert seen.losses == {step: golden.losses[step] for step in range(1, 5)}
    check_pointer(run_dir)
    check_tidy(run_dir)


def test_f20_a_second_run_is_refused_and_a_dead_owner_replaced(
    chaos: Chaos, golden: Golden
) -> None:
    run_dir = chaos.make("run", chaos_run())
    chaos.plan(run_dir)
    reads, gives = os.pipe()
    owner = os.fork()
    if owner == 0:
        with alone_in(run_dir):
            os.write(gives, b"1")
            signal.pause()
        os._exit(0)
    try:
        os.read(reads, 1)
        refused = attempt(run_dir)
    finally:
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        os.close(reads)
        os.close(gives)
    assert f"another command works in {run_dir} (process {owner} on" in str(refused.error)
    assert not (run_dir / "events.jsonl").exists()
    seen = history(run_dir, [attempt(run_dir)])
    check_all(seen, golden())


def test_f23_another_world_size_and_stage_go_on_with_the_same_batches(
    chaos: Chaos, golden: Golden
) -> None:
    run_dir = chaos.make("run", chaos_run("gpt", 1))
    chaos.plan(run_dir)
    first = attempt(run_dir, stop_after_steps=6)
    rewrite(run_dir, zero={"stage": 3, "bucket_elements": 5_000})
    seen = history(run_dir, [first, attempt(run_dir, num_workers=1)])
    check_samples(seen, golden("gpt", 1))
    check_verdict(seen)
    check_writer(seen)
    check_pointer(run_dir)
    stages = [e.values["zero_stage"] for e in seen.events if e.kind in ("start", "resume")]
    worlds = [e.values["world_size"] for e in seen.events if e.kind in ("start", "resume")]
    assert (stages, worlds) == ([1, 3], [2, 1])
    # Sums over other ranks round in another order.
    expected = {s: float.fromhex(x) for s, x in golden("gpt", 1).losses.items()}
    found = {s: float.fromhex(x) for s, x in seen.losses.items()}
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(surviving_events(seen.events)) > NUM_STEPS

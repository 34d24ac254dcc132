"""Runs that lose a rank, hang, are stopped or meet bad numbers end as if they had lost nothing."""

import json
import math
import re
import socket
from pathlib import Path

import pytest

from launch.cli import main
from launch.run_dirs import init_run
from pipeline.config.load import load_run
from pipeline.data.prepare import prepare
from pipeline.tracking.store import read_verdict
from pipeline.training.checkpoint_files import list_checkpoints
from tests.chaos.checkers import (
    DETECTION_SECONDS,
    check_all,
    check_curve,
    check_fired,
    check_left_out,
    check_moved,
    check_pointer,
    check_refused,
    check_samples,
    check_tidy,
    check_times,
    check_verdict,
)
from tests.chaos.conftest import Golden
from tests.chaos.harness import (
    INTERVAL,
    Chaos,
    attempt,
    chaos_run,
    fault,
    history,
    rewrite,
)

pytestmark = pytest.mark.slow


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
    check_times(seen)
    assert len(seen.endings) == 2
    killed = rf"rank {rank} of run on \S+ after step \d+ failed with signal SIGKILL"
    assert re.search(killed, str(seen.endings[0].error))


def test_f4_a_hung_rank_is_named_and_the_run_goes_on(chaos: Chaos, golden: Golden) -> None:
    limit_seconds = 5.0
    run = chaos_run(guard={"watchdog_seconds": limit_seconds})
    run_dir = chaos.make("run", run)
    seen = chaos.survive(run_dir, fault("forward", "stop", rank=1, step=6))
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
    assert seen.detection_seconds[0] - hang["silent_seconds"] < DETECTION_SECONDS
    # The rank that waited has left its stack.
    assert "in train_step" in (run_dir / "rank-0.log").read_text()


@pytest.mark.parametrize(("family", "stage"), [("gpt", 0), ("lstm_attention", 3)])
def test_f15_a_step_with_nan_on_one_rank_is_left_out_by_all(
    chaos: Chaos, golden: Golden, family: str, stage: int
) -> None:
    step = 6
    run_dir = chaos.make("run", chaos_run(family, stage))
    poison = fault("loss", "multiply", rank=1, step=step, args={"factor": math.nan})
    seen = chaos.survive(run_dir, poison)
    check_fired(seen, "multiply-loss")
    check_left_out(seen, golden(family, stage), step)


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


@pytest.mark.parametrize(("stages", "worlds"), [((1, 3), (2, 1)), ((3, 1), (2, 4))])
def test_f23_another_world_size_and_stage_go_on_with_the_same_batches(
    chaos: Chaos, golden: Golden, stages: tuple[int, int], worlds: tuple[int, int]
) -> None:
    run_dir = chaos.make("run", chaos_run("gpt", stages[0]))
    chaos.plan(run_dir)
    first = attempt(run_dir, num_workers=worlds[0], stop_after_steps=6)
    rewrite(run_dir, zero={"stage": stages[1], "bucket_elements": 5_000})
    seen = history(run_dir, [first, attempt(run_dir, num_workers=worlds[1])])
    check_moved(seen, golden("gpt", 1), stages, worlds)


def test_f24_a_step_that_always_fails_ends_the_run_after_three_attempts(
    chaos: Chaos, golden: Golden
) -> None:
    run_dir = chaos.make("run", chaos_run())
    # In every attempt, before there is a checkpoint.
    chaos.plan(run_dir, fault("forward", "raise", rank=0, step=2, attempt=None))
    failed = [attempt(run_dir) for _ in range(3)]
    refused = attempt(run_dir)
    check_refused(history(run_dir, failed), refused, "raise-forward")
    assert all("injected fault raise-forward" in str(ending.error) for ending in failed)
    # Once the cause is mended, the directory is as good as new.
    chaos.plan(run_dir)
    rewrite(run_dir, guard={"max_attempts_without_progress": 4})
    seen = history(run_dir, [*failed, attempt(run_dir)])
    check_curve(seen, golden())
    check_samples(seen, golden())
    check_verdict(seen)

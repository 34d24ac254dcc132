"""Every launcher runs the same worker: equal losses, and verdicts instead of exit codes."""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch import LAUNCHERS, build_launcher
from launch.rank_environment import environment_of_deepspeed
from launch.ray_nodes import Room
from launch.run_dirs import init_run
from launch.stopping import StopRequest
from pipeline.config.cluster import ClusterConfig
from pipeline.config.load import load_run
from pipeline.data.prepare import prepare
from pipeline.data.ray_tasks import ray_session
from pipeline.errors import LaunchError
from pipeline.tracking.events import read_events
from pipeline.tracking.store import Verdict, read_result, read_verdict
from pipeline.training.faults import ALLOW_VARIABLE, PLAN_VARIABLE
from tests.chaos.harness import history, plan_path

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """One local Ray for all tests of this file; the launcher joins it."""
    with ray_session(num_cpus=2):
        yield


def run_local(run_dir: Path, num_workers: int = 2) -> Verdict | None:
    cluster = ClusterConfig(launcher="local", accelerator="cpu")
    return build_launcher(cluster, StopRequest(print)).run(run_dir, num_workers=num_workers)


def run_ray(run_dir: Path, num_workers: int = 2) -> Verdict | None:
    cluster = ClusterConfig(launcher="ray", accelerator="cpu")
    return build_launcher(cluster, StopRequest(print)).run(run_dir, num_workers=num_workers)


def run_hostfile(run_dir: Path, num_workers: int = 2) -> Verdict | None:
    hosts = run_dir / "hosts.txt"
    hosts.write_text(f"localhost slots={num_workers}\n")
    cluster = ClusterConfig(launcher="hostfile", hostfile=hosts, accelerator="cpu")
    return build_launcher(cluster, StopRequest(print)).run(run_dir, num_workers=num_workers)


WAYS: dict[str, Callable[[Path], Verdict | None]] = {
    "local": run_local,
    "ray": run_ray,
    "hostfile": run_hostfile,
}


def new_run(tiny_run: Path, name: str, *overrides: str) -> Path:
    return init_run(load_run(tiny_run, [f"name={name}", *overrides]), prepare)


def losses_of(run_dir: Path) -> list[float]:
    events = read_events(run_dir / "events.jsonl")
    return [event.metrics["train/loss"] for event in events if event.kind == "train"]


@pytest.fixture(scope="module")
def reference(tiny_run: Path) -> list[float]:
    """Losses of a single rank over the same global batches."""
    run_dir = new_run(tiny_run, "reference")
    assert run_local(run_dir, num_workers=1) == "complete"
    return losses_of(run_dir)


def test_every_registered_launcher_is_run_here() -> None:
    assert set(WAYS) == set(LAUNCHERS)


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize("way", WAYS)
def test_every_launcher_gives_the_same_losses_and_its_ranks_our_variables(
    way: str, tiny_run: Path, reference: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = new_run(tiny_run, f"contract-{way}")
    plan = plan_path(run_dir)
    fault = {"id": "proof", "step": 1, "phase": "forward", "action": "sleep"}
    plan.write_text(json.dumps([fault | {"args": {"seconds": 0.0}}]))
    monkeypatch.setenv(PLAN_VARIABLE, str(plan))
    monkeypatch.setenv(ALLOW_VARIABLE, "1")
    assert WAYS[way](run_dir) == "complete"
    result = read_result(run_dir)
    assert (result.world_size, result.steps) == (2, 6)
    losses = losses_of(run_dir)
    assert len(losses) == 6
    assert losses == pytest.approx(reference, rel=1e-5)
    assert sorted(line["rank"] for line in history(run_dir, []).fired) == [0, 1]


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize("run", [run_local, pytest.param(run_ray, marks=pytest.mark.long)])
def test_a_refusing_rank_gives_its_message_and_its_exit_code(
    run: Callable[[Path, int], Verdict | None], tiny_run: Path
) -> None:
    # One micro-batch a step, for two ranks.
    run_dir = new_run(tiny_run, f"refused-{run.__name__}", "train.global_batch_tokens=64")
    with pytest.raises(LaunchError, match=r"(?s)^rank \d of refused.*not a multiple") as caught:
        run(run_dir, 2)
    assert caught.value.exit_code == 2
    assert not (run_dir / ".ray-train").exists()
    assert read_verdict(run_dir) is None


@pytest.mark.usefixtures("ray_here")
def test_a_run_without_room_says_what_it_waits_for_and_gives_up(tmp_path: Path) -> None:
    lines: list[str] = []
    room = Room(
        run_dir=tmp_path, sizes=[3], needs={"CPU": 1.0}, accelerator="cpu", wait_seconds=0.5
    )
    assert room.wait_for_size(StopRequest(lines.append)) == 0
    (line,) = lines
    assert re.match(r"waiting up to 0\.5 s: \S+ needs 3 ranks .* nodes with room: \S+ for 2;", line)
    assert dataclasses.replace(room, sizes=[2]).wait_for_size(StopRequest(lines.append)) == 2
    assert len(lines) == 1


def test_deepspeed_reads_the_command_that_a_dry_run_shows(tmp_path: Path) -> None:
    local = build_launcher(ClusterConfig(launcher="local"), StopRequest(print))
    program, *words = local.command(tmp_path, num_workers=2)
    read = "import json, sys; from deepspeed.launcher.runner import parse_args as read\n"
    read += "print(json.dumps(vars(read(sys.argv[1:]))))"
    shown = subprocess.run(
        [sys.executable, "-c", read, *words],
        env=environment_of_deepspeed(ROOT), capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    options = json.loads(shown.stdout.splitlines()[-1])
    assert program == "deepspeed"
    assert (options["num_gpus"], options["module"]) == (2, True)
    assert options["user_script"] == "launch.worker"
    assert options["user_args"] == ["--run", str(tmp_path)]

"""Every launcher runs the same worker: equal losses, and verdicts instead of exit codes."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import LAUNCHERS, build_launcher
from launch.hostfile import find_deepspeed
from launch.run_dirs import init_run
from pipeline.config.cluster import ClusterConfig
from pipeline.config.load import load_run
from pipeline.tracking.events import read_events
from pipeline.tracking.store import Verdict, read_result, read_verdict

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def run_local(run_dir: Path) -> Verdict | None:
    cluster = ClusterConfig(launcher="local", accelerator="cpu")
    return build_launcher(cluster, print).run(run_dir, num_workers=2)


def run_ray(run_dir: Path) -> Verdict | None:
    cluster = ClusterConfig(launcher="ray", accelerator="cpu")
    return build_launcher(cluster, print).run(run_dir, num_workers=2)


def run_deepspeed(run_dir: Path) -> Verdict | None:
    """What `hostfile` starts on every host, by hand on this one."""
    local = build_launcher(ClusterConfig(launcher="local"), print)
    command = local.command(run_dir, num_workers=2)
    subprocess.run(
        [find_deepspeed(), *command[1:]],
        cwd=ROOT,
        check=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    return read_verdict(run_dir)


WAYS: dict[str, Callable[[Path], Verdict | None]] = {
    "local": run_local,
    "ray": run_ray,
    "hostfile": run_deepspeed,
}


def new_run(tiny_run: Path, name: str) -> Path:
    return init_run(load_run(tiny_run, [f"name={name}"]), print)


def losses_of(run_dir: Path) -> list[float]:
    events = read_events(run_dir / "events.jsonl")
    return [event.metrics["train/loss"] for event in events if event.kind == "train"]


@pytest.fixture(scope="module")
def reference(tiny_run: Path) -> list[float]:
    """Losses of a single rank over the same global batches."""
    run_dir = new_run(tiny_run, "reference")
    cluster = ClusterConfig(launcher="local", accelerator="cpu")
    assert build_launcher(cluster, print).run(run_dir, num_workers=1) == "complete"
    return losses_of(run_dir)


def test_every_registered_launcher_is_run_here() -> None:
    assert set(WAYS) == set(LAUNCHERS)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_launch_gives_the_same_losses(
    way: str, tiny_run: Path, reference: list[float]
) -> None:
    run_dir = new_run(tiny_run, f"contract-{way}")
    assert WAYS[way](run_dir) == "complete"
    result = read_result(run_dir)
    assert (result.world_size, result.steps) == (2, 6)
    losses = losses_of(run_dir)
    assert len(losses) == 6
    assert losses == pytest.approx(reference, rel=1e-5)

"""Every launcher runs the same worker: equal losses, and verdicts instead of exit codes."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch import LAUNCHERS, build_launcher
from launch.environment import free_port
from launch.hostfile import find_deepspeed
from launch.run_dirs import init_run
from launch.stopping import StopRequest
from pipeline.config.cluster import ClusterConfig
from pipeline.config.load import load_run
from pipeline.data.prepare import prepare
from pipeline.data.ray_tasks import ray_session
from pipeline.errors import LaunchError
from pipeline.tracking.events import read_events
from pipeline.tracking.store import Verdict, read_result, read_verdict

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


def run_by_hand(run_dir: Path) -> Verdict | None:
    """The command that a dry run shows for this machine."""
    local = build_launcher(ClusterConfig(launcher="local"), StopRequest(print))
    command = local.command(run_dir, num_workers=2)
    subprocess.run(
        [find_deepspeed(), "--master_port", str(free_port()), *command[1:]],
        cwd=ROOT,
        check=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    return read_verdict(run_dir)


WAYS: dict[str, Callable[[Path], Verdict | None]] = {
    "local": run_local,
    "ray": run_ray,
    "hostfile": run_hostfile,
    "by hand": run_by_hand,
}


def new_run(tiny_run: Path, name: str) -> Path:
    return init_run(load_run(tiny_run, [f"name={name}"]), prepare)


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
    assert set(WAYS) == {*LAUNCHERS, "by hand"}


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_launch_gives_the_same_losses(
    way: str, tiny_run: Path, reference: list[float]
) -> None:
    run_dir = new_run(tiny_run, f"contract-{way.replace(' ', '-')}")
    assert WAYS[way](run_dir) == "complete"
    result = read_result(run_dir)
    assert (result.world_size, result.steps) == (2, 6)
    losses = losses_of(run_dir)
    assert len(losses) == 6
    assert losses == pytest.approx(reference, rel=1e-5)


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize("run", [run_local, run_ray])
def test_a_refusing_rank_gives_its_message_and_its_exit_code(
    run: Callable[[Path, int], Verdict | None], tiny_run: Path
) -> None:
    run_dir = new_run(tiny_run, f"refused-{run.__name__}")
    with pytest.raises(LaunchError, match=r"(?s)^rank \d of refused.*not a multiple") as caught:
        run(run_dir, 3)
    assert caught.value.exit_code == 2
    assert not (run_dir / ".ray-train").exists()
    assert read_verdict(run_dir) is None

"""Runs that several hosts share, and the runs on this machine alone that they must equal."""

from pathlib import Path

from launch.local import LocalLauncher
from launch.run_dirs import init_run
from launch.stopping import StopRequest
from pipeline.config.cluster import ClusterConfig
from pipeline.config.load import load_run
from pipeline.data.prepare import prepare
from pipeline.tracking.events import read_events, surviving_events

MODELS = {
    "gpt": "model={family: gpt, width: 16, depth: 1, heads: 2, max_positions: 64}",
    "lstm_attention": "model={family: lstm_attention, width: 16, depth: 1, heads: 2}",
}


def new_run(tiny_run: Path, name: str, family: str, stage: int, *more: str) -> Path:
    """Write a run directory below the session's directory, which every host sees."""
    overrides = [f"name={name}", MODELS[family], f"zero.stage={stage}", *more]
    return init_run(load_run(tiny_run, overrides), prepare)


def losses_of(run_dir: Path) -> dict[int, float]:
    """Give the loss of each step in the surviving lineage."""
    events = surviving_events(read_events(run_dir / "events.jsonl"))
    return {event.step: event.metrics["train/loss"] for event in events if event.kind == "train"}


def local_losses(
    tiny_run: Path, name: str, family: str, stage: int, *more: str
) -> dict[int, float]:
    """Give the losses of the same run on two ranks of this machine."""
    run_dir = new_run(tiny_run, name, family, stage, *more)
    launcher = LocalLauncher(ClusterConfig(accelerator="cpu"), StopRequest(print))
    assert launcher.run(run_dir, num_workers=2) == "complete"
    return losses_of(run_dir)

"""Runs that several hosts share, and the runs on this machine alone that they must equal."""

from pathlib import Path

import pytest

from launch.run_dirs import init_run
from pipeline.config.load import load_run
from pipeline.data.prepare import prepare
from pipeline.tracking.events import read_events, surviving_events
from pipeline.training.faults import ALLOW_VARIABLE, PLAN_VARIABLE
from tests.chaos.harness import History, history, plan_path, run_ranks

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
    assert run_ranks(run_dir) == "complete"
    return losses_of(run_dir)


def local_golden(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> History:
    """Give what a run does on two ranks of this machine, where nothing is lost.

    Args:
        run_dir: Its run directory.
        monkeypatch: Sets a fault plan without faults, under which ranks tell their samples.
    """
    plan_path(run_dir).write_text("[]")
    monkeypatch.setenv(PLAN_VARIABLE, str(plan_path(run_dir)))
    monkeypatch.setenv(ALLOW_VARIABLE, "1")
    assert run_ranks(run_dir) == "complete"
    return history(run_dir, [])

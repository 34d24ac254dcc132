"""Run directories that ranks train in, and what they hold afterwards."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.schema import RunConfig
from pipeline.errors import PipelineError
from pipeline.tracking.events import Event, read_events, surviving_events
from pipeline.training.checkpoint_files import list_checkpoints, verify_checkpoint
from pipeline.training.distributed import RankContext
from pipeline.training.train import train
from tests.training.cases import GLOBAL_BATCH_SAMPLES, SEQUENCE_TOKENS, small_run
from tests.training.cases import write_run as write_run_dir

NUM_STEPS = 12
HALF = 6


def train_rank(ranks: RankContext, run_dir: Path, stop_after_steps: int | None = None) -> Any:
    """Train in a group that exists already, as under Ray; give the result or our own error."""
    try:
        return train(run_dir, stop_after_steps)
    except PipelineError as exc:
        return exc


@dataclass(frozen=True)
class Runs:
    root: Path
    prepared_dir: Path

    def make(self, name: str, run: RunConfig) -> Path:
        return write_run_dir(self.root / name, self.prepared_dir, run)


def every_step(family: str, stage: int, **fields: Any) -> RunConfig:
    batch_tokens = GLOBAL_BATCH_SAMPLES * SEQUENCE_TOKENS
    train = {"total_tokens": NUM_STEPS * batch_tokens, "optimizer": {"learning_rate": 3e-3}}
    fields = {"eval": {"every_steps": 5}, "tracking": {"log_every_steps": 1}} | fields
    return small_run(family, stage, train=train, **fields)


def losses(run_dir: Path) -> dict[int, float]:
    return {e.step: e.values["train/loss"] for e in lineage(run_dir) if e.kind == "train"}


def lineage(run_dir: Path) -> list[Event]:
    return surviving_events(read_events(run_dir / "events.jsonl"))


def manifest_of(run_dir: Path) -> Any:
    return verify_checkpoint(list_checkpoints(run_dir)[0])

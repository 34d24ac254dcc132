"""A finished study on disk, written through the real writers, with numbers that a reader can check.

Losses fall as 6 - log10(step); the LSTM's lie GAP_NATS above. Its step time does not depend on the
sequence length, the Transformer's grows as its square root; one rank takes twice as long as two.
"""

import datetime
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import config_hash, dump_yaml
from pipeline.config.study import StudyConfig
from pipeline.data.shards import ShardManifest, load_manifest
from pipeline.study.cells import write_cell
from pipeline.study.estimate import state_bytes_formula
from pipeline.study.plan import StudyPlan, plan_study
from pipeline.study.planned import ProbeCell, TrainCell
from pipeline.study.timeline import Step, append_step
from pipeline.tracking.events import EventWriter
from pipeline.tracking.store import (
    NumParameters,
    ProbeResult,
    RankStateBytes,
    RunResult,
    measured,
    write_result,
)
from tests.training.cases import write_prepared

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
ENVIRONMENT = {"cpu_model": "a processor", "num_cores": 2, "packages": {"torch": "2.13.0"}}
GAP_NATS = 0.2
SEED_NATS = 0.1
NUM_STEPS = 40
LENGTHS = (32, 64, 128, 256)
REPEATS = 6
TREE: dict[str, Any] = {
    "name": "small",
    "cluster": {"num_workers": 2},
    "base": {
        "train": {
            "global_batch_tokens": 256,
            "sequence_tokens": 64,
            "micro_batch_samples": 2,
            "total_tokens": 256 * NUM_STEPS,
        },
    },
    "families": {
        "gpt": {"model": {"family": "gpt", "width": 32, "depth": 2}},
        "lstm_attention": {"model": {"family": "lstm_attention", "depth": 2}},
    },
    "match": {"reference": "gpt"},
    "probes": [
        {
            "probe": "step_time",
            "params": {
                "tokens_per_step": 512,
                "sequence_tokens": list(LENGTHS),
                "repeats": REPEATS,
                "warmup_steps": 1,
            },
        },
        {"probe": "model_state", "num_workers": [1, 2]},
    ],
}


@dataclass(frozen=True, kw_only=True)
class StudyOnDisk:
    """A finished study and what it was made from."""

    config: StudyConfig
    plan: StudyPlan
    manifest: ShardManifest

    @property
    def directory(self) -> Path:
        return self.plan.directory


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> ShardManifest:
    """Give prepared text of a few thousand tokens."""
    directory = tmp_path_factory.mktemp("data") / "prepared"
    return load_manifest(write_prepared(directory))


@pytest.fixture
def study_config(tmp_path: Path) -> StudyConfig:
    """Give a study that writes under `tmp_path`."""
    return StudyConfig.model_validate({**TREE, "output_dir": tmp_path})


@pytest.fixture
def write_study(study_config: StudyConfig, manifest: ShardManifest) -> Callable[..., StudyOnDisk]:
    """Give a function that writes the study's directory, without the cells named."""

    def write(
        *,
        without: tuple[str, ...] = (),
        gap_nats: float = GAP_NATS,
        seed_nats: float = SEED_NATS,
        seeds: tuple[int, ...] = (0,),
        timed_workers: tuple[int, ...] = (2,),
        fields: dict[str, Any] | None = None,
    ) -> StudyOnDisk:
        tree = {**study_config.model_dump(), "seeds": list(seeds), **(fields or {})}
        tree["probes"][0]["num_workers"] = list(timed_workers)
        config = StudyConfig.model_validate(tree)
        plan = plan_study(config)
        plan.directory.mkdir(parents=True, exist_ok=True)
        (plan.directory / "study.yaml").write_text(dump_yaml(config))
        for cell in plan.cells:
            run_dir = write_cell(plan, cell, manifest)
            if cell.name not in without:
                finish_cell(run_dir, cell, manifest, gap_nats, seed_nats)
            add_to_timeline(plan, cell, is_complete=cell.name not in without)
        return StudyOnDisk(config=config, plan=plan, manifest=manifest)

    return write


def finish_cell(
    run_dir: Path,
    cell: TrainCell | ProbeCell,
    manifest: ShardManifest,
    gap_nats: float,
    seed_nats: float = SEED_NATS,
) -> None:
    """Leave what the ranks of a cell would leave."""
    if isinstance(cell, TrainCell):
        # The gap differs by `seed_nats` from one seed to the next.
        gap = gap_nats + seed_nats * cell.run.seed if cell.label == "lstm_attention" else 0.0
        write_events(run_dir, cell, gap)
        write_result(run_dir, train_result(cell, manifest, gap))
    else:
        records = time_records(cell) if cell.probe == "step_time" else state_records(cell)
        write_result(run_dir, probe_result(cell, records))


def loss_at(step: int, gap: float) -> float:
    return 4.0 - math.log10(step) + gap


def write_events(run_dir: Path, cell: TrainCell, gap: float) -> None:
    with EventWriter(run_dir / "events.jsonl", attempt=1) as events:
        events.write("start", 0)
        for step in range(1, NUM_STEPS + 1):
            tokens = step * cell.run.train.global_batch_tokens
            progress = {"progress/tokens": tokens, "progress/seconds": 0.5 * step}
            events.write("train", step, {"train/loss": loss_at(step, gap), **progress})
            if step % 10 == 0:
                events.write("eval", step, {"eval/loss": loss_at(step, gap)})


def train_result(cell: TrainCell, manifest: ShardManifest, gap: float) -> RunResult:
    count = cell.run.model.num_parameters(manifest.vocab_size)
    length = cell.run.train.sequence_tokens
    return RunResult(
        run=cell.name,
        study="small",
        family=cell.run.model.family,
        config_hash=config_hash(cell.run),
        data_fingerprint=manifest.fingerprint,
        seed=cell.run.seed,
        world_size=2,
        zero_stage=cell.run.zero.stage,
        precision="fp32",
        num_parameters=NumParameters(total=count.total, non_embedding=count.non_embedding),
        flops_per_token=cell.run.model.flops_per_token(manifest.vocab_size, length),
        steps=NUM_STEPS,
        tokens=cell.run.train.total_tokens,
        metrics={
            "eval/loss": measured("eval/loss", loss_at(NUM_STEPS, gap)),
            "eval/bits_per_byte": measured("eval/bits_per_byte", 1.5 + gap),
            "perf/tokens_per_second": measured("perf/tokens_per_second", 512.0, 37, 20.0),
            "perf/step_seconds": measured("perf/step_seconds", 0.5, 37, 0.02),
            "memory/peak_bytes": measured("memory/peak_bytes", 400 * 2**20, 2),
        },
        per_position_loss=[
            5.0 + position_slope(cell) * math.log2(t) + gap for t in range(1, length + 1)
        ],
        model_state_bytes=[
            RankStateBytes(parameters=100, gradients=100, optimizer=200) for _ in range(2)
        ],
        goodput={"train_seconds": 20.0, "eval_seconds": 2.0, "wall_seconds": 25.0},
        attempts=1,
        environment=ENVIRONMENT,
        started=START,
        ended=START + datetime.timedelta(seconds=25),
    )


def position_slope(cell: TrainCell) -> float:
    """The LSTM's falls by 0.01 from one seed to the next."""
    return -0.1 - (0.01 * cell.run.seed if cell.label == "lstm_attention" else 0.0)


def time_records(cell: ProbeCell) -> list[dict[str, Any]]:
    seconds = 0.2 / cell.num_workers
    return [
        {
            "label": label,
            "sequence_tokens": length,
            "tokens_per_step": 512,
            "round": number,
            "step_seconds": seconds * (1 + 0.01 * number) * (length / 32) ** exponent,
            **({"warmup_seconds": 0.2} if number == 0 else {}),
        }
        for number in range(REPEATS)
        for label, exponent in (("gpt", 0.5), ("lstm_attention", 0.0))
        for length in LENGTHS
    ]


def state_records(cell: ProbeCell) -> list[dict[str, Any]]:
    records = []
    for label in cell.runs:
        for stage in range(4):
            formula = state_bytes_formula(1000, stage, cell.num_workers)
            measured_bytes = {
                "parameter_bytes": int(formula.parameters),
                "gradient_bytes": int(formula.gradients),
                "optimizer_bytes": int(formula.moments + formula.master_weights),
            }
            records += [
                {"label": label, "zero_stage": stage, "rank": rank, "num_parameters": 1000}
                | measured_bytes
                for rank in range(cell.num_workers)
            ]
    return records


def probe_result(cell: ProbeCell, records: list[dict[str, Any]]) -> ProbeResult:
    return ProbeResult(
        run=cell.name,
        study="small",
        probe=cell.probe,
        world_size=cell.num_workers,
        params=dict(cell.params),
        records=records,
        environment=ENVIRONMENT,
        started=START,
        ended=START + datetime.timedelta(seconds=10),
    )


def add_to_timeline(plan: StudyPlan, cell: TrainCell | ProbeCell, *, is_complete: bool) -> None:
    append_step(
        plan.directory,
        Step(
            phase="train" if isinstance(cell, TrainCell) else "probe",
            cell=cell.name,
            started_unix_seconds=START.timestamp(),
            seconds=30.0,
            outcome="complete" if is_complete else "failed",
            reason=None if is_complete else "rank 1 was killed",
        ),
    )

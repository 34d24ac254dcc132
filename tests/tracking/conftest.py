"""Study and run directories written by hand, as training and studies leave them."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.tracking.mlflow_client import connected, default_uri
from tests.tracking.mlflow_store import Store

START_UNIX_SECONDS = 1_760_000_000.0
FAMILIES = {"gpt": 0.0, "lstm_attention": 0.15}
ENVIRONMENT = {"python": "3.11.9", "git_commit": "0" * 40, "hostname": "box"}


@dataclass(kw_only=True)
class RunDirectory:
    """A run directory that can be written bit by bit."""

    path: Path
    family: str = "gpt"
    seed: int = 0
    study: str | None = None
    started: float = START_UNIX_SECONDS
    lines: list[dict[str, Any]] = field(default_factory=list)

    def write_config(self, **fields: Any) -> "RunDirectory":
        self.path.mkdir(parents=True, exist_ok=True)
        tree = {
            "name": self.path.name,
            "seed": self.seed,
            "output_dir": str(self.path.parent),
            "model": {"family": self.family, "width": 64},
            "train": {
                "global_batch_tokens": 4096,
                "sequence_tokens": 64,
                "micro_batch_samples": 8,
                "total_tokens": 819200,
            },
            **fields,
        }
        (self.path / "run.yaml").write_text(yaml.safe_dump(tree))
        (self.path / "environment.json").write_text(json.dumps(ENVIRONMENT))
        return self

    def add(self, kind: str, step: int, attempt: int = 1, **values: float) -> "RunDirectory":
        """Append an event; `train_loss=1` becomes the metric `train/loss`."""
        seq = len(self.lines)
        self.lines.append(
            {
                "seq": seq,
                "attempt": attempt,
                "kind": kind,
                "step": step,
                "time_unix_seconds": self.started + 0.25 * seq,
                "values": {name.replace("_", "/", 1): value for name, value in values.items()},
            }
        )
        with (self.path / "events.jsonl").open("a") as file:
            file.write(json.dumps(self.lines[-1]) + "\n")
        return self

    def add_steps(self, first: int, last: int, attempt: int = 1) -> "RunDirectory":
        """Append training events every 10 steps and an evaluation every 50."""
        for step in range(first, last + 1, 10):
            loss = self.loss(step)
            self.add(
                "train",
                step,
                attempt,
                train_loss=loss,
                train_grad_norm=0.5 + 1 / (1 + step),
                train_learning_rate=1e-3 * (1 - step / 250),
                perf_tokens_per_second=21000.0 + 500 * math.sin(step),
                perf_step_seconds=0.195,
                memory_resident_bytes=6e8,
                progress_tokens=4096.0 * step,
            )
            if step % 50 == 0:
                self.add("eval", step, attempt, eval_loss=loss + 0.05, eval_bits_per_byte=loss / 2)
        return self

    def loss(self, step: int) -> float:
        return 7.6 * (1 + step) ** -0.14 + FAMILIES[self.family] + 0.01 * self.seed

    def finish(self, steps: int = 200, attempts: int = 1) -> "RunDirectory":
        self.add("finish", steps, attempts)
        (self.path / "result.json").write_text(json.dumps(self.result(steps, attempts)))
        return self

    def result(self, steps: int = 200, attempts: int = 1) -> dict[str, Any]:
        loss = self.loss(steps) + 0.05
        return {
            "schema_version": 1,
            "run": self.path.name,
            "study": self.study,
            "family": self.family,
            "status": "complete",
            "config_hash": "c" * 64,
            "data_fingerprint": "d" * 64,
            "git_commit": ENVIRONMENT["git_commit"],
            "seed": self.seed,
            "world_size": 2,
            "zero_stage": 1,
            "precision": "fp32",
            "num_parameters": {"total": 330000, "non_embedding": 200000},
            "flops_per_token": 2.1e6,
            "steps": steps,
            "tokens": 4096 * steps,
            "metrics": {
                "eval/loss": {"value": loss, "num": 1, "unit": "nats/token"},
                "perf/tokens_per_second": {
                    "value": 21000.0,
                    "num": 20,
                    "spread": 300.0,
                    "unit": "tokens/s",
                },
                "memory/peak_bytes": {"value": 9e8, "num": 2, "spread": 1e6, "unit": "bytes"},
            },
            "per_position_loss": [loss + 1 / (1 + t) for t in range(64)],
            "model_state_bytes": [
                {"parameters": 1320000, "gradients": 1320000, "optimizer": 1980000}
            ]
            * 2,
            "goodput": {"step_seconds": 39.0},
            "attempts": attempts,
            "environment": ENVIRONMENT,
            "started": self.started,
            "ended": self.started + 60.0,
        }


@pytest.fixture
def store(tmp_path: Path, migrated_store: Path) -> Iterator[Store]:
    output_dir = tmp_path / "runs"
    output_dir.mkdir(exist_ok=True)
    shutil.copy(migrated_store, output_dir)
    with connected(default_uri(output_dir), print) as client:
        yield Store(client)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunDirectory]:
    """Make a run directory with a config directly under `tmp_path / "runs"`."""

    def make(name: str = "alone", **fields: Any) -> RunDirectory:
        return RunDirectory(path=tmp_path / "runs" / name).write_config(**fields)

    return make


@pytest.fixture
def make_study(tmp_path: Path) -> Callable[[], Path]:
    """Make a complete study of two families and two seeds with one probe cell."""
    return lambda: write_study(tmp_path / "runs" / "tiny")


def write_study(study_dir: Path) -> Path:
    study_dir.mkdir(parents=True)
    base = {"train": {"sequence_tokens": 64}, "zero": {"stage": 1}}
    families = {label: {"model": {"family": label}} for label in FAMILIES}
    tree = {
        "name": study_dir.name,
        "output_dir": str(study_dir.parent),
        "base": base,
        "families": families,
        "seeds": [0, 1],
    }
    (study_dir / "study.yaml").write_text(yaml.safe_dump(tree))
    prepared_dir = write_manifest(study_dir.parent / "data" / "small")
    for number, (label, seed) in enumerate([(f, s) for f in FAMILIES for s in (0, 1)]):
        run = RunDirectory(
            path=study_dir / "runs" / f"{label}-seed{seed}",
            family=label,
            seed=seed,
            study=study_dir.name,
            started=START_UNIX_SECONDS + 70 * number,
        )
        run.write_config(data={"prepared_dir": str(prepared_dir)})
        run.add("start", 0).add_steps(10, 200).finish()
    _write_probe(study_dir / "runs" / "step_time-2ranks", study_dir.name)
    (study_dir / "report.html").write_text("<html><body><h1>Report</h1></body></html>")
    (study_dir / "report.md").write_text("# Report\n")
    (study_dir / "result.json").write_text(json.dumps(_study_result(study_dir.name)))
    return study_dir


def write_manifest(prepared_dir: Path) -> Path:
    prepared_dir.mkdir(parents=True)
    split = {"tokens": 1000, "documents": 10, "shards": []}
    manifest = {"fingerprint": "f" * 64, "vocab_size": 2048, "splits": {"train": split}}
    (prepared_dir / "manifest.json").write_text(json.dumps(manifest))
    return prepared_dir


def _write_probe(path: Path, study: str) -> None:
    path.mkdir()
    (path / "probe.yaml").write_text("probe: step_time\n")
    records = [
        {"family": label, "sequence_tokens": tokens, "step_seconds": [0.1, 0.11]}
        for label in FAMILIES
        for tokens in (64, 128, 256)
    ]
    result = {
        "schema_version": 1,
        "run": path.name,
        "study": study,
        "probe": "step_time",
        "status": "complete",
        "world_size": 2,
        "params": {"sequence_tokens": [64, 128, 256]},
        "records": records,
        "environment": ENVIRONMENT,
        "started": START_UNIX_SECONDS + 300,
        "ended": START_UNIX_SECONDS + 330,
    }
    (path / "result.json").write_text(json.dumps(result))


def _study_result(name: str) -> dict[str, Any]:
    summaries = {
        label: [
            {"metric": metric, "step": tokens, "value": scale * tokens ** (0.5 + offset)}
            for metric, scale in (
                ("scaling/step_seconds", 0.01),
                ("scaling/tokens_per_second", 1e4),
            )
            for tokens in (64, 128, 256, 512)
        ]
        + [{"metric": "scaling/loss", "step": 200_000, "value": 3.6 + offset}]
        for label, offset in FAMILIES.items()
    }
    return {
        "study": name,
        "status": "complete",
        "headline": ["gpt reaches a lower loss than lstm_attention.", "It is also faster."],
        "summaries": summaries,
    }

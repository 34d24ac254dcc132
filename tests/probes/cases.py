"""Tiny models of every arm, and the directories that probes of trained models read."""

from pathlib import Path
from typing import Any

import torch

from pipeline.config.load import dump_yaml
from pipeline.config.schema import RunConfig
from pipeline.models import build_model
from pipeline.models.base import LanguageModel
from pipeline.probes.context import ProbeContext
from pipeline.probes.execute import find_probe
from pipeline.probes.params import check_probe
from pipeline.training.distributed import RankContext
from tests.inference.cases import rewrite_manifest, spread_logits, write_checkpoint
from tests.training.cases import VOCAB_SIZE

SIZE: dict[str, Any] = {"width": 16, "heads": 2, "max_positions": 64}
GPT: dict[str, Any] = {"family": "gpt", "depth": 2, **SIZE}
LSTM: dict[str, Any] = {"family": "lstm_attention", "depth": 2, **SIZE}
VANILLA: dict[str, Any] = {
    **LSTM, "depth": 1, "backbone": "vanilla", "feed_forward": False, "attention": "none",
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "gpt": GPT,
    "gpt_learned": {**GPT, "positions": "learned", "norm": "layernorm", "kv_heads": 1},
    "lstm": {**LSTM, "attention": "none"},
    "lstm_attention": LSTM,
    "lstm_dot": {**LSTM, "attention": "dot"},
    "lstm_additive": {**LSTM, "attention": "additive"},
    "lstm_chrono": {**LSTM, "forget_bias": "chrono"},
    "input_feeding": {**LSTM, "input_feeding": True, "attention": "dot"},
    "min_lstm": {**LSTM, "cell": "min_lstm"},
    "gru": {**LSTM, "cell": "gru", "attention": "none"},
    "elman": {**VANILLA, "cell": "elman", "init_std": 0.1},
}
"""The two families and the control arms of the study."""


def make_run(model: dict[str, Any], prepared_dir: Path | None = None, seed: int = 0) -> RunConfig:
    train = {
        "sequence_tokens": 16, "micro_batch_samples": 2, "global_batch_tokens": 32,
        "total_tokens": 64,
    }  # fmt: skip
    data = {"prepared_dir": prepared_dir}
    fields = {"name": "made", "seed": seed, "model": model, "train": train, "data": data}
    return RunConfig.model_validate(fields)


def make_model(fields: dict[str, Any], seed: int = 0) -> LanguageModel:
    """A model whose tokens differ in likelihood, as after training."""
    model = build_model(make_run(fields).model, VOCAB_SIZE, seed)
    if not isinstance(model.final_norm, torch.nn.Identity):
        spread_logits(model)
    return model.eval()


def write_trained(run_dir: Path, prepared_dir: Path, fields: dict[str, Any]) -> LanguageModel:
    """Write a run with one checkpoint, and give the model that it holds."""
    run_dir.mkdir(parents=True)
    run = make_run(fields, prepared_dir)
    (run_dir / "run.yaml").write_text(dump_yaml(run))
    model = make_model(fields, seed=7)
    rewrite_manifest(write_checkpoint(run_dir, run, model, 3), data_fingerprint="f" * 16)
    return model


def measure(
    probe: str, params: dict[str, Any], runs: dict[str, RunConfig], run_dir: Path = Path("none")
) -> list[dict[str, Any]]:
    """Check the arguments as a study does, and run the probe on one rank."""
    check_probe(probe, params, runs, 1)
    ranks = RankContext(
        rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu")
    )
    context = ProbeContext(
        ranks=ranks, run_dir=run_dir, params=params, on_event=lambda line: None
    )  # fmt: skip
    return find_probe(probe)(runs, context)


def measure_text(
    probe: str,
    params: dict[str, Any],
    models: dict[str, dict[str, Any]],
    prepared_dir: Path,
    root: Path,
) -> tuple[list[dict[str, Any]], dict[str, LanguageModel]]:
    """Write a trained run of each model, measure it, and give the records and the models."""
    made = {
        label: write_trained(root / f"{label}-seed0", prepared_dir, fields)
        for label, fields in models.items()
    }
    runs = {label: make_run(fields, prepared_dir) for label, fields in models.items()}
    params = {**params, "trained": {label: [f"{label}-seed0"] for label in models}}
    return measure(probe, params, runs, root / "probe"), made

"""Evidence that passes every gate, from which a test breaks one thing at a time."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.config.claims import ClaimsConfig, HypothesisConfig, load_claims
from pipeline.study.effect import Effect
from pipeline.study.evidence import (
    Evidence,
    Measurement,
    ModelFacts,
    RunFacts,
    TimingFacts,
    TrainingFacts,
)
from pipeline.study.significance import SeedDeviation

CLAIMS_FILE = Path(__file__).resolve().parents[2] / "configs" / "study" / "claims.yaml"
SIZES = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
NUM_SEEDS = 5

TRAINING = TrainingFacts(
    tokens=10_000_000,
    steps=20_000,
    epochs=0.5,
    dropout=0.0,
    sequence_tokens=1024,
    scored_tokens=1024,
    bytes_per_token=4.0,
    carries_state=False,
    is_schedule_finished=True,
    learning_rate=3e-3,
    learning_rates_tried=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    num_trials=12,
    num_regularisation_trials=6,
)
TIMING = TimingFacts(
    rounds=10,
    is_interleaved=True,
    warmup_steps=3,
    is_synchronised=True,
    load_per_core=0.1,
    cpu_seconds=12.0,
    recurrence="fused",
    is_own_best_batch=True,
    is_compiled=False,
    has_activation_checkpointing=False,
    uses_cache=True,
    sequence_lengths=(64, 256, 1024, 4096),
)


@cache
def claims() -> ClaimsConfig:
    return load_claims(CLAIMS_FILE)


def hypothesis_of(statistic: str) -> HypothesisConfig:
    return next(h for _, h in claims().walk() if h.statistic == statistic)


def runs_of(hypothesis: HypothesisConfig) -> list[RunFacts]:
    """Give the runs of every arm at five sizes under five seeds, all in order."""
    file = claims()
    bounds: dict[str, Any] = {g.gate: g.one_of for g in file.gates_of(hypothesis) if g.one_of}
    return [
        RunFacts(
            run=f"{hypothesis.statistic}-{arm}-{size}-seed{seed}",
            arm=arm,
            cell=f"{arm}-{size}",
            seed=seed,
            match_group=f"rung-{size}",
            hardware=bounds.get("hardware", ["accelerator"])[0],
            code_version="0123abcd",
            data_fingerprint="feed",
            model=ModelFacts(
                cell=file.arms[arm].cell,
                attention=file.arms[arm].attention,
                total_parameters=size,
                non_embedding_parameters=size - 1000,
                mask=bounds.get("mask", ["causal"])[0],
                forget_bias=1.0,
                is_causality_proven=None if bounds.get("mask") == ["bidirectional"] else True,
            ),
            training=TRAINING,
            timing=TIMING,
        )
        for arm in hypothesis.arms
        for size in SIZES
        for seed in range(NUM_SEEDS)
    ]


def measure(statistic: str, effect: Effect, runs: list[RunFacts]) -> Measurement:
    return Measurement(
        statistic=statistic,
        effect=effect,
        runs=tuple(run.run for run in runs),
        seed_deviation=SeedDeviation(value=0.02, degrees=40),
        num_documents=500,
        held_out_error=0.01,
        is_extrapolated=False,
        is_floor_shared=True,
        floors={"unigram": 3.3, "ngram": 2.4},
    )


def sharp(value: float) -> Effect:
    """An effect with a small error from many units."""
    return Effect(value=value, standard_error=0.001, degrees=20, num=21)


def true_value(hypothesis: HypothesisConfig) -> float:
    """A value well inside what the hypothesis says."""
    step = {"greater": 0.3, "less": -0.3, "different": 0.3, "equivalent": 0.0}
    return hypothesis.threshold + step[hypothesis.direction]


def evidence_for(values: dict[str, Effect]) -> Evidence:
    """Give sound evidence of these statistics."""
    measurements, runs = [], {}
    for statistic, effect in values.items():
        own = runs_of(hypothesis_of(statistic))
        measurements.append(measure(statistic, effect, own))
        runs |= {run.run: run for run in own}
    return Evidence(measurements=measurements, runs=runs)


def with_runs(evidence: Evidence, change: Callable[[RunFacts], RunFacts]) -> Evidence:
    """Change the facts of every run."""
    return replace(evidence, runs={name: change(run) for name, run in evidence.runs.items()})

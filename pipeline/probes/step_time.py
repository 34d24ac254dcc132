"""How long an optimizer step takes as the sequence grows while the tokens of a step stay the same.

All arms (family x sequence length) live in one rank group and take turns. Each round visits every
arm once, in an order that the next round reverses (A B ... B A), so that a drift of the machine
falls on all arms alike. A timed step is a complete one: forward, backward, gradient reduction and
update, on tokens of the prepared text. Left out are building, warm-up steps, and reading.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.batching import BatchPlan
from pipeline.config.schema import RunConfig
from pipeline.data.loader import TokenLoader
from pipeline.probes.context import ProbeContext
from pipeline.probes.params import StepTimeParams, plan_arms
from pipeline.tracking.store import PROBE_FILE
from pipeline.training.device import synchronize
from pipeline.training.distributed import RankContext, barrier
from pipeline.training.engine import Engine, build_engine
from pipeline.training.train import build_run_model, load_prepared


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One family at one sequence length."""

    label: str
    plan: BatchPlan
    engine: Engine
    loader: TokenLoader
    learning_rate: float


def run(runs: Mapping[str, RunConfig], context: ProbeContext) -> list[dict[str, Any]]:
    """Time the steps of all arms.

    Args:
        runs: Label of a family to its run; precision and ZeRO stage are the run's.
        context: Rank group and arguments.

    Returns:
        One record for each arm and round: `label`, `sequence_tokens`, `tokens_per_step`, `round`,
        `step_seconds` (slowest rank), and per arm `warmup_seconds` in the record of round 0.

    Raises:
        ConfigError: A length does not divide the tokens of a step, or exceeds the positions.
    """
    params = context.parse_params(StepTimeParams)
    plans = plan_arms(params, runs, context.ranks.world_size)
    arms = [arm for label, run in runs.items() for arm in _build_arms(label, run, plans, context)]
    records = []
    warmup_seconds = {}
    for arm in arms:
        context.on_event(f"warm up {arm.label} at {arm.plan.sequence_tokens} tokens")
        steps = [_time_step(arm, context.ranks) for _ in range(params.warmup_steps)]
        warmup_seconds[id(arm)] = sum(steps)
    for round_index in range(params.repeats):
        context.on_event(f"round {round_index + 1} of {params.repeats}")
        for arm in arms if round_index % 2 == 0 else reversed(arms):
            record = {
                "label": arm.label,
                "sequence_tokens": arm.plan.sequence_tokens,
                "tokens_per_step": params.tokens_per_step,
                "round": round_index,
                "step_seconds": _time_step(arm, context.ranks),
            }
            if round_index == 0:
                record["warmup_seconds"] = warmup_seconds[id(arm)]
            records.append(record)
    return records


def _build_arms(
    label: str, run: RunConfig, plans: list[BatchPlan], context: ProbeContext
) -> list[Arm]:
    """Build one engine for all lengths of a family: weights and state do not depend on them."""
    context.on_event(f"build {label}")
    manifest = load_prepared(run, context.run_dir / PROBE_FILE)
    model = build_run_model(run, manifest)
    engine = build_engine(model, run, plans[0], context.ranks)
    return [
        Arm(
            label=label,
            plan=plan,
            engine=engine,
            loader=TokenLoader(manifest, run.data.mixture, plan, context.ranks.rank, run.seed),
            learning_rate=run.train.optimizer.learning_rate,
        )
        for plan in plans
    ]


def _time_step(arm: Arm, ranks: RankContext) -> float:
    """Take one step, timed from the moment all ranks are ready until the last one has finished."""
    batches = arm.loader.next_step()
    synchronize(ranks.device)
    barrier(ranks)
    started = time.perf_counter()
    arm.engine.train_step(batches, arm.learning_rate)
    synchronize(ranks.device)
    barrier(ranks)
    return time.perf_counter() - started

"""How long an optimizer step takes as the sequence grows while the tokens of a step stay the same.

All arms (family x sequence length x threads) live in one rank group and take turns. Each round
visits every arm once, in an order that the next round reverses (A B ... B A), so that a drift of
the machine falls on all arms alike. A timed step is a complete one: forward, backward, gradient
reduction and update, on tokens of the prepared text. Left out are building, warm-up steps, and
reading. Beside the time by the clock stands the processor time, which other programs disturb less.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from pipeline.config.batching import BatchPlan
from pipeline.config.schema import RunConfig
from pipeline.data.loader import TokenLoader
from pipeline.probes.context import ProbeContext
from pipeline.probes.params import StepTimeParams, plan_arms
from pipeline.probes.settings import choose_runs
from pipeline.tracking.store import PROBE_FILE
from pipeline.training.device import synchronize
from pipeline.training.distributed import RankContext, barrier, sum_over_ranks
from pipeline.training.engine import Engine, build_engine
from pipeline.training.train import build_run_model, load_prepared


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One family at one sequence length, on a number of threads."""

    label: str
    plan: BatchPlan
    engine: Engine
    loader: TokenLoader
    learning_rate: float
    threads: int
    """Threads of each rank."""
    flops_per_token: float
    """By the closed form, so that arms of one length can be compared."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """What one step took."""

    wall_seconds: float
    """From the moment all ranks are ready until the last one has finished."""
    cpu_seconds: float
    """Processor time of all ranks together."""


def run(runs: Mapping[str, RunConfig], context: ProbeContext) -> list[dict[str, Any]]:
    """Time the steps of all arms.

    Args:
        runs: Label of a family to its run; precision and ZeRO stage are the run's.
        context: Rank group and arguments.

    Returns:
        One record for each arm and round: `label`, `sequence_tokens`, `tokens_per_step`, `threads`,
        `flops_per_token`, `round`, `step_seconds` (slowest rank), `cpu_seconds` (all ranks),
        `load_average` of the last minute on rank 0's host, and per arm `warmup_seconds` in the
        record of round 0.

    Raises:
        ConfigError: A length does not divide the tokens of a step, or exceeds the positions.
    """
    params = context.parse_params(StepTimeParams)
    runs = choose_runs(params, runs)
    plans = plan_arms(params, runs, context.ranks.world_size)
    threads = torch.get_num_threads()
    try:
        return _time_arms(_build_arms(runs, plans, params, context), params, context)
    finally:
        torch.set_num_threads(threads)


def _time_arms(
    arms: list[Arm], params: StepTimeParams, context: ProbeContext
) -> list[dict[str, Any]]:
    records = []
    warmup_seconds = {}
    for arm in arms:
        context.on_event(f"warm up {arm.label} at {arm.plan.sequence_tokens} tokens")
        steps = [_time_step(arm, context.ranks) for _ in range(params.warmup_steps)]
        warmup_seconds[id(arm)] = sum(step.wall_seconds for step in steps)
    for round_index in range(params.repeats):
        context.on_event(f"round {round_index + 1} of {params.repeats}")
        for arm in arms if round_index % 2 == 0 else reversed(arms):
            taken = _time_step(arm, context.ranks)
            record = {
                "label": arm.label,
                "sequence_tokens": arm.plan.sequence_tokens,
                "tokens_per_step": params.tokens_per_step,
                "threads": arm.threads,
                "flops_per_token": arm.flops_per_token,
                "round": round_index,
                "step_seconds": taken.wall_seconds,
                "cpu_seconds": taken.cpu_seconds,
                "load_average": psutil.getloadavg()[0],
            }
            if round_index == 0:
                record["warmup_seconds"] = warmup_seconds[id(arm)]
            records.append(record)
    return records


def _build_arms(
    runs: Mapping[str, RunConfig],
    plans: list[BatchPlan],
    params: StepTimeParams,
    context: ProbeContext,
) -> list[Arm]:
    """Build one engine for all lengths and threads of a family: its state depends on neither."""
    arms = []
    for label, run in runs.items():
        context.on_event(f"build {label}")
        manifest = load_prepared(run, context.run_dir / PROBE_FILE)
        rows = run.model.resolved_vocab_size(manifest.vocab_size)
        engine = build_engine(build_run_model(run, manifest), run, plans[0], context.ranks)
        arms += [
            Arm(
                label=label,
                plan=plan,
                engine=engine,
                loader=TokenLoader(manifest, run.data.mixture, plan, context.ranks.rank, run.seed),
                learning_rate=run.train.optimizer.learning_rate,
                threads=threads,
                flops_per_token=run.model.flops_per_token(rows, plan.sequence_tokens),
            )
            for plan in plans
            for threads in params.threads or [torch.get_num_threads()]
        ]
    return arms


def _time_step(arm: Arm, ranks: RankContext) -> StepTime:
    """Take one step, timed from the moment all ranks are ready until the last one has finished."""
    torch.set_num_threads(arm.threads)
    batches = arm.loader.next_step()
    synchronize(ranks.device)
    barrier(ranks)
    wall, cpu = time.perf_counter(), time.process_time()
    arm.engine.train_step(batches, arm.learning_rate)
    synchronize(ranks.device)
    cpu = time.process_time() - cpu
    barrier(ranks)
    wall = time.perf_counter() - wall
    return StepTime(wall_seconds=wall, cpu_seconds=float(sum_over_ranks([cpu], ranks)[0]))

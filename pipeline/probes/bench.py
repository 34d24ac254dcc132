"""From one run to where the time of its steps goes, and how near the machine's own speed it comes.

In order: the steps of the run's engine, timed one by one; the same steps once more under torch's
profiler, untimed, for the collectives in them; products of two matrices, for the peak; and, where
the torch engine can do the same, its steps in turn with DeepSpeed's.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.config.batching import plan_batches
from pipeline.config.schema import RunConfig
from pipeline.data.loader import TokenLoader
from pipeline.data.shards import ShardManifest
from pipeline.probes.context import ProbeContext
from pipeline.probes.params import BenchParams, at_stage
from pipeline.tracking.store import PROBE_FILE
from pipeline.training.device import peak_flops, peak_memory, reset_peak_memory, synchronize
from pipeline.training.distributed import RankContext, barrier, gather_json
from pipeline.training.engine import Engine, StepOutcome, build_engine
from pipeline.training.meters import WARMUP_STEPS, median_and_spread
from pipeline.training.train import build_run_model, load_prepared

PROFILED_STEPS = 3
PRODUCT_WIDTH = 1024
"""Rows and columns of the matrices that are multiplied for a CPU's peak; the fastest of
`PRODUCTS` counts."""
PRODUCTS = 10
PRODUCTS_SECONDS = 2.0
"""When no further product is begun: without instructions for bf16 one takes seconds on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Stepper:
    """An engine with data of its own."""

    engine: Engine
    loader: TokenLoader
    learning_rate: float
    ranks: RankContext

    def step(self) -> tuple[float, StepOutcome]:
        """Take one step; its seconds, from when all ranks are ready until all have finished."""
        batches = self.loader.next_step()
        synchronize(self.ranks.device)
        barrier(self.ranks)
        begin = time.perf_counter()
        outcome = self.engine.train_step(batches, self.learning_rate)
        synchronize(self.ranks.device)
        barrier(self.ranks)
        return time.perf_counter() - begin, outcome


def run(runs: Mapping[str, RunConfig], context: ProbeContext) -> list[dict[str, Any]]:
    """Measure each run.

    Args:
        runs: Label to run.
        context: Rank group and arguments.

    Returns:
        Records of `label`, `name`, `value`, `num` measurements, their interquartile range `spread`
        and `unit`; what cannot be measured here has no record.

    Raises:
        ConfigError: Batches do not divide over the ranks.
    """
    params = context.parse_params(BenchParams)
    records = []
    for label, config in runs.items():
        manifest = load_prepared(config, context.run_dir / PROBE_FILE)
        measured = _measure(config, manifest, params, context)
        records += [{"label": label, **record} for record in measured]
    return records


def _measure(
    config: RunConfig, manifest: ShardManifest, params: BenchParams, context: ProbeContext
) -> list[dict[str, Any]]:
    ranks, say = context.ranks, context.on_event
    reset_peak_memory(ranks.device)
    say("build the engine and warm up")
    stepper = _build(config, manifest, ranks, "deepspeed")
    _warm_up(stepper)
    say(f"time {params.steps} steps")
    taken = [stepper.step() for _ in range(params.steps)]
    memory = gather_json(peak_memory(ranks.device), ranks)
    seconds = [step_seconds for step_seconds, _ in taken]
    records = _timings(taken, ranks)
    say("trace the collectives")
    records += _communication(stepper)
    vocab_size = config.model.resolved_vocab_size(manifest.vocab_size)
    flops = config.model.flops_per_token(vocab_size, config.train.sequence_tokens)
    tokens = config.train.global_batch_tokens
    rates = [tokens / step_seconds for step_seconds in seconds]
    flop_rates = [rate * flops for rate in rates]
    records.append(_record("tokens_per_second", rates, "tokens/s"))
    records.append(_record("flops_per_second", flop_rates, "FLOP/s"))
    peak = _peak(config, ranks)
    if peak is not None:
        records.append(_record("peak_flops_per_second", [peak], "FLOP/s"))
        records.append(_record("peak_fraction", [rate / peak for rate in flop_rates], "1"))
    if all("memory/peak_bytes" in rank for rank in memory):
        largest = max(rank["memory/peak_bytes"] for rank in memory)
        records.append(_record("peak_memory_bytes", [largest], "bytes"))
    if config.precision == "fp32":
        say("compare with bare PyTorch")
        records += _share(stepper, config, manifest, params)
    return records


def _build(config: RunConfig, manifest: ShardManifest, ranks: RankContext, engine: str) -> Stepper:
    plan = plan_batches(config.train, ranks.world_size)
    return Stepper(
        engine=build_engine(build_run_model(config, manifest), config, plan, ranks, engine),
        loader=TokenLoader(manifest, config.data.mixture, plan, ranks.rank, config.seed),
        learning_rate=config.train.optimizer.learning_rate,
        ranks=ranks,
    )


def _warm_up(stepper: Stepper) -> None:
    for _ in range(WARMUP_STEPS):
        stepper.step()


def _record(name: str, values: Sequence[float], unit: str) -> dict[str, Any]:
    spread = median_and_spread(values)
    return {
        "name": name, "value": spread.value, "num": spread.num, "spread": spread.spread,
        "unit": unit,
    }  # fmt: skip


def _timings(taken: list[tuple[float, StepOutcome]], ranks: RankContext) -> list[dict[str, Any]]:
    """Give the seconds of a step and of its parts, the parts as means over the ranks."""
    parts = ("forward", "backward", "optimizer")
    records = [_record("step_seconds", [seconds for seconds, _ in taken], "s")]
    for part in parts:
        mine = [getattr(outcome, f"{part}_seconds") for _, outcome in taken]
        by_rank = gather_json(mine, ranks)
        means = [sum(of_step) / len(of_step) for of_step in zip(*by_rank, strict=True)]
        records.append(_record(f"{part}_seconds", means, "s"))
    return records


def _communication(stepper: Stepper) -> list[dict[str, Any]]:
    """Give the seconds of a step in which a collective runs, waiting for other ranks included.

    They are part of forward, backward and optimizer, and on a GPU run beside them.
    """
    ranks = stepper.ranks
    activities = [ProfilerActivity.CPU]
    if ranks.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    mine = []
    # The first trace of a process starts slowly.
    for _ in range(PROFILED_STEPS + 1):
        with profile(activities=activities) as trace:
            stepper.step()
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in trace.events() or []
            if event.name.startswith(("gloo:", "ncclDevKernel"))
        ]
        mine.append(covered(spans) / 1e6)
    by_rank = gather_json(mine[1:], ranks)
    means = [sum(of_step) / len(of_step) for of_step in zip(*by_rank, strict=True)]
    return [_record("communication_seconds", means, "s")]


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Give the length that spans cover, where several overlap counted once."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _peak(config: RunConfig, ranks: RankContext) -> float | None:
    """Give the FLOPs per second that all ranks together could do, or None where it is not known.

    A GPU's is that of its data sheet; a CPU's is measured on all ranks at a time, in the run's
    number format and with a rank's threads.
    """
    if ranks.device.type == "cuda":
        known = peak_flops(ranks.device, config.precision)
        return None if known is None else known * ranks.world_size
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    a = torch.randn(PRODUCT_WIDTH, PRODUCT_WIDTH).to(dtype)
    barrier(ranks)
    taken = [_seconds_of(lambda: a @ a)]
    while len(taken) < PRODUCTS and sum(taken) < PRODUCTS_SECONDS:
        taken.append(_seconds_of(lambda: a @ a))
    fastest = min(taken)
    rates = gather_json(2 * PRODUCT_WIDTH**3 / fastest, ranks)
    return float(sum(rates))


def _seconds_of(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def _share(
    stepper: Stepper, config: RunConfig, manifest: ShardManifest, params: BenchParams
) -> list[dict[str, Any]]:
    """Time both engines in turn, each round in the other order.

    Returns:
        Bare PyTorch's step, and by how much of it DeepSpeed's is longer.
    """
    bare = _build(at_stage(config, 0), manifest, stepper.ranks, "torch")
    _warm_up(bare)
    bare_seconds, shares = [], []
    for number in range(params.steps):
        pair = [bare, stepper] if number % 2 == 0 else [stepper, bare]
        seconds = {id(arm): arm.step()[0] for arm in pair}
        bare_seconds.append(seconds[id(bare)])
        shares.append(seconds[id(stepper)] / seconds[id(bare)] - 1.0)
    return [
        _record("torch_step_seconds", bare_seconds, "s"),
        _record("deepspeed_share_fraction", shares, "1"),
    ]

"""Times a step of the training loop beside a bare DeepSpeed loop, and bare PyTorch beside both.

    python -m tests.bench.loop_overhead RUN.yaml --rounds 30 > loop.json

RUN is a config in fp32 whose text is prepared. All arms train the same model with the same AdamW,
clipping and schedule of batches, each on an engine of its own, one step a round. The bare loops
read their batches through the same loader, and log nothing; ours agrees on stopping, meters and
logs as in a run. A step of ours that logs (one in `tracking.log_every_steps`) is timed like others.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import deepspeed
import torch

from pipeline.config.batching import BatchPlan, plan_batches
from pipeline.config.load import load_run
from pipeline.config.schema import RunConfig
from pipeline.data.loader import TokenBatch, TokenLoader
from pipeline.data.shards import ShardManifest, ShardSet
from pipeline.training.checkpoint import Checkpointer, TrainState
from pipeline.training.deepspeed_engine import deepspeed_config
from pipeline.training.distributed import RankContext, start_distributed, stop_distributed
from pipeline.training.engine import build_engine, build_optimizer
from pipeline.training.evaluation import build_evaluator
from pipeline.training.journal import Journal
from pipeline.training.loop import take_step
from pipeline.training.meters import StepMeter, WallClock
from pipeline.training.profiling import StepProfiler
from pipeline.training.session import Training
from pipeline.training.stopping import StopWatch
from pipeline.training.train import build_run_model, load_prepared
from tests.bench.interleaved import ratios, summarise, time_rounds
from tests.bench.timing import cpu_model


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    run = load_run(options.run, options.overrides)
    manifest = load_prepared(run, options.run)
    ranks = start_distributed("cpu")
    torch.set_num_threads(options.threads)
    try:
        with TemporaryDirectory() as directory:
            arms = build_arms(run, manifest, ranks, Path(directory))
            seconds, cpu_seconds = time_rounds(arms, options.rounds, warmup_rounds=4)
    finally:
        stop_distributed(ranks)
    report = {
        "cpu": cpu_model(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "threads": options.threads,
        "world_size": ranks.world_size,
        "zero_stage": run.zero.stage,
        "tokens_per_step": run.train.global_batch_tokens,
        "seconds": {name: summarise(values) for name, values in seconds.items()},
        "cpu_seconds": {name: summarise(values) for name, values in cpu_seconds.items()},
        "loop_over_bare_deepspeed": ratios(seconds, "loop", "deepspeed"),
        "loop_over_bare_deepspeed_in_cpu_time": ratios(cpu_seconds, "loop", "deepspeed"),
        "bare_deepspeed_over_torch": ratios(seconds, "deepspeed", "torch"),
        "bare_deepspeed_over_torch_in_cpu_time": ratios(cpu_seconds, "deepspeed", "torch"),
    }
    print(json.dumps(report, indent=2))


def build_arms(
    run: RunConfig, manifest: ShardManifest, ranks: RankContext, directory: Path
) -> dict[str, Callable[[], object]]:
    """Build one engine and one loader an arm."""
    plan = plan_batches(run.train, ranks.world_size)

    def make_loader() -> TokenLoader:
        return TokenLoader(manifest, run.data.mixture, plan, ranks.rank, run.seed)

    return {
        "loop": our_loop(run, manifest, plan, ranks, make_loader(), directory),
        "deepspeed": bare_deepspeed(run, manifest, plan, ranks, make_loader()),
        "torch": bare_torch(run, manifest, make_loader()),
    }


def our_loop(
    run: RunConfig,
    manifest: ShardManifest,
    plan: BatchPlan,
    ranks: RankContext,
    loader: TokenLoader,
    directory: Path,
) -> Callable[[], object]:
    """Give a step of the training loop, logging included."""
    model = build_run_model(run, manifest)
    flops_per_token = run.model.flops_per_token(manifest.vocab_size, run.train.sequence_tokens)
    checkpointer = Checkpointer(directory, run, manifest.fingerprint, model, ranks)
    training = Training(
        run=run, ranks=ranks, engine=build_engine(model, run, plan, ranks), loader=loader,
        evaluator=build_evaluator(run, ShardSet(manifest, "validation"), ranks),
        checkpointer=checkpointer, journal=Journal(directory, run, ranks),
        meter=StepMeter(ranks.world_size, flops_per_token, None), clock=WallClock(),
        profiler=StepProfiler(directory, None, ranks), flops_per_token=flops_per_token,
    )  # fmt: skip
    stop = StopWatch(directory, ranks.rank, None)
    state = TrainState()

    def step() -> None:
        nonlocal state
        state, _ = take_step(training, state, stop)

    return step


def bare_deepspeed(
    run: RunConfig,
    manifest: ShardManifest,
    plan: BatchPlan,
    ranks: RankContext,
    loader: TokenLoader,
) -> Callable[[], object]:
    """Give a step as DeepSpeed's own tutorial writes it: forward, backward, step."""
    model = build_run_model(run, manifest)
    num_parameters = sum(p.numel() for p in model.parameters())
    optimizer = build_optimizer(model, run.train.optimizer, fused=False)
    config = deepspeed_config(run, plan, num_parameters, ranks.device)
    engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    for group in engine.optimizer.param_groups:
        group["lr"] = run.train.optimizer.learning_rate

    def step() -> None:
        for batch in loader.next_step():
            inputs_BT, labels_BT = tensors(batch)
            loss = engine(inputs_BT, labels_BT).sum() / labels_BT.numel()
            engine.backward(loss)
            engine.step()

    return step


def bare_torch(
    run: RunConfig, manifest: ShardManifest, loader: TokenLoader
) -> Callable[[], object]:
    """Give a step of plain PyTorch; on one rank it needs no collective."""
    model = build_run_model(run, manifest)
    optimizer = build_optimizer(model, run.train.optimizer, fused=False)
    for group in optimizer.param_groups:
        group["lr"] = run.train.optimizer.learning_rate

    def step() -> None:
        micro_batches = loader.next_step()
        optimizer.zero_grad()
        for batch in micro_batches:
            inputs_BT, labels_BT = tensors(batch)
            loss = model(inputs_BT, labels_BT).sum() / labels_BT.numel()
            (loss / len(micro_batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.train.optimizer.gradient_clipping)
        optimizer.step()

    return step


def tensors(batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Give inputs and labels as tensors of the CPU."""
    return torch.from_numpy(batch.inputs), torch.from_numpy(batch.labels)


if __name__ == "__main__":
    main()

"""How an attempt begins, and how it ends: `result.json` when complete, else `stopped.json`."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.config.load import config_hash, lineage_hash
from pipeline.config.schema import RunConfig
from pipeline.data.shards import ShardManifest
from pipeline.errors import ConfigError
from pipeline.tracking.environment import ENVIRONMENT_FILE, write_environment
from pipeline.tracking.events import read_events
from pipeline.tracking.expectation import compare, read_expectation
from pipeline.tracking.goodput import goodput_fraction
from pipeline.tracking.store import (
    RESULT_FILE,
    MetricValue,
    NumParameters,
    RankStateBytes,
    RunResult,
    SourceRead,
    clear_stopped,
    measured,
    read_result,
    write_result,
    write_stopped,
)
from pipeline.training.attempts import ACCOUNT
from pipeline.training.branching import first_state
from pipeline.training.checkpoint import TrainState
from pipeline.training.device import device_kind, device_name, peak_memory
from pipeline.training.distributed import barrier, gather_json
from pipeline.training.evaluation import EvalOutcome
from pipeline.training.guard import GuardState
from pipeline.training.journal import EVENTS
from pipeline.training.session import Training, evaluate, running_seconds, spent_seconds
from pipeline.training.stopping import StopWatch


def finished_result(run_dir: Path, run: RunConfig) -> RunResult | None:
    """Give the result of a run that is complete already; None if it is not.

    Raises:
        ConfigError: The result was written by another config.
    """
    if not (run_dir / RESULT_FILE).exists():
        return None
    result = read_result(run_dir)
    if result.config_hash != config_hash(run):
        raise ConfigError(
            f"{run_dir / RESULT_FILE} was written by another config than its run.yaml; "
            "give the changed run a name of its own"
        )
    return result


def begin(run_dir: Path, training: Training, facts: Mapping[str, Any]) -> TrainState:
    """Restore the newest intact checkpoint, if there is one, and write the first event.

    Args:
        run_dir: The run directory.
        training: What will train.
        facts: What else the event tells: the data, how the ranks differ, memory before.

    Returns:
        Where the run stands.

    Raises:
        LaunchError: Too many attempts before this one made no progress.
        CheckpointError: The run branches from a checkpoint that is not there, or damaged.
        ConfigError: The run could not have come from the one that it branches from.
    """
    run, ranks = training.run, training.ranks
    passed_over: list[str] = []
    with training.clock.phase("restore"):
        restored = training.checkpointer.restore(training.engine, passed_over.append)
        state = restored or first_state(run, training.engine, facts["data_fingerprint"], ranks)
    training.loader.load_state(state.loader)
    training.journal.continue_from(state.step, time.time() - training.clock.seconds)
    values = {
        "config_hash": lineage_hash(run),
        "world_size": ranks.world_size,
        "zero_stage": run.zero.stage,
        "precision": run.precision,
        "passed_over": passed_over,
        **({} if run.branch is None else {"branch": run.branch.model_dump(mode="json")}),
        **facts,
    }
    if ranks.rank == 0:
        clear_stopped(run_dir)
        write_environment(run_dir, {"device": device_name(ranks.device)})
    training.clock.mark_start()
    values[ACCOUNT] = spent_seconds(training)
    training.journal.write("resume" if restored else "start", state.step, values)
    return state


def end_early(run_dir: Path, training: Training, state: TrainState, reason: str) -> None:
    """Write `stopped.json` on rank 0, once the checkpoint stands; every rank waits for it."""
    if training.ranks.rank == 0:
        values = {"reason": reason, ACCOUNT: spent_seconds(training)}
        training.journal.write("stop", state.step, values)
        write_stopped(run_dir, state.step, reason)
    barrier(training.ranks)


def finish(
    run_dir: Path,
    training: Training,
    state: TrainState,
    manifest: ShardManifest,
    stop: StopWatch,
) -> RunResult | None:
    """Score the model and write `result.json` on rank 0 as the last thing of a run.

    Args:
        run_dir: The run directory.
        training: What trained.
        state: Where the run ended.
        manifest: The shards it read.
        stop: Reasons to stop that this rank sees.

    Returns:
        The content of the file, on every rank; None if the ranks agreed to stop before the model
        was scored, which the next start then does.
    """
    ranks = training.ranks
    final = evaluate(training, state, stop)
    if isinstance(final, str):
        end_early(run_dir, training, state, final)
        return None
    # An attempt that only had to write the result took no step, so it measured no gradients.
    mine = asdict(training.engine.state_bytes()) if training.meter.num_steps else None
    state_bytes = [rank for rank in gather_json(mine, ranks) if rank is not None]
    memory = gather_json(peak_memory(ranks.device), ranks)
    spent = spent_seconds(training)
    metrics = _metrics(training, state, final, spent, state_bytes, memory)
    if (expected := read_expectation(run_dir)) is not None:
        metrics |= compare(expected, metrics, device_kind(ranks.device), ranks.world_size)
    written: Any = None
    if ranks.rank == 0:
        values = {name: metric.value for name, metric in metrics.items()}
        training.journal.write("finish", state.step, {**values, ACCOUNT: spent})
        facts = {
            "metrics": metrics,
            "per_position_loss": final.per_position_loss,
            "model_state_bytes": [RankStateBytes(**rank) for rank in state_bytes] or None,
            "sources": {
                name: SourceRead(**asdict(count)) for name, count in training.loader.seen().items()
            },
            "goodput": {f"{k}_seconds": v for k, v in spent.items()},
        }
        result = _build_result(run_dir, training, state, manifest, facts)
        write_result(run_dir, result)
        written = result.model_dump(mode="json", exclude_none=True)
    return RunResult.model_validate(gather_json(written, ranks)[0])


def _metrics(
    training: Training,
    state: TrainState,
    final: EvalOutcome,
    spent: dict[str, float],
    state_bytes: list[dict[str, int]],
    memory: list[dict[str, float]],
) -> dict[str, MetricValue]:
    ranks = training.ranks
    tokens = state.step * training.run.train.global_batch_tokens
    values: dict[str, float] = {
        "progress/tokens": tokens,
        "progress/flops": tokens * training.flops_per_token,
        "progress/seconds": running_seconds(spent),
        "progress/attempt": training.journal.attempt,
    }
    if (fraction := goodput_fraction(spent)) is not None:
        values["perf/goodput_fraction"] = fraction
    metrics = {name: measured(name, value) for name, value in values.items()}
    for name, value in final.metrics.items():
        metrics[name] = measured(name, value, num=final.num_tokens)
    for name, spread in training.meter.summary().items():
        metrics[name] = measured(name, spread.value, num=spread.num, spread=spread.spread)
    for name in memory[0]:
        metrics[name] = measured(name, max(rank[name] for rank in memory), num=ranks.world_size)
    if state_bytes:
        name = "memory/model_state_bytes"
        largest = max(sum(rank.values()) for rank in state_bytes)
        metrics[name] = measured(name, largest, num=ranks.world_size)
    return metrics


def _build_result(
    run_dir: Path,
    training: Training,
    state: TrainState,
    manifest: ShardManifest,
    facts: dict[str, Any],
) -> RunResult:
    run, ranks = training.run, training.ranks
    environment = json.loads((run_dir / ENVIRONMENT_FILE).read_bytes())
    counted = run.model.num_parameters(run.model.resolved_vocab_size(manifest.vocab_size))
    events = read_events(run_dir / EVENTS)
    return RunResult(
        run=run.name,
        study=study_name(run_dir),
        family=run.model.family,
        config_hash=config_hash(run),
        data_fingerprint=manifest.fingerprint,
        git_commit=environment.get("git_commit"),
        seed=run.seed,
        world_size=ranks.world_size,
        zero_stage=run.zero.stage,
        precision=run.precision,
        num_parameters=NumParameters(**asdict(counted)),
        flops_per_token=training.flops_per_token,
        steps=state.step,
        tokens=state.step * run.train.global_batch_tokens,
        attempts=training.journal.attempt,
        skipped_steps=state.skipped.total,
        rewinds=GuardState.from_json(state.guard).num_rewinds,
        environment=environment,
        started=events[0].time_unix_seconds,
        ended=time.time(),
        **facts,
    )


def study_name(run_dir: Path) -> str | None:
    """Name the study whose cell a run directory is: `<study>/runs/<cell>`; None otherwise."""
    study_dir = run_dir.parent.parent
    is_cell = run_dir.parent.name == "runs" and (study_dir / "study.yaml").is_file()
    return study_dir.name if is_cell else None

"""The loop: steps, evaluations and checkpoints until the run is complete or all agree to stop."""

import math
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.config.schema import RunConfig
from pipeline.data.loader import TokenLoader
from pipeline.tracking.events import SOURCES
from pipeline.training.checkpoint import Checkpointer, TrainState
from pipeline.training.device import peak_memory
from pipeline.training.distributed import RankContext, gather_json, sum_over_ranks
from pipeline.training.engine import Engine, StepOutcome
from pipeline.training.evaluation import EvalOutcome, Evaluator
from pipeline.training.guard import count_skip
from pipeline.training.journal import ACCOUNT, Journal
from pipeline.training.meters import StepMeter, StepTiming, WallClock, busy_seconds
from pipeline.training.phases import enter, note_samples
from pipeline.training.profiling import StepProfiler
from pipeline.training.schedule import learning_rate
from pipeline.training.stopping import REASONS, StopWatch, first_reason


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the loop works with; the same for either family and any engine."""

    run: RunConfig
    ranks: RankContext
    engine: Engine
    loader: TokenLoader
    evaluator: Evaluator
    checkpointer: Checkpointer
    journal: Journal
    meter: StepMeter
    clock: WallClock
    profiler: StepProfiler
    flops_per_token: float


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What the ranks tell each other after a step, in one all-reduce."""

    stop_reason: str | None
    text_bytes: float
    """Raw bytes of the global batch's labels."""
    slowest_rank_ratio: float


def fit(training: Training, state: TrainState, stop: StopWatch) -> tuple[TrainState, str | None]:
    """Train until the last step, or until any rank has a reason to stop.

    Args:
        training: Engine, data and where to write.
        state: Where the run stands.
        stop: Reasons to stop that this rank sees.

    Returns:
        Where the run stands then, and the reason if it is not complete.

    Raises:
        TrainingDiverged: Too many steps in a row were not finite.
        CheckpointError: A checkpoint could not be written.
    """
    run = training.run
    reason = agree(training.ranks, stop.votes(state.step), 0.0, 0.0).stop_reason
    while state.step < run.train.total_steps and reason is None:
        state, reason = take_step(training, state, stop)
        if state.step == run.train.total_steps:
            return state, None
        if _is_due(run.eval.every_steps, state.step):
            evaluate(training, state)
        if reason is None:
            save(training, state, is_last=False)
    return state, reason


def take_step(
    training: Training, state: TrainState, stop: StopWatch
) -> tuple[TrainState, str | None]:
    """Take one optimizer step and log it; give the state after it and a reason to stop."""
    run, step = training.run, state.step + 1
    training.profiler.begin(step)
    begin = time.perf_counter()
    enter("data.next", step)
    micro_batches = training.loader.next_step()
    note_samples(micro_batches)
    data_wait = time.perf_counter() - begin
    rate = learning_rate(
        state.step, run.train.total_steps, run.train.optimizer.learning_rate, run.train.schedule
    )
    outcome = training.engine.train_step(micro_batches, rate)
    num_bytes = float(sum(int(batch.text_bytes.sum()) for batch in micro_batches))
    enter("agree")
    agreement = agree(training.ranks, stop.votes(step), num_bytes, busy_seconds(outcome, data_wait))
    training.meter.add(
        StepTiming(
            step_seconds=time.perf_counter() - begin,
            data_wait_seconds=data_wait,
            forward_seconds=outcome.forward_seconds,
            backward_seconds=outcome.backward_seconds,
            optimizer_seconds=outcome.optimizer_seconds,
            slowest_rank_ratio=agreement.slowest_rank_ratio,
            num_tokens=outcome.num_tokens,
        ),
        is_traced=training.profiler.covers(step),
    )
    training.profiler.end(step)
    if not outcome.applied:
        values = {"train/loss": outcome.loss, "train/grad_norm": outcome.grad_norm}
        training.journal.write("skip", step, values)
    skipped = count_skip(state.skipped, outcome, step, run.guard.max_nonfinite_steps)
    state = replace(state, step=step, loader=training.loader.state, skipped=skipped)
    if step in (1, run.train.total_steps) or step % run.tracking.log_every_steps == 0:
        log_step(training, state, outcome, rate, agreement)
    return state, agreement.stop_reason


def agree(ranks: RankContext, votes: list[float], num_bytes: float, busy: float) -> Agreement:
    """Sum what every rank brings to the end of a step; all ranks get the same answer.

    Args:
        ranks: This rank among the others.
        votes: Reasons to stop that this rank sees, as `StopWatch.votes`.
        num_bytes: Raw bytes of this rank's labels.
        busy: Seconds in which this rank did not wait for others.
    """
    busy_by_rank = [0.0] * ranks.world_size
    busy_by_rank[ranks.rank] = busy
    summed = sum_over_ranks([*votes, num_bytes, *busy_by_rank], ranks)
    times = summed[len(REASONS) + 1 :]
    mean = sum(times) / len(times)
    return Agreement(
        stop_reason=first_reason(summed[: len(REASONS)]),
        text_bytes=summed[len(REASONS)],
        slowest_rank_ratio=max(times) / mean if mean > 0.0 else 1.0,
    )


def log_step(
    training: Training,
    state: TrainState,
    outcome: StepOutcome,
    rate: float,
    agreement: Agreement,
) -> None:
    """Write a training event, with the largest memory of any rank; collective."""
    memory = gather_json(peak_memory(training.ranks.device), training.ranks)
    tokens = state.step * training.run.train.global_batch_tokens
    spent = spent_seconds(training)
    values: dict[str, Any] = {
        "train/loss": outcome.loss,
        "train/grad_norm": outcome.grad_norm,
        "train/learning_rate": rate,
        **training.meter.window(),
        **{name: max(rank[name] for rank in memory) for name in memory[0]},
        "progress/tokens": tokens,
        "progress/flops": tokens * training.flops_per_token,
        "progress/seconds": spent["wall"],
        "progress/attempt": training.journal.attempt,
        ACCOUNT: spent,
        SOURCES: {name: asdict(count) for name, count in training.loader.seen().items()},
    }
    if agreement.text_bytes > 0:
        bits = outcome.text_loss_sum / math.log(2)
        values["train/bits_per_byte"] = bits / agreement.text_bytes
    training.journal.write("train", state.step, values)
    training.journal.write_host(state.step)


def evaluate(training: Training, state: TrainState) -> EvalOutcome:
    """Score the validation set and write the event; collective."""
    with training.clock.phase("eval"):
        outcome = training.evaluator.evaluate(training.engine)
    values = {**outcome.metrics, "num_tokens": outcome.num_tokens}
    training.journal.write("eval", state.step, values)
    return outcome


def save(training: Training, state: TrainState, *, is_last: bool = True) -> None:
    """Write a checkpoint, and an event for each that stands now; collective.

    Unless it is the last one, it is written if it is due, and beside training.
    """
    saver = training.checkpointer
    act = saver.save if is_last else saver.advance
    state = replace(state, event_seq=training.journal.last_seq)
    with training.clock.phase("checkpoint"):
        committed = act(
            training.engine, state, training.journal.attempt,
            lambda: {ACCOUNT: spent_seconds(training)},
        )  # fmt: skip
    for checkpoint in committed:
        training.journal.write("checkpoint", checkpoint.step, checkpoint.values)


def spent_seconds(training: Training) -> dict[str, float]:
    """Split the wall time of all attempts so far by what it went into.

    Returns:
        Seconds in `train` (steps that the run kept), `lost` (steps that a later attempt took
        again), `data_wait`, the phases of the clock, `other`, and `wall`, their sum.
    """
    spent = training.clock.spent()
    waiting = training.meter.total_seconds("data_wait_seconds")
    steps = training.meter.total_seconds("step_seconds") - waiting
    other = max(0.0, spent["other"] - steps - waiting)
    spent |= {"train": steps, "data_wait": waiting, "other": other}
    before = training.journal.spent_before
    return {name: spent.get(name, 0.0) + before.get(name, 0.0) for name in {**spent, **before}}


def _is_due(every_steps: int | None, step: int) -> bool:
    return every_steps is not None and step % every_steps == 0

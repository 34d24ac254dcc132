"""What a rank trains with, and what it does beside the steps: score, save, and say how it goes."""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline.config.schema import RunConfig
from pipeline.data.loader import TokenLoader
from pipeline.tracking.events import SOURCES
from pipeline.training.attempts import ACCOUNT
from pipeline.training.checkpoint import Checkpointer, TrainState
from pipeline.training.device import peak_memory
from pipeline.training.distributed import RankContext, gather_json, sum_over_ranks
from pipeline.training.engine import Engine, StepOutcome
from pipeline.training.evaluation import EvalOutcome, Evaluator
from pipeline.training.journal import Journal
from pipeline.training.meters import StepMeter, WallClock
from pipeline.training.profiling import StepProfiler
from pipeline.training.stopping import URGENT, StopAgreed, StopWatch, first_reason
from pipeline.training.stragglers import StragglerWatch


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
    stragglers: StragglerWatch = field(default_factory=StragglerWatch)


def log_step(
    training: Training,
    state: TrainState,
    outcome: StepOutcome,
    rate: float,
    text_bytes: float,
) -> None:
    """Write a training event, with the largest memory of any rank; collective.

    Args:
        training: What trains.
        state: After the step.
        outcome: What the step did.
        rate: Its learning rate.
        text_bytes: Raw bytes of the global batch's labels.
    """
    with training.clock.phase("tracking"):
        memory = gather_json(peak_memory(training.ranks.device), training.ranks)
        training.journal.write_host(state.step)
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
        "progress/seconds": running_seconds(spent),
        "progress/attempt": training.journal.attempt,
        ACCOUNT: spent,
        SOURCES: {name: asdict(count) for name, count in training.loader.seen().items()},
    }
    if text_bytes > 0:
        bits = outcome.text_loss_sum / math.log(2)
        values["train/bits_per_byte"] = bits / text_bytes
    with training.clock.phase("tracking"):
        training.journal.write("train", state.step, values)


def evaluate(training: Training, state: TrainState, stop: StopWatch) -> EvalOutcome | str:
    """Score the validation set and write the event; collective.

    Returns:
        The scores; or the reason, where the ranks agreed to stop before the end.
    """

    def leave_if_asked() -> None:
        reason = agree_to_stop(training, stop, state.step, URGENT)
        if reason is not None:
            raise StopAgreed(reason)

    try:
        with training.clock.phase("eval"):
            outcome = training.evaluator.evaluate(training.engine, leave_if_asked)
    except StopAgreed as agreed:
        return agreed.reason
    values = {**outcome.metrics, "num_tokens": outcome.num_tokens}
    with training.clock.phase("tracking"):
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
    if committed:
        with training.clock.phase("tracking"):
            for checkpoint in committed:
                training.journal.write("checkpoint", checkpoint.step, checkpoint.values)


def spent_seconds(training: Training) -> dict[str, float]:
    """Split the wall time of all attempts so far by what it went into.

    Returns:
        Seconds by the names of `pipeline.tracking.goodput.PARTS`, and `wall`, their sum.
    """
    spent = training.clock.spent()
    steps = training.meter.spent()
    spent["other"] = max(0.0, spent["other"] - sum(steps.values()))
    spent |= steps
    before = training.journal.spent_before
    return {name: spent.get(name, 0.0) + before.get(name, 0.0) for name in {**spent, **before}}


def running_seconds(spent: dict[str, float]) -> float:
    """Give the wall time in which a process of the run was there, without the gaps between."""
    return spent["wall"] - spent.get("idle", 0.0) - spent.get("restart", 0.0)


def agree_to_stop(
    training: Training, stop: StopWatch, step: int, reasons: tuple[str, ...]
) -> str | None:
    """Give the first of some reasons that any rank sees; all ranks get the same answer."""
    found = first_reason(sum_over_ranks(stop.votes(step), training.ranks))
    return found if found in reasons else None

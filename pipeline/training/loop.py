"""The loop: steps, evaluations and checkpoints until the run is complete or all agree to stop."""

import time
from dataclasses import asdict, dataclass, replace

from pipeline.config.schema import RunConfig
from pipeline.errors import LaunchError
from pipeline.training.checkpoint import TrainState
from pipeline.training.distributed import RankContext, sum_over_ranks
from pipeline.training.guard import GuardState, SkippedSteps
from pipeline.training.meters import StepTiming
from pipeline.training.phases import enter, note_samples
from pipeline.training.recovery import handle_skip
from pipeline.training.schedule import learning_rate
from pipeline.training.session import Training, agree_to_stop, evaluate, log_step, save
from pipeline.training.stopping import REASONS, URGENT, StopWatch, first_reason
from pipeline.training.stragglers import RankTimes


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What the ranks tell each other after a step, in one all-reduce."""

    stop_reason: str | None
    num_applied: int
    """Ranks whose engine applied the step."""
    text_bytes: float
    """Raw bytes of the global batch's labels."""
    times: list[RankTimes]
    """Of every rank."""

    @property
    def slowest_rank_ratio(self) -> float:
        """Time of the slowest rank over the mean of all."""
        busy = [rank.busy_seconds for rank in self.times]
        return max(busy) * len(busy) / sum(busy) if sum(busy) > 0.0 else 1.0


def fit(training: Training, state: TrainState, stop: StopWatch) -> tuple[TrainState, str | None]:
    """Train until the last step, or until any rank has a reason to stop.

    Args:
        training: Engine, data and where to write.
        state: Where the run stands.
        stop: Reasons to stop that this rank sees.

    Returns:
        Where the run stands then, and the reason if it is not complete.

    Raises:
        TrainingDiverged: Too many steps in a row were not finite, or a spike ends the run.
        CheckpointError: A checkpoint could not be written.
        LaunchError: The ranks have parted.
    """
    run = training.run
    reason = agree_to_stop(training, stop, state.step, REASONS)
    if reason is None:
        reason = prepare_to_fit(training, state, stop)
    while state.step < run.train.total_steps and reason is None:
        before = state.step
        state, reason = take_step(training, state, stop)
        if state.step == run.train.total_steps:
            return state, None
        if state.step <= before:
            # A rewind; what is due at that step was done the first time.
            continue
        if reason not in URGENT and _is_due(run.eval.every_steps, state.step):
            scored = evaluate(training, state, stop)
            reason = scored if isinstance(scored, str) else reason
        if reason is None:
            save(training, state, is_last=False)
    return state, reason


def prepare_to_fit(training: Training, state: TrainState, stop: StopWatch) -> str | None:
    """Make up for an evaluation that a stop left out, and give a rewind something to go back to."""
    run = training.run
    first = 0 if run.branch is None else run.branch.step
    if run.guard.spike == "rewind" and state.step == first:
        save(training, state)
    is_due = 0 < state.step < run.train.total_steps and _is_due(run.eval.every_steps, state.step)
    if is_due and training.journal.lacks_evaluation(state.step):
        scored = evaluate(training, state, stop)
        return scored if isinstance(scored, str) else None
    return None


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
    guard = GuardState.from_json(state.guard)
    limits = guard.limits(run.guard)
    outcome = training.engine.train_step(micro_batches, rate, limits)
    num_bytes = float(sum(int(batch.text_bytes.sum()) for batch in micro_batches))
    enter("agree")
    votes = [*stop.votes(step), float(outcome.applied), num_bytes]
    mine = RankTimes(data_seconds=data_wait, forward_seconds=outcome.forward_seconds)
    agreement = agree(training.ranks, votes, mine)
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
        is_applied=outcome.applied,
    )
    training.profiler.end(step)
    check_unity(agreement, training.ranks, step)
    if (straggler := training.stragglers.note(agreement.times)) is not None:
        told = straggler.describe()
        training.journal.write("straggler", step, {**asdict(straggler), "message": told})
    state = replace(state, step=step, loader=training.loader.state)
    if not outcome.applied:
        state = handle_skip(training, state, outcome, limits)
    else:
        skipped = SkippedSteps(total=state.skipped.total)
        guard = guard.after(outcome, run.guard)
        state = replace(state, skipped=skipped, guard=guard.to_json())
    if state.step == step and _is_logged(run, step):
        log_step(training, state, outcome, rate, agreement.text_bytes)
    return state, agreement.stop_reason


def agree(ranks: RankContext, votes: list[float], mine: RankTimes) -> Agreement:
    """Sum what every rank brings to the end of a step; all ranks get the same answer.

    Args:
        ranks: This rank among the others.
        votes: Reasons to stop that this rank sees, as `StopWatch.votes`; whether it applied the
            step; raw bytes of its labels.
        mine: Seconds in which this rank did not wait for others.
    """
    by_rank = [0.0] * (2 * ranks.world_size)
    by_rank[2 * ranks.rank : 2 * ranks.rank + 2] = mine.data_seconds, mine.forward_seconds
    summed = sum_over_ranks([*votes, *by_rank], ranks)
    reasons, times = summed[: len(REASONS)], summed[len(votes) :]
    return Agreement(
        stop_reason=first_reason(reasons),
        num_applied=round(summed[len(REASONS)]),
        text_bytes=summed[len(REASONS) + 1],
        times=[
            RankTimes(data_seconds=data, forward_seconds=forward)
            for data, forward in zip(times[::2], times[1::2], strict=True)
        ],
    )


def check_unity(agreement: Agreement, ranks: RankContext, step: int) -> None:
    """Stop where some ranks applied a step and others did not.

    They decide alike as long as they compute alike; hosts of different hardware may not.

    Raises:
        LaunchError: The weights of the ranks differ from now on.
    """
    if agreement.num_applied not in (0, ranks.world_size):
        raise LaunchError(
            f"step {step} was applied on {agreement.num_applied} of {ranks.world_size} ranks, so "
            "their weights differ now: the ranks do not compute the same. Use hosts of one kind, "
            "or guard.spike=off; the same command goes on from the last checkpoint"
        )


def _is_logged(run: RunConfig, step: int) -> bool:
    return step in (1, run.train.total_steps) or step % run.tracking.log_every_steps == 0


def _is_due(every_steps: int | None, step: int) -> bool:
    return every_steps is not None and step % every_steps == 0

"""What follows a step that was not applied: on with the next, back to a checkpoint, or the end."""

from dataclasses import replace

from pipeline.data.loader import LoaderState
from pipeline.errors import TrainingDiverged
from pipeline.training.attempts import ACCOUNT, REWIND
from pipeline.training.checkpoint import TrainState
from pipeline.training.engine import StepLimits, StepOutcome
from pipeline.training.guard import (
    GuardState,
    check_policy,
    count_skip,
    describe_spike,
    is_spike,
)
from pipeline.training.session import Training, spent_seconds


def handle_skip(
    training: Training, state: TrainState, outcome: StepOutcome, limits: StepLimits
) -> TrainState:
    """Record a step that was not applied; go on, go back to a checkpoint, or end the run.

    Args:
        training: What trains.
        state: After the step.
        outcome: What the step did.
        limits: What it was held to.

    Raises:
        TrainingDiverged: The run ends here, on all ranks.
    """
    run, step = training.run, state.step
    batch = run.train.global_batch_tokens // run.train.sequence_tokens
    values = {
        "train/loss": outcome.loss,
        "train/grad_norm": outcome.grad_norm,
        "reason": describe_spike(outcome, limits, step) if is_spike(outcome) else "not finite",
        "first_sample": state.loader.num_samples - batch,
        "num_samples": batch,
    }
    training.journal.write("skip", step, values)
    guard = GuardState.from_json(state.guard)
    check_policy(run.guard, guard, outcome, limits, step)
    guard = guard.after(outcome, run.guard)
    if is_spike(outcome) and run.guard.spike == "rewind":
        return rewind(training, state, guard, str(values["reason"]))
    skipped = count_skip(state.skipped, outcome, step, run.guard.max_nonfinite_steps)
    return replace(state, skipped=skipped, guard=guard.to_json())


def rewind(training: Training, state: TrainState, guard: GuardState, reason: str) -> TrainState:
    """Go back to the newest intact checkpoint and leave out the data around a spike; collective.

    Source: PaLM, Chowdhery et al. 2022, section 5.1.
    """
    run, journal = training.run, training.journal
    passed_over: list[str] = []
    with training.clock.phase("restore"):
        restored = training.checkpointer.restore(training.engine, passed_over.append)
    if restored is None:
        raise TrainingDiverged(f"{reason}, and there is no checkpoint to go back to any more")
    before = spent_seconds(training)["train"]
    training.meter.lose(before - journal.go_back_to(restored.step))
    batch = run.train.global_batch_tokens // run.train.sequence_tokens
    left_out = max(run.guard.rewind_skip_steps, state.step - restored.step) * batch
    first = restored.loader.num_samples
    training.loader.load_state(LoaderState(num_samples=first + left_out))
    guard = replace(
        GuardState.from_json(restored.guard),
        num_spikes=guard.num_spikes,
        num_rewinds=guard.num_rewinds + 1,
    )
    total = state.skipped.total + 1
    told = {"reason": reason, "from_step": state.step, "first_sample": first,
            "num_samples": left_out}  # fmt: skip
    values = {REWIND: told, "passed_over": passed_over, ACCOUNT: spent_seconds(training)}
    journal.write("resume", restored.step, values)
    return replace(
        restored,
        loader=training.loader.state,
        skipped=replace(restored.skipped, total=total),
        guard=guard.to_json(),
    )

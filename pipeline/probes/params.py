"""The arguments of every probe, checked before any process starts and again on every rank."""

import importlib
from collections.abc import Mapping
from typing import Annotated, Any, cast

from pydantic import Field

from pipeline.config.batching import BatchPlan, plan_batches
from pipeline.config.explain import validate
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError
from pipeline.probes import PROBES, TASKS
from pipeline.probes.schema import ProbeParams
from pipeline.probes.settings import (
    AttentionParams,
    ContextParams,
    EncoderDecoderParams,
    GenerationParams,
    GradientParams,
    ModelParams,
    PermutationParams,
    RecallLossParams,
    ShuffleParams,
    SyntheticParams,
    TrainedParams,
    choose_runs,
    require_models,
)
from pipeline.probes.task_base import Task


class StepTimeParams(ModelParams):
    """Arguments of the step-time probe."""

    tokens_per_step: int = Field(ge=1)
    """Tokens of one step over all ranks, the same for every arm."""
    sequence_tokens: list[int] = Field(min_length=1)
    """Sequence lengths T to visit; each times the ranks divides `tokens_per_step`."""
    repeats: int = Field(ge=1)
    """Timed steps of each arm, one a round."""
    warmup_steps: int = Field(default=1, ge=1)
    """Untimed steps of each arm before the first round."""
    threads: list[Annotated[int, Field(ge=1)]] | None = None
    """Threads of a rank to time with, each an arm of its own; None leaves what the launcher set."""


class ModelStateParams(ProbeParams):
    """Arguments of the model-state probe."""

    stages: list[int] = Field(default=[0, 1, 2, 3], min_length=1)
    """ZeRO stages to measure, each with an engine of its own."""


class BenchParams(ProbeParams):
    """Arguments of the bench of one run."""

    steps: int = Field(default=20, ge=4)
    """Timed steps of each engine; a spread needs four."""


class MachineParams(ProbeParams):
    """Arguments of the measurement of a machine."""

    seconds_per_point: float = Field(gt=0.0)
    """How long each point of a curve is measured; five calls at least."""


SCHEMAS: dict[str, type[ProbeParams]] = {
    "step_time": StepTimeParams,
    "bench": BenchParams,
    "machine": MachineParams,
    "model_state": ModelStateParams,
    "gradient_distance": GradientParams,
    "context_use": ContextParams,
    "recall_loss": RecallLossParams,
    "attention_use": AttentionParams,
    "permutation": PermutationParams,
    "shuffle": ShuffleParams,
    "generation": GenerationParams,
    "synthetic_task": SyntheticParams,
    "encoder_decoder": EncoderDecoderParams,
}
"""Probe name to the arguments that it takes."""


def check_probe(
    probe: str, params: Mapping[str, Any], runs: Mapping[str, RunConfig], num_workers: int
) -> None:
    """Refuse a probe cell that cannot run.

    Args:
        probe: Name of the probe.
        params: Its arguments as the study states them.
        runs: Label of a family to its run.
        num_workers: World size of the cell.

    Raises:
        ConfigError: The probe is unknown, or its arguments are illegal or contradict a run.
    """
    if probe not in PROBES:
        raise ConfigError(f"probe {probe!r} is not one of {', '.join(sorted(PROBES))}")
    checked = validate(SCHEMAS[probe], dict(params), f"probe {probe}, params")
    if isinstance(checked, ModelParams):
        runs = choose_runs(checked, runs)
    if isinstance(checked, StepTimeParams):
        plan_arms(checked, runs, num_workers)
    if isinstance(checked, BenchParams | ModelStateParams):
        for run in runs.values():
            plan_batches(run.train, num_workers)
    if isinstance(checked, ModelStateParams):
        for run in runs.values():
            for stage in checked.stages:
                at_stage(run, stage)
    if isinstance(checked, TrainedParams):
        require_models(checked, runs)
    if isinstance(checked, SyntheticParams):
        find_task(checked.task, checked.task_params)


def find_task(name: str, params: Mapping[str, Any]) -> Task:
    """Build a synthetic task by its name in `TASKS`.

    Raises:
        ConfigError: No task has this name, or an argument is illegal.
    """
    if name not in TASKS:
        raise ConfigError(f"task {name!r} is not one of {', '.join(sorted(TASKS))}")
    module, _, attribute = TASKS[name].partition(":")
    schema = cast("type[Task]", getattr(importlib.import_module(module), attribute))
    return validate(schema, dict(params), f"task {name}, task_params")


def plan_arms(
    params: StepTimeParams, runs: Mapping[str, RunConfig], num_workers: int
) -> list[BatchPlan]:
    """Cut the tokens of a step for every sequence length.

    Raises:
        ConfigError: A length does not divide the tokens of a step, or exceeds the positions.
    """
    longest = max(params.sequence_tokens)
    for label, run in runs.items():
        if longest > run.model.max_positions:
            raise ConfigError(
                f"params.sequence_tokens={longest} is longer than families.{label}.model."
                f"max_positions={run.model.max_positions}; nearest: {run.model.max_positions}"
            )
    return [
        _plan_arm(length, params.tokens_per_step, num_workers) for length in params.sequence_tokens
    ]


def at_stage(run: RunConfig, stage: int) -> RunConfig:
    """Give the run at another ZeRO stage; at stage 3 nothing is compiled.

    Raises:
        ConfigError: The stage does not exist.
    """
    tree = run.model_dump()
    tree["zero"]["stage"] = stage
    if stage == 3:
        # A config refuses both, and compiling moves no byte of the state measured here.
        tree["train"]["compile"] = False
    return validate(RunConfig, tree, "probe model_state, params")


def _plan_arm(sequence_tokens: int, tokens_per_step: int, num_workers: int) -> BatchPlan:
    round_tokens = sequence_tokens * num_workers
    if tokens_per_step % round_tokens:
        nearest = max(1, tokens_per_step // round_tokens) * round_tokens
        raise ConfigError(
            f"params.tokens_per_step={tokens_per_step} is not a multiple of "
            f"seq({sequence_tokens}) x world({num_workers})={round_tokens}; nearest: {nearest}"
        )
    return BatchPlan(
        world_size=num_workers,
        micro_batch_samples=tokens_per_step // round_tokens,
        accumulation_steps=1,
        sequence_tokens=sequence_tokens,
    )

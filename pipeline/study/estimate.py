"""From a cell to closed-form expectations: seconds it may take, bytes of model state it holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import RunConfig
from pipeline.study.planned import ProbeCell, TrainCell

NOMINAL_FLOPS_PER_SECOND = 5.0e10
"""Training FLOPs per second of one CPU rank with small fp32 models, as measured on one core; only
the first expectation of a study uses it, later ones use the rate of its finished cells."""

START_SECONDS = 6.0
"""Processes, process group and engine of one cell on one machine."""

FP32_BYTES = 4
ADAM_MOMENTS = 2


@dataclass(frozen=True, kw_only=True)
class StateFormula:
    """Bytes of model state on one rank."""

    parameters: float
    gradients: float
    moments: float
    master_weights: float
    """Copies of the weights that DeepSpeed's stages 1 to 3 update, kept in fp32 training too."""

    @property
    def published(self) -> float:
        """Parameters, gradients and moments, as published."""
        return self.parameters + self.gradients + self.moments

    @property
    def total(self) -> float:
        """The published bytes and DeepSpeed's master weights."""
        return self.published + self.master_weights


def state_bytes_formula(num_parameters: int, zero_stage: int, world_size: int) -> StateFormula:
    """Give the model state of fp32 AdamW training under ZeRO.

    Args:
        num_parameters: All parameters, embedding included.
        zero_stage: 0 replicates, 1 splits optimizer state, 2 also gradients, 3 also parameters.
        world_size: Number of ranks.

    Returns:
        Bytes on one rank: 4 for a parameter, 4 for its gradient, 8 for both moments, and from stage
        1 on 4 for a master weight.

    Source: Rajbhandari et al. 2020, section 5 and figure 1, with fp32 in place of mixed precision;
    master weights as in DeepSpeed's stage_1_and_2.py and stage3.py.
    """

    def share(from_stage: int) -> int:
        return world_size if zero_stage >= from_stage else 1

    size = FP32_BYTES * num_parameters
    return StateFormula(
        parameters=size / share(3),
        gradients=size / share(2),
        moments=ADAM_MOMENTS * size / share(1),
        master_weights=size / share(1) if zero_stage > 0 else 0.0,
    )


def training_flops(run: RunConfig, vocab_size: int) -> float:
    """Give the FLOPs of a whole training run; evaluation is left out."""
    per_token = run.model.flops_per_token(vocab_size, run.train.sequence_tokens)
    return per_token * run.train.total_tokens


def expect_seconds(
    cell: TrainCell | ProbeCell, vocab_size: int, flops_per_second: float | None
) -> float | None:
    """Estimate how long a cell takes; good to a factor of about two.

    Args:
        cell: The cell.
        vocab_size: Rows of the embedding table.
        flops_per_second: Rate of one rank as measured in this study, or None before there is one.

    Returns:
        Seconds, or None for a probe whose work is not known here.
    """
    rate = (flops_per_second or NOMINAL_FLOPS_PER_SECOND) * cell.num_workers
    if isinstance(cell, TrainCell):
        return START_SECONDS + training_flops(cell.run, vocab_size) / rate
    if cell.probe == "step_time":
        return START_SECONDS + _step_time_flops(cell.params, cell.runs, vocab_size) / rate
    if cell.probe == "model_state":
        num_engines = len(cell.runs) * len(cell.params.get("stages", (0, 1, 2, 3)))
        return START_SECONDS + num_engines
    return None


def _step_time_flops(
    params: Mapping[str, Any], runs: Mapping[str, RunConfig], vocab_size: int
) -> float:
    num_steps = int(params.get("repeats", 0)) + int(params.get("warmup_steps", 0))
    tokens = num_steps * int(params.get("tokens_per_step", 0))
    lengths = params.get("sequence_tokens", ())
    return sum(
        tokens * run.model.flops_per_token(vocab_size, int(length))
        for run in runs.values()
        for length in lengths
    )

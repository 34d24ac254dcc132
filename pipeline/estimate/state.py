"""From a run and a world size to the bytes of model state that one rank holds, to the byte.

Source: Rajbhandari et al. 2020, section 5; paddings as in DeepSpeed 0.19, stage_1_and_2.py and
partition_parameters.py. Tests hold it equal to the tensors of real engines.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.config.schema import RunConfig
from pipeline.estimate.collectives import (
    VALUE_BYTES,
    group_elements,
    groups_of,
    padded,
    subgroup_elements,
)
from pipeline.estimate.parameters import Layout, Parameter, layout_of

Offload = Literal["none", "optimizer", "optimizer_and_parameters"]
"""What DeepSpeed keeps in the host's memory instead of the device's; parameters at stage 3 only."""

MASTER_BYTES = 4
ADAM_MOMENTS = 2
STEP_COUNT_BYTES = 4
"""AdamW's count of steps, one number for each tensor that it updates."""


@dataclass(frozen=True, kw_only=True)
class RankState:
    """Bytes of model state on one rank, padding of partitions included."""

    parameters: int
    """Working weights that forward and backward read."""
    gradients: int
    """Gradients that stand when the update begins."""
    moments: int
    """AdamW's two moments, float32, and its counts of steps."""
    master_weights: int
    """float32 weights that the update works on, where they are a copy."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.moments + self.master_weights


def state_bytes(run: RunConfig, vocab_size: int, world_size: int, rank: int = 0) -> RankState:
    """Give the model state of one rank.

    Args:
        run: Model, ZeRO stage and precision.
        vocab_size: Entries of the tokenizer.
        world_size: Number of ranks.
        rank: Which rank; at stage 2 the parts of the ranks hold different gradients.
    """
    layout, stage = layout_of(run.model, vocab_size), run.zero.stage
    working = VALUE_BYTES[run.precision]
    groups = groups_of(layout)
    total = sum(parameter.num_elements for parameter in layout.parameters)
    if stage == 0:
        num_counts, has_master = len(layout.parameters), run.precision != "fp32"
        return RankState(
            parameters=working * total,
            gradients=working * total,
            moments=_moments(total, num_counts),
            master_weights=MASTER_BYTES * total if has_master else 0,
        )
    if stage == 3:
        return _sharded(run, layout, world_size)
    flat = sum(group_elements(group, world_size) for group in groups)
    return RankState(
        parameters=working * flat,
        gradients=working * (_kept(groups, world_size, rank) if stage == 2 else total),
        moments=_moments(flat // world_size, len(groups)),
        master_weights=MASTER_BYTES * flat // world_size,
    )


def largest_state_bytes(run: RunConfig, vocab_size: int, world_size: int) -> int:
    """Give the model state of the rank that holds most.

    Args:
        run: Model, ZeRO stage and precision.
        vocab_size: Entries of the tokenizer.
        world_size: Number of ranks.
    """
    num_kinds = world_size if run.zero.stage == 2 else 1
    return max(state_bytes(run, vocab_size, world_size, rank).total for rank in range(num_kinds))


def _sharded(run: RunConfig, layout: Layout, world_size: int) -> RankState:
    """Give the state of stage 3, where each parameter is cut and padded on its own."""
    working = VALUE_BYTES[run.precision]
    mine = sum(padded(p.num_elements, world_size) // world_size for p in layout.parameters)
    whole = sum(
        p.num_elements
        for p in layout.parameters
        if p.num_elements <= run.zero.param_persistence_threshold
    )
    num_counts = sum(len(subgroup_elements(group, world_size)) for group in groups_of(layout))
    return RankState(
        parameters=working * (mine + whole),
        gradients=working * mine,
        moments=_moments(mine, num_counts),
        master_weights=MASTER_BYTES * mine,
    )


def _moments(num_elements: int, num_counts: int) -> int:
    return ADAM_MOMENTS * MASTER_BYTES * num_elements + STEP_COUNT_BYTES * num_counts


def _kept(groups: Sequence[Sequence[Parameter]], world_size: int, rank: int) -> int:
    """Count the elements of gradients that stage 2 keeps: those of its part, cut ones whole.

    Padding at the end of the last parts has a gradient of zeros.
    """
    count = 0
    for group in groups:
        part = group_elements(group, world_size) // world_size
        at = 0
        for parameter in group:
            end = at + parameter.num_elements
            if at < (rank + 1) * part and end > rank * part:
                count += parameter.num_elements
            at = end
        count += max(0, (rank + 1) * part - max(at, rank * part))
    return count

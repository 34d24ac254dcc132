"""From a run and a world size to the collectives of one optimizer step, as DeepSpeed issues them.

Source: DeepSpeed 0.19, runtime/engine.py, runtime/zero/stage_1_and_2.py, stage3.py; counted on
real runs by tests/estimate/test_collectives.py.
"""

from dataclasses import dataclass
from typing import Literal

from pipeline.config.schema import RunConfig

Op = Literal["all_reduce", "all_gather", "reduce_scatter", "reduce", "broadcast"]
When = Literal["forward", "backward", "update", "agree", "log"]
"""The part of a step; `agree` is what the loop tells all ranks after it, `log` what a logged step
adds."""


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Equal collectives of one optimizer step, micro-batches and layers together."""

    name: str
    """What travels: gradients, parameters, norm, overflow, losses, votes, ..."""
    op: Op
    bytes: int
    """Of the whole tensor on one call: what all_reduce, reduce and broadcast take, what all_gather
    gives, what reduce_scatter takes. A ring moves (g - 1) / g of it per rank, twice in
    all_reduce."""
    times: int
    """Calls in one optimizer step (for `log`: in one logged step)."""
    group_size: int
    """Ranks g that take part."""
    when: When
    every_steps: int = 1
    """Steps between its appearances; 1 but for `log`."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all calls of a step in which it appears."""
        return self.bytes * self.times


def collectives(run: RunConfig, vocab_size: int, world_size: int) -> list[Collective]:
    """List the collectives of one optimizer step on one rank, in the order of their parts.

    Args:
        run: Model, ZeRO stage, buckets, precision, clipping and accumulation (from its batch).
        vocab_size: Rows V of the embedding table.
        world_size: Number of ranks.

    Raises:
        ConfigError: The global batch does not divide over the ranks.
    """
    raise NotImplementedError

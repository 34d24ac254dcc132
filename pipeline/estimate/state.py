"""From a run and a world size to the bytes of model state that one rank holds, to the byte."""

from dataclasses import dataclass
from typing import Literal

from pipeline.config.schema import RunConfig

Offload = Literal["none", "optimizer", "optimizer_and_parameters"]
"""What DeepSpeed keeps in the host's memory instead of the device's; parameters at stage 3 only."""


@dataclass(frozen=True, kw_only=True)
class RankState:
    """Bytes of model state on one rank, padding of partitions included."""

    parameters: int
    """Working weights that forward and backward read."""
    gradients: int
    """Gradients that stand when the update begins."""
    moments: int
    """AdamW's two moments, float32."""
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
        vocab_size: Rows V of the embedding table.
        world_size: Number of ranks.
        rank: Which rank; ranks differ by padding at most.
    """
    raise NotImplementedError

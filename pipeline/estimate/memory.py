"""From a run and a world size to what fills the memory of one rank at its peak, by component."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pipeline.config.schema import RunConfig
from pipeline.estimate.state import Offload

Place = Literal["device", "host"]
"""Where bytes lie; on a CPU everything is `device`, the memory of the rank's process."""


@dataclass(frozen=True, kw_only=True)
class MemoryComponent:
    """One part of a rank's memory."""

    name: str
    bytes: float
    exact: bool
    """Whether it is counted and tested equal; else it is a model, and `note` says of what."""
    note: str
    """Where the number comes from, in a few words."""
    place: Place = "device"


def memory_table(
    run: RunConfig,
    vocab_size: int,
    world_size: int,
    accelerator: Literal["cpu", "cuda"] = "cpu",
    offload: Offload = "none",
) -> list[MemoryComponent]:
    """List what one rank holds at its peak; the sum over a place is the peak there.

    Args:
        run: The run; its `train.micro_batch_samples` sets the activations.
        vocab_size: Rows V of the embedding table.
        world_size: Number of ranks.
        accelerator: What the ranks compute on.
        offload: What lies in the host's memory beside a GPU; legal with `accelerator="cuda"`.

    Raises:
        ConfigError: Offload at a stage that has none, or on a CPU.
    """
    raise NotImplementedError


def peak_bytes(table: Iterable[MemoryComponent], place: Place = "device") -> float:
    """Sum the components of one place."""
    return sum(component.bytes for component in table if component.place == place)

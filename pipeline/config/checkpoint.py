"""When a run writes checkpoints, which stay, and from which of another run it may begin."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipeline.config.section import Section


class CheckpointConfig(Section):
    """When canonical checkpoints are written and how many stay."""

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; None and no `every_seconds` writes one at the end or at a stop
    only."""
    every_seconds: float | None = Field(default=None, gt=0.0)
    """Seconds from the begin of one checkpoint to that of the next, by the clock of rank 0 at the
    end of a step; beside `every_steps`, whichever comes first."""
    asynchronous: bool = True
    """Whether files are written beside training, which then waits only for the copy to the CPU. On
    by default, as what is saved is the same; it costs that copy's memory, 12 bytes a parameter
    over all ranks, until the files are written."""
    store: str | None = None
    """URL of an object store that holds the checkpoints, as in s3://bucket/run, for hosts without a
    shared directory; a run needs one of its own. None keeps them in the run directory."""
    keep: int = Field(default=2, ge=2)
    """Newest checkpoints kept; never below two, so that a damaged one has a predecessor."""
    keep_steps: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Steps whose checkpoints are written and stay, beside those; none, as only a run that others
    branch from needs them."""


class BranchConfig(Section):
    """A run that begins in a checkpoint of another one, its trunk, as a cool-down does.

    Up to the checkpoint both are the same run: equal model, data, seed, batches and learning rates.
    """

    run_dir: Path
    """Directory of the trunk."""
    step: int = Field(ge=1)
    """Step of the checkpoint; `checkpoint.keep_steps` of the trunk has to name it."""


def check_steps(
    checkpoint: CheckpointConfig, branch: BranchConfig | None, total_steps: int
) -> None:
    """Refuse steps that a run never comes to.

    Raises:
        ValueError: A kept checkpoint lies beyond the end, or the run begins there.
    """
    beyond = [step for step in checkpoint.keep_steps if step > total_steps]
    if beyond:
        raise ValueError(
            f"checkpoint.keep_steps={beyond} lies beyond the run's {total_steps} steps; "
            f"nearest: {total_steps}"
        )
    if branch is not None and branch.step >= total_steps:
        raise ValueError(
            f"branch.step={branch.step} leaves nothing to train of the run's {total_steps} steps; "
            f"nearest: {total_steps - 1}"
        )

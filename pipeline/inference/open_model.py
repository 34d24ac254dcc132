"""From any directory that holds a model, of a run or exported, to the model."""

from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.errors import CheckpointError
from pipeline.inference.exported import is_export, load_export
from pipeline.inference.weights import LoadedModel, load_trained


def open_model(
    path: Path,
    step: int | None = None,
    device: torch.device | None = None,
    on_event: Callable[[str], None] = print,
) -> LoadedModel:
    """Load the model of a run, of a checkpoint or of an exported directory.

    Args:
        path: The directory.
        step: The checkpoint wanted of a run; None takes the newest.
        device: Where to put the weights; None keeps them on the CPU.
        on_event: Told of each damaged checkpoint that is passed over.

    Raises:
        PipelineError: As `load_trained` and `load_export`.
    """
    if not is_export(path):
        return load_trained(path, step, device, on_event)
    if step is not None:
        raise CheckpointError(f"{path} is an export, which has one step; give --step with a run")
    return load_export(path, device)

"""From a built model to the same model with blocks that compute again, or compiled."""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from pipeline.config.schema import TrainConfig
from pipeline.models.base import LanguageModel


def set_execution(model: LanguageModel, train: TrainConfig) -> None:
    """Let the blocks of a model run as the config says; its parameters and their names stay.

    Called before an engine hooks itself into the modules. Compilation happens at the first call.
    Activations that are computed again see the random numbers of the first time, so dropout drops
    the same.

    Args:
        model: The model; changed in place.
        train: Holds the switches.
    """
    if train.compile:
        for block in model.compilable_blocks():
            _replace_forward(block, torch.compile(block.forward))
    if train.activation_checkpointing:
        for block in model.checkpointable_blocks():
            _replace_forward(block, partial(checkpoint, block.forward, use_reentrant=False))


def _replace_forward(block: torch.nn.Module, forward: object) -> None:
    # On the instance, so that hooks of the block still run around it.
    object.__setattr__(block, "forward", forward)

"""From the run's seed to each rank's random numbers in training, and to bytes that resume them.

Dropout is all that draws from torch's global generators: weights, samples and text have generators
of their own.
"""

import base64

import numpy as np
import torch

from pipeline.training.distributed import RankContext

DROPOUT = 1
"""Tells the stream of dropout from others of the same seed."""


def seed_dropout(seed: int, ranks: RankContext) -> None:
    """Start this rank's dropout, on all its devices; ranks draw differently.

    Args:
        seed: Of the run.
        ranks: This rank among the others.
    """
    stream = np.random.SeedSequence([seed, DROPOUT, ranks.rank])
    torch.manual_seed(int(stream.generate_state(1, np.uint64)[0]))


def random_state(ranks: RankContext) -> dict[str, str]:
    """Give the state of this rank's global generators by device, in base64."""
    states = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return {k: base64.b64encode(bytes(s.numpy())).decode() for k, s in states.items()}


def set_random_state(states: list[dict[str, str]], ranks: RankContext) -> None:
    """Put back this rank's generators; a rank that did not exist keeps its own.

    Args:
        states: Of every rank that wrote, as `random_state`.
        ranks: This rank among the others.
    """
    if ranks.rank >= len(states):
        return
    decoded = {
        k: torch.frombuffer(bytearray(base64.b64decode(s)), dtype=torch.uint8)
        for k, s in states[ranks.rank].items()
    }
    torch.set_rng_state(decoded["cpu"])
    if ranks.device.type == "cuda" and "cuda" in decoded:
        torch.cuda.set_rng_state(decoded["cuda"], ranks.device)

"""From the seconds of a run by what they went into to the share that trained, and a line about it.

The account is taken on rank 0, by the monotonic clock within an attempt; between two attempts,
which may have run on different hosts, by the wall clock. Everything that is not stated is absent.
"""

from collections.abc import Mapping

PARTS = {
    "train": "training",
    "init": "starting",
    "restore": "restoring",
    "first_step": "first step",
    "data_wait": "waiting for data",
    "checkpoint": "checkpoints",
    "eval": "evaluation",
    "tracking": "tracking",
    "skipped": "skipped steps",
    "lost": "steps taken again",
    "detect": "noticing failures",
    "restart": "restarting",
    "idle": "stopped",
    "other": "other",
}
"""What wall time goes into, and its name for people:

- train: steps whose update the run keeps, without their wait for data
- init: start of the process, loading torch and DeepSpeed, rendezvous, building the engine
- restore: reading a checkpoint, at a start or a rewind
- first_step: what the first step of an attempt took more than the next ones
- data_wait: the part of steps in which the loader was waited for
- checkpoint: saving, the part that training waits for
- eval, tracking: scoring the validation set; writing events
- skipped: steps that were not applied, for a non-finite number or a spike
- lost: steps that the run has undone, because it went back to a checkpoint before them
- detect: from the last account of an attempt that failed to its last sign of life; the steps after
  that account are in it
- restart: from there to the start of the next process
- idle: from an agreed stop to the next start
- other: what is left of the wall time of the attempts
"""
SMALLEST_SHOWN_FRACTION = 0.01


def goodput_fraction(spent: Mapping[str, float]) -> float | None:
    """Give the share of kept steps in the wall time, without the time it stood stopped on request.

    Args:
        spent: Seconds by part, and `wall`, their sum.

    Returns:
        The fraction; None where no step was taken.
    """
    train = spent.get("train", 0.0)
    wall = spent.get("wall", 0.0) - spent.get("idle", 0.0)
    return train / wall if train > 0.0 and wall > 0.0 else None


def describe_goodput(goodput: Mapping[str, float]) -> str | None:
    """Say in a line where the time of a run went, the largest part first.

    Args:
        goodput: As in `result.json`: seconds by part, each name with `_seconds`.

    Returns:
        The line; None where the run kept no account.
    """
    spent = {name.removesuffix("_seconds"): value for name, value in goodput.items()}
    wall = spent.get("wall", 0.0)
    if wall <= 0.0:
        return None
    shares = {PARTS.get(k, k): v / wall for k, v in spent.items() if k != "wall"}
    shown = sorted(shares.items(), key=lambda item: -item[1])
    listed = [f"{100 * v:.0f}% {k}" for k, v in shown if v >= SMALLEST_SHOWN_FRACTION]
    return f"where {wall:.0f} s went: {', '.join(listed)}"

"""From what a checkpoint takes to whether there is room for it, before training and at a full disk.

Object stores have as much room as they are paid for, and are not asked.
"""

import errno
import math
import shutil

from pipeline.config.schema import RunConfig
from pipeline.errors import CheckpointError
from pipeline.training.checkpoint_commit import HIDDEN_PREFIX, read_pointer
from pipeline.training.checkpoint_files import sorted_names
from pipeline.training.checkpoint_store import CheckpointStore, LocalStore

PARAMETER_BYTES = 12
"""A weight and AdamW's two moments, in float32."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk, or of a user's share of it, that is full."""


def check_space(store: CheckpointStore, checkpoint_bytes: int, run: RunConfig) -> None:
    """Check that the checkpoints which an attempt is to write beside those there find room.

    Args:
        store: Where they are.
        checkpoint_bytes: Size of one.
        run: How many are kept, and when one is written.

    Raises:
        CheckpointError: They do not; the message has the bytes needed and free.
    """
    if not isinstance(store, LocalStore):
        return
    num_standing = len(sorted_names(store.entries()))
    # The one being written stands beside those that are kept, and those to be removed stand until
    # it does.
    num_most = run.checkpoint.keep + len(run.checkpoint.keep_steps) + 1
    num_written = most_written(run)
    num_wanted = max(1, min(num_most - num_standing, num_written or num_most))
    # What an interrupted save left goes before the next one.
    left_over = store.root.glob(f"{HIDDEN_PREFIX}*/*")
    free = free_bytes(store) + sum(path.stat().st_size for path in left_over)
    needed = num_wanted * checkpoint_bytes
    if free < needed:
        raise CheckpointError(
            f"{store.root} has {free:,} bytes free, and {num_wanted} checkpoints of "
            f"{checkpoint_bytes:,} bytes need {needed:,}: up to {num_most} stand at once, the one "
            f"being written included, {num_standing} do, and this attempt writes "
            f"{'any number' if num_written is None else f'up to {num_written}'}. Make room, or set "
            "output_dir to a larger disk or checkpoint.store to an object store"
        )


def most_written(run: RunConfig) -> int | None:
    """Give how many checkpoints an attempt writes at most; None where a clock decides."""
    policy = run.checkpoint
    if policy.every_seconds is not None:
        return None
    if policy.every_steps is None:
        # At a stop, or at the end.
        num_periodic = 1
    else:
        to_go_back_to = int(run.guard.spike == "rewind")
        num_periodic = math.ceil(run.train.total_steps / policy.every_steps) + to_go_back_to
    return num_periodic + len(policy.keep_steps)


def free_bytes(store: LocalStore) -> int:
    """Give the bytes that this user may still write where a store is or is to be."""
    place = store.root
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def is_full(error: BaseException | None) -> bool:
    """Tell whether a disk has no room left."""
    return isinstance(error, OSError) and error.errno in FULL


def describe_room(store: CheckpointStore, checkpoint_bytes: int) -> str:
    """Say what a checkpoint needs and what is free, once the files of the failed one are gone."""
    if not isinstance(store, LocalStore):
        return "the store is full"
    return (
        f"a checkpoint needs {checkpoint_bytes:,} bytes and {store.root} has {free_bytes(store):,} "
        "free without it: make room"
    )


def describe_standing(store: CheckpointStore) -> str:
    """Say from where the run goes on."""
    name = read_pointer(store)
    return "no checkpoint stands" if name is None else f"{name} stands, a restart goes on from it"

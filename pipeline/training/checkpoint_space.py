"""From what a checkpoint takes to whether there is room for it, before training and at a full disk.

Object stores have as much room as they are paid for, and are not asked.
"""

import errno
import shutil

from pipeline.errors import CheckpointError
from pipeline.training.checkpoint_commit import HIDDEN_PREFIX, read_pointer
from pipeline.training.checkpoint_files import sorted_names
from pipeline.training.checkpoint_store import CheckpointStore, LocalStore

PARAMETER_BYTES = 12
"""A weight and AdamW's two moments, in float32."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk, or of a user's share of it, that is full."""


def check_space(store: CheckpointStore, checkpoint_bytes: int, num_most: int) -> None:
    """Check that the checkpoints which a run is still to write beside those there find room.

    Args:
        store: Where they are.
        checkpoint_bytes: Size of one.
        num_most: How many stand at once, the one being written included.

    Raises:
        CheckpointError: They do not; the message has the bytes needed and free.
    """
    if not isinstance(store, LocalStore):
        return
    num_standing = len(sorted_names(store.entries()))
    # Those to be removed stand until the next one does.
    num_wanted = max(1, num_most - num_standing)
    # What an interrupted save left goes before the next one.
    left_over = store.root.glob(f"{HIDDEN_PREFIX}*/*")
    free = free_bytes(store) + sum(path.stat().st_size for path in left_over)
    needed = num_wanted * checkpoint_bytes
    if free < needed:
        raise CheckpointError(
            f"{store.root} has {free:,} bytes free, and {num_wanted} checkpoints of "
            f"{checkpoint_bytes:,} bytes need {needed:,}: up to {num_most} stand at once, the one "
            f"being written included, and {num_standing} do. Make room, or set output_dir to a "
            "larger disk or checkpoint.store to an object store"
        )


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

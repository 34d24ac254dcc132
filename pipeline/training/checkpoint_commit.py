"""From written files to a checkpoint that a resume trusts: who commits, in what order, what goes.

One attempt owns the checkpoints of a run: the one with the highest token. Where names can be moved,
a checkpoint is built under a hidden name and moved to its own; else its manifest comes last. Then
`latest` names it, then older ones go. Whatever a crash leaves, `latest` names a checkpoint that
verifies, and what it names is never removed.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Collection
from contextlib import suppress

from pipeline.errors import CheckpointError
from pipeline.training.checkpoint_files import (
    MANIFEST,
    CheckpointManifest,
    checkpoint_step,
    read_stored_manifest,
    size_damage,
    sorted_names,
    verify_stored,
    write_manifest,
)
from pipeline.training.checkpoint_store import CheckpointStore
from pipeline.training.phases import enter

POINTER = "latest"
"""File that holds the name of the newest committed checkpoint."""
OWNER_PREFIX = "owner-"
HIDDEN_PREFIX = ".tmp-"


def claim(store: CheckpointStore) -> str:
    """Become the owner of a run's checkpoints; whoever was it can commit no more.

    Of two that claim at once one wins: the tokens are compared whole.

    Returns:
        A token above all before: a number and some random digits.
    """
    tokens = _tokens(store)
    number = 1 + max((int(token.partition("-")[0]) for token in tokens), default=0)
    mine = f"{number:08d}-{secrets.token_hex(4)}"
    facts = {"host": socket.gethostname(), "pid": os.getpid(), "since_unix_seconds": time.time()}
    # A rival who has read it may have removed it before it is on disk; then `check_owner` tells.
    with suppress(FileNotFoundError):
        store.write({OWNER_PREFIX + mine: [json.dumps(facts).encode()]})
    # A smaller one of the same number may be of a rival that has still to read that it lost.
    for token in tokens:
        store.remove(OWNER_PREFIX + token)
    return mine


def check_owner(store: CheckpointStore, token: str) -> None:
    """Check that nobody has claimed the checkpoints since.

    Raises:
        CheckpointError: Somebody has; the message says who.
    """
    newest = max(_tokens(store), default="none")
    if newest != token:
        raise CheckpointError(
            f"these checkpoints belong to attempt {newest} now, this is {token}: another process "
            f"took the run over while this one did not answer; {OWNER_PREFIX}{newest} tells its "
            "host and pid. End one of the two"
        )


def _tokens(store: CheckpointStore) -> list[str]:
    return [n[len(OWNER_PREFIX) :] for n in store.entries() if n.startswith(OWNER_PREFIX)]


def staged_name(store: CheckpointStore, name: str, token: str) -> str:
    """Give where the files of a checkpoint go before it is one."""
    return name if store.rename is None else f"{HIDDEN_PREFIX}{name}-{token}"


def sweep(store: CheckpointStore) -> None:
    """Remove what saves left behind that were not finished."""
    for name in store.entries():
        is_part = store.rename is None and bool(sorted_names([name]))
        if name.startswith(HIDDEN_PREFIX) or (is_part and MANIFEST not in store.entries(name)):
            store.remove(name)


def candidates(store: CheckpointStore) -> list[str]:
    """Give the checkpoints to try in a resume: the one that `latest` names, then by step.

    A later step than `latest` names is of a crash just before it was named, or of an attempt that
    had lost the run.
    """
    names = sorted_names(store.entries())
    named = read_pointer(store)
    return names if named is None else [named, *(name for name in names if name != named)]


def read_pointer(store: CheckpointStore) -> str | None:
    """Give the name in `latest`, or None if there is none or it is no name of a checkpoint."""
    size = store.entries().get(POINTER)
    if size is None:
        return None
    text = bytearray(size)
    store.read_into(POINTER, 0, memoryview(text))
    return next(iter(sorted_names([text.decode(errors="replace").strip()])), None)


def point(store: CheckpointStore, token: str, name: str) -> None:
    """Let `latest` name a checkpoint, unless this attempt is no longer the owner.

    Raises:
        CheckpointError: It is not.
    """
    check_owner(store, token)
    data = [f"{name}\n".encode()]
    if store.rename is None:
        store.write({POINTER: data})
        return
    hidden = f"{HIDDEN_PREFIX}{POINTER}-{token}"
    store.write({hidden: data})
    store.rename(hidden, POINTER)


def commit(store: CheckpointStore, token: str, name: str, manifest: CheckpointManifest) -> None:
    """Turn staged files into a checkpoint and let `latest` name it.

    Args:
        store: Holds the files under their staged name.
        token: Of this attempt.
        name: The checkpoint's name.
        manifest: Lists the files.

    Raises:
        CheckpointError: This attempt is no longer the owner, or a file of another rank is not seen
            here in its full size.
    """
    staged = staged_name(store, name, token)
    sizes = store.entries(staged)
    problems = [p for file in manifest.files if (p := size_damage(file, sizes)) is not None]
    if problems:
        raise CheckpointError(
            f"{staged} is not what the ranks wrote: {'; '.join(problems)}; do all hosts see the "
            "same directory?"
        )
    check_owner(store, token)
    write_manifest(store, staged, manifest)
    if store.rename is not None:
        check_owner(store, token)
        if name in store.entries():
            # Damaged, and passed over by the resume, or never named by `latest`.
            discard(store, name)
        enter("checkpoint.rename", manifest.step)
        store.rename(staged, name)
    enter("checkpoint.commit", manifest.step)
    point(store, token, name)


def prune(
    store: CheckpointStore,
    name: str,
    keep: int,
    verified: set[str],
    keep_steps: Collection[int] = (),
) -> None:
    """Remove checkpoints beyond the newest `keep` that verify, and those of later steps.

    Later ones were damaged, or the attempt that wrote them had lost the run. While fewer than two
    verify, nothing goes.

    Args:
        store: Holds the checkpoints.
        name: The one that was just committed.
        keep: How many stay, at least two.
        verified: Those known to verify, so that none is read twice; takes up what is found.
        keep_steps: Steps up to this one whose checkpoints stay besides.
    """
    others = [other for other in sorted_names(store.entries()) if other != name]
    kept = [name]
    for other in others:
        is_older = checkpoint_step(other) < checkpoint_step(name)
        if is_older and len(kept) < keep and _verifies(store, other, verified):
            kept.append(other)
    if len(kept) < 2:
        return
    for other in others:
        step = checkpoint_step(other)
        stays = other in kept or (step in keep_steps and step < checkpoint_step(name))
        if not stays:
            discard(store, other)


def _verifies(store: CheckpointStore, name: str, verified: set[str]) -> bool:
    """Tell whether a checkpoint verifies; of one that did, only sizes are looked at again."""
    try:
        if name not in verified:
            verify_stored(store, name)
        sizes = store.entries(name)
        files = read_stored_manifest(store, name).files
    except (OSError, CheckpointError):
        return False
    if any(size_damage(file, sizes) is not None for file in files):
        return False
    verified.add(name)
    return True


def discard(store: CheckpointStore, name: str) -> None:
    """Remove a checkpoint so that one half removed never counts as one."""
    if store.rename is None:
        store.remove(f"{name}/{MANIFEST}")
        store.remove(name)
        return
    hidden = f"{HIDDEN_PREFIX}discarded-{name}"
    store.remove(hidden)
    store.rename(name, hidden)
    store.remove(hidden)
